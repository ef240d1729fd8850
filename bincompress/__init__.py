"""bincompress: language models in a few binary planes, for CPUs.

The functions that a program calls stand in `bincompress.api`; they are imported when they are first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bincompress.api import (
        batch,
        calibrate,
        compress,
        compress_several,
        distill,
        evaluate,
        export,
        fit,
        inspect,
        load,
        pack,
        plan,
        push,
        train,
        unpack,
        verify,
    )

__version__ = "0.1.0"
__all__ = [
    "__version__", "batch", "calibrate", "compress", "compress_several", "distill", "evaluate", "export", "fit",
    "inspect", "load", "pack", "plan", "push", "train", "unpack", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a function when it is first asked for: the command line's --help does not need Numba."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # To run a model, nothing of compression is needed.
    module = importlib.import_module("bincompress.inference.load" if name == "load" else "bincompress.api")
    return getattr(module, name)
