"""What are the tensors of a GGUF file called in a checkpoint of transformers, and what does llama.cpp do to them?

Source: gguf-py, tensor_mapping.py; llama.cpp, conversion/.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from bincompress.errors import CheckpointError

_LAYER = re.compile(r"blk\.(0|[1-9]\d{0,5})\.([a-z0-9_]+)\.(weight|bias)")
_IN_CHECKPOINT = re.compile(r"model\.layers\.(0|[1-9]\d{0,5})\.([a-z0-9_.]+)\.(weight|bias)")
_GLOBAL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
# Tensors of rotary embeddings, of which config.json is made.
ROPE = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_COMMON = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BEFORE = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_HEADS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_AFTER = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}


@dataclass(frozen=True)
class Family:
    """How llama.cpp writes one architecture: which it is in transformers, and what it does to the tensors."""

    model_type: str
    architecture: str
    layer: Mapping[str, str] = field(default_factory=lambda: _COMMON | _BEFORE)
    permuted: bool = False  # whether the rows of queries and keys are in another order
    norms_plus_one: bool = False  # whether 1 is added to the weights of norms


FAMILIES: dict[str, Family] = {
    "llama": Family("llama", "LlamaForCausalLM", permuted=True),
    "mistral": Family("mistral", "MistralForCausalLM", permuted=True),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", _COMMON | _BEFORE | _HEADS),
    "gemma3": Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        _COMMON | _HEADS | _AFTER | {"attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm"},
        norms_plus_one=True,
    ),
    "phi3": Family(
        "phi3",
        "Phi3ForCausalLM",
        {
            **_BEFORE,
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
        },
    ),
    "smollm3": Family("smollm3", "SmolLM3ForCausalLM", permuted=True),
    "olmo2": Family("olmo2", "Olmo2ForCausalLM", _COMMON | _HEADS | _AFTER),
    "granite": Family("granite", "GraniteForCausalLM", permuted=True),
}


def name_of(family: Family, name: str) -> str:
    """Return a tensor's name in a checkpoint; raises CheckpointError where the architecture has no such tensor."""
    if name in _GLOBAL:
        return _GLOBAL[name]
    match = _LAYER.fullmatch(name)
    if match is None or match[2] not in family.layer:
        raise CheckpointError(f"{name[:80]!r}: not a tensor of {family.architecture} that is known in GGUF files")
    return f"model.layers.{match[1]}.{family.layer[match[2]]}.{match[3]}"


def file_name(family: Family, name: str) -> str | None:
    """Return a checkpoint tensor's name in a GGUF file, the inverse of `name_of`; None where it has none."""
    whole = next((ours for ours, theirs in _GLOBAL.items() if theirs == name), None)
    match = _IN_CHECKPOINT.fullmatch(name)
    if whole is not None or match is None:
        return whole
    part = next((ours for ours, theirs in family.layer.items() if theirs == match[2]), None)
    return None if part is None else f"blk.{match[1]}.{part}.{match[3]}"


def arch_of(architecture: str) -> str | None:
    """Return what llama.cpp calls an architecture of transformers, None where it is not known here.

    Mistral is "llama" to llama.cpp, whose files "mistral" are another program's.
    """
    if architecture == "MistralForCausalLM":
        return "llama"
    return next((arch for arch, family in FAMILIES.items() if family.architecture == architecture), None)


def heads_in_turns(family: Family, name: str, heads: int, kv_heads: int) -> int:
    """Return of how many heads a tensor has the rows, where the file has the halves of each in turns; 0 elsewhere."""
    if family.permuted and ".self_attn.q_proj." in name:
        return heads
    return kv_heads if family.permuted and ".self_attn.k_proj." in name else 0


def one_more(family: Family, name: str) -> bool:
    """Return whether the file has 1 added to a tensor's values."""
    return family.norms_plus_one and name.endswith("norm.weight")
