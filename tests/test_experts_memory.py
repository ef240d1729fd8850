"""Experts that are read as they are chosen: the same numbers, within a bound of memory, which is given back."""

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bincompress
from bincompress.errors import BincompressError, DamagedError
from bincompress.inference import load as loading
from bincompress.inference.load import load_decoder
from bincompress.model.decoder import Decoder
from bincompress.model.packed_linear import ActivationSettings
from bincompress.model.residents import ColdPairs, Residents
from bincompress.model.store_source import store_config
from bincompress.store.store import open_store
from tests.conftest import Run
from tests.test_declarations import write

KINDS = ("Qwen3MoeForCausalLM", "MixtralForCausalLM")
PAIRS = {"Qwen3MoeForCausalLM": 5, "MixtralForCausalLM": 6}  # experts of all layers


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path, run: Run) -> str:
    assert run("compress", write(tmp_path / "model", request.param), tmp_path / "store")[0] == 0
    return str(tmp_path / "store")


def sizes(url: str) -> tuple[int, int]:
    """Return the bytes that all takes, and those of an expert."""
    opened = open_store(url)
    config = store_config(opened, opened.read_assets())
    names = loading._expert_names(config)
    first = next(iter(names.values()))
    return loading._needed(opened, config), sum(
        loading._stored_bytes(opened, name) for name, place in names.items() if place == first
    )


def test_the_numbers_are_those_of_a_model_in_memory(store: str) -> None:
    everything, expert = sizes(store)
    ids = np.random.default_rng(4).integers(0, 96, 40)
    whole = load_decoder(store, 1, ActivationSettings(8)).decoder
    # Room for as many experts as are used at a time, and no more.
    bounded = load_decoder(store, 1, ActivationSettings(8), memory=everything - 2 * expert).decoder
    residents = bounded.residents
    assert whole.residents is None
    assert residents is not None
    assert np.array_equal(whole.logits(ids, whole.new_cache(40)), bounded.logits(ids, bounded.new_cache(40)))
    caches = whole.new_cache(40), bounded.new_cache(40)
    for token in ids:
        ours, theirs = (d.next_logits([token], c) for d, c in zip((bounded, whole), reversed(caches), strict=True))
        assert np.array_equal(ours, theirs)
        assert residents.used <= residents.limit
    assert 0 < len(residents) < PAIRS[whole.config.architecture]
    assert len(residents) < residents.read <= residents.asked  # some were read again


def test_several_threads_read_experts(store: str) -> None:
    everything, expert = sizes(store)
    ids = np.random.default_rng(5).integers(0, 96, 30)
    whole = load_decoder(store, 1, ActivationSettings(8)).decoder
    try:
        bounded = load_decoder(store, 2, ActivationSettings(8), memory=everything - expert).decoder
    except loading.TooLittleMemoryError:
        pytest.skip("Mixtral's two threads and two experts are all but all there are")
    with bounded.workers:
        assert np.array_equal(whole.logits(ids, whole.new_cache(30)), bounded.logits(ids, bounded.new_cache(30)))
        caches = whole.new_cache(30), bounded.new_cache(30)
        for token in ids:
            assert np.array_equal(whole.next_logits([token], caches[0]), bounded.next_logits([token], caches[1]))


def test_an_expert_that_is_dropped_gives_its_memory_back(store: str) -> None:
    everything, expert = sizes(store)
    decoder = load_decoder(store, 1, ActivationSettings(8), memory=everything - 2 * expert).decoder
    layer = decoder.layers[-1].experts
    assert layer is not None
    assert isinstance(layer.pairs, ColdPairs)
    streams: list[Any] = []
    for number in range(layer.count):
        streams.append(weakref.ref(layer.pairs[number][0].matrix.stream.base))  # type: ignore[attr-defined]
    write_tokens(decoder, 30)  # through the other layers, too
    gc.collect()
    held = sum(stream() is not None for stream in streams)
    assert held < layer.count


def test_an_expert_that_is_damaged_meanwhile_is_named(store: str) -> None:
    everything, expert = sizes(store)
    decoder = load_decoder(store, 1, ActivationSettings(8), memory=everything - 2 * expert).decoder
    for planes in Path(store).glob("tensors/*.experts.*/planes/c/0/0/0"):
        content = bytearray(planes.read_bytes())
        content[len(content) // 2] ^= 1
        planes.unlink()  # what is mapped stays as it was
        planes.write_bytes(content)
    with pytest.raises(DamagedError, match=r"experts\.\d\..*: planes: its bytes are not those that were written"):
        write_tokens(decoder, 96)


def write_tokens(decoder: Decoder, count: int) -> None:
    for token in range(count):
        decoder.next_logits([token], decoder.new_cache(1))


def test_the_last_used_stay() -> None:
    dropped: list[int] = []
    residents = Residents(100)
    for number in range(4):
        residents.hold(0, number, 30, lambda number=number: dropped.append(number))  # type: ignore[misc]
    assert dropped == [0]
    residents.use(0, 1)
    residents.hold(1, 1, 50, lambda: dropped.append(99))
    assert dropped == [0, 2, 3]
    assert (residents.used, len(residents)) == (80, 2)
    residents.hold(2, 0, 500, lambda: dropped.append(98))  # more than the limit: the one that is used has to be there
    assert dropped == [0, 2, 3, 1, 99]
    assert len(residents) == 1


def test_too_little_memory_is_refused_by_name(store: str, run: Run) -> None:
    everything, expert = sizes(store)
    for given in (
        everything // 2,
        everything - (PAIRS[open_store(store).attributes["config"]["architectures"][0]]) * expert,
    ):
        code, _, errors = run("generate", store, "t5", "--max-tokens", 2, "--memory", given)
        assert code == 2
        assert "is too little: without its experts the model needs about" in errors
        assert len(errors.strip().splitlines()) == 1
    assert run("generate", store, "t5", "--max-tokens", 2, "--memory", "4GB")[0] == 0
    assert run("generate", store, "t5", "--max-tokens", 2, "--memory", "much")[0] == 2


def test_commands_and_python_take_the_bound(store: str, run: Run, tmp_path: Path) -> None:
    everything, expert = sizes(store)
    memory = everything - 2 * expert
    (tmp_path / "text").write_text(" ".join(f"t{i % 90}" for i in range(100)))
    found = run("evaluate", store, "--text", tmp_path / "text", "--context", 20, "--memory", memory, "--threads", 1)
    assert found[0] == 0
    assert found[1] == run("evaluate", store, "--text", tmp_path / "text", "--context", 20, "--threads", 1)[1]
    output = run("bench", store, "--prompt", 8, "--tokens", 4, "--repeats", 1, "--memory", memory, "--threads", 1)[1]
    assert "experts in memory: " in output
    assert "of those that were chosen had to be read first" in output
    model = bincompress.load(store, threads=1, memory=memory)
    assert model.decoder.residents is not None
    assert "".join(model.stream("t5 t6")) == "".join(bincompress.load(store, threads=1).stream("t5 t6"))


def test_a_model_without_experts_fits_or_is_refused(tiny_model: Path, run: Run, tmp_path: Path) -> None:
    run("compress", tiny_model, tmp_path / "store")
    assert bincompress.load(str(tmp_path / "store"), memory=1 << 30).decoder.residents is None
    with pytest.raises(BincompressError, match=r"--memory 100 MB is too little: the model needs about \d+ MB$"):
        bincompress.load(str(tmp_path / "store"), memory=100_000_000)
    with pytest.raises(BincompressError, match=r"--memory 100 KB is too little: the model needs about \d+ MB$"):
        bincompress.load(str(tmp_path / "store"), memory=100_000)
