"""What the kernels mean: their NumPy twins, written for reading."""
