"""Speed of the packed products against plain reads and NumPy, as ratios within one run.

Bar 1: one token, one thread, matrices of more than 256 MB in turn: packed bytes per second at least 0.8 (6 bits) and
       0.5 (8 bits) of a sequential read of the same buffers.
Bar 2: table lookup at least 5 x popcount on AVX2, and popcount at least 2 x NumPy's float32 product of that shape.
Bar 3: blocks of 128 and 512 tokens: weights times tokens per second above 60 billion on one thread.

On x86 the figures for AVX2 are taken in a process that compiles for a CPU without AVX-512.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before NumPy is imported: its products are measured on one thread

import numpy as np
from numba import types
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cpu_kernels.jit.compiler import kernel, view
from cpu_kernels.matmul.activations import quantize
from cpu_kernels.matmul.prepacking import PackedMatrix, kernels, prepack
from cpu_kernels.matmul.products import TokenProduct, multiply
from cpu_kernels.parallel.workers import Workers

ROWS, COLS, BLOCK = 8192, 3072, 128
AVX2_CPU = {
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "+avx,+avx2,+bmi,+bmi2,+cx16,+f16c,+fma,+fsgsbase,+lzcnt,+mmx,+movbe,+popcnt,+sse,+sse2,"
    "+sse3,+sse4.1,+sse4.2,+ssse3",
}


@kernel(types.uint64(view(types.uint64, 1)))
def read(words: Any) -> Any:
    """Return the sum of all words."""
    total = np.uint64(0)
    for i in range(words.size):
        total += words[i]
    return total


def median_times(work: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Return sorted seconds of each work, taken in turns so that a slow spell of the machine meets them all."""
    for one in work.values():
        one()
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats):
        for name, one in work.items():
            start = time.perf_counter()
            one()
            seconds[name].append(time.perf_counter() - start)
    return {name: sorted(values) for name, values in seconds.items()}


def read_all(matrices: list[PackedMatrix]) -> None:
    """Read every packed stream once."""
    for one in matrices:
        read(one.stream.view(np.uint64))


def gemv(matrices: list[PackedMatrix], x: Any, bits: int) -> Callable[[], None]:
    """Return what multiplies every matrix with the token x, quantized anew for each, on one thread."""
    workers = Workers(1)
    every = [TokenProduct(one, bits, "segment", workers) for one in matrices]
    x = np.ascontiguousarray(x)

    def run() -> None:
        for product in every:
            product(x)

    return run


def copies(matrix: PackedMatrix, megabytes: int) -> list[PackedMatrix]:
    """Return so many matrices with buffers of their own that they exceed the given size together."""
    made = [matrix]
    while sum(one.nbytes for one in made) <= megabytes * 1_000_000:
        room = np.empty(matrix.stream.size + 63, np.uint8)
        start = -room.ctypes.data % 64
        room[start : start + matrix.stream.size] = matrix.stream
        made.append(dataclasses.replace(matrix, stream=room[start : start + matrix.stream.size]))
    return made


