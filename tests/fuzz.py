"""Does any input crash, hang, or take memory without end? `python -m tests.fuzz [--inputs 20000] [--kind store]`.

Inputs of each kind (stores, safetensors headers, config.json, tokenizers, chat templates, quantized checkpoints, GGUF
files) are made by changing sound ones, and used in a process of their own. An input passes when it is used, or refused
with a BincompressError of one line. Everything else is a finding: another exception, a crash, more than 5 s of CPU time
(or 60 s of waiting), more than 512 MB. Exit code 1 if there are any. The same seed gives the same inputs;
`--kind KIND --show NUMBER FOLDER` writes one into a folder.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from tests.fuzz_mutations import Files
from tests.fuzz_targets import KINDS, change, lay_out, try_one

SECONDS = 5.0  # of CPU time: on a busy machine the clock would find what is not the input's fault
WAITING = 60.0  # seconds by the clock
MEMORY = 512 << 20  # bytes, beyond what the process has before the first input
_STARTING = 120.0  # seconds until a process has imported everything, on a busy machine
_A_PROCESS = 1000  # inputs


@dataclass
class Found:
    """What came of the inputs of one kind."""

    kind: str
    inputs: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[dict[str, Any]] = field(default_factory=list)
    slowest: float = 0.0  # seconds
    memory: int = 0  # bytes that a process has taken at most, beyond what it had

    def line(self) -> str:
        return (
            f"{self.kind}: {self.inputs:,} inputs, {self.outcomes['accepted']:,} accepted, "
            f"{self.outcomes['refused']:,} refused, {len(self.findings)} findings; slowest {self.slowest:.2f} s, "
            f"{self.memory / 1e6:.0f} MB at most"
        )


def work(kind: str, seeds: list[Files], seed: int, numbers: list[int], folder: str, pipe: Connection) -> None:
    """Use inputs one after the other, in a process of its own, and tell what each came to."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    errors = open(Path(folder) / "stderr", "wb", buffering=0)  # noqa: SIM115 - until the process ends
    os.dup2(errors.fileno(), 2)
    there: dict[int, Files] = {}
    for place, files in enumerate(seeds):  # whatever is imported late is imported now
        there[place] = _tried(kind, files, Path(folder) / str(place), None)[1]
    own = psutil.Process()
    before = own.memory_info()
    resource.setrlimit(resource.RLIMIT_AS, (before.vms + MEMORY, resource.RLIM_INFINITY))
    pipe.send(("ready", 0, 0.0, 0))
    for number in numbers:
        place, files = change(kind, seeds, seed, number)
        pipe.send(("begin", number, 0.0, 0))
        start = time.process_time()
        outcome, there[place] = _tried(kind, files, Path(folder) / str(place), there[place])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before.rss
        pipe.send((outcome, number, time.process_time() - start, peak))
    pipe.send(("done", 0, 0.0, 0))


def _tried(kind: str, files: Files, folder: Path, there: Files | None) -> tuple[str, Files]:
    try:
        return try_one(kind, files, folder, there), files
    except BaseException as error:  # a panic of Rust code is no Exception
        where = traceback.extract_tb(error.__traceback__)
        frames = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in where[-4:]]
        return f"{type(error).__name__}: {str(error)[:300]} ({' '.join(frames)})", files


