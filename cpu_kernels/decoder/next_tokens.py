"""Attention of one token of each of several texts, in one kernel call a thread: by text and by head of keys.

Called text by text from Python, a pass of four texts spent 1.7 ms of 13 in it, on one thread.
"""

from typing import Any

import numpy as np
from numba import types

from cpu_kernels.decoder.attention import BLOCK, QUERY_ROWS, attend
from cpu_kernels.decoder.norms import finish_head, leave_query, put_floats
from cpu_kernels.decoder.quantized_cache import finish_query, put_token
from cpu_kernels.jit.addresses import (
    float32_items,
    float32_keys,
    float32_rows,
    float32_values,
    int8_keys,
    int8_values,
    int64_items,
    uint16_keys,
    uint16_values,
)
from cpu_kernels.jit.compiler import Kernel, kernel, out, view

# int64 words of a thread's job; names of arrays are their addresses. numbers: float32 epsilon and scale of queries.
JOB = (
    "qkv", "columns", "result", "bias", "q_norm", "k_norm", "norm_size", "numbers", "texts", "heads", "kv_heads",
    "head_dim", "window", "scratch", "scratch_size",
)  # fmt: skip
# Of each text, for one layer: its cache and the sizes of that, the token's position, and the angles of positions.
TEXT = ("keys", "values", "key_blocks", "key_rows", "positions", "columns", "position", "cosines", "sines", "half")
(
    _QKV, _COLUMNS, _RESULT, _BIAS, _Q_NORM, _K_NORM, _NORM_SIZE, _NUMBERS, _TEXTS, _HEADS, _KV_HEADS,
    _HEAD_DIM, _WINDOW, _SCRATCH, _SCRATCH_SIZE,
) = range(len(JOB))  # fmt: skip
_KEYS, _VALUES, _KEY_BLOCKS, _KEY_ROWS, _POSITIONS, _WIDE, _POSITION, _COSINES, _SINES, _HALF = range(len(TEXT))
_WORDS = len(JOB)
_TEXT_WORDS = len(TEXT)
_ONE = np.float32(1.0)
_keys_at, _values_at, _finish_query, _put_token = float32_keys, float32_values, leave_query, put_floats


def _attend_next(block: Any, first: Any, last: Any) -> None:
    """Do items first .. last - 1 of a job: item i is head i % kv heads of the token of text i // kv heads.

    Adds the bias, normalises, rotates and scales the queries of the head, puts its key and value into the cache, and
    attends: the numbers are those of the kernels for one text (`PLACE` and `ATTEND`).
    """
    job = int64_items(block, _WORDS)
    heads, kv_heads, dim, columns = job[_HEADS], job[_KV_HEADS], job[_HEAD_DIM], job[_COLUMNS]
    group = heads // kv_heads
    numbers = float32_items(job[_NUMBERS], 2)
    scratch = float32_items(job[_SCRATCH], job[_SCRATCH_SIZE])
    bias = float32_items(job[_BIAS], columns)
    steps = -(-group // QUERY_ROWS)
    for item in range(first, last):
        number, head = item // kv_heads, item % kv_heads
        text = int64_items(job[_TEXTS] + 8 * _TEXT_WORDS * number, _TEXT_WORDS)
        position, half = text[_POSITION], text[_HALF]
        row = float32_items(job[_QKV] + 4 * columns * number, columns)
        keys = _keys_at(text[_KEYS], kv_heads, text[_KEY_BLOCKS], text[_KEY_ROWS], BLOCK)
        values = _values_at(text[_VALUES], kv_heads, text[_POSITIONS], text[_WIDE])
        cosines = float32_items(text[_COSINES] + 4 * half * position, half)
        sines = float32_items(text[_SINES] + 4 * half * position, half)
        key_at, value_at = (heads + head) * dim, (heads + kv_heads + head) * dim
        for own in range(group + 2):  # the queries, the key, the value
            at = (head * group + own) * dim if own < group else key_at if own == group else value_at
            vector, added = row[at : at + dim], bias[at : at + dim]
            for d in range(vector.size):
                vector[d] += added[d]
            if own <= group:
                norm = float32_items(job[_Q_NORM] if own < group else job[_K_NORM], job[_NORM_SIZE])
                scale = numbers[1] if own < group else _ONE
                finish_head(vector, norm, job[_NORM_SIZE] > 0, numbers[0], cosines, sines, scale)
            if own < group:
                _finish_query(vector, keys, head)
        _put_token(row[key_at : key_at + dim], row[value_at : value_at + dim], keys, values, head, position)
        token = float32_rows(job[_QKV] + 4 * columns * number, 1, columns)
        result = float32_rows(job[_RESULT] + 4 * heads * dim * number, 1, heads * dim)
        attend(
            token, heads, keys, values, position, job[_WINDOW], head * steps, (head + 1) * steps, scratch, result
        )  # fmt: skip


_I8, _F4 = types.int64, types.float32
_JOB = types.void(_I8, _I8, _I8)
ATTEND_NEXT: dict[np.dtype[Any], Kernel] = {
    np.dtype(np.float32): kernel(_JOB, "attend_next_float32", _keys_at=float32_keys)(_attend_next),
    np.dtype(np.uint16): kernel(
        _JOB, "attend_next_float16", _keys_at=uint16_keys, _values_at=uint16_values
    )(_attend_next),
    np.dtype(np.int8): kernel(
        _JOB, "attend_next_quantized", _keys_at=int8_keys, _values_at=int8_values, _finish_query=finish_query,
        _put_token=put_token,
    )(_attend_next),
}  # fmt: skip


@kernel(
    types.void(
        out(_I8, 2), out(_F4, 2), out(_F4, 2), view(_F4, 1), view(_F4, 1), view(_F4, 1), view(_I8, 2), types.intp
    )
)
def set_layer(
    jobs: Any, qkv: Any, result: Any, bias: Any, q_norm: Any, k_norm: Any, texts: Any, window: int
) -> None:  # fmt: skip
    """Write what is of one layer into the jobs (threads, JOB); texts (texts, TEXT)."""
    for k in range(jobs.shape[0]):
        jobs[k, _QKV], jobs[k, _COLUMNS], jobs[k, _RESULT] = qkv.ctypes.data, qkv.shape[1], result.ctypes.data
        jobs[k, _BIAS], jobs[k, _Q_NORM], jobs[k, _K_NORM] = bias.ctypes.data, q_norm.ctypes.data, k_norm.ctypes.data
        jobs[k, _NORM_SIZE], jobs[k, _TEXTS], jobs[k, _WINDOW] = q_norm.size, texts.ctypes.data, window
