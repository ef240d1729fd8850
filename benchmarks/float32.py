"""How much longer does a float32 matrix take than the same in bfloat16, with one set of groups for all of it?

python -m benchmarks.float32 [--rows 1024] [--columns 1024] [--repeats 15]

Both are timed in turns; medians, and their ratio. The groups of both are the exact optimum.
"""

import argparse
import os
import statistics
import time

for _threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_threads] = "1"

import numpy as np  # noqa: E402

from bincompress.methods import make_settings, method_named  # noqa: E402
from bincompress.tensors.weight import Weight  # noqa: E402

GROUPS = (2, 4, 8, 16, 32)


def both(shape: tuple[int, int]) -> tuple[Weight, Weight]:
    """Return normal weights in bfloat16 and in float32."""
    values = np.random.default_rng(0).standard_normal(shape, np.float32) * np.float32(0.02)
    bits = values.view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return Weight(nearest.astype(np.uint16), "BF16"), Weight(bits, "F32")


def main() -> None:
    """Print a line for each number of groups."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    weights = both((options.rows, options.columns))
    binarize = method_named("wgm").binarize
    for groups in GROUPS:
        settings = make_settings("wgm", groups=groups, block="matrix")
        times: tuple[list[float], list[float]] = ([], [])
        for repeat in range(options.repeats + 1):
            for weight, taken in zip(weights, times, strict=True):
                start = time.perf_counter()
                binarize(weight, settings)
                if repeat:  # the first compiles
                    taken.append(1e3 * (time.perf_counter() - start))
        short, long = (statistics.median(taken) for taken in times)
        print(f"{groups:3d} groups: bfloat16 {short:.2f} ms, float32 {long:.2f} ms, {long / short:.2f} times")


if __name__ == "__main__":
    main()
