"""How fast, how exact and how lean is compression? Every figure is a ratio, or stands beside one, of the same run.

python -m benchmarks.compression [--layers 4] [--json]
"""

import argparse
import heapq
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

for _threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_threads] = "1"

import numba  # noqa: E402
import numpy as np  # noqa: E402
import zarr  # noqa: E402

from benchmarks.synthetic import LLAMA_3B, bfloat16_normal, write_checkpoint  # noqa: E402
from bincompress.methods import make_settings, method_named  # noqa: E402
from bincompress.tensors.weight import Weight  # noqa: E402

WGM_32 = make_settings("wgm", groups=32, block="matrix")
WGM_2 = make_settings("wgm", groups=2, block="matrix")


def best(work: Callable[[], Any], repeats: int = 5) -> float:
    """Return the least seconds of several runs, after one that warms caches and compiles."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "",
    )
    return {
        "cpu": model or platform.processor(), "threads": 1, "python": platform.python_version(),
        "numpy": np.__version__, "numba": numba.__version__, "zarr": zarr.__version__,
    }  # fmt: skip


def grouping_against_copy() -> dict[str, float]:
    """Bar 1: count, group and pack a 3072 x 8192 matrix, as multiples of copying its bytes."""
    weight = Weight(bfloat16_normal((3072, 8192), 0.02, np.random.default_rng(1)), "BF16")
    copy = best(lambda: weight.bits.copy(), 9)
    target = weight.bits.copy()
    warm = best(lambda: np.copyto(target, weight.bits), 9)
    found = {"copy_ms": 1e3 * copy, "copy_into_warm_memory_ms": 1e3 * warm}
    for groups, settings in ((32, WGM_32), (2, WGM_2)):
        seconds = best(lambda settings=settings: method_named("wgm").binarize(weight, settings))  # type: ignore[misc]
        found[f"groups_{groups}_ms"] = 1e3 * seconds
        found[f"groups_{groups}_over_copy"] = seconds / copy
        found[f"groups_{groups}_over_warm_copy"] = seconds / warm
    return found


def plain_windowed(magnitudes: list[float], most: int, window: int) -> list[tuple[int, int]]:
    """Algorithm 3 in plain Python with a heap of adjacent pairs, as the paper describes it."""
    magnitudes = sorted(magnitudes)
    first, second = [0.0], [0.0]
    for value in magnitudes:
        first.append(first[-1] + value)
        second.append(second[-1] + value * value)

    def cost(begin: int, end: int) -> float:
        total = first[end] - first[begin]
        return second[end] - second[begin] - total * total / (end - begin)

    ends = {start: min(start + window, len(magnitudes)) for start in range(0, len(magnitudes), window)}
    starts = {end: start for start, end in ends.items()}
    heap = [(cost(a, ends[b]), a, b, ends[b]) for a, b in ends.items() if b in ends]
    heapq.heapify(heap)
    while len(ends) > most:
        _, left, middle, right = heapq.heappop(heap)
        if ends.get(left) != middle or ends.get(middle) != right:
            continue
        del ends[middle], starts[middle]
        ends[left], starts[right] = right, left
        if left in starts:
            heapq.heappush(heap, (cost(starts[left], right), starts[left], left, right))
        if right in ends:
            heapq.heappush(heap, (cost(left, ends[right]), left, right, ends[right]))
    return sorted(ends.items())


def solvers(bits: np.ndarray) -> list[dict[str, Any]]:
    """Bar 3: the exact optimum against the paper's Algorithm 3, here and in plain Python, on one matrix."""
    weight = Weight(bits, "BF16")
    rows = []
    for name, settings in (
        ("exact", WGM_32),
        ("windowed, window 512", make_settings("wgm", groups=32, solver="windowed", window=512, block="matrix")),
        ("windowed, window 64", make_settings("wgm", groups=32, solver="windowed", window=64, block="matrix")),
        ("greedy", make_settings("wgm", groups=32, solver="greedy", block="matrix")),
    ):
        seconds = best(lambda settings=settings: method_named("wgm").binarize(weight, settings), 3)  # type: ignore[misc]
        found = method_named("wgm").binarize(weight, settings)
        rows.append({"solver": name, "seconds": seconds, "relative_error": found.squared_error / found.squared_norm})
    values = np.abs(weight.float32().reshape(-1).astype(np.float64))
    values = values[values > 0]
    for window in (512, 64):
        start = time.perf_counter()
        groups = plain_windowed(values.tolist(), 32, window)
        seconds = time.perf_counter() - start
        ordered = np.sort(values)
        error = sum(float(np.sum((ordered[a:b] - ordered[a:b].mean()) ** 2)) for a, b in groups)
        name = f"plain Python, window {window} (without assigning and packing)"
        rows.append({"solver": name, "seconds": seconds, "relative_error": error / float(np.sum(values**2))})
    return rows


