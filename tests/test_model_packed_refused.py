"""Which stores does the packed engine refuse, and by which name?"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bincompress import load
from bincompress.compression.plan import make_plan
from bincompress.compression.recipe import Recipe
from bincompress.compression.run import compress
from bincompress.errors import BincompressError, DamagedError, StoreError
from bincompress.inference.load import TooLittleMemoryError, load_decoder
from bincompress.model.errors import UnsupportedModelError
from bincompress.model.packed_linear import ActivationSettings
from bincompress.sources.checkpoint import open_checkpoint
from tests.conftest import tiny_config, tiny_tensors, write_model
from tests.packed_models import packed_tensor, stored


def test_stores_that_cannot_run(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tiny_model / "tokenizer.json").unlink()
    store = stored(tiny_model, tmp_path / "store", Recipe())
    with pytest.raises(StoreError, match=r"no tokenizer\.json"):
        load(store)
    with pytest.raises(BincompressError, match="7 bits per segment; expected 6, 8 or 16"):
        load(store, activation_bits=7)
    with pytest.raises(BincompressError, match="kernel 'abacus' is unknown"):
        load(store, kernel="abacus")
    monkeypatch.setattr(
        "bincompress.process.machine.psutil.virtual_memory", lambda: type("Memory", (), {"available": 10_000_000})
    )
    with pytest.raises(TooLittleMemoryError, match=r"needs about \d+ MB of memory, 10 MB are free"):
        load_decoder(store, 1, ActivationSettings())
    monkeypatch.undo()
    name = "model.layers.1.mlp.up_proj.weight"
    chunk = tmp_path / "store" / "tensors" / name / "planes" / "c" / "0" / "0" / "0"
    content = chunk.read_bytes()
    chunk.write_bytes(content[:10] + b"\xff" + content[11:])
    with pytest.raises(DamagedError, match=rf"{name}: planes: its bytes are not those"):
        load_decoder(store, 1, ActivationSettings())
    chunk.write_bytes(content[:-1])
    with pytest.raises(DamagedError, match=rf"{name}: array planes cannot be read"):
        load_decoder(store, 1, ActivationSettings())
    chunk.write_bytes(content)
    norm = tmp_path / "store" / "plain" / "model.norm.weight" / "c" / "0"
    content = norm.read_bytes()
    norm.write_bytes(b"\xff" + content[1:])
    with pytest.raises(DamagedError, match=r"model\.norm\.weight: array: its bytes are not those"):
        load_decoder(store, 1, ActivationSettings())
    norm.write_bytes(content)
    node = tmp_path / "store" / "tensors" / name / "zarr.json"
    found = json.loads(node.read_text())
    cases: list[tuple[dict[str, Any], str]] = [
        ({"terms": [1]}, "1 terms do not fit 2 planes and coef"),
        ({"terms": [1, 4]}, "terms: 4; expected a whole number from 0 to 3"),
        ({"terms": [2, 2]}, "terms: one of 2 is there twice"),
        ({"terms": 3}, "attributes are not those of a packed tensor"),
        ({"mix": [[1.0], [1.0, 0.0]]}, "mix: .*; expected rows of 2 factors"),
        ({"mix": [[1.0, 0.0], [0.0, float("inf")]]}, "mix: a factor is no number of at most"),
        ({"mix": [[1.0, 0.0], [0.0, 10**400]]}, "attributes are not those of a packed tensor"),
        ({"mix": []}, "2 terms do not fit"),
        ({"mix": 3}, "mix: 3; expected rows of 2 factors"),
        ({"coef_exponent": 10**40}, "coef_exponent: 10+; expected a whole number from -500 to 500"),
        ({"block": "x"}, "block: 'x'; expected a whole number"),
        ({"block": float("inf")}, "block: inf; expected a whole number"),
        ({"block": 32}, "block 32 is no multiple of 64 and less than the 64 columns"),
        ({"block": 0}, "block: 0; expected a whole number"),
        ({"shape": None}, "shape: None; expected a list of whole numbers"),
        ({"shape": [160, 1e999]}, "shape: .*; expected a list of whole numbers"),
        ({"report": None}, "its attributes are not those that were written"),
        ({"hashes": {}}, "planes: its bytes are not those"),
        ({"hashes": None}, "planes: its bytes are not those"),
    ]
    for change, message in cases:
        node.write_text(json.dumps({**found, "attributes": {**found["attributes"], **change}}))
        with pytest.raises(DamagedError, match=message):
            load_decoder(store, 1, ActivationSettings())
    for damaged in ("[" * 100_000, "[1]", '{"attributes": 5}'):
        node.write_text(damaged)
        with pytest.raises(DamagedError, match=rf"{name}: zarr\.json is not readable"):
            load_decoder(store, 1, ActivationSettings())
    shutil.rmtree(tmp_path / "store" / "tensors" / name)
    with pytest.raises(StoreError, match=f"{name} is not complete"):
        load_decoder(store, 1, ActivationSettings())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coef": np.ones((1, 1, 1), np.float16)}, "does not fit 2 rows of 2 blocks"),  # it would be read beyond
        ({"coef": np.ones((1, 2, 2), np.float64)}, "coef .* float64 does not fit"),
        ({"planes": np.zeros((0, 2, 4), np.uint64)}, "terms: 1; expected a whole number from 0 to 0"),
        ({"shape": [0, 200]}, "shape: 0; expected"),
        ({"shape": [True, 200]}, "shape: True; expected"),
        ({"listed_index": np.array([5, 3], np.uint64), "listed_value": np.ones(2, np.float32)}, "not in ascending"),
        ({"listed_index": np.array([400], np.uint64), "listed_value": np.ones(1, np.float32)}, "outside the matrix"),
        ({"listed_index": np.array([-1]), "listed_value": np.ones(1, np.float32)}, "listed weights: .* int64 places"),
    ],
)
def test_arrays_that_no_program_wrote_are_refused(changes: dict[str, object], message: str) -> None:
    assert packed_tensor().shape == (2, 200)
    with pytest.raises(ValueError, match=message):
        packed_tensor(**changes)


def test_an_unfinished_store_and_an_unknown_architecture(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = np.nan
    model = write_model(tmp_path / "model", tensors, tiny_config())
    compress(make_plan(open_checkpoint(model), Recipe()), str(tmp_path / "store"))
    with pytest.raises(StoreError, match="not complete; run the same"):
        load_decoder(str(tmp_path / "store"), 1, ActivationSettings())
    config = {**tiny_config(), "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"}
    model = write_model(tmp_path / "gemma", tiny_tensors(), config)
    store = stored(model, tmp_path / "gemma-store", Recipe())
    with pytest.raises(UnsupportedModelError, match="Gemma2ForCausalLM"):
        load_decoder(store, 1, ActivationSettings())
