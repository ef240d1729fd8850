"""GGUF files against transformers: the same ids, the same logits of the same file."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bincompress.model.checkpoint_source import load_checkpoint
from bincompress.model.tokenizer import load_tokenizer
from bincompress.sources.hub import open_source
from tests.gguf_files import converted, metadata_of, write_gguf
from tests.test_gguf import IDS, LETTERS, fused, tiny

pytest.importorskip("gguf")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="transformers needs accelerate to read GGUF files")

pytestmark = pytest.mark.slow  # PyTorch and transformers

SPACE = "\u2581"
TEXTS = [
    "t1 t2", "  t12  t3 ", "t\u00e9\n\nt1", "<s>t1</s> t2<x>t3", "", " ", "\u2581t1", "t123 456", "T1'S  '1", "<unk>",
    "\U0001f600",
]  # fmt: skip


def byte_level() -> dict[str, Any]:
    """GPT-2's kind, with tokens of control, one that a user defined, and one in real characters."""
    tokens = [*LETTERS, "t1", "t12", "\u0120t", "\u0120t1", "<s>", "</s>", "<x>", "<|endoftext|>"]
    types = [1] * (len(tokens) - 4) + [3, 3, 4, 3]
    return {
        "model": "gpt2", "tokens": tokens, "token_type": types, "merges": ["t 1", "t1 2", "\u0120 t", "\u0120 t1"],
        "bos_token_id": tokens.index("<s>"), "eos_token_id": tokens.index("</s>"),
    }  # fmt: skip


def sentencepiece(add_bos: bool | None = None, gemma: bool = False) -> dict[str, Any]:
    """Llama's kind: bytes, pieces with scores, no merges; Gemma's has tokens of spaces."""
    named = ["<pad>", "</s>", "<s>", "<unk>"] if gemma else ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = [SPACE, "t", *"0123456789", f"{SPACE}t", "t1", f"{SPACE}t1", "t12", "12", f"{SPACE}{SPACE}"]
    pieces[-1:] = ["  ", "   "] if gemma else [f"{SPACE}{SPACE}"]
    tokens = [*named, *bytes_, *pieces, "<x>"]
    found = {
        "model": "llama", "tokens": tokens,
        "scores": [0.0] * (len(named) + 256) + [-float(place % 7) for place in range(len(pieces))] + [0.0],
        "token_type": [3] * len(named) + [6] * 256 + [1] * len(pieces) + [4],
        "bos_token_id": tokens.index("<s>"), "eos_token_id": tokens.index("</s>"),
        "unknown_token_id": tokens.index("<unk>"),
    }  # fmt: skip
    return found | ({} if add_bos is None else {"add_bos_token": add_bos, "add_eos_token": add_bos})


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", sentencepiece()),
    "llama ends": ("LlamaForCausalLM", sentencepiece(add_bos=True)),
    "llama 3": ("LlamaForCausalLM", byte_level() | {"pre": "llama-bpe", "add_bos_token": True}),
    "qwen2": ("Qwen2ForCausalLM", byte_level() | {"pre": "qwen2"}),
    "qwen3": ("Qwen3ForCausalLM", byte_level() | {"pre": "gpt-4o", "add_eos_token": True}),
    "qwen2 tekken": ("Qwen2ForCausalLM", byte_level() | {"pre": "tekken"}),
    "qwen2 default": ("Qwen2ForCausalLM", byte_level()),
    "gemma3": ("Gemma3ForCausalLM", sentencepiece(gemma=True, add_bos=True)),
    "phi3": ("Phi3ForCausalLM", sentencepiece()),
}


def written(folder: Path, kind: str, quantized: str = "Q8_0") -> Path:
    architecture, tokens = CASES[kind]
    own = {"partial_rotary_factor": 1.0, "sliding_window": None} if architecture == "Phi3ForCausalLM" else {}
    if architecture == "Gemma3ForCausalLM":  # transformers knows only the usual pattern of windows
        own = {"layer_types": None, "num_hidden_layers": 6}
    if architecture == "Qwen3ForCausalLM":  # nor another size of heads
        own = {"head_dim": 128}
    config, tensors = tiny(architecture, vocab_size=300, intermediate_size=96, **own)
    config = {key: value for key, value in config.items() if key != "layer_types" or value}
    stored = converted(config, fused(config, tensors))
    named = {f"tokenizer.ggml.{key}": value for key, value in (tokens | {"padding_token_id": 0}).items()}
    metadata = metadata_of(config) | named | {f"{metadata_of(config)['general.architecture']}.vocab_size": 300}
    folder.mkdir()
    return write_gguf(folder / "model.gguf", metadata, stored, {"blk.0.ffn_down.weight": quantized})


@pytest.mark.parametrize("kind", CASES)
def test_ids_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    file = written(tmp_path / "m", kind)
    ours = load_tokenizer(open_source(str(file)).assets())
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in TEXTS:
        expected = theirs(text)["input_ids"]
        assert ours.encode(text) == expected, text
        assert ours.decode(expected) == theirs.decode(expected, skip_special_tokens=True), text


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma3", "phi3"])
def test_logits_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    file = written(tmp_path / "m", kind)
    decoder = load_checkpoint(open_source(str(file)))
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0].numpy()
    found = decoder.logits(IDS, decoder.new_cache(len(IDS)))
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
