"""The packed stream that the product kernels read in order, built from row-major planes and scales as they are stored.

A tile is 32 or 64 rows. Of 16 bytes of a packed vector, those with an even number belong to four rows of the tile's
first quarter and four of its second, those with an odd number to as many of its third and fourth; the next 16 bytes
belong to the following rows. Sums of even and odd bytes, widened four 16-bit lanes at a time, so come out in row order.
For each tile and block of columns:

    scales   (scale sets, tile) float16 or float32, then the offsets (tile) where there are any
    bits     per k-tile (64 or 128 columns) and plane: for lookup (8 or 16, tile) bytes, each holding 8 columns of
             one row; for popcount (1 or 2, tile) words

Scales are held as float16 where they are stored so, or where each row's are float16 values times one power of two
(which becomes the row's multiplier), else as float32; nothing is rounded.
"""

import functools
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from cpu_kernels.jit import llvm
from cpu_kernels.jit.compiler import Kernel, inline, kernel, out, view

_I1, _I10, _I13, _I16, _I23, _I31, _I31_NOT = (np.int32(number) for number in (1, 10, 13, 16, 23, 31, ~31))
_I255, _I3FF, _I1FFF, _I8000 = (np.int32(number) for number in (0xFF, 0x3FF, 0x1FFF, 0x8000))
CODED = 32  # scales of a row that are coded at a time
TOP = 15  # the binade of float16 that a row's largest scale is moved to


