"""Kill commands at random moments and run them again: `python -m tests.kill_many [COMMAND ...] [--kills 20]`.

COMMAND: compress, compress-2 (two workers), sequential, calibrate, batch, batch-ray (needs Ray; each run begins a
cluster of its own), distill (needs PyTorch); all without one. The process alone is killed with SIGKILL; what it
started has to end by itself. Prints a line for each command: how many reruns went on, gave the bytes of a run that was
left alone, and left no process behind. Exit code 1 if one did not.
"""

import argparse
import importlib.util
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.conftest import DEMO_MODEL

_MARK = "KILL_MANY_RUN"  # in the environment of a run and of all that it starts
_ENDING = 10.0  # seconds in which everything that a killed run started has to have ended
_BRIEF = 0.5  # share of the kills that come soon after the first file is there, which is the shorter part of a run
_WORDS = ("the", "little", "kernel", "upon", "a", "time", "was", "good", "and", "small", "day", "she", "said")


@dataclass
class Place:
    """Where a command works: its inputs, and the folder in which it leaves everything."""

    model: Path
    inputs: Path
    out: Path

    @property
    def text(self) -> Path:
        return self.inputs / "text.txt"

    def arguments(self, *values: object) -> list[str]:
        return [str(value) for value in values]


def _compress(place: Place, *more: str) -> list[str]:
    return place.arguments("compress", place.model, place.out / "store", *more)


def _sequential(place: Place) -> list[str]:
    more = ("--method", "xnor", "--compensate", "--samples", "4", "--context", "64")
    return _compress(place, "--sequential", str(place.text), *more)


def _calibrate(place: Place) -> list[str]:
    out = place.out / "statistics"
    return place.arguments("calibrate", place.model, out, "--text", place.text, "--samples", 8, "--context", 64)


def _batch(place: Place, *more: str) -> list[str]:
    manifest = place.inputs / f"{place.out.name}.toml"
    stores = (place.out / "one", place.out / "two")
    manifest.write_text("\n".join(f'[[model]]\nsource = "{place.model}"\nstore = "{store}"' for store in stores))
    return place.arguments("batch", manifest, *more)


def _distill(place: Place) -> list[str]:
    sizes = (
        "--steps",
        6,
        "--batch",
        1,
        "--context",
        32,
        "--evaluate-every",
        2,
        "--checkpoint-every",
        2,
        "--threads",
        1,
    )
    return place.arguments(
        "distill", place.inputs / "store", "--teacher", place.model, "--text", place.text, "--out", place.out / "store",
        "--work", place.out / "work", "--device", "cpu", *sizes,
    )  # fmt: skip


COMMANDS: dict[str, Callable[[Place], list[str]]] = {
    "compress": lambda place: _compress(place, "--workers", "1"),
    "compress-2": lambda place: _compress(place, "--workers", "2"),
    "sequential": _sequential,
    "calibrate": _calibrate,
    "batch": lambda place: _batch(place, "--workers", "2"),
    "batch-ray": lambda place: _batch(place, "--runner", "ray", "--address", "local"),
    "distill": _distill,
}
_PACKAGES = {"batch-ray": "ray", "distill": "torch"}


def tree(folder: Path) -> dict[str, bytes]:
    """Read everything that a command left, without logs, which hold times, and locks."""
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {
        str(name): path.read_bytes()
        for name, path in files.items()
        if "log" not in name.parts and name.parts[0] != "work" and name.name != ".bincompress.lock"
    }


