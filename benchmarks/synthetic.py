"""Synthetic checkpoints of real models' shapes: random bfloat16 weights of trained-like scale, sharded."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors.numpy

LLAMA_3B = {
    "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24, "num_key_value_heads": 8,
    "head_dim": 128, "vocab_size": 128256, "num_hidden_layers": 28,
}  # fmt: skip
LLAMA_1B = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "vocab_size": 128256, "num_hidden_layers": 16,
}  # fmt: skip


def shapes(config: dict[str, int]) -> list[dict[str, tuple[int, ...]]]:
    """Return the tensors of every shard: the embeddings, then a shard a layer, with the last norm in the last."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"] * config["head_dim"]
    kv_heads = config["num_key_value_heads"] * config["head_dim"]
    shards: list[dict[str, tuple[int, ...]]] = [{"model.embed_tokens.weight": (config["vocab_size"], hidden)}]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shards.append(
            {
                prefix + "self_attn.q_proj.weight": (heads, hidden),
                prefix + "self_attn.k_proj.weight": (kv_heads, hidden),
                prefix + "self_attn.v_proj.weight": (kv_heads, hidden),
                prefix + "self_attn.o_proj.weight": (hidden, heads),
                prefix + "mlp.gate_proj.weight": (inner, hidden),
                prefix + "mlp.up_proj.weight": (inner, hidden),
                prefix + "mlp.down_proj.weight": (hidden, inner),
                prefix + "input_layernorm.weight": (hidden,),
                prefix + "post_attention_layernorm.weight": (hidden,),
            }
        )
    shards[-1]["model.norm.weight"] = (hidden,)
    return shards


def bfloat16_normal(shape: tuple[int, ...], scale: float, random: np.random.Generator) -> np.ndarray:
    """Return normal values as bfloat16 patterns; rows differ in scale as in trained matrices."""
    values = random.standard_normal(shape, np.float32)
    values *= np.float32(scale) * random.uniform(0.7, 1.3, (shape[0], *[1] * (len(shape) - 1))).astype(np.float32)
    return ((values.view(np.uint32) + np.uint32(0x8000)) >> np.uint32(16)).astype(np.uint16)


def write_checkpoint(folder: Path, config: dict[str, int], seed: int = 0, tied: bool = True) -> int:
    """Write a Llama checkpoint with these sizes and return the bytes of its tensors."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    weight_map: dict[str, str] = {}
    total = 0
    shards = shapes(config)
    if not tied:
        shards[0]["lm_head.weight"] = shards[0]["model.embed_tokens.weight"]
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        data = {}
        for tensor, shape in shard.items():
            bits = bfloat16_normal(shape, 0.02, random) if len(shape) == 2 else np.full(shape, 0x3F80, np.uint16)
            data[tensor] = bits.view(ml_dtypes.bfloat16)
            weight_map[tensor] = name
            total += bits.nbytes
        safetensors.numpy.save_file(data, folder / name, {"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    full = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "max_position_embeddings": 8192, "tie_word_embeddings": tied, "torch_dtype": "bfloat16",
        "bos_token_id": 0, "eos_token_id": 1, **config,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(full, indent=1))
    return total
