"""Small random models of transformers, and how far the decoder's logits are from theirs."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bincompress.model.checkpoint_source import load_checkpoint
from bincompress.model.decoder import Decoder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4  # of the largest absolute logit

VOCAB = 101
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "pad_token_id": None,  # by default some have one past this vocabulary
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def random_model(folder: Path, kind: str, options: dict[str, Any], end: str = "ForCausalLM") -> Any:
    """Save a small model whose every weight is random, norms and biases included, and return it."""
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}  # grouped products need even sizes
    sizes = SMALL if end == "ForCausalLM" else {}
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **options, **eager})
    torch.manual_seed(7)
    made = getattr(transformers, f"{kind.removesuffix('Text')}{end}", transformers.AutoModelForCausalLM.from_config)
    model = made(config).float().eval()
    with torch.no_grad():
        offsets = [(name, one) for name, one in model.named_buffers() if name.endswith("e_score_correction_bias")]
        for name, parameter in [*model.named_parameters(), *offsets]:
            if name.endswith("A_log"):  # how fast heads forget: by a share of what they hold
                parameter.copy_(torch.randn_like(parameter) - 1.0)
                continue
            spread = 0.3 if parameter.ndim == 1 else 0.25
            middle = 1.0 if "norm" in name and "Gemma" not in kind else 0.0
            parameter.copy_(torch.randn_like(parameter) * spread + middle)
    model.save_pretrained(folder)
    return model


def their_logits(model: Any, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    with torch.no_grad():
        result: NDArray[np.float32] = model(torch.from_numpy(ids)[None]).logits[0].float().numpy()
    return result


def distance(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def in_parts(decoder: Decoder, ids: NDArray[np.int64], parts: list[int]) -> NDArray[np.float32]:
    cache = decoder.new_cache(len(ids))
    bounds = np.cumsum([0, *parts])
    return np.concatenate([decoder.logits(ids[a:b], cache) for a, b in itertools.pairwise(bounds)])


def assert_parts_alike(folder: Path, kind: str, options: dict[str, Any], parts: list[list[int]]) -> None:
    """Compare logits of 75 tokens with those of a small random model, for each way of handing the tokens in."""
    theirs = random_model(folder, kind, options)
    ids = np.random.default_rng(1).integers(0, VOCAB, 75)
    expected = their_logits(theirs, ids)
    decoder = load_checkpoint(folder)
    for each in parts:
        assert distance(in_parts(decoder, ids, each), expected) < TOLERANCE


def rewritten(folder: Path, change: dict[str, Any], tensors: dict[str, Any] | None = None) -> Any:
    """Change a saved model's config and tensors, and return what transformers loads then."""
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    if tensors is not None:
        kept = {k: v for k, v in load_file(folder / "model.safetensors").items() if k not in tensors}
        added = {k: v for k, v in tensors.items() if v is not None}
        save_file(kept | added, folder / "model.safetensors", {"format": "pt"})
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def assert_alike(folder: Path, theirs: Any) -> Decoder:
    ids = np.random.default_rng(5).integers(0, VOCAB, 70)
    decoder = load_checkpoint(folder)
    assert distance(in_parts(decoder, ids, [70]), their_logits(theirs.eval(), ids)) < TOLERANCE
    return decoder
