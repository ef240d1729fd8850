"""llama.cpp opens the GGUF files that `export` writes: the same tokens, the same logits within its rounding."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bincompress.exporting.gguf import export_gguf
from bincompress.inference.load import load_decoder
from bincompress.model.architectures import ARCHITECTURES
from bincompress.model.packed_linear import ActivationSettings
from bincompress.model.tokenizer import load_tokenizer
from bincompress.store.store import Store
from tests.test_export_gguf import TEXT, compressed, few_levels, made_store, pieces
from tests.test_gguf import IDS, NOT_IN_GGUF

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is built from source: pip install it to run this")
pytest.importorskip("gguf")


def theirs(file: str, ids: list[int]) -> np.ndarray:
    """Logits of every position."""
    model = llama_cpp.Llama(file, n_ctx=64, n_threads=1, logits_all=True, verbose=False)
    model.eval(ids)
    found = np.array(model.scores[: len(ids)])
    model.close()
    return found


def assert_logits_near(store: Store, file: Path, tolerance: float, **options: Any) -> None:
    """Logits beside those of our engine with unrounded activations, relative to the largest."""
    done = export_gguf(store, file, **options)
    decoder = load_decoder(store.url, 1, ActivationSettings(16)).decoder
    ours = decoder.logits(IDS, decoder.new_cache(len(IDS)))
    off = np.abs(theirs(done.file, IDS) - ours).max() / np.abs(ours).max()
    assert off < tolerance


# llama.cpp rounds activations to float16 beside F16 and BF16 weights, and to 8 bits a block of 32 or 256 beside others.
@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - NOT_IN_GGUF))
def test_logits_of_every_architecture(tmp_path: Path, architecture: str) -> None:
    own: dict[str, Any] = {"layer_types": None, "num_hidden_layers": 6} if architecture == "Gemma3ForCausalLM" else {}
    own |= {"sliding_window": None} if architecture == "Phi3ForCausalLM" else {}
    assert_logits_near(made_store(tmp_path, architecture, **own), tmp_path / "m.gguf", 0.01)


def test_logits_of_q8_0(tmp_path: Path) -> None:
    assert_logits_near(made_store(tmp_path, "Qwen2ForCausalLM"), tmp_path / "m.gguf", 0.03, gguf_type="q8_0")


@pytest.mark.parametrize(
    ("levels", "block", "ternary"), [((-1, 1), 128, "tq2_0"), ((-1, 0, 1), 256, "tq2_0"), ((-1, 0, 1), 256, "tq1_0")]
)
def test_logits_of_exact_types(tmp_path: Path, levels: Any, block: int, ternary: str) -> None:
    config, tensors = few_levels(levels, block)
    assert_logits_near(compressed(tmp_path, tensors, config, None, {}), tmp_path / "m.gguf", 0.03, ternary=ternary)


@pytest.mark.parametrize("kind", ["byte level", "pieces", "prefixed pieces"])
def test_tokens_are_those_of_the_store(tmp_path: Path, kind: str) -> None:
    files = None if kind == "byte level" else pieces(kind.startswith("prefixed"))
    store = made_store(tmp_path, "LlamaForCausalLM", files)
    done = export_gguf(store, tmp_path / "m.gguf")
    model = llama_cpp.Llama(done.file, vocab_only=True, verbose=False)
    ours = load_tokenizer(store.read_assets())
    for text in (TEXT, " t1", "t\u4e2dt", "t12 \u00e9", "<s>t1</s> t2"):
        # Its tokenizer adds bos itself where the file says so.
        assert model.tokenize(text.encode(), special=True) == ours.encode(text), text
    assert model.token_eos() in ours.eos_ids
