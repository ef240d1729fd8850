"""How many tokens a second do several texts at once get, beside one? Passes over the weights, and a server's clients.

python -m benchmarks.throughput STORE [--threads 2] [--clients 1 2 4 8] [--tokens 128] [--turns 3] [--stream]

First, how long a pass of one token of each of several texts takes, its head included, in milliseconds and as a multiple
of a single text's. Then `bincompress serve STORE` in a process of its own: so many clients ask at the same time for
texts of their own at temperature 0; tokens a second of all together, the median of the turns, beside what
`Model.stream` gives in this process, once a turn. --stream: they ask for streams, and read these as bytes.
"""

import argparse
import collections
import contextlib
import json
import re
import statistics
import threading
import time
from dataclasses import replace

import numpy as np

from benchmarks.serving import Server, asked
from bincompress import load
from bincompress.inference.generate import Model

_BEGINNINGS = (
    "def quicksort(items):\n", "The history of computing begins", "class Stack:\n    def __init__", "import numpy\n\n",
    "A binary tree is", "#include <stdio.h>\n", "The process that", "SELECT name FROM",
)  # fmt: skip
_BEHIND = 64  # tokens that a pass is behind


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--stream", action="store_true")
    given = parser.parse_args()
    model = load(given.store, threads=given.threads, sampling={"temperature": 0.0})
    show_passes(model, given.clients)
    server = Server(given.store, max(given.clients), 64, ["--threads", str(given.threads)])
    try:
        written(server.port, max(given.clients), 8, given.stream)  # kernels are loaded
        alone = []
        found: dict[int, list[float]] = {count: [] for count in given.clients}
        for _ in range(given.turns):
            alone.append(generated(model, given.tokens))
            for count in given.clients:
                found[count].append(written(server.port, count, given.tokens, given.stream))
    finally:
        server.process.terminate()
        server.process.wait()
    single = statistics.median(alone)
    print(f"generate: {single:.0f} tokens/s")
    for count, rates in found.items():
        rate = statistics.median(rates)
        print(
            f"{count} clients: {rate:.0f} tokens/s, {rate / single:.2f} x generate, "
            f"{rate / statistics.median(found[given.clients[0]]):.2f} x the first"
        )


def show_passes(model: Model, texts: list[int]) -> None:
    """Print how long a pass takes that gives so many texts a token each."""
    decoder, random = model.decoder, np.random.default_rng(0)
    single = 0.0
    for count in texts:
        caches = [decoder.new_cache(_BEHIND + 64, model.defaults.cache) for _ in range(count)]
        for cache in caches:
            decoder.next_logits(random.integers(0, 1000, _BEHIND), cache)
        tokens = [(random.integers(0, 1000, 1), cache) for cache in caches]
        seconds = []
        for _ in range(20):
            begin = time.perf_counter()
            decoder.logits_of(decoder.states_of_all(tokens))
            seconds.append(time.perf_counter() - begin)
        taken = statistics.median(seconds)
        single = single or taken
        print(f"a pass of {count} texts: {1e3 * taken:.2f} ms, {taken / single:.2f} x")


def generated(model: Model, tokens: int) -> float:
    """Return tokens a second of a text that is written in this process."""
    begin = time.perf_counter()
    generation = model.stream(_BEGINNINGS[0], replace(model.defaults, max_tokens=tokens))
    collections.deque(generation, 0)
    return len(generation.tokens) / (time.perf_counter() - begin)


def written(port: int, count: int, tokens: int, stream: bool) -> float:
    """Return tokens a second that so many clients get together."""
    totals = [0] * count

    def ask(number: int) -> None:
        body = {"prompt": _BEGINNINGS[number % len(_BEGINNINGS)], "max_tokens": tokens, "temperature": 0}
        body |= {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        with asked(port, json.dumps(body).encode()) as connection:
            totals[number] = int(re.findall(rb'"completion_tokens": ?(\d+)', connection.getresponse().read())[0])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(count)]
    begin = time.perf_counter()
    with contextlib.ExitStack() as ended:
        for thread in threads:
            thread.start()
            ended.callback(thread.join)
    return sum(totals) / (time.perf_counter() - begin)


if __name__ == "__main__":
    main()