@intrinsic(prefer_literal=True)
def _transpose_lanes(
    typing: Any, item: Any, tile: Any, source: Any, step: Any, target: Any, place: Any, apart: Any
) -> Any:
    """Write neighbouring columns of rows as rows: 32 of bytes (item 1) of 16 rows, or 8 of 16 bits (item 2) of 8.

    Row i begins at address source + i * step, column i at byte place + i * apart of target. With a `tile` the rows are
    those that 16 bytes of a packed vector hold, in their order.
    """
    if not isinstance(item, types.IntegerLiteral) or not isinstance(tile, types.IntegerLiteral):
        return None
    size = item.literal_value
    count = 16 // size
    order = _packed_rows(tile.literal_value) if tile.literal_value else list(range(count))
    lanes = 2 if size == 1 else 1  # of 16 bytes, turned side by side
    # The lower and the upper half of two vectors' items in turn, lane by lane.
    low = [count * lane + i + other for lane in range(lanes) for i in range(count // 2) for other in (0, lanes * count)]
    high = [i + count // 2 for i in low]

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, _, source, step, _, place, apart = arguments
        read = builder.inttoptr(source, llvm.I8.as_pointer())
        write = llvm.at(builder, llvm.data(context, builder, signature.args[4], arguments[4]), place)

        def line(base: Any, distance: Any, number: int) -> Any:
            return llvm.at(builder, base, builder.mul(distance, ir.Constant(llvm.I64, number)))

        kind = ir.IntType(8 * size)
        vectors = [llvm.load(builder, line(read, step, row), kind, lanes * count, size) for row in order]
        # Each with the one half of them further on: after as many rounds as halve them to one, columns have become
        # rows.
        for _ in range(count.bit_length() - 1):
            pairs = zip(vectors[: count // 2], vectors[count // 2 :], strict=True)
            vectors = [llvm.select(builder, *pair, items) for pair in pairs for items in (low, high)]
        for number, vector in enumerate(vectors):
            for lane in range(lanes):
                column = llvm.part(builder, vector, lane * count, count)
                llvm.store(builder, column, line(write, apart, lane * count + number), size)
        return context.get_dummy_value()

    index = types.intp
    return types.void(item, tile, index, index, target, index, index), generate


def _packed_rows(tile: int) -> list[int]:
    """Return the rows that the first 16 bytes of a packed vector hold: even bytes of the first half tile, odd ones."""
    return [i % 2 * tile // 2 + i // 8 * tile // 4 + i % 8 // 2 for i in range(16)]


_PACK = types.void(
    view(types.uint64, 3),  # planes (planes, rows, words)
    view(types.uint16, 3),  # float16 scales, then offsets (sets, rows, blocks), or none
    types.intp,  # row of the stream that the first of these is
    types.intp,  # k_tiles
    types.intp,  # k_tiles per block
    types.intp,  # words per k-tile
    types.intp,  # bytes of scales per block
    out(types.uint8, 1),  # stream; the caller hands it zeros, which part tiles and padding rely on
    types.intp,  # first tile
    types.intp,  # tile after the last
)


@functools.cache
def packer(lookup: int, tile: int) -> Kernel:
    """Return the kernel that writes planes, and scales that stay float16, into the stream's tiles [first, last)."""

    @kernel(_PACK)
    def pack(
        planes: Any,
        scale: Any,
        row: Any,
        k_tiles: Any,
        k_tiles_per_block: Any,
        k_tile_words: Any,
        header: Any,
        stream: Any,
        first: Any,
        last: Any,
    ) -> None:
        count = planes.shape[0]
        rows = planes.shape[1]
        words = planes.shape[2]
        k_tile_bytes = k_tile_words * 8 * tile
        blocks = (k_tiles + k_tiles_per_block - 1) // k_tiles_per_block
        block_bytes = k_tiles_per_block * count * k_tile_bytes
        tile_bytes = blocks * header + k_tiles * count * k_tile_bytes
        gathered = np.zeros(8 * tile, np.uint64)
        turned = np.zeros(8 * tile, np.uint64)
        turned_bytes = turned.view(np.uint8)
        whole = stream.view(np.uint64)
        for number in range(first, last):
            top = number * tile - row
            inside = top >= 0 and top + tile <= rows
            # Scales with their bits: each page of memory that the stream takes is filled while it is in the cache.
            for s in range(scale.shape[0]):
                place = number * tile_bytes + s * tile * 2
                _copy_scales(scale, s, max(0, top), min(rows, top + tile), stream, place, header + block_bytes, top)
            if not inside:
                for i in range(gathered.size):  # a slice takes Numba longer to compile
                    gathered[i] = 0
            for p in range(count):
                # Eight words of each row at a time: one cache line, read once even where the rows are a power of
                # two apart and would push each other out of the cache.
                for chunk in range(0, words, 8):
                    width = min(8, words - chunk)
                    direct = lookup and inside and width == 8
                    if not direct:
                        for r in range(max(0, top), min(rows, top + tile)):
                            for w in range(width):
                                gathered[8 * (r - top) + w] = planes[p, r, chunk + w]
                    if lookup:
                        source, step = gathered.ctypes.data, 64
                        if direct:
                            source, step = planes.ctypes.data + 8 * ((p * rows + top) * words + chunk), 8 * words
                        for group in range(tile // 16):
                            for half in range(0, 64, 32):
                                place = half * tile + 16 * group
                                _transpose_lanes(
                                    1, tile, source + 4 * group * step + half, step, turned_bytes, place, tile
                                )
                    else:
                        for w in range(width):
                            for slot in range(tile):
                                turned[w * tile + slot] = gathered[8 * slot + w]
                    for w in range(width):
                        k_tile = (chunk + w) // k_tile_words
                        place = number * tile_bytes + (k_tile // k_tiles_per_block + 1) * header
                        place += (k_tile * count + p) * k_tile_bytes + (chunk + w) % k_tile_words * 8 * tile
                        run, bits = np.uint64(place // 8), np.uint64(w * tile)
                        if inside:
                            for i in range(np.uint64(tile)):
                                whole[run + i] = turned[bits + i]
                        else:
                            for i in range(np.uint64(tile)):
                                whole[run + i] |= turned[bits + i]

    return pack


@inline
def _copy_scales(numbers: Any, s: Any, first: Any, last: Any, stream: Any, place: Any, apart: Any, top: Any) -> None:
    """Write rows first..last of a set (float16 bits), blocks `apart`; row `top` belongs at a block's start."""
    rows, blocks = numbers.shape[1], numbers.shape[2]
    halves = stream.view(np.uint16)
    fast = blocks // 8 * 8 if first == top else 0
    whole = first + (last - first) // 8 * 8
    for r in range(first, whole, 8):
        for b in range(0, fast, 8):
            source = numbers.ctypes.data + 2 * ((s * rows + r) * blocks + b)
            _transpose_lanes(2, 0, source, 2 * blocks, stream, place + 2 * (r - top) + b * apart, apart)
    for r in range(first, last):
        for b in range(fast if r < whole else 0, blocks):
            halves[(place + b * apart) // 2 + r - top] = numbers[s, r, b]


@inline
def _half(bits: Any, largest: Any) -> Any:
    """Return the float16 bits of a float32 whose row's largest exponent field moves to TOP, and whether it fits."""
    sign = bits >> 16 & 0x8000
    magnitude = bits & 0x7FFFFFFF
    field = (magnitude >> 23) - largest + TOP + 15
    if 0 < field < 31:
        return sign | field << 10 | (magnitude >> 13 & 0x3FF), magnitude & 0x1FFF == 0
    if magnitude == 0:
        return sign, True
    shift = 14 - field  # float16's subnormal values
    if field > 0 or shift > 24 or magnitude < 0x800000:
        return sign, False
    fraction = (magnitude & 0x7FFFFF) | 0x800000
    return sign | fraction >> shift, fraction & ((1 << shift) - 1) == 0


@kernel(
    types.intp(
        view(types.int32, 3),  # bits of float32 scales (sets, rows, blocks)
        types.intp,  # set of the stream that the first of these is
        types.intp,  # row of the stream that the first of these is
        types.intp,  # tile
        types.intp,  # bytes of bits per whole block
        types.intp,  # bytes of scales per block
        types.intp,  # bytes per tile
        types.intp,  # 1 to write float16
        view(types.int32, 1),  # exponent of each row
        out(types.uint16, 1),  # stream
        out(types.int32, 1),  # stream
        types.intp,  # first tile to write
        types.intp,  # tile to stop before
    )
)
def write_scales(
    scale: Any,
    first_set: Any,
    row: Any,
    tile: Any,
    block_bytes: Any,
    header: Any,
    tile_bytes: Any,
    half: Any,
    exponents: Any,
    halves: Any,
    singles: Any,
    begin: Any,
    end: Any,
) -> Any:
    """Write scales into the stream and return how many are no float16 values after the row's power of two."""
    coded = np.empty(tile * CODED, np.uint16)
    inexact = 0
    rows = scale.shape[1]
    blocks = scale.shape[2]
    for number in range(max(begin, row // tile), min(end, (row + rows + tile - 1) // tile)):
        top = number * tile - row
        first, last = max(0, top), min(rows, top + tile)
        for s in range(scale.shape[0]):
            place = number * tile_bytes + (first_set + s) * tile * (2 if half else 4)
            if not half:
                for r in range(first, last):
                    for b in range(blocks):
                        singles[(place + b * (block_bytes + header)) // 4 + r - top] = scale[s, r, b]
                continue
            for chunk in range(0, blocks, CODED):
                width = min(CODED, blocks - chunk)
                # Along the row, as it lies in memory, without a branch per scale for the common case (a normal
                # float16), then across: 1.1 ns a scale instead of 3.5.
                for r in range(first, last):
                    unusual = np.int32(0)
                    largest = exponents[row + r]
                    shift = np.int32(largest - np.int32(TOP + 15))
                    source = scale[s, r, chunk : chunk + width]
                    target = coded[(r - first) * CODED : (r - first) * CODED + width]
                    for b in range(source.size):
                        bits = source[b]
                        # In 32 bits throughout: Numba takes plain numbers, and sums with them, for 64 bits.
                        field = np.int32((np.int32(bits >> _I23) & _I255) - shift)
                        odd = np.int32(bits & _I1FFF) | np.int32(np.int32(field - _I1) & _I31_NOT)
                        unusual |= odd | np.int32(field == _I31)
                        target[b] = np.uint16(
                            np.int32(bits >> _I16) & _I8000 | np.int32(field << _I10) | np.int32(bits >> _I13) & _I3FF
                        )
                    if unusual:
                        for b in range(source.size):
                            target[b], fits = _half(source[b], largest)
                            inexact += not fits
                for b in range(width):
                    # Unsigned places need no test for negative ones.
                    at = np.uint64((place + (chunk + b) * (block_bytes + header)) // 2 - top + first)
                    for r in range(np.uint64(last - first)):
                        halves[at + r] = coded[r * np.uint64(CODED) + np.uint64(b)]
    return inexact


@kernel(types.void(view(types.int32, 3), types.intp, out(types.int32, 1)))
def raise_exponents(scale: Any, row: Any, exponents: Any) -> None:
    """Raise exponents[row + r] to the largest exponent field among scale[:, r, :] (bits of float32)."""
    for s in range(scale.shape[0]):
        for r in range(scale.shape[1]):
            largest = exponents[row + r]
            for b in range(scale.shape[2]):
                largest = max(largest, scale[s, r, b] >> 23 & 0xFF)
            exponents[row + r] = largest
