"""Kernels of a decoder layer beside its matrices."""

import cpu_kernels.jit  # noqa: F401 (before any other module imports Numba)
