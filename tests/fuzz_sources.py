"""What does the fuzzer change of quantized checkpoints and GGUF files, and what is then done with them?"""

import json
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np

from bincompress.compression.plan import make_plan
from bincompress.compression.recipe import load_recipe
from bincompress.errors import BincompressError
from bincompress.model.tokenizer import load_tokenizer
from bincompress.sources.checkpoint import read_weight
from bincompress.sources.hub import open_source
from tests.conftest import tiny_config, tiny_tensors, write_model
from tests.fuzz_mutations import Files, mutated_bytes, mutated_json, written
from tests.quantized import FORMS, quantized

_KINDS = (
    "fp8 blocks",
    "fp8 row",
    "gptq 4 order",
    "awq",
    "int4 group order zeros",
    "int8 channel zeros",
    "float tensor",
)
_CONFIGS: tuple[Any, ...] = (
    "gptq", "gptq_v2", "awq", "fp8", "mxfp4", "compressed-tensors", "pack-quantized", "int-quantized",
    "naive-quantized", "re:(a+)+$", "re:.*.*.*.*.*x", "re:[", "Linear", ["lm_head"], ["re:.*"], "group", "block",
    "channel", "tensor", [128, 128], [1 << 24, 1], 4, 8, 32, -1,
)  # fmt: skip


# Quantized checkpoints


def quantized_seeds(folder: Path) -> list[Files]:
    """Return small checkpoints of several forms."""
    found = []
    for number, kind in enumerate(_KINDS):
        stored, forms = quantized(tiny_tensors(1, 64, 64), FORMS[kind])
        config = tiny_config(1, 64, 64) | {"quantization_config": next(iter(forms.values())).config}
        path = write_model(folder / str(number), stored, config)
        found.append({str(file.relative_to(path)): file.read_bytes() for file in path.iterdir()})
    return found


def change_quantized(chance: random.Random, files: Files) -> Files:
    """Change quantization_config, the header, or bytes, which are mostly those of a part."""
    found, name = dict(files), "model.safetensors"
    what = chance.random()
    size = int.from_bytes(files[name][:8], "little")
    if what < 0.5:
        config = json.loads(files["config.json"])
        config["quantization_config"] = mutated_json(chance, config["quantization_config"], _CONFIGS)
        found["config.json"] = written(chance, config)
    elif what < 0.8:
        tree = json.loads(files[name][8 : 8 + size])
        tensor = chance.choice(list(tree))
        if chance.random() < 0.5 and isinstance(tree[tensor], dict) and "shape" in tree[tensor]:
            tree[tensor]["shape"] = tree[tensor]["shape"][::-1]
        else:
            tree = mutated_json(chance, tree, ("I32", "I8", "F8_E4M3", "F16", [64], [1, 64], [64, 1], [2]))
        header = written(chance, tree)
        found[name] = len(header).to_bytes(8, "little") + header + files[name][8 + size :]
    else:
        found[name] = files[name][: 8 + size] + mutated_bytes(chance, files[name][8 + size :])
    return found


# GGUF

_TYPES = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
_PALETTE: tuple[Any, ...] = (
    "qwen2", "llama", "gemma3", "phi3", "gpt2", "llama-bpe", "tekken", ["array", 8, ["a", "b"]], ["array", 4, [1, 2]],
    ["array", 8, ["t" * 3000] * 8], [4, 1 << 31], [6, 1e38], [8, "yarn"], [10, 1 << 63], [7, 1], 8, 12, 16, 30, 99,
    [64, 64], [1 << 40, 64], [0], 32, 31,
)  # fmt: skip


def gguf_seeds(folder: Path) -> list[Files]:
    """Return files of three architectures, with the tree that each was made of."""
    return [
        {"tree.json": json.dumps(tree).encode(), "m.gguf": built(tree)}
        for tree in map(_tree, ("llama", "gemma3", "phi3"))
    ]


