"""Uniform levels per row-block, for embeddings and output heads: a scale, an offset and one plane per bit."""

import numpy as np

from bincompress.methods.rounding.coefficients import from_float16, to_float16
from bincompress.records import Binarized, Inputs, Settings, Weight
from cpu_kernels.quantize.packing import pack_codes, words_for
from cpu_kernels.quantize.uniform_levels import block_ranges, nearest_levels

_CHUNK = 1 << 20  # weights that are float32 at once


def binarize(weight: Weight, settings: Settings, inputs: Inputs | None = None) -> Binarized:
    """Return settings.bits planes: w ~ offset + scale * (2 ** (bits - 1) * plane 0 + ... + 1 * the last plane).

    Two coefficients are stored per row-block, scale and offset; `mix` multiplies the scale by each plane's weight.
    """
    rows, cols = weight.shape
    block = settings.block if isinstance(settings.block, int) else cols
    bits = settings.bits
    top = np.float32((1 << bits) - 1)  # levels are scale * (-top, -top + 2, ..., top) + offset
    step = max(1, _CHUNK // cols)
    chunks = [slice(row, min(rows, row + step)) for row in range(0, rows, step)]
    ranges = np.empty((2, rows, -(-cols // block)), np.float32)
    for part in chunks:
        found = np.empty((2, part.stop - part.start, ranges.shape[2]), np.float32)
        block_ranges(weight.float32(part), block, found)
        ranges[:, part] = found
    least, most = ranges.astype(np.float64)
    coef, exponent = to_float16(np.stack([(most - least) / (2.0 * top), (most + least) / 2]))
    stored = from_float16(coef, exponent)
    planes = np.empty((bits, rows, words_for(cols)), np.uint64)
    error = norm = 0.0
    for part in chunks:
        values = weight.float32(part)
        codes = np.empty(values.shape, np.uint8)
        error += nearest_levels(values, block, top, np.ascontiguousarray(stored[:, part]), codes)
        norm += float(np.sum(np.square(values, dtype=np.float64)))
        packed = np.empty((bits, values.shape[0], planes.shape[2]), np.uint64)
        pack_codes(codes.reshape(-1), cols, packed)
        planes[:, part] = packed[::-1]  # plane 0 is the highest bit
    weights = [float(1 << (bits - 1 - plane)) for plane in range(bits)]
    return Binarized(
        planes=planes,
        coef=coef,
        coef_exponent=exponent,
        terms=(*(1 << plane for plane in range(bits)), 0),
        mix=(*((w, 0.0) for w in weights), (0.0, 1.0)),
        block=block,
        squared_error=error,
        squared_norm=norm,
        nominal_bits=bits + 16.0 * coef.size / (rows * cols),
        groups=1 << bits,
    )
