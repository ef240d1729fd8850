"""How kernels are compiled, and the LLVM operations that plain loops do not reach."""

from cpu_kernels.jit import numba_settings  # noqa: F401 (which imports Numba, and hears what it says to its settings)
