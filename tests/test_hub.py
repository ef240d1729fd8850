"""Are Hub ids resolved with real huggingface_hub calls? Against a local server that answers as the Hub does."""

import json
from pathlib import Path

import pytest

from bincompress.store.store import open_store
from tests.conftest import RunWithHub
from tests.fake_hub import COMMIT, FakeHub


@pytest.mark.parametrize("source", ["team/tiny", "team/tiny@v1"])
def test_a_hub_model_is_downloaded_and_compressed(
    hub: FakeHub, run_with_hub: RunWithHub, tmp_path: Path, source: str
) -> None:
    done = run_with_hub(hub.server_port, "compress", source, str(tmp_path / "store"))
    assert done.returncode == 0, done.stderr
    inspected = run_with_hub(hub.server_port, "inspect", str(tmp_path / "store"), "--json")
    total = json.loads(inspected.stdout)["total"]
    assert (total["source"]["id"], total["source"]["revision"], total["complete"]) == ("team/tiny", COMMIT, 21)


def test_a_dry_run_fetches_headers_alone(hub: FakeHub, run_with_hub: RunWithHub, tmp_path: Path) -> None:
    done = run_with_hub(hub.server_port, "compress", "team/tiny", str(tmp_path / "store"), "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["tensors"]["model.layers.0.mlp.up_proj.weight"]["method"] == "wgm"
    assert not (tmp_path / "store").exists()
    assert not list((tmp_path / "hub").rglob("*.safetensors"))


def test_a_name_that_the_hub_does_not_know(hub: FakeHub, run_with_hub: RunWithHub, tmp_path: Path) -> None:
    done = run_with_hub(hub.server_port, "compress", "team/other", str(tmp_path / "store"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: team/other: no such folder here, and the Hub says:")
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_hub_that_cannot_be_reached(run_with_hub: RunWithHub, tmp_path: Path) -> None:
    done = run_with_hub(9, "compress", "team/tiny", str(tmp_path / "store"))
    assert done.returncode == 2
    assert "could not be reached" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_source_that_is_neither_folder_nor_id(run_with_hub: RunWithHub, tmp_path: Path) -> None:
    done = run_with_hub(9, "compress", "./no/such/folder", str(tmp_path / "store"))
    assert done.returncode == 2
    assert "neither a folder nor a Hub id" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("source", ["team/tiny", "team/tiny@v1", f"team/tiny@{COMMIT}"])
def test_what_is_cached_is_used_without_the_hub(
    hub: FakeHub, run_with_hub: RunWithHub, tmp_path: Path, source: str
) -> None:
    def compress(port: int = hub.server_port, **more: str) -> None:
        store = tmp_path / f"store-{len(list(tmp_path.iterdir()))}"
        done = run_with_hub(port, "compress", source, str(store), **more)
        assert done.returncode == 0, done.stderr
        assert open_store(str(store)).attributes["source"]["revision"] == COMMIT  # type: ignore[index]

    compress()
    compress(HF_HUB_OFFLINE="1")
    compress(port=9)
    for mode in ("500", "429", "portal") if source == "team/tiny" else ("500",):
        hub.mode = mode
        compress()
    done = run_with_hub(9, "compress", source, str(tmp_path / "dry"), "--dry-run", "--rate", "1GB")
    assert done.returncode == 0, done.stderr
    for weights in (tmp_path / "hub").rglob("*-00002-of-*.safetensors"):
        weights.unlink()
    done = run_with_hub(9, "compress", source, str(tmp_path / "part"))
    assert (done.returncode, "could not be reached" in done.stderr, done.stderr.count("\n")) == (2, True, 1)


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        pytest.param("401", "log in (hf auth login)", marks=pytest.mark.slow),
        pytest.param("403", "ask for access on the model's page", marks=pytest.mark.slow),
        ("404", "check the name"),
        pytest.param("429", "too many requests", marks=pytest.mark.slow),
        ("500", "out of order (status 500)"),
        pytest.param("portal", "what answers is not the Hub", marks=pytest.mark.slow),
        pytest.param("silent", "gave no answer within 1 s", marks=pytest.mark.slow),
    ],
)
def test_what_the_hub_answers_is_one_true_line(
    hub: FakeHub, run_with_hub: RunWithHub, tmp_path: Path, mode: str, words: str
) -> None:
    hub.mode = mode
    code = (
        "import sys; from bincompress.sources import hub; from bincompress import cli; hub.ANSWER_SECONDS = 1.0\n"
        "sys.argv = ['bincompress', 'compress', 'team/tiny', sys.argv[1]]; cli.main()"
    )
    done = run_with_hub(hub.server_port, tmp_path / "store", code=code)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.startswith("error: team/tiny: ")
    assert done.stderr.count("\n") == 1


def test_a_cache_that_cannot_be_written(hub: FakeHub, run_with_hub: RunWithHub, tmp_path: Path) -> None:
    done = run_with_hub(hub.server_port, "compress", "team/tiny", str(tmp_path / "s"), HF_HOME="/dev/null/x")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "the Hub's cache cannot be written: /dev/null/x" in done.stderr


def test_only_the_weights_that_are_needed_are_fetched(hub: FakeHub, run_with_hub: RunWithHub, tmp_path: Path) -> None:
    for name in ("consolidated.safetensors", "pytorch_model.bin"):
        (hub.folder / name).write_bytes(b"a second set of weights")
    done = run_with_hub(hub.server_port, "compress", "team/tiny", str(tmp_path / "store"))
    assert done.returncode == 0, done.stderr
    fetched = {path.split("/")[-1] for path in hub.asked if "/resolve/" in path}
    assert {name for name in fetched if name.endswith((".safetensors", ".bin"))} == {
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    }  # fmt: skip