def _tree(arch: str) -> dict[str, Any]:
    """Return a sound file as JSON: keys with a type and a value, tensors with dimensions, type and offset."""
    sizes = {
        "context_length": 128, "embedding_length": 64, "block_count": 1, "feed_forward_length": 64,
        "attention.head_count": 2, "attention.head_count_kv": 2, "attention.key_length": 32,
    }  # fmt: skip
    letters = ["<unk>", "<s>", "</s>", *"abcdefgh", "ab", "abc"]
    keys: dict[str, Any] = {"general.architecture": [8, arch], "general.alignment": [4, 32]}
    keys |= {f"{arch}.{key}": [4, value] for key, value in sizes.items()}
    keys[f"{arch}.attention.layer_norm_rms_epsilon"] = [6, 1e-5]
    if arch == "gemma3":
        keys |= {"gemma3.attention.sliding_window": [4, 16], "tokenizer.ggml.add_space_prefix": [7, False]}
    keys |= {
        "tokenizer.ggml.model": [8, "llama" if arch != "phi3" else "gpt2"],
        "tokenizer.ggml.pre": [8, "llama-bpe"],
        "tokenizer.ggml.tokens": ["array", 8, letters],
        "tokenizer.ggml.scores": ["array", 6, [float(-place) for place in range(len(letters))]],
        "tokenizer.ggml.token_type": ["array", 5, [3, 3, 3, *[1] * (len(letters) - 3)]],
        "tokenizer.ggml.bos_token_id": [4, 1],
        "tokenizer.ggml.eos_token_id": [4, 2],
        "tokenizer.ggml.add_bos_token": [7, 1],
        "tokenizer.chat_template": [8, "{{ messages[0].content }}"],
    }
    if arch == "phi3":
        keys["tokenizer.ggml.merges"] = ["array", 8, ["a b", "ab c"]]
    matrices = {"attn_q": 2, "attn_k": 8, "attn_v": 0, "attn_output": 1, "ffn_gate": 30, "ffn_up": 8, "ffn_down": 2}
    shapes = {f"blk.0.{name}.weight": ([64, 64], kind) for name, kind in matrices.items()}
    if arch == "phi3":
        shapes = {f"blk.0.{name}.weight": ([64, rows], 8) for name, rows in (("attn_qkv", 192), ("ffn_up", 128))}
        shapes |= {f"blk.0.{name}.weight": ([64, 64], 8) for name in ("attn_output", "ffn_down")}
    norms = ["attn_norm", "ffn_norm"] + (["post_attention_norm", "post_ffw_norm"] if arch == "gemma3" else [])
    shapes |= {f"blk.0.{name}.weight": ([64], 0) for name in norms} | {"output_norm.weight": ([64], 0)}
    if arch == "gemma3":
        shapes |= {f"blk.0.attn_{part}_norm.weight": ([32], 0) for part in "qk"}
    shapes["token_embd.weight"] = ([64, 16], 8)
    tensors, offset = [], 0
    for name, (dims, kind) in shapes.items():
        tensors.append([name, dims, kind, offset])
        offset += -(-int(np.prod(dims)) * 4 // 32) * 32
    return {"version": 3, "keys": [[key, *value] for key, value in keys.items()], "tensors": tensors, "data": offset}


def built(tree: Any) -> bytes:
    """Return a file of a tree, which may have been changed to anything."""
    if not isinstance(tree, dict):
        return b"GGUF" + repr(tree).encode("utf-8", "replace")[:100]
    given = {name: tree.get(name) for name in ("keys", "tensors")}
    keys: list[Any] = given["keys"] if isinstance(given["keys"], list) else []
    tensors: list[Any] = given["tensors"] if isinstance(given["tensors"], list) else []
    counts = [tree.get(f"{name}_count", len(own)) for name, own in (("tensors", tensors), ("keys", keys))]
    head = b"GGUF" + _packed("<I", tree.get("version")) + b"".join(_packed("<Q", count) for count in counts)
    head += b"".join(_entry(entry) for entry in keys) + b"".join(_tensor(entry) for entry in tensors)
    data = tree.get("data")
    size = data if type(data) is int and 0 <= data < 1 << 20 else 64
    return head + bytes(-len(head) % 32) + bytes(range(1, 101)) * (size // 100) + bytes(size % 100)


def _packed(layout: str, value: Any) -> bytes:
    try:
        return struct.pack(layout, value)
    except (struct.error, TypeError, OverflowError, ValueError):
        return struct.pack(layout, 0) if value is None else _text(str(value))


def _text(value: Any) -> bytes:
    data = str(value).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data)) + data


def _entry(entry: Any) -> bytes:
    if not isinstance(entry, list) or len(entry) < 3:
        return _text(entry) + struct.pack("<I", 8) + _text(entry)
    key, kind, value = entry[:3]
    if kind == "array":
        items = entry[3] if len(entry) > 3 and isinstance(entry[3], list) else []
        head = _text(key) + struct.pack("<I", 9) + _packed("<I", value) + struct.pack("<Q", len(items))
        return head + b"".join(_value(value, item) for item in items)
    return _text(key) + _packed("<I", kind) + _value(kind, value)


def _value(kind: Any, value: Any) -> bytes:
    layout = _TYPES.get(kind) if isinstance(kind, int) else None
    return _text(value) if layout is None else _packed(layout, value)


def _tensor(entry: Any) -> bytes:
    if not isinstance(entry, list) or len(entry) < 4:
        return _text(entry)
    name, dims, kind, offset = entry[:4]
    dims = dims if isinstance(dims, list) else [dims]
    head = _text(name) + struct.pack("<I", len(dims)) + b"".join(_packed("<Q", dim) for dim in dims)
    return head + _packed("<I", kind) + _packed("<Q", offset)


def change_gguf(chance: random.Random, files: Files) -> Files:
    """Change the tree that a file is made of; or else bytes of its header."""
    if chance.random() < 0.2:
        return {**files, "m.gguf": mutated_bytes(chance, files["m.gguf"][:3000]) + files["m.gguf"][3000:]}
    tree = json.loads(files["tree.json"])
    if chance.random() < 0.1:
        tree[chance.choice(("keys_count", "tensors_count"))] = chance.choice(
            (0, 1, 99, 1 << 20, 1 << 40, (1 << 64) - 1)
        )
    part = chance.choice(("keys", "keys", "tensors", ""))
    if part:
        tree[part] = mutated_json(chance, tree[part], _PALETTE)
    else:
        tree = mutated_json(chance, tree, _PALETTE)
    return {**files, "m.gguf": built(tree)}


def use_source(files: Files, folder: Path) -> None:
    """Open a checkpoint or a GGUF file, read its tensors, make its tokenizer, and plan."""
    checkpoint = open_source(str(folder / "m.gguf" if "m.gguf" in files else folder))
    for source in checkpoint.tensors.values():
        try:
            read_weight(source)
        except BincompressError:
            continue
    assets = checkpoint.assets()
    if "tokenizer.json" in assets:
        try:
            load_tokenizer(assets).encode("abc d\u00e9")
        except BincompressError as error:
            if "\n" in str(error) or len(str(error)) > 1000:
                raise AssertionError(f"a message of {len(str(error))} characters, or of several lines") from None
    make_plan(checkpoint, load_recipe(None, {})).record()
