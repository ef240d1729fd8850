"""Is a file that is not what its name says called what it is, and are bytes that no tensor has refused?"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from bincompress.errors import CheckpointError, DamagedError
from bincompress.model.checkpoint_source import load_checkpoint
from bincompress.model.errors import TokenizerError
from bincompress.model.files import json_object
from bincompress.model.generation_fields import not_obeyed
from bincompress.reporting.inspection import inspect
from bincompress.sources.checkpoint import open_checkpoint
from bincompress.sources.hub import open_source
from bincompress.store.layout import SEAL, sealed
from bincompress.store.store import open_store
from tests.conftest import Run, tiny_config, tiny_tensors, write_model

_KINDS = [
    (b"PK\x03\x04" + bytes(400), "a zip file, as torch.save and archives make it"),
    (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", "a pickle of PyTorch"),
    (b"<!DOCTYPE html><html><head><title>Sign in</title>" + b" " * 400, "a page of HTML, not the file"),
    (b"\n  <HTML lang=en>" + b" " * 400, "a page of HTML, not the file"),
    (b"\x1f\x8b\x08" + bytes(400), "a gzip file; unpack it"),
    (b'<?xml version="1.0"?><Error>' + b" " * 400, "an XML page, such as a server's refusal"),
    (b"GGUF\x03" + b"\xff" * 400, "a GGUF file; name it .gguf"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("kinds") / "m", tiny_tensors(1, 64, 64), tiny_config(1, 64, 64))


@pytest.mark.parametrize(("content", "says"), _KINDS)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_of_another_kind_is_named(model: Path, tmp_path: Path, content: bytes, says: str, name: str) -> None:
    for path in model.iterdir():
        (tmp_path / path.name).write_bytes(content if path.name == name else path.read_bytes())
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / name}: {says}")


def test_a_page_as_a_gguf_file_or_a_tokenizer_is_named(tmp_path: Path) -> None:
    page = b"<!doctype html>" + bytes(64)
    (tmp_path / "model.gguf").write_bytes(page)
    with pytest.raises(CheckpointError, match="a page of HTML"):
        open_source(str(tmp_path / "model.gguf"))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: a page of HTML"):
        json_object({"tokenizer.json": page}, "tokenizer.json")


def test_bytes_that_no_tensor_has_are_refused_as_by_the_safetensors_library(model: Path, tmp_path: Path) -> None:
    for path in model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole + b"\0\0\0")
    with pytest.raises(CheckpointError, match="3 bytes after the last tensor are no tensor's"):
        open_checkpoint(tmp_path)
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
    header[last]["data_offsets"] = [place + 2 for place in header[last]["data_offsets"]]
    text = json.dumps(header).encode()
    weights.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :] + b"\0\0")
    with pytest.raises(CheckpointError, match=f"2 bytes before {last} are no tensor's"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.gguf", "consolidated.00.pth", "pytorch_model.bin.index.json", "tf_model.h5"]
)
def test_a_dry_run_refuses_a_folder_of_other_formats_as_a_run_does(run: Run, tmp_path: Path, name: str) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps(tiny_config(1, 64, 64)))
    store = tmp_path / "store"
    assert run("compress", tmp_path / "m", store, "--dry-run")[0] == 0
    (tmp_path / "m" / name).write_bytes(b"GGUF")
    dry, real = (run("compress", tmp_path / "m", store, *more) for more in (["--dry-run"], []))
    assert dry[0] == real[0] == 2
    assert dry[2] == real[2]
    assert "no .safetensors file" in real[2]
    assert not store.exists()


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"max_new_tokens": 5}, "max_new_tokens"), ({"max_length": 4096}, "max_length"), ({"max_length": 20}, ""),
        ({"max_time": 1.5, "num_return_sequences": 3}, "max_time, num_return_sequences"),
        ({"num_return_sequences": 1, "forced_decoder_ids": [[1, 5]]}, "forced_decoder_ids"),
    ],
)  # fmt: skip
def test_lengths_of_generation_config_are_named(given: dict[str, object], named: str) -> None:
    found = not_obeyed({"generation_config.json": json.dumps(given).encode()})
    expected = (f"generation_config.json: {named}: not obeyed, so that answers may differ",) if named else ()
    assert found == expected


def test_a_dtype_that_is_not_read_is_refused_where_the_folder_itself_is_run(model: Path, tmp_path: Path) -> None:
    for tied in (False, True):
        tensors = tiny_tensors(1, 64, 64)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].astype(np.float64)
        folder = write_model(tmp_path / str(tied), tensors, tiny_config(1, 64, 64) | {"tie_word_embeddings": tied})
        with pytest.raises(CheckpointError, match=r"lm_head\.weight: dtype F64, and the decoder needs it"):
            load_checkpoint(folder)


def test_a_report_replaces_a_report_and_no_other_file(run: Run, demo_store: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    for content in (b"my notes", b"<!doctype html><title>mine</title>"):
        page.write_bytes(content)
        code, _, errors = run("report", demo_store, "--out", page)
        assert (code, page.read_bytes()) == (2, content)
        assert errors == (
            f"error: {page}: is there, and is not a report of bincompress; nothing was changed: give another --out\n"
        )
    page.write_bytes(b"")  # as mktemp makes it
    assert run("report", demo_store, "--out", page)[0] == 0
    assert run("report", demo_store, "--out", page)[0] == 0
    assert b"<title>bincompress: " in page.read_bytes()[:4096]


def test_a_root_without_a_source_is_damaged(tiny_stores: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(tiny_stores / "store", store)
    node = json.loads((store / "zarr.json").read_text())
    del node["attributes"]["source"]
    node["attributes"] = sealed("", node["attributes"], node["attributes"][SEAL].get("arrays"))
    (store / "zarr.json").write_text(json.dumps(node))
    with pytest.raises(DamagedError, match=r"zarr\.json: source: missing; expected an object"):
        inspect(open_store(str(store)))
