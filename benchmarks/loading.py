"""How long does a store take to load and to give its first token: a folder, one file, one file that is mapped?

    python -m benchmarks.loading STORE [--repeats 5] [--threads 2] [--folder DIR] [--json]

Times are beside that of reading the store's own files from the page cache, each in a process of its own, in turns.
Kernels and packages are loaded before. Then two processes run each at once: what is resident, and each one's share.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import bincompress
from benchmarks.compression import machine

_TIMES = """
import sys, time
from pathlib import Path
from bincompress.inference.load import load_decoder
from bincompress.model.packed_linear import ActivationSettings
place, store, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
files = [path for path in store.rglob("*") if path.is_file()]
def run():
    begin = time.perf_counter()
    decoder = load_decoder(place, threads, ActivationSettings()).decoder
    loaded = time.perf_counter()
    cache = decoder.new_cache(64, "float16")
    decoder.next_logits([1], cache)
    first = time.perf_counter()
    for _ in range(8):
        decoder.next_logits([1], cache)
    begun = time.perf_counter()
    for _ in range(8):
        decoder.next_logits([1], cache)
    return loaded - begin, first - begin, (time.perf_counter() - begun) / 8
run()
begin = time.perf_counter()
for path in files:
    path.read_bytes()
print(time.perf_counter() - begin, *run())
"""
_MEMORY = """
import sys
from bincompress.inference.load import load_decoder
from bincompress.model.packed_linear import ActivationSettings
decoder = load_decoder(sys.argv[1], 1, ActivationSettings()).decoder
decoder.next_logits([1, 2, 3], decoder.new_cache(64, "float16"))
print("ready", flush=True)
sys.stdin.readline()
"""
_SHOWN = {"Rss": "resident", "Pss": "share", "Pss_Anon": "of its own"}


def times(place: str, store: str, threads: int) -> tuple[float, ...]:
    """Return the seconds of reading the store, of loading, of loading and a first token, and of a later token."""
    command = [sys.executable, "-c", _TIMES, place, store, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return tuple(map(float, done.stdout.split()))


def memory(place: str) -> dict[str, float]:
    """Return the MB that one of two processes has which run a store at once (Linux)."""
    command = [sys.executable, "-c", _MEMORY, place]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    rollup = Path(f"/proc/{processes[0].pid}/smaps_rollup").read_text()
    for process in processes:
        process.communicate("\n")
    found = dict(re.findall(r"^(\w+):\s+(\d+) kB", rollup, re.M))
    return {text: 1024 * int(found[name]) / 1e6 for name, text in _SHOWN.items()}


def measure(store: str, folder: Path, threads: int, repeats: int) -> dict[str, Any]:
    """Measure all three places."""
    places = {"folder": store, "one file": str(folder / "m.zip"), "laid out": str(folder / "laid-out.zip")}
    bincompress.pack(store, places["one file"])
    bincompress.pack(places["one file"], places["laid out"], layout=["auto"])
    seen: dict[str, list[tuple[float, ...]]] = {name: [] for name in places}
    for _ in range(repeats):
        for name, place in places.items():
            seen[name].append(times(place, store, threads))
    found: dict[str, Any] = {"machine": {**machine(), "threads": threads}, "places": {}}
    for name, place in places.items():
        reading, loading, first, token = (statistics.median(one) for one in zip(*seen[name], strict=True))
        found["places"][name] = {
            "bytes": sum(p.stat().st_size for p in [Path(place), *Path(place).rglob("*")] if p.is_file()),
            "reading": reading, "loading": loading, "first token": first, "a later token": token,
            "first token over reading": statistics.median(one[2] / one[0] for one in seen[name]),
            "memory of one of two": memory(place),
        }  # fmt: skip
    return found


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="keep the packed files here, and use those that are there")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        found = measure(options.store, options.folder or Path(temporary), options.threads, options.repeats)
    if options.json:
        print(json.dumps(found, indent=1))
        return
    print(", ".join(f"{key} {value}" for key, value in found["machine"].items()))
    for name, one in found["places"].items():
        memory_text = ", ".join(f"{text} {value:,.0f} MB" for text, value in one["memory of one of two"].items())
        print(
            f"{name:9s} {one['bytes'] / 1e6:6,.0f} MB  reading {one['reading']:.3f} s, loading {one['loading']:.3f}, "
            f"first token {one['first token']:.3f} ({one['first token over reading']:.2f} x), later "
            f"{1e3 * one['a later token']:.1f} ms; two processes, each: {memory_text}"
        )


if __name__ == "__main__":
    main()