def command(*arguments: str) -> tuple[float, float]:
    """Run bincompress in a process of its own; returns its seconds and its peak memory in bytes."""
    code = (
        "import sys, time; from bincompress.cli import group; t = time.perf_counter();"
        "group(sys.argv[1:], standalone_mode=False); seconds = time.perf_counter() - t;"
        # Not ru_maxrss: that begins with the parent's.
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'));"
        "print(seconds, 1024 * int(peak.split()[1]), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"bincompress {' '.join(arguments)} failed:\n{done.stderr}")
    seconds, memory = done.stderr.split("\n")[-2].split()
    return float(seconds), float(memory)


def end_to_end(folder: Path, layers: int) -> list[dict[str, Any]]:
    """Bars 2 and 4: a checkpoint of Llama-3.2-3B's shapes, read and written, one process, one core."""
    source = folder / "model"
    total = write_checkpoint(source, {**LLAMA_3B, "num_hidden_layers": layers})
    embeddings = 2 * LLAMA_3B["vocab_size"] * LLAMA_3B["hidden_size"]
    rows = []
    for options in (
        ["--groups", "32", "--block", "matrix"],
        ["--groups", "2", "--block", "128"],
        ["--groups", "2", "--block", "128", "--embeddings", "4bit"],
    ):
        store = folder / "store"
        times, peaks, packed_times = [], [], []
        for _ in range(3):
            shutil.rmtree(store, ignore_errors=True)
            seconds, peak = command("compress", str(source), str(store), "--solver", "exact", *options)
            found = json.loads(
                subprocess.run(
                    [sys.executable, "-m", "bincompress", "inspect", str(store), "--json"],
                    capture_output=True, text=True, check=True,
                ).stdout
            )  # fmt: skip
            times.append(seconds)
            peaks.append(peak)
            packed_times.append(sum(t["seconds"] for name, t in found["tensors"].items() if "embed_tokens" not in name))
        rows.append(
            {
                "options": " ".join(options),
                "bytes": total,
                "seconds": min(times),
                "mb_per_second": total / min(times) / 1e6,
                "layers_only_mb_per_second": (total - embeddings) / min(packed_times) / 1e6,
                "peak_memory_mb": max(peaks) / 1e6,
                "memory_limit_mb": 2.5 * embeddings / 1e6 + 400,
            }
        )
    return rows


def cold_start() -> dict[str, Any]:
    """--help, the demo and the first token that a packed model writes, with an empty and with a filled kernel cache."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "BINCOMPRESS_CACHE": f"{folder}/cache"}

        def seconds(*arguments: str) -> float:
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "bincompress", *arguments],
                cwd=folder, env=environment, check=True, capture_output=True,
            )  # fmt: skip
            return time.perf_counter() - start

        found["help_seconds"] = min(seconds("--help") for _ in range(5))
        found["first_demo_seconds"] = seconds("demo")
        found["second_demo_seconds"] = seconds("demo", "another-store")
        shutil.rmtree(environment["BINCOMPRESS_CACHE"])
        writing = "generate", "another-store", "The scheduler", "--max-tokens", "1"
        found["first_token_compiling_seconds"] = seconds(*writing)
        found["first_token_seconds"] = sorted(seconds(*writing) for _ in range(11))
    return found


def main() -> None:
    """Print every figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="layers of the synthetic model (the real one has 28)")
    parser.add_argument(
        "--folder", type=Path, help="where the synthetic model is written (default: a temporary folder)"
    )
    parser.add_argument("--matrix", default="../shared/models/doclm-29m", help="checkpoint for the table of solvers")
    parser.add_argument("--json", action="store_true", help="print as JSON")
    parser.add_argument("--start", action="store_true", help="only the time that commands take to start")
    options = parser.parse_args()
    if options.start:
        found: dict[str, Any] = {"machine": machine(), "cold_start": cold_start()}
        print(json.dumps(found, indent=1) if options.json else _starting(found["cold_start"]))
        return
    found = {"machine": machine(), "grouping": grouping_against_copy(), "cold_start": cold_start()}
    if Path(options.matrix).is_dir():
        from bincompress.sources.checkpoint import open_checkpoint, read_weight

        checkpoint = open_checkpoint(Path(options.matrix))
        found["solvers"] = solvers(read_weight(checkpoint.tensors["model.layers.3.mlp.up_proj.weight"]).bits)
    else:
        found["solvers"] = solvers(bfloat16_normal((1536, 512), 0.02, np.random.default_rng(2)))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found["end_to_end"] = end_to_end(Path(folder), options.layers)
    print(json.dumps(found, indent=1) if options.json else _text(found))


