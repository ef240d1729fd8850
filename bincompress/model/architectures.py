"""Which architectures the decoder runs: one declaration each, of names, parts and the defaults of absent fields."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

# Which layers see a window of positions: where layer_types does not say, every layer (always, or if
# use_sliding_window), those from max_window_layers on (if use_sliding_window), all but every sixth
# (sliding_window_pattern), or those without rotary embedding (if use_sliding_window).
Windows = Literal["never", "every layer", "every layer if used", "by layer_types", "by pattern", "without rope"]
Biases = Literal["never", "always", "attention_bias"]
QkNorm = Literal["", "head", "whole"]  # queries and keys are not normalized, or each head is, or all heads at once
Activation = Literal["silu", "gelu_tanh", "relu2"]

# What config.json calls the activations of the gate.
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu2": "relu2",
}


@dataclass(frozen=True)
class Names:
    """Tensor names; those of a layer are completed with its number. A norm that an architecture lacks is empty."""

    embedding: str = "model.embed_tokens.weight"
    norm: str = "model.norm.weight"
    head: str = "lm_head.weight"
    layer: str = "model.layers.{layer}."
    input_norm: str = "input_layernorm.weight"  # before attention
    post_norm: str = "post_attention_layernorm.weight"  # before the MLP
    out_norm: str = ""  # of what attention gives, before it is added to the stream
    down_norm: str = ""  # of what the MLP gives, before it is added to the stream
    mixed_norm: str = ""  # of what attention mixes, before the matrix that reads it
    inner_norm: str = ""  # of the gated values, before the matrix that reads them
    qkv: tuple[str, str, str] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    out: str = "self_attn.o_proj"
    q_norm: str = "self_attn.q_norm.weight"
    k_norm: str = "self_attn.k_norm.weight"
    gate_up: tuple[str, str] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    router: str = "mlp.gate"  # of a mixture of experts; an expert's matrices are completed with its number
    expert_gate_up: tuple[str, str] = ("mlp.experts.{expert}.gate_proj", "mlp.experts.{expert}.up_proj")
    expert_down: str = "mlp.experts.{expert}.down_proj"

    def of_layer(self, layer: int, part: str) -> str:
        """Return the full name of a layer's tensor."""
        return self.layer.format(layer=layer) + part

    def of_expert(self, layer: int, expert: int) -> tuple[tuple[str, str], str]:
        """Return the full names of an expert's gate and up matrices, and of its down matrix."""
        gate, up = (self.of_layer(layer, f"{part.format(expert=expert)}.weight") for part in self.expert_gate_up)
        return (gate, up), self.of_layer(layer, f"{self.expert_down.format(expert=expert)}.weight")


@dataclass(frozen=True)
class Mixture:
    """How an architecture's layers choose among experts: the softmax over all of them, and the largest `chosen`."""

    count: int  # num_experts or num_local_experts, where absent
    chosen: int  # num_experts_per_tok where absent
    inner_field: str  # which field has the rows of an expert's gate
    inner: int  # that field where absent
    normalized: bool | None = None  # whether the chosen weights sum to one; None: as norm_topk_prob says
    dense_layers: bool = False  # whether mlp_only_layers and decoder_sparse_step give some layers a dense MLP


