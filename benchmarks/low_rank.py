"""How fast are products with one token in low-rank form, beside those of one plane?

    python -m benchmarks.low_rank [--bits 0.8] [--layers 8] [--rounds 15] [--tokens 1]

The shapes are those of Llama-3.2-1B's decoder layers; signs and scales are random, which changes no time. Both forms
are multiplied in turns on one thread, all layers after each other, so that nothing stays in a cache from one round to
the next. Times are CPU times: other programs on the machine then count less. Printed are quartiles and their ratios.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from bincompress.methods.lowrank import LowRankSettings, rank_of
from bincompress.model.linear import Linear
from bincompress.model.low_rank_linear import LowRankLinear, low_rank_linear
from bincompress.model.packed_linear import ActivationSettings, PackedLinear
from bincompress.tensors.low_rank import LowRankTensor
from cpu_kernels.matmul.prepacking import Part, prepack_rows
from cpu_kernels.parallel.workers import Workers

GROUPS = (((2048, 512, 512), 2048), ((2048,), 2048), ((8192, 8192), 2048), ((2048,), 8192))  # q k v, o, gate up, down
BLOCK = 128


def words(chance: np.random.Generator, *shape: int) -> Any:
    return chance.integers(0, 1 << 63, shape, dtype=np.uint64) << np.uint64(1)


def scales(chance: np.random.Generator, *shape: int) -> Any:
    return (1 + chance.random(shape)).astype(np.float16)


def one_plane(chance: np.random.Generator, rows: tuple[int, ...], cols: int, workers: Workers) -> PackedLinear:
    parts = [Part(words(chance, 1, size, cols // 64), scales(chance, 1, size, cols // BLOCK)) for size in rows]
    return PackedLinear(prepack_rows(parts, BLOCK, cols), (), ActivationSettings(), workers)


def low_rank(
    chance: np.random.Generator, rows: tuple[int, ...], cols: int, workers: Workers, bits: float
) -> LowRankLinear:
    tensors = []
    for size in rows:
        rank = rank_of(LowRankSettings(bits=bits), size, cols)
        planes = words(chance, rank, size // 64), words(chance, rank, cols // 64)
        own = scales(chance, size), scales(chance, rank), scales(chance, cols)
        tensors.append(LowRankTensor(planes[0], planes[1], own[0], own[1], own[2]))
    return low_rank_linear(tensors, ActivationSettings(), workers)


def seconds(layers: list[list[Linear]], inputs: dict[int, Any]) -> float:
    begin = time.process_time()
    for layer in layers:
        for linear in layer:
            linear(inputs[linear.cols])
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=float, default=0.8)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=1)
    given = parser.parse_args()
    chance = np.random.default_rng(0)
    weights = given.layers * sum(sum(rows) * cols for rows, cols in GROUPS)
    with Workers(1) as workers:
        makers: dict[str, Callable[..., Any]] = {
            "one plane": one_plane,
            "low rank": functools.partial(low_rank, bits=given.bits),
        }
        models = {
            name: [[make(chance, rows, cols, workers) for rows, cols in GROUPS] for _ in range(given.layers)]
            for name, make in makers.items()
        }
        inputs = {cols: chance.standard_normal((given.tokens, cols), np.float32) for cols in (2048, 8192)}
        times: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(given.rounds + 1):
            for name, layers in models.items():
                times[name].append(seconds(layers, inputs))
    quartiles = {name: statistics.quantiles(own[1:], n=4) for name, own in times.items()}
    for name, layers in models.items():
        read = sum(linear.nbytes for layer in layers for linear in layer)
        shown = ", ".join(f"{1e3 * own / given.tokens:.3f}" for own in quartiles[name])
        print(f"{name}: {8 * read / weights:.3f} bits a weight read, quartiles {shown} ms a token, {layers[0][0].path}")
    ratios = (one / two for one, two in zip(quartiles["one plane"], quartiles["low rank"], strict=True))
    print("one plane / low rank, quartile by quartile:", ", ".join(f"{ratio:.3f}" for ratio in ratios))


if __name__ == "__main__":
    main()
