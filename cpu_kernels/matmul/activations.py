"""Symmetric quantization of activations to 8 or 6 bits, with a scale per token or per token and 128 columns."""

import collections
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numba import types
from numpy.typing import NDArray

from cpu_kernels.jit.addresses import float32_rows, int8_rows, int32_rows, int64_items
from cpu_kernels.jit.compiler import inline, kernel

SEGMENT = 128  # columns that share a scale where `per` is "segment"; the columns are padded to a multiple of it
LEVELS = {8: 127, 6: 31}

Per = Literal["token", "segment"]


@dataclass(frozen=True, eq=False)
class Activations:
    """Quantized inputs of a product: x[t, c] is about q[t, c] * scale[t, c // 128]; columns past `cols` are zero."""

    cols: int
    bits: int
    q: NDArray[np.int8]  # (n, columns padded to 128)
    scale: NDArray[np.float32]  # (n, segments)
    sums: NDArray[np.int32]  # (n, words): sum of q per 64 columns
    absolute: NDArray[np.int32]  # (n, words): sum of |q| per 64 columns
    prepared: dict[Any, Any] = field(default_factory=dict, repr=False)  # tables by kernel, shared by the products


def quantize(x: NDArray[np.float32], bits: int = 8, per: Per = "token") -> Activations:
    """Quantize x (n, cols) or (cols,) to -127..127 (8 bits) or -31..31 (6 bits), with one scale per token or segment.

    A token or segment that holds NaN or infinity gets q = 0 and the scale NaN, so that its products are NaN.
    """
    check_settings(bits, per)
    x = np.ascontiguousarray(x, np.float32)
    if x.ndim == 1:
        x = x[None]
    made = empty_activations(*x.shape, bits)
    told = {"x": x.ctypes.data, **quantizing(made, per)}
    block = np.array([told[field] for field in QUANTIZING], np.int64)
    quantize_tokens(block.ctypes.data, 0, len(x))
    return made


def quantizing(made: Activations, per: Per) -> dict[str, int]:
    """Return what the kernel is told about activations to be made, all but where x lies."""
    tokens, segments = made.scale.shape
    return {
        "cols": made.cols,
        "level": LEVELS[made.bits],
        "span": SEGMENT if per == "segment" else segments * SEGMENT,
        "tokens": tokens,
        "segments": segments,
        "q": made.q.ctypes.data,
        "scale": made.scale.ctypes.data,
        "sums": made.sums.ctypes.data,
        "absolute": made.absolute.ctypes.data,
    }


def empty_activations(tokens: int, cols: int, bits: int) -> Activations:
    """Return activations of these sizes to be filled in."""
    segments = -(-cols // SEGMENT)
    return Activations(
        cols,
        bits,
        np.empty((tokens, segments * SEGMENT), np.int8),
        np.empty((tokens, segments), np.float32),
        np.empty((tokens, 2 * segments), np.int32),
        np.empty((tokens, 2 * segments), np.int32),
    )


def check_settings(bits: int, per: str) -> None:
    """Raise ValueError for a setting that is unknown."""
    if bits not in LEVELS:
        raise ValueError(f"activation bits: {bits}; expected 8 or 6")
    if per not in ("token", "segment"):
        raise ValueError(f"activation scale per {per!r}; expected 'token' or 'segment'")


@inline
def _largest(bits: Any, start: Any, end: Any) -> Any:
    # As integers without the sign, floats keep their order and NaN is above infinity; and integers vectorise.
    largest = np.int32(0)
    for c in range(np.uint64(start), np.uint64(end)):
        largest = max(largest, np.int32(bits[c] & np.int32(0x7FFFFFFF)))
    return largest


# The int64 words that quantizing is told: sizes, and addresses of C-contiguous arrays.
QUANTIZING = (
    "x",  # float32 (tokens, cols)
    "cols",
    "level",  # largest quantized value
    "span",  # columns that share a scale of x
    "tokens",
    "segments",  # of 128 columns
    "q",  # int8 (tokens, 128 * segments)
    "scale",  # float32 (tokens, segments)
    "sums",  # int32 (tokens, 2 * segments): sum of q per 64 columns
    "absolute",  # the same of |q|
)
_AT: Any = collections.namedtuple("_AT", QUANTIZING)(*range(len(QUANTIZING)))  # type: ignore[misc]  # word of each
_WORDS = len(QUANTIZING)


@kernel(types.void(types.int64, types.int64, types.int64))
def quantize_tokens(block_address: Any, first: Any, last: Any) -> None:
    """Quantize tokens first .. last - 1 as the block at this address says."""
    block = int64_items(block_address, _WORDS)
    tokens, segments = block[_AT.tokens], block[_AT.segments]
    x = float32_rows(block[_AT.x], tokens, block[_AT.cols])
    q = int8_rows(block[_AT.q], tokens, 128 * segments)
    scale = float32_rows(block[_AT.scale], tokens, segments)
    sums = int32_rows(block[_AT.sums], tokens, 2 * segments)
    absolute = int32_rows(block[_AT.absolute], tokens, 2 * segments)
    level = np.float32(block[_AT.level])
    span = block[_AT.span]
    bits = x.view(np.int32)
    cols = x.shape[1]
    for t in range(first, last):
        # One-dimensional rows and unsigned positions: without the tests for negative indices the loops vectorise.
        values = x[t]
        row = q[t]
        for start in range(0, q.shape[1], span):
            end = min(start + span, cols)
            largest = np.int32(_largest(bits[t], start, end)).view(np.float32)
            step = np.float32(largest / level)
            inverse = np.float32(level / largest)
            if not math.isfinite(largest):
                step = np.float32(np.nan)
                inverse = np.float32(0)
            elif not math.isfinite(inverse):  # all zero, or below 1e-36: too small to matter
                step = np.float32(0)
                inverse = np.float32(0)
            for segment in range(start // 128, (start + span) // 128):
                scale[t, segment] = step
            if inverse == 0:
                row[start : start + span] = 0
            else:
                for c in range(np.uint64(start), np.uint64(end)):
                    # The product exceeds the level by its rounding at most, and so never after rint.
                    row[c] = np.int8(np.int32(np.rint(values[c] * inverse)))
                row[end : start + span] = 0
        for w in range(sums.shape[1]):
            total = np.int32(0)
            size = np.int32(0)
            for c in range(np.uint64(64 * w), np.uint64(64 * w + 64)):
                value = np.int32(row[c])
                total = np.int32(total + value)
                size = np.int32(size + max(value, np.int32(-value)))
            sums[t, w] = total
            absolute[t, w] = size
