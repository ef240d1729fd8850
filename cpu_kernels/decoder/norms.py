"""The element-wise work between the matrix products of a decoder layer, fused so that a token costs few calls."""

from typing import Any

import numpy as np
from numba import types
from numpy import float32

from cpu_kernels.decoder.attention import BLOCK
from cpu_kernels.decoder.exponential import exponential
from cpu_kernels.decoder.tiles import LANES, square_total, stored_as
from cpu_kernels.jit.compiler import Kernel, inline, kernel, out, view

_F4 = types.float32
_SIZE = types.intp
_ONE = float32(1.0)


@inline
def _inverse_norm(array: Any, start: int, count: int, epsilon: Any) -> Any:
    """Return 1 / sqrt(mean of squares + epsilon) of `count` items of a flat float32 array from `start`."""
    even = count // LANES * LANES
    squares = square_total(array, start, even)
    for i in range(start + even, start + count):
        squares += array[i] * array[i]
    return _ONE / (squares / float32(count) + epsilon) ** float32(0.5)


@kernel(types.void(out(_F4, 2), view(_F4, 2), view(_F4, 1), view(_F4, 1), _F4, _SIZE, _SIZE, out(_F4, 2)))
def add_norm(
    stream: Any, delta: Any, bias: Any, weight: Any, epsilon: float, start: int, stop: int, normed: Any
) -> None:  # fmt: skip
    """For rows start..stop-1: stream += delta + bias, then normed = weight * stream / rms(stream).

    stream, delta, normed (n, hidden); bias and weight (hidden,).
    """
    hidden = stream.shape[1]
    flat = stream.reshape(stream.size)
    for row in range(start, stop):
        for i in range(hidden):
            stream[row, i] += delta[row, i] + bias[i]
        scale = _inverse_norm(flat, row * hidden, hidden, epsilon)
        for i in range(hidden):
            normed[row, i] = weight[i] * (stream[row, i] * scale)


@kernel(types.void(view(_F4, 2), view(_F4, 1), _SIZE, _SIZE, out(_F4, 2)))
def gate(gate_up: Any, bias: Any, start: int, stop: int, result: Any) -> None:
    """For rows start..stop-1: result = silu(first half of gate_up) * second half, after adding the bias.

    gate_up (n, 2 * inner), bias (2 * inner,), result (n, inner).
    """
    inner = result.shape[1]
    for row in range(start, stop):
        for i in range(inner):
            x = gate_up[row, i] + bias[i]
            result[row, i] = x / (_ONE + exponential(-x)) * (gate_up[row, inner + i] + bias[inner + i])


@inline
def _finish_head(
    head: Any, norm: Any, normalise: bool, epsilon: Any, cosines: Any, sines: Any, scale: float32
) -> None:  # fmt: skip
    """Normalise (if asked), rotate and scale one head (dim,) in place; cosines and sines (dim / 2,)."""
    half = cosines.size
    if normalise:
        inverse = _inverse_norm(head, 0, head.size, epsilon)
        for i in range(head.size):
            head[i] = norm[i] * (head[i] * inverse)
    first, second = head[:half], head[half:]
    for i in range(half):
        low, high = first[i], second[i]
        first[i] = (low * cosines[i] - high * sines[i]) * scale
        second[i] = (high * cosines[i] + low * sines[i]) * scale


def _place(
    qkv: Any, bias: Any, q_norm: Any, k_norm: Any, epsilon: Any, cosines: Any, sines: Any,
    first: int, heads: int, start: int, stop: int, keys: Any, values: Any,
) -> None:  # fmt: skip
    """For tokens start..stop-1 at positions first + token: finish queries in place, write keys and values to the cache.

    Adds the bias, normalises each head of queries and keys (when q_norm is not empty), rotates them by position, and
    scales queries by 1 / sqrt(head_dim). qkv (n, (heads + 2 kv heads) * head_dim), cosines and sines
    (positions, head_dim / 2); the cache's layout is that of the attention kernel.
    """
    kv_heads, dim = keys.shape[0], keys.shape[2]
    scale = _ONE / float32(dim) ** float32(0.5)
    normalise = q_norm.size > 0
    for token in range(start, stop):
        position = first + token
        row = qkv[token]
        for i in range(row.size):
            row[i] += bias[i]
        for head in range(heads + kv_heads):
            own = row[head * dim : (head + 1) * dim]
            if head < heads:
                _finish_head(own, q_norm, normalise, epsilon, cosines[position], sines[position], scale)
            else:
                _finish_head(own, k_norm, normalise, epsilon, cosines[position], sines[position], _ONE)
        for head in range(kv_heads):
            key = row[(heads + head) * dim : (heads + head + 1) * dim]
            value = row[(heads + kv_heads + head) * dim : (heads + kv_heads + head + 1) * dim]
            for d in range(dim):
                keys[head, position // BLOCK, d, position % BLOCK] = stored_as(key[d], keys)
                values[head, position, d] = stored_as(value[d], values)


def _placing(cached: Any) -> Any:
    table = view(_F4, 2)
    return types.void(
        out(_F4, 2), view(_F4, 1), view(_F4, 1), view(_F4, 1), _F4, table, table,
        _SIZE, _SIZE, _SIZE, _SIZE, out(cached, 4), out(cached, 3),
    )  # fmt: skip


PLACE: dict[np.dtype[Any], Kernel] = {
    np.dtype(np.float32): kernel(_placing(types.float32))(_place),
    np.dtype(np.uint16): kernel(_placing(types.uint16))(_place),
}
