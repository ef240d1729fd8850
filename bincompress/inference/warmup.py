"""The kernels of a first token, compiled in a second process while the first one compiles those it needs before.

Numba compiles one kernel at a time in a process, whatever its threads; processes share what they compile.

    python -m bincompress.inference.warmup KERNEL ...      # what `compiling_ahead` starts
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from bincompress.process.interrupts import end_with
from bincompress.process.machine import usable_cpus
from cpu_kernels.decoder.attention import ATTEND
from cpu_kernels.decoder.norms import PLACE, add_norm, gate
from cpu_kernels.jit.compiler import Kernel
from cpu_kernels.jit.kernel_cache import cache_is_kept
from cpu_kernels.matmul.dense import bfloat16_rows
from cpu_kernels.matmul.products import product_kernels
from cpu_kernels.quantize.unpacking import expand


def first_token_kernels() -> list[Kernel]:
    """Return the kernels that load and run a model with the default settings and generation's float16 cache.

    The longest come first, and those last that the first process needs while these are compiled.
    """
    cached = np.dtype(np.uint16)
    multiply, quantize, *sharing, pack = product_kernels()
    return [multiply, quantize, ATTEND[cached], PLACE[cached], *sharing, gate, add_norm, bfloat16_rows, expand, pack]


_expected: list[Kernel] = []  # that the model which is being loaded takes beside those of every model


def expect(kernels: Sequence[Kernel]) -> None:
    """Note what a model takes before any kernel is compiled, for the second process to compile it too."""
    _expected[:] = kernels


def _all_kernels(named: Sequence[str]) -> list[Kernel]:
    """Return the kernels of every model, and those of the decoder that have these names."""
    from cpu_kernels.decoder import attention, gates, norms, recurrence, routing
    from cpu_kernels.matmul import chosen

    found: list[Kernel] = []
    for module in (attention, routing, recurrence, gates, norms, chosen):
        for value in vars(module).values():
            found += [value] if isinstance(value, Kernel) else []
            found += (
                [kernel for kernel in value.values() if isinstance(kernel, Kernel)] if isinstance(value, dict) else []
            )
    by_name = {kernel.name(): kernel for kernel in found}
    return [*first_token_kernels(), *(by_name[name] for name in named if name in by_name)]


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
                    [
                        sys.executable,
                        "-P",
                        "-m",
                        "bincompress.inference.warmup",
                        *(kernel.name() for kernel in _expected),
                    ],
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
    for kernel in _all_kernels(sys.argv[1:]):
        kernel.compile()
