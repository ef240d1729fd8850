"""Which architectures the decoder runs: one declaration each, of names, options and the defaults of absent fields."""

from dataclasses import dataclass
from typing import Literal

Windows = Literal["never", "every layer", "by layer_types"]
Biases = Literal["never", "always", "attention_bias"]


@dataclass(frozen=True)
class Names:
    """Tensor names; those of a layer are completed with its number."""

    embedding: str = "model.embed_tokens.weight"
    norm: str = "model.norm.weight"
    head: str = "lm_head.weight"
    layer: str = "model.layers.{layer}."
    input_norm: str = "input_layernorm.weight"
    post_norm: str = "post_attention_layernorm.weight"
    qkv: tuple[str, str, str] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    out: str = "self_attn.o_proj"
    q_norm: str = "self_attn.q_norm.weight"
    k_norm: str = "self_attn.k_norm.weight"
    gate_up: tuple[str, str] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"

    def of_layer(self, layer: int, part: str) -> str:
        """Return the full name of a layer's tensor."""
        return self.layer.format(layer=layer) + part


@dataclass(frozen=True)
class Architecture:
    """What sets one architecture apart from the others."""

    model_type: str
    context: int  # max_position_embeddings where config.json does not say
    kv_heads: int | None = None  # num_key_value_heads where absent; None: as many as heads
    head_dim: int | None = None  # head_dim where absent; None: hidden_size / num_attention_heads
    qkv_bias: Biases = "never"
    out_bias: Biases = "never"
    mlp_bias: bool = False  # whether the field mlp_bias is obeyed
    qk_norm: bool = False
    windows: Windows = "never"
    window: int | None = 4096  # sliding_window where absent
    names: Names = Names()


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
        qk_norm=True,
        windows="by layer_types",
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

# Fields that change the arithmetic of some model and that no architecture above has, with the values that do not.
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
    "attn_temperature_tuning": (None, False),
    "num_experts": (None, 0, 1),
    "num_local_experts": (None, 0, 1),
    "n_routed_experts": (None, 0, 1),
    "num_experts_per_tok": (None, 0, 1),
}
