"""How fast are one thread and all threads while other programs use cores, too?

    python -m benchmarks.busy_core STORE [--threads 2] [--loads 0 1 2 on-off] [--rounds 3] [--seconds 1.5]

A load of 1 or 2 is so many programs in an endless loop, `on-off` is one that works for 0.3 s and rests for 0.3 s. One
thread and all threads take turns, for prompts of 128 and 512 tokens and for writing; the medians are printed.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

for _threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_threads] = "1"

import numpy as np  # noqa: E402

from bincompress.inference.load import load_decoder  # noqa: E402
from bincompress.model.decoder import Decoder  # noqa: E402
from bincompress.model.packed_linear import ActivationSettings  # noqa: E402

_LOOP = "while True: pass"
_ON_OFF = """
import time
while True:
    end = time.perf_counter() + 0.3
    while time.perf_counter() < end: pass
    time.sleep(0.3)
"""
_TESTS = {"prompt of 128": 128, "prompt of 512": 512, "writing": 0}


@contextmanager
def load(kind: str) -> Iterator[None]:
    """Let other programs use cores meanwhile."""
    programs = [_ON_OFF] if kind == "on-off" else [_LOOP] * int(kind)
    running = [subprocess.Popen([sys.executable, "-c", program]) for program in programs]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def speed(decoder: Decoder, prompt: int, seconds: float) -> float:
    """Return tokens per second of reading prompts, or of writing where prompt is 0."""
    ids = np.random.default_rng(0).integers(0, decoder.config.vocab, prompt or 64)
    done, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        cache = decoder.new_cache(len(ids), "float16")
        for part in [ids] if prompt else ids[:, None]:
            decoder.next_logits(part, cache)
        done += len(ids)
    return done / (time.perf_counter() - begin)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--loads", nargs="+", default=["0", "1", "2", "on-off"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--tests", nargs="+", choices=_TESTS, default=list(_TESTS))
    options = parser.parse_args()
    decoders = {
        threads: load_decoder(options.store, threads, ActivationSettings(), None, None).decoder
        for threads in (1, options.threads)
    }
    for decoder in decoders.values():
        for prompt in (128, 0):
            speed(decoder, prompt, 0.1)  # compiles
    print(f"| load | test | 1 thread | {options.threads} threads | ratio | all ratios |\n|---|---|---|---|---|---|")
    for kind in options.loads:
        with load(kind):
            time.sleep(0.2)
            for test in options.tests:
                found = [
                    [speed(decoder, _TESTS[test], options.seconds) for decoder in decoders.values()]
                    for _ in range(options.rounds)
                ]
                one, more = (statistics.median(column) for column in zip(*found, strict=True))
                ratios = " ".join(f"{b / a:.2f}" for a, b in found)
                print(f"| {kind} | {test} | {one:.1f} | {more:.1f} | {more / one:.2f} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