class Worker:
    """A process that uses inputs, and what is heard of it."""

    def __init__(self, kind: str, seeds: list[Files], seed: int, numbers: list[int]) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.following = dict(itertools.pairwise(numbers))
        # Copies of a process that has imported everything: each is as new as one that was begun for it.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.fuzz"])
        self.pipe, other = context.Pipe(duplex=False)
        arguments = (kind, seeds, seed, numbers, self.folder.name, other)
        self.process = context.Process(target=work, args=arguments, daemon=True)
        self.process.start()
        other.close()

    def _heard(self, limit: float) -> bool:
        """Wait for the process to say something; returns whether it did within the limits."""
        before, end = self._cpu_seconds(), time.monotonic() + limit
        while not self.pipe.poll(min(SECONDS, limit)):
            used = self._cpu_seconds() - before
            if time.monotonic() > end or (limit == WAITING and used > SECONDS):
                return False
        return True

    def _cpu_seconds(self) -> float:
        try:
            times = psutil.Process(self.process.pid).cpu_times()
        except psutil.NoSuchProcess:
            return 0.0
        return float(times.user + times.system)

    def answers(self) -> Iterator[tuple[str, int, float, int]]:
        """Yield what each input came to; a hang or a crash is the last."""
        begun, limit = -1, _STARTING
        try:
            while True:
                if not self._heard(limit):
                    yield f"hang: more than {SECONDS:g} s", begun, SECONDS, 0
                    return
                try:
                    outcome, number, seconds, memory = self.pipe.recv()
                except (EOFError, OSError):
                    self.process.join()
                    said = (Path(self.folder.name) / "stderr").read_text("utf-8", "replace")[-300:]
                    yield f"crash: exit code {self.process.exitcode}: {said}", begun, 0.0, 0
                    return
                if outcome == "done":
                    return
                if outcome == "begin":
                    begun, limit = number, WAITING
                elif outcome != "ready":
                    begun = self.following.get(number, number)  # what happens until it begins is its making
                    yield outcome, number, seconds, memory
        finally:
            self.process.kill()
            self.process.join()
            self.folder.cleanup()


def fuzz(kind: str, inputs: int, seed: int, progress: Any = None, first: int = 0) -> Found:
    """Use so many inputs of a kind, and return what came of them."""
    found = Found(kind)
    with tempfile.TemporaryDirectory() as folder:
        seeds = KINDS[kind].seeds(Path(folder))
    waiting = list(range(first, first + inputs))
    while waiting:
        for outcome, number, seconds, memory in Worker(kind, seeds, seed, waiting[:_A_PROCESS]).answers():
            if number < 0:
                raise RuntimeError(f"{kind}: the process did not come to its first input: {outcome}")
            waiting.remove(number)
            found.inputs += 1
            found.slowest, found.memory = max(found.slowest, seconds), max(found.memory, memory)
            found.outcomes[outcome if outcome in ("accepted", "refused") else "finding"] += 1
            if outcome not in ("accepted", "refused"):
                found.findings.append({"kind": kind, "number": number, "outcome": outcome, "seconds": seconds})
            elif seconds > SECONDS:
                found.findings.append({"kind": kind, "number": number, "outcome": "slow", "seconds": seconds})
            if progress is not None:
                progress.update(1)
    return found


def main() -> int:
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=20_000, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=[*KINDS, "all"], default="all")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--show", nargs=2, metavar=("NUMBER", "FOLDER"), help="write one input of --kind, and use it")
    options = parser.parse_args()
    kinds = list(KINDS) if options.kind == "all" else [options.kind]
    if options.show:
        with tempfile.TemporaryDirectory() as folder:
            seeds = KINDS[kinds[0]].seeds(Path(folder))
        place, files = change(kinds[0], seeds, options.seed, int(options.show[0]))
        differ = [name for name in seeds[place].keys() | files.keys() if seeds[place].get(name) != files.get(name)]
        lay_out(Path(options.show[1]), files, None)
        print(f"made of seed {place}; changed: {', '.join(differ)}", flush=True)
        print(try_one(kinds[0], files, Path(options.show[1])))
        return 0
    results = []
    for kind in kinds:
        count = options.inputs // len(kinds)
        with tqdm(total=count, desc=kind, unit="input", disable=None) as bar:
            results.append(fuzz(kind, count, options.seed, bar))
        if not options.json:
            print(results[-1].line(), flush=True)
            for finding in results[-1].findings:
                print(f"  {finding['number']}: {finding['outcome']}", flush=True)
    if options.json:
        print(json.dumps([{**vars(found), "outcomes": dict(found.outcomes)} for found in results], indent=2))
    return int(any(found.findings for found in results))


if __name__ == "__main__":
    sys.exit(main())
