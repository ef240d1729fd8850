"""Speed of calibration and of error compensation against NumPy's matrix products, as ratios within one run.

Bar 1: compensation and four rounds of refinement of a 3072 x 3072 matrix, two planes, on one core: at most 20 x the
       time of one float32 product of 3072 x 3072 matrices by NumPy on that core.
Bar 2: calibration of a layer of Llama-3.2-1B's shapes on all cores: at least 60% of the operations a second that NumPy
       reaches with float32 products on them.

    python -m benchmarks.calibrated
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import threadpoolctl

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.synthetic import LLAMA_1B, write_checkpoint
from bincompress.calibration.collect import Calibration, run_in_threads
from bincompress.inference.load import usable_threads
from bincompress.methods.rounding.codebook import Rounding, sum_of_planes
from bincompress.methods.rounding.compensation import compensate
from bincompress.methods.rounding.curvature import curvature
from bincompress.methods.rounding.initial_scales import of_planes
from bincompress.model.config import parse
from bincompress.sources.checkpoint import open_checkpoint

SIZE = 3072
SAMPLES, CONTEXT = 32, 512


def seconds_of(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def compensation(repeats: int) -> dict[str, float]:
    random = np.random.default_rng(0)
    x = random.standard_normal((2 * SIZE, SIZE)) * np.exp(0.5 * random.standard_normal(SIZE))
    x[:, 1:] += 0.5 * x[:, :-1]  # neighbouring channels go together
    hessian = (x.T @ x / len(x)).astype(np.float32)
    weights = (0.02 * random.standard_normal((SIZE, SIZE))).astype(np.float32)
    form, rounding = sum_of_planes(2), Rounding(16, float(np.abs(weights).max()))

    def whole(refine: int) -> None:
        compensate(weights, curvature(hessian), form, 128, of_planes(2), rounding, refine)

    with threadpoolctl.threadpool_limits(1):
        compensate(weights[:64, :256], curvature(hessian[:256, :256]), form, 128, of_planes(2), rounding, 4)
        product, plain, refined = [], [], []
        for _ in range(repeats):
            product.append(seconds_of(lambda: weights @ hessian))
            plain.append(seconds_of(lambda: whole(0)))
            refined.append(seconds_of(lambda: whole(4)))
    medians = {"product": np.median(product), "compensation": np.median(plain), "with_refinement": np.median(refined)}
    return {key: float(value) for key, value in medians.items()} | {
        "ratio": float(np.median(np.array(refined) / np.array(product))),
        "ratio_without_refinement": float(np.median(np.array(plain) / np.array(product))),
    }


def calibration(repeats: int, threads: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder) / "model", {**LLAMA_1B, "num_hidden_layers": 1, "vocab_size": 512})
        checkpoint = open_checkpoint(Path(folder) / "model")
        config = parse(checkpoint.config)
        samples = np.random.default_rng(0).integers(0, 512, (SAMPLES, CONTEXT))
        work = Calibration(checkpoint, config, samples, part_tokens=4096)
        stream = work.embed()
        runner = run_in_threads(threads)
        matrices = [shape for name, shape in config.tensors().items() if ".layers." in name and len(shape) == 2]
        inputs = [config.hidden, config.heads * config.head_dim, config.hidden, config.inner]
        # A product's multiply-adds are two operations; of a symmetric one only half need be done.
        operations = samples.size * (2 * sum(map(np.prod, matrices)) + sum(cols * (cols + 1) for cols in inputs))
        square = np.random.default_rng(0).standard_normal((4096, 4096), np.float32)
        ratios, rates, reached = [], [], []
        for _ in range(repeats + 1):  # the first one compiles kernels
            with threadpoolctl.threadpool_limits(threads, user_api="blas"):
                rates.append(2 * 4096**3 / seconds_of(lambda: square @ square))
            reached.append(operations / seconds_of(lambda: list(runner(work, 0, stream))))
            ratios.append(reached[-1] / rates[-1])
    return {
        "blas_gflops": float(np.median(rates[1:])) / 1e9, "calibration_gflops": float(np.median(reached[1:])) / 1e9,
        "share": float(np.median(ratios[1:])),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    threads = usable_threads()
    found: dict[str, Any] = {
        "cpu": platform.processor() or platform.machine(), "threads": threads, "numpy": np.__version__,
        "compensation": compensation(options.repeats), "calibration": calibration(options.repeats, threads),
    }  # fmt: skip
    if options.json:
        print(json.dumps(found, indent=1))
        return
    one, two = found["compensation"], found["calibration"]
    print(f"{SIZE} x {SIZE}, two planes, block 128, one core: {one['product']:.2f} s for one float32 product,")
    print(f"  compensation {one['compensation']:.2f} s, {one['ratio_without_refinement']:.1f} x")
    print(f"  with four rounds of refinement {one['with_refinement']:.2f} s, {one['ratio']:.1f} x (bar: 20 x)")
    print(f"calibration on {threads} threads: {two['calibration_gflops']:.0f} of {two['blas_gflops']:.0f} GFLOP/s,")
    print(f"  {100 * two['share']:.0f}% of NumPy's products (bar: 60%)")


if __name__ == "__main__":
    main()
