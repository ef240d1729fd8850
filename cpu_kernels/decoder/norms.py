"""The element-wise work between the matrix products of a decoder layer, fused so that a token costs few calls."""

from typing import Any

import numpy as np
from numba import types
from numpy import float32

from cpu_kernels.decoder.attention import BLOCK
from cpu_kernels.decoder.exponential import exponential
from cpu_kernels.decoder.quantized_cache import finish_query, put_token, scale_rows
from cpu_kernels.decoder.tiles import LANES, square_total, stored_as
from cpu_kernels.jit.compiler import Kernel, inline, kernel, out, view

_F4 = types.float32
_SIZE = types.intp
_ONE = float32(1.0)
_GELU = float32(2 * 0.7978845608028654)  # twice the square root of 2 / pi
_GELU_CUBE = float32(0.044715)


@inline
def inverse_norm(array: Any, start: int, count: int, epsilon: Any) -> Any:
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
        scale = inverse_norm(flat, row * hidden, hidden, epsilon)
        for i in range(hidden):
            normed[row, i] = weight[i] * (stream[row, i] * scale)


@kernel(
    types.void(out(_F4, 2), out(_F4, 2), view(_F4, 1), view(_F4, 1), _F4, view(_F4, 1), _F4, _SIZE, _SIZE, out(_F4, 2))
)
def add_normed(
    stream: Any, delta: Any, bias: Any, delta_norm: Any, factor: float, weight: Any, epsilon: float,
    start: int, stop: int, normed: Any,
) -> None:  # fmt: skip
    """For rows start..stop-1: stream += factor * norm(delta + bias), then normed = weight * stream / rms(stream).

    stream, delta (overwritten), normed (n, hidden); bias (hidden,). delta_norm, the weight of delta's norm, and weight
    are (hidden,), or empty where there is no such norm.
    """
    hidden = stream.shape[1]
    streams, deltas = stream.reshape(stream.size), delta.reshape(delta.size)
    for row in range(start, stop):
        for i in range(hidden):
            delta[row, i] += bias[i]
        if delta_norm.size > 0:
            scale = inverse_norm(deltas, row * hidden, hidden, epsilon)
            for i in range(hidden):
                delta[row, i] = delta_norm[i] * (delta[row, i] * scale)
        for i in range(hidden):
            stream[row, i] += delta[row, i] * factor
        if weight.size > 0:
            scale = inverse_norm(streams, row * hidden, hidden, epsilon)
            for i in range(hidden):
                normed[row, i] = weight[i] * (stream[row, i] * scale)
        else:
            for i in range(hidden):
                normed[row, i] = stream[row, i]


@kernel(types.void(out(_F4, 2), view(_F4, 1), _F4, _SIZE, _SIZE))
def norm_rows(values: Any, weight: Any, epsilon: float, start: int, stop: int) -> None:
    """For rows start..stop-1: values = weight * values / rms(values), in place. values (n, width), weight (width,)."""
    width = values.shape[1]
    flat = values.reshape(values.size)
    for row in range(start, stop):
        first = row * width
        scale = inverse_norm(flat, first, width, epsilon)
        for i in range(width):
            flat[first + i] = weight[i] * (flat[first + i] * scale)


@kernel(types.void(out(_F4, 2), view(_F4, 1), view(_F4, 1), view(_F4, 1), _F4, _SIZE, _SIZE))
def norm_queries_keys(
    qkv: Any, bias: Any, q_norm: Any, k_norm: Any, epsilon: float, start: int, stop: int
) -> None:  # fmt: skip
    """For rows start..stop-1: qkv += bias, then all queries of a token are normalized as one vector, all keys as one.

    qkv (n, columns), whose first columns are the queries, q_norm.size of them, and the next the keys, k_norm.size.
    """
    columns = qkv.shape[1]
    flat = qkv.reshape(qkv.size)
    queries, keys = q_norm.size, k_norm.size
    for row in range(start, stop):
        for i in range(columns):
            qkv[row, i] += bias[i]
        first = row * columns
        scale = inverse_norm(flat, first, queries, epsilon)
        for i in range(queries):
            flat[first + i] = q_norm[i] * (flat[first + i] * scale)
        first += queries
        scale = inverse_norm(flat, first, keys, epsilon)
        for i in range(keys):
            flat[first + i] = k_norm[i] * (flat[first + i] * scale)


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


@kernel(types.void(view(_F4, 2), view(_F4, 1), _SIZE, _SIZE, out(_F4, 2)))
def gelu_gate(gate_up: Any, bias: Any, start: int, stop: int, result: Any) -> None:
    """For rows start..stop-1: as `gate`, with GELU in its tanh form in place of SiLU."""
    inner = result.shape[1]
    for row in range(start, stop):
        for i in range(inner):
            x = gate_up[row, i] + bias[i]
            # x / 2 * (1 + tanh(z)) is x / (1 + exp(-2 z)).
            z = _GELU * (x + _GELU_CUBE * (x * x * x))
            result[row, i] = x / (_ONE + exponential(-z)) * (gate_up[row, inner + i] + bias[inner + i])


