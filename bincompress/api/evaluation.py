"""What the bits cost: `evaluate`."""

from pathlib import Path
from typing import Literal

import numpy as np

from bincompress.api.progress import OnCount, uncounted
from bincompress.inference.evaluate import Evaluation
from bincompress.inference.evaluate import evaluate as score
from bincompress.inference.load import load_baseline, load_decoder
from bincompress.model.packed_linear import ActivationSettings
from bincompress.model.tokenizer import load_tokenizer
from bincompress.sources.hub import is_checkpoint, open_source
from bincompress.sources.text import read_text


def evaluate(
    store: str | Path,
    text: str | Path,
    *,
    context: int | None = None,
    stride: int | None = None,
    windows: int | None = None,
    baseline: str | Path | None = None,
    threads: int | None = None,
    activation_bits: int = 8,
    activation_scale: Literal["token", "segment"] = "segment",
    kernel: str | None = None,
    memory: int | None = None,
    progress: OnCount = uncounted,
) -> Evaluation:
    """Measure how well a model predicts a text: perplexity and, beside a baseline, what the bits cost.

    store: a store, or an unquantized checkpoint folder, which runs in float32. text: a UTF-8 file, tokenized as a
    whole and cut into consecutive windows of `context` tokens (1024, or as many as the model takes), of which at most
    `windows` are scored; with a stride they overlap (see `bincompress.inference.evaluate`). baseline: the unquantized
    checkpoint to compare with. threads, activation_bits, activation_scale, kernel, memory: as for `load`.
    Raises StoreError, CheckpointError, UnsupportedModelError or PromptError.
    """
    content = read_text(Path(text))
    if is_checkpoint(store):
        source = open_source(str(store))
        decoder, assets = load_baseline(source, threads), source.assets()
    else:
        settings = ActivationSettings(activation_bits, activation_scale)
        loaded = load_decoder(str(store), threads, settings, kernel, memory)
        decoder, assets = loaded.decoder, loaded.assets
    other = load_baseline(open_source(str(baseline)), threads) if baseline is not None else None
    tokens = np.array(load_tokenizer(assets).encode(content), np.int64)
    return score(decoder, tokens, context, windows, other, progress, stride=stride)
