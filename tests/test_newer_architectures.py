"""Architectures of 2025 and later against transformers, in float32: each part, and what is refused by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from bincompress.inference.load import load_decoder
from bincompress.model.checkpoint_source import load_checkpoint
from bincompress.model.packed_linear import ActivationSettings
from tests.conftest import Run, tiny_tokenizer, write_model
from tests.quantized import mxfp4
from tests.transformers_models import LLAMA3, SMALL, TOLERANCE, VOCAB, distance, in_parts, random_model, their_logits

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.slow  # PyTorch and transformers

ODD = {"hidden_size": 50, "num_attention_heads": 5, "num_key_value_heads": 1}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "rope_theta": 500000.0}
GRANITE4 = {
    "num_local_experts": 0,
    "shared_intermediate_size": 72,
    "layer_types": ["attention"] * 3,
    "position_embedding_type": "rope",
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.015625,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
    "mamba_n_heads": 8,
}
MINISTRAL3 = {**YARN, "llama_4_scaling_beta": 0.4, "mscale": 1.0, "mscale_all_dim": 1.0}
DELTA = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 10,
}
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 33}
LFM2_MOE = {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "num_dense_layers": 1,
    "layer_types": ["conv", "full_attention", "conv"],
}
GLM45 = {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
GPT_OSS = {"num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 9}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "olmo3": ("Olmo3", {"num_hidden_layers": 5, "sliding_window": 9}),
    "olmo3 yarn": (
        "Olmo3",
        {
            **ODD,
            "intermediate_size": 67,
            "sliding_window": 11,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {"full_attention": YARN | {"attention_factor": 1.2}, "sliding_attention": None},
        },
    ),
    "granite4": ("GraniteMoeHybrid", GRANITE4),
    "granite4 without rope": (
        "GraniteMoeHybrid",
        {**GRANITE4, **ODD, "shared_intermediate_size": 67, "position_embedding_type": None, "mamba_n_heads": 10}
        | {"attention_bias": True, "tie_word_embeddings": True},
    ),
    "ministral3 window": (
        "Ministral3",
        {
            **ODD,
            "sliding_window": 21,
            "head_dim": 10,
            "rope_parameters": {"rope_type": "default", "rope_theta": 900.0, "llama_4_scaling_beta": 0.3}
            | {"original_max_position_embeddings": 20},
        },
    ),
    "qwen3-next dense layer odd": (
        "Qwen3Next",
        {**ODD, **DELTA, **MOE, "head_dim": 24, "num_hidden_layers": 5, "mlp_only_layers": [1], "norm_topk_prob": False}
        | {"linear_num_value_heads": 2, "linear_conv_kernel_dim": 3, "full_attention_interval": 2},
    ),
    "qwen3.5 odd": (
        "Qwen3_5Text",
        {**ODD, **DELTA, "intermediate_size": 67, "linear_value_head_dim": 13, "linear_key_head_dim": 9}
        | {"layer_types": ["full_attention", "linear_attention", "full_attention"], "attention_bias": True}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 900.0, "partial_rotary_factor": 0.5}}
        | {"tie_word_embeddings": True},
    ),
    "qwen3.5 moe": ("Qwen3_5MoeText", {**DELTA, **MOE, "num_hidden_layers": 4}),
    "qwen2-moe odd": ("Qwen2Moe", {**ODD, **MOE, "mlp_only_layers": [1]}),
    "olmoe": ("Olmoe", {"num_experts": 5, "num_experts_per_tok": 2, "attention_bias": True}),
    "lfm2 bias odd": (
        "Lfm2",
        {**ODD, "intermediate_size": 67, "num_hidden_layers": 4, "full_attn_idxs": [1], "conv_bias": True}
        | {"conv_L_cache": 5, "block_auto_adjust_ff_dim": False, "tie_word_embeddings": False},
    ),
    "lfm2-moe odd": (
        "Lfm2Moe",
        {**ODD, **LFM2_MOE, "intermediate_size": 67, "conv_bias": True}
        | {"routed_scaling_factor": 1.5, "tie_word_embeddings": False},
    ),
    "internlm3": ("InternLM3", {"head_dim": 24, "rope_parameters": {"rope_type": "dynamic", "factor": 6.0}}),
    "iquestcoder odd": ("IQuestCoder", {**ODD, "head_dim": 10, "attention_bias": True, "mlp_bias": True}),
    "exaone4": ("Exaone4", {"num_hidden_layers": 5, "sliding_window": 9}),
    "exaone4 without windows odd": (
        "Exaone4",
        {**ODD, "sliding_window": None, "layer_types": ["full_attention"] * 3, "tie_word_embeddings": True},
    ),
    "exaone4 layer_types": (
        "Exaone4",
        {"sliding_window": 21, "sliding_window_pattern": "LG", "rope_parameters": LLAMA3}
        | {"layer_types": ["sliding_attention", "full_attention", "full_attention"]},
    ),
    "minimax-m2 odd": (
        "MiniMaxM2",
        {**ODD, "head_dim": 12, "num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 67}
        | {"rotary_dim": 6},
    ),
    "glm-4.5": ("Glm4Moe", GLM45),
    "glm-4.5 odd": (
        "Glm4Moe",
        {**ODD, **GLM45, "head_dim": 20, "use_qk_norm": True, "attention_bias": True, "n_shared_experts": 2}
        | {"norm_topk_prob": False, "routed_scaling_factor": 2.5, "first_k_dense_replace": 2, "intermediate_size": 67},
    ),
    "granite-moe": (
        "GraniteMoe",
        {"num_local_experts": 6, "num_experts_per_tok": 3, "embedding_multiplier": 12.0, "logits_scaling": 6.0}
        | {"attention_multiplier": 0.2, "residual_multiplier": 0.22},
    ),
    "granite-moe odd": (
        "GraniteMoe",
        {**ODD, "intermediate_size": 67, "num_local_experts": 5, "num_experts_per_tok": 2, "attention_bias": True},
    ),
    "glm odd": ("Glm", {**ODD, "head_dim": 12, "intermediate_size": 67}),
    "glm-4": ("Glm4", {"head_dim": 16, "attention_bias": False}),
    "glm-4 odd": (
        "Glm4",
        {**ODD, "head_dim": 20, "intermediate_size": 67, "tie_word_embeddings": True}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 900.0, "partial_rotary_factor": 0.3}},
    ),
    "ernie-4.5 odd": ("Ernie4_5", {**ODD, "head_dim": 10, "intermediate_size": 67}),
    "helium": ("Helium", {"head_dim": 8, "attention_bias": True, "mlp_bias": True}),
    "gpt-oss odd": (
        "GptOss",
        {
            **ODD,
            "intermediate_size": 67,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "head_dim": 10,
            "sliding_window": 21,
            "swiglu_limit": 0.9,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "rope_parameters": {**YARN, "truncate": False},
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    theirs = random_model(tmp_path, *CASES[case])
    ids = np.random.default_rng(1).integers(0, VOCAB, 45)
    expected = their_logits(theirs, ids)
    decoder = load_checkpoint(tmp_path)
    off = [distance(in_parts(decoder, ids, parts), expected) for parts in ([45], [23, 9, 1, 12], [33] + [1] * 12)]
    assert max(off) < TOLERANCE


EXPORTED = [
    "granite4",
    "gpt-oss odd",
    "lfm2-moe odd",
    "exaone4",
    "minimax-m2 odd",
    "glm-4.5",
    "granite-moe odd",
    "glm-4 odd",
]


@pytest.mark.parametrize("case", EXPORTED)
def test_a_store_of_many_groups_is_close_and_its_export_is_a_checkpoint(case: str, tmp_path: Path, run: Run) -> None:
    random_model(tmp_path / "model", *CASES[case])
    assert_close_and_exported(tmp_path, run)


def test_keys_of_8_bits_have_a_factor_for_both_items_that_are_rotated_together(tmp_path: Path) -> None:
    """Where those are neighbours, and one of them has a large bias: with two factors, scores would be others."""
    kind, options = CASES["glm odd"]
    theirs = random_model(tmp_path, kind, options)
    with torch.no_grad():
        for layer in theirs.model.layers:
            layer.self_attn.k_proj.bias[0] += 8.0
    theirs.save_pretrained(tmp_path)
    ids = np.random.default_rng(4).integers(0, VOCAB, 40)
    decoder = load_checkpoint(tmp_path)
    found = decoder.logits(ids, decoder.new_cache(40, "int8"))
    assert distance(found, their_logits(theirs, ids)) < 0.06  # 0.14 with factors of items half the rotated ones apart


def assert_close_and_exported(tmp_path: Path, run: Run, loader: str = "AutoModelForCausalLM") -> None:
    """Compress with 32 groups: the logits are close to those of the model, and transformers loads the export."""
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(tiny_tokenizer(VOCAB)))
    packed = run("compress", tmp_path / "model", tmp_path / "store", "--groups", 32, "--block", 64)
    assert packed[0] == 0, packed[2]
    assert run("generate", tmp_path / "store", "t5 t6", "--max-tokens", 2)[0] == 0
    assert run("export", tmp_path / "store", tmp_path / "back")[0] == 0
    theirs, found = getattr(transformers, loader).from_pretrained(
        tmp_path / "back",
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = np.random.default_rng(10).integers(0, VOCAB, 40)
    ours = in_parts(load_checkpoint(tmp_path / "back"), ids, [40])
    assert distance(ours, their_logits(theirs.eval(), ids)) < TOLERANCE
    exact = in_parts(load_checkpoint(tmp_path / "model"), ids, [40])
    decoder = load_decoder(str(tmp_path / "store"), 1, ActivationSettings(16)).decoder
    stored = decoder.logits(ids, decoder.new_cache(40))
    off = np.abs(stored - exact).max(axis=1) / np.abs(exact).max()
    # Of a token that chooses another expert all logits differ; half of them do not.
    assert np.median(off) < 0.1


VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
}
WHOLES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        "Gemma3",
        {"text_config": {**SMALL, "model_type": "gemma3_text", "head_dim": 24, "sliding_window": 9}},
        {"model_type": "siglip_vision_model", "patch_size": 14, "image_size": 28},
    ),
    "qwen3.5": (
        "Qwen3_5",
        {"text_config": {**SMALL, **DELTA, "model_type": "qwen3_5_text", "num_hidden_layers": 4}},
        {"depth": 1, "num_heads": 2, "out_hidden_size": 48, "patch_size": 4},
    ),
    "ministral3": (
        "Mistral3",
        {
            "text_config": {**SMALL, "model_type": "ministral3", "rope_parameters": MINISTRAL3, "head_dim": 16},
            "tie_word_embeddings": False,
        },
        {"model_type": "pixtral", "patch_size": 14, "image_size": 28, "head_dim": 16},
    ),
}


@pytest.mark.parametrize("case", WHOLES)
def test_the_language_model_of_a_larger_one_runs(case: str, tmp_path: Path) -> None:
    kind, options, tower = WHOLES[case]
    theirs = random_model(tmp_path, kind, {**options, "vision_config": {**VISION, **tower}}, "ForConditionalGeneration")
    ids = np.random.default_rng(2).integers(0, VOCAB, 60)
    decoder = load_checkpoint(tmp_path)
    off = distance(in_parts(decoder, ids, [30, 1, 29]), their_logits(theirs, ids))
    assert off < TOLERANCE
    assert "what sees or hears beside it is kept" in decoder.config.notes[0]


def test_a_larger_model_is_exported_whole(tmp_path: Path, run: Run) -> None:
    kind, options, tower = WHOLES["qwen3.5"]
    given = {**options, "vision_config": {**VISION, **tower}}
    random_model(tmp_path / "model", kind, given, "ForConditionalGeneration")
    assert_close_and_exported(tmp_path, run, "AutoModelForImageTextToText")


def test_mxfp4_and_bf16_are_the_same_model(tmp_path: Path) -> None:
    """gpt-oss with experts of 4-bit floats, and with the values that these stand for."""
    options = {**GPT_OSS, "hidden_size": 64, "intermediate_size": 32, "num_local_experts": 2, "num_hidden_layers": 1}
    random_model(tmp_path / "model", "GptOss", options)
    folder = tmp_path / "model"
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    packed, plain = dict(tensors), dict(tensors)
    for part, outputs, inputs in (("gate_up_proj", 64, 64), ("down_proj", 64, 32)):
        name, form = f"model.layers.0.mlp.experts.{part}", mxfp4(2, outputs, inputs)
        scales = form.parts["_scales"] - np.uint8(8)  # weights of a usual size
        plain[name] = form.values / np.float32(256)
        del packed[name]
        packed |= {f"{name}_blocks": form.parts["_blocks"], f"{name}_scales": scales}
    first = write_model(tmp_path / "packed", packed, config | {"quantization_config": {"quant_method": "mxfp4"}})
    second = write_model(tmp_path / "plain", plain, config)
    ids = np.random.default_rng(3).integers(0, VOCAB, 30)
    one, other = (in_parts(load_checkpoint(model), ids, [30]) for model in (first, second))
    assert np.array_equal(one, other)
    assert np.isfinite(one).all()
