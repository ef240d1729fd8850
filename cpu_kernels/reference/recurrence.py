"""NumPy twins of layers whose tokens read a state: what they mean, token by token."""

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.reference.attention import rms_norm
from cpu_kernels.reference.gates import sigmoid

Floats = NDArray[np.float32]


def convolve(inputs: Floats, before: Floats, weight: Floats, bias: Floats, silu: bool) -> tuple[Floats, Floats]:
    """Return the convolution of inputs (n, channels) with those before them, and the last inputs.

    weight (width, channels); before and the last inputs (width - 1, channels).
    """
    read = np.concatenate([before, inputs]).astype(np.float64)
    width = len(weight)
    found = np.stack([(read[at : at + width] * weight).sum(axis=0) + bias for at in range(len(inputs))])
    made = found * sigmoid(found.astype(np.float32)) if silu else found
    return np.asarray(made, np.float32), np.asarray(read[len(read) - (width - 1) :], np.float32)


def delta_rule(
    queries: Floats, keys: Floats, values: Floats, gates: Floats, rates: Floats, offsets: Floats, state: Floats
) -> tuple[Floats, Floats]:
    """Return what tokens read of a state (heads, key_dim, value_dim), (n, heads, value_dim), and that after them.

    queries and keys (n, key heads, key_dim), values (n, heads, value_dim); gates (n, 2, heads): of learning, and of
    forgetting, with rates and offsets (heads,).
    """
    heads = values.shape[1]
    queries, keys = (
        np.repeat(part / np.sqrt((part.astype(np.float64) ** 2).sum(axis=-1, keepdims=True) + 1e-6),
                  heads // part.shape[1], axis=1)
        for part in (queries, keys)
    )  # fmt: skip
    now, result = state.astype(np.float64), np.empty(values.shape, np.float32)
    for token in range(len(values)):
        q, k, v = queries[token] / np.sqrt(queries.shape[-1]), keys[token], values[token]
        kept = np.exp(-rates * np.logaddexp(0.0, gates[token, 1].astype(np.float64) + offsets))
        now = now * kept[:, None, None]
        change = (v - np.einsum("hkv,hk->hv", now, k)) * sigmoid(gates[token, 0])[:, None]
        now = now + k[:, :, None] * change[:, None, :]
        result[token] = np.einsum("hkv,hk->hv", now, q)
    return result, np.asarray(now, np.float32)


def norm_and_gate(values: Floats, gates: Floats, weight: Floats, epsilon: float) -> Floats:
    """Return values (n, heads, dim), each head normalized, times SiLU of the gates (n, heads, dim)."""
    return np.asarray(rms_norm(values, weight, epsilon) * (gates * sigmoid(gates)), np.float32)
