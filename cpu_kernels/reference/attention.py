"""NumPy twins of the decoder's kernels: what they mean, without tiles, threads or fused steps."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def rms_norm(x: Floats, weight: Floats, epsilon: float) -> Floats:
    """Return weight * x / rms(x) over the last axis."""
    scale = 1.0 / np.sqrt(np.mean(x.astype(np.float64) ** 2, axis=-1, keepdims=True) + epsilon)
    return np.asarray(weight * (x * scale), dtype=np.float32)


def gate(gate_up: Floats, bias: Floats) -> Floats:
    """Return silu(first half) * second half of gate_up + bias, (n, 2 * inner) to (n, inner)."""
    first, second = np.split(gate_up.astype(np.float64) + bias, 2, axis=-1)
    return np.asarray(first / (1.0 + np.exp(-np.maximum(first, -700.0))) * second, dtype=np.float32)


def gelu_gate(gate_up: Floats, bias: Floats) -> Floats:
    """Return gelu(first half) * second half of gate_up + bias, GELU in its tanh form."""
    first, second = np.split(gate_up.astype(np.float64) + bias, 2, axis=-1)
    gelu = first / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (first + 0.044715 * first**3)))
    return np.asarray(gelu * second, dtype=np.float32)


def relu2_gate(gate_up: Floats, bias: Floats) -> Floats:
    """Return relu(first half) ** 2 * second half of gate_up + bias."""
    first, second = np.split(gate_up.astype(np.float64) + bias, 2, axis=-1)
    return np.asarray(np.maximum(first, 0.0) ** 2 * second, dtype=np.float32)


def add_normed(
    stream: Floats, delta: Floats, delta_norm: Floats, factor: float, weight: Floats, epsilon: float
) -> tuple[Floats, Floats]:
    """Return stream + factor * norm(delta), and its norm; a norm whose weight is empty leaves values as they are."""
    added = rms_norm(delta, delta_norm, epsilon) if delta_norm.size else delta
    after = np.asarray(stream + np.float32(factor) * added, np.float32)
    return after, rms_norm(after, weight, epsilon) if weight.size else after


def rotate(x: Floats, cosines: Floats, sines: Floats, in_pairs: bool = False) -> Floats:
    """Rotate heads x (n, heads, head_dim) by their token's angles; cosines and sines (n, rotated / 2).

    in_pairs: each item with its neighbour, in place of the one half the rotated ones further.
    """
    half = cosines.shape[-1]
    if in_pairs:
        order = np.concatenate([np.arange(2 * half).reshape(-1, 2).T.reshape(-1), np.arange(2 * half, x.shape[-1])])
        return rotate(x[..., order], cosines, sines)[..., np.argsort(order)]
    low, high, rest = np.split(x, [half, 2 * half], axis=-1)
    c, s = cosines[:, None, :], sines[:, None, :]
    return np.concatenate([low * c - high * s, high * c + low * s, rest], axis=-1)


def attend(
    queries: Floats, keys: Floats, values: Floats, first: int, window: int | None = None, sinks: Floats | None = None
) -> Floats:
    """Return causal attention of scaled queries (n, heads, dim) at positions first.. over keys, values (m, kv, dim).

    A token at position p sees positions p - window + 1 .. p, and a sink (heads,) where there are any: a score that
    takes part in the softmax and has no value. Result (n, heads, dim).
    """
    tokens, heads = queries.shape[:2]
    group = heads // keys.shape[1]
    own = first + np.arange(tokens)[:, None]
    seen = np.arange(len(keys))[None, :]
    visible = seen <= own
    if window is not None:
        visible &= seen > own - window
    result = np.empty(queries.shape, np.float32)
    for head in range(heads):
        scores = queries[:, head].astype(np.float64) @ keys[:, head // group].T
        scores = np.where(visible, scores, -np.inf)
        top = scores.max(axis=1, keepdims=True)
        scores = np.exp(scores - top)
        mass = scores.sum(axis=1, keepdims=True)
        if sinks is not None:
            mass = mass + np.exp(np.minimum(sinks[head] - top, 700.0))
        result[:, head] = (scores / mass) @ values[:, head // group]
    return result


def quantize_rows(x: Floats) -> tuple[NDArray[np.int8], Floats]:
    """Return x (..., dim) as int8 and a float32 scale for each row, (...,): keys and values in a cache of 8 bits."""
    largest = np.abs(x).max(axis=-1)
    by = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    return np.rint(x * by[..., None]).astype(np.int8), largest / np.float32(127)
