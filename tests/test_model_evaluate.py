"""Perplexity, divergence and agreement, against the formula written out."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bincompress.inference.evaluate import evaluate, log_softmax
from bincompress.model.checkpoint_source import load_checkpoint
from bincompress.model.config import parse
from bincompress.model.decoder import Decoder
from bincompress.model.errors import PromptError
from bincompress.model.linear import DenseLinear
from bincompress.model.tokenizer import Tokenizer
from tests.conftest import SHARED

RAW: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
CONFIG = parse(RAW)


class Arrays:
    """Weights from a dictionary."""

    def __init__(self, values: dict[str, NDArray[np.float32]]) -> None:
        self.values = values

    def vector(self, names: Sequence[str]) -> NDArray[np.float32]:
        return np.concatenate([self.values[name] for name in names])

    def linear(self, names: Sequence[str]) -> DenseLinear:
        return DenseLinear(self.vector(names))

    def embedding(self, name: str) -> DenseLinear:
        return self.linear([name])


def random_decoder(seed: int, config: Any = CONFIG) -> Decoder:
    rng = np.random.default_rng(seed)
    shapes = config.tensors()
    values = {name: (rng.standard_normal(shape) * 0.3).astype(np.float32) for name, shape in shapes.items()}
    return Decoder(config, Arrays(values))


def test_figures_by_hand() -> None:
    model, baseline = random_decoder(1), random_decoder(2)
    tokens = np.random.default_rng(0).integers(0, 50, 75)
    steps: list[tuple[int, int]] = []
    found = evaluate(model, tokens, 20, baseline=baseline, progress=lambda done, of: steps.append((done, of)))
    losses, others, divergences, agreements = [], [], [], []
    for start in (0, 20, 40):
        ids = tokens[start : start + 20]
        own = log_softmax(model.logits(ids, model.new_cache()))[:-1]
        other = log_softmax(baseline.logits(ids, baseline.new_cache()))[:-1]
        rows = np.arange(19)
        losses.append(-own[rows, ids[1:]])
        others.append(-other[rows, ids[1:]])
        divergences.append((np.exp(other) * (other - own)).sum(axis=1))
        agreements.append(own.argmax(axis=1) == other.argmax(axis=1))
    assert found.perplexity == pytest.approx(np.exp(np.mean(losses)))
    assert found.baseline_perplexity == pytest.approx(np.exp(np.mean(others)))
    assert found.kl_divergence == pytest.approx(np.mean(divergences))
    assert found.top1_agreement == pytest.approx(np.mean(agreements))
    assert (found.tokens, found.windows, found.context) == (57, 3, 20)
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_chunks_of_logits_do_not_change_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    model, baseline = random_decoder(1), random_decoder(2)
    tokens = np.random.default_rng(0).integers(0, 50, 40)
    whole = evaluate(model, tokens, 20, baseline=baseline)
    monkeypatch.setattr("bincompress.inference.evaluate._LOGITS_AT_ONCE", 150)
    chunked = evaluate(model, tokens, 20, baseline=baseline)
    assert chunked.as_dict() == pytest.approx(whole.as_dict(), rel=1e-6)


def test_a_model_is_its_own_equal() -> None:
    model = random_decoder(1)
    found = evaluate(model, np.arange(40), 10, windows=2, baseline=model)
    assert found.perplexity == found.baseline_perplexity
    assert (found.kl_divergence, found.top1_agreement, found.windows) == (0.0, 1.0, 2)


def test_text_shorter_than_a_window_is_one_window() -> None:
    found = evaluate(random_decoder(1), np.arange(7), 20)
    assert (found.tokens, found.windows, found.context) == (6, 1, 7)
    assert (found.baseline_perplexity, found.kl_divergence, found.top1_agreement) == (None, None, None)


def test_what_cannot_be_scored_is_refused() -> None:
    model = random_decoder(1)
    with pytest.raises(PromptError, match="the text has 1 tokens; expected at least 2"):
        evaluate(model, np.arange(1), 20)
    for context in (1, 65):
        with pytest.raises(PromptError, match=rf"context: expected 2 to 64 \(this model's limit\), found {context}"):
            evaluate(model, np.arange(30), context)
    with pytest.raises(PromptError, match="windows: expected at least 1, found 0"):
        evaluate(model, np.arange(30), 20, windows=0)
    other = random_decoder(1, parse(RAW | {"vocab_size": 51}))
    with pytest.raises(PromptError, match="expected the same vocabulary of 50 tokens, found 51"):
        evaluate(model, np.arange(30), 20, baseline=other)


def test_bfloat16_patterns_multiply_like_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    values = rng.standard_normal((7, 12)).astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    dense = DenseLinear(values.view(np.float32))
    packed = DenseLinear((values >> np.uint32(16)).astype(np.uint16))
    monkeypatch.setattr("bincompress.model.linear._WIDENED_AT_ONCE", 36)
    x = rng.standard_normal((3, 12)).astype(np.float32)
    assert np.allclose(dense(x), packed(x), rtol=1e-6)
    assert np.array_equal(dense.rows_of(np.array([6, 0])), packed.rows_of(np.array([6, 0])))


@pytest.mark.slow
@pytest.mark.needs_shared
@pytest.mark.parametrize(("name", "windows", "expected"), [("doclm-4m", 16, 6.201), ("doclm-29m", 2, 5.114)])
def test_perplexity_of_the_trained_models(name: str, windows: int, expected: float) -> None:
    folder = SHARED / "models" / name
    tokenizer = Tokenizer((folder / "tokenizer.json").read_bytes())
    # Enough text for the windows: tokens of a beginning do not depend on what comes much later.
    text = (SHARED / "data" / "valid.txt").read_text(encoding="utf-8")[:120_000]
    tokens = np.array(tokenizer.encode(text))
    assert evaluate(load_checkpoint(folder), tokens, 1024, windows).perplexity == pytest.approx(expected, abs=5e-4)
