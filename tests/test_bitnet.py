"""BitNet b1.58 in every form that transformers knows: read exactly, and run with the roundings it was trained with."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bincompress.errors import CheckpointError
from bincompress.inference.load import load_decoder
from bincompress.model.checkpoint_source import load_checkpoint
from bincompress.model.packed_linear import ActivationSettings
from bincompress.sources.checkpoint import open_checkpoint, read_weight
from bincompress.store.store import open_store
from bincompress.tensors.dequantize import dequantize
from tests.conftest import Run, tiny_tokenizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
with pytest.MonkeyPatch.context() as patch:  # its functions are compiled when they are imported, which takes minutes
    patch.setattr(torch, "compile", lambda function: function)
    from transformers.integrations.bitnet import pack_weights, replace_with_bitnet_linear

pytestmark = pytest.mark.slow  # PyTorch and transformers

VOCAB = 101
# Sizes that packing's quarters divide, and no kernel's step.
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 72, "intermediate_size": 100, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": None,
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
FORMS = {
    "packed": {"linear_class": "autobitlinear", "quantization_mode": "offline"},
    "packed, divided": {"linear_class": "bitlinear", "quantization_mode": "offline"},
    "packed, divided, by default": {},
    "bf16, rounded by the model": {"linear_class": "autobitlinear", "quantization_mode": "online"},
}
Weights = dict[str, NDArray[np.float32]]


def saved(folder: Path, form: dict[str, Any], kind: str = "BitNet") -> tuple[Any, Weights]:
    """Save a small random model in one of the forms; return transformers' model and what its layers multiply with."""
    from safetensors.torch import save_file

    torch.manual_seed(3)
    config = getattr(transformers, f"{kind}Config")(**SIZES, attn_implementation="eager")
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float().eval()
    live, stored, exact = {}, {}, {}
    divided, online = form.get("linear_class") != "autobitlinear", form.get("quantization_mode") == "online"
    for name, parameter in model.state_dict().items():
        middle, spread = (1.0, 0.3) if parameter.ndim == 1 else (0.0, 0.25)
        stored[name] = (torch.randn_like(parameter) * spread + middle).to(torch.bfloat16)
        live[name] = value = stored[name].float()
        if parameter.ndim == 1 or ".layers." not in name:
            continue
        if online:
            mean = value.abs().mean()
            exact[name] = ((value / mean).round().clamp(-1, 1) * mean).numpy()
            continue
        ternary, scale = torch.randint(-1, 2, value.shape).float(), (torch.rand(1) * 0.2 + 0.1).to(torch.bfloat16)
        stored[name], stored[f"{name}_scale"] = pack_weights(ternary.clone()), scale
        live[name], live[f"{name}_scale"] = stored[name] if divided else ternary, scale.float()
        exact[name] = (ternary / scale.float() if divided else ternary * scale.float()).numpy()
    replace_with_bitnet_linear(model, ["lm_head"], transformers.BitNetQuantConfig(**form))
    model.load_state_dict(live, strict=True, assign=True)
    folder.mkdir()
    save_file(stored, folder / "model.safetensors")
    written = json.loads(model.config.to_json_string()) | {"quantization_config": {"quant_method": "bitnet", **form}}
    (folder / "config.json").write_text(json.dumps(written | {"architectures": [f"{kind}ForCausalLM"]}))
    (folder / "tokenizer.json").write_text(json.dumps(tiny_tokenizer(VOCAB)))
    return model, exact


