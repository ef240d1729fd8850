"""GGUF files as llama.cpp writes them, made here from a checkpoint's tensors; and raw headers, which may be wrong."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bincompress.exporting.gguf import writer_of

Tensors = dict[str, NDArray[np.float32]]
GLOBAL = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
ARCHES = {"gemma3_text": "gemma3", "mistral": "llama"}
PERMUTED = ("llama", "mistral", "smollm3", "granite")


def gguf_name(arch: str, name: str) -> str:
    stem, _, end = name.rpartition(".")
    if stem in GLOBAL:
        return f"{GLOBAL[stem]}.{end}"
    _, _, layer, part = stem.split(".", 3)
    own = {"post_attention_layernorm": "post_attention_norm"} if arch in ("gemma3", "olmo2") else {}
    return f"blk.{layer}.{(LAYER | own)[part]}.{end}"


def permute(weights: NDArray[Any], heads: int) -> NDArray[Any]:
    """As llama.cpp's converter does."""
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weights.shape))


def converted(config: dict[str, Any], tensors: Tensors) -> Tensors:
    """A checkpoint's tensors as llama.cpp has them."""
    kind = config["model_type"]
    arch = ARCHES.get(kind, kind)
    found: Tensors = {}
    for name, value in tensors.items():
        if kind in PERMUTED and ".q_proj." in name:
            value = permute(value, config["num_attention_heads"])
        elif kind in PERMUTED and ".k_proj." in name:
            value = permute(value, config["num_key_value_heads"])
        elif arch == "gemma3" and name.endswith("norm.weight"):
            value = value + np.float32(1)
        found[gguf_name(arch, name)] = value
    return found


def metadata_of(config: dict[str, Any]) -> dict[str, Any]:
    """The metadata of an architecture, by key."""
    arch = ARCHES.get(config["model_type"], config["model_type"])
    own: dict[str, Any] = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": config["rope_theta"],
        "rope.dimension_count": int(config["head_dim"] * config.get("partial_rotary_factor", 1.0)),
        "attention.sliding_window": config.get("sliding_window") if arch in ("gemma3", "phi3") else None,
        "attention.scale": config.get("attention_multiplier"),
        "embedding_scale": config.get("embedding_multiplier"),
        "residual_scale": config.get("residual_multiplier"),
        "logit_scale": config.get("logits_scaling"),
        "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in config.get("layer_types", [])]
        or None,
    }
    return {"general.architecture": arch} | {f"{arch}.{key}": value for key, value in own.items() if value is not None}


def write_gguf(path: Path, metadata: dict[str, Any], tensors: Tensors, kinds: dict[str, str] | None = None) -> Path:
    """Write a file by the gguf package; kinds: the type of each tensor that is not F32."""
    import gguf

    writer = writer_of(path, metadata)
    for name, value in tensors.items():
        kind = gguf.GGMLQuantizationType[(kinds or {}).get(name, "F32")]
        if kind.name == "F16":
            writer.add_tensor(name, value.astype(np.float16))
        elif kind.name == "F32":
            writer.add_tensor(name, value)
        else:
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# Raw headers


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def entry(key: str | bytes, value: Any) -> bytes:
    """A key with a text, a number or a list of texts."""
    if isinstance(value, str):
        return text(key) + struct.pack("<I", 8) + text(value)
    if isinstance(value, list):
        return text(key) + struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
    if isinstance(value, float):
        return text(key) + struct.pack("<If", 6, value)
    return text(key) + struct.pack("<II", 4, value)


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    dims = struct.pack(f"<{len(shape)}Q", *reversed(shape))
    return text(name) + struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", kind, offset)


def raw(
    entries: list[bytes],
    tensors: list[bytes],
    data: int = 4096,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """A file of these parts; counts: of tensors and keys, where they are not what is there."""
    own = counts or (len(tensors), len(entries))
    head = b"GGUF" + struct.pack("<IQQ", version, *own) + b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


def numbers(arch: str, **changes: Any) -> list[bytes]:
    """The entries that every model has; a changed one has __ for the dots of its key."""
    own = {
        "context_length": 128, "embedding_length": 256, "block_count": 1, "feed_forward_length": 256,
        "attention.head_count": 4, "attention.layer_norm_rms_epsilon": 1e-5,
    }  # fmt: skip
    return [entry(f"{arch}.{key.replace('__', '.')}", value) for key, value in (own | changes).items()]
