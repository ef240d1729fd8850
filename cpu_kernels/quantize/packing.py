"""How do weights become bit planes? Bit i of word j of a row is column 64 j + i; padding bits are zero.

Weights come as their bit patterns, flat and row-major: uint16 (bfloat16, float16) or uint32 (float32).
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from cpu_kernels.jit.compiler import inline, kernel, out, view
from cpu_kernels.quantize.intrinsics import above, bit_plane, four_items, high_bits

U1, U2, U4, U8 = numba.uint8, numba.uint16, numba.uint32, numba.uint64

_STRETCH = 4096  # weights whose codes lie in the first-level cache
BLOCK_STEP = 64  # a block is a multiple of a word, so that no word has two thresholds


def words_for(cols: int) -> int:
    """Return the number of 64-bit words that hold one row of a plane."""
    return -(-cols // 64)


@inline
def _copy_tail(items, start, length, fill, buffer):
    """Put `length` items from start on into buffer (64), and `fill` behind them."""
    for j in range(length):
        buffer[j] = items[start + j]
    for j in range(length, 64):
        buffer[j] = fill


def _pack_signs(bits, negative, cols, plane):
    buffer = np.empty(64, bits.dtype)
    for row in range(plane.shape[0]):
        base = row * cols
        for word in range(cols // 64):
            plane[row, word] = ~high_bits(bits, base + 64 * word)
        if cols % 64:
            _copy_tail(bits, base + cols // 64 * 64, cols % 64, negative, buffer)
            plane[row, cols // 64] = ~high_bits(buffer, 0)


def _pack_two(bits, negative, cols, block, thresholds, planes):
    buffer = np.empty(64, bits.dtype)
    # ~ of a narrow integer is a wide one in Numba: the mask is made by subtraction in the items' own type.
    magnitude = bits.dtype.type(negative - bits.dtype.type(1))
    for row in range(planes.shape[1]):
        base = row * cols
        for word in range(cols // 64):
            limit = thresholds[row, 64 * word // block]
            positive = ~high_bits(bits, base + 64 * word)
            large = above(bits, base + 64 * word, magnitude, limit)
            planes[0, row, word] = positive
            planes[1, row, word] = ~(positive ^ large)
        if cols % 64:
            word = cols // 64
            _copy_tail(bits, base + 64 * word, cols % 64, negative, buffer)
            limit = thresholds[row, 64 * word // block]
            positive = ~high_bits(buffer, 0)
            large = above(buffer, 0, magnitude, limit)
            planes[0, row, word] = positive
            planes[1, row, word] = ~(positive ^ large) & (np.uint64(0xFFFFFFFFFFFFFFFF) >> np.uint64(64 - cols % 64))


def _per_width(body: Callable[..., None], signature: Callable[[Any], Any]) -> dict[int, Callable[..., None]]:
    """Declare a kernel for two-byte and for four-byte items."""
    return {2: kernel(signature(U2))(body), 4: kernel(signature(U4))(body)}


_SIGNS = _per_width(_pack_signs, lambda item: numba.void(view(item, 1), item, numba.int64, out(U8, 2)))
_TWO = _per_width(
    _pack_two, lambda item: numba.void(view(item, 1), item, numba.int64, numba.int64, view(item, 2), out(U8, 3))
)


def pack_signs(bits: Any, cols: int, plane: Any) -> None:
    """Write the sign plane of weights: bit 1 where the sign bit is clear.

    bits: uint16 or uint32 (rows * cols); plane: uint64 (rows, words), overwritten.
    """
    _SIGNS[bits.itemsize](bits, _sign_bit(bits), cols, plane)


def pack_two(bits: Any, cols: int, block: int, thresholds: Any, planes: Any) -> None:
    """Write the two planes of two groups: their sum is +-2 for a large weight, their difference for a small one.

    bits: uint16 or uint32 (rows * cols); thresholds: same dtype (rows, blocks), the greatest magnitude of the small
    group; planes: uint64 (2, rows, words), overwritten.
    """
    if block % BLOCK_STEP and block < cols:
        raise ValueError(f"block {block} is not a multiple of {BLOCK_STEP}")
    _TWO[bits.itemsize](bits, _sign_bit(bits), cols, block, thresholds, planes)


def _sign_bit(bits: Any) -> Any:
    return bits.dtype.type(1 << (8 * bits.itemsize - 1))


@kernel(numba.void(view(U1, 1), numba.int64, out(U8, 3)))
def pack_codes(codes, cols, planes):
    """Write bit p of every code to plane p.

    codes: uint8 (rows * cols); planes: uint64 (at most 8, rows, words), overwritten.
    """
    buffer = np.empty(64, np.uint8)
    for row in range(planes.shape[1]):
        base = row * cols
        for word in range(cols // 64):
            for plane in range(planes.shape[0]):
                planes[plane, row, word] = bit_plane(codes, base + 64 * word, plane)
        if cols % 64:
            _copy_tail(codes, base + cols // 64 * 64, cols % 64, np.uint8(0), buffer)
            for plane in range(planes.shape[0]):
                planes[plane, row, cols // 64] = bit_plane(buffer, 0, plane)


@kernel(numba.void(view(U4, 1), numba.int64, view(U4, 1), numba.int64, out(U8, 3)))
def pack_by_limits(bits, cols, upper, zero_code, planes):
    """Write bit p of the number of limits that a float32 magnitude is above to plane p; of `zero_code` for zeros.

    bits: uint32 (rows * cols); upper: uint32 (limits), ascending: the greatest pattern of each group but the last;
    zero_code: -1 where no weight is zero; planes: uint64 (planes, rows, words), which spell every code, overwritten.
    """
    # Limit n changes bit p of the number where n is a multiple of 2 ** p, up to its lowest bit: 0.4 ns a weight for 7
    # limits, 0.8 for 15; by `codes_by_limits` and `pack_codes` 1.0 for any number (Xeon with AVX-512).
    buffer = np.zeros(64, np.uint32)
    magnitude = np.uint32(0x7FFFFFFF)
    words = planes.shape[2]
    for row in range(planes.shape[1]):
        for word in range(words):
            start = row * cols + 64 * word
            source = bits
            if 64 * (word + 1) > cols:
                _copy_tail(bits, start, cols - 64 * word, np.uint32(0), buffer)
                source, start = buffer, 0
            for plane in range(planes.shape[0]):
                planes[plane, row, word] = np.uint64(0)
            for limit in range(upper.size):
                large = above(source, start, magnitude, upper[limit])
                plane, number = 0, limit + 1
                while True:
                    planes[plane, row, word] ^= large
                    if number & 1:
                        break
                    plane, number = plane + 1, number >> 1
            if zero_code >= 0:
                other = above(source, start, magnitude, np.uint32(0))
                inside = np.uint64(0xFFFFFFFFFFFFFFFF)
                if 64 * (word + 1) > cols:
                    inside >>= np.uint64(64 * (word + 1) - cols)
                for plane in range(planes.shape[0]):
                    planes[plane, row, word] &= other
                    if zero_code >> plane & 1:
                        planes[plane, row, word] |= ~other & inside


@kernel(numba.void(view(U2, 1), numba.int64, view(U1, 1), out(U8, 3)))
def pack_by_table(bits, cols, table, planes):
    """Write bit p of table[magnitude] to plane p for 16-bit weights, without an array of codes in between.

    bits: uint16 (rows * cols); table: uint8 (32768), a code per magnitude; planes: uint64 (at most 8, rows, words).
    """
    # All codes of a stretch first, then their planes: a vector loaded right behind the byte stores that made it would
    # wait for them. Four codes a store. With five planes 0.67 ns a weight; 0.89 word by word (Xeon with AVX-512).
    codes = np.zeros(_STRETCH, np.uint8)
    fours = codes.view(np.uint32)
    mask = np.uint64(0x7FFF)
    for row in range(planes.shape[1]):
        for start in range(0, cols, _STRETCH):
            length = min(_STRETCH, cols - start)
            base = row * cols + start
            for j in range(length // 4):
                four = four_items(bits, base + 4 * j)
                fours[j] = (
                    np.uint32(table[four & mask])
                    | np.uint32(table[(four >> np.uint64(16)) & mask]) << np.uint32(8)
                    | np.uint32(table[(four >> np.uint64(32)) & mask]) << np.uint32(16)
                    | np.uint32(table[(four >> np.uint64(48)) & mask]) << np.uint32(24)
                )
            for j in range(length // 4 * 4, length):
                codes[j] = table[bits[base + j] & np.uint16(0x7FFF)]
            whole = -(-length // 64)
            for j in range(length, 64 * whole):
                codes[j] = 0
            for word in range(whole):
                for plane in range(planes.shape[0]):
                    planes[plane, row, start // 64 + word] = bit_plane(codes, 64 * word, plane)
