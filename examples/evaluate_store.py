"""Compare a store with the model it was made from: python examples/evaluate_store.py STORE MODEL TEXT [CONTEXT]"""

import sys

import bincompress


def main(store: str, model: str, text: str, context: str = "256") -> None:
    """Print perplexities, their ratio, the KL divergence and the agreement as a table, by bits of activations."""
    print("| activations | unquantized | packed | ratio | KL divergence, nats | same next token |")
    print("|---|---|---|---|---|---|")
    for bits in (8, 6):
        found = bincompress.evaluate(store, text, context=int(context), baseline=model, activation_bits=bits)
        unquantized = found.baseline_perplexity or float("nan")
        print(
            f"| {bits} bits | {unquantized:.2f} | {found.perplexity:.2f} | {found.perplexity / unquantized:.3f} "
            f"| {found.kl_divergence:.4f} | {100 * (found.top1_agreement or 0):.1f}% |"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
