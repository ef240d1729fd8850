"""Uniform levels per row-block, for embeddings and output heads: a scale, an offset and one plane per bit."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from bincompress.methods.declaration import Binarized, Method, Settings, Size, option
from bincompress.methods.inputs import Inputs
from bincompress.methods.rounding.coefficients import from_float16, to_float16
from bincompress.tensors.packed import PackedTensor
from bincompress.tensors.weight import Weight
from cpu_kernels.quantize.packing import pack_codes, words_for
from cpu_kernels.quantize.uniform_levels import block_ranges, nearest_levels

_CHUNK = 1 << 20  # weights that are float32 at once


@dataclass(frozen=True)
class UniformSettings(Settings):
    """How many evenly spaced levels a tensor has."""

    method: ClassVar[str] = "uniform"
    bits: int = option(4, "bits of evenly spaced levels", least=1, most=8)

    def record(self) -> dict[str, Any]:
        """Return what matters to the bytes, as JSON."""
        return {"method": self.method, **self.values("bits", "block")}

    def problem(self, shape: tuple[int, int]) -> str:
        """Return what is wrong beyond single values; empty if nothing."""
        if self.block == "matrix":
            return f"method uniform takes 1 to 8 bits per row or row-block, found {self.bits} per {self.block}"
        return ""


def binarize(weight: Weight, settings: UniformSettings, inputs: Inputs | None = None) -> Binarized:
    """Return settings.bits planes: w ~ offset + scale * (2 ** (bits - 1) * plane 0 + ... + 1 * the last plane).

    Two coefficients are stored per row-block, scale and offset; `mix` multiplies the scale by each plane's weight.
    """
    rows, cols = weight.shape
    block = settings.block_columns(cols)
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
    numbers, exponent = to_float16(np.stack([(most - least) / (2.0 * top), (most + least) / 2]))
    stored = from_float16(numbers, exponent)
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
    terms = (*(1 << plane for plane in range(bits)), 0)
    mix = (*((w, 0.0) for w in weights), (0.0, 1.0))
    return Binarized(
        PackedTensor(planes, numbers, terms, block, (rows, cols), exponent, mix),
        squared_error=error,
        squared_norm=norm,
        scales=numbers.size,
        groups=1 << bits,
    )


METHOD = Method(
    summary="evenly spaced levels, a scale and an offset per row-block, for embeddings and output head",
    settings=UniformSettings,
    binarize=binarize,
    size=lambda settings: Size(settings.bits, 2),
    embeddings={"4bit": UniformSettings(bits=4), "8bit": UniformSettings(bits=8)},
    binary=False,
)
