"""How kernels are compiled, and the LLVM operations that plain loops do not reach."""
