"""Do the streams that layers are trained on lie in files where memory is small, with the same result, and go away?"""

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bincompress import api
from bincompress.distillation import memory, streams
from bincompress.distillation.settings import DistillError, LayerSettings
from bincompress.distillation.streams import Streams
from bincompress.store.store import open_store

pytestmark = pytest.mark.slow  # PyTorch

CPU = torch.device("cpu")


class KilledError(Exception):
    """Stands for whatever ends a training."""


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: (100, "a test"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("".join(map(chr, np.random.default_rng(3).integers(33, 127, 900))))
    return tmp_path / "text.txt"


def hashes(store: Path) -> dict[str, Any]:
    opened = open_store(str(store))
    return {name: opened.complete_attributes(name)["hashes"] for name in opened.tensors()}


def test_streams_in_files_give_the_same_store(
    letters_model: Path, text: Path, tmp_path: Path, little_memory: None
) -> None:
    settings = LayerSettings(windows=12, context=16, passes=1)
    seen: list[bool] = []
    work = tmp_path / "work"

    def look(done: int, total: int, line: str) -> None:
        seen.append(len(list(work.rglob("stream-*.bin"))) == 3)

    api.train(letters_model, str(tmp_path / "files"), text, layers=settings, threads=1, work=work, on_layers=look)
    assert all(seen)
    assert not list(work.rglob("*")) if work.exists() else True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "free_memory", lambda: (1 << 40, "a test"))
        api.train(letters_model, str(tmp_path / "memory"), text, layers=settings, threads=1)
    assert hashes(tmp_path / "files") == hashes(tmp_path / "memory")


def test_files_go_when_training_fails(tmp_path: Path, little_memory: None) -> None:
    def work() -> None:
        with Streams((2, 3, 5), CPU, tmp_path) as made:
            made.room().fill_(1.5)
            assert (tmp_path / "stream-0.bin").stat().st_size == 120
            raise KilledError

    with pytest.raises(KilledError):
        work()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_named(tmp_path: Path, little_memory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(write: object, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(streams, "_fill", full)
    with (
        pytest.raises(DistillError, match=r"stream-0.bin: cannot be written: .*No space left"),
        Streams((2, 3, 5), CPU, tmp_path) as made,
    ):
        made.room()
    assert not list(tmp_path.iterdir())
