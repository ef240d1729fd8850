"""Which architectures the decoder runs: one declaration each, of names, parts and the defaults of absent fields."""

from dataclasses import replace

from bincompress.model.declaration import Architecture, Mixture, Names, Recurrence, RecurrentNames

# The fields of `UNHANDLED` that a mixture of experts obeys.
_EXPERT_FIELDS = ("num_experts", "num_local_experts", "num_experts_per_tok")
_GRANITE = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
_OLMO = Names(
    input_norm="",
    post_norm="",
    out_norm="post_attention_layernorm.weight",
    down_norm="post_feedforward_layernorm.weight",
)
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
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        norm_offset=1.0,
        qk_norm="head",
        gated=True,
        rope_share=0.25,
        reads=("partial_rotary_factor",),
        only={"attn_output_gate": (None, True), "hidden_act": (None, "silu")},
        names=Names(recurrent=_DELTA),
        recurrence=_DELTA_LAYERS,
    )


ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture(
        "llama", context=2048, qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias=True
    ),
    "MistralForCausalLM": Architecture("mistral", context=131072, kv_heads=8, windows="every layer"),
    "Ministral3ForCausalLM": Architecture(
        "ministral3",
        context=262144,
        kv_heads=8,
        head_dim=128,
        epsilon=1e-5,
        rope={
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
        query_growth="llama_4_scaling_beta",
        windows="every layer",
        window=None,
    ),
    "Qwen2ForCausalLM": Architecture("qwen2", context=32768, kv_heads=32, qkv_bias="always", windows="by layer_types"),
    "Qwen3ForCausalLM": Architecture(
        "qwen3",
        context=32768,
        kv_heads=32,
        head_dim=128,
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        qk_norm="head",
        windows="by layer_types",
    ),
    "Gemma3ForCausalLM": Architecture(
        "gemma3_text",
        context=131072,
        kv_heads=4,
        head_dim=256,
        tied=True,
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        norm_offset=1.0,
        qk_norm="head",
        activation="gelu_pytorch_tanh",
        activation_field="hidden_activation",
        embedding_scaled=True,
        rope_theta=1000000.0,
        local_rope_theta=10000.0,
        local_rope_field="rope_local_base_freq",
        windows="by pattern",
        pattern=6,
        pattern_field="sliding_window_pattern",
        reads=("query_pre_attn_scalar", "final_logit_softcapping"),
        names=Names(
            post_norm="pre_feedforward_layernorm.weight",
            out_norm="post_attention_layernorm.weight",
            down_norm="post_feedforward_layernorm.weight",
        ),
    ),
    "SmolLM3ForCausalLM": Architecture(
        "smollm3",
        context=32768,
        kv_heads=4,
        tied=True,
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        mlp_bias=True,
        rope_theta=2000000.0,
        windows="without rope",
        window=None,
        reads=("no_rope_layers",),
    ),
    "Olmo2ForCausalLM": Architecture(
        "olmo2",
        context=2048,
        epsilon=1e-5,
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        qk_norm="whole",
        names=_OLMO,
    ),
    "Olmo3ForCausalLM": Architecture(
        "olmo3",
        context=2048,
        epsilon=1e-5,
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        qk_norm="whole",
        rope_theta=500000.0,
        local_rope_theta=500000.0,
        windows="by pattern",
        pattern=4,
        names=_OLMO,
    ),
    "GraniteForCausalLM": Architecture(
        "granite",
        context=2048,
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        mlp_bias=True,
        reads=_GRANITE,
    ),
    "GraniteMoeHybridForCausalLM": Architecture(
        "granitemoehybrid",
        context=2048,
        inner_field="shared_intermediate_size",
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        rope_switch="position_embedding_type",
        without_layer_types="every layer is a Mamba layer then",
        only={"num_local_experts": (0,)},
        reads=(*_GRANITE, "num_local_experts", "num_experts_per_tok"),
        names=Names(gate_up=("shared_mlp.gate_proj", "shared_mlp.up_proj"), down="shared_mlp.output_linear"),
    ),
    "Phi3ForCausalLM": Architecture(
        "phi3",
        context=4096,
        epsilon=1e-5,
        original_context=4096,
        rope_names={"su": "longrope", "yarn": "longrope"},
        windows="every layer",
        window=None,
        reads=("partial_rotary_factor",),
    ),
    "BitNetForCausalLM": Architecture(
        "bitnet",
        context=2048,
        kv_heads=5,
        epsilon=1e-5,
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        activation="relu2",
        rope_theta=500000.0,
        names=Names(mixed_norm="self_attn.attn_sub_norm.weight", inner_norm="mlp.ffn_sub_norm.weight"),
    ),
    "Qwen3MoeForCausalLM": Architecture(
        "qwen3_moe",
        context=32768,
        kv_heads=4,
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        qk_norm="head",
        windows="every layer if used",
        reads=_EXPERT_FIELDS,
        mixture=Mixture(128, 8, "moe_intermediate_size", 768, dense_layers=True),
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
    "GptOssForCausalLM": Architecture(
        "gpt_oss",
        context=131072,
        kv_heads=8,
        head_dim=64,
        epsilon=1e-5,
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        attention_bias=True,
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
            128, 4, "intermediate_size", 2880, normalized=True, by_logits=True, biased=True, clamp=(1.702, 7.0)
        ),
    ),
    "Qwen3NextForCausalLM": replace(
        _qwen35("qwen3_next", kv_heads=2),
        reads=("partial_rotary_factor", *_EXPERT_FIELDS, "shared_expert_intermediate_size"),
        names=Names(recurrent=replace(_DELTA, read=("linear_attn.in_proj_qkvz",), gates=("linear_attn.in_proj_ba",))),
        recurrence=replace(_DELTA_LAYERS, in_turns=True),
        mixture=Mixture(512, 10, "moe_intermediate_size", 512, sums_to_one=True, shared=True, dense_layers=True),
    ),
    "Qwen3_5ForCausalLM": _qwen35("qwen3_5_text", kv_heads=4),
    "Qwen3_5MoeForCausalLM": replace(
        _qwen35("qwen3_5_moe_text", kv_heads=2),
        reads=("partial_rotary_factor", *_EXPERT_FIELDS, "shared_expert_intermediate_size"),
        mixture=Mixture(256, 8, "moe_intermediate_size", 512, normalized=True, shared=True),
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
}
