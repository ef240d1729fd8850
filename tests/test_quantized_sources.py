"""Quantized checkpoints as a source: are the values those of the format's definition, is the rest refused by name?"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from bincompress.compression.plan import Plan, make_plan
from bincompress.compression.recipe import load_recipe
from bincompress.compression.run import compress
from bincompress.errors import CheckpointError
from bincompress.inference.load import load_decoder
from bincompress.model.checkpoint_source import load_checkpoint
from bincompress.model.packed_linear import ActivationSettings
from bincompress.sources.checkpoint import open_checkpoint, read_weight
from bincompress.store.export import export
from bincompress.store.store import open_store
from tests.conftest import Run, tiny_config, tiny_tensors, write_model
from tests.quantized import FORMS, Form, compressed, fp8, mxfp4, quantized

LAYERS = 1
KEPT = load_recipe(None, {}, ("*",))
UP = "model.layers.0.mlp.up_proj"


def written(folder: Path, form: Callable[[int, int], Form], **config: Any) -> tuple[Path, dict[str, Form]]:
    """A tiny Llama (inner size 160, which blocks of 48 and 128 do not divide) whose layers are stored in a form."""
    stored, forms = quantized(tiny_tensors(layers=LAYERS), form)
    declared = next(iter(forms.values())).config | config
    return write_model(folder, stored, tiny_config(layers=LAYERS) | {"quantization_config": declared}), forms


def plan_of(folder: Path, recipe: Any = None) -> Plan:
    return make_plan(open_checkpoint(folder), recipe or load_recipe(None, {}))


@pytest.mark.parametrize("kind", FORMS)
def test_values_are_those_of_the_definition(tmp_path: Path, kind: str) -> None:
    folder, forms = written(tmp_path / "m", FORMS[kind])
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint.tensors) == set(tiny_tensors(layers=LAYERS))
    assert "quantization_config" not in checkpoint.config
    for name, form in forms.items():
        np.testing.assert_array_equal(read_weight(checkpoint.tensors[name]).float32(), form.values, err_msg=name)
    formats = {form.format for form in forms.values()}
    (note,) = checkpoint.notes
    assert all(f"tensors from {named}" in note for named in formats)


@pytest.mark.parametrize("kind", ["fp8 blocks", "gptq 4 order", "int4 group zeros", "float channel"])
def test_a_store_of_it_runs_and_comes_out_unquantized(tmp_path: Path, kind: str) -> None:
    folder, forms = written(tmp_path / "m", FORMS[kind])
    store = str(tmp_path / "store")
    assert compress(plan_of(folder, KEPT), store).complete
    opened = open_store(store)
    for name, form in forms.items():
        np.testing.assert_array_equal(opened.read_plain(name)[0].float32(), form.values)
        assert opened.report(name)["source_format"] == form.format
    baseline, loaded = load_checkpoint(folder), load_decoder(store, 1, ActivationSettings(16)).decoder
    ids = [1, 5, 9]
    expected = baseline.logits(ids, baseline.new_cache(3))
    np.testing.assert_allclose(loaded.logits(ids, loaded.new_cache(3)), expected, atol=1e-4)
    out = export(opened, tmp_path / "out")
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert "source_format" not in opened.report("model.norm.weight")


@pytest.mark.slow  # PyTorch
def test_mxfp4_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    name, form = "model.layers.0.mlp.experts.gate_up_proj", mxfp4(2, 24, 96)
    config = {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "quantization_config": form.config}
    folder = write_model(tmp_path / "m", {name + end: part for end, part in form.parts.items()}, config)
    tensors = open_checkpoint(folder).tensors
    parts = [torch.from_numpy(form.parts[end]) for end in ("_blocks", "_scales")]
    theirs = convert_moe_packed_tensors(*parts).float().numpy()
    np.testing.assert_array_equal(theirs, form.values)
    for expert in range(2):  # each expert's matrices, whose rows take turns among the outputs
        for number, part in enumerate(("gate_proj", "up_proj")):
            weight = read_weight(tensors[f"model.layers.0.mlp.experts.{expert}.{part}.weight"])
            assert weight.dtype == "BF16"
            np.testing.assert_array_equal(weight.float32(), theirs[expert, :, number::2].T)
    plan = plan_of(folder)
    assert not plan.verdict.runs
    assert compress(plan, str(tmp_path / "store")).complete


@pytest.mark.slow  # PyTorch
def test_fp8_is_what_transformers_dequantizes(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    folder, forms = written(tmp_path / "m", lambda rows, cols: fp8(rows, cols, (32, 32)))
    checkpoint = open_checkpoint(folder)
    for name, form in forms.items():
        weight = torch.from_numpy(form.parts["weight"].view(np.uint8)).view(torch.float8_e4m3fn)
        scale = torch.from_numpy(form.parts["weight_scale_inv"])
        theirs = Fp8Dequantize(None)._dequantize_one(weight, scale).numpy()  # type: ignore[no-untyped-call]
        np.testing.assert_array_equal(read_weight(checkpoint.tensors[name]).float32(), theirs)


@pytest.mark.slow  # PyTorch
@pytest.mark.parametrize("kind", [kind for kind in FORMS if kind.startswith(("int", "float")) and "order" not in kind])
def test_compressed_tensors_is_what_its_package_decompresses(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("compressed_tensors")
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    folder, forms = written(tmp_path / "m", FORMS[kind])
    checkpoint = open_checkpoint(folder)
    views = {ml_dtypes.bfloat16: torch.bfloat16, ml_dtypes.float8_e4m3fn: torch.float8_e4m3fn}

    def tensor(array: Any) -> Any:
        view = views.get(array.dtype.type)
        return torch.from_numpy(array.view(f"i{array.dtype.itemsize}")).view(view) if view else torch.from_numpy(array)

    for name, form in forms.items():
        config = QuantizationConfig.model_validate(form.config)
        scheme = config.config_groups["group_0"]
        state = {end: tensor(part) for end, part in form.parts.items()}
        theirs = BaseCompressor.load_from_registry(form.config["format"]).decompress(state, scheme)["weight"]
        ours = read_weight(checkpoint.tensors[name]).float32()
        np.testing.assert_array_equal(ours, theirs.float().numpy(), err_msg=name)


def test_memory_is_planned_for_the_values(tmp_path: Path) -> None:
    folder, _ = written(tmp_path / "m", FORMS["gptq 4"])
    plan = plan_of(folder, KEPT)
    planned = next(tensor for tensor in plan.tensors if tensor.source.name == f"{UP}.weight")
    assert planned.expected_bytes == 4 * 160 * 64
    assert planned.source.nbytes < 160 * 64
    assert planned.peak_memory > planned.expected_bytes + planned.source.nbytes


def test_headers_alone_make_the_same_plan(tmp_path: Path) -> None:
    from bincompress.sources.checkpoint import checkpoint_of

    folder, _ = written(tmp_path / "m", FORMS["int4 group zeros"])
    whole = open_checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    from bincompress.sources.checkpoint import read_header

    parts = {t.name: t.moved(lambda file: Path(file).name) for t in read_header(folder / "model.safetensors")}
    alone = checkpoint_of(Path(), "m", "", config, parts)
    assert {name: t.shape for name, t in alone.tensors.items()} == {n: t.shape for n, t in whole.tensors.items()}


def test_fused_matrices_are_parts_of_what_is_decoded(tmp_path: Path) -> None:
    form = compressed(96, 64, 4, "group")
    config = {
        "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "hidden_size": 64, "intermediate_size": 48,
        "num_attention_heads": 2, "num_key_value_heads": 1, "quantization_config": form.config,
    }  # fmt: skip
    name = "model.layers.0.mlp.gate_up_proj."
    folder = write_model(tmp_path / "m", {name + end: part for end, part in form.parts.items()}, config)
    tensors = open_checkpoint(folder).tensors
    gate, up = (read_weight(tensors[f"model.layers.0.mlp.{part}_proj.weight"]).float32() for part in ("gate", "up"))
    np.testing.assert_array_equal(np.concatenate([gate, up]), form.values)


def test_an_order_of_columns_that_is_none_changes_nothing(tmp_path: Path) -> None:
    stored, forms = quantized(tiny_tensors(layers=LAYERS), FORMS["int4 group"])
    for name, form in forms.items():
        stored[f"{name}_g_idx"] = np.full(form.values.shape[1], -1, np.int32)
    declared = json.loads(json.dumps(next(iter(forms.values())).config))
    declared["config_groups"]["group_0"]["weights"]["actorder"] = "weight"
    folder = write_model(tmp_path / "m", stored, tiny_config(layers=LAYERS) | {"quantization_config": declared})
    for name, form in forms.items():
        np.testing.assert_array_equal(read_weight(open_checkpoint(folder).tensors[name]).float32(), form.values)


def test_integers_a_byte_are_read_in_their_order_of_columns(tmp_path: Path) -> None:
    folder, forms = written(tmp_path / "m", lambda r, c: compressed(r, c, 8, "group", packed=False, order=True))
    stored = safetensors.numpy.load_file(folder / "model.safetensors")
    assert any(name.endswith("_g_idx") for name in stored)
    for name, form in forms.items():
        np.testing.assert_array_equal(read_weight(open_checkpoint(folder).tensors[name]).float32(), form.values)


def test_a_group_size_of_minus_one_means_channels(tmp_path: Path) -> None:
    stored, forms = quantized(tiny_tensors(layers=LAYERS), FORMS["int8 channel"])
    declared = json.loads(json.dumps(next(iter(forms.values())).config))
    weights = declared["config_groups"]["group_0"]["weights"]
    del weights["strategy"]
    weights["group_size"] = -1
    folder = write_model(tmp_path / "m", stored, tiny_config(layers=LAYERS) | {"quantization_config": declared})
    for name, form in forms.items():
        np.testing.assert_array_equal(read_weight(open_checkpoint(folder).tensors[name]).float32(), form.values)


def test_fields_that_nothing_reads_are_named(tmp_path: Path) -> None:
    folder, _ = written(tmp_path / "m", FORMS["gptq 4"], sym=True, damp_percent=0.1, unheard_of=3, kernel=None)
    assert "fields of quantization_config that are not read: unheard_of" in open_checkpoint(folder).notes


# What is refused, each in one line and before any work

Change = Callable[[dict[str, Any], dict[str, Any]], None]  # of tensors and of quantization_config


def without(end: str) -> Change:
    def apply(tensors: dict[str, Any], config: dict[str, Any]) -> None:
        del tensors[f"{UP}.{end}"]

    return apply


def with_part(end: str, change: Callable[[Any], Any]) -> Change:
    def apply(tensors: dict[str, Any], config: dict[str, Any]) -> None:
        tensors[f"{UP}.{end}"] = np.ascontiguousarray(change(tensors[f"{UP}.{end}"]))

    return apply


def says(**values: Any) -> Change:
    return lambda tensors, config: config.update(values)


def weights_say(**values: Any) -> Change:
    return lambda tensors, config: config["config_groups"]["group_0"]["weights"].update(values)


def with_group(**values: Any) -> Change:
    def apply(tensors: dict[str, Any], config: dict[str, Any]) -> None:
        first = config["config_groups"]["group_0"]
        config["config_groups"]["group_1"] = first | {"weights": first["weights"] | values}

    return apply


def not_finite(scale: Any) -> Any:
    changed = scale.copy()
    changed.flat[-1] = np.nan
    return changed


def unquantized(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    tensors.clear()
    tensors.update(tiny_tensors(layers=LAYERS))


REFUSED: list[tuple[str, Change, str]] = [
    ("fp8 blocks", without("weight_scale_inv"), r"up_proj\.weight_scale_inv: missing; .*needs it"),
    ("fp8 blocks", without("weight"), r"weight_scale_inv: a scale, but the weight that it belongs to is missing"),
    ("fp8 blocks", with_part("weight_scale_inv", lambda s: s[:-1]), r"shape \[3, 2\]; expected \[4, 2\]"),
    ("fp8 blocks", with_part("weight_scale_inv", lambda s: s.T), r"shape \[2, 4\]; expected \[4, 2\]"),
    ("fp8 blocks", with_part("weight_scale_inv", not_finite), r"up_proj\.weight_scale_inv: holds a scale that is not"),
    ("fp8 blocks", with_part("weight_scale_inv", lambda s: s.astype(np.int32)), "dtype I32; expected F32 or F16"),
    ("fp8 blocks", with_part("weight", lambda w: w.astype(ml_dtypes.bfloat16)), "it belongs to is BF16"),
    ("fp8 blocks", with_part("weight", lambda w: w.astype(ml_dtypes.float8_e5m2)), "F8_E5M2 .* F8_E4M3 are read"),
    ("fp8 blocks", says(weight_block_size=[48, 0]), "weight_block_size: expected rows and columns"),
    ("fp8 blocks", says(weight_block_size=None), r"weight_scale_inv: shape \[.*by config.json: quantization_config"),
    ("fp8 blocks", says(fmt="e5m2"), "fmt = 'e5m2' is not read"),
    ("fp8 blocks", says(modules_to_not_convert=["up_proj"]), r"up_proj\.weight: is quantized, but .* says that it is"),
    ("fp8 blocks", says(modules_to_not_convert="up_proj"), "modules_to_not_convert: expected a list of names"),
    ("fp8 blocks", says(modules_to_not_convert=["(a+)+$"]), r"pattern .* is not understood"),
    ("fp8 blocks", unquantized, "says fp8, but no tensor is quantized so"),
    ("gptq 4", unquantized, "says gptq, but no tensor is quantized so"),
    ("gptq 4", without("qzeros"), r"up_proj\.qzeros: missing"),
    ("gptq 4", without("scales"), r"up_proj\.scales: missing"),
    ("gptq 4 order", without("g_idx"), r"up_proj\.g_idx: missing"),
    ("gptq 4 order", with_part("g_idx", lambda g: g + 1), r"g_idx: groups 1 to 2; expected 0 to 1"),
    ("gptq 4", with_part("g_idx", lambda g: g - 1), r"g_idx: groups -1 to 0; expected 0 to 1"),
    ("gptq 4", with_part("g_idx", lambda g: g[1:]), r"g_idx: shape \[63\]; expected \[64\]"),
    ("gptq 4", with_part("scales", not_finite), r"scales: holds a scale that is not a finite number"),
    ("gptq 4", with_part("scales", lambda s: s.T), r"scales: shape \[160, 2\]; expected \[2, 160\]"),
    ("gptq 4", says(group_size=24), r"qzeros: shape \[5, 8\]; expected \[7, 8\] .*with 4 bits and group_size 24"),
    ("gptq 4", says(bits=3), "bits = 3 is not read; known: 4, 8"),
    ("gptq 4", says(checkpoint_format="marlin"), "checkpoint_format = 'marlin' is not read"),
    ("gptq 4", says(dynamic={"-:.*up.*": {}}), "dynamic = .* is not read"),
    ("awq", says(version="gemv"), "version = 'gemv' is not read"),
    ("awq", says(group_size=24), r"down_proj.qweight: group_size 24 does not divide its 160 inputs"),
    ("awq", with_part("qzeros", lambda z: z[:1]), r"qzeros: shape \[1, 20\]; expected \[2, 20\]"),
    ("int4 group", without("weight_scale"), r"up_proj\.weight_scale: missing"),
    ("int4 group", without("weight_shape"), r"up_proj\.weight_shape: missing"),
    ("int4 group", with_part("weight_shape", lambda s: s + [1, 0]), r"weight_shape: says \[161, 64\]"),
    ("int4 group", with_part("weight_shape", lambda s: s * [1, 1 << 40]), r"weight_shape: says"),
    (
        "int4 group",
        weights_say(group_size=24),
        r"down_proj.weight_packed: group_size 24 does not divide its 160 columns",
    ),
    ("int4 group", weights_say(num_bits=3), "num_bits = 3 is not read"),
    ("int4 group", weights_say(symmetric=False), r"weight_zero_point: missing"),
    ("int4 group", says(format="nvfp4-pack-quantized"), "format = 'nvfp4-pack-quantized' is not read"),
    ("int4 group", says(ignore=[UP]), r"up_proj: is quantized, but .* ignores it"),
    ("int4 group", says(ignore=["re:.*up_proj"]), r"up_proj: is quantized, but .* ignores it"),
    ("int4 group", says(config_groups={}), "config_groups: expected groups of modules"),
    ("int4 group", says(transform_config={"config_groups": {"a": 1}}), "transform_config = .* is not read"),
    ("int4 group", says(sparsity_config={"format": "sparse-24-bitmask"}), "'sparse-24-bitmask' is not read"),
    ("int4 group", says(quantization_status="frozen"), "quantization_status = 'frozen' is not read"),
    ("int4 group order", with_part("weight_g_idx", lambda g: g + 5), r"weight_g_idx: groups 5 to 6; expected 0 to 1"),
    ("int4 group order", without("weight_g_idx"), r"up_proj\.weight_g_idx: missing; .*actorder"),
    (
        "int4 group order",
        with_part("weight_g_idx", lambda g: np.where(np.arange(len(g)) == 3, -1, g)),
        r"weight_g_idx: 1 of 64 columns have no group \(-1\)",
    ),
    ("int4 group order", with_part("weight_g_idx", lambda g: 0 * g - 1), r"weight_g_idx: 64 of 64 columns have no"),
    ("int4 group", weights_say(actorder="GROUP"), r"weight_g_idx: missing; .*actorder"),
    ("int4 group", weights_say(actorder="dynamic"), r"weight_g_idx: missing; .*actorder"),
    ("int4 group", weights_say(actorder="other"), "actorder = 'other' is not read"),
    ("int4 group", weights_say(strategy="channel"), "group_size = 32 contradicts strategy = 'channel'"),
    ("int4 group", weights_say(block_structure=[2, 2]), "block_structure contradicts strategy = 'group'"),
    ("int4 group", weights_say(rotated=True), "group_0: weights: rotated: not read"),
    ("int4 group", with_group(num_bits=8), "group_0 and group_1 both target it and differ; expected one"),
    ("int4 group", says(quant_method="Compressed_Tensors"), "is not known; expected 'compressed-tensors'"),
    ("gptq 4", says(quant_method="GPTQ"), "quant_method = 'GPTQ' is not known; expected 'gptq'"),
    ("gptq 4", says(desc_act="yes"), "desc_act = 'yes' is not read"),
    ("gptq 4", says(rotation="hadamard"), "rotation = 'hadamard' is not read"),
    ("awq", says(zero_point=False), "zero_point = False is not read"),
    ("awq", says(desc_act=True), "desc_act = True is not read"),
    ("int8 channel", without("weight_scale"), r"up_proj\.weight_scale: missing"),
    ("int8 channel", says(format="float-quantized"), "type = 'int' is not read; known: 'float'"),
    ("float channel", with_part("weight_scale", not_finite), "weight_scale: holds a scale that is not"),
]


@pytest.mark.parametrize(("kind", "change", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_does_not_fit_is_refused_before_any_work(
    tmp_path: Path, run: Run, kind: str, change: Change, message: str
) -> None:
    stored, forms = quantized(tiny_tensors(layers=LAYERS), FORMS[kind])
    declared = json.loads(json.dumps(next(iter(forms.values())).config))
    change(stored, declared)
    folder = write_model(tmp_path / "m", stored, tiny_config(layers=LAYERS) | {"quantization_config": declared})
    with pytest.raises(CheckpointError, match=message) as found:
        plan_of(folder)
    assert "\n" not in str(found.value)
    code, out, err = run("compress", folder, tmp_path / "store")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "store").exists()


def test_a_tensor_beside_what_it_is_made_of_is_refused(tmp_path: Path) -> None:
    stored, forms = quantized(tiny_tensors(layers=LAYERS), FORMS["gptq 4"])
    stored[f"{UP}.weight"] = np.zeros((160, 64), np.float32)
    config = tiny_config(layers=LAYERS) | {"quantization_config": next(iter(forms.values())).config}
    with pytest.raises(CheckpointError, match=r"up_proj\.weight: there beside .*up_proj\.qweight"):
        open_checkpoint(write_model(tmp_path / "m", stored, config))


def test_weights_that_are_not_finite_fail_by_name(tmp_path: Path) -> None:
    stored, forms = quantized(tiny_tensors(layers=LAYERS), FORMS["fp8 tensor"])
    stored[f"{UP}.weight"].view(np.uint8)[3, 5] = 0x7F
    config = tiny_config(layers=LAYERS) | {"quantization_config": next(iter(forms.values())).config}
    folder = write_model(tmp_path / "m", stored, config)
    outcome = compress(plan_of(folder), str(tmp_path / "store"))
    assert list(outcome.failures) == [f"{UP}.weight"]
    assert "nan at row 3, column 5" in outcome.failures[f"{UP}.weight"]


def test_groups_of_modules_are_told_apart(tmp_path: Path) -> None:
    eight = compressed(64, 64, 8, "channel", dtype=np.float32)
    stored, forms = quantized(
        tiny_tensors(layers=LAYERS), lambda r, c: compressed(r, c, 8, "channel", dtype=np.float32) if r == c
        else compressed(r, c, 4, "group")
    )  # fmt: skip
    four = forms[f"{UP}.weight"].config
    group = eight.config["config_groups"]["group_0"] | {"targets": ["re:.*self_attn\\.[qkvo]_proj$"]}
    declared = four | {"config_groups": four["config_groups"] | {"group_1": group}}
    folder = write_model(tmp_path / "m", stored, tiny_config(layers=LAYERS) | {"quantization_config": declared})
    checkpoint = open_checkpoint(folder)
    for name, form in forms.items():
        np.testing.assert_array_equal(read_weight(checkpoint.tensors[name]).float32(), form.values)


def test_scales_of_activations_are_not_used_and_the_plan_says_so(tmp_path: Path, run: Run) -> None:
    stored, forms = quantized(tiny_tensors(layers=LAYERS), FORMS["fp8 tensor"])
    stored[f"{UP}.input_scale"] = np.ones((), np.float32)
    stored["model.layers.0.self_attn.k_scale"] = np.ones(1, np.float32)
    config = tiny_config(layers=LAYERS) | {"quantization_config": next(iter(forms.values())).config}
    folder = write_model(tmp_path / "m", stored, config)
    code, _, err = run("compress", folder, tmp_path / "store")
    assert code == 0
    assert "2 scales of activations are not used" in err
    assert "dequantized as they are read: 7 tensors from FP8, one scale" in err


def test_a_file_that_shrank_meanwhile_fails_by_name(tmp_path: Path) -> None:
    folder, _ = written(tmp_path / "m", FORMS["awq"])
    checkpoint = open_checkpoint(folder)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    safetensors.numpy.save_file({"x": next(iter(tensors.values()))}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="has it changed since"):
        read_weight(checkpoint.tensors["model.layers.0.mlp.up_proj.weight"])
