"""config.json of newer architectures: what is read where a field is absent, and what is refused by name."""

from typing import Any

import pytest

from bincompress.errors import CheckpointError
from bincompress.model.config import parse
from bincompress.model.errors import ConfigError, UnsupportedModelError
from bincompress.model.rope import growth
from bincompress.sources.checkpoint import checkpoint_of
from bincompress.tensors.weight import TensorSource
from tests.test_model_config import LLAMA

SIZES = {key: value for key, value in LLAMA.items() if key not in ("architectures", "model_type", "rms_norm_eps")}
OLMO3 = SIZES | {"model_type": "olmo3"}
GRANITE4 = SIZES | {
    "model_type": "granitemoehybrid",
    "num_local_experts": 0,
    "shared_intermediate_size": 96,
    "layer_types": ["attention", "attention"],
    "position_embedding_type": "rope",
}
MINISTRAL3 = SIZES | {"model_type": "ministral3", "num_key_value_heads": 2}
GPT_OSS = SIZES | {"model_type": "gpt_oss", "num_key_value_heads": 2}
QWEN35 = SIZES | {"model_type": "qwen3_5_text", "num_key_value_heads": 2}
QWEN35_MOE = SIZES | {"model_type": "qwen3_5_moe_text", "num_key_value_heads": 2}
QWEN_NEXT = SIZES | {"model_type": "qwen3_next", "num_key_value_heads": 2}
LFM2_MOE = SIZES | {"model_type": "lfm2_moe", "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}
LFM2 = SIZES | {"model_type": "lfm2", "num_key_value_heads": 2}


def test_absent_fields_take_the_defaults_of_transformers() -> None:
    olmo3 = parse(OLMO3 | {"num_hidden_layers": 5})
    assert olmo3.windows == (4096, 4096, 4096, None, 4096)
    assert {rope.theta for rope in olmo3.ropes} == {500000.0}
    ministral = parse(MINISTRAL3)
    assert (ministral.rope.kind, ministral.rope.original_context, ministral.rope.query_growth) == ("yarn", 16384, 0.1)
    gpt_oss = parse(GPT_OSS)
    assert (gpt_oss.windows, gpt_oss.head_dim, gpt_oss.qkv_bias) == ((128, None), 64, True)
    assert (gpt_oss.rope.kind, gpt_oss.rope.truncate, gpt_oss.rope.theta) == ("yarn", False, 150000.0)
    assert gpt_oss.experts is not None
    assert (gpt_oss.experts.count, gpt_oss.experts.chosen, gpt_oss.experts.clamp) == (128, 4, (1.702, 7.0))
    qwen35 = parse(QWEN35 | {"num_hidden_layers": 5})
    assert qwen35.recurrent is not None
    assert qwen35.recurrent.layers == (True, True, True, False, True)
    assert (qwen35.rope.share, qwen35.head_dim, qwen35.experts) == (0.25, 256, None)
    moe, following = parse(QWEN35_MOE), parse(QWEN_NEXT)
    assert moe.experts is not None
    assert (moe.experts.count, moe.experts.shared, moe.experts.normalized) == (256, 512, True)
    assert following.experts is not None
    assert (following.experts.count, following.experts.chosen, following.experts.normalized) == (512, 10, True)
    lfm2 = parse(LFM2 | {"intermediate_size": 12288})
    assert (lfm2.recurrent, lfm2.inner, lfm2.tied) == (None, 8192, True)
    assert parse(LFM2 | {"block_ff_dim": 1000, "block_auto_adjust_ff_dim": False, "tie_embedding": False}).inner == 1000
    assert not parse(LFM2 | {"tie_embedding": False}).tied


def test_queries_grow_from_one_original_context_to_the_next() -> None:
    rope = parse(MINISTRAL3 | {"rope_parameters": dict(GROWING, llama_4_scaling_beta=0.5)}).rope
    assert growth(rope, 14, 3).tolist() == pytest.approx([1.0, 1.0, 1 + 0.5 * 0.6931472])


GROWING = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "llama_4_scaling_beta": 0.1}
Refusal = tuple[dict[str, Any], dict[str, Any], str]
REFUSED: list[Refusal] = [
    (OLMO3, {"rope_theta": 10000.0}, "rope_theta = 10000 is not supported beside layers with a window"),
    (OLMO3, {"sliding_window": None}, "sliding_window = None is not supported"),
    (OLMO3, {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters: 'rope_type' beside kinds of layers"),
    (OLMO3, {"clip_qkv": 8.0}, "clip_qkv = 8.0"),
    (GRANITE4, {"layer_types": ["mamba", "attention"]}, "layer type 'mamba' is not supported"),
    (GRANITE4, {"layer_types": None}, "without layer_types is not supported: every layer is a Mamba layer then"),
    (GRANITE4, {"num_local_experts": 4}, "num_local_experts = 4 is not supported for granitemoehybrid; only 0 is"),
    (GRANITE4, {"num_local_experts": None}, "num_local_experts = None is not supported"),
    (GRANITE4, {"position_embedding_type": "alibi"}, "position_embedding_type = 'alibi' is not supported"),
    (MINISTRAL3, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types contradict"),
    (GPT_OSS, {"layer_types": ["full_attention", "chunked_attention"]}, "layer type 'chunked_attention'"),
    (GPT_OSS, {"routed_scaling_factor": 2.0}, "routed_scaling_factor = 2.0"),
    (QWEN35, {"layer_types": ["sliding_attention", "full_attention"]}, "layer type 'sliding_attention'"),
    (QWEN35, {"attn_output_gate": False}, "attn_output_gate = False is not supported for qwen3_5_text"),
    (QWEN35, {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported for qwen3_5_text"),
    (QWEN35, {"num_experts": 8}, "num_experts = 8"),
    (QWEN35, {"head_dim": 12}, "partial_rotary_factor = 0.25 of head_dim 12 is not an even number"),
    (
        SIZES | {"model_type": "qwen2_moe", "num_key_value_heads": 2},
        {"use_sliding_window": True},
        "use_sliding_window = True is not supported",
    ),
    (SIZES | {"model_type": "olmoe"}, {"clip_qkv": 8.0}, "clip_qkv = 8.0"),
    (LFM2, {"layer_types": ["conv", "linear_attention"]}, "layer type 'linear_attention'"),
    (LFM2, {"num_experts": 32}, "num_experts = 32"),
    (LFM2_MOE, {"layer_types": None}, "without layer_types is not supported: nothing says which layers have attention"),
    (LFM2_MOE, {"n_shared_experts": 1}, "n_shared_experts = 1"),
]


@pytest.mark.parametrize(("raw", "change", "message"), REFUSED)
def test_what_is_not_supported_is_refused_by_name(raw: dict[str, Any], change: dict[str, Any], message: str) -> None:
    parse(raw)
    with pytest.raises(UnsupportedModelError) as caught:
        parse(raw | change)
    assert message in str(caught.value)


WRONG: list[Refusal] = [
    (MINISTRAL3, {"rope_parameters": {"rope_type": "default"}}, "original_max_position_embeddings"),
    (MINISTRAL3, {"rope_parameters": dict(GROWING, llama_4_scaling_beta=None)}, "llama_4_scaling_beta: expected a pos"),
    (GPT_OSS, {"swiglu_limit": -1.0}, "swiglu_limit: expected a positive number"),
    (GPT_OSS, {"num_experts_per_tok": 200}, "num_experts_per_tok 200 is more than the 128 experts"),
    (GPT_OSS, {"num_local_experts": 1 << 40}, "num_local_experts: expected at most 4096"),
    (QWEN35, {"linear_num_key_heads": 5}, "linear_num_key_heads 5 does not divide linear_num_value_heads 32"),
    (QWEN35, {"linear_key_head_dim": 1 << 20}, "a state of 32 heads of 1048576 x 128: expected at most"),
    (QWEN35, {"linear_conv_kernel_dim": 1 << 20}, "linear_conv_kernel_dim: expected 1 to 64"),
    (QWEN35, {"full_attention_interval": 0}, "full_attention_interval: expected 1 to"),
    (QWEN35, {"layer_types": ["full_attention"]}, "layer_types: expected a list of 2 kinds"),
    (LFM2_MOE, {"num_dense_layers": -1}, "num_dense_layers: expected a whole number"),
    (LFM2_MOE, {"num_dense_layers": 0, "routed_scaling_factor": -1}, "routed_scaling_factor: expected a positive"),
    (LFM2, {"full_attn_idxs": 3}, "full_attn_idxs: expected a list of numbers of layers"),
    (LFM2, {"block_ffn_dim_multiplier": 1e29}, "intermediate_size: expected 1 to"),
    (LFM2, {"layer_types": ["conv", "conv"], "conv_L_cache": "3"}, "conv_L_cache: expected a whole number"),
]


@pytest.mark.parametrize(("raw", "change", "message"), WRONG)
def test_values_that_cannot_be_are_refused_by_name(raw: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(raw | change)
    assert message in str(caught.value)


def test_a_larger_model_counts_by_its_language_model() -> None:
    text = {key: value for key, value in QWEN35.items() if key != "model_type"}
    names = ["Qwen3_5ForConditionalGeneration"]
    whole: dict[str, Any] = {"model_type": "qwen3_5", "architectures": names, "text_config": text}
    found = parse(whole | {"tie_word_embeddings": True})
    assert (found.architecture, found.tied, len(found.notes)) == ("Qwen3_5ForCausalLM", True, 1)
    assert not parse(whole).tied
    assert parse(whole | {"text_config": text | {"tie_word_embeddings": True}}).tied
    changes: list[tuple[dict[str, Any], str]] = [
        ({"model_type": "qwen2_5_vl"}, "Qwen3_5ForConditionalGeneration is not supported"),
        ({"text_config": text | {"model_type": "llama"}}, "qwen3_5 with a language model of type llama"),
        ({"text_config": text | {"attn_logit_softcapping": 5.0}}, "attn_logit_softcapping = 5.0"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quantization_config = 'hqq'"),
    ]
    for change, message in changes:
        with pytest.raises(UnsupportedModelError, match=message):
            parse(whole | change)


@pytest.mark.parametrize(
    ("shape", "hint"), [((3, 96 * 2, 64), "rows and columns are exchanged"), ((2, 64, 96 * 2), "one model")]
)
def test_experts_of_gpt_oss_with_other_axes_are_refused_by_name(
    shape: tuple[int, ...], hint: str, tmp_path: Any
) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensor = TensorSource(name, "BF16", shape, "", 0, 0)
    with pytest.raises(CheckpointError, match=r"gives \[3, 64, 192\] \(experts, columns, rows\)") as caught:
        checkpoint_of(tmp_path, "x", "", GPT_OSS | {"num_local_experts": 3}, {name: tensor})
    assert hint in str(caught.value)
