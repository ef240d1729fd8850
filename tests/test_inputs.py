"""Checkpoints as they are in the world: what comes into a store, runs from it and comes out again."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from bincompress.compression.plan import Plan, make_plan
from bincompress.compression.recipe import load_recipe
from bincompress.compression.run import compress
from bincompress.errors import CheckpointError, RecipeError, StoreError
from bincompress.inference.load import load_decoder
from bincompress.model.checkpoint_source import load_checkpoint
from bincompress.model.packed_linear import ActivationSettings
from bincompress.sources.checkpoint import open_checkpoint
from bincompress.store.export import export
from bincompress.store.store import open_store
from bincompress.store.verify import verify
from tests.conftest import tiny_config, tiny_tensors, write_model
from tests.test_model_tokenizer import byte_level

KEPT = load_recipe(None, {}, ("*",))
EXACT = ActivationSettings(16)


def plan_of(folder: Path, recipe: Any = None) -> Plan:
    return make_plan(open_checkpoint(folder), recipe or load_recipe(None, {}))


def logits(decoder: Any) -> np.ndarray:
    found: np.ndarray = decoder.logits([1, 5, 9], decoder.new_cache(3))
    return found


def everything(value: Any) -> dict[str, Any]:
    """Every dtype and odd shape, beside what the decoder needs."""
    random = np.random.default_rng(0)
    bits = random.integers(0, 2, (3, 4))
    odd = {
        "buffers.flags": bits.astype(np.bool_), "buffers.ids.weight": np.arange(6).reshape(1, 6),
        "buffers.double": random.standard_normal((2, 3)), "buffers.bytes": bits.astype(np.uint8),
        "buffers.i8": bits.astype(np.int8), "buffers.i16": bits.astype(np.int16), "buffers.i32": bits.astype(np.int32),
        "buffers.u16": bits.astype(np.uint16), "buffers.u32": bits.astype(np.uint32),
        "buffers.u64": bits.astype(np.uint64), "buffers.scalar": np.array(1.5, np.float32),
        "buffers.scalar16": np.array(1.5, ml_dtypes.bfloat16), "buffers.flag": np.array(True),
        "buffers.count": np.array(7, np.int64), "buffers.none": np.empty((0, 4), np.float16),
        "buffers.none64": np.empty((4, 0), np.int64), "buffers.cube.weight": random.standard_normal((2, 3, 4)),
    }  # fmt: skip
    return odd | value  # type: ignore[no-any-return]


@pytest.mark.parametrize("archive", [False, True])
def test_every_dtype_and_shape_comes_back_bit_by_bit(tmp_path: Path, archive: bool) -> None:
    tensors = everything(tiny_tensors(layers=1))
    folder = write_model(tmp_path / "m", tensors, tiny_config(layers=1))
    store = str(tmp_path / "store")
    plan = make_plan(open_checkpoint(folder), KEPT, archive=archive)
    assert compress(plan, store).complete
    assert not [problem for _, problem in verify(open_store(store)) if problem]
    out = export(open_store(store), tmp_path / "out")
    found = safetensors.numpy.load_file(out / "model-00001-of-00001.safetensors")
    assert sorted(found) == sorted(tensors)
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert found[name].tobytes() == tensor.tobytes(), name
    ours, theirs = logits(load_decoder(store, 1, EXACT).decoder), logits(load_checkpoint(folder))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)  # a few tokens of bf16 are added up in another order
    assert any("I64, which the decoder does not read" in line for line in plan.kept_lines())


def test_what_the_decoder_needs_in_another_dtype_is_refused_in_the_plan(tmp_path: Path) -> None:
    tensors = tiny_tensors(layers=1)
    tensors["model.norm.weight"] = np.ones(64)
    folder = write_model(tmp_path / "m", tensors, tiny_config(layers=1))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: dtype F64, and the decoder needs it"):
        plan_of(folder)


QUANTIZED: list[tuple[str, str, Any, str]] = [
    ("weight", "bitsandbytes", np.zeros((2048, 1), np.uint8), "bitsandbytes, as config.json says"),
    ("weight.absmax", "", np.zeros(4, np.float32), r"bitsandbytes \(4 bits\)"),
    ("SCB", "", np.zeros(4, np.float32), r"bitsandbytes \(8 bits\)"),
    ("W_q", "hqq", np.zeros((8, 8), np.uint8), "hqq, as config.json says"),
    ("absmax", "bitsandbytes", np.zeros(8, np.float32), "bitsandbytes, as config.json says"),
    ("qweight", "", np.zeros((8, 8), np.int32), "GPTQ or AWQ"),
    ("weight_packed", "", np.zeros((8, 8), np.int32), "compressed-tensors"),
    ("weight", "", np.zeros((64, 64), ml_dtypes.float8_e4m3fn), "FP8"),
    ("weight_scale_inv", "", np.zeros((1, 1), np.float32), "FP8"),
    ("weight_blocks", "quark", np.zeros((2, 2, 2, 16), np.uint8), "quark, as config.json says"),
    ("weight", "", np.zeros((64, 64), np.int8), "its weights are I8"),
]


@pytest.mark.parametrize(("end", "method", "value", "message"), QUANTIZED)
@pytest.mark.parametrize("known", [True, False])
def test_a_quantized_source_is_named(
    tmp_path: Path, end: str, method: str, value: Any, message: str, known: bool
) -> None:
    config = tiny_config(layers=1) | ({"quantization_config": {"quant_method": method}} if method else {})
    config |= {} if known else {"architectures": ["OtherModel"], "model_type": "other"}
    tensors = tiny_tensors(layers=1)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    folder = write_model(tmp_path / "m", tensors | {f"model.layers.0.mlp.up_proj.{end}": value}, config)
    with pytest.raises(CheckpointError, match=rf"quantized already \({message}.*\); .*give the unquantized model"):
        plan_of(folder)


def test_infinity_in_config_json_makes_a_store_that_is_json(tmp_path: Path) -> None:
    config = tiny_config(layers=1) | {"limits": [0.0, float("inf"), -float("inf")], "other": {"x": float("nan")}}
    folder = write_model(tmp_path / "m", tiny_tensors(layers=1), config)
    assert "Infinity" in (folder / "config.json").read_text()
    assert compress(plan_of(folder), str(tmp_path / "store")).complete

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    for path in (tmp_path / "store").rglob("zarr.json"):
        json.loads(path.read_text(), parse_constant=refuse)
    kept = open_store(str(tmp_path / "store")).attributes["config"]
    assert kept["limits"] == [0.0, {"__float__": "Infinity"}, {"__float__": "-Infinity"}]
    assert kept["other"] == {"x": {"__float__": "NaN"}}


def test_assets_of_every_loader_come_along_and_code_does_not(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", tiny_tensors(layers=1), tiny_config(layers=1))
    wanted = (
        "tokenizer.json", "tokenizer.model", "tokenizer.model.v3", "vocab.json", "merges.txt", "added_tokens.json",
        "spiece.model", "qwen.tiktoken", "tekken.json", "preprocessor_config.json", "chat_template.json",
        "additional_chat_templates/tool_use.jinja", "additional_chat_templates/rag.jinja",
    )  # fmt: skip
    for name in (
        *wanted,
        "modeling_x.py",
        "tokenizer.py",
        "additional_chat_templates/x.py",
        "run.sh",
        "a.bin",
        "x.pkl",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"content of {name}")
    store = open_store(_stored(folder, tmp_path / "store"))
    assert sorted(store.read_assets()) == sorted([*wanted, "config.json"])
    out = export(store, tmp_path / "out")
    for name in wanted:
        assert (out / name).read_text() == f"content of {name}"
    assert not list(out.rglob("*.py"))


def _stored(folder: Path, store: Path) -> str:
    assert compress(plan_of(folder), str(store)).complete
    return str(store)


def test_the_same_command_takes_over_assets_that_changed(tmp_path: Path, tree: Any) -> None:
    folder = write_model(tmp_path / "m", tiny_tensors(layers=1), tiny_config(layers=1))
    (folder / "merges.txt").write_text("old")
    store = tmp_path / "store"
    _stored(folder, store)
    before = tree(store)
    (folder / "tokenizer.json").write_bytes(byte_level())
    (folder / "generation_config.json").write_text("{}")
    (folder / "merges.txt").unlink()
    outcome = compress(plan_of(folder), str(store))
    assert (outcome.done, outcome.complete) == (0, True)
    found = open_store(str(store)).read_assets()
    assert sorted(found) == ["config.json", "generation_config.json", "tokenizer.json"]
    assert found["tokenizer.json"] == byte_level()
    after = tree(store)
    assert {key: value for key, value in after.items() if not key.startswith("assets/")} == {
        key: value for key, value in before.items() if not key.startswith("assets/")
    }
    assert open_store(str(store)).refresh_assets(found) == []
    assert tree(store) == after


def test_an_asset_whose_name_leads_out_of_the_folder_is_damage(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", tiny_tensors(layers=1), tiny_config(layers=1))
    store = tmp_path / "store"
    _stored(folder, store)
    (store / "assets" / "config.json").rename(store / "assets" / "..%2Fevil")
    with pytest.raises(StoreError, match="expected the name of a file"):
        export(open_store(str(store)), tmp_path / "out")
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("embeddings", ["keep", "8bit"])
@pytest.mark.parametrize("same", [True, False])
def test_a_tied_head_in_a_store(tmp_path: Path, embeddings: str, same: bool) -> None:
    tensors = tiny_tensors(layers=1)
    if same:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    folder = write_model(tmp_path / "m", tensors, tiny_config(layers=1) | {"tie_word_embeddings": True})
    plan = plan_of(folder, load_recipe(None, {"embeddings": embeddings}))
    assert (
        [note for note in plan.verdict.notes if "lm_head.weight is used" in note] == [] if same else plan.verdict.notes
    )
    compress(plan, str(tmp_path / "store"))
    loaded = load_decoder(str(tmp_path / "store"), 1, EXACT)
    assert loaded.decoder.config.tied is same
    exported = load_checkpoint(export(open_store(str(tmp_path / "store")), tmp_path / "out"))
    np.testing.assert_allclose(logits(loaded.decoder), logits(exported), rtol=0.05, atol=0.05)


FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"architectures": ["OtherModel"], "model_type": "other"}, "architecture OtherModel is not supported"),
    ({"rope_scaling": {"type": "ntk", "factor": 2.0}}, "rope type 'ntk' is not supported"),
    ({"quantization_config": {"quant_method": "hqq"}}, "quantization_config = 'hqq' is not supported"),
    ({"num_hidden_layers": 2}, "model.layers.1.input_layernorm.weight and 8 more tensors are missing"),
]


@pytest.mark.parametrize(("change", "message"), FAULTS)
def test_a_store_that_will_not_run_is_told_before_the_work(tmp_path: Path, change: Any, message: str) -> None:
    folder = write_model(tmp_path / "m", tiny_tensors(layers=1), tiny_config(layers=1) | change)
    (folder / "tokenizer.json").write_bytes(byte_level())
    verdict = plan_of(folder).verdict
    assert not verdict.runs
    assert verdict.line().startswith("will compress and export, but not run here: ")
    assert message in verdict.line()
    with pytest.raises(RecipeError, match="--export-only compresses it all the same"):
        verdict.require(export_only=False)
    verdict.require(export_only=True)


def test_tokenizers_are_looked_at_before_the_work(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", tiny_tensors(layers=1), tiny_config(layers=1))
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"x")
    assert "has no tokenizer.json (it can be made of tokenizer.model: " in plan_of(folder).verdict.line()
    (folder / "tokenizer.json").write_text("{")
    assert plan_of(folder).verdict.faults[0].startswith("tokenizer.json: cannot be read")
    (folder / "tokenizer.json").write_bytes(byte_level())
    verdict = plan_of(folder).verdict
    assert (verdict.runs, verdict.line()) == (True, "this store will run here")
    verdict.require(export_only=False)


def test_what_generating_and_chatting_will_refuse_is_told_before_the_work(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", tiny_tensors(layers=1), tiny_config(layers=1))
    (folder / "generation_config.json").write_text('{"do_sample": true, "temperature": "0.7"}')
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}")
    verdict = plan_of(folder).verdict
    assert verdict.runs
    assert [note.split(":")[0] for note in verdict.notes] == ["generation_config.json", "chat template"]
    assert "temperature: expected a number, found '0.7'; text is generated only where" in verdict.notes[0]
    assert verdict.notes[1].endswith("; chat will refuse it")


@pytest.mark.parametrize(("prefix", "told"), [("model.", False), ("", False), ("module.model.", True)])
def test_names_that_transformers_does_not_find_are_told(tmp_path: Path, prefix: str, told: bool) -> None:
    found = {
        prefix + name.removeprefix("model.") if name.startswith("model.") else name: tensor
        for name, tensor in tiny_tensors(layers=1).items()
    }
    notes = plan_of(write_model(tmp_path / "m", found, tiny_config(layers=1))).verdict.notes
    assert [note.split(":")[0] for note in notes] == (["names of tensors begin with 'module.model.'"] if told else [])


def test_a_quantization_config_that_names_no_method_is_shown_as_it_is(tmp_path: Path) -> None:
    config = tiny_config(layers=1) | {"quantization_config": {"bits": 4}}
    verdict = plan_of(write_model(tmp_path / "m", tiny_tensors(layers=1), config)).verdict
    assert verdict.faults == ("config.json: quantization_config = {'bits': 4} is not supported; only None is",)


def test_a_plan_of_headers_alone_asks_for_no_weights(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", tiny_tensors(layers=1), tiny_config(layers=1) | {"tie_word_embeddings": True})
    checkpoint = open_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    assert make_plan(checkpoint, load_recipe(None, {})).verdict.runs
