"""Laid-out matrices that are damaged, of other tensors or versions, or made up: refused by name, or left alone."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bincompress
from bincompress.errors import BincompressError, DamagedError, StoreError
from bincompress.inference.load import Loaded, load_decoder
from bincompress.model.packed_linear import ActivationSettings
from bincompress.store.layout import array_hash, group_node, sealed
from bincompress.store.pack_files import PackFiles
from bincompress.store.store import open_store
from bincompress.store.zip_format import in_order
from cpu_kernels.matmul.prepacking import described, form_of
from tests.conftest import Run
from tests.packs import logits, write_zip

FORM = f"laid_out/{form_of()}"
UP = "model.layers.1.mlp.gate_proj.weight"  # and up_proj with it
STREAM = f"{FORM}/{UP}/stream/c/0"


@pytest.fixture(scope="session")
def sound(tiny_pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("laid out") / "m.zip"
    bincompress.pack(tiny_pack / "store", path, layout=["auto"])
    return path


@pytest.fixture
def file(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(sound, tmp_path / "m.zip"))


def loaded(path: Path) -> Loaded:
    return load_decoder(str(path), 1, ActivationSettings())


def edit(path: Path, change: Callable[[dict[str, bytes]], None]) -> None:
    """Write a pack anew with other entries; its directory and checksums fit them."""
    files = open_store(str(path)).files
    assert isinstance(files, PackFiles)
    entries = {key: files.read(key) or b"" for key in files.entries}
    change(entries)
    path.write_bytes(write_zip(entries))


def edit_root(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what the file says of its matrices, under a hash that fits."""

    def changed(entries: dict[str, bytes]) -> None:
        attributes = json.loads(entries[f"{FORM}/zarr.json"])["attributes"]
        change(attributes)
        entries[f"{FORM}/zarr.json"] = group_node(sealed(FORM, attributes))

    edit(path, changed)


def test_a_changed_byte_is_found_when_it_is_loaded_and_by_verify(file: Path, run: Run) -> None:
    files = open_store(str(file)).files
    assert isinstance(files, PackFiles)
    sound = file.read_bytes()
    for array in ("stream", "multipliers"):
        entry = files.entries[f"{FORM}/{UP}/{array}/c/0"]
        changed = bytearray(sound)
        changed[entry.start + 100] ^= 1
        file.write_bytes(changed)
        with pytest.raises(DamagedError, match=f"{FORM}: {UP}: {array}: its bytes are not those that were written"):
            loaded(file)
        assert list(bincompress.verify(file).problems) == [FORM, "zarr.json"]
    code, _, errors = run("generate", file, "t1", "--max-tokens", 1)
    assert (code, errors.count("\n"), UP in errors) == (2, 1, True)


def test_a_stream_that_is_not_that_of_its_planes_is_found_by_verify(file: Path) -> None:
    def change(entries: dict[str, bytes]) -> None:
        data = bytearray(entries[STREAM])
        data[5000] ^= 1
        entries[STREAM] = bytes(data)
        attributes = json.loads(entries[f"{FORM}/zarr.json"])["attributes"]
        attributes["matrices"][UP]["hashes"]["stream"] = array_hash(np.frombuffer(data[:-4], np.uint8))
        entries[f"{FORM}/zarr.json"] = group_node(sealed(FORM, attributes))

    edit(file, change)
    problems = bincompress.verify(file).problems
    assert list(problems) == [FORM]
    assert f"{UP}: is not what follows from its planes" in problems[FORM]


def test_matrices_of_other_tensors_are_refused(file: Path, tiny_pack: Path, tmp_path: Path) -> None:
    bincompress.compress(tiny_pack / "model", tmp_path / "other", embeddings="4bit", groups=1)
    bincompress.pack(tmp_path / "other", tmp_path / "other.zip", layout=["auto"])
    theirs = open_store(str(tmp_path / "other.zip")).files
    assert isinstance(theirs, PackFiles)

    def change(entries: dict[str, bytes]) -> None:
        entries |= {key: theirs.read(key) or b"" for key in theirs.entries if key.startswith("laid_out/")}

    edit(file, change)
    with pytest.raises(DamagedError, match=r"was made of another .* than the store holds; pack it again"):
        loaded(file)
    assert FORM in bincompress.verify(file).problems


def test_another_version_is_left_alone_with_a_note(file: Path, tiny_pack: Path, run: Run) -> None:
    edit_root(file, lambda root: root.update(version=2))
    found = loaded(file)
    assert found.notes == (
        f"{file}: holds matrices laid out by version 2, not 1: matrices are laid out anew for {described(form_of())}; "
        "`bincompress pack --layout auto` makes a file for this CPU",
    )
    assert np.array_equal(logits(file), logits(tiny_pack / "store"))
    code, _, errors = run("generate", file, "t1", "--max-tokens", 1)
    assert (code, f"note: {found.notes[0]}\n" in errors) == (0, True)
    assert "version 2; this program can check 1 alone" in bincompress.verify(file).problems[FORM]


