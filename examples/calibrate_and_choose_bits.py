"""Calibrate on a text and spend 2.25 bits a weight where they help: ...choose_bits.py MODEL TEXT FOLDER [SAMPLES]

FOLDER gets the statistics (stats) and the compressed model (store). More samples give a better model.
"""

import sys
from pathlib import Path

from bincompress.calibration.collect import calibrate, choose_samples, run_in_threads
from bincompress.commands.running import Placement, spread_bits
from bincompress.compression.plan import make_plan
from bincompress.compression.recipe import load_recipe
from bincompress.compression.run import compress
from bincompress.inference.load import usable_threads
from bincompress.reporting.inspection import inspect
from bincompress.sources.hub import open_source
from bincompress.store.store import open_store


def main(model: str, text: str, folder: str, samples: str = "64") -> None:
    """Collect statistics, choose planes and blocks for every matrix, compress, and print the bits."""
    source, stats, store = open_source(model), f"{folder}/stats", f"{folder}/store"
    tokens = choose_samples(source, Path(text).read_text("utf-8"), int(samples), 128)
    found = calibrate(source, tokens, stats, runner=run_in_threads(usable_threads()))

    recipe = load_recipe(None, {"compensate": True, "refine": 2, "scale_bits": 8})
    chosen = spread_bits(make_plan(source, recipe, statistics=found), 2.25, Placement(), quiet=True)
    outcome = compress(make_plan(source, chosen, statistics=found), store)

    bits = inspect(open_store(store))["total"]["binary"]["stored_bits"]
    print(f"{store}: {outcome.done} tensors done, {bits:.3f} stored bits a weight of the linear layers")


if __name__ == "__main__":
    main(*sys.argv[1:])
