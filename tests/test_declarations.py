"""Every declared architecture, from a checkpoint through calibration, a store and back; its parts without PyTorch."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from bincompress.calibration.layer_forward import INPUTS, Walk
from bincompress.compression.sequential import _sum
from bincompress.errors import CheckpointError
from bincompress.inference.load import load_decoder
from bincompress.model.architectures import ARCHITECTURES
from bincompress.model.checkpoint_source import CheckpointSource, load_checkpoint
from bincompress.model.config import parse
from bincompress.model.decoder import embedded, read_layer
from bincompress.model.errors import UnsupportedModelError
from bincompress.model.packed_linear import ActivationSettings
from bincompress.sources.checkpoint import open_checkpoint, read_weight
from bincompress.sources.fused import fused_names
from bincompress.store.store import open_store
from bincompress.tensors.dequantize import dequantize
from tests.conftest import Run, tiny_config, write_model

DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 17,
}
MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 35,
    "shared_expert_intermediate_size": 33,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"sliding_window": 5},
    "Ministral3ForCausalLM": {
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "llama_4_scaling_beta": 0.3}
        | {"original_max_position_embeddings": 12}
    },
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {},
    "Gemma3ForCausalLM": {
        "sliding_window": 5,
        "query_pre_attn_scalar": 40,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "GemmaForCausalLM": {},
    "SeedOssForCausalLM": {"attention_out_bias": False},
    "CwmForCausalLM": {"sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"]},
    "InternLM3ForCausalLM": {},
    "IQuestCoderForCausalLM": {"attention_bias": True},
    "SmolLM3ForCausalLM": {"no_rope_layers": [1, 0]},
    "Olmo2ForCausalLM": {},
    "Olmo3ForCausalLM": {
        "rope_theta": 500000.0,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "Exaone4ForCausalLM": {"sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"]},
    "GraniteForCausalLM": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.5,
        "logits_scaling": 4.0,
    },
    "GraniteMoeHybridForCausalLM": {
        "num_local_experts": 0,
        "shared_intermediate_size": 99,
        "layer_types": ["attention", "attention"],
        "position_embedding_type": "rope",
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
    },
    "GlmForCausalLM": {"partial_rotary_factor": 0.25},
    "Glm4ForCausalLM": {"attention_bias": False},
    "Ernie4_5ForCausalLM": {},
    "HeliumForCausalLM": {"attention_bias": True},
    "Phi3ForCausalLM": {"sliding_window": 7, "partial_rotary_factor": 0.75},
    "BitNetForCausalLM": {},
    "Qwen3MoeForCausalLM": {
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 35,
        "mlp_only_layers": [0],
        "norm_topk_prob": True,
    },
    "Qwen2MoeForCausalLM": MOE | {"decoder_sparse_step": 2},
    "OlmoeForCausalLM": {"num_experts": 4, "num_experts_per_tok": 3},
    "MixtralForCausalLM": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "MiniMaxM2ForCausalLM": {"num_local_experts": 3, "num_experts_per_tok": 2, "rotary_dim": 8},
    "Glm4MoeForCausalLM": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 35,
        "attention_bias": True,
    },
    "GraniteMoeForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 3, "attention_multiplier": 0.2},
    "GptOssForCausalLM": {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 5},
    "Qwen3NextForCausalLM": DELTA | MOE,
    "Qwen3_5ForCausalLM": DELTA,
    "Qwen3_5MoeForCausalLM": DELTA | MOE,
    "Lfm2ForCausalLM": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "Lfm2MoeForCausalLM": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 35,
        "layer_types": ["full_attention", "conv"],
        "num_dense_layers": 1,
    },
}
WORDS = " ".join(f"t{word}" for word in np.random.default_rng(0).integers(2, 96, 400))


def config_of(architecture: str) -> dict[str, Any]:
    """Return a tiny config.json: an odd number of inner columns, two heads to each of keys."""
    own = {"architectures": [architecture], "model_type": ARCHITECTURES[architecture].model_type}
    activation = {ARCHITECTURES[architecture].activation_field: ARCHITECTURES[architecture].activation}
    sizes = {"intermediate_size": 99, "num_key_value_heads": 2, "tie_word_embeddings": False}
    return tiny_config() | own | activation | sizes | OPTIONS[architecture]


def write(folder: Path, architecture: str, uneven: bool = False) -> Path:
    """Write a tiny random checkpoint, bfloat16; uneven: with columns of different magnitude."""
    raw, random = config_of(architecture), np.random.default_rng(3)
    config, scale = parse(raw), np.exp(np.random.default_rng(4).standard_normal(64))
    tensors: dict[str, Any] = {}
    for name, shape in config.tensors().items():
        middle = 1 - config.norm_offset if len(shape) == 1 and name.endswith("norm.weight") else 0.0
        values = random.standard_normal(shape) * (0.1 if len(shape) == 2 else 0.2) + middle
        if uneven and len(shape) == 2 and shape[1] == 64 and ".layers." in name:
            values = values * scale
        tensors[name] = values.astype(ml_dtypes.bfloat16)
    for name, parts in fused_names(raw, list(tensors)).items():
        tensors[name] = np.concatenate([tensors.pop(part) for part in parts])
    return write_model(folder, tensors, raw)


@pytest.mark.parametrize("architecture", OPTIONS)
def test_calibration_runs_the_decoders_arithmetic(architecture: str, tmp_path: Path) -> None:
    model = write(tmp_path / "model", architecture)
    decoder, checkpoint = load_checkpoint(model), open_checkpoint(model)
    ids = np.random.default_rng(5).integers(0, 96, (2, 30))
    config, source = decoder.config, CheckpointSource(checkpoint, decoder.config)
    stream = embedded(config, decoder.embedding, ids.reshape(-1)).reshape(2, 30, -1)
    for layer in range(config.layers):
        walk, weights = Walk(config, layer, stream), read_layer(config, source, layer)
        for number in range(INPUTS + 1):
            walk.go_on(number, weights)
        stream = walk.stream
    for sample, own in zip(ids, stream, strict=True):
        cache = decoder.new_cache(30)
        expected = decoder._advance(sample, cache).stream
        assert np.abs(own - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("architecture", OPTIONS)
def test_from_a_checkpoint_to_a_store_and_back(architecture: str, tmp_path: Path, run: Run) -> None:
    model, text = write(tmp_path / "model", architecture), tmp_path / "text"
    text.write_text(WORDS)
    store, stats, back = tmp_path / "store", tmp_path / "stats", tmp_path / "back"
    assert run("calibrate", model, stats, "--text", text, "--samples", 4, "--context", 32)[0] == 0
    packed = run("compress", model, store, "--stats", stats, "--compensate", "--groups", 8, "--block", 64)
    assert packed[0] == 0, packed[2]
    assert run("verify", store)[0] == 0
    assert run("generate", store, "t5 t6", "--max-tokens", 3)[0] == 0
    assert run("export", store, back)[0] == 0
    original, exported = (
        {
            key: value
            for path in folder.glob("*.safetensors")
            for key, value in safetensors.numpy.load_file(path).items()
        }
        for folder in (model, back)
    )
    assert {name: value.shape for name, value in exported.items()} == {
        name: value.shape for name, value in original.items()
    }
    ids = np.random.default_rng(6).integers(0, 96, 40)
    decoders = (
        load_decoder(str(store), 1, ActivationSettings(16)).decoder,
        load_checkpoint(back),
        load_checkpoint(model),
    )
    ours, theirs, exact = (decoder.logits(ids, decoder.new_cache(40)) for decoder in decoders)
    assert np.abs(ours - theirs).max() < 0.02 * np.abs(ours).max()  # bfloat16
    # Eight groups of magnitudes. A token that chooses another expert for it differs in all; half of them do not. Layers
    # without attention multiply what two matrices give, and so their errors.
    off = np.abs(ours - exact).max(axis=1)
    declared = ARCHITECTURES[architecture]
    worst = off.max() if declared.mixture is None and declared.recurrence is None else np.median(off)
    assert worst < 0.5 * np.abs(exact).max()


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Gemma3ForCausalLM", "Olmo2ForCausalLM"])
def test_a_transformation_is_folded_into_what_the_norm_multiplies_with(
    architecture: str, tmp_path: Path, run: Run
) -> None:
    model, text, store = write(tmp_path / "model", architecture, uneven=True), tmp_path / "text", tmp_path / "store"
    text.write_text(WORDS)
    run("calibrate", model, tmp_path / "stats", "--text", text, "--samples", 8, "--context", 40)
    assert run("compress", model, store, "--stats", tmp_path / "stats", "--method", "dbellquant")[0] == 0
    found, names = open_store(str(store)), parse(config_of(architecture)).names
    tensors, offset = open_checkpoint(model).tensors, ARCHITECTURES[architecture].norm_offset
    for norm, part in ((names.input_norm, names.qkv[0]), (names.post_norm, names.gate_up[0])):
        matrix = names.of_layer(1, f"{part}.weight")
        weight, packed = read_weight(tensors[matrix]).float32(), dequantize(found.read_packed(matrix))
        if norm:
            name = names.of_layer(1, norm)
            before, after = read_weight(tensors[name]).float32()[0], found.read_plain(name)[0].float32().reshape(-1)
            scale = (before + offset) / (after + offset)
            assert np.std(np.log(scale)) > 0.1
            packed = packed / scale
        assert np.linalg.norm(weight - packed) < 0.5 * np.linalg.norm(weight)
    for name in tensors:  # norms that no matrix reads stay as they are
        if name.endswith((names.out_norm or "-", names.down_norm or "-", names.q_norm, names.k_norm)):
            stored = found.read_plain(name)[0]
            assert np.array_equal(stored.bits.reshape(-1), read_weight(tensors[name]).bits.reshape(-1))


@pytest.mark.parametrize("architecture", ["Gemma3ForCausalLM", "GraniteForCausalLM", "Olmo2ForCausalLM"])
def test_layer_after_layer(architecture: str, tmp_path: Path, run: Run) -> None:
    model, text = write(tmp_path / "model", architecture), tmp_path / "text"
    text.write_text(WORDS)
    samples = ("--samples", 4, "--context", 32, "--compensate", "--groups", 2)
    found = run("compress", model, tmp_path / "store", "--sequential", text, *samples)
    assert found[0] == 0, found[2]


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GraniteForCausalLM", "Gemma3ForCausalLM"])
def test_what_a_matrix_is_to_make_up_for_is_in_its_own_units(architecture: str, tmp_path: Path) -> None:
    model = write(tmp_path / "model", architecture)
    decoder = load_checkpoint(model)
    config, weights = decoder.config, decoder.layers[0]
    streams = np.random.default_rng(9).standard_normal((2, 1, 20, 64)).astype(np.float32)
    was, now = (Walk(config, 0, stream) for stream in streams)
    _sum(0, config, weights, weights, (was, now))
    found = _sum(1, config, weights, weights, (was, now))
    expected = weights.out(was.x) - weights.out(now.x)
    if not weights.out_norm.size:  # else no sum of what the matrix gives and of a constant gives the stream
        expected = expected + (was.stream - now.stream)[0] / config.residual_multiplier
        made_up = now.stream[0] + config.residual_multiplier * (weights.out(now.x) + expected)
        assert np.abs(made_up - was.stream[0] - config.residual_multiplier * weights.out(was.x)).max() < 1e-4
    assert np.abs(found.arrays["lack"] - expected.T @ now.x).max() < 1e-3


def test_fused_matrices_are_read_as_their_parts(tmp_path: Path) -> None:
    model = write(tmp_path / "model", "Phi3ForCausalLM")
    fused = safetensors.numpy.load_file(model / "model.safetensors")["model.layers.1.self_attn.qkv_proj.weight"]
    tensors = open_checkpoint(model).tensors
    parts = [tensors[f"model.layers.1.self_attn.{part}.weight"] for part in ("q_proj", "k_proj", "v_proj")]
    assert [part.shape for part in parts] == [(64, 64), (32, 64), (32, 64)]
    joined = np.concatenate([read_weight(part).bits for part in parts])
    assert np.array_equal(joined, fused.view(np.uint16))
    assert not any("qkv_proj" in name or "gate_up_proj" in name for name in tensors)


@pytest.mark.parametrize("change", [{"num_key_value_heads": 1}, {"intermediate_size": 98}, {"intermediate_size": None}])
def test_fused_matrices_of_other_sizes_are_refused_by_name(change: dict[str, Any], tmp_path: Path) -> None:
    model = write(tmp_path / "model", "Phi3ForCausalLM")
    tensors = safetensors.numpy.load_file(model / "model.safetensors")
    other = write_model(tmp_path / "other", tensors, config_of("Phi3ForCausalLM") | change)
    with pytest.raises(CheckpointError, match=r"(qkv|gate_up)_proj.weight: shape .* contradicts config.json"):
        open_checkpoint(other)


@pytest.mark.slow
def test_training_refuses_by_name_what_it_does_not_know() -> None:
    torch = pytest.importorskip("torch")
    from bincompress.distillation.decoder import TorchDecoder

    online = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    config = parse(config_of("BitNetForCausalLM") | {"quantization_config": online})
    with pytest.raises(UnsupportedModelError, match="training does not know BitNetForCausalLM yet: "):
        TorchDecoder(config, torch.device("cpu"), 16)


def test_every_declaration_is_tried_here() -> None:
    assert list(OPTIONS) == list(ARCHITECTURES)
