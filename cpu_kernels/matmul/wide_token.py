"""Products with one token by the tables of wide_lookup.py, the stream read in order.

All of a token's tables are made first, and lie in the second-level cache: 43 KB for 2048 columns. Two tiles of rows are
then gone through side by side, so that what a k-tile's tables take to load serves both; the two that follow are asked
for meanwhile, as lookup.py says. Against the kernel of that file one thread of Zen 4 took 0.8 x the time where the
matrix lay in a cache and 0.76 to 0.86 x where it did not; two threads, for which memory is the limit, 0.84 to 0.96 x,
and 1.1 x for one matrix of 2048 x 768, whose tables take long beside it. Tiles side by side: one took up to 1.26 x as
long, four 1.04 to 1.09 x. All numbers are the same, to the last bit.
"""

import functools
from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from cpu_kernels.jit import cpu_features
from cpu_kernels.jit.addresses import call, float32_items, int8_rows, int32_items, int64_items, uint8_items
from cpu_kernels.jit.compiler import Kernel, inline_whole, kernel
from cpu_kernels.matmul import lookup, wide_lookup
from cpu_kernels.matmul.activations import QUANTIZING
from cpu_kernels.matmul.aligned_memory import aligned
from cpu_kernels.matmul.k_tile import add_offset, prefetch_ways
from cpu_kernels.matmul.prepacking import PackedMatrix
from cpu_kernels.matmul.product_kernel import AT, FIELDS, WORDS
from cpu_kernels.matmul.wide_lookup import TILE, fill_tables, table_bytes, wide_k_tile

TOGETHER = 2  # tiles
_QUANTIZING = FIELDS.index(QUANTIZING[0])
_STEP = lookup.WAYS * lookup.LINE


def used(instruction_set: int) -> bool:
    """Return whether one token is multiplied so on this CPU: where it was measured to take less time."""
    return instruction_set == wide_lookup.CODE and cpu_features.is_zen()


def multiplies(matrix: PackedMatrix) -> bool:
    """Return whether one token is multiplied so with this matrix."""
    return wide_lookup.fits(matrix) and used(matrix.code)


def prepared_for(matrix: PackedMatrix) -> int:
    """Return which matrices of as many columns may share what is prepared of a token: 0 where they are not of here.

    The sum of x is that of a block, so they have k-tiles of one size and as many of them in a block.
    """
    return matrix.k_tiles_per_block if multiplies(matrix) else 0


class Scratch:
    """What the kernel works in; threads may share what it prepares, but not `accumulators`."""

    def __init__(self, matrix: PackedMatrix) -> None:
        k_tiles = matrix.k_tiles
        self._arrays: dict[str, NDArray[Any]] = {
            "tables": aligned(k_tiles * table_bytes(matrix.k_tile_words)),
            "constants": np.empty(k_tiles, np.int32),
            "factors": np.empty(k_tiles, np.float32),
            "offsets": np.empty(k_tiles, np.float32),
        }
        self.operands = {name: array.ctypes.data for name, array in self._arrays.items()}


def accumulators() -> NDArray[np.uint8]:
    """Return what a thread adds up in."""
    return aligned(4 * TOGETHER * TILE)


