"""Kernels that multiply packed planes with activations."""
