"""The loop around both kernels: token blocks, tiles of rows, blocks and k_tiles of columns, planes, tokens.

The packed stream of a matrix is read in order, once per block of tokens. Per tile of 32 or 64 rows and per block of
columns it holds the scales of every plane (and of the offset), then for every k_tile of 64 or 128 columns and every
plane the packed bits (see stream.py).
"""

import collections
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types

from cpu_kernels.jit import cpu_features
from cpu_kernels.jit.addresses import (
    call,
    float32_items,
    float32_rows,
    int8_rows,
    int32_items,
    int32_rows,
    int64_items,
    local_float32,
    uint8_items,
)
from cpu_kernels.jit.compiler import Kernel, inline, inline_whole, kernel
from cpu_kernels.matmul import lookup, popcount
from cpu_kernels.matmul.activations import QUANTIZING
from cpu_kernels.matmul.k_tile import add_offset, multiply_k_tile, prefetch_ways, table_bytes

TOGETHER = 4  # tokens that share one pass over the packed bits of a k_tile


# The int64 words of a job, in order: sizes, and addresses of C-contiguous arrays.
FIELDS = (
    "stream",  # uint8
    "rows", "k_tiles", "k_tiles_per_block",
    "scale_sets",  # per block
    "has_offset",  # 1 where an offset follows them
    "planes",
    "weights",  # float32 (planes,), 1 where each plane has scales of its own
    "multipliers",  # float32 (rows,)
    "quantize",  # address of the kernel that makes q and the others from x first; 0 where they are given
    *QUANTIZING,
    "tables",  # prepared tables or bit slices of one token block, 64-byte aligned
    # int32, float32, float32, int32 (k_tiles * tokens of a block,): prepared as well (see _prepare)
    "constants", "factors", "offsets", "headrooms",
    "accumulators",  # float32 (tokens of a block * rows of a tile,), 64-byte aligned
    "token_block",
    "prepared",  # 1 where they are
    "result",  # float32 (tokens, rows)
    # For the kernel of wide_token.py: how far behind the stream that one begins which is read after it, 0 where it is
    # not known; and 1 where this one's first tiles were asked for.
    "following", "asked",
)  # fmt: skip
AT: Any = collections.namedtuple("AT", FIELDS)(*range(len(FIELDS)))  # type: ignore[misc]  # the word of each field
WORDS = len(FIELDS)
_QUANTIZING = FIELDS.index(QUANTIZING[0])  # where the words that the quantizing kernel is given begin