def measure(
    names: list[str], threads: list[int], tokens: list[int], repeats: int, megabytes: int
) -> list[dict[str, Any]]:
    """Return one record per kernel and activation width."""
    rng = np.random.default_rng(0)
    planes = rng.integers(0, 1 << 64, (2, ROWS, COLS // 64), dtype=np.uint64)
    scale = rng.normal(size=(2, ROWS, COLS // BLOCK)).astype(np.float16).astype(np.float32)
    head_planes = rng.integers(0, 1 << 64, (4, ROWS, COLS // 64), dtype=np.uint64)
    x = rng.normal(size=(max([1, *tokens]), COLS)).astype(np.float32)
    dense = rng.normal(size=(ROWS, COLS)).astype(np.float32)
    cached = {bits: in_caches(names, planes, scale, dense, x, bits, 2 * repeats) for bits in (6, 8)}
    records = []
    for name in names:
        matrix = prepack(planes, scale, BLOCK, COLS, kernel=name)
        packing = median_times({"prepack": partial(prepack, planes, scale, BLOCK, COLS, kernel=name)}, 5)
        many = copies(matrix, megabytes)
        weights = (8.0, 4.0, 2.0, 1.0)
        head = prepack(head_planes, scale[0], BLOCK, COLS, offset=scale[1], plane_weights=weights, kernel=name)
        heads = copies(head, megabytes)
        for bits in (6, 8):
            times = median_times(
                {
                    "read": partial(read_all, many),
                    "gemv": gemv(many, x[:1], bits),
                    "read head": partial(read_all, heads),
                    "head": gemv(heads, x[:1], bits),
                },
                repeats,
            )
            times["cached"] = [value / 10 for value in cached[bits][name]]
            times["small"] = [value / 10 for value in cached[bits][f"{name} small"]]
            times["numpy"] = cached[bits]["numpy"]
            middle = {key: statistics.median(values) for key, values in times.items()}
            size = sum(one.nbytes for one in many)
            record: dict[str, Any] = {
                "kernel": f"{matrix.kernel}-{matrix.instruction_set}",
                "activation_bits": bits,
                "packed_mb": round(size / 1e6, 1),
                "read_gb_s": size / middle["read"] / 1e9,
                "gemv_gb_s": size / middle["gemv"] / 1e9,
                "gemv_of_read": middle["read"] / middle["gemv"],
                "head_of_read": middle["read head"] / middle["head"],
                "cached_ms": middle["cached"] * 1e3,
                "cached_spread_ms": [times["cached"][0] * 1e3, times["cached"][-1] * 1e3],
                "small_ms": middle["small"] * 1e3,
                "numpy_float32_ms": middle["numpy"] * 1e3,
                "cached_over_numpy": middle["numpy"] / middle["cached"],
                "prepack_gb_s": planes.nbytes / statistics.median(packing["prepack"]) / 1e9,
                # Popcount is the reference path; a few tokens show its speed.
                "gemm": gemm(matrix, x, bits, threads, tokens if matrix.kernel == "lookup" else [min([8, *tokens])]),
            }
            records.append(record)
    return records


def in_caches(
    names: list[str], planes: NDArray[np.uint64], scale: NDArray[np.float32], dense: NDArray[np.float32],
    x: NDArray[np.float32], bits: int, repeats: int,
) -> dict[str, list[float]]:  # fmt: skip
    """Return times of every kernel and of NumPy, in turns, ten products after one another.

    A matrix then stays in the last-level cache, and the small one (1 MB) in the second-level cache of most CPUs.
    """
    small = np.ascontiguousarray(planes[:, :2048, :32]), np.ascontiguousarray(scale[:, :2048, :16])
    work: dict[str, Callable[[], object]] = {"numpy": partial(np.dot, dense, x[0])}
    for name in names:
        work[name] = gemv([prepack(planes, scale, BLOCK, COLS, kernel=name)] * 10, x[:1], bits)
        one = prepack(*small, BLOCK, 2048, kernel=name)
        work[f"{name} small"] = gemv([one] * 10, x[:1, :2048], bits)
    return median_times(work, repeats)


def gemm(
    matrix: PackedMatrix, x: NDArray[np.float32], bits: int, threads: list[int], tokens: list[int]
) -> list[dict[str, Any]]:
    """Return the rate of products with several tokens, for each number of tokens and threads."""
    found = []
    for n in tokens:
        activations = quantize(x[:n], bits)
        result = np.empty((n, ROWS), np.float32)
        for count in threads:
            with Workers(count) as pool:
                once = partial(multiply, matrix, activations, result, pool)
                second = statistics.median(median_times({"gemm": once}, 5)["gemm"])
            rate = ROWS * COLS * n / second / 1e9
            found.append({"tokens": n, "threads": count, "g_weight_tokens_per_s": rate})
    return found


def bars(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each bar with its figure and whether it holds."""
    found = []

    def add(what: str, figure: float, least: float) -> None:
        found.append({"bar": what, "figure": figure, "least": least, "holds": bool(figure >= least)})

    for record in records:
        bits, name = record["activation_bits"], record["kernel"]
        if name.startswith("popcount"):
            if bits == 6:
                add(f"popcount over NumPy float32 ({record['target']})", record["cached_over_numpy"], 2)
            continue
        add(f"{name} {bits} bits: GEMV over sequential read", record["gemv_of_read"], 0.8 if bits == 6 else 0.5)
        for gemm in record["gemm"]:
            if gemm["threads"] == 1:
                add(f"{name} {bits} bits: GEMM {gemm['tokens']} tokens, G/s", gemm["g_weight_tokens_per_s"], 60)
        beside = [
            r
            for r in records
            if r["kernel"].startswith("popcount") and r["target"] == record["target"] and r["activation_bits"] == bits
        ]
        if name == "lookup-avx2" and bits == 6 and beside:
            add("lookup-avx2 over popcount on AVX2", beside[0]["cached_ms"] / record["cached_ms"], 5)
            add("lookup-avx2 over popcount on AVX2, 2048 x 2048", beside[0]["small_ms"] / record["small_ms"], 5)
    return found


def cpu_name() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def show(report: dict[str, Any]) -> None:
    """Print the report as text."""
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    print(f"{machine['cpu']}, {machine['cores']} cores; {versions}")
    print(f"two planes of {ROWS} x {COLS}, block {BLOCK}, one thread where none is named; medians\n")
    for r in report["records"]:
        print(
            f"{r['kernel']:17} (compiled for {r['target']}) {r['activation_bits']} bits: "
            f"read {r['read_gb_s']:.1f} GB/s, GEMV {r['gemv_gb_s']:.1f} GB/s = {r['gemv_of_read']:.2f}, "
            f"4-bit head {r['head_of_read']:.2f}; in cache {r['cached_ms']:.3f} ms "
            f"({r['cached_spread_ms'][0]:.3f} to {r['cached_spread_ms'][1]:.3f}), "
            f"NumPy {r['numpy_float32_ms']:.2f} ms; prepack {r['prepack_gb_s']:.1f} GB/s"
        )
        for gemm in r["gemm"]:
            print(
                f"{'':17} GEMM {gemm['tokens']} tokens, {gemm['threads']} threads: "
                f"{gemm['g_weight_tokens_per_s']:.1f} G weights * tokens/s"
            )
    print()
    for bar in report["bars"]:
        print(f"{'holds' if bar['holds'] else 'MISSED':6} {bar['bar']}: {bar['figure']:.2f} (at least {bar['least']})")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--kernels", nargs="*", help="kernels to measure (default: the best, AVX2 and popcount)")
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2], help="thread counts of the token blocks")
    parser.add_argument("--tokens", nargs="*", type=int, default=[128, 512], help="tokens of the token blocks")
    parser.add_argument("--repeats", type=int, default=7, help="repeats of each one-token measurement")
    parser.add_argument("--megabytes", type=int, default=280, help="packed bytes that are read in turn")
    parser.add_argument("--records", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    known = kernels()
    restricted = "NUMBA_CPU_NAME" in os.environ
    target = os.environ.get("NUMBA_CPU_NAME", "this CPU")
    names = options.kernels or [known[0], *(["popcount"] if known[0] != "popcount" else [])]
    records = measure(names, options.threads, options.tokens, options.repeats, options.megabytes)
    records = [{**record, "target": target} for record in records]
    if options.records:
        print(json.dumps(records))
        return
    if not options.kernels and not restricted and "lookup-avx2" in known[1:]:
        command = [sys.executable, __file__, "--records", "--repeats", str(options.repeats), "--kernels", "lookup-avx2"]
        command += ["popcount", "--megabytes", str(options.megabytes), "--tokens", *map(str, options.tokens)]
        command += ["--threads", *map(str, options.threads)]
        run = subprocess.run(command, env={**os.environ, **AVX2_CPU}, stdout=subprocess.PIPE, text=True, check=True)
        records += json.loads(run.stdout)
    versions = {name: importlib.metadata.version(name) for name in ("numpy", "numba", "llvmlite")}
    versions["python"] = platform.python_version()
    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "kernels": known, "versions": versions}
    report = {"machine": machine, "records": records, "bars": bars(records)}
    if options.json:
        print(json.dumps(report, indent=1))
    else:
        show(report)


if __name__ == "__main__":
    main()
