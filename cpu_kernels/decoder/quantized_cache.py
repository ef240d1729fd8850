"""The key-value cache in 8 bits: where its scales lie, and how a token's keys and values are rounded.

A head's key or value of one token is int8 with one float32 scale. Keys are (kv heads, blocks + 1, head_dim + 8, 32):
the last 8 rows of a block hold the scales of its 32 keys and of its 32 values, and the last block begins with a factor
for each of the head's columns, float32 (head_dim,). Values are (kv heads, positions, padded head_dim).

Keys are divided by these factors before they are rounded and queries multiplied, which leaves their products as they
are. A column that is large in every key, as with the biases of Qwen2, would otherwise coarsen all columns.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy import float32, int8
from numpy.typing import NDArray

from cpu_kernels.decoder.tiles import TILE_COLUMNS
from cpu_kernels.jit import llvm
from cpu_kernels.jit.compiler import inline

SCALE_ROWS = 8  # of a block's keys: 32 float32 scales of keys, then as many of values
LARGEST = 127
_LARGEST = float32(LARGEST)
_ROUNDER = float32(12582912.0)  # adding and subtracting 1.5 * 2^23 rounds to the nearest integer, ties to even
_ZERO = float32(0.0)
_BLOCK = TILE_COLUMNS


@intrinsic
def scale_rows(typing: Any, keys: Any) -> Any:
    """Return the rows of a block of keys that hold scales: a constant, 0 for a cache of floats."""
    rows = SCALE_ROWS if keys.dtype == types.int8 else 0
    return types.intp(keys), lambda context, builder, signature, arguments: context.get_constant(types.intp, rows)


@intrinsic
def float_at(typing: Any, array: Any, byte: Any) -> Any:
    """Return the float32 that begins at a byte of an int8 array; 1 for other arrays, of which it is never asked."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if array.dtype != types.int8:
            return ir.Constant(llvm.F32, 1.0)
        pointer = llvm.item(context, builder, array, arguments[0], arguments[1])
        return builder.load(builder.bitcast(pointer, llvm.F32.as_pointer()), align=4)

    return types.float32(array, types.intp), generate


@intrinsic
def put_float(typing: Any, array: Any, byte: Any, value: Any) -> Any:
    """Write a float32 to the bytes of an int8 array from `byte` on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = llvm.item(context, builder, array, arguments[0], arguments[1])
        builder.store(arguments[2], builder.bitcast(pointer, llvm.F32.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.float32), generate


@inline
def block_bytes(keys: Any) -> Any:
    """Return the bytes of a block of int8 keys with its scales."""
    return keys.shape[2] * _BLOCK


@inline
def scales_at(keys: Any, head: int, block: int) -> Any:
    """Return the byte at which the scales of a block's keys begin; those of its values follow."""
    dim = keys.shape[2] - SCALE_ROWS
    return (head * keys.shape[1] + block) * block_bytes(keys) + dim * _BLOCK


@inline
def factors_at(keys: Any, head: int) -> Any:
    """Return the byte at which the factors of a head's columns begin."""
    return (head * keys.shape[1] + keys.shape[1] - 1) * block_bytes(keys)


@inline
def finish_query(query: Any, keys: Any, head: int) -> None:
    """Multiply a query (dim,) of a kv head by the factors of its columns, in place."""
    at = factors_at(keys, head)
    for d in range(query.size):
        query[d] *= float_at(keys, at + 4 * d)


@inline
def put_token(key: Any, value: Any, keys: Any, values: Any, head: int, position: int) -> None:
    """Round a key, which is divided by its columns' factors in place, and a value (dim,) into the cache."""
    factors = factors_at(keys, head)
    block, lane = position // _BLOCK, position % _BLOCK
    largest_key = largest_value = _ZERO
    for d in range(key.size):
        key[d] /= float_at(keys, factors + 4 * d)
        largest_key = max(largest_key, abs(key[d]))
        largest_value = max(largest_value, abs(value[d]))
    at = scales_at(keys, head, block) + 4 * lane
    put_float(keys, at, largest_key / _LARGEST)
    put_float(keys, at + 4 * _BLOCK, largest_value / _LARGEST)
    by_key = _LARGEST / largest_key if largest_key > _ZERO else _ZERO
    by_value = _LARGEST / largest_value if largest_value > _ZERO else _ZERO
    for d in range(key.size):
        keys[head, block, d, lane] = int8((key[d] * by_key + _ROUNDER) - _ROUNDER)
        values[head, position, d] = int8((value[d] * by_value + _ROUNDER) - _ROUNDER)


def set_factors(keys: NDArray[np.int8], factors: NDArray[np.float32]) -> None:
    """Write the factors (kv heads, head_dim) of a layer's columns into its keys."""
    ends = keys[:, -1].reshape(len(keys), keys.shape[2] * keys.shape[3])  # a view: contiguous within a head
    for end, own in zip(ends, factors, strict=True):
        end[: 4 * own.size] = np.ascontiguousarray(own, np.float32).view(np.int8)
