"""What does a training keep of a completed layer, so that an interrupted run finds it again?"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from bincompress.distillation.layers import LayerReport
from bincompress.distillation.low_rank import flat
from bincompress.distillation.model import Student, trained_vectors
from bincompress.distillation.settings import DistillError
from bincompress.distillation.tensors import Tensors
from bincompress.distillation.train import writable
from bincompress.tensors.low_rank import LowRankTensor

_STORED = ("planes ", "numbers ", "vector ")
_KINDS = (*_STORED, "latents ")


def write_layer(path: Path, record: dict[str, Any], student: Student, report: LayerReport) -> None:
    """Write a trained layer and its report; a crash leaves the file that was there. record: as for `read_layer`."""
    arrays: dict[str, Any] = {f"vector {name}": values for name, values in trained_vectors(student).items()}
    exponents = {}
    for name, packed in student.packed().items():
        own = flat(packed) if isinstance(packed, LowRankTensor) else (packed.planes, packed.numbers)
        arrays |= {f"planes {name}": own[0], f"numbers {name}": own[1]}
        exponents[name] = packed.exponent
    for group in student.planes:
        arrays |= {f"latents {name}": latents for name, latents in group.latents().items()}
    about = {"record": record, "report": vars(report), "exponents": exponents}
    partial = path.with_suffix(".partial")
    with writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: np.ascontiguousarray(a) for key, a in arrays.items()}, partial, {"about": json.dumps(about)})
        partial.replace(path)


def read_layer(path: Path, record: dict[str, Any], tensors: Tensors) -> LayerReport | None:
    """Give `tensors` what a file has of a layer and return its report; None where there is no such file.

    Raises DistillError where another run wrote it, or it is damaged.
    """
    if not path.exists():
        return None
    with _readable(path), safe_open(path, "numpy") as file:
        about = _about(file, path, record)
        wanted = _KINDS if tensors.keeps_latents else _STORED
        arrays = {key: file.get_tensor(key) for key in file.keys() if key.startswith(wanted)}  # noqa: SIM118
        of = {kind.strip(): {k[len(kind) :]: a for k, a in arrays.items() if k.startswith(kind)} for kind in _KINDS}
        tensors.check_vectors(of["vector"])
        packed = {
            name: tensors.with_trained(name, planes, of["numbers"][name], about["exponents"][name])
            for name, planes in of["planes"].items()
        }
        tensors.put(packed, of["vector"], of["latents"])
        return LayerReport(**about["report"])


def check_layer_files(work: Path, record: dict[str, Any]) -> None:
    """Raise DistillError where an interrupted run with other settings has left layers, before any is trained."""
    for path in sorted(work.glob("*-[0-9]*.safetensors")):
        with _readable(path), safe_open(path, "numpy") as file:
            _about(file, path, record)


def _about(file: Any, path: Path, record: dict[str, Any]) -> dict[str, Any]:
    about: dict[str, Any] = json.loads(file.metadata()["about"])
    if about["record"] != json.loads(json.dumps(record)):
        raise DistillError(
            f"{path}: a run with other settings, text or store was interrupted here; use the same to resume, or "
            "--overwrite to start again"
        )
    return about


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise DistillError(
            f"{path}: not a readable file of a trained layer ({type(error).__name__}); delete it to train this layer "
            "again"
        ) from None
