"""Perplexity against stored bits of a model, method by method, with the time that compression takes.

    python -m benchmarks.quality ./model --calibration train.txt --text held_out.txt

Every line is what the command line gives: statistics over `--samples` windows of 512 tokens of the calibration text,
perplexity over `--windows` windows of 1024 tokens of the other, through the packed engine.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TWO = ("--compensate", "--refine", "4")
ONE = ("--scale-bits", "8", "--block", "64")
IN_SEQUENCE = "--sequential"  # takes the calibration text and --samples behind it
ROWS: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "two groups, block 128, no calibration": ((), (8,)),
    "two groups, block 128": (TWO, (8,)),
    "the same, 8-bit scales": ((*TWO, "--scale-bits", "8"), (8,)),
    "--target-bits 2.25": ((*TWO, "--scale-bits", "8", "--target-bits", "2.25"), (8,)),
    "--target-bits 2.5": ((*TWO, "--scale-bits", "8", "--target-bits", "2.5"), (8,)),
    "billm": (("--method", "billm"), (16, 8, 6)),
    "dbellquant": (("--method", "dbellquant"), (16, 8, 6)),
    "one plane, compensation alone": (("--method", "xnor", "--compensate"), (8,)),
    "dbellquant, one plane, compensation alone": (("--method", "dbellquant", "--planes", "1"), (8,)),
    "one plane, block 64": (("--method", "xnor", *TWO, *ONE), (8,)),
    "dbellquant, one plane, block 64": (("--method", "dbellquant", "--planes", "1", "--refine", "4", *ONE), (8,)),
    "--target-bits 1.125": ((*TWO, "--scale-bits", "8", "--target-bits", "1.125"), (8,)),
    "one plane, block 64, layer after layer": (("--method", "xnor", *TWO, *ONE, IN_SEQUENCE), (8,)),
    "dbellquant, one plane, layer after layer": (
        ("--method", "dbellquant", "--planes", "1", "--refine", "4", *ONE, IN_SEQUENCE),
        (8,),
    ),
    "--target-bits 1.125, layer after layer": (
        (*TWO, "--scale-bits", "8", "--target-bits", "1.125", IN_SEQUENCE),
        (8,),
    ),
    "two groups, 8-bit scales, layer after layer": ((*TWO, "--scale-bits", "8", IN_SEQUENCE), (8,)),
    "--target-bits 2.25, layer after layer": ((*TWO, "--scale-bits", "8", "--target-bits", "2.25", IN_SEQUENCE), (8,)),
}


def bincompress(*arguments: object) -> dict[str, object]:
    """Run a verb with --json and return what it prints."""
    command = [sys.executable, "-m", "bincompress", *map(str, arguments), "--json"]
    found: dict[str, object] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--calibration", required=True, help="text for the statistics")
    parser.add_argument("--text", required=True, help="text for the perplexity")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--folder", help="keep statistics and stores here")
    parser.add_argument("--only", help="rows whose name holds this")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        evaluated = ("--text", options.text, "--windows", options.windows)
        begin = time.perf_counter()
        stats = ("--text", options.calibration, "--samples", options.samples)
        bincompress("calibrate", options.source, folder / "stats", *stats)
        print(f"calibrate {time.perf_counter() - begin:.0f} s", flush=True)
        unquantized = float(str(bincompress("evaluate", options.source, *evaluated)["perplexity"]))
        print(f"unquantized {unquantized:.3f}\n")
        print("| | nominal | stored bits | activations | perplexity | ratio | compress |")
        print("|---|---|---|---|---|---|---|", flush=True)
        for number, (name, (settings, widths)) in enumerate(ROWS.items()):
            if options.only and options.only not in name:
                continue
            store = folder / f"store-{number}"
            begin = time.perf_counter()
            given: list[object] = list(settings)
            if IN_SEQUENCE in settings:
                given += [options.calibration, "--samples", options.samples]
            if IN_SEQUENCE not in settings or "--target-bits" in settings:
                given += ["--stats", folder / "stats"]
            made = bincompress("compress", options.source, store, "--overwrite", *given)
            seconds = time.perf_counter() - begin
            bits = made["total"]["binary"]  # type: ignore[index]
            for width in widths:
                found = bincompress("evaluate", store, *evaluated, "--activation-bits", width)
                perplexity = float(str(found["perplexity"]))
                print(
                    f"| {name} | {bits['nominal_bits']:.2f} | {bits['stored_bits']:.3f} | {width} | {perplexity:.3f} "
                    f"| {perplexity / unquantized:.3f} | {seconds:.0f} s |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
