"""Kernels of newer architectures against their NumPy twins: gates, sinks, states, and the choice by logits."""

from typing import Any

import numpy as np
import pytest

from cpu_kernels.decoder.attention import ATTEND_WITH_SINKS, NO_WINDOW, scratch_size, work_items
from cpu_kernels.decoder.gates import clamped_gate, gate_by_sigmoid
from cpu_kernels.decoder.recurrence import convolve, delta_rule, norm_and_gate
from cpu_kernels.decoder.routing import choose_by_logits, choose_by_sigmoid
from cpu_kernels.reference import attention as reference
from cpu_kernels.reference import gates as reference_gates
from cpu_kernels.reference import recurrence as reference_recurrence
from cpu_kernels.reference.routing import choose_by_logits as choose_plainly
from cpu_kernels.reference.routing import choose_by_sigmoid as choose_by_sigmoid_plainly
from tests.test_attention import FLOAT16, FLOAT32, cached


@pytest.mark.parametrize(("tokens", "first", "window"), [(1, 0, None), (1, 200, 33), (70, 130, None), (45, 9, 20)])
def test_attention_with_sinks_equals_its_twin(tokens: int, first: int, window: int | None) -> None:
    rng = np.random.default_rng(tokens)
    heads, kv_heads, dim = 6, 2, 24
    queries = rng.standard_normal((tokens, heads, dim)).astype(np.float32)
    keys, values = rng.standard_normal((2, first + tokens, kv_heads, dim)).astype(np.float32)
    sinks = np.array([-200, -3, 0, 2, 9, 300], np.float32)  # from none to nothing but the sink
    qkv = np.concatenate([queries.reshape(tokens, -1), np.empty((tokens, 2 * kv_heads * dim), np.float32)], axis=1)
    result = np.full((tokens, heads * dim), np.nan, np.float32)
    scratch = np.concatenate([np.full(scratch_size(dim), np.nan, np.float32), sinks])
    stored = cached(keys, FLOAT32, True), cached(values, FLOAT32, False)
    items = work_items(tokens, heads, kv_heads)
    ATTEND_WITH_SINKS[FLOAT32](qkv, heads, *stored, first, window or NO_WINDOW, 0, items, scratch, result)
    expected = reference.attend(queries, keys, values, first, window, sinks)
    assert np.abs(result.reshape(expected.shape) - expected).max() < 2e-5
    assert np.abs(expected[:, 5]).max() < 1e-30 < np.abs(expected[:, 0]).max()
    halves = keys.astype(np.float16).astype(np.float32), values.astype(np.float16).astype(np.float32)
    stored = cached(halves[0], FLOAT16, True), cached(halves[1], FLOAT16, False)
    ATTEND_WITH_SINKS[FLOAT16](qkv, heads, *stored, first, window or NO_WINDOW, 0, items, scratch, result)
    expected = reference.attend(queries, *halves, first, window, sinks)
    assert np.abs(result.reshape(expected.shape) - expected).max() < 2e-5


@pytest.mark.parametrize("inner", [1, 7, 33])
def test_clamped_gate_equals_its_twin(inner: int) -> None:
    gate_up = (np.random.default_rng(inner).standard_normal((5, 2 * inner)) * 9).astype(np.float32)
    result = np.full((5, inner), np.nan, np.float32)
    clamped_gate(gate_up, 1.7, 7.0, 0, 2, result)
    clamped_gate(gate_up, 1.7, 7.0, 2, 5, result)
    expected = reference_gates.clamped_gate(gate_up, 1.7, 7.0)
    assert np.abs(result - expected).max() < 1e-5 * np.abs(expected).max()
    clamped_gate(np.full((1, 2), np.nan, np.float32), 1.7, 7.0, 0, 1, result[:1, :1].copy())


@pytest.mark.parametrize(("experts", "count"), [(1, 1), (8, 2), (32, 4), (300, 4)])
def test_the_largest_logits_are_chosen(experts: int, count: int) -> None:
    logits = np.random.default_rng(experts).standard_normal((50, experts)).astype(np.float32) * 30
    logits[:3] = -np.abs(logits[:3])
    chosen, weights = np.zeros((50, count), np.int64), np.zeros((50, count), np.float32)
    choose_by_logits(logits, 0, 20, chosen, weights)
    choose_by_logits(logits, 20, 50, chosen, weights)
    expected, shares = choose_plainly(logits, count)
    assert np.array_equal(chosen, expected)
    assert np.abs(weights - shares).max() < 1e-6


@pytest.mark.parametrize(("experts", "count", "normalized"), [(1, 1, 1), (32, 4, 1), (60, 7, 0)])
def test_the_largest_sigmoids_with_their_offsets_are_chosen(experts: int, count: int, normalized: int) -> None:
    rng = np.random.default_rng(experts)
    logits = rng.standard_normal((40, experts)).astype(np.float32)
    offsets = (rng.standard_normal(experts) - 1).astype(np.float32)  # some are below zero
    chosen, weights = np.zeros((40, count), np.int64), np.zeros((40, count), np.float32)
    choose_by_sigmoid(logits, offsets, normalized, 1e-6, 2.5, 0, 11, chosen, weights)
    choose_by_sigmoid(logits, offsets, normalized, 1e-6, 2.5, 11, 40, chosen, weights)
    expected, shares = choose_by_sigmoid_plainly(logits, offsets, count, bool(normalized), 1e-6, 2.5)
    assert np.array_equal(chosen, expected)
    assert np.abs(weights - shares).max() < 1e-5


