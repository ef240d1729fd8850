"""Compress a model and let it write: python examples/compress_and_write.py [MODEL STORE]

Without arguments it takes the small model that ships with bincompress, and the folder ./example-store.
"""

import sys
from dataclasses import replace
from pathlib import Path

import bincompress

DEMO = Path(bincompress.__file__).parent / "demo_model"


def main(model: str = str(DEMO), store: str = "example-store") -> None:
    """Compress with eight groups a matrix, which a small model bears without calibration, and write 40 tokens."""
    result = bincompress.compress(model, store, groups=8, block="matrix", embeddings="8bit")
    print(f"{store}: {result.done} tensors done, {result.unchanged} already complete")

    packed = bincompress.load(store)
    settings = replace(packed.defaults, max_tokens=40, sampling=replace(packed.defaults.sampling, temperature=0.0))
    for piece in packed.stream("The scheduler", settings):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
