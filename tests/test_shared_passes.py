"""Does a token get the same numbers whichever tokens of other texts share its pass over the weights?"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bincompress import compress
from bincompress.inference.load import load_decoder
from bincompress.model.cache import KvCache
from bincompress.model.checkpoint_source import load_checkpoint
from bincompress.model.decoder import Decoder
from bincompress.model.packed_linear import ActivationSettings
from cpu_kernels.parallel.workers import Workers
from tests.conftest import DEMO_MODEL
from tests.test_declarations import write

TEXTS = [list(np.random.default_rng(seed).integers(2, 96, size)) for seed, size in enumerate((37, 5, 90, 1, 64))]


def alone(decoder: Decoder, text: list[int], kind: Any) -> Any:
    """Return the logits after all but the last token, and after the last, which is run by itself."""
    cache = decoder.new_cache(128, kind)
    rows = [decoder.next_logits(text[:-1], cache)] if len(text) > 1 else []
    return np.stack([*rows, decoder.next_logits(text[-1:], cache)])


def together(decoder: Decoder, kind: Any, most: int, seed: int) -> list[Any]:
    """Return the same of every text, all of them run together in pieces of random sizes, at most `most` a pass."""
    random = np.random.default_rng(seed)
    caches: list[KvCache] = [decoder.new_cache(128, kind) for _ in TEXTS]
    found: list[list[Any]] = [[] for _ in TEXTS]
    while any(cache.length < len(text) for cache, text in zip(caches, TEXTS, strict=True)):
        room, given, owners = most, [], []
        for number in random.permutation(len(TEXTS)):
            cache, text = caches[number], TEXTS[number]
            size = int(min(random.integers(0, 1 + max(1, most // 2)), room, len(text) - cache.length))
            if size:
                given.append((text[cache.length : cache.length + size], cache))
                owners += [(number, cache.length + place + 1) for place in range(size)]
                room -= size
        if given:
            states = decoder.states_of_all(given)
            wanted = [row for row, (number, seen) in enumerate(owners) if seen > len(TEXTS[number]) - 2]
            # As the scheduler does it: the head reads all states that are wanted at once.
            for row, logits in zip(wanted, decoder.logits_of(states[wanted]) if wanted else [], strict=True):
                found[owners[row][0]].append(logits)
    return [np.stack(rows) for rows in found]


def check(decoder: Decoder, kind: Any = "float16") -> None:
    for seed in range(2):
        for text, rows in zip(TEXTS, together(decoder, kind, 40, seed), strict=True):
            np.testing.assert_array_equal(rows, alone(decoder, text, kind))


def check_next(decoder: Decoder, kind: Any, texts: tuple[int, ...] = (0, 1, 2, 4)) -> None:
    """Compare passes of one token of each text, whose attention is one job, with each text run alone."""
    given = [(TEXTS[number], decoder.new_cache(128, kind), decoder.new_cache(128, kind)) for number in texts]
    for text, *caches in given:
        for cache in caches:
            decoder.states(text[:-3], cache)
    for place in (-3, -2, -1):
        found = decoder.states_of_all([(text[place:][:1], cache) for text, cache, _ in given])
        assert decoder._steps._all_next == (len(texts) > 1)
        single = [decoder.states(text[place:][:1], cache) for text, _, cache in given]
        np.testing.assert_array_equal(found, np.concatenate(single))
    for _, one, other in given:
        for mine, theirs in zip((*one.keys, *one.values), (*other.keys, *other.values), strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.fixture(scope="module")
def stores(demo_store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("stores")
    made: dict[str, dict[str, Any]] = {
        "kept": {"keep": ["*.1.mlp.down_proj*"]},
        "4bit": {"embeddings": "4bit"},
    }
    for name, settings in made.items():
        compress(str(DEMO_MODEL), str(folder / name), groups=4, block=64, **settings)
    return {"packed": str(demo_store), **{name: str(folder / name) for name in made}}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["packed", "4bit"])
def test_packed_matrices(stores: dict[str, str], name: str, threads: int) -> None:
    decoder = load_decoder(stores[name], threads, ActivationSettings()).decoder
    assert decoder.tokens_alike is None
    check(decoder)
    for kind in ("float16", "int8") if name == "packed" else ("float16",):
        check_next(decoder, kind)
    check_next(decoder, "float16", (2,))


@pytest.mark.slow
def test_six_bits_and_population_counts(stores: dict[str, str]) -> None:
    check(load_decoder(stores["packed"], 1, ActivationSettings(6, "token"), "popcount").decoder)


def test_a_store_with_a_kept_matrix_says_how_many_tokens_are_alike(stores: dict[str, str]) -> None:
    decoder = load_decoder(stores["kept"], 2, ActivationSettings()).decoder
    assert decoder.tokens_alike == 16
    states = decoder.states_of_all([(TEXTS[0][:9], decoder.new_cache(64)), (TEXTS[1], decoder.new_cache(64))])
    np.testing.assert_array_equal(states[9:], decoder.states(TEXTS[1], decoder.new_cache(64)))


def test_float32_activations(stores: dict[str, str]) -> None:
    decoder = load_decoder(stores["packed"], 1, ActivationSettings(16)).decoder
    assert decoder.tokens_alike == 16


@pytest.mark.parametrize(
    "architecture",
    [
        "MistralForCausalLM",
        "Gemma3ForCausalLM",
        "Olmo2ForCausalLM",
        "Qwen3MoeForCausalLM",
        "BitNetForCausalLM",
    ],
)
def test_windows_norms_and_kept_matrices(architecture: str, tmp_path: Path) -> None:
    """In passes of at most 16 tokens, unpacked matrices too give each token what it gets in any other such pass."""
    decoder = load_checkpoint(write(tmp_path / "model", architecture), Workers(1))
    assert decoder.tokens_alike == 16
    first, second = together(decoder, "float32", 16, 1), together(decoder, "float32", 16, 2)
    for rows, others in zip(first, second, strict=True):
        np.testing.assert_array_equal(rows, others)
    check_next(decoder, "float32")


@pytest.mark.parametrize("architecture", ["Qwen3MoeForCausalLM", "MixtralForCausalLM"])
def test_packed_experts(architecture: str, tmp_path: Path) -> None:
    """A token alone is multiplied with all of its experts at once, several tokens expert by expert."""
    compress(write(tmp_path / "model", architecture), str(tmp_path / "store"), groups=4, block=64)
    decoder = load_decoder(str(tmp_path / "store"), 2, ActivationSettings()).decoder
    assert decoder.tokens_alike == 16  # of the router
    first, second = together(decoder, "float16", 16, 1), together(decoder, "float16", 16, 2)
    for text, rows, others in zip(TEXTS, first, second, strict=True):
        np.testing.assert_array_equal(rows, others)
        if len(text) <= 16:
            np.testing.assert_array_equal(rows[-1], alone(decoder, text, "float16")[-1])


def test_a_window_reads_the_same_whatever_the_block(tmp_path: Path, run: Any) -> None:
    model = write(tmp_path / "model", "MistralForCausalLM")
    assert run("compress", model, tmp_path / "store", "--groups", 4, "--block", 64)[0] == 0
    check(load_decoder(str(tmp_path / "store"), 1, ActivationSettings()).decoder)


def test_caches_of_two_types_are_refused(demo_store: Path) -> None:
    decoder = load_decoder(str(demo_store), 1, ActivationSettings()).decoder
    with pytest.raises(ValueError, match="caches of one type"):
        decoder.states_of_all([([5], decoder.new_cache(8, kind)) for kind in ("float16", "int8")])
