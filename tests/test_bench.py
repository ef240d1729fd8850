"""`bincompress bench`: bytes a second, depth, formats, energy."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest

from bincompress.commands.benched import Bench
from bincompress.inference.benchmark import Speed, measure
from bincompress.inference.load import load_decoder
from bincompress.model.errors import PromptError
from bincompress.model.packed_linear import ActivationSettings
from bincompress.process.energy import EnergyMeter
from cpu_kernels.parallel.workers import Workers
from cpu_kernels.reading import read_bandwidth, sum_of_words
from tests.conftest import Run

SMALL = ("--prompt", 4, "--tokens", 2, "--repeats", 1, "--threads", 1)


def test_formats_say_the_same(chat_store: Path, run: Run) -> None:
    (whole,) = (json.loads(run("bench", chat_store, *SMALL, "--depth", 40, "--format", form)[1]) for form in ("json",))
    assert list(whole["tests"]) == ["pp4 @ d40", "tg2 @ d40"]
    prompt, writing = whole["tests"].values()
    assert prompt["weight_bytes_per_second"] is None
    assert writing["weight_bytes_per_second"] == pytest.approx(whole["bytes"] * writing["mean"])
    assert writing["share_of_bandwidth"] > writing["weight_bytes_per_second"] / whole["bandwidth"] > 0
    lines = [json.loads(line) for line in run("bench", chat_store, *SMALL, "--format", "jsonl")[1].splitlines()]
    rows = list(csv.DictReader(io.StringIO(run("bench", chat_store, *SMALL, "--format", "csv")[1])))
    for found in (lines, rows):
        assert [row["test"] for row in found] == ["pp4", "tg2"]
        assert set(found[0]) == {*whole, "test", *writing} - {"tests", "paths"}
    output = run("bench", chat_store, *SMALL)[1]
    assert "|     GB/s |  share |" in output
    assert "read bandwidth of this machine with 1 threads: " in output


def test_two_formats_are_refused(chat_store: Path, run: Run) -> None:
    code, out, errors = run("bench", chat_store, "--json", "--format", "csv")
    assert (code, out, "--format csv is given; leave out one of them" in errors) == (2, "", True)


def test_a_depth_past_the_context_is_refused(chat_store: Path, run: Run) -> None:
    code, _, errors = run("bench", chat_store, *SMALL, "--depth", 10_000_000)
    assert (code, "so that all fits the context of" in errors) == (2, True)


def test_the_cache_before_is_what_a_prompt_leaves(chat_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = load_decoder(str(chat_store), 1, ActivationSettings()).decoder
    lengths: list[int] = []
    whole = decoder.next_logits

    def next_logits(ids: object, cache: object) -> object:
        lengths.append(cache.length)  # type: ignore[attr-defined]
        return whole(ids, cache)  # type: ignore[arg-type]

    monkeypatch.setattr(decoder, "next_logits", next_logits)
    (found,) = measure(decoder, 0, 2, 1, depth=33)
    assert lengths == [0, 33, 34, 33, 34]
    config = decoder.config
    each = 2 * config.layers * config.kv_heads * 2 * config.head_dim  # bytes of a position, float16
    assert found.cache_bytes is not None
    assert 34 * each <= found.cache_bytes <= 65 * each  # in whole blocks
    with pytest.raises(PromptError, match="depth: expected at most"):
        measure(decoder, 1, 1, 1, depth=decoder.config.context)


def test_the_share_counts_weights_and_cache(chat_store: Path) -> None:
    loaded = load_decoder(str(chat_store), 1, ActivationSettings())
    speed = Speed("tg1", 100.0, 0.0, None, 1_000_000)
    bench = Bench("s", loaded, "", "float16", 1e9, [speed])
    assert bench.rate(speed) == 100 * loaded.nbytes
    assert bench.share(speed) == pytest.approx((100 * loaded.nbytes + 1e8) / 1e9)


def test_the_read_test_reads_every_word_once() -> None:
    words = np.random.default_rng(0).integers(0, 1 << 64, 1003, np.uint64)
    with np.errstate(over="ignore"):
        assert sum_of_words(words, 0, 1003) == words.sum(dtype=np.uint64)
        assert sum_of_words(words, 5, 700) == words[5:700].sum(dtype=np.uint64)
    with Workers(2) as workers:
        assert 1e6 < read_bandwidth(workers, 1 << 20, 2) < 1e13


def test_energy_is_read_where_it_is_counted(tmp_path: Path) -> None:
    assert EnergyMeter(tmp_path).joules() is None
    for name, begin in (("intel-rapl:0", 5_000_000), ("intel-rapl:1", 900), ("intel-rapl:0:0", 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{begin}\n")
        (tmp_path / name / "max_energy_range_uj").write_text("1000\n")
    meter = EnergyMeter(tmp_path)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("8000000\n")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("100\n")  # which began anew
    assert meter.joules() == pytest.approx(3.0002)
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert meter.joules() is None
