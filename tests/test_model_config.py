"""config.json: what is read, what is refused and by which name."""

import contextlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bincompress.errors import BincompressError
from bincompress.model import rope
from bincompress.model.config import ModelConfig, parse
from bincompress.model.errors import ConfigError, UnsupportedModelError

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-5,
}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_key_value_heads": 2}
QWEN3 = QWEN2 | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "num_key_value_heads": 2}
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


def test_absent_fields_take_the_architectures_defaults() -> None:
    config = parse(LLAMA)
    assert (config.kv_heads, config.head_dim, config.context, config.tied) == (4, 16, 2048, False)
    assert config.windows == (None, None)
    mistral = parse(
        LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "num_key_value_heads": 2}
    )
    assert mistral.windows == (4096, 4096)
    qwen3 = parse(QWEN2 | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"})
    assert (qwen3.head_dim, qwen3.qk_norm, qwen3.qkv_bias) == (128, "head", False)
    assert parse(QWEN2).qkv_bias


def test_model_type_alone_names_the_architecture() -> None:
    raw = {key: value for key, value in QWEN2.items() if key != "architectures"}
    assert parse(raw).architecture == "Qwen2ForCausalLM"


@pytest.mark.parametrize(
    "names", [None, [], ["LLaMAForCausalLM"], ["MyLlamaForCausalLM"], ["LlamaForCausalLM", "LlamaModel"]]
)
def test_model_type_decides_where_the_spelling_is_unknown(names: Any) -> None:
    assert parse(LLAMA | {"architectures": names}) == parse(LLAMA)


def test_a_registered_name_will_do_without_model_type() -> None:
    raw = {key: value for key, value in LLAMA.items() if key != "model_type"}
    assert parse(raw | {"architectures": ["Custom", "MistralForCausalLM"]} | KV).architecture == "MistralForCausalLM"


KV = {"num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("raw", "change", "expected"),
    [
        (LLAMA, {}, (4, 16)),
        (LLAMA, {"num_key_value_heads": None, "head_dim": None}, (4, 16)),
        (QWEN2, {"num_key_value_heads": None}, (4, 16)),
        (QWEN2, {"num_attention_heads": 32, "num_key_value_heads": ...}, (32, 2)),
        (QWEN3, {"num_key_value_heads": None}, (4, 128)),
        (QWEN3, {"num_attention_heads": 64, "num_key_value_heads": ...}, (32, 128)),
        (MISTRAL, {"num_attention_heads": 16, "num_key_value_heads": ..., "head_dim": None}, (8, 4)),
        (MISTRAL, {"num_attention_heads": 6, "head_dim": 20}, (2, 20)),
    ],
)
def test_heads_that_config_json_does_not_give(raw: Any, change: Any, expected: tuple[int, int]) -> None:
    merged = {key: value for key, value in (raw | change).items() if value is not ...}
    config = parse(merged)
    assert (config.kv_heads, config.head_dim) == expected


def test_qwen3_may_not_have_null_as_head_dim() -> None:
    with pytest.raises(ConfigError, match="head_dim: expected a whole number, found None"):
        parse(QWEN3 | {"head_dim": None})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"rope_theta": 500}, rope.Rope(500.0)),
        ({"rope_theta": 500.0, "rope_parameters": {"rope_theta": 7.0}}, rope.Rope(7.0)),
        ({"rope_theta": 500.0, "rope_scaling": {}, "rope_parameters": {"rope_type": "default"}}, rope.Rope(500.0)),
        # rope_scaling replaces all of rope_parameters, its theta included.
        (
            {"rope_parameters": {"rope_theta": 7.0}, "rope_scaling": {"type": "linear", "factor": 2}},
            rope.Rope(10000.0, "linear", 2.0),
        ),
        (
            {"rope_theta": 7.0, "rope_parameters": {"rope_type": "linear", "type": "default", "factor": 2.0}},
            rope.Rope(7.0, "linear", 2.0),
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", **SCALING}, "original_max_position_embeddings": 64},
            rope.Rope(10000.0, "llama3", 8.0, 1.0, 4.0, 64),
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", **SCALING}, "original_max_position_embeddings": None},
            rope.Rope(10000.0, "llama3", 8.0, 1.0, 4.0, 32),
        ),
    ],
)
def test_rope_in_either_form(change: dict[str, Any], expected: rope.Rope) -> None:
    assert parse(LLAMA | change).rope == expected


