"""Compare a store with the model it was made from: python examples/evaluate_store.py STORE MODEL TEXT [CONTEXT]"""

import sys
from pathlib import Path

import numpy as np

from bincompress.inference.evaluate import evaluate
from bincompress.inference.load import load_baseline, load_decoder
from bincompress.model.packed_linear import ActivationSettings
from bincompress.model.tokenizer import load_tokenizer
from bincompress.sources.hub import open_source


def main(store: str, model: str, text: str, context: str = "256") -> None:
    """Print perplexities, their ratio, the KL divergence and the agreement as a table, by bits of activations."""
    print("| activations | unquantized | packed | ratio | KL divergence, nats | same next token |")
    print("|---|---|---|---|---|---|")
    baseline = load_baseline(open_source(model), None)
    for bits in (8, 6):
        packed = load_decoder(store, None, ActivationSettings(bits))
        tokens = np.array(load_tokenizer(packed.assets).encode(Path(text).read_text("utf-8")), np.int64)
        found = evaluate(packed.decoder, tokens, int(context), baseline=baseline)
        unquantized = found.baseline_perplexity or float("nan")
        print(
            f"| {bits} bits | {unquantized:.2f} | {found.perplexity:.2f} | {found.perplexity / unquantized:.3f} "
            f"| {found.kl_divergence:.4f} | {100 * (found.top1_agreement or 0):.1f}% |"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
