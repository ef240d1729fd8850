"""Kernels that turn weights into planes and scales, and back."""

import cpu_kernels.jit  # noqa: F401 (before any other module imports Numba)
