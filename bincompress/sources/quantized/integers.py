"""compressed-tensors: integers of 4 or 8 bits, or FP8, with a scale a tensor, a row, a group of columns or a block.

Source: compressed-tensors, compressors/pack_quantized and naive_quantized, quantization/lifecycle/forward_helpers.py
(`_dequantize`): (integer - zero point) * scale, in the dtype of the scale.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bincompress.sources.mapping import map_floats, map_items
from bincompress.sources.quantized.rows import Fill, Floats, integers, multiply, scale_rows, subtract
from bincompress.tensors.weight import Encoding, TensorSource, encoded


def source_of(
    name: str,
    shape: tuple[int, int],
    parts: dict[str, TensorSource],
    bits: int,
    block: tuple[int, int],
    what: str,
) -> TensorSource:
    """Return the matrix that integers stand for.

    parts: "weight" (packed, I32, or I8), "scale", and "zero" and "group" (the group of each column) where there are
    such. block: rows and columns of one scale.
    """
    options = (("bits", bits), ("height", block[0]), ("width", block[1]))
    found = Encoding(what, "integers", tuple(parts.items()), options)
    return encoded(name, parts["scale"].dtype, shape, found)


def decoder(source: TensorSource) -> Fill:
    """Return what computes the values of rows."""
    encoding = source.encoding
    assert encoding is not None
    parts = dict(encoding.parts)
    bits, height, width = (encoding.option(name) for name in ("bits", "height", "width"))
    rows, cols = parts["weight"].shape[0], source.shape[1]
    packed = parts["weight"].dtype == "I32"
    items = map_items(parts["weight"])
    scales = map_floats(parts["scale"]).reshape(-(-rows // height), -1)
    zeros = _zeros(parts.get("zero"), scales.shape, bits, packed)
    groups = map_items(parts["group"]) if "group" in parts else None

    def fill(start: int, stop: int, values: Floats) -> None:
        values[:] = integers(items[start:stop], bits)[:, :cols] if packed else items[start:stop]
        own_scales = scale_rows(scales, start, stop, height)
        own_zeros = None if zeros is None else scale_rows(zeros, start, stop, height)
        if packed and own_zeros is None:
            values -= np.float32(1 << (bits - 1))
        if groups is not None:
            values -= 0 if own_zeros is None else own_zeros[:, groups]
            values *= own_scales[:, groups]
            return
        if own_zeros is not None:
            subtract(values, own_zeros, width)
        multiply(values, own_scales, width)

    return fill


def _zeros(part: TensorSource | None, shape: tuple[int, ...], bits: int, packed: bool) -> NDArray[Any] | None:
    """Return the zero points, one for each scale; of packed integers they are packed too, along the rows."""
    if part is None:
        return None
    items = map_items(part)
    if packed and part.dtype == "I32":
        return integers(items.T, bits)[:, : shape[0]].T.astype(np.float32)
    return items.astype(np.float32).reshape(shape) + (np.float32(1 << (bits - 1)) if packed else np.float32(0))
