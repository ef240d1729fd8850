"""The decoder's kernels against their NumPy twins, over ragged shapes."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bincompress.model import rope
from bincompress.model.cache import KvCache, cache_bytes
from bincompress.model.config import parse
from bincompress.model.errors import PromptError
from cpu_kernels.decoder.attention import ATTEND, BLOCK, NO_WINDOW, padded, scratch_size, work_items
from cpu_kernels.decoder.next_tokens import TEXT
from cpu_kernels.decoder.norms import GATES, PLACE, PLACE_IN_PAIRS, add_norm, add_normed, norm_queries_keys, norm_rows
from cpu_kernels.reference import attention as reference

FLOAT32, FLOAT16 = np.dtype(np.float32), np.dtype(np.uint16)


def cached(rows: Any, kind: np.dtype[Any], by_column: bool) -> Any:
    """Lay (positions, kv heads, dim) out as the kernels' cache of keys or values."""
    positions, kv_heads, dim = rows.shape
    blocks = -(-positions // BLOCK)
    shape = (kv_heads, blocks, dim, BLOCK) if by_column else (kv_heads, blocks * BLOCK, padded(dim))
    array = np.zeros(shape, np.float32)
    for position in range(positions):
        if by_column:
            array[:, position // BLOCK, :, position % BLOCK] = rows[position]
        else:
            array[:, position, :dim] = rows[position]
    return array if kind == FLOAT32 else array.astype(np.float16).view(np.uint16)


def attend(queries: Any, keys: Any, values: Any, first: int, window: int | None, kind: Any, parts: int = 1) -> Any:
    tokens, heads, dim = queries.shape
    kv_heads = keys.shape[1]
    rest = np.full((tokens, 2 * kv_heads * dim), np.nan, np.float32)
    qkv = np.concatenate([queries.reshape(tokens, -1), rest], axis=1)
    result = np.full((tokens, heads * dim), np.nan, np.float32)
    scratch = np.full(scratch_size(dim), np.nan, np.float32)
    items = work_items(tokens, heads, kv_heads)
    stored = cached(keys, kind, True), cached(values, kind, False)
    for part in range(parts):
        bounds = items * part // parts, items * (part + 1) // parts
        ATTEND[kind](qkv, heads, *stored, first, window or NO_WINDOW, *bounds, scratch, result)
    return result.reshape(queries.shape)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 150),
    first=st.integers(0, 200),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 4, 7]),
    dim=st.sampled_from([2, 16, 24, 32, 64, 80, 128]),
    window=st.one_of(st.none(), st.integers(1, 200)),
    seed=st.integers(0, 99),
)
def test_attention_equals_its_twin(
    tokens: int, first: int, kv_heads: int, group: int, dim: int, window: int | None, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    queries = (rng.standard_normal((tokens, kv_heads * group, dim)) * 3 / dim**0.5).astype(np.float32)
    keys, values = rng.standard_normal((2, first + tokens, kv_heads, dim)).astype(np.float32)
    expected = reference.attend(queries, keys, values, first, window)
    assert np.abs(attend(queries, keys, values, first, window, FLOAT32) - expected).max() < 2e-5
    halves = keys.astype(np.float16).astype(np.float32), values.astype(np.float16).astype(np.float32)
    expected = reference.attend(queries, *halves, first, window)
    assert np.abs(attend(queries, keys, values, first, window, FLOAT16) - expected).max() < 2e-5


def test_attention_is_the_same_in_any_number_of_parts() -> None:
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((70, 6, 32)).astype(np.float32)
    keys, values = rng.standard_normal((2, 100, 2, 32)).astype(np.float32)
    whole = attend(queries, keys, values, 30, None, FLOAT32)
    assert np.array_equal(whole, attend(queries, keys, values, 30, None, FLOAT32, parts=5))


def test_large_scores_do_not_overflow() -> None:
    rng = np.random.default_rng(1)
    queries = rng.standard_normal((40, 2, 16)).astype(np.float32) * 1000
    keys, values = rng.standard_normal((2, 40, 1, 16)).astype(np.float32)
    result = attend(queries, keys, values, 0, None, FLOAT32)
    assert np.abs(result - reference.attend(queries, keys, values, 0)).max() < 1e-3


@pytest.mark.parametrize("hidden", [1, 16, 33, 2048])
def test_add_norm(hidden: int) -> None:
    rng = np.random.default_rng(hidden)
    stream, delta = rng.standard_normal((2, 5, hidden)).astype(np.float32)
    bias, weight = rng.standard_normal((2, hidden)).astype(np.float32)
    expected = stream + (delta + bias)
    normed = np.zeros_like(stream)
    add_norm(stream, delta, bias, weight, 1e-5, 1, 5, normed)
    assert np.array_equal(stream[1:], expected[1:])
    assert np.abs(normed[1:] - reference.rms_norm(expected[1:], weight, 1e-5)).max() < 1e-5
    assert not normed[0].any()


@pytest.mark.parametrize("hidden", [1, 31, 64, 77])
@pytest.mark.parametrize(("delta_normed", "normed_after"), [(True, True), (True, False), (False, True), (False, False)])
def test_add_normed(hidden: int, delta_normed: bool, normed_after: bool) -> None:
    rng = np.random.default_rng(7)
    stream, delta = rng.standard_normal((2, 6, hidden)).astype(np.float32)
    bias, delta_norm, weight = rng.standard_normal((3, hidden)).astype(np.float32)
    delta_norm, weight = delta_norm[: hidden * delta_normed], weight[: hidden * normed_after]
    expected = reference.add_normed(stream, delta + bias, delta_norm, 0.22, weight, 1e-5)
    before, normed = stream.copy(), np.zeros_like(stream)
    add_normed(stream, delta, bias, delta_norm, 0.22, weight, 1e-5, 1, 5, normed)
    assert np.abs(stream[1:5] - expected[0][1:5]).max() < 1e-5
    assert np.abs(normed[1:5] - expected[1][1:5]).max() < 1e-5
    assert np.array_equal(stream[[0, 5]], before[[0, 5]])
    assert not normed[[0, 5]].any()


@pytest.mark.parametrize(("queries", "keys", "values"), [(1, 1, 1), (30, 10, 10), (64, 32, 32)])
def test_norm_queries_keys(queries: int, keys: int, values: int) -> None:
    rng = np.random.default_rng(8)
    qkv = rng.standard_normal((5, queries + keys + values)).astype(np.float32)
    bias = rng.standard_normal((qkv.shape[1],)).astype(np.float32)
    q_norm, k_norm = (rng.standard_normal((size,)).astype(np.float32) for size in (queries, keys))
    before, split = qkv.copy(), np.split(qkv + bias, [queries, queries + keys], axis=1)
    expected = [reference.rms_norm(split[0], q_norm, 1e-6), reference.rms_norm(split[1], k_norm, 1e-6), split[2]]
    norm_queries_keys(qkv, bias, q_norm, k_norm, 1e-6, 0, 4)
    assert np.abs(qkv[:4] - np.concatenate(expected, axis=1)[:4]).max() < 1e-5
    assert np.array_equal(qkv[4], before[4])


@pytest.mark.parametrize("width", [1, 31, 64, 77])
def test_norm_rows(width: int) -> None:
    rng = np.random.default_rng(9)
    values, weight = rng.standard_normal((5, width)).astype(np.float32), rng.standard_normal(width).astype(np.float32)
    before = values.copy()
    norm_rows(values, weight, 1e-5, 1, 4)
    assert np.abs(values[1:4] - reference.rms_norm(before[1:4], weight, 1e-5)).max() < 1e-5
    assert np.array_equal(values[[0, 4]], before[[0, 4]])


@pytest.mark.parametrize("activation", GATES)
def test_gate(activation: str) -> None:
    twin = {"silu": reference.gate, "gelu_tanh": reference.gelu_gate, "relu2": reference.relu2_gate}[activation]
    rng = np.random.default_rng(3)
    gate_up = (rng.standard_normal((3, 74)) * 20).astype(np.float32)
    gate_up[0, :6] = [-1000, 1000, -88, 88, 0, -86.9]
    bias = rng.standard_normal(74).astype(np.float32)
    result = np.zeros((3, 37), np.float32)
    GATES[activation](gate_up, bias, 0, 3, result)
    assert np.allclose(result, twin(gate_up, bias), rtol=1e-5, atol=1e-6)
    gate_up[1, 3] = np.nan  # which no activation may hide
    GATES[activation](gate_up, bias, 0, 3, result)
    assert np.isnan(result[1, 3])


@pytest.mark.parametrize("kind", [FLOAT32, FLOAT16])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("rotated", "in_pairs"), [(24, False), (18, False), (0, False), (24, True), (18, True)])
def test_place(kind: np.dtype[Any], normalise: bool, rotated: int, in_pairs: bool) -> None:
    rng = np.random.default_rng(4)
    tokens, heads, kv_heads, dim, first = 40, 4, 2, 24, 29
    qkv = rng.standard_normal((tokens, (heads + 2 * kv_heads) * dim)).astype(np.float32)
    bias = rng.standard_normal((qkv.shape[1],)).astype(np.float32)
    norms = rng.standard_normal((2, dim)).astype(np.float32)
    if not normalise:
        norms = np.zeros((2, 0), np.float32)
    scale = dim**-0.5 if rotated == dim else 0.3
    angles = rng.standard_normal((first + tokens, rotated // 2)).astype(np.float32)
    split = (qkv + bias).reshape(tokens, -1, dim)
    queries, keys, values = split[:, :heads], split[:, heads : heads + kv_heads], split[:, heads + kv_heads :]
    if normalise:
        queries, keys = reference.rms_norm(queries, norms[0], 1e-6), reference.rms_norm(keys, norms[1], 1e-6)
    cosines, sines = np.cos(angles), np.sin(angles)
    queries = reference.rotate(queries, cosines[first:], sines[first:], in_pairs) * np.float32(scale)
    keys = reference.rotate(keys, cosines[first:], sines[first:], in_pairs)

    before = np.zeros((first, kv_heads, dim), np.float32)
    stored_keys, stored_values = cached(before, kind, True), cached(before, kind, False)
    stored_keys = np.concatenate([stored_keys] * 3, axis=1)
    stored_values = np.concatenate([stored_values] * 3, axis=1)
    (PLACE_IN_PAIRS if in_pairs else PLACE)[kind](
        qkv, bias, *norms, 1e-6, scale, cosines, sines, first, heads, 0, tokens, stored_keys, stored_values
    )  # fmt: skip
    assert np.allclose(qkv.reshape(tokens, -1, dim)[:, :heads], queries, atol=1e-5)
    expected = cached(np.concatenate([before, keys]), kind, True), cached(np.concatenate([before, values]), kind, False)
    for found, wanted in zip((stored_keys, stored_values), expected, strict=True):
        if kind == FLOAT16:
            found, wanted = found.view(np.float16), wanted.view(np.float16)
        # One unit of float16, where a rounding in float32 tips the rounding to float16.
        tolerance = 1e-5 if kind == FLOAT32 else 4e-3
        assert np.allclose(found.astype(np.float32), wanted.astype(np.float32), atol=tolerance)


def test_float16_patterns_are_numpys() -> None:
    rng = np.random.default_rng(6)
    halves = np.arange(0, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    between = (halves[1:] + halves[:-1]) / 2
    near = np.nextafter(between, rng.choice(np.array([0, 1e9], np.float32), len(between)))
    values = np.concatenate([halves, between, near, np.array([65519, 65504.5], np.float32)])
    values = np.concatenate([values, -values, rng.standard_normal(-2 * len(values) % 64).astype(np.float32)])
    qkv = np.zeros((len(values) // 32, 4 * 32), np.float32)
    qkv[:, 96:] = values.reshape(-1, 32)
    n = len(qkv)
    keys, values_out = np.zeros((1, -(-n // 32), 32, 32), np.uint16), np.zeros((1, -(-n // 32) * 32, 32), np.uint16)
    none, bias = np.zeros(0, np.float32), np.zeros(128, np.float32)
    cosines, sines = np.ones((n, 16), np.float32), np.zeros((n, 16), np.float32)
    PLACE[FLOAT16](qkv, bias, none, none, 1e-6, 1.0, cosines, sines, 0, 2, 0, n, keys, values_out)
    expected = values.reshape(-1, 32).astype(np.float16)
    assert np.array_equal(values_out.view(np.float16)[0, :n], expected)


def test_float16_cache_holds_its_largest_number_instead_of_infinity() -> None:
    qkv = np.full((1, 6), [0, 0, 1e6, -1e6, 65520, -70000], np.float32)
    keys, values = np.zeros((1, 1, 2, 32), np.uint16), np.zeros((1, 32, 32), np.uint16)
    none, angles = np.zeros(0, np.float32), np.ones((1, 1), np.float32)
    PLACE[FLOAT16](qkv, np.zeros(6, np.float32), none, none, 1e-6, 1.0, angles, angles * 0, 0, 1, 0, 1, keys, values)
    assert keys.view(np.float16)[0, 0, :, 0].tolist() == [65504, -65504]
    assert values.view(np.float16)[0, 0, :2].tolist() == [65504, -65504]


CONFIG = parse(
    {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 10,
        "hidden_size": 48,
        "intermediate_size": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 100,
    }
)


@pytest.mark.parametrize("kind", ["float32", "float16"])
@pytest.mark.parametrize("capacity", [1, 32, 33, 100])
def test_cache_bytes_are_known_before_it_is_made(kind: Any, capacity: int) -> None:
    assert KvCache(CONFIG, capacity, kind).nbytes == cache_bytes(CONFIG, capacity, kind)


def test_the_rotation_table_is_as_long_as_what_is_used() -> None:
    long = replace(CONFIG, context=10_000_000)
    cache = KvCache(long, 10_000_000, "float16")
    assert sum(table.nbytes for table in cache.rotation(0)) == 0
    lengths = []
    for length in (1, 2, 512, 513, 5000, 5001):
        cache.reach(length)
        lengths.append(len(cache.rotation(0)[0]))
    assert lengths == [512, 512, 512, 1024, 5000, 10000]
    cosines, sines = rope.table(CONFIG.rope, CONFIG.head_dim, 10000)
    np.testing.assert_array_equal(cache.rotation(2), (cosines, sines))
    short = KvCache(CONFIG, 3)
    short.reach(3)
    assert len(short.rotation(0)[1]) == 3


def test_rotation_tables_stay_whole_where_memory_ends_while_they_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = KvCache(replace(CONFIG, ropes=(CONFIG.rope, replace(CONFIG.rope, theta=7.0), CONFIG.rope)), 100)
    calls, table = [], rope.table

    def fails_at_second(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise MemoryError
        return table(*arguments)

    monkeypatch.setattr(rope, "table", fails_at_second)
    with pytest.raises(MemoryError):
        cache.reach(3)
    cache.reach(3)
    np.testing.assert_array_equal(cache.rotation(0), table(CONFIG.rope, CONFIG.head_dim, 100))
    assert cache.places()[0, TEXT.index("cosines")] == cache.rotation(0)[0].ctypes.data


def test_a_cache_larger_than_the_memory_is_refused_with_its_size() -> None:
    endless = replace(CONFIG, context=1 << 52)
    with pytest.raises(PromptError, match=r"tokens need [\d,]+\.\d GB .* smaller --max-tokens"):
        KvCache(endless, 1 << 52)


def test_cache_refuses_more_than_the_model_has_learnt() -> None:
    with pytest.raises(PromptError, match=r"expected 1 to 100 tokens .* found 101"):
        KvCache(CONFIG, 101)


@pytest.mark.parametrize("kind", [FLOAT32, FLOAT16])
@pytest.mark.parametrize("window", [None, 1, 40, 100, 170])
def test_a_token_reads_the_same_whichever_tokens_share_its_block(kind: Any, window: int | None) -> None:
    rng = np.random.default_rng(0)
    queries, keys, values = (rng.standard_normal((300, heads, 16)).astype(np.float32) for heads in (4, 2, 2))
    whole = attend(queries, keys, values, 0, window, kind)
    for start, stop in ((0, 1), (1, 46), (150, 151), (151, 250), (250, 300)):
        part = attend(queries[start:stop], keys[:stop], values[:stop], start, window, kind)
        np.testing.assert_array_equal(part, whole[start:stop])
