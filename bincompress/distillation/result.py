"""How does a trained student become a store like any other?"""

import contextlib
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bincompress.compression.tensor_report import six_digits
from bincompress.distillation.model import Student
from bincompress.distillation.settings import DistillError
from bincompress.errors import StoreError
from bincompress.methods import method_named
from bincompress.methods.declaration import nominal_bits
from bincompress.sources.checkpoint import Checkpoint, read_weight
from bincompress.store.layout import MODEL, NEW, SEAL, VERSION
from bincompress.store.replace import check_place, put_in_place, remove
from bincompress.store.store import Store, begin_store, is_local
from bincompress.tensors.dequantize import dequantize
from bincompress.tensors.forms import Stored
from bincompress.tensors.low_rank import LowRankTensor
from bincompress.tensors.weight import Weight

_OWN = ("format", "status", "failures", SEAL)  # attributes of a root that are of that store alone
_ERROR_ROWS = 512  # whose weights are float64 at once


def write_store(
    source: Store,
    url: str,
    packed: Mapping[str, Stored],
    vectors: Mapping[str, NDArray[np.float32]],
    teacher: Checkpoint,
    records: Mapping[str, Any],
    log: Mapping[str, Any],
) -> None:
    """Write a copy of a store with what was trained of its tensors; it is complete, or not there.

    packed, vectors: what was trained; records: how, for the root's attributes; log: what differs between equal runs. A
    local store is written within its folder first, then what it replaces is removed, and it takes that place; one
    behind a URL is marked complete last.
    """
    plan = {**{k: v for k, v in source.attributes.items() if k not in _OWN}, **records}
    place = f"{url}/{NEW}" if is_local(url) else url
    try:
        store = begin_store(place, plan, source.read_assets(), uuid.uuid4().hex, overwrite=True)
        for name in source.tensors():
            _write_tensor(source, store, name, packed.get(name), vectors.get(name), teacher, bool(plan.get("archive")))
        store.write_log("distillation", log)
        if not store.finish({}):
            raise StoreError(f"{place}: not every tensor was written; is another program changing it?")
        if is_local(url):
            put_in_place(check_place(url, MODEL, overwrite=True), VERSION)
    except OSError as error:
        raise DistillError(
            f"{url}: cannot be written: {error.strerror or error}; choose a path with free space"
        ) from None
    finally:
        if is_local(url):
            with contextlib.suppress(OSError):
                remove(place, MODEL)
                Path(place).rmdir()


def _write_tensor(
    source: Store, store: Store, name: str, packed: Stored | None, vector: NDArray[np.float32] | None,
    teacher: Checkpoint, archive: bool,
) -> None:  # fmt: skip
    attributes = source.complete_attributes(name)
    del attributes["status"]
    seconds = source.read_log(name)
    if packed is None and source.tensors()[name] == "packed":
        store.write_packed(name, source.read_stored(name, check_hashes=True), archive)
    elif packed is not None:
        attributes = _write_packed(store, name, attributes, packed, teacher, source, archive)
    else:
        weight, shape = source.read_plain(name)
        if vector is not None:
            # In float32, whatever it was: a trained norm's change is often below bfloat16's last digit.
            weight = Weight(np.ascontiguousarray(vector).view(np.uint32)[None], "F32")
            attributes |= {"dtype": "float32"}
        store.check_plain(name, weight, shape, refuse=True)
        hashes, stored = store.write_plain(name, weight, shape, archive)
        bits = 8.0 * stored / max(1, weight.bits.size)
        report = {**attributes["report"], "stored_bytes": stored, "stored_bits": six_digits(bits)}
        if vector is not None:
            report["nominal_bits"] = 32.0
        attributes |= {"hashes": hashes, "report": report}
    store.commit(name, attributes)
    store.write_log(name, seconds)


def _write_packed(
    store: Store, name: str, attributes: dict[str, Any], packed: Stored, teacher: Checkpoint, source: Store,
    archive: bool,
) -> dict[str, Any]:  # fmt: skip
    hashes, nbytes = store.write_packed(name, packed, archive)
    attributes = {**attributes, "coef_exponent": packed.exponent, "hashes": hashes}
    # Its error can be told only when it can be read back.
    store.commit(name, {**attributes, "report": {}})
    error, norm = _squared_error(store, name, teacher, _folded_scale(source, name, teacher))
    before, weights = attributes["report"], packed.shape[0] * packed.shape[1]
    report = {**before, "stored_bytes": nbytes, "squared_error": six_digits(error)}
    report |= {"squared_norm": six_digits(norm), "relative_error": six_digits(error / norm if norm else 0.0)}
    report |= {"stored_bits": six_digits(8.0 * nbytes / weights)}
    if isinstance(packed, LowRankTensor):
        return {**attributes, "report": report}
    bits, before_bits = 8 * packed.numbers.itemsize, attributes["settings"].get("scale_bits", 16)
    if bits != before_bits and packed.numbers.dtype != np.float32:
        report["nominal_bits"] = six_digits(nominal_bits(packed.numbers.size, packed.numbers.itemsize, weights))
        attributes["settings"] = {**attributes["settings"], "scale_bits": bits}
    report |= method_named(attributes["method"]).describe_planes(packed.planes, packed.shape[1])
    return {**attributes, "report": report}


def _folded_scale(source: Store, name: str, teacher: Checkpoint) -> NDArray[np.float32]:
    """Return what the columns of a tensor were multiplied by because its norm was divided by it, (cols,) or (1,)."""
    for norm, kind in source.tensors().items():
        report = source.complete_attributes(norm)["report"] if kind == "plain" else {}
        if name in report.get("transformation", "").split("scale of ")[-1].split(", "):
            before, after = read_weight(teacher.tensors[norm]).float32(), source.read_plain(norm)[0].float32()
            return np.asarray((before / after).reshape(-1), np.float32)
    return np.ones(1, np.float32)


def _squared_error(store: Store, name: str, teacher: Checkpoint, scale: NDArray[np.float32]) -> tuple[float, float]:
    """Return the squared distance of a stored tensor from its source, and the norm of that squared.

    scale: what the stored columns are larger by, (cols,) or (1,).
    """
    packed, weight = store.read_stored(name), read_weight(teacher.tensors[name])
    error = norm = 0.0
    for row in range(0, packed.shape[0], _ERROR_ROWS):
        part = slice(row, row + _ERROR_ROWS)
        expected = weight.float32(part).astype(np.float64)
        error += float(np.sum(np.square(expected - dequantize(packed, part) / scale)))
        norm += float(np.sum(np.square(expected)))
    return error, norm


def choose_planes(student: Student, teacher: Checkpoint, device: torch.device) -> None:
    """Give every matrix the planes nearest to its weight for its scales as they are now, where its method can."""
    for name, matrix in student.matrices.items():
        choose = method_named(matrix.stored.method).choose_planes
        if choose is not None:
            planes = choose(read_weight(teacher.tensors[name]), matrix.values(), matrix.stored.tensor.block)
            matrix.set_planes(planes, device)