def test_tensor_shapes() -> None:
    shapes = parse(LLAMA | {"num_key_value_heads": 2, "attention_bias": True}).tensors()
    assert shapes["model.embed_tokens.weight"] == (100, 64)
    assert shapes["lm_head.weight"] == (100, 64)
    assert shapes["model.layers.1.self_attn.k_proj.weight"] == (32, 64)
    assert shapes["model.layers.1.self_attn.o_proj.bias"] == (64,)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (64, 96)
    assert "model.layers.0.mlp.down_proj.bias" not in shapes
    assert "model.layers.2.mlp.down_proj.weight" not in shapes
    assert "lm_head.weight" not in parse(LLAMA | {"tie_word_embeddings": True}).tensors()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"architectures": ["Gemma2ForCausalLM"]}, "architecture Gemma2ForCausalLM is not supported; known: LlamaFor"),
    (
        {"architectures": ["LlamaForCausalLM", "MixtralForCausalLM"]},
        "MixtralForCausalLM has model_type 'mixtral'",
    ),
    ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM has model_type 'mistral', found 'llama'"),
    ({"architectures": ["MyForCausalLM"], "model_type": None}, "architecture MyForCausalLM is not supported"),
    ({"architectures": ["MyForCausalLM"], "model_type": "mine"}, "known: LlamaForCausalLM, "),
    ({"architectures": None, "model_type": "gemma2"}, "model_type 'gemma2' is not supported"),
    ({"architectures": [], "model_type": ["llama"]}, "model_type ['llama'] is not supported"),
    ({"model_type": "gemma2"}, "LlamaForCausalLM has model_type 'llama', found 'gemma2'"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ({"rope_scaling": {"type": "ntk", "factor": 4.0}}, "rope type 'ntk' is not supported; known: default, linear"),
    ({"rope_parameters": {"rope_type": "su"}}, "rope type 'su'"),
    (
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"rope_type": "proportional", "factor": 4.0}},
        "rope_scaling: rope type 'proportional'",
    ),
    ({"rope_scaling": {"rope_type": None, "type": "linear", "factor": 2.0}}, "rope type None"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "per kind of layer"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ({"num_local_experts": 8}, "num_local_experts = 8"),
    ({"num_experts": 60}, "num_experts"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config = 'gptq'"),
    ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types contradict"),
    ({"layer_types": ["full_attention", "chunked_attention"]}, "layer type 'chunked_attention'"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_changes_the_arithmetic_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        parse(LLAMA | change)
    assert message in str(caught.value)


GEMMA3 = LLAMA | {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "num_key_value_heads": 2}
SMOLLM3 = LLAMA | {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "num_key_value_heads": 2}
OLMO2 = LLAMA | {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"}
GRANITE = LLAMA | {"architectures": ["GraniteForCausalLM"], "model_type": "granite"}
PHI3 = LLAMA | {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"}


def test_absent_fields_of_the_other_declarations() -> None:
    gemma3 = parse({key: value for key, value in GEMMA3.items() if key != "num_key_value_heads"})
    assert (gemma3.kv_heads, gemma3.head_dim, gemma3.context, gemma3.tied) == (4, 256, 131072, True)
    assert (gemma3.activation, gemma3.query_scale, gemma3.embedding_multiplier) == ("gelu_tanh", 1 / 16, 8.0)
    assert gemma3.windows == (4096, 4096)
    assert gemma3.ropes == (rope.Rope(10000.0),) * 2
    deep = parse(GEMMA3 | {"num_hidden_layers": 7})
    assert deep.windows == (4096,) * 5 + (None, 4096)
    assert [own.theta for own in deep.ropes] == [1e4] * 5 + [1e6, 1e4]
    smollm3 = parse(SMOLLM3 | {"num_hidden_layers": 5, "rope_theta": None})
    assert (smollm3.tied, smollm3.context, smollm3.windows) == (True, 32768, (None,) * 5)
    assert [(own.theta, own.share) for own in smollm3.ropes if own.share] == [(2e6, 1.0)] * 4
    assert smollm3.ropes[3].share == 0
    granite = parse(GRANITE)
    assert (granite.query_scale, granite.residual_multiplier, granite.logit_divisor) == (1.0, 1.0, 1.0)
    phi3 = parse({key: value for key, value in PHI3.items() if key != "rms_norm_eps"})
    assert (phi3.norm_epsilon, phi3.windows, phi3.context) == (1e-5, (None, None), 4096)
    assert parse({key: value for key, value in OLMO2.items() if key != "rms_norm_eps"}).norm_epsilon == 1e-5


@pytest.mark.parametrize(
    ("change", "whole", "local"),
    [
        ({"rope_theta": 500.0, "rope_local_base_freq": 70.0}, rope.Rope(500.0), rope.Rope(70.0)),
        ({"rope_scaling": {"rope_type": "linear", "factor": 8}}, rope.Rope(1e6, "linear", 8.0), rope.Rope(1e4)),
        ({"rope_parameters": {"full_attention": {"rope_theta": 9.0}}}, rope.Rope(9.0), rope.Rope(1e4)),
        (
            {"rope_parameters": {"sliding_attention": {"rope_theta": 9.0}}, "rope_theta": 8.0},
            rope.Rope(8.0),
            rope.Rope(9.0),
        ),
        # transformers updates an object that has a type already with it.
        ({"rope_scaling": {"type": "linear", "factor": 8.0}}, rope.Rope(1e6), rope.Rope(1e4)),
    ],
)
def test_gemmas_two_ropes_in_either_form(change: dict[str, Any], whole: rope.Rope, local: rope.Rope) -> None:
    config = parse(GEMMA3 | change | {"layer_types": ["full_attention", "sliding_attention"]})
    assert config.ropes == (whole, local)


def test_a_bare_model_of_a_declared_family_is_known() -> None:
    assert parse(GEMMA3 | {"architectures": ["Gemma3TextModel"]}) == parse(GEMMA3)
    assert parse(PHI3 | {"architectures": ["Phi3Model"]}) == parse(PHI3)


REFUSED_OF_OTHERS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (GEMMA3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
    (GEMMA3, {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
    (GEMMA3, {"hidden_activation": "relu"}, "hidden_activation = 'relu' is not supported; known: silu, swish, gelu_py"),
    (GEMMA3, {"sliding_window": None}, "sliding_window = None is not supported"),
    (GEMMA3, {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters: 'rope_type' beside kinds"),
    (GEMMA3, {"rope_scaling": {"rope_type": "su", "factor": 2.0}}, "full_attention: rope type 'su'"),
    (GEMMA3, {"residual_multiplier": 0.5}, "residual_multiplier = 0.5"),
    (GEMMA3, {"architectures": ["Gemma3ForConditionalGeneration"]}, "Gemma3ForConditionalGeneration is not supported"),
    (GEMMA3, {"architectures": ["Gemma3nForCausalLM"]}, "architecture Gemma3nForCausalLM is not supported"),
    (GEMMA3, {"model_type": "gemma3"}, "Gemma3ForCausalLM has model_type 'gemma3_text', found 'gemma3'"),
    (GRANITE, {"architectures": ["GraniteMoeForCausalLM"]}, "GraniteMoeForCausalLM has model_type 'granitemoe'"),
    (GRANITE, {"num_local_experts": 8}, "num_local_experts = 8"),
    (GRANITE, {"query_pre_attn_scalar": 8}, "query_pre_attn_scalar = 8"),
    (PHI3, {"partial_rotary_factor": 0.2}, "partial_rotary_factor = 0.2 of head_dim 16 is not an even number"),
    (PHI3, {"partial_rotary_factor": 0.05}, "partial_rotary_factor = 0.05 of head_dim 16"),
    (PHI3, {"architectures": ["PhimoeForCausalLM"]}, "architecture PhimoeForCausalLM is not supported"),
    (OLMO2, {"clip_qkv": 8.0}, "clip_qkv = 8.0"),
    (OLMO2, {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types contradict"),
    (OLMO2, {"architectures": ["OlmoeForCausalLM"]}, "OlmoeForCausalLM has model_type 'olmoe', found 'olmo2'"),
    (SMOLLM3, {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    *(
        (LLAMA, {"architectures": [name], "model_type": kind}, f"architecture {name} is not supported; known: Llama")
        for name, kind in [
            ("GraniteMoeSharedForCausalLM", "granitemoeshared"), ("Glm4MoeLiteForCausalLM", "glm4_moe_lite"),
            ("MinistralForCausalLM", "ministral"), ("Gemma2ForCausalLM", "gemma2"),
            ("Gemma4ForCausalLM", "gemma4_text"),
        ]
    ),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "change", "message"), REFUSED_OF_OTHERS)
def test_what_a_declaration_does_not_read_is_refused_by_name(
    raw: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        parse(raw | change)
    assert message in str(caught.value)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": "64"}, "hidden_size: expected a whole number, found '64'"),
    ({"hidden_size": 64.0}, "hidden_size: expected a whole number, found 64.0"),
    ({"hidden_size": True}, "hidden_size: expected a whole number, found True"),
    ({"hidden_size": None}, "hidden_size: expected a whole number, found None"),
    ({"hidden_size": 0}, "hidden_size: expected 1 to"),
    ({"vocab_size": -5}, "vocab_size: expected a whole number, found -5"),
    ({"vocab_size": 1 << 60}, "vocab_size: expected 1 to"),
    ({"num_hidden_layers": 1_000_000_000}, "num_hidden_layers: expected 1 to 4096"),
    ({"num_attention_heads": 5}, "num_attention_heads 5 does not divide hidden_size 64"),
    ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attention_heads 4"),
    ({"head_dim": 7}, "head_dim 7 is odd"),
    ({"rms_norm_eps": 0}, "rms_norm_eps: expected a positive number, found 0"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"rope_theta": "10000"}, "rope_theta: expected a positive number"),
    ({"rope_scaling": {"type": "linear"}}, "factor: expected a positive number, found None"),
    ({"rope_scaling": {"type": "linear", "factor": -1.0}}, "factor"),
    ({"rope_scaling": {"type": "dynamic"}}, "factor: expected a positive number, found None"),
    ({"rope_theta": 10**400}, "rope_theta: expected a number from 1e-30 to 1e+30, found 1000"),
    ({"rope_scaling": {"type": "linear", "factor": 10**400}}, "factor: expected a number from 1e-30 to 1e+30"),
    ({"rms_norm_eps": 1e-320}, "rms_norm_eps: expected a number from 1e-30 to 1e+30, found 1e-320"),
    ({"hidden_size": 10**400}, "hidden_size: expected 1 to 16777216, found 1000"),
    ({"rope_scaling": {"type": "yarn"}}, "factor: expected a positive number, found None"),
    ({"rope_scaling": {"type": "yarn", "factor": float("nan")}}, "factor: expected a positive number, found nan"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": "32"}}, "beta_fast: expected a positive number"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": 1}}, "truncate: expected true or false"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_theta": 1.0}, "rope_theta: expected another number than"),
    ({"rope_scaling": {"type": "longrope"}}, "short_factor: expected a list of 8 numbers, found None"),
    (
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 7}},
        "long_factor: expected a list of 8 numbers, found 7",
    ),
    (
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 7 + ["x"], "long_factor": [1.0] * 8}},
        "short_factor: expected a positive number, found 'x'",
    ),
    ({"rope_scaling": {"rope_type": "llama3", **SCALING, "low_freq_factor": 4.0}}, "low_freq_factor 4.0 must be below"),
    ({"rope_scaling": [1]}, "rope_scaling: expected an object"),
    ({"rope_parameters": [1]}, "rope_parameters: expected an object"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: expected true or false"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings: expected true or false"),
    ({"architectures": "LlamaForCausalLM"}, "architectures: expected a list of names, found 'Llama"),
    ({"architectures": [3]}, "architectures: expected a list of names, found [3]"),
    ({"layer_types": ["full_attention"]}, "layer_types: expected a list of 2 kinds"),
]


WRONG_OF_OTHERS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (GEMMA3, {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar: expected a positive number, found 0"),
    (GEMMA3, {"final_logit_softcapping": "30"}, "final_logit_softcapping: expected a positive number"),
    (GEMMA3, {"sliding_window_pattern": 0}, "sliding_window_pattern: expected 1 to"),
    (
        GEMMA3,
        {"rope_parameters": {"full_attention": 3}},
        "rope_parameters: full_attention: expected an object, found 3",
    ),
    (GEMMA3, {"rope_local_base_freq": -1.0}, "rope_local_base_freq: expected a positive number, found -1.0"),
    (GRANITE, {"residual_multiplier": True}, "residual_multiplier: expected a positive number, found True"),
    (GRANITE, {"logits_scaling": 0}, "logits_scaling: expected a positive number, found 0"),
    (PHI3, {"partial_rotary_factor": 1.5}, "partial_rotary_factor: expected at most 1, found 1.5"),
    (SMOLLM3, {"no_rope_layers": [1]}, "no_rope_layers: expected a list of 2 numbers 0 or 1, found [1]"),
    (SMOLLM3, {"no_rope_layers": "11"}, "no_rope_layers: expected a list of 2 numbers"),
    (SMOLLM3, {"no_rope_layer_interval": 0}, "no_rope_layer_interval: expected 1 to"),
]


@pytest.mark.parametrize(("raw", "change", "message"), WRONG_OF_OTHERS)
def test_wrong_values_of_other_parts_are_refused_by_name(
    raw: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(raw | change)
    assert message in str(caught.value)


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_wrong_values_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(LLAMA | change)
    assert message in str(caught.value)


words = st.text("silu_é", max_size=6)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=5,
)
FIELDS = [
    *LLAMA, "rope_scaling", "rope_parameters", "sliding_window", "layer_types", "head_dim", "num_experts",
    "no_rope_layers", "partial_rotary_factor", "query_pre_attn_scalar", "logits_scaling", "hidden_activation",
]  # fmt: skip


@given(
    base=st.sampled_from([LLAMA, QWEN2 | {"use_sliding_window": True}, GEMMA3, SMOLLM3, OLMO2, GRANITE, PHI3]),
    changes=st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=3),
)
def test_any_json_is_read_or_refused(base: dict[str, Any], changes: dict[str, Any]) -> None:
    with contextlib.suppress(BincompressError):
        assert isinstance(parse(base | changes), ModelConfig)


def test_rope_frequencies_by_hand() -> None:
    plain = rope.frequencies(rope.Rope(100.0), 4)
    assert np.allclose(plain, [1.0, 0.1])
    assert np.allclose(rope.frequencies(rope.Rope(100.0, "linear", 2.0), 4), [0.5, 0.05])
    # Wavelengths 6.3 and 62.8 against 32 / 4 = 8 and 32 / 1 = 32: the first stays, the second is stretched.
    assert np.allclose(rope.frequencies(rope.Rope(100.0, "llama3", 8.0, 1.0, 4.0, 32), 4), [1.0, 0.0125])
