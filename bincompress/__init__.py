"""bincompress: language models in a few binary planes, for CPUs."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bincompress.inference.load import load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    """Import `load` when it is first asked for: the command line's --help does not need Numba."""
    if name == "load":
        from bincompress.inference.load import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
