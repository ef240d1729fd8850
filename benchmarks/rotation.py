"""Does a rotation of the residual stream help before planes are chosen? Writes the rotated checkpoint.

    python -m benchmarks.rotation ./model ./rotated --block 128
    bincompress compress ./rotated ./store --method xnor && bincompress evaluate ./store --text valid.txt

Llama and Qwen2 checkpoints: the stream turns by a Hadamard matrix with random signs over blocks of channels, each
head's values by another; norms' weights go into the matrices behind them. The rotated model computes what the model
computes.
"""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from bincompress.sources.hub import open_source
from bincompress.sources.reading import read_weight

Matrix = NDArray[np.float32]
_ASSETS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")


def hadamard(size: int) -> Matrix:
    """Return the orthogonal Hadamard matrix of a power of two, float32 (size, size)."""
    found: Matrix = np.ones((1, 1), np.float32)
    while len(found) < size:
        found = np.block([[found, found], [found, -found]])
    if len(found) != size:
        raise SystemExit(f"--block {size}: expected a power of two")
    return found * np.float32(size**-0.5)


def turn(size: int, block: int, seed: int) -> Callable[[Matrix], Matrix]:
    """Return what turns the last axis (of `size`) of a matrix: random signs, then Hadamard over blocks."""
    if size % block:
        raise SystemExit(f"--block {block}: expected a divisor of {size}")
    signs = np.random.default_rng(seed).choice(np.array([-1, 1], np.float32), size)
    square = hadamard(block)
    return lambda matrix: ((matrix * signs).reshape(-1, block) @ square).reshape(matrix.shape)


def rotated(read: Callable[[str], Matrix], config: dict[str, int], names: set[str], block: int) -> dict[str, Matrix]:
    """Return all tensors of the rotated model by name."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    kv_heads = config.get("num_key_value_heads", heads)
    stream, values = turn(hidden, block, 0), turn(head_dim, head_dim & -head_dim, 1)
    embeddings = read("model.embed_tokens.weight")
    head = read("lm_head.weight") if "lm_head.weight" in names else embeddings
    found = {
        "model.embed_tokens.weight": stream(embeddings),
        "lm_head.weight": stream(head * read("model.norm.weight")),
        "model.norm.weight": np.ones(hidden, np.float32),
    }
    for layer in range(config["num_hidden_layers"]):
        place = f"model.layers.{layer}."
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            weight = read(f"{place}{norm}.weight")
            found[f"{place}{norm}.weight"] = np.ones_like(weight)
            for name in readers:
                found[f"{place}{name}.weight"] = stream(read(f"{place}{name}.weight") * weight)
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            if f"{place}{name}.bias" in names:
                found[f"{place}{name}.bias"] = read(f"{place}{name}.bias")
        v, o = f"{place}self_attn.v_proj", f"{place}self_attn.o_proj.weight"
        by_head = found[f"{v}.weight"].reshape(kv_heads, head_dim, hidden)
        found[f"{v}.weight"] = values(by_head.transpose(0, 2, 1)).transpose(0, 2, 1).reshape(-1, hidden)
        if f"{v}.bias" in found:
            found[f"{v}.bias"] = values(found[f"{v}.bias"].reshape(kv_heads, head_dim)).reshape(-1)
        out = values(read(o).reshape(hidden, heads, head_dim)).reshape(hidden, -1)
        found[o] = stream(out.T).T
        down = f"{place}mlp.down_proj.weight"
        found[down] = stream(read(down).T).T
    return {name: np.ascontiguousarray(tensor) for name, tensor in found.items()}


def main() -> None:
    """Write the rotated checkpoint, in float32."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--block", type=int, default=128, help="channels that turn together, a power of two")
    chosen = parser.parse_args()
    source = open_source(str(chosen.model))
    config = json.loads((chosen.model / "config.json").read_text())
    if config.get("model_type") not in ("llama", "qwen2"):
        raise SystemExit(f"{chosen.model}: a {config.get('model_type')} model; expected llama or qwen2")
    tensors = rotated(
        lambda name: read_weight(source.tensors[name]).float32().reshape(source.tensors[name].shape),
        config, set(source.tensors), chosen.block,
    )  # fmt: skip
    chosen.out.mkdir(parents=True)
    save_file(tensors, chosen.out / "model.safetensors", metadata={"format": "pt"})
    (chosen.out / "config.json").write_text(
        json.dumps({**config, "tie_word_embeddings": False, "torch_dtype": "float32", "dtype": "float32"}, indent=2)
    )
    for name in _ASSETS:
        if (chosen.model / name).exists():
            shutil.copy(chosen.model / name, chosen.out / name)


if __name__ == "__main__":
    main()
