"""Keys and values of 8 bits: the kernels against their twins, and the models that run with them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bincompress.inference.load import load, load_decoder
from bincompress.model.cache import KvCache, cache_bytes, cache_type
from bincompress.model.errors import PromptError
from bincompress.model.kv_factors import key_factors
from bincompress.model.packed_linear import ActivationSettings
from cpu_kernels.decoder.attention import ATTEND, BLOCK, NO_WINDOW, padded, scratch_size, work_items
from cpu_kernels.decoder.norms import PLACE
from cpu_kernels.decoder.quantized_cache import SCALE_ROWS, set_factors
from cpu_kernels.reference import attention as reference
from tests.conftest import DEMO_MODEL, Run

INT8 = np.dtype(np.int8)
HEADS, KV_HEADS, DIM, TOKENS, FIRST = 6, 2, 24, 70, 29
POSITIONS = FIRST + TOKENS
BLOCKS = -(-POSITIONS // BLOCK)


@pytest.fixture(scope="module")
def placed() -> dict[str, Any]:
    """A cache that the kernel has filled, with what was given to it; angles are zero, so keys are what was given."""
    random = np.random.default_rng(1)
    keys = np.zeros((KV_HEADS, BLOCKS + 1, DIM + SCALE_ROWS, BLOCK), np.int8)
    values = np.zeros((KV_HEADS, BLOCKS * BLOCK, padded(DIM)), np.int8)
    factors = random.uniform(1, 9, (KV_HEADS, DIM)).astype(np.float32)
    set_factors(keys, factors)
    qkv = random.standard_normal((POSITIONS, (HEADS + 2 * KV_HEADS) * DIM)).astype(np.float32)
    qkv[3] = 0
    split = qkv.reshape(POSITIONS, -1, DIM).copy()
    none, one = np.zeros(0, np.float32), np.ones((POSITIONS, DIM // 2), np.float32)
    bias = np.zeros(qkv.shape[1], np.float32)
    for start, stop in ((0, 11), (11, POSITIONS)):
        PLACE[INT8](qkv, bias, none, none, 1e-6, 0.5, one, 0 * one, 0, HEADS, start, stop, keys, values)
    return {"keys": keys, "values": values, "factors": factors, "qkv": qkv, "given": split}


def test_keys_and_values_are_rounded_as_their_twin_says(placed: dict[str, Any]) -> None:
    given, keys, values = placed["given"], placed["keys"], placed["values"]
    own = given[:, HEADS : HEADS + KV_HEADS] / placed["factors"]
    expected_keys, key_scales = reference.quantize_rows(own)
    expected_values, value_scales = reference.quantize_rows(given[:, HEADS + KV_HEADS :])
    stored = keys[:, :-1, :DIM].transpose(1, 3, 0, 2).reshape(-1, KV_HEADS, DIM)[:POSITIONS]
    np.testing.assert_array_equal(stored, expected_keys)
    np.testing.assert_array_equal(values[:, :POSITIONS, :DIM].transpose(1, 0, 2), expected_values)
    scales = keys[:, :-1, DIM:].reshape(KV_HEADS, BLOCKS, 2, 4 * BLOCK).view(np.float32)
    np.testing.assert_array_equal(scales[:, :, 0].reshape(KV_HEADS, -1).T[:POSITIONS], key_scales)
    np.testing.assert_array_equal(scales[:, :, 1].reshape(KV_HEADS, -1).T[:POSITIONS], value_scales)
    queries = placed["qkv"].reshape(POSITIONS, -1, DIM)[:, :HEADS]
    group = np.repeat(placed["factors"], HEADS // KV_HEADS, axis=0)
    np.testing.assert_array_equal(queries, given[:, :HEADS] * np.float32(0.5) * group)


@pytest.mark.parametrize("window", [None, 40])
def test_attention_is_near_its_twin_on_what_was_rounded(placed: dict[str, Any], window: int | None) -> None:
    given, factors = placed["given"], placed["factors"]
    codes, scales = reference.quantize_rows(given[:, HEADS : HEADS + KV_HEADS] / factors)
    keys = codes * scales[..., None] * factors
    codes, scales = reference.quantize_rows(given[:, HEADS + KV_HEADS :])
    expected = reference.attend(given[FIRST:, :HEADS] * np.float32(0.5), keys, codes * scales[..., None], FIRST, window)
    result = np.full((TOKENS, HEADS * DIM), np.nan, np.float32)
    scratch = np.full(scratch_size(DIM), np.nan, np.float32)
    items = work_items(TOKENS, HEADS, KV_HEADS)
    for start in range(items):
        ATTEND[INT8](
            placed["qkv"][FIRST:], HEADS, placed["keys"], placed["values"], FIRST, window or NO_WINDOW,
            start, start + 1, scratch, result,
        )  # fmt: skip
    np.testing.assert_allclose(result.reshape(expected.shape), expected, atol=2e-5)


@pytest.fixture(scope="module")
def store(chat_store: Path) -> Path:
    return chat_store


def test_a_model_says_nearly_the_same_with_half_the_memory(store: Path) -> None:
    decoder = load_decoder(str(store), 1, ActivationSettings(16)).decoder
    ids = np.arange(90) * 7 % decoder.config.vocab
    caches = {kind: decoder.new_cache(96, kind) for kind in ("float16", "int8")}
    exact = decoder.logits(ids, decoder.new_cache(96))
    found = {kind: decoder.logits(ids, cache) for kind, cache in caches.items()}
    assert 0 < np.abs(found["int8"] - exact).max() < 0.02 * np.abs(exact).max()
    size = [cache_bytes(decoder.config, 4096, kind) for kind in ("float16", "int8")]
    assert size[1] < 0.6 * size[0]
    # What was computed of a text's beginning is gone on with, in one piece or in several, and in a copy.
    whole = found["int8"][-1]
    parts, other = decoder.new_cache(96, "int8"), decoder.new_cache(96, "int8")
    decoder.logits(ids[:50], parts)
    other.copy_from(parts, 47)
    for cache, begin in ((parts, 50), (other, 47)):
        np.testing.assert_array_equal(decoder.logits(ids[begin:], cache)[-1], whole)


def test_factors_are_those_of_the_bias_and_leave_products_as_they_are(store: Path) -> None:
    decoder = load_decoder(str(store), 1, ActivationSettings(16)).decoder
    config, layer = decoder.config, decoder.layers[0]
    heads, dim = config.kv_heads, config.head_dim
    bias = np.zeros_like(layer.qkv_bias)
    assert (key_factors(config, layer, 0) == 1).all()
    bias[config.heads * dim] = 60  # column 0 of the first key head, which turns with column dim / 2
    factors = key_factors(config, replace(layer, qkv_bias=bias), 0)
    assert factors.shape == (heads, dim)
    assert factors[0, 0] == factors[0, dim // 2] == 65
    assert (np.delete(factors, [0, dim // 2], axis=1) == 5).all()
    # With such a bias every key has one large column: without factors the others are rounded away.
    ids = np.arange(40) * 7 % config.vocab
    decoder.layers[0] = replace(layer, qkv_bias=bias)
    exact = decoder.logits(ids, decoder.new_cache(40))
    with_factors = np.abs(decoder.logits(ids, decoder.new_cache(40, "int8")) - exact).max()
    without = np.abs(decoder.logits(ids, KvCache(config, 40, "int8")) - exact).max()
    assert with_factors < 0.7 * without


def test_commands_take_the_bits_and_tell_their_files_apart(store: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "text").write_text("The scheduler decides which process runs next. " * 6)
    told = [run("evaluate", store, "--text", tmp_path / "text", *more) for more in ((), ("--kv-bits", "8"))]
    assert [code for code, _, _ in told] == [0, 0]
    assert "activations 8 bits per segment, keys and values 8 bits" in told[1][1]
    assert told[0][1].splitlines()[0] != told[1][1].splitlines()[0]
    generate = ("generate", store, "ab", "--max-tokens", "3", "--temperature", "0", "--prompt-cache", tmp_path / "kept")
    assert run(*generate, "--kv-bits", "8")[0] == 0
    assert run(*generate, "--kv-bits", "8")[0] == 0
    code, _, errors = run(*generate)
    assert (code, "was made with another store, other activation settings" in errors) == (2, True)
    assert run("bench", store, "--prompt", "4", "--tokens", "2", "--repeats", "1", "--kv-bits", "8")[0] == 0
    code, _, errors = run("evaluate", DEMO_MODEL, "--text", tmp_path / "text", "--kv-bits", "8")
    assert (code, "--kv-bits is for a store" in errors) == (2, True)


def test_other_numbers_of_bits_are_refused(store: Path) -> None:
    assert cache_type(16) == "float16"
    with pytest.raises(PromptError, match="kv bits: expected 16 or 8, found 5"):
        load(str(store), kv_bits=5)
