"""A product kernel that computes nonsense on this CPU is found before a model runs with it."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bincompress.inference.load import load_decoder
from bincompress.model.packed_linear import ActivationSettings
from cpu_kernels import self_test
from cpu_kernels.errors import KernelError
from cpu_kernels.jit import cpu_features, kernel_cache
from cpu_kernels.matmul import products
from cpu_kernels.matmul.prepacking import kernels
from tests.conftest import Run

IDS = np.arange(8)


@pytest.fixture
def store(letters_model: Path, tmp_path: Path, run: Run) -> str:
    assert run("compress", letters_model, tmp_path / "store")[0] == 0
    return str(tmp_path / "store")


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of their own for the results of self-tests; the compiled kernels stay where they are."""
    folder = tmp_path / "records"
    folder.mkdir()
    monkeypatch.setattr(self_test, "cache_folder", lambda: folder)
    monkeypatch.setattr(kernel_cache, "_said", set())
    return folder


def break_kernels(monkeypatch: pytest.MonkeyPatch, broken: Callable[[int], bool]) -> list[int]:
    """Let kernels of the instruction sets write nothing, which needs no compiling; returns the sets that ran."""
    module: Any = products
    whole: Any = module.product_kernel
    ran: list[int] = []

    def product_kernel(code: int, *shape: int) -> Any:
        kernel = whole(code, *shape)

        class Watched:
            name = kernel.name
            compile = kernel.compile

            def __call__(self, job: int, first: int, last: int) -> None:
                ran.append(code)
                if not broken(code):
                    kernel(job, first, last)

        return Watched()

    monkeypatch.setattr(products, "product_kernel", product_kernel)
    monkeypatch.setattr(cpu_features, "is_zen", lambda: False)  # where one token has a kernel of its own
    return ran


def logits(store: str, kernel: str | None = None) -> Any:
    decoder = load_decoder(store, 1, ActivationSettings(), kernel).decoder
    return decoder.next_logits(IDS, decoder.new_cache(16, "float32"))


@pytest.mark.skipif(len(kernels()) < 3, reason="this CPU has no two kernels that look up")
def test_a_broken_kernel_is_left_out_with_a_notice(
    store: str, records: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # The best kernel comes second here: it is compiled for other tests, too.
    best, second = cpu_features.shuffle_sets()[:2]
    monkeypatch.setattr(cpu_features, "shuffle_sets", lambda: [second, best])
    broken, following = kernels()[:2]
    expected = logits(store, following)
    ran = break_kernels(monkeypatch, lambda code: code == second)
    with caplog.at_level(logging.WARNING, "cpu_kernels"):
        np.testing.assert_array_equal(logits(store), expected)
    assert [record.message for record in caplog.records] == [
        f"the kernels {broken} give wrong products on this CPU: {following} is used, which is slower; please report "
        "it, with what `bincompress bench --verbose` prints"
    ]
    assert second in ran
    assert (records / f"self-test-{broken}-8").read_text() == "wrong"
    # The next load knows of it, and lays matrices out once.
    ran.clear()
    np.testing.assert_array_equal(logits(store), expected)
    assert second not in ran
    with pytest.raises(KernelError, match=f"kernel {broken}: gives wrong products on this CPU"):
        logits(store, broken)


@pytest.mark.parametrize("which", ["multiply", "TokenProduct"])
def test_one_wrong_number_is_found(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several tokens, or of one."""
    module: Any = self_test
    whole = getattr(module, which)

    def wrong(product: Any) -> Any:
        product[0, -1] += 1
        return product

    off = {
        "multiply": lambda *matrix: wrong(whole(*matrix)),
        "TokenProduct": lambda *matrix: lambda x: wrong(whole(*matrix)(x)),
    }
    assert self_test._right(kernels()[0], 8)
    monkeypatch.setattr(module, which, off[which])
    assert not self_test._right(kernels()[0], 8)


def test_where_every_kernel_is_wrong_no_model_runs(store: str, records: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_kernels(monkeypatch, lambda code: True)
    with pytest.raises(KernelError, match="no kernel gives right products on this CPU"):
        self_test.sound_kernel(None, 8)


def test_a_sound_kernel_is_tried_once_for_a_cache(
    store: str, records: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried: list[tuple[str, int]] = []
    whole = self_test._right

    def right(name: str, bits: int) -> bool:
        tried.append((name, bits))
        return whole(name, bits)

    monkeypatch.setattr(self_test, "_right", right)
    first = logits(store)
    np.testing.assert_array_equal(logits(store), first)
    assert tried == [(kernels()[0], 8)]
    assert not caplog.records


WORDS = {"neon": (1 << 1, 0), "dotprod": (1 << 20, 0), "sve": (1 << 22, 0), "i8mm": (0, 1 << 13), "bf16": (0, 1 << 14)}


@pytest.mark.parametrize("name", WORDS)
def test_features_of_arm_are_read_from_the_words_that_linux_gives(name: str) -> None:
    assert [one for one, there in cpu_features.features_of(*WORDS[name]).items() if there] == [name]


def test_features_of_an_arm_cpu_decide_where_it_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_features, "ARM", True)
    monkeypatch.setattr(cpu_features, "arm_features", lambda: {"neon": True, "dotprod": True, "i8mm": False})
    cpu_features._host_features.cache_clear()
    try:
        assert cpu_features.has("dotprod")
        assert not cpu_features.has("i8mm")
        assert not cpu_features.has("avx2")
        assert cpu_features.shuffle_sets() == [cpu_features.NEON]
    finally:
        cpu_features._host_features.cache_clear()
