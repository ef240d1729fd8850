"""Does a run on Ray find its own code and files from any folder, and notice a cluster that is not there?"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bincompress.compression.records import Job
from bincompress.errors import BincompressError
from bincompress.methods import Settings
from bincompress.tensors.weight import TensorSource

pytest.importorskip("ray")
from jobs.addresses import check_address
from jobs.runner import absolute

ROOT = Path(__file__).parents[1]


def test_relative_paths_are_the_drivers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = TensorSource("w", "F32", (1, 1), "model/a.safetensors", 0, 4)
    found = absolute(Job("store", "w", source, Settings(), statistics="stats"))
    places = found.store, found.source.file, found.statistics
    assert places == (f"{tmp_path}/store", f"{tmp_path}/model/a.safetensors", f"{tmp_path}/stats")
    assert absolute(Job("s3://bucket/store", "w", source, Settings())).store == "s3://bucket/store"


def test_nobody_at_the_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(BincompressError, match=r"no Ray cluster answers at 127\.0\.0\.1:9, the address in --address"):
        check_address("127.0.0.1:9")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(BincompressError, match="the address in RAY_ADDRESS"):
        check_address(None)
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    check_address(None)
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:9\n")
    for address in (None, "auto"):
        with pytest.raises(BincompressError, match="ray_current_cluster, which an earlier cluster left"):
            check_address(address)
    check_address("local")


@pytest.mark.slow
def test_a_jobs_folder_of_the_users(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    (folder / "jobs").mkdir(parents=True)
    (folder / "jobs" / "__init__.py").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "bincompress", "compress", "../model", "store", "--runner", "ray", "--address", "local"],
        cwd=folder, capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "21 tensors done" in done.stdout
