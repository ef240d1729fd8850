"""Declarations of architectures with a mixture of experts, or with layers that read a state in place of attention."""

from dataclasses import replace

from bincompress.model.declaration import (
    ATTENTION_BIASES,
    Architecture,
    BiasFields,
    Mixture,
    Names,
    Recurrence,
    RecurrentNames,
)

# The fields of `UNHANDLED` that a mixture of experts obeys.
_EXPERT_FIELDS = ("num_experts", "num_local_experts", "num_experts_per_tok")
GRANITE_FIELDS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
_DELTA = RecurrentNames(
    read=("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"),
    out="linear_attn.out_proj",
    convolution="linear_attn.conv1d",
    gates=("linear_attn.in_proj_b", "linear_attn.in_proj_a"),
    norm="linear_attn.norm.weight",
    rates="linear_attn.A_log",
    offsets="linear_attn.dt_bias",
)
_DELTA_LAYERS = Recurrence("delta", "linear_attention", interval="full_attention_interval")
_LFM2 = Names(
    norm="model.embedding_norm.weight",
    input_norm="operator_norm.weight",
    post_norm="ffn_norm.weight",
    out="self_attn.out_proj",
    q_norm="self_attn.q_layernorm.weight",
    k_norm="self_attn.k_layernorm.weight",
    gate_up=("feed_forward.w1", "feed_forward.w3"),
    down="feed_forward.w2",
    recurrent=RecurrentNames(read=("conv.in_proj",), out="conv.out_proj", convolution="conv.conv"),
)
_MIXTRAL = ("experts.{expert}.w1", "experts.{expert}.w3", "experts.{expert}.w2")


def _mixtral_names(block: str) -> Names:
    """Return names where the experts are in this block of a layer."""
    gate, up, down = (f"{block}.{part}" for part in _MIXTRAL)
    return Names(router=f"{block}.gate", expert_gate_up=(gate, up), expert_down=down)


def _qwen35(model_type: str, kv_heads: int) -> Architecture:
    """Return the declaration of a dense model, most of whose layers have the gated delta rule in place of attention."""
    return Architecture(
        model_type,
        context=32768,
        kv_heads=kv_heads,
        head_dim=256,
        biases=ATTENTION_BIASES,
        norm_offset=1.0,
        qk_norm="head",
        gated=True,
        rope_share=0.25,
        reads=("partial_rotary_factor",),
        only={"attn_output_gate": (None, True), "hidden_act": (None, "silu")},
        names=Names(recurrent=_DELTA),
        recurrence=_DELTA_LAYERS,
    )


