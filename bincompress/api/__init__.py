"""What can a program do with bincompress? Each function is one verb of the command line, which calls nothing else.

>>> import bincompress
>>> result = bincompress.compress("./Llama-3.2-1B", "./store", groups=2, block=128)  # doctest: +SKIP
>>> print(result.total["stored_bits"])  # doctest: +SKIP
>>> print("".join(bincompress.load("./store").stream("The scheduler")))  # doctest: +SKIP

Every function raises a subclass of `bincompress.errors.BincompressError` for what the user can mend.
Each is imported when it is first asked for, with what it needs: to inspect a store nothing of compression is.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bincompress.api.calibration import CalibrationResult, calibrate
    from bincompress.api.compression import (
        CompressionResult,
        batch,
        carry_out,
        carry_out_all,
        carry_out_several,
        compress,
        compress_several,
    )
    from bincompress.api.evaluation import evaluate
    from bincompress.api.sharing import export, pack, push, unpack
    from bincompress.api.training import distill, train
    from bincompress.api.verification import VerifyResult, inspect, prove, verify
    from bincompress.compression.fit import Fit, fit
    from bincompress.compression.placement import Placement
    from bincompress.compression.planning import plan, plan_batch, plan_several
    from bincompress.inference.load import load
    from bincompress.store.pack import Packed

__all__ = [
    "CalibrationResult", "CompressionResult", "Fit",
    "Packed", "Placement", "VerifyResult", "batch", "calibrate", "carry_out",
    "carry_out_all", "carry_out_several", "compress", "compress_several", "distill", "evaluate", "export", "fit",
    "inspect",
    "load", "pack", "plan", "plan_batch",
    "plan_several", "prove", "push", "train", "unpack", "verify",
]  # fmt: skip

_MODULES = {
    "bincompress.api.calibration": ("CalibrationResult", "calibrate"),
    "bincompress.api.compression": (
        "CompressionResult",
        "batch",
        "carry_out",
        "carry_out_all",
        "carry_out_several",
        "compress",
        "compress_several",
    ),
    "bincompress.api.evaluation": ("evaluate",),
    "bincompress.api.sharing": ("export", "pack", "push", "unpack"),
    "bincompress.api.training": ("distill", "train"),
    "bincompress.api.verification": ("VerifyResult", "inspect", "prove", "verify"),
    "bincompress.compression.fit": ("Fit", "fit"),
    "bincompress.compression.placement": ("Placement",),
    "bincompress.compression.planning": ("plan", "plan_batch", "plan_several"),
    "bincompress.inference.load": ("load",),
    "bincompress.store.pack": ("Packed",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a name when it is first asked for."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(_MODULE_OF[name]), name)
    return found