def of(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda root: root["matrices"][UP].update(changes)


MADE_UP: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "planes": (of(planes=3), "bytes; expected"),
    "many planes": (of(planes=1 << 40), "planes: 1099511627776; expected a whole number from 1 to 8"),
    "no planes": (of(planes=0), "expected a whole number from 1 to 8"),
    "true planes": (of(planes=True), "expected a whole number"),
    "block": (of(block=1), "block: 1; expected a multiple of 64"),
    "large block": (of(block=1 << 62), "block: 4611686018427387904; expected a whole number"),
    "offset": (of(offset=True), "bytes; expected"),
    "odd offset": (of(offset=1), "offset and half: expected true or false"),
    "float32": (of(half=False), "bytes; expected"),
    "weights": (of(plane_weights=[1.0]), "plane_weights: expected 2 numbers"),
    "shared": (of(plane_weights=[1.0, 2.0]), "bytes; expected"),
    "not finite": (of(plane_weights=[float("nan"), 1.0]), "plane_weights: expected 2 numbers"),
    "texts": (of(plane_weights=["1", "2"]), "plane_weights: .*; expected a list of numbers"),
    "fewer tensors": (of(tensors=[UP]), "bytes; expected"),
    "no tensors": (of(tensors=[]), "tensors: .*; expected a list of names"),
    "numbers": (of(tensors=[UP, 3]), "tensors: .*; expected a list of names"),
    "twice": (of(tensors=[UP, UP]), "tensors: more than there can be"),
    "no hashes": (of(hashes={}), "hashes: expected those of stream, multipliers"),
    "odd hashes": (of(hashes={"x": "y"}), "expected objects of hashes by name"),
    "no source": (of(source={}), "was made of another"),
    "a list": (lambda root: root["matrices"].update({UP: []}), UP),
    "a factor": (
        lambda root: root["matrices"].update({f"{UP}/middle": root["matrices"][UP]}), "a matrix 'middle'; expected left"
    ),
    "unknown": (
        lambda root: root["matrices"].update({"x": {**root["matrices"][UP], "tensors": ["x"]}}),
        "the store has no packed tensor x",
    ),
    "another form": (lambda root: root.update(tile=16), "says that it is of another form"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(MADE_UP))
def test_what_a_file_makes_up_is_refused_by_name_before_it_is_used(file: Path, sound: Path, case: str) -> None:
    change, message = MADE_UP[case]
    edit_root(file, change)
    problem = bincompress.verify(file).problems[FORM]
    assert re.search(message, problem), problem
    assert "\n" not in problem
    if case == "unknown":  # nobody asks for that matrix
        assert np.array_equal(logits(file), logits(sound))
        return
    with pytest.raises(StoreError, match=message):
        loaded(file)


def test_a_missing_array_or_another_seal_is_refused(file: Path, sound: Path) -> None:
    edit(file, lambda entries: entries.__delitem__(STREAM))
    with pytest.raises(DamagedError, match=f"{UP}: stream: its file {STREAM} is missing"):
        loaded(file)
    shutil.copy(sound, file)

    def unsealed(entries: dict[str, bytes]) -> None:
        root = json.loads(entries[f"{FORM}/zarr.json"])
        root["attributes"]["matrices"][UP]["half"] = False
        entries[f"{FORM}/zarr.json"] = json.dumps(root).encode()

    edit(file, unsealed)
    with pytest.raises(DamagedError, match="its attributes are not those that were written; pack the store again"):
        loaded(file)


def test_an_array_that_nothing_lists_or_describes_wrongly_is_found_by_verify(file: Path, sound: Path) -> None:
    edit_root(file, lambda root: root["matrices"].pop(UP))
    assert f"does not list {FORM}/{UP}/" in bincompress.verify(file).problems[FORM]
    assert np.array_equal(logits(file), logits(sound))
    shutil.copy(sound, file)

    def other(entries: dict[str, bytes]) -> None:
        key = f"{FORM}/{UP}/stream/zarr.json"
        entries[key] = entries[key].replace(b'"uint8"', b'"int8"')

    edit(file, other)
    assert "stream: zarr.json is not the one that was written" in bincompress.verify(file).problems[FORM]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("laid_out/../x/c/0", "leads out of the store"),
        ("laid_out/x/notes.txt", "is no part of a store"),
        ("laid_out/lookup16/x/stream/c/0", "no kernel reads that"),
    ],
)
def test_odd_names_are_refused(file: Path, name: str, message: str) -> None:
    def change(entries: dict[str, bytes]) -> None:
        entries[name] = b"abcd"
        ordered = {key: entries[key] for key in in_order(entries)}
        entries.clear()
        entries.update(ordered)

    try:
        edit(file, change)
        problems = "".join(bincompress.verify(file).problems.values())
    except BincompressError as error:
        problems = str(error)
    assert message in problems
