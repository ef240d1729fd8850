"""Layers whose tokens read a state in place of the tokens before them: short convolutions and the gated delta rule.

Each reads the state that a text had before its tokens and writes the one after them elsewhere, so that a pass which
fails has changed nothing. A token gets the same numbers whichever tokens share its pass.
"""

from typing import Any

import numpy as np
from numba import types
from numpy import float32

from cpu_kernels.decoder.exponential import exponential
from cpu_kernels.decoder.norms import inverse_norm
from cpu_kernels.decoder.tiles import multiply_add
from cpu_kernels.jit.compiler import inline, kernel, out, view

_F4, _SIZE = types.float32, types.intp
_ONE = float32(1.0)
_EPSILON = float32(1e-6)  # of the length of queries and keys
_LINEAR = float32(20.0)  # from here on ln(1 + exp(x)) is taken for x, as in PyTorch


@kernel(
    types.void(
        view(_F4, 2),
        _SIZE,
        view(_F4, 2),
        view(_F4, 2),
        view(_F4, 1),
        types.int64,
        _SIZE,
        _SIZE,
        out(_F4, 2),
        out(_F4, 2),
    )
)
def convolve(
    inputs: Any, column: int, before: Any, weight: Any, bias: Any, silu: int, start: int, stop: int, after: Any,
    result: Any,
) -> None:  # fmt: skip
    """For channels start..stop-1: convolve each with its last inputs, and pass it through SiLU where `silu` is 1.

    inputs (n, columns): the channels lie from `column` on; weight (width, channels), the oldest input's first; bias
    (channels,); before and after (width - 1, channels): the inputs before and after these; result (n, channels).
    """
    tokens, width = inputs.shape[0], weight.shape[0]
    for token in range(tokens):
        to = result[token, start:stop]
        own = bias[start:stop]
        for c in range(to.size):
            to[c] = own[c]
        for place in range(width):
            row = token + place - (width - 1)
            read = inputs[row, column + start : column + stop] if row >= 0 else before[row + width - 1, start:stop]
            factors = weight[place, start:stop]
            for c in range(to.size):
                to[c] += factors[c] * read[c]
        if silu:
            for c in range(to.size):
                to[c] = to[c] / (_ONE + exponential(-to[c]))
    for place in range(width - 1):
        row = tokens + place - (width - 1)
        read = inputs[row, column + start : column + stop] if row >= 0 else before[row + width - 1, start:stop]
        to = after[place, start:stop]
        for c in range(to.size):
            to[c] = read[c]


@inline
def _read_rows(rows: Any, factors: Any, total: Any) -> None:
    """Add to total (cols,) the rows (n, cols), each times its factor."""
    # Four at a time: the total is then loaded and stored a quarter as often.
    whole = factors.size // 4 * 4
    for i in range(0, whole, 4):
        a, b, c, d = rows[i], rows[i + 1], rows[i + 2], rows[i + 3]
        of_a, of_b, of_c, of_d = factors[i], factors[i + 1], factors[i + 2], factors[i + 3]
        for v in range(total.size):
            partial = multiply_add(of_b, b[v], multiply_add(of_a, a[v], total[v]))
            total[v] = multiply_add(of_d, d[v], multiply_add(of_c, c[v], partial))
    for i in range(whole, factors.size):
        row, factor = rows[i], factors[i]
        for v in range(total.size):
            total[v] = multiply_add(factor, row[v], total[v])


@kernel(
    types.void(
        view(_F4, 2), _SIZE, view(_F4, 2), view(_F4, 1), view(_F4, 1), out(_F4, 3), _SIZE, _SIZE, out(_F4, 1),
        out(_F4, 3), out(_F4, 2),
    )
)  # fmt: skip
def delta_rule(
    mixed: Any, key_heads: int, gates: Any, rates: Any, offsets: Any, before: Any, start: int, stop: int, scratch: Any,
    after: Any, result: Any,
) -> None:  # fmt: skip
    """For heads start..stop-1: let the state forget a share, learn each token's value at its key, and be read.

    mixed (n, columns): queries and keys of key_heads, and values of all heads, which follow one another; each key head
    is that of several heads in a row. gates (n, 2 * heads): of learning, and of forgetting; rates and offsets (heads,)
    of the latter. before and after (heads, key_dim, value_dim); scratch (2 * key_dim + 3 * value_dim,);
    result (n, heads * value_dim). Source: Gated Delta Networks, arXiv 2412.06464; transformers' Qwen3-Next.
    """
    heads, key_dim, value_dim = before.shape
    of_query, of_key = scratch[:key_dim], scratch[key_dim : 2 * key_dim]
    rest = scratch[2 * key_dim :]
    known, read, change = rest[:value_dim], rest[value_dim : 2 * value_dim], rest[2 * value_dim : 3 * value_dim]
    for head in range(start, stop):
        key_at = head // (heads // key_heads) * key_dim
        value_at = 2 * key_heads * key_dim + head * value_dim
        for token in range(mixed.shape[0]):
            query, key = mixed[token, key_at:], mixed[token, key_heads * key_dim + key_at :]
            of_one, of_other = _EPSILON, _EPSILON
            for i in range(key_dim):
                of_one += query[i] * query[i]
                of_other += key[i] * key[i]
            of_one = _ONE / (of_one ** float32(0.5) * float32(key_dim) ** float32(0.5))
            of_other = _ONE / of_other ** float32(0.5)
            product = float32(0.0)
            for i in range(key_dim):
                of_query[i] = query[i] * of_one
                of_key[i] = key[i] * of_other
                product += of_query[i] * of_key[i]
            learning = _ONE / (_ONE + exponential(-gates[token, head]))
            x = gates[token, heads + head] + offsets[head]
            soft = x if x > _LINEAR else np.log1p(exponential(x))
            kept = exponential(-rates[head] * soft)
            state = before[head] if token == 0 else after[head]
            for v in range(known.size):
                known[v] = float32(0.0)
                read[v] = float32(0.0)
            _read_rows(state, of_key, known)
            _read_rows(state, of_query, read)
            value, to = mixed[token, value_at:], result[token, head * value_dim : (head + 1) * value_dim]
            for v in range(change.size):
                change[v] = (value[v] - kept * known[v]) * learning
                to[v] = kept * read[v] + product * change[v]
            for i in range(key_dim):
                row, next_row, k = state[i], after[head, i], of_key[i]
                for v in range(next_row.size):
                    next_row[v] = multiply_add(k, change[v], kept * row[v])


@kernel(types.void(out(_F4, 2), view(_F4, 2), _SIZE, view(_F4, 1), _F4, _SIZE, _SIZE))
def norm_and_gate(values: Any, gates: Any, column: int, weight: Any, epsilon: float, start: int, stop: int) -> None:
    """For rows start..stop-1: normalize each head of values, in place, and multiply it by SiLU of its gates.

    values (n, heads * dim); gates (n, columns), of which those from `column` on are the values'; weight (dim,).
    """
    dim = weight.size
    flat = values.reshape(values.size)
    for row in range(start, stop):
        for at in range(0, values.shape[1], dim):
            first = row * values.shape[1] + at
            scale = inverse_norm(flat, first, dim, epsilon)
            own, factors = values[row, at : at + dim], gates[row, column + at : column + at + dim]
            for i in range(own.size):
                x = factors[i]
                own[i] = weight[i] * (own[i] * scale) * (x / (_ONE + exponential(-x)))