@dataclass(frozen=True)
class Architecture:
    """What sets one architecture apart from the others."""

    model_type: str
    context: int  # max_position_embeddings where config.json does not say
    kv_heads: int | None = None  # num_key_value_heads where absent; None: as many as heads
    head_dim: int | None = None  # head_dim where absent; None: hidden_size / num_attention_heads
    epsilon: float = 1e-6  # rms_norm_eps where absent
    tied: bool = False  # tie_word_embeddings where absent
    qkv_bias: Biases = "never"
    out_bias: Biases = "never"
    mlp_bias: bool = False  # whether the field mlp_bias is obeyed
    norm_offset: float = 0.0  # what is added to every stored weight of a norm
    qk_norm: QkNorm = ""
    activation: str = "silu"  # of the gate, where absent
    activation_field: str = "hidden_act"
    embedding_scaled: bool = False  # by the square root of hidden_size
    rope_theta: float = 10000.0  # where absent
    original_context: int | None = None  # where absent, before what rope_scaling says; None: that, or the context
    rope_names: Mapping[str, str] = field(default_factory=dict)  # kinds of rope by other names
    local_rope_theta: float | None = None  # of layers with a window, where they have a rotary embedding of their own
    windows: Windows = "never"
    window: int | None = 4096  # sliding_window where absent
    reads: tuple[str, ...] = ()  # fields of UNHANDLED that are obeyed
    names: Names = Names()
    other_names: tuple[Names, ...] = ()  # that checkpoints of another form have
    mixture: Mixture | None = None


# The fields of `UNHANDLED` that a mixture of experts obeys.
_EXPERT_FIELDS = ("num_experts", "num_local_experts", "num_experts_per_tok")
_MIXTRAL = ("experts.{expert}.w1", "experts.{expert}.w3", "experts.{expert}.w2")


def _mixtral_names(block: str) -> Names:
    """Return names where the experts are in this block of a layer."""
    gate, up, down = (f"{block}.{part}" for part in _MIXTRAL)
    return Names(router=f"{block}.gate", expert_gate_up=(gate, up), expert_down=down)


ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture(
        "llama", context=2048, qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias=True
    ),
    "MistralForCausalLM": Architecture("mistral", context=131072, kv_heads=8, windows="every layer"),
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
        windows="by pattern",
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
        names=Names(
            input_norm="",
            post_norm="",
            out_norm="post_attention_layernorm.weight",
            down_norm="post_feedforward_layernorm.weight",
        ),
    ),
    "GraniteForCausalLM": Architecture(
        "granite",
        context=2048,
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        mlp_bias=True,
        reads=("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"),
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
}

# How names of classes begin that are of other families: with a known model_type they contradict it, while a name that
# nobody knows (LLaMAForCausalLM, MyModelForCausalLM) is a spelling, and model_type decides.
OTHER_FAMILIES = (
    "albert", "apertus", "arctic", "baichuan", "bamba", "bart", "bert", "bitnet", "bloom", "chatglm", "cohere", "dbrx",
    "deepseek", "ernie4", "exaone", "falcon", "gemma", "glm", "gpt", "granite", "grok", "internlm", "jamba", "jetmoe",
    "lfm", "llama4", "mamba", "minicpm", "minimax", "ministral", "mixtral", "mllama", "modernbert", "mpt", "nemotron",
    "olmo", "optfor", "persimmon", "phi", "qwen2_", "qwen2audio", "qwen2moe", "qwen2vl", "qwen3_", "qwen3moe",
    "qwen3next", "qwen3omni", "qwen3vl", "recurrentgemma", "roberta", "rwkv", "seedoss", "smollm3", "stablelm",
    "starcoder", "t5", "xlnet", "zamba",
)  # fmt: skip

# Fields that change the arithmetic of some model, with the values that do not. An architecture that has one says so.
UNHANDLED: dict[str, tuple[object, ...]] = {
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1, 1.0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logits_soft_cap": (None,),
    "query_pre_attn_scalar": (None,),
    "attention_multiplier": (None, 1, 1.0),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "logit_scale": (None, 1, 1.0),
    "clip_qkv": (None,),
    "attention_chunk_size": (None,),
    "no_rope_layers": (None,),
    "use_mrope": (None, False),
    "use_bidirectional_attention": (None, False),
    "is_causal": (None, True),
    "attn_temperature_tuning": (None, False),
    "num_experts": (None, 0, 1),
    "num_local_experts": (None, 0, 1),
    "n_routed_experts": (None, 0, 1),
    "n_shared_experts": (None, 0),
    "shared_expert_intermediate_size": (None, 0),
    "routed_scaling_factor": (None, 1, 1.0),
    "num_experts_per_tok": (None, 0, 1),
}