@kernel(types.void(view(_F4, 2), view(_F4, 1), _SIZE, _SIZE, out(_F4, 2)))
def relu2_gate(gate_up: Any, bias: Any, start: int, stop: int, result: Any) -> None:
    """For rows start..stop-1: as `gate`, with the square of ReLU in place of SiLU."""
    inner = result.shape[1]
    for row in range(start, stop):
        for i in range(inner):
            x = gate_up[row, i] + bias[i]
            x = float32(0.0) if x < float32(0.0) else x  # NaN stays
            result[row, i] = x * x * (gate_up[row, inner + i] + bias[inner + i])


GATES: dict[str, Kernel] = {"silu": gate, "gelu_tanh": gelu_gate, "relu2": relu2_gate}


@inline
def finish_head(
    head: Any, norm: Any, normalise: bool, epsilon: Any, cosines: Any, sines: Any, scale: float32
) -> None:  # fmt: skip
    """Normalise (if asked), rotate and scale one head (dim,) in place; cosines and sines (rotated / 2,).

    The first `rotated` items are rotated.
    """
    half = cosines.size
    if normalise:
        inverse = inverse_norm(head, 0, head.size, epsilon)
        for i in range(head.size):
            head[i] = norm[i] * (head[i] * inverse)
    first, second, rest = head[:half], head[half : 2 * half], head[2 * half :]
    for i in range(half):
        low, high = first[i], second[i]
        first[i] = (low * cosines[i] - high * sines[i]) * scale
        second[i] = (high * cosines[i] + low * sines[i]) * scale
    for i in range(rest.size):
        rest[i] *= scale


@inline
def _finish_head_in_pairs(
    head: Any, norm: Any, normalise: bool, epsilon: Any, cosines: Any, sines: Any, scale: float32
) -> None:  # fmt: skip
    """As `finish_head`, with each item rotated with its neighbour."""
    half = cosines.size
    if normalise:
        inverse = inverse_norm(head, 0, head.size, epsilon)
        for i in range(head.size):
            head[i] = norm[i] * (head[i] * inverse)
    for i in range(half):
        low, high = head[2 * i], head[2 * i + 1]
        head[2 * i] = (low * cosines[i] - high * sines[i]) * scale
        head[2 * i + 1] = (high * cosines[i] + low * sines[i]) * scale
    rest = head[2 * half :]
    for i in range(rest.size):
        rest[i] *= scale


@inline
def leave_query(query: Any, keys: Any, head: int) -> None:
    """Leave a query as it is: a cache of floats needs nothing more."""


@inline
def put_floats(key: Any, value: Any, keys: Any, values: Any, head: int, position: int) -> None:
    """Write a head's key and value (dim,) of one token to a cache of floats."""
    for d in range(key.size):
        keys[head, position // BLOCK, d, position % BLOCK] = stored_as(key[d], keys)
        values[head, position, d] = stored_as(value[d], values)


_finish_head, _finish_query, _put_token = finish_head, leave_query, put_floats


def _place(
    qkv: Any, bias: Any, q_norm: Any, k_norm: Any, epsilon: Any, scale: Any, cosines: Any, sines: Any,
    first: int, heads: int, start: int, stop: int, keys: Any, values: Any,
) -> None:  # fmt: skip
    """For tokens start..stop-1 at positions first + token: finish queries in place, write keys and values to the cache.

    Adds the bias, normalises each head of queries and keys (when q_norm is not empty), rotates them by position, and
    multiplies queries by `scale`. qkv (n, (heads + 2 kv heads) * head_dim), cosines and sines (positions, rotated / 2),
    of which a head has as many items or more; the cache's layout is that of the attention kernel.
    """
    kv_heads, dim = keys.shape[0], keys.shape[2] - scale_rows(keys)
    group = heads // kv_heads
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
                _finish_query(own, keys, head // group)
            else:
                _finish_head(own, k_norm, normalise, epsilon, cosines[position], sines[position], _ONE)
        for head in range(kv_heads):
            key = row[(heads + head) * dim : (heads + head + 1) * dim]
            value = row[(heads + kv_heads + head) * dim : (heads + kv_heads + head + 1) * dim]
            _put_token(key, value, keys, values, head, position)


def _placing(cached: Any) -> Any:
    table = view(_F4, 2)
    return types.void(
        out(_F4, 2), view(_F4, 1), view(_F4, 1), view(_F4, 1), _F4, _F4, table, table,
        _SIZE, _SIZE, _SIZE, _SIZE, out(cached, 4), out(cached, 3),
    )  # fmt: skip


PLACE: dict[np.dtype[Any], Kernel] = {
    np.dtype(np.float32): kernel(_placing(types.float32))(_place),
    np.dtype(np.uint16): kernel(_placing(types.uint16))(_place),
    np.dtype(np.int8): kernel(
        _placing(types.int8), "place_quantized", _finish_query=finish_query, _put_token=put_token
    )(_place),
}
# Where each item is rotated with its neighbour.
PLACE_IN_PAIRS: dict[np.dtype[Any], Kernel] = {
    np.dtype(np.float32): kernel(_placing(types.float32), "place_in_pairs", _finish_head=_finish_head_in_pairs)(_place),
    np.dtype(np.uint16): kernel(_placing(types.uint16), "place_in_pairs", _finish_head=_finish_head_in_pairs)(_place),
    np.dtype(np.int8): kernel(
        _placing(types.int8), "place_quantized_in_pairs", _finish_head=_finish_head_in_pairs,
        _finish_query=finish_query, _put_token=put_token,
    )(_place),
}  # fmt: skip
