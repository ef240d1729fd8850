"""CPU kernels of bincompress: NumPy and Numba only, plain loops over caller-owned arrays."""