def bincompress(arguments: Sequence[str], mark: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bincompress", *arguments]
    environment = {**os.environ, _MARK: mark}
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def finished(arguments: Sequence[str]) -> tuple[int, str]:
    """Run a command to its end; returns its exit code and the end of what it said."""
    process = bincompress(arguments)
    _, errors = process.communicate()
    return process.returncode, errors.strip()[-300:]


def started_by(mark: str) -> list[psutil.Process]:
    """Return the processes that are left of a run."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(_MARK) == mark:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def orphans(mark: str) -> list[psutil.Process]:
    """Return what a killed run has left running after the time that it has to end, and end it."""
    limit = time.monotonic() + _ENDING
    while (left := started_by(mark)) and time.monotonic() < limit:
        time.sleep(0.05)
    for process in left:
        process.kill()
    return left


def kill_once(arguments: Sequence[str], place: Place, seconds: float, chance: random.Random) -> tuple[bool, int]:
    """Begin a command and kill it; returns whether it was still running, and how many processes it left behind."""
    mark = uuid.uuid4().hex
    process = bincompress(arguments, mark)
    brief, share = chance.random() < _BRIEF, chance.random()
    if brief:
        while process.poll() is None and not any(place.out.rglob("*")):
            time.sleep(0.001)
        time.sleep(share * seconds / 4)
    else:
        time.sleep(share * seconds)
    killed = process.poll() is None
    process.kill()
    process.communicate()
    return killed, len(orphans(mark))


def kill_many(name: str, model: Path, kills: int, seed: int) -> tuple[str, bool]:
    """Kill one command so many times; returns a line of figures, and whether all is well."""
    chance = random.Random(f"{seed} {name}")
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs"
        inputs.mkdir()
        (inputs / "text.txt").write_text(" ".join(random.Random(0).choices(_WORDS, k=4000)))
        place = Place(model, inputs, Path(folder) / "out")
        if name == "distill":
            assert finished(["compress", str(model), str(inputs / "store")])[0] == 0
        trees, seconds = [], 0.0
        for _ in range(2):  # twice: the second finds its kernels compiled, and has to give the same
            shutil.rmtree(place.out, ignore_errors=True)
            place.out.mkdir()
            arguments = COMMANDS[name](place)
            begin = time.monotonic()
            code, said = finished(arguments)
            seconds = time.monotonic() - begin
            if code:
                return f"{name}: an undisturbed run ended with {code}: {said}", False
            trees.append(tree(place.out))
        if trees[0] != trees[1]:
            return f"{name}: two undisturbed runs differ in {_different(*trees)}", False
        killed = refused = lost = differ = left = 0
        for number in range(kills):
            shutil.rmtree(place.out)
            place.out.mkdir()
            in_time, orphaned = kill_once(arguments, place, seconds, chance)
            whole = tree(place.out) == trees[0]  # killed when all was written: `distill` then refuses to do it again
            code, said = finished(arguments)
            code = 0 if whole and name == "distill" else code
            found = tree(place.out)
            killed, left = killed + in_time, left + orphaned
            refused, lost = refused + bool(code), lost + len(trees[0].keys() - found.keys())
            differ += sum(found[key] != trees[0].get(key) for key in found)
            if code or found != trees[0] or orphaned:
                print(f"  {name}, kill {number}: exit code {code}, {_different(trees[0], found)}; {said}", flush=True)
    line = (
        f"{name}: {killed} of {kills} runs of {seconds:.1f} s killed; {refused} reruns did not go on, "
        f"{lost} files lost, {differ} files with other bytes, {left} processes left"
    )
    return line, not (refused or lost or differ or left)


def _different(one: dict[str, bytes], other: dict[str, bytes]) -> str:
    names = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    return f"{len(names)} files differ: {', '.join(names[:3])}" if names else "no file differs"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="*", metavar="COMMAND", help=f"any of {', '.join(COMMANDS)}")
    parser.add_argument(
        "--model", type=Path, default=DEMO_MODEL, help="a checkpoint folder; the demo model if not given"
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    unknown = [name for name in options.commands if name not in COMMANDS]
    if unknown:
        parser.error(f"{unknown[0]}: expected any of {', '.join(COMMANDS)}")
    well = True
    for name in options.commands or COMMANDS:
        needed = _PACKAGES.get(name)
        if needed and importlib.util.find_spec(needed) is None:
            print(f"{name}: not tried, as {needed} is not installed")
            continue
        line, good = kill_many(name, options.model, options.kills, options.seed)
        print(line, flush=True)
        well = well and good
    return int(not well)


if __name__ == "__main__":
    sys.exit(main())
