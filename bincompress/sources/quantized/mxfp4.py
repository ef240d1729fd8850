"""MXFP4 as gpt-oss stores it: 4-bit floats (E2M1), two a byte, the lower first; 32 share a power of two.

The tensors of experts, (experts, outputs, blocks, 16), become (experts, inputs, outputs), as transformers has them.
BF16 has all the values exactly. Source: transformers, integrations/mxfp4.py (`_convert_moe_packed_tensors`).
"""

import numpy as np

from bincompress.sources.mapping import map_items
from bincompress.sources.quantized.rows import Bytes, Fill, Floats
from bincompress.tensors.weight import Encoding, TensorSource, encoded

_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1 = np.array([*_HALF, *(-value for value in _HALF)], np.float32)
_PAIRS = np.stack([_E2M1[np.arange(256) & 15], _E2M1[np.arange(256) >> 4]], axis=-1)  # both floats of a byte
BLOCK = 32  # floats that share an exponent
_BIAS = 127


def source_of(name: str, blocks: TensorSource, scales: TensorSource) -> TensorSource:
    """Return the tensor that blocks (experts, outputs, count, 16) and scales (experts, outputs, count) stand for."""
    experts, outputs, count, _ = blocks.shape
    parts = (("blocks", blocks), ("scales", scales))
    return encoded(name, "BF16", (experts, count * BLOCK, outputs), Encoding("MXFP4", "mxfp4", parts))


def decoder(source: TensorSource) -> Fill:
    """Return what computes the values of rows, which are the inputs of one expert after the other."""
    encoding = source.encoding
    assert encoding is not None
    parts = dict(encoding.parts)
    blocks, scales = map_items(parts["blocks"]), map_items(parts["scales"])
    inputs = source.shape[1]

    def fill(start: int, stop: int, values: Floats) -> None:
        row = start
        while row < stop:
            expert, low = divmod(row, inputs)
            high = min(inputs, low + stop - row)
            first, last = low // BLOCK, -(-high // BLOCK)
            found = values_of(blocks[expert, :, first:last], scales[expert, :, first:last])
            values[row - start : row - start + high - low] = found[:, low - first * BLOCK : high - first * BLOCK].T
            row += high - low

    return fill


def values_of(blocks: Bytes, scales: Bytes) -> Floats:
    """Return the values (n, count * 32) of blocks (n, count, 16) and scales (n, count)."""
    rows, count, _ = blocks.shape
    exponents = scales.astype(np.int32) - _BIAS
    values: Floats = np.ldexp(_PAIRS[blocks].reshape(rows, count, BLOCK), exponents[..., None])
    return values.reshape(rows, count * BLOCK)
