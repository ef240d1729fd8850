"""Calibrate on a text and spend 2.25 bits a weight where they help: ...choose_bits.py MODEL TEXT FOLDER [SAMPLES]

FOLDER gets the statistics (stats) and the compressed model (store). More samples give a better model.
"""

import sys

import bincompress


def main(model: str, text: str, folder: str, samples: str = "64") -> None:
    """Collect statistics, choose planes and blocks for every matrix, compress, and print the bits."""
    stats, store = f"{folder}/stats", f"{folder}/store"
    bincompress.calibrate(model, stats, text, samples=int(samples), context=128)
    result = bincompress.compress(model, store, stats=stats, compensate=True, refine=2, scale_bits=8, target_bits=2.25)
    bits = result.total["binary"]["stored_bits"]
    print(f"{store}: {result.done} tensors done, {bits:.3f} stored bits a weight of the linear layers")


if __name__ == "__main__":
    main(*sys.argv[1:])
