"""The values of one tensor of a source: as they lie in the file, or computed from what a quantized source stores."""

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from bincompress.sources import bitnet, gguf, quantized, turned
from bincompress.sources.mapping import map_items
from bincompress.sources.quantized.rows import Fill
from bincompress.tensors.weight import TensorSource, Weight

_DECODED_AT_ONCE = 1 << 18  # values: what is computed of them stays in the cache
_DECODERS: dict[str, Callable[[TensorSource], Fill]] = {
    **quantized.DECODERS, **gguf.DECODERS, **bitnet.DECODERS, **turned.DECODERS
}  # fmt: skip


def read_weight(source: TensorSource) -> Weight:
    """Return one tensor's items, read-only: floats as bit patterns; one dimension becomes one row.

    What lies in the file as it is, is mapped. Of an encoded tensor the values are in memory, its parts are mapped.
    Raises CheckpointError where the dtype is neither a float's nor one of OTHER_DTYPES, or a file has changed.
    """
    if not math.prod(source.shape):
        return Weight(np.empty((0, 0), map_items(source).dtype), source.dtype)
    shape = (math.prod(source.shape[:-1]), source.shape[-1] if source.shape else 1)
    if source.encoding is None:
        return Weight(map_items(source).reshape(shape), source.dtype)
    return Weight(_decoded(source, *shape), source.dtype)


def _decoded(source: TensorSource, rows: int, cols: int) -> NDArray[Any]:
    """Return the values of an encoded tensor as bit patterns of its dtype, (rows, cols)."""
    assert source.encoding is not None  # as read_weight found
    fill, first = _DECODERS[source.encoding.decoder](source), source.encoding.first_row
    bits = np.empty((rows, cols), np.uint32 if source.dtype == "F32" else np.uint16)
    step = max(1, _DECODED_AT_ONCE // cols)
    scratch = np.empty((min(step, rows), cols), np.float32)
    for start in range(0, rows, step):
        part = bits[start : start + step]
        values = part.view(np.float32) if source.dtype == "F32" else scratch[: len(part)]
        fill(first + start, first + start + len(part), values)
        if source.dtype != "F32":
            part[:] = values.astype(ml_dtypes.bfloat16 if source.dtype == "BF16" else np.float16).view(np.uint16)
    bits.flags.writeable = False
    return bits
