"""Are matrices that were kept as they are read in small steps, with the values of the whole?"""

from pathlib import Path

import numpy as np
import pytest

from bincompress.api import compress
from bincompress.errors import DamagedError, StoreError
from bincompress.model.linear import KeptEmbedding
from bincompress.store import arrays, layout
from bincompress.store.files import LocalFiles
from bincompress.store.layout import layout_of
from bincompress.store.store import open_store
from tests.conftest import tiny_config, tiny_tensors, write_model

ROWS, COLS = 40, 6


@pytest.mark.parametrize("rows", [1, 7, 8, 40])
def test_chunks_are_mapped_as_runs_of_rows(tmp_path: Path, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "CHUNK_LIMIT", rows * COLS * 4)
    monkeypatch.setattr(arrays, "_RUN_BYTES", 3 * COLS * 4)
    values = np.random.default_rng(0).standard_normal((ROWS, COLS)).astype(np.float32)
    files = LocalFiles(tmp_path)
    arrays.write_array(files, "a", values, archive=False)
    parts = arrays.map_parts(files, "a", layout_of(values, False))
    assert parts is not None
    assert len(parts) > 1 or rows == ROWS
    assert np.array_equal(np.concatenate(parts), values)
    assert np.array_equal(np.concatenate([run for part in parts for run in arrays.in_runs(part)]), values)
    assert layout.rows_hash(run for part in parts for run in arrays.in_runs(part)) == layout.array_hash(values)
    ids = np.array([39, 0, 7, 8, 7, 15])
    assert np.array_equal(KeptEmbedding(parts).rows_of(ids), values[ids])


def test_coded_chunks_are_not_mapped(tmp_path: Path) -> None:
    values = np.zeros((ROWS, COLS), np.float32)
    files = LocalFiles(tmp_path)
    arrays.write_array(files, "a", values, archive=True)
    assert arrays.map_parts(files, "a", layout_of(values, True)) is None


@pytest.mark.parametrize("fault", ["a changed byte", "not finite"])
def test_damage_in_any_chunk_is_found(tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "CHUNK_LIMIT", 1 << 10)
    name = "model.embed_tokens.weight"
    tensors = tiny_tensors()
    model = write_model(tmp_path / "model", tensors, tiny_config())
    compress(model, tmp_path / "store")
    parts = open_store(str(tmp_path / "store")).plain_rows(name)
    assert len(parts) > 2
    assert np.array_equal(np.concatenate([part.float32() for part in parts]), tensors[name].astype(np.float32))
    last = sorted((tmp_path / "store" / "plain" / name / "c").glob("*/0"), key=lambda file: int(file.parent.name))[-1]
    content = bytearray(last.read_bytes())
    content[0] ^= 1
    last.write_bytes(content)
    if fault == "not finite":  # with a hash that fits, as earlier versions wrote such tensors
        last.write_bytes(bytes([0x80, 0x7F]) + bytes(content[2:]))
        written = open_store(str(tmp_path / "store")).hashes(name)["array"]
        monkeypatch.setattr("bincompress.store.reading.rows_hash", lambda runs: written)
    with pytest.raises((DamagedError, StoreError), match=r"embed_tokens.*array"):
        open_store(str(tmp_path / "store")).plain_rows(name)