@inline_whole
def _prepare(words: Any, job: Any, size: Any, tables: Any, constants: Any, factors: Any, offsets: Any) -> None:
    """Make the token's tables, constants and factors of each k-tile, and the sum of x of each block."""
    segments, k_tiles, k_tiles_per_block = job[AT.segments], job[AT.k_tiles], job[AT.k_tiles_per_block]
    q = int8_rows(job[AT.q], 1, 128 * segments)
    flat = q.reshape(q.size)
    token_scale = float32_items(job[AT.scale], segments)
    sums = int32_items(job[AT.sums], 2 * segments)
    absolute = int32_items(job[AT.absolute], 2 * segments)
    value = np.float32(0)
    for k_tile in range(k_tiles):
        total = 0
        magnitude = 0
        for w in range(k_tile * words, (k_tile + 1) * words):
            total += sums[w]
            magnitude += absolute[w]
        factor = token_scale[k_tile * words // 2]
        constants[k_tile] = lookup.LIFT + magnitude
        factors[k_tile] = factor
        fill_tables(words, flat, k_tile * words * 64, tables, k_tile * size)
        if k_tile % k_tiles_per_block == 0:
            value = np.float32(0)
        value += np.float32(factor * np.float32(total))
        offsets[k_tile // k_tiles_per_block] = value


@functools.cache
def token_kernel(words: int, half: int) -> Kernel:
    """Return the kernel for k-tiles of `words` words and float16 or 32 scales.

    It takes the address of a job as product_kernel's does, of one token, and computes tiles first .. last - 1. Its
    scratch: `Scratch`, and `accumulators` float32 (TOGETHER * TILE,).
    """
    scale_bytes = TILE * (2 if half else 4)
    k_tile_bytes = words * 8 * TILE
    size = table_bytes(words)

    @kernel(types.void(types.int64, types.int64, types.int64))
    def multiply_token(job_address: Any, first: Any, last: Any) -> None:
        job = int64_items(job_address, WORDS)
        rows, k_tiles, k_tiles_per_block = job[AT.rows], job[AT.k_tiles], job[AT.k_tiles_per_block]
        scale_sets, has_offset, planes = job[AT.scale_sets], job[AT.has_offset], job[AT.planes]
        stream = uint8_items(job[AT.stream], 1)
        weights = float32_items(job[AT.weights], planes)
        multipliers = float32_items(job[AT.multipliers], rows)
        tables = uint8_items(job[AT.tables], k_tiles * size)
        constants = int32_items(job[AT.constants], k_tiles)
        factors = float32_items(job[AT.factors], k_tiles)
        offsets = float32_items(job[AT.offsets], k_tiles)
        acc = float32_items(job[AT.accumulators], TOGETHER * TILE)
        result = float32_items(job[AT.result], rows)
        header = (scale_sets + has_offset) * scale_bytes
        scale_step = 0 if scale_sets < planes else scale_bytes
        blocks = (k_tiles + k_tiles_per_block - 1) // k_tiles_per_block
        tile_bytes = blocks * header + k_tiles * planes * k_tile_bytes
        # The tiles that follow are asked for a line at a time from each of WAYS places, `apart` from each other.
        header_steps = (header + _STEP - 1) // _STEP
        apart = TOGETHER * (blocks * header_steps + k_tiles * planes * (k_tile_bytes // _STEP)) * lookup.LINE
        if first < last and not job[AT.asked]:
            for asked in range(first * tile_bytes, first * tile_bytes + apart, lookup.LINE):
                prefetch_ways(stream, asked, apart)
        if job[AT.quantize]:
            call(job[AT.quantize], job_address + 8 * _QUANTIZING, 0, 1)
        if not job[AT.prepared]:
            _prepare(words, job, size, tables, constants, factors, offsets)
        for begin in range(first, last, TOGETHER):
            end = min(begin + TOGETHER, last)
            acc[:] = 0
            asked = end * tile_bytes
            if end == last:  # what is read after this matrix, or else its own lines, which cost nothing any more
                asked = job[AT.following] if job[AT.following] else begin * tile_bytes
            place = 0
            scales = 0
            for k_tile in range(k_tiles):
                begins = k_tile % k_tiles_per_block == 0
                if begins:
                    scales = place
                    place += header
                near = planes * k_tile_bytes + (header if (k_tile + 1) % k_tiles_per_block == 0 else 0)
                for number in range(begin, end):
                    base = number * tile_bytes
                    own = (number - begin) * TILE
                    if begins:
                        for _ in range(header_steps):
                            prefetch_ways(stream, asked, apart)
                            asked += lookup.LINE
                        if has_offset:
                            at = base + scales + scale_sets * scale_bytes
                            add_offset(TILE, half, stream, at, offsets[k_tile // k_tiles_per_block], acc, own)
                    scale = base + scales
                    position = base + place
                    for p in range(planes):
                        wide_k_tile(
                            words, half, 1, stream, position, scale, position + near, asked, apart, tables,
                            k_tile * size, constants, factors, k_tile, weights[p], acc, own,
                        )  # fmt: skip
                        scale += scale_step
                        position += k_tile_bytes
                        asked += k_tile_bytes // lookup.WAYS
                place += planes * k_tile_bytes
            for number in range(begin, end):
                # Unsigned places need no test for negative ones.
                sums_at, row = np.uint64((number - begin) * TILE), np.uint64(number * TILE)
                for r in range(np.uint64(min(TILE, rows - number * TILE))):
                    result[row + r] = acc[sums_at + r] * multipliers[row + r]

    return multiply_token