def test_a_choice_among_logits_that_are_not_finite_stays_within_bounds() -> None:
    for value in (np.nan, np.inf, -np.inf):
        logits: Any = np.full((4, 16), value, np.float32)
        logits[1:3, ::2] = np.arange(8)
        chosen, weights = np.full((4, 3), -1, np.int64), np.empty((4, 3), np.float32)
        choose_by_logits(logits, 0, 4, chosen, weights)
        assert ((chosen >= 0) & (chosen < 16)).all()
        assert (np.diff(chosen, axis=1) > 0).all()


@pytest.mark.parametrize(("tokens", "width", "silu"), [(1, 4, 1), (2, 4, 0), (9, 3, 1), (5, 1, 0)])
def test_a_convolution_equals_its_twin_in_any_number_of_parts(tokens: int, width: int, silu: int) -> None:
    rng = np.random.default_rng(tokens)
    channels = 35
    inputs, before = (rng.standard_normal((n, channels + 7)).astype(np.float32) for n in (tokens, width - 1))
    before = np.ascontiguousarray(before[:, :channels])
    weight, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((width, channels), channels))
    expected, last = reference_recurrence.convolve(inputs[:, 5 : 5 + channels], before, weight, bias, bool(silu))
    result, after = np.full((tokens, channels), np.nan, np.float32), np.full_like(before, np.nan)
    for start, stop in ((0, 20), (20, channels)):
        convolve(inputs, 5, before, weight, bias, silu, start, stop, after, result)
    assert np.abs(result - expected).max() < 1e-5
    assert np.array_equal(after, last)
    cut = tokens // 2
    if cut:
        between, again = np.empty_like(before), np.empty_like(after)
        parts = np.empty_like(result)
        convolve(inputs[:cut], 5, before, weight, bias, silu, 0, channels, between, parts[:cut])
        convolve(inputs[cut:], 5, between, weight, bias, silu, 0, channels, again, parts[cut:])
        assert np.array_equal(parts, result)
        assert np.array_equal(again, after)


@pytest.mark.parametrize(("tokens", "key_heads", "each"), [(1, 2, 3), (11, 1, 1), (6, 3, 2)])
def test_the_delta_rule_equals_its_twin_in_any_number_of_parts(tokens: int, key_heads: int, each: int) -> None:
    rng = np.random.default_rng(tokens)
    heads, key_dim, value_dim = key_heads * each, 13, 21
    sizes = ((tokens, key_heads, key_dim), (tokens, key_heads, key_dim), (tokens, heads, value_dim), (tokens, 2, heads))
    queries, keys, values, gates = (rng.standard_normal(size).astype(np.float32) for size in sizes)
    gates[0, 1, 0] = 25  # past the bound of PyTorch's softplus
    rates, offsets = (rng.random(heads).astype(np.float32) for _ in range(2))
    state = rng.standard_normal((heads, key_dim, value_dim)).astype(np.float32)
    expected, last = reference_recurrence.delta_rule(queries, keys, values, gates, rates, offsets, state)
    mixed = np.concatenate([part.reshape(tokens, -1) for part in (queries, keys, values)], axis=1)
    scratch = np.full(2 * key_dim + 3 * value_dim, np.nan, np.float32)

    def run(rows: slice, before: Any, start: int, stop: int, after: Any, to: Any) -> None:
        flat = np.ascontiguousarray(gates[rows].reshape(-1, 2 * heads))
        delta_rule(mixed[rows], key_heads, flat, rates, offsets, before, start, stop, scratch, after, to)

    result, after = np.full((tokens, heads * value_dim), np.nan, np.float32), np.full_like(state, np.nan)
    run(slice(tokens), state, 0, 1, after, result)
    run(slice(tokens), state, 1, heads, after, result)
    assert np.abs(result - expected.reshape(tokens, -1)).max() < 1e-5 * np.abs(expected).max()
    assert np.abs(after - last).max() < 1e-5 * np.abs(last).max()
    cut = tokens // 2
    if cut:
        between, again, parts = np.empty_like(state), np.empty_like(state), np.empty_like(result)
        run(slice(cut), state, 0, heads, between, parts[:cut])
        run(slice(cut, tokens), between, 0, heads, again, parts[cut:])
        assert np.array_equal(parts, result)
        assert np.array_equal(again, after)


def test_gates_of_what_was_mixed_equal_their_twins() -> None:
    rng = np.random.default_rng(0)
    values, gates = rng.standard_normal((2, 7, 30)).astype(np.float32) * 40
    weight = rng.standard_normal(10).astype(np.float32)
    expected = values * reference_gates.sigmoid(gates)
    result = values.copy()
    gate_by_sigmoid(result, gates, 0, 3)
    gate_by_sigmoid(result, gates, 3, 7)
    assert np.abs(result - expected).max() < 1e-5 * np.abs(expected).max()
    wide = np.concatenate([np.full((7, 4), np.nan, np.float32), gates], axis=1)
    shaped = (7, 3, 10)
    expected = reference_recurrence.norm_and_gate(values.reshape(shaped), gates.reshape(shaped), weight, 1e-5)
    result = values.copy()
    norm_and_gate(result, wide, 4, weight, 1e-5, 0, 5)
    norm_and_gate(result, wide, 4, weight, 1e-5, 5, 7)
    assert np.abs(result.reshape(shaped) - expected).max() < 1e-5 * np.abs(expected).max()
