"""How fast is memory read? The plain sequential read that a model's speed is compared with."""

import time
from typing import Any

import numpy as np
from numba import types

from cpu_kernels.jit.compiler import kernel, view
from cpu_kernels.matmul.aligned_memory import allocate
from cpu_kernels.parallel.workers import Workers


@kernel(types.uint64(view(types.uint64, 1), types.intp, types.intp))
def sum_of_words(words: Any, start: int, stop: int) -> Any:
    """Return the sum of the items start .. stop - 1 of uint64 (n,), modulo 2 ** 64."""
    part = words[start:stop]  # whose places begin at 0, so that LLVM adds several at once
    total = np.uint64(0)
    for i in range(part.size):
        total += part[i]
    return total


def read_bandwidth(workers: Workers, nbytes: int, repeats: int = 5) -> float:
    """Return bytes a second of reading a buffer of so many bytes with all threads: the fastest of some passes."""
    words = allocate(nbytes // 8 * 8).view(np.uint64)
    words[:] = 1  # else every page would be the same one of zeros
    bounds = [len(words) * part // workers.threads for part in range(workers.threads + 1)]

    def part(number: int) -> Any:
        return lambda: sum_of_words(words, bounds[number], bounds[number + 1])

    tasks = [part(number) for number in range(workers.threads)]
    fastest = 0.0
    for _ in range(repeats + 1):  # the first compiles
        begin = time.perf_counter()
        workers.run(tasks)
        fastest = max(fastest, words.nbytes / (time.perf_counter() - begin))
    return fastest
