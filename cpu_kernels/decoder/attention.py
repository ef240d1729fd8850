"""Causal attention of grouped queries over the key-value cache, tile by tile, with a running softmax.

Layout of one layer's cache: keys (kv heads, blocks, head_dim, 32), so that 32 scores come from one product without
a horizontal sum; values (kv heads, positions, padded head_dim), padded to a multiple of 32 columns. Both hold
float32, or float16 bit patterns as uint16, or int8 with scales (quantized_cache.py).
"""

from typing import Any

import numpy as np
from numba import types
from numpy import float32

from cpu_kernels.decoder.exponential import exponential
from cpu_kernels.decoder.quantized_cache import float_at, scale_rows
from cpu_kernels.decoder.tiles import TILE_COLUMNS, TILE_ROWS, largest, multiply_tile, total
from cpu_kernels.jit.compiler import Kernel, inline, kernel, out, view

BLOCK = TILE_COLUMNS  # positions that lie side by side in the cache
QUERY_ROWS = 32  # (token, head of the group) rows that share one pass over the keys
KEY_TILE = 128  # positions per step of the running softmax; scores and a tile of keys fit the first cache level
NO_WINDOW = 1 << 40

_HIDDEN = float32(-1.0e30)
_ONE = float32(1.0)
_ZERO = float32(0.0)


