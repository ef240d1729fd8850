"""The kernels of a first token, compiled before they are needed.

`compiling_ahead` has a second process compile them while the first one compiles those it needs before; `compile_for`
compiles them for programs that begin later.

Numba compiles one kernel at a time in a process, whatever its threads; processes share what they compile.

    python -m bincompress.inference.warmup       # what `compiling_ahead` starts
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np

from bincompress.model.cache import CacheType
from bincompress.model.packed_linear import ActivationSettings
from bincompress.process.interrupts import end_with
from bincompress.process.machine import usable_cpus
from cpu_kernels.decoder.attention import ATTEND
from cpu_kernels.decoder.norms import PLACE, add_norm, gate
from cpu_kernels.jit.compiler import Kernel
from cpu_kernels.jit.kernel_cache import cache_is_kept
from cpu_kernels.matmul.dense import bfloat16_rows
from cpu_kernels.matmul.products import product_kernels
from cpu_kernels.quantize.unpacking import expand

_PROMPT = 9  # tokens: some are multiplied four at a time, one is left


def first_token_kernels() -> list[Kernel]:
    """Return the kernels that load and run a model with the default settings and generation's float16 cache.

    The longest come first, and those last that the first process needs while these are compiled.
    """
    cached = np.dtype(np.uint16)
    multiply, quantize, *sharing, pack = product_kernels()
    return [multiply, quantize, ATTEND[cached], PLACE[cached], *sharing, gate, add_norm, bfloat16_rows, expand, pack]


def compile_for(
    store: str, threads: int | None, settings: ActivationSettings, kernel: str | None, memory: int | None
) -> None:
    """Compile (or load) what generating, serving and evaluating with a store use: the model reads and writes a little.

    Raises as `load_decoder` does.
    """
    from bincompress.inference.load import load_decoder  # here: what `compiling_ahead` starts needs none of it

    decoder = load_decoder(store, threads, settings, kernel, memory).decoder
    count = min(_PROMPT, decoder.config.context - 1)
    prompt = np.arange(count) % decoder.config.vocab
    kinds: tuple[CacheType, ...] = ("float16", "float32")  # of generating and of evaluating
    for kind in kinds:
        first, second = (decoder.new_cache(count + 1, kind) for _ in range(2))
        decoder.logits(prompt, first)
        decoder.next_logits(prompt[:1], first)
        decoder.logits_of(decoder.states_of_all([(prompt, second)]))
        first.rewind()
        second.rewind()
        decoder.logits_of(decoder.states_of_all([(prompt[:1], first), (prompt[:1], second)]))


@contextlib.contextmanager
def compiling_ahead() -> Iterator[Callable[[], None]]:
    """Yield a function that starts the second process, once; it is ended with the block."""
    started: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        if not started and usable_cpus() > 1 and cache_is_kept():
            # -P and this process's path, so that nothing is imported from the folder that the user happens to be in.
            path = os.pathsep.join(entry for entry in sys.path if entry)
            started.append(
                subprocess.Popen(
                    [sys.executable, "-P", "-m", "bincompress.inference.warmup"],
                    env={**os.environ, "PYTHONPATH": path},
                    stdin=subprocess.PIPE,  # which closes when this process ends, however it does, and it with it
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    process_group=0,  # Ctrl-C is for the first process, which then ends this one
                )
            )

    try:
        yield start
    finally:
        for process in started:
            process.kill()
            process.communicate()


class _Parent:
    """The process that holds the other end of standard input."""

    def join(self) -> None:
        """Wait for its end; without Python's buffer, whose lock a thread must not hold as the interpreter ends."""
        while os.read(0, 1):
            pass


if __name__ == "__main__":
    end_with(_Parent())
    for kernel in first_token_kernels():
        kernel.compile()
