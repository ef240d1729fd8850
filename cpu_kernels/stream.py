"""The packed stream that the product kernels read in order, built from row-major planes and float32 scales.

A tile is 32 or 64 rows. Of 16 bytes of a packed vector, those with an even number belong to four rows of the tile's
first quarter and four of its second, those with an odd number to as many of its third and fourth; the next 16 bytes
belong to the following rows. Sums of even and odd bytes, widened four 16-bit lanes at a time, so come out in row order.
For each tile and block of columns:

    scales   (scale sets, tile) float16 or float32, then the offsets (tile) where there are any
    bits     per unit of columns and plane: for lookup (8 or 16, tile) bytes, each holding 8 columns of one row;
             for popcount (1 or 2, tile) words

Scales are held as float16 where each row's are float16 values times one power of two (which becomes the row's
multiplier), else as float32; nothing is rounded.
"""

import functools
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from cpu_kernels import vector as v
from cpu_kernels.compiler import Kernel, inline, kernel, out, view

_I1, _I10, _I13, _I16, _I23, _I31, _I31_NOT = (np.int32(number) for number in (1, 10, 13, 16, 23, 31, ~31))
_I255, _I3FF, _I1FFF, _I8000 = (np.int32(number) for number in (0xFF, 0x3FF, 0x1FFF, 0x8000))
CODED = 32  # scales of a row that are coded at a time
TOP = 15  # the binade of float16 that a row's largest scale is moved to


@intrinsic(prefer_literal=True)
def _spread(
    typing: Any, joined: Any, words: Any, start: Any, step: Any, side: Any, stream: Any, place: Any, apart: Any
) -> Any:
    """Write byte k of eight uint64 items to stream[place + k * apart : ... + 8], for k = 0..7; with `joined` by or.

    The items are start, start + side, start + step, start + step + side, start + 2 * step, ...
    """
    if not isinstance(joined, types.IntegerLiteral):
        return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source = v.data(context, builder, signature.args[1], arguments[1])
        target = v.data(context, builder, signature.args[5], arguments[5])
        rows = []
        first = arguments[2]
        for _ in range(4):
            for index in (first, builder.add(first, arguments[4])):
                rows.append(v.load(builder, v.at(builder, source, index), v.I8, 8, 8))
            first = builder.add(first, arguments[3])

        def interleave(parts: list[Any], item: Any) -> list[Any]:
            count = 64 // item.width * len(rows) // len(parts)
            wide = [builder.bitcast(part, ir.VectorType(item, count)) for part in parts]
            order = [lane + count * side for lane in range(count) for side in (0, 1)]
            return [v.select(builder, wide[i], wide[i + 1], order) for i in range(0, len(wide), 2)]

        # Three rounds of neighbours interleaved (as bytes, pairs and fours) transpose 8 x 8 bytes.
        whole = interleave(interleave(interleave(rows, v.I8), v.I16), v.I32)[0]
        columns = builder.bitcast(whole, ir.VectorType(v.I64, 8))
        for k in range(8):
            at = builder.add(arguments[6], builder.mul(arguments[7], ir.Constant(v.I64, k)))
            pointer = builder.bitcast(v.at(builder, target, at), v.I64.as_pointer())
            column = builder.extract_element(columns, ir.Constant(v.I32, k))
            if joined.literal_value:
                column = builder.or_(builder.load(pointer, align=8), column)
            builder.store(column, pointer, align=8)
        return context.get_dummy_value()

    index = types.intp
    return types.void(joined, words, index, index, index, stream, index, index), generate


_PACK = types.void(
    view(types.uint64, 3),  # planes (planes, rows, words)
    types.intp,  # row of the stream that the first of these is
    types.intp,  # units
    types.intp,  # units per block
    types.intp,  # words per unit
    types.intp,  # bytes of scales per block
    types.intp,  # first tile
    types.intp,  # tile after the last
    out(types.uint8, 1),  # stream, zero where nothing was written yet
)


@functools.cache
def packer(lookup: int, tile: int) -> Kernel:
    """Return the kernel that writes the bits of planes into the stream's tiles [first, last)."""

    @kernel(_PACK)
    def pack(
        planes: Any,
        row: Any,
        units: Any,
        units_per_block: Any,
        unit_words: Any,
        header: Any,
        first: Any,
        last: Any,
        stream: Any,
    ) -> None:
        count = planes.shape[0]
        rows = planes.shape[1]
        words = planes.shape[2]
        unit_bytes = unit_words * 8 * tile
        blocks = (units + units_per_block - 1) // units_per_block
        tile_bytes = blocks * header + units * count * unit_bytes
        source = planes.reshape(planes.size)
        gathered = np.zeros(8 * tile, np.uint64)
        whole = stream.view(np.uint64)
        for number in range(first, last):
            top = number * tile - row
            inside = top >= 0 and top + tile <= rows
            for p in range(count):
                # Eight words of each row at a time: one cache line, read once even where the rows are a power of
                # two apart and would push each other out of the cache.
                for chunk in range(0, words, 8):
                    width = min(8, words - chunk)
                    if not inside:
                        gathered[:] = 0
                    if not (inside and lookup):
                        for r in range(max(0, top), min(rows, top + tile)):
                            for w in range(width):
                                gathered[w * tile + r - top] = planes[p, r, chunk + w]
                    for w in range(width):
                        unit = (chunk + w) // unit_words
                        place = number * tile_bytes + (unit // units_per_block + 1) * header
                        place += (unit * count + p) * unit_bytes + (chunk + w) % unit_words * 8 * tile
                        if not lookup:
                            for slot in range(tile):
                                whole[place // 8 + slot] |= gathered[w * tile + slot]
                        elif inside:
                            at = (p * rows + top) * words + chunk + w
                            for slot in range(0, tile, 8):
                                top_row = slot // 8 % 2 * (tile // 4) + slot // 16 * 4
                                _spread(
                                    0,
                                    source,
                                    at + top_row * words,
                                    words,
                                    tile // 2 * words,
                                    stream,
                                    place + slot,
                                    tile,
                                )
                        else:
                            for slot in range(0, tile, 8):
                                at = w * tile + slot // 8 % 2 * (tile // 4) + slot // 16 * 4
                                _spread(1, gathered, at, 1, tile // 2, stream, place + slot, tile)

    return pack


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
