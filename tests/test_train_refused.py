"""What training refuses before the work, by name, and what of the user's it leaves as it is."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bincompress import api
from bincompress.distillation.settings import DistillError, LayerSettings
from bincompress.errors import BincompressError
from tests.conftest import tiny_config, tiny_tensors, write_model
from tests.test_replace import Tree
from tests.training import LAYERS, MODEL, KilledError, killed_after_a_layer, trained

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_torch_thread")]  # PyTorch


def test_layers_that_read_each_other_are_not_trained_on_a_cluster(
    letters_model: Path, letters_text: Path, tmp_path: Path
) -> None:
    with pytest.raises(BincompressError, match="--layer-inputs unquantized makes them independent"):
        trained(letters_model, letters_text, tmp_path / "out", runner="ray")


def test_a_layers_file_of_another_run_or_a_damaged_one_is_refused(
    letters_model: Path, letters_text: Path, tmp_path: Path
) -> None:
    killed_after_a_layer(letters_model, letters_text, tmp_path / "out")
    with pytest.raises(DistillError, match="a run with other settings, text or store was interrupted here"):
        trained(letters_model, letters_text, tmp_path / "out", layers=replace(LAYERS, lr=0.02))
    (file,) = tmp_path.glob(".out.distill/*/layer-*.safetensors")
    content = bytearray(file.read_bytes())
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(DistillError, match="not a readable file of a trained layer"):
        trained(letters_model, letters_text, tmp_path / "out")
    trained(letters_model, letters_text, tmp_path / "out", overwrite=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda t: {"layers": None}, "nothing to train: expected layers or model"),
        (lambda t: {"layers": replace(LAYERS, windows=60)}, "expected at least 68, 8 of them to judge"),
        (lambda t: {"layers": replace(LAYERS, context=10**6)}, "the model's limit"),
        (lambda t: {"start": str(t / "nothing")}, "nothing: no such store"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    options: Callable[[Path], dict[str, Any]], message: str, letters_model: Path, letters_text: Path, tmp_path: Path
) -> None:
    with pytest.raises(BincompressError, match=message):
        trained(letters_model, letters_text, tmp_path / "out", **options(tmp_path))
    assert not (tmp_path / "out").exists()


def test_a_place_that_is_taken_and_a_store_of_another_model_are_refused(
    letters_model: Path, letters_text: Path, tmp_path: Path
) -> None:
    api.compress(letters_model, tmp_path / "taken")
    before = Tree(str(tmp_path / "taken")).all()
    with pytest.raises(DistillError, match="taken: exists; choose another STORE, or --overwrite"):
        trained(letters_model, letters_text, tmp_path / "taken")
    assert Tree(str(tmp_path / "taken")).all() == before
    other = write_model(tmp_path / "other", tiny_tensors(), {**tiny_config(), "rms_norm_eps": 1e-4})
    api.compress(other, tmp_path / "theirs")
    with pytest.raises(DistillError, match="give the checkpoint that it was made from as SOURCE"):
        trained(letters_model, letters_text, tmp_path / "out", start=str(tmp_path / "theirs"))


def test_what_an_interrupted_run_of_another_kind_has_trained_is_neither_used_nor_removed(
    letters_model: Path, letters_text: Path, tmp_path: Path
) -> None:
    killed_after_a_layer(letters_model, letters_text, tmp_path / "a")
    with pytest.raises(DistillError, match="a run with --by layer was interrupted here"):
        trained(letters_model, letters_text, tmp_path / "a", layers=None, model=MODEL)
    assert list(tmp_path.glob(".a.distill/*/layer-0000.safetensors"))

    def stop(progress: Any) -> None:
        if progress.step == 3:
            raise KilledError

    with pytest.raises(KilledError):
        trained(letters_model, letters_text, tmp_path / "b", model=MODEL, checkpoint_every=1, on_step=stop)
    with pytest.raises(DistillError, match="a run with --by model was interrupted here"):
        trained(letters_model, letters_text, tmp_path / "b")
    for file in tmp_path.glob(".b.distill/*/layer-*.safetensors"):
        file.unlink()
    with pytest.raises(DistillError, match="a run with other settings was interrupted here: its layers was different"):
        trained(letters_model, letters_text, tmp_path / "b", layers=None, model=MODEL, checkpoint_every=1)


def test_files_and_stores_of_the_user_in_the_work_folder_stay(
    letters_model: Path, letters_text: Path, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    api.compress(letters_model, work / "start", groups=2, block=64)
    before = Tree(str(work / "start")).all()
    for name in ("checkpoint.pt", "layer-notes.pt", "layer-0000.safetensors"):
        (work / name).write_text("mine")
    trained(letters_model, letters_text, tmp_path / "a", start=str(work / "start"), work=work)
    trained(letters_model, letters_text, tmp_path / "b", work=work, overwrite=True)
    assert Tree(str(work / "start")).all() == before
    assert sorted(path.name for path in work.iterdir()) == [
        "checkpoint.pt", "layer-0000.safetensors", "layer-notes.pt", "start",
    ]  # fmt: skip
    with pytest.raises(DistillError, match="lies in STORE"):
        trained(letters_model, letters_text, tmp_path / "c", work=tmp_path / "c" / "work")


def test_refusals_come_before_anything_is_removed(letters_model: Path, letters_text: Path, tmp_path: Path) -> None:
    killed_after_a_layer(letters_model, letters_text, tmp_path / "out")
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"start": str(tmp_path / "none")}, "none: no such store"),
        ({"start": str(tmp_path / "out")}, "out: is the store to begin with; choose another STORE"),
        ({"model": replace(MODEL, batch=400)}, "expected at least 400 for a batch"),
    )
    for wrong, message in refused:
        with pytest.raises(BincompressError, match=message):
            trained(letters_model, letters_text, tmp_path / "out", overwrite=True, **wrong)
    assert list(tmp_path.glob(".out.distill/*/layer-0000.safetensors"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context": 1}, "--layer-context 1: expected at least 2"),
        ({"batch": 0}, "--layer-batch 0: expected at least 1"),
        ({"lr_planes": float("nan")}, "--layer-lr-planes nan: expected a number above 0"),
        ({"windows": 0}, "--windows 0: expected at least 1"),
    ],
)
def test_errors_name_the_options_of_the_phase(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DistillError, match=message):
        LayerSettings(**settings)