def padded(head_dim: int) -> int:
    """Return the columns per position in the value cache."""
    return -(-head_dim // TILE_COLUMNS) * TILE_COLUMNS


def scratch_size(head_dim: int) -> int:
    """Return the float32 items of scratch that one thread of `attend` needs."""
    return QUERY_ROWS * (head_dim + KEY_TILE + padded(head_dim) + 2)


def work_items(tokens: int, heads: int, kv_heads: int) -> int:
    """Return the number of independent work items of `attend`."""
    return kv_heads * -(-tokens * (heads // kv_heads) // QUERY_ROWS)


@inline
def _begin_row(scratch: Any, top: Any, mass: Any, sink: Any) -> None:
    """Begin the softmax of a row: nothing has been seen."""
    scratch[top] = _HIDDEN
    scratch[mass] = _ZERO


@inline
def _begin_row_at_sink(scratch: Any, top: Any, mass: Any, sink: Any) -> None:
    """Begin the softmax of a row with its head's sink, a score that takes part in the sum and has no value."""
    scratch[top] = scratch[sink]
    scratch[mass] = _ONE


@inline
def _multiply_by_scales(scratch: Any, first: int, rows: int, keys: Any, byte: int) -> None:
    """Multiply the scores of a block's positions, or their weights, by the scales that begin at a byte of int8 keys."""
    for row in range(rows):
        at = first + row * KEY_TILE
        scores = scratch[at : at + BLOCK]
        for j in range(scores.size):
            scores[j] *= float_at(keys, byte + 4 * j)


def _attend(
    qkv: Any, heads: int, keys: Any, values: Any, first: int, window: int, start: int, stop: int, scratch: Any,
    result: Any,
) -> None:  # fmt: skip
    """Attend for work items start..stop-1; queries are the first heads * head_dim columns of qkv, already scaled.

    qkv (n, columns) float32: tokens at positions first, first + 1, ...; a token sees the `window` positions up to
    its own. scratch (scratch_size,), behind which the heads' sinks lie where there are any. result
    (n, heads * head_dim) float32.
    """
    kv_heads, blocks, block_rows = keys.shape[0], keys.shape[1], keys.shape[2]
    dim = block_rows - scale_rows(keys)
    positions, wide = values.shape[1], values.shape[2]
    group = heads // kv_heads
    rows_in_all = qkv.shape[0] * group
    per_head = -(-rows_in_all // QUERY_ROWS)
    columns = qkv.shape[1]
    queries = qkv.reshape(qkv.size)
    score_at = QUERY_ROWS * dim
    sum_at = score_at + QUERY_ROWS * KEY_TILE
    top_at = sum_at + QUERY_ROWS * wide
    mass_at = top_at + QUERY_ROWS
    for item in range(start, stop):
        head = item // per_head
        first_row = (item % per_head) * QUERY_ROWS
        rows = min(QUERY_ROWS, rows_in_all - first_row)
        tile_rows = -(-rows // TILE_ROWS) * TILE_ROWS
        # Loops, because Numba takes 3 seconds to compile its first assignment to a slice.
        for i in range(tile_rows * dim):
            scratch[i] = _ZERO
        for i in range(sum_at, sum_at + tile_rows * wide):
            scratch[i] = _ZERO
        for row in range(rows):
            token = (first_row + row) // group
            at = token * columns + (head * group + (first_row + row) % group) * dim
            for d in range(dim):
                scratch[row * dim + d] = queries[at + d]
            sink = mass_at + QUERY_ROWS + head * group + (first_row + row) % group
            _begin_row(scratch, top_at + row, mass_at + row, sink)
        oldest = max(0, first + first_row // group - window + 1)
        end = first + (first_row + rows - 1) // group + 1
        # From a whole tile on, so that a token's sums have the same order whichever tokens share its block.
        key = oldest // KEY_TILE * KEY_TILE
        while key < end:
            width = min(KEY_TILE, end - key)
            whole = -(-width // BLOCK) * BLOCK
            for offset in range(0, whole, BLOCK):
                block = (head * blocks + (key + offset) // BLOCK) * block_rows * BLOCK
                for row in range(0, tile_rows, TILE_ROWS):
                    target = score_at + row * KEY_TILE + offset
                    multiply_tile(scratch, row * dim, dim, keys, block, BLOCK, dim, scratch, target, KEY_TILE, False)
                if dim < block_rows:
                    _multiply_by_scales(scratch, score_at + offset, rows, keys, block + dim * BLOCK)
            for row in range(rows):
                at = score_at + row * KEY_TILE
                position = first + (first_row + row) // group
                left = max(0, position - window + 1 - key)
                right = min(width, position + 1 - key)
                if right <= left:
                    for j in range(whole):
                        scratch[at + j] = _ZERO
                    continue
                for j in range(min(left, whole)):
                    scratch[at + j] = _HIDDEN
                for j in range(right, whole):
                    scratch[at + j] = _HIDDEN
                before = scratch[top_at + row]
                top = largest(scratch, at, whole)
                if top > before:
                    shrink = exponential(before - top)
                    scratch[top_at + row] = top
                    scratch[mass_at + row] *= shrink
                    sums = scratch[sum_at + row * wide : sum_at + (row + 1) * wide]
                    for d in range(sums.size):
                        sums[d] *= shrink
                else:
                    top = before
                # A slice indexed from zero needs no test for negative indices; without it this loop is scalar (2.4 x).
                scores = scratch[at : at + whole]
                for j in range(scores.size):
                    scores[j] = exponential(scores[j] - top)
                scratch[mass_at + row] += total(scratch, at, whole)
            if dim < block_rows:
                for offset in range(0, whole, BLOCK):
                    block = (head * blocks + (key + offset) // BLOCK) * block_rows * BLOCK
                    _multiply_by_scales(scratch, score_at + offset, rows, keys, block + (dim + block_rows) // 2 * BLOCK)
            source = (head * positions + key) * wide
            for row in range(0, tile_rows, TILE_ROWS):
                for d in range(0, wide, TILE_COLUMNS):
                    multiply_tile(
                        scratch, score_at + row * KEY_TILE, KEY_TILE, values, source + d, wide, width,
                        scratch, sum_at + row * wide + d, wide, True,
                    )  # fmt: skip
            key += width
        for row in range(rows):
            token = (first_row + row) // group
            at = (head * group + (first_row + row) % group) * dim
            scale = _ONE / scratch[mass_at + row]
            for d in range(dim):
                result[token, at + d] = scratch[sum_at + row * wide + d] * scale


attend = inline(_attend)


def _signature(cached: Any) -> Any:
    size, f4 = types.intp, types.float32
    return types.void(
        view(f4, 2), size, view(cached, 4), view(cached, 3), size, size, size, size, out(f4, 1), out(f4, 2)
    )


ATTEND: dict[np.dtype[Any], Kernel] = {
    np.dtype(np.float32): kernel(_signature(types.float32))(_attend),
    np.dtype(np.uint16): kernel(_signature(types.uint16))(_attend),
    np.dtype(np.int8): kernel(_signature(types.int8), "attend_quantized")(_attend),
}
ATTEND_WITH_SINKS: dict[np.dtype[Any], Kernel] = {
    np.dtype(item): kernel(_signature(kind), "attend_with_sinks", _begin_row=_begin_row_at_sink)(_attend)
    for item, kind in ((np.float32, types.float32), (np.uint16, types.uint16), (np.int8, types.int8))
}