def _text(found: dict[str, Any]) -> str:
    grouping = found["grouping"]
    lines = [
        ", ".join(f"{key} {value}" for key, value in found["machine"].items()),
        "",
        "count + exact grouping + packing of 3072 x 8192 bf16, over copying its bytes"
        f" ({grouping['copy_ms']:.1f} ms; into warm memory {grouping['copy_into_warm_memory_ms']:.1f} ms):",
        *(
            f"  {groups:2d} groups  {grouping[f'groups_{groups}_ms']:7.1f} ms"
            f"  {grouping[f'groups_{groups}_over_copy']:5.2f} x"
            f"  ({grouping[f'groups_{groups}_over_warm_copy']:.2f} x the warm copy; bar {bar} x)"
            for groups, bar in ((32, 6), (2, 3))
        ),
        "",
        "32 groups of one matrix (786,432 weights):",
        *(
            f"  {row['solver']:60s} {1e3 * row['seconds']:10.1f} ms  error {row['relative_error']:.6f}"
            for row in found["solvers"]
        ),
        "",
        "Llama-3.2-3B's shapes, one process, one core, reading and writing included:",
        *(
            f"  {row['options']:45s} {row['bytes'] / 1e6:6.0f} MB in {row['seconds']:5.2f} s:"
            f" {row['mb_per_second']:5.0f} MB/s"
            f" (layers alone {row['layers_only_mb_per_second']:5.0f}), peak {row['peak_memory_mb']:5.0f} MB"
            f" (bar {row['memory_limit_mb']:.0f})"
            for row in found["end_to_end"]
        ),
        "",
        _starting(found["cold_start"]),
    ]
    return "\n".join(lines)


def _starting(cold: dict[str, Any]) -> str:
    later = cold["first_token_seconds"]
    return (
        f"--help {cold['help_seconds']:.3f} s (bar 0.3);"
        f" first demo {cold['first_demo_seconds']:.1f} s (kernels compiled),"
        f" second {cold['second_demo_seconds']:.1f} s\n"
        f"first token {cold['first_token_compiling_seconds']:.1f} s (kernels compiled, bar 15), later"
        f" {later[len(later) // 2]:.2f} s ({later[0]:.2f} to {later[-1]:.2f}, bar 1.5)"
    )


if __name__ == "__main__":
    main()
