"""Other cases of the kinds that people report: odd files beside a model, and files that users write by hand."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from bincompress import api
from bincompress.compression.manifest import read_manifest
from bincompress.compression.recipe import load_kept_weights, load_recipe
from bincompress.errors import BincompressError, CheckpointError, StoreError
from bincompress.inference.load import checked_threads
from bincompress.inference.prompts import read_prompts
from bincompress.model.config import parse
from bincompress.model.generation_fields import not_obeyed
from bincompress.serving.settings import read_keys
from bincompress.sources.hub import open_source
from bincompress.sources.text import read_text
from bincompress.store.store import open_store
from tests.conftest import Run, tiny_config

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 12345\n"
MARK = b"\xef\xbb\xbf"  # before the first line, as some editors write UTF-8


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "socket"])
def test_what_is_no_file_is_not_waited_for(tiny_model: Path, name: str, kind: str, tmp_path: Path) -> None:
    (tiny_model / name).unlink()
    if kind == "folder":
        (tiny_model / name).mkdir()
    elif kind == "pipe":
        os.mkfifo(tiny_model / name)  # which opens only when somebody writes
    else:
        with socket.socket(socket.AF_UNIX) as made:
            here = Path.cwd()
            os.chdir(tiny_model)  # as the names of sockets are short
            made.bind(name)
            os.chdir(here)
    with pytest.raises(CheckpointError, match=rf"{name}: not a file"):
        open_source(str(tiny_model))


def test_weights_that_are_no_file_are_not_waited_for(tiny_model: Path) -> None:
    (tiny_model / "model.safetensors.index.json").unlink()
    for path in tiny_model.glob("*.safetensors"):
        path.unlink()
        os.mkfifo(path)
    with pytest.raises(CheckpointError, match=r"no \.safetensors file"):
        open_source(str(tiny_model))


def test_a_store_in_place_of_a_checkpoint_is_called_one(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    assert run("compress", tiny_model, tmp_path / "store")[0] == 0
    with pytest.raises(CheckpointError, match="store: a store, not a checkpoint; give the checkpoint"):
        open_source(str(tmp_path / "store"))
    assert run("pack", tmp_path / "store", tmp_path / "store.zip")[0] == 0
    with pytest.raises(CheckpointError, match=r"store\.zip: a packed store, not a checkpoint; give the checkpoint"):
        open_source(str(tmp_path / "store.zip"))


def test_pointers_of_git_lfs_are_called_so(tmp_path: Path) -> None:
    path = tmp_path / "model.zip"
    path.write_bytes(POINTER)
    for read, kind in ((read_text, CheckpointError), (lambda place: open_store(str(place)), StoreError)):
        with pytest.raises(kind, match=r"model\.zip: a Git LFS pointer, not the file itself; run `git lfs pull`"):
            read(path)


def test_a_mark_before_the_first_line_is_no_part_of_it(tmp_path: Path) -> None:
    def written(text: str) -> Path:
        (tmp_path / "file").write_bytes(MARK + text.encode())
        return tmp_path / "file"

    assert read_text(written("the text")) == "the text"
    assert read_keys(written("secret\n")) == ("secret",)
    assert [prompt.text for prompt in read_prompts(written('{"prompt": "x"}\n'))] == ["x"]
    assert load_kept_weights(written("w 1 2\n")) == {"w": ((1, 2),)}
    assert read_manifest(written('[[model]]\nsource = "a"\nstore = "b"\n'))[0].store == "b"
    assert load_recipe(written('[defaults]\nmethod = "xnor"\n'), {}) == load_recipe(None, {"method": "xnor"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_causal": False}, "is_causal = False is not supported"),  # transformers then attends to all tokens
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a positive number, found NaN"),
        ({"rope_theta": float("-inf")}, "rope_theta: expected a positive number, found -Infinity"),
    ],
)
def test_values_of_config_json_are_refused_as_they_are_written(
    tiny_model: Path, change: dict[str, Any], message: str
) -> None:
    (tiny_model / "config.json").write_text(json.dumps({**tiny_config(), **change}))
    with pytest.raises(BincompressError, match=message):
        parse(open_source(str(tiny_model)).config)


def test_a_window_is_as_long_as_the_model_takes(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"t{number % 96}" for number in range(300)))
    code, output, _ = run("evaluate", tiny_model, "--text", text, "--json")
    assert (code, json.loads(output)["context"]) == (0, 128)  # 1024 where the model takes as many
    assert run("calibrate", tiny_model, tmp_path / "statistics", "--text", text, "--samples", 2)[0] == 0
    code, _, errors = run("evaluate", tiny_model, "--text", text, "--context", 129)
    assert (code, errors) == (2, "error: context: expected 2 to 128 (this model's limit), found 129\n")
    with pytest.raises(BincompressError, match="2 samples of 129 tokens: expected at least 1 sample of 2 to 128"):
        api.calibrate(tiny_model, str(tmp_path / "others"), text, samples=2, context=129)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"num_beams": 4, "do_sample": False}, "num_beams"),
        ({"suppress_tokens": [5], "bad_words_ids": [[5]], "no_repeat_ngram_size": 2},
         "no_repeat_ngram_size, bad_words_ids, suppress_tokens"),
        ({"forced_eos_token_id": 0}, "forced_eos_token_id"),
        ({"do_sample": True, "typical_p": 0.5}, "typical_p"),
        ({"typical_p": 0.5}, ""),  # of drawing alone
        ({"num_beams": 1, "min_length": 0, "typical_p": 1.0, "do_sample": True, "suppress_tokens": None}, ""),
        ({"temperature": 0.5, "eos_token_id": 1, "max_length": 20}, ""),
    ],
)  # fmt: skip
def test_fields_of_generation_config_that_are_not_obeyed_are_named(given: dict[str, Any], named: str) -> None:
    files = {"generation_config.json": json.dumps(given).encode()}
    expected = (f"generation_config.json: {named}: not obeyed, so that answers may differ",) if named else ()
    assert not_obeyed(files) == expected


def test_plan_and_commands_say_what_is_not_obeyed(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    (tiny_model / "generation_config.json").write_text('{"no_repeat_ngram_size": 3}')
    note = "note: generation_config.json: no_repeat_ngram_size: not obeyed, so that answers may differ\n"
    code, _, errors = run("compress", tiny_model, tmp_path / "store")
    assert (code, errors) == (0, note)
    code, output, errors = run("generate", tmp_path / "store", "t1", "--max-tokens", 1)
    assert (code, errors) == (0, note)
    assert output  # the answer goes to standard output, and the note does not


def test_more_threads_than_can_be_of_use_are_refused() -> None:
    with pytest.raises(BincompressError, match=r"^threads: expected 1 to \d+, found 9999; this machine has \d+ CPUs$"):
        checked_threads(9999)
    assert checked_threads(64) == 64
