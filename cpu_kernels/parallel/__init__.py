"""Threads that share the work of one call."""

import cpu_kernels.jit  # noqa: F401 (before any other module imports Numba)