ROUTED_AND_RECURRENT: dict[str, Architecture] = {
    "Qwen3MoeForCausalLM": Architecture(
        "qwen3_moe",
        context=32768,
        kv_heads=4,
        biases=ATTENTION_BIASES,
        qk_norm="head",
        windows="every layer if used",
        reads=_EXPERT_FIELDS,
        mixture=Mixture(128, 8, "moe_intermediate_size", 768, dense_layers=True),
    ),
    "Qwen2MoeForCausalLM": Architecture(
        "qwen2_moe",
        context=32768,
        kv_heads=16,
        biases=BiasFields(qkv="qkv_bias", default=True),
        only={"use_sliding_window": (None, False)},
        reads=(*_EXPERT_FIELDS, "shared_expert_intermediate_size"),
        mixture=Mixture(60, 4, "moe_intermediate_size", 1408, shared=5632, dense_layers=True),
    ),
    "OlmoeForCausalLM": Architecture(
        "olmoe",
        context=4096,
        epsilon=1e-5,
        biases=ATTENTION_BIASES,
        qk_norm="whole",
        reads=_EXPERT_FIELDS,
        mixture=Mixture(64, 8, "intermediate_size", 2048),
    ),
    "MixtralForCausalLM": Architecture(
        "mixtral",
        context=131072,
        kv_heads=8,
        epsilon=1e-5,
        rope_theta=1000000.0,
        windows="every layer",
        window=None,
        reads=_EXPERT_FIELDS,
        names=_mixtral_names("block_sparse_moe"),
        other_names=(_mixtral_names("mlp"),),  # of transformers 5, where experts are stored as 3-D tensors
        mixture=Mixture(8, 2, "intermediate_size", 14336, normalized=True),
    ),
    "MiniMaxM2ForCausalLM": Architecture(
        "minimax_m2",
        context=196608,
        kv_heads=8,
        head_dim=128,
        qk_norm="whole",
        rope_theta=5000000.0,
        rope_items_field="rotary_dim",
        reads=("partial_rotary_factor", *_EXPERT_FIELDS),
        only={
            "scoring_func": (None, "sigmoid"),
            "qk_norm_type": (None, "per_layer"),
            "use_qk_norm": (None, True),
            "use_routing_bias": (None, True),
        },
        names=replace(_mixtral_names("block_sparse_moe"), router_offset="block_sparse_moe.e_score_correction_bias"),
        mixture=Mixture(
            256,
            8,
            "intermediate_size",
            1536,
            normalized=True,
            choice="sigmoid",
            added=0.0,
            offset_field="use_routing_bias",
        ),
    ),
    "Glm4MoeForCausalLM": Architecture(
        "glm4_moe",
        context=131072,
        kv_heads=8,
        epsilon=1e-5,
        biases=BiasFields("attention_bias"),
        qk_norm="head",
        qk_norm_field="use_qk_norm",
        rope_share=0.5,
        reads=(
            "partial_rotary_factor",
            "n_routed_experts",
            "n_shared_experts",
            "num_experts_per_tok",
            "routed_scaling_factor",
        ),
        only={"n_group": (None, 1), "topk_group": (None, 1), "scoring_func": (None, "sigmoid")},
        names=Names(
            router_offset="mlp.gate.e_score_correction_bias",
            shared_gate_up=("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
            shared_down="mlp.shared_experts.down_proj",
            shared_gate="",
        ),
        mixture=Mixture(
            128,
            8,
            "moe_intermediate_size",
            1408,
            sums_to_one=True,
            choice="sigmoid",
            added=1e-20,
            offset_field="use_routing_bias",
            dense_field="first_k_dense_replace",
            dense_default=1,
            shared_count_field="n_shared_experts",
            count_fields=("n_routed_experts",),
        ),
    ),
    "GraniteMoeForCausalLM": Architecture(
        "granitemoe",
        context=2048,
        biases=ATTENTION_BIASES,
        reads=(*GRANITE_FIELDS, *_EXPERT_FIELDS),
        names=Names(
            router="block_sparse_moe.router.layer",
            expert_gate_up=(
                "block_sparse_moe.experts.{expert}.gate_proj",
                "block_sparse_moe.experts.{expert}.up_proj",
            ),
            expert_down="block_sparse_moe.experts.{expert}.down_proj",
        ),
        mixture=Mixture(8, 2, "intermediate_size", 11008, normalized=True, choice="logits"),
    ),
    "GptOssForCausalLM": Architecture(
        "gpt_oss",
        context=131072,
        kv_heads=8,
        head_dim=64,
        epsilon=1e-5,
        biases=replace(ATTENTION_BIASES, default=True),
        rope_theta=150000.0,
        rope={
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        windows="by pattern",
        window=128,
        pattern=2,
        reads=_EXPERT_FIELDS,
        names=Names(
            sinks="self_attn.sinks",
            router="mlp.router",
            expert_biases=("mlp.experts.gate_up_proj_bias", "mlp.experts.down_proj_bias"),
        ),
        mixture=Mixture(
            128, 4, "intermediate_size", 2880, normalized=True, choice="logits", biased=True, clamp=(1.702, 7.0)
        ),
    ),
    "Qwen3NextForCausalLM": replace(
        _qwen35("qwen3_next", kv_heads=2),
        reads=("partial_rotary_factor", *_EXPERT_FIELDS, "shared_expert_intermediate_size"),
        names=Names(recurrent=replace(_DELTA, read=("linear_attn.in_proj_qkvz",), gates=("linear_attn.in_proj_ba",))),
        recurrence=replace(_DELTA_LAYERS, in_turns=True),
        mixture=Mixture(512, 10, "moe_intermediate_size", 512, sums_to_one=True, shared=512, dense_layers=True),
    ),
    "Qwen3_5ForCausalLM": _qwen35("qwen3_5_text", kv_heads=4),
    "Qwen3_5MoeForCausalLM": replace(
        _qwen35("qwen3_5_moe_text", kv_heads=2),
        reads=("partial_rotary_factor", *_EXPERT_FIELDS, "shared_expert_intermediate_size"),
        mixture=Mixture(256, 8, "moe_intermediate_size", 512, normalized=True, shared=512),
    ),
    "Lfm2ForCausalLM": Architecture(
        "lfm2",
        context=128000,
        kv_heads=8,
        epsilon=1e-5,
        epsilon_field="norm_eps",
        tied=True,
        tied_field="tie_embedding",
        adjusted_inner=True,
        qk_norm="head",
        rope_theta=1000000.0,
        only={"hidden_act": (None, "silu")},
        names=_LFM2,
        recurrence=Recurrence("convolution", "conv", listed="full_attn_idxs"),
    ),
    "Lfm2MoeForCausalLM": Architecture(
        "lfm2_moe",
        context=128000,
        kv_heads=8,
        epsilon=1e-5,
        epsilon_field="norm_eps",
        tied=True,
        tied_field="tie_embedding",
        qk_norm="head",
        rope_theta=1000000.0,
        without_layer_types="nothing says which layers have attention",
        only={"hidden_act": (None, "silu")},
        reads=("num_experts", "num_experts_per_tok", "routed_scaling_factor"),
        names=replace(
            _LFM2,
            router="feed_forward.gate",
            router_offset="feed_forward.expert_bias",
            expert_gate_up=("feed_forward.experts.{expert}.w1", "feed_forward.experts.{expert}.w3"),
            expert_down="feed_forward.experts.{expert}.w2",
        ),
        recurrence=Recurrence("convolution", "conv"),
        mixture=Mixture(
            32,
            4,
            "moe_intermediate_size",
            1792,
            sums_to_one=True,
            choice="sigmoid",
            offset_field="use_expert_bias",
            dense_field="num_dense_layers",
            dense_default=2,
        ),
    ),
}
