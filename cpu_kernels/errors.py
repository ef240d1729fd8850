"""What kernels raise where the machine or its settings do not let them be compiled."""


class KernelError(RuntimeError):
    """Kernels cannot be compiled here; the message is one line that says why and what to change."""
