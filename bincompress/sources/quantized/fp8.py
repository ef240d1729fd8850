"""FP8: 8-bit floats (E4M3) with a scale a tensor, a row or a block. Every value is the float times its scale.

Source: transformers, integrations/finegrained_fp8.py (`Fp8Dequantize`, `_dequantize_fp8_weight`). The scale is named
`weight_scale_inv` or `weight_scale`; it is multiplied under both names.
"""

import ml_dtypes
import numpy as np

from bincompress.sources.mapping import map_floats, map_items
from bincompress.sources.quantized.rows import Fill, Floats, multiply, scale_rows
from bincompress.tensors.weight import Encoding, TensorSource, encoded

_E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def source_of(
    name: str, weight: TensorSource, scale: TensorSource, block: tuple[int, int], dtype: str, what: str
) -> TensorSource:
    """Return the matrix that 8-bit floats and their scales stand for; block: rows and columns of one scale."""
    options = (("height", block[0]), ("width", block[1]))
    return encoded(name, dtype, weight.shape, Encoding(what, "fp8", (("weight", weight), ("scale", scale)), options))


def decoder(source: TensorSource) -> Fill:
    """Return what computes the values of rows."""
    encoding = source.encoding
    assert encoding is not None
    weight, scale = (dict(encoding.parts)[role] for role in ("weight", "scale"))
    items, height, width = map_items(weight), encoding.option("height"), encoding.option("width")
    scales = map_floats(scale).reshape(-(-weight.shape[0] // height), -1)

    def fill(start: int, stop: int, values: Floats) -> None:
        np.take(_E4M3, items[start:stop], out=values, mode="clip")  # every byte has its place in the table
        multiply(values, scale_rows(scales, start, stop, height), width)

    return fill