@inline_whole
def _prepare(
    instruction_set: Any, bits: Any, words: Any, per_word: Any, k_tiles: Any, start: Any, count: Any, q: Any,
    token_scale: Any, sums: Any, absolute: Any, tables: Any, constants: Any, factors: Any, offsets: Any, headrooms: Any,
    capacity: Any,
) -> None:  # fmt: skip
    """Make the tables (or bit slices), constants, factors and sums of x of tokens start .. start + count - 1.

    And their headrooms (see lookup.HEADROOMS). A k_tile's constant is sum x, or LIFT + sum |x| for lookup.emit_apply.
    """
    flat = q.reshape(q.size)
    for t in range(count):
        for u in range(k_tiles):
            place = u * count + t
            total = 0
            size = 0
            of_two = 0  # the largest sum |x| of two packed vectors' columns, and so on
            of_four = 0
            of_eight = 0
            for w in range(u * words, (u + 1) * words):
                total += sums[start + t, w]
                size += absolute[start + t, w]
                of_eight = max(of_eight, absolute[start + t, w])
            constants[place] = total if instruction_set == cpu_features.PORTABLE else lookup.LIFT + size
            factor = token_scale[start + t, u * words // 2]
            factors[place] = factor
            offsets[place] = factor * np.float32(total)
            for w in range(words):
                at = (start + t) * q.shape[1] + (u * words + w) * 64
                to = (place * words + w) * per_word
                if instruction_set == cpu_features.PORTABLE:
                    popcount.slice_word(bits, flat, at, tables, to)
                else:
                    for g in range(0, 64, 32):
                        two: int = lookup.fill_tables(bits, flat, at + g, tables, to + g * per_word // 64)
                        more = lookup.fill_tables(bits, flat, at + g + 16, tables, to + (g + 16) * per_word // 64)
                        of_two = max(of_two, two, more)
                        of_four = max(of_four, two + more)
            if bits == 6:
                headrooms[place] = 4 if of_four <= capacity else 2 if of_two <= capacity else 1
            else:
                headrooms[place] = 8 if of_eight <= capacity else 4


@inline_whole
def _add_offsets(
    tile: Any, half: Any, stream: Any, place: Any, first: Any, last: Any, count: Any, offsets: Any, acc: Any
) -> None:
    """Add the offset of each row (at `place` of the stream) times the sum of x over k_tiles first .. last - 1."""
    for t in range(count):
        value = np.float32(0)
        for u in range(first, last):
            value += offsets[u * count + t]
        add_offset(tile, half, stream, place, value, acc, t * tile)


@inline_whole
def _add_k_tile(
    instruction_set: Any, bits: Any, words: Any, half: Any, together: Any, tile: Any, size: Any, stream: Any,
    position: Any, scale: Any, tables: Any, constants: Any, factors: Any, headrooms: Any, first: Any, t: Any,
    count: Any, weight: Any, acc: Any, prefetch_at: Any, apart: Any,
) -> Any:  # fmt: skip
    """Add the products of one k_tile of one plane with tokens t, t + 1, ..., `together` at a time; return the next."""
    while t + together <= count:
        multiply_k_tile(
            instruction_set, bits, words, half, together, stream, position, scale, tables, (first + t) * size,
            constants, factors, headrooms, first + t, weight, acc, t * tile, prefetch_at, apart,
        )  # fmt: skip
        t += together
    return t


def _add_tiles(*arguments: Any) -> None:
    """Stand for what each kernel has under this name."""
    raise NotImplementedError


def _token_tiles(instruction_set: int, bits: int, words: int, half: int) -> Callable[..., Any]:
    """Return the function that adds up the tiles of one token; constants as in `product_kernel`."""
    tile = cpu_features.tile_rows(instruction_set)
    scale_bytes = tile * (2 if half else 4)
    k_tile_bytes = words * 8 * tile
    size = words * table_bytes(instruction_set, bits)

    # One token has a function of its own, with as few numbers as fit the registers: beside the loops over tokens they
    # were kept in memory, 75 instructions for each k_tile of 180. Called for each tile it took 45 ns more, as long as
    # two k_tiles.
    @inline
    def add_tiles(
        first: Any, last: Any, stream: Any, tile_bytes: Any, k_tiles: Any, k_tiles_per_block: Any, planes: Any,
        scale_step: Any, scale_sets: Any, has_offset: Any, header: Any, header_steps: Any, tables: Any, constants: Any,
        factors: Any, offsets: Any, headrooms: Any, weights: Any, apart: Any, multipliers: Any, result: Any,
    ) -> None:  # fmt: skip
        accumulators: Any = local_float32(tile)
        for number in range(first, last):
            position = number * tile_bytes
            # After the last tile its own lines, which cost nothing any more.
            prefetch_at = min(number + 1, last - 1) * tile_bytes
            accumulators[:] = 0
            k_tile = 0
            while k_tile < k_tiles:
                scales = position
                position += header
                for _ in range(header_steps):
                    prefetch_ways(stream, prefetch_at, apart)
                    prefetch_at += lookup.LINE
                end = min(k_tile + k_tiles_per_block, k_tiles)
                if has_offset:
                    place = scales + scale_sets * scale_bytes
                    _add_offsets(tile, half, stream, place, k_tile, end, 1, offsets, accumulators)
                for u in range(k_tile, end):
                    scale = scales
                    for p in range(planes):
                        multiply_k_tile(
                            instruction_set, bits, words, half, 1, stream, position, scale, tables, u * size, constants,
                            factors, headrooms, u, weights[p], accumulators, 0, prefetch_at, apart,
                        )  # fmt: skip
                        scale += scale_step
                        position += k_tile_bytes
                        prefetch_at += k_tile_bytes // lookup.WAYS
                k_tile = end
            # Unsigned places need no test for negative ones.
            row = np.uint64(number * tile)
            for r in range(np.uint64(min(tile, multipliers.size - number * tile))):
                result[row + r] = accumulators[r] * multipliers[row + r]

    return add_tiles


@functools.cache
def product_kernel(instruction_set: int, bits: int, words: int, half: int) -> Kernel:
    """Return the kernel for one instruction set, activation width, k_tile of `words` words and float16 or 32 scales.

    It takes the address of a job, int64 (len(FIELDS),), and computes tiles first .. last - 1. AVX-512: of one token.
    """
    tile = cpu_features.tile_rows(instruction_set)
    lookup_used = 0 if instruction_set == cpu_features.PORTABLE else 1
    together = TOGETHER if lookup_used else 1
    one_alone = 1 if instruction_set == cpu_features.AVX512BW else 0  # wide_lookup.py multiplies several
    scale_bytes, k_tile_bytes = tile * (2 if half else 4), words * 8 * tile
    per_word = table_bytes(instruction_set, bits)
    size = words * per_word
    step_bytes = lookup.WAYS * lookup.LINE
    capacity = lookup.CAPACITY[bits]

    # Addresses, not arrays: a call of 24 arguments took 4 microseconds, and a waiting thread can be handed a number.
    @kernel(
        types.void(types.int64, types.int64, types.int64), _add_tiles=_token_tiles(instruction_set, bits, words, half)
    )
    def multiply(job_address: Any, first: Any, last: Any) -> None:
        job = int64_items(job_address, WORDS)
        rows, k_tiles, k_tiles_per_block = job[AT.rows], job[AT.k_tiles], job[AT.k_tiles_per_block]
        scale_sets, has_offset, planes = job[AT.scale_sets], job[AT.has_offset], job[AT.planes]
        tokens, segments, token_block = job[AT.tokens], job[AT.segments], job[AT.token_block]
        stream = uint8_items(job[AT.stream], 1)
        weights = float32_items(job[AT.weights], planes)
        multipliers = float32_items(job[AT.multipliers], rows)
        q = int8_rows(job[AT.q], tokens, 128 * segments)
        token_scale = float32_rows(job[AT.scale], tokens, segments)
        sums = int32_rows(job[AT.sums], tokens, 2 * segments)
        absolute = int32_rows(job[AT.absolute], tokens, 2 * segments)
        tables = uint8_items(job[AT.tables], 1)
        constants = int32_items(job[AT.constants], k_tiles * token_block)
        factors = float32_items(job[AT.factors], k_tiles * token_block)
        offsets = float32_items(job[AT.offsets], k_tiles * token_block)
        headrooms = int32_items(job[AT.headrooms], k_tiles * token_block)
        accumulators = float32_items(job[AT.accumulators], token_block * tile)
        result = float32_rows(job[AT.result], tokens, rows)
        header = (scale_sets + has_offset) * scale_bytes
        blocks = (k_tiles + k_tiles_per_block - 1) // k_tiles_per_block
        tile_bytes = blocks * header + k_tiles * planes * k_tile_bytes
        # For one token the next tile is asked for a line at a time from each of WAYS places, `apart` from each other.
        asking = lookup_used and tokens == 1
        header_steps = (header + step_bytes - 1) // step_bytes if asking else 0
        apart = (blocks * header_steps + k_tiles * planes * (k_tile_bytes // step_bytes)) * lookup.LINE
        if asking and first < last:
            for prefetch_at in range(first * tile_bytes, first * tile_bytes + apart, lookup.LINE):
                prefetch_ways(stream, prefetch_at, apart)
        if job[AT.quantize]:
            call(job[AT.quantize], job_address + 8 * _QUANTIZING, 0, tokens)
        for start in range(0, tokens, token_block):
            count = min(token_block, tokens - start)
            if not job[AT.prepared]:
                _prepare(
                    instruction_set, bits, words, per_word, k_tiles, start, count, q, token_scale, sums, absolute,
                    tables, constants, factors, offsets, headrooms, capacity,
                )  # fmt: skip
            if asking:
                _add_tiles(
                    first, last, stream, tile_bytes, k_tiles, k_tiles_per_block, planes,
                    0 if scale_sets < planes else scale_bytes, scale_sets, has_offset, header, header_steps, tables,
                    constants, factors, offsets, headrooms, weights, apart, multipliers, result[0],
                )  # fmt: skip
                return
            if one_alone:
                return
            for number in range(first, last):
                position = number * tile_bytes
                prefetch_at = min(number + 1, last - 1) * tile_bytes
                accumulators[:] = 0
                k_tile = 0
                while k_tile < k_tiles:
                    scales = position
                    position += header
                    end = min(k_tile + k_tiles_per_block, k_tiles)
                    if has_offset:
                        place = scales + scale_sets * scale_bytes
                        _add_offsets(tile, half, stream, place, k_tile, end, count, offsets, accumulators)
                    for u in range(k_tile, end):
                        for p in range(planes):
                            scale = scales if scale_sets < planes else scales + p * scale_bytes
                            t = _add_k_tile(
                                instruction_set, bits, words, half, together, tile, size, stream, position, scale,
                                tables, constants, factors, headrooms, u * count, 0, count, weights[p], accumulators,
                                prefetch_at, apart,
                            )  # fmt: skip
                            if together > 1:
                                _add_k_tile(
                                    instruction_set, bits, words, half, 1, tile, size, stream, position, scale, tables,
                                    constants, factors, headrooms, u * count, t, count, weights[p], accumulators,
                                    prefetch_at, apart,
                                )  # fmt: skip
                            position += k_tile_bytes
                            prefetch_at += k_tile_bytes // lookup.WAYS
                    k_tile = end
                for t in range(count):
                    for r in range(number * tile, min((number + 1) * tile, rows)):
                        result[start + t, r] = accumulators[t * tile + r - number * tile] * multipliers[r]

    return multiply