def their_logits(model: Any, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    with torch.no_grad():
        found: NDArray[np.float32] = model(torch.from_numpy(ids)[None]).logits[0].float().numpy()
    return found


def distance(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    """Return the median over tokens of the greatest difference.

    An input that lies half way between two steps, within float32's error, is rounded one way here and the other way
    there. It shifts that token's logits, and a little those after it: one token in some hundred.
    """
    return float(np.median(np.abs(ours - theirs).max(axis=1)) / np.abs(theirs).max())


@pytest.mark.parametrize(("form", "kind"), [*((form, "BitNet") for form in FORMS), ("packed, divided", "Llama")])
def test_weights_and_logits_are_those_of_transformers(form: str, kind: str, tmp_path: Path, run: Run) -> None:
    theirs, exact = saved(tmp_path / "model", FORMS[form], kind)
    checkpoint = open_checkpoint(tmp_path / "model")
    assert len(exact) == 14
    for name, expected in exact.items():
        found = read_weight(checkpoint.tensors[name]).float32()
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        assert len(np.unique(found)) == 3
    assert not any(name.endswith("_scale") for name in checkpoint.tensors)
    ids = np.random.default_rng(3).integers(0, VOCAB, 60)
    expected_logits = their_logits(theirs, ids)
    decoder = load_checkpoint(checkpoint)
    assert distance(decoder.logits(ids, decoder.new_cache(60)), expected_logits) < 1e-5
    code, out, err = run("compress", tmp_path / "model", tmp_path / "store")
    assert code == 0
    assert "their inputs are rounded to 8 bits a token" in err
    assert "few levels: 14 matrices with {-s, 0, s}: packed by method lossless" in out
    store = open_store(str(tmp_path / "store"))
    for name in exact:
        assert np.array_equal(dequantize(store.read_packed(name)), read_weight(checkpoint.tensors[name]).float32())
        assert store.report(name)["lossless"] is True
        assert store.report(name)["relative_error"] == 0
    for bits in (16, 8):  # the product in integers does the model's own rounding
        decoder = load_decoder(str(tmp_path / "store"), 1, ActivationSettings(bits)).decoder
        cache = decoder.new_cache(60)
        ours = np.concatenate([decoder.logits(part, cache) for part in np.split(ids, [30, *range(31, 60)])])
        assert distance(ours, expected_logits) < 1e-5


def test_an_export_of_the_packed_form_is_that_model(tmp_path: Path, run: Run) -> None:
    theirs, exact = saved(tmp_path / "model", FORMS["packed"])
    assert run("compress", tmp_path / "model", tmp_path / "store")[0] == 0
    assert run("export", tmp_path / "store", tmp_path / "back")[0] == 0
    back = open_checkpoint(tmp_path / "back")
    for name, expected in exact.items():
        assert np.array_equal(read_weight(back.tensors[name]).float32(), expected)
    ids = np.random.default_rng(2).integers(0, VOCAB, 30)
    expected_logits, decoder = their_logits(theirs, ids), load_checkpoint(back)
    assert distance(decoder.logits(ids, decoder.new_cache(30)), expected_logits) < 1e-5
    assert distance(their_logits(loaded(tmp_path / "back"), ids), expected_logits) < 1e-5


def loaded(folder: Path) -> Any:
    """Return transformers' model of a folder, without the parts of from_pretrained that need accelerate."""
    from safetensors.torch import load_file

    raw = json.loads((folder / "config.json").read_text())
    form = {key: value for key, value in raw.pop("quantization_config").items() if key != "quant_method"}
    model = transformers.BitNetForCausalLM(transformers.BitNetConfig(**raw, attn_implementation="eager")).eval()
    replace_with_bitnet_linear(model, ["lm_head"], transformers.BitNetQuantConfig(**form))
    tensors: dict[str, Any] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= {name: value.float() for name, value in load_file(path).items()}
    model.load_state_dict(tensors, strict=True, assign=True)
    return model


def changed(folder: Path, config: dict[str, Any], tensors: dict[str, Any]) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "config.json"
    raw = json.loads(path.read_text())
    raw["quantization_config"] |= config
    path.write_text(json.dumps(raw))
    kept = load_file(folder / "model.safetensors") | tensors
    save_file({k: v for k, v in kept.items() if v is not None}, folder / "model.safetensors")


def test_forms_that_are_not_known_are_refused_by_name(tmp_path: Path, run: Run) -> None:
    saved(tmp_path / "model", FORMS["packed"])
    name = "model.layers.1.mlp.up_proj.weight"
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"linear_class": "other"}, {}, "linear_class 'other'; expected bitlinear or autobitlinear"),
        ({"quantization_mode": "both"}, {}, "quantization_mode 'both'; expected offline or online"),
        ({"use_rms_norm": True}, {}, "use_rms_norm"),
        ({"modules_to_not_convert": ["model.layers.0"]}, {}, "modules_to_not_convert"),
        ({"quantization_mode": "online"}, {}, "quantization_mode online expects BF16, F16, F32"),
        ({}, {f"{name}_scale": None}, "weight_scale is missing"),
        ({}, {f"{name}_scale": torch.ones(3)}, r"F32 \[3\]; expected one number"),
        ({}, {name: torch.zeros((24, 72), dtype=torch.uint8)}, "contradicts config.json"),
    ]
    for number, (config, tensors, message) in enumerate(cases):
        copy = tmp_path / f"{number}"
        copy.mkdir()
        for path in (tmp_path / "model").iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        changed(copy, config, tensors)
        code, _, err = run("compress", copy, tmp_path / "store")
        assert (code, re.search(message, err) is not None) == (2, True), err
    bad = {f"{name}_scale": torch.tensor([float("nan")])}
    changed(tmp_path / "model", {}, bad)
    with pytest.raises(CheckpointError, match="weight_scale: nan; expected a finite number"):
        read_weight(open_checkpoint(tmp_path / "model").tensors[name])
