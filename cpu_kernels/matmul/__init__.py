"""Kernels that multiply packed planes with activations."""

import cpu_kernels.jit  # noqa: F401 (before any other module imports Numba)
