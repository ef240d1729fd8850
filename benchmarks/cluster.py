"""What does a cluster cost and gain? Scaling over workers, overhead of a job, and a plan for a model of 405B.

python -m benchmarks.cluster [--layers 4] [--jobs 10000] [--json]
"""

import argparse
import functools
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.synthetic import write_checkpoint
from bincompress.compression.records import Job, JobReport
from bincompress.methods import make_settings
from bincompress.tensors.weight import TensorSource

LLAMA_405B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16384, "intermediate_size": 53248,
    "num_attention_heads": 128, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 126,
    "vocab_size": 128256, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 131072,
    "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
# Few rows of embeddings: they are copied, and copying is no computation.
SMALL = {
    "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64,
    "vocab_size": 1024,
}  # fmt: skip
COMPUTE_BOUND = {"groups": 16, "block": 128}


def empty(job: Job) -> JobReport:
    """A job that does nothing."""
    return JobReport(job.name, "done", 0.0, 0, store=job.store)


def scaling(model: str, store: str, workers: int) -> dict[str, float]:
    """Compress on a new cluster of so many cores; its start, with kernels loaded in every worker, is timed apart."""
    import ray

    from bincompress.compression.plan import make_plan
    from bincompress.compression.recipe import load_recipe
    from bincompress.compression.run import compress
    from bincompress.sources.checkpoint import open_checkpoint
    from jobs.runner import run_ray

    plan = make_plan(open_checkpoint(Path(model)), load_recipe(None, COMPUTE_BOUND))
    begin = time.perf_counter()
    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    run = functools.partial(run_ray, max_in_flight=workers + 1)
    first = time.perf_counter()
    # As many jobs at once as there are workers, so that each of them has loaded what it needs.
    compress(plan, f"{store}-warm", runner=run)
    ready = time.perf_counter()
    outcome = compress(plan, store, runner=run)
    end = time.perf_counter()
    assert outcome.complete
    ray.shutdown()
    return {
        "workers": workers,
        "ray_init_seconds": first - begin,
        "start_up_seconds": (first - begin) + max(0.0, (ready - first) - (end - ready)),
        "seconds": end - ready,
        "mb_per_second": plan.source_bytes / (end - ready) / 1e6,
    }


def overhead(number: int) -> dict[str, float]:
    """Run empty jobs and look at the driver's time for each and at its memory."""
    import ray

    from jobs.runner import run_ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    source = TensorSource("", "BF16", (4096, 4096), "/nowhere/model-00001-of-00100.safetensors", 8, 2 * 4096 * 4096)
    names = (f"model.layers.{i}.weight" for i in range(number))
    jobs = [Job("/nowhere/store", name, source, make_settings("wgm"), peak_memory=1 << 20) for name in names]
    process = psutil.Process()
    memory: dict[int, int] = {}
    times: dict[int, float] = {}
    before = process.cpu_times()
    for count, _ in enumerate(run_ray(jobs, work=empty), 1):
        if count in (number // 10, number):
            memory[count] = process.memory_info().rss
            times[count] = time.perf_counter()
    after = process.cpu_times()
    ray.shutdown()
    few, many = sorted(times)
    return {
        "jobs": number,
        "ms_per_job": 1e3 * (times[many] - times[few]) / (many - few),
        "driver_cpu_ms_per_job": 1e3 * (after.user + after.system - before.user - before.system) / number,
        "memory_mb_at_a_tenth": memory[few] / 1e6,
        "memory_mb_at_the_end": memory[many] / 1e6,
    }


def dry_run(folder: Path) -> dict[str, Any]:
    """Plan a model of 405B's shapes from its config.json alone."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_405B))
    arguments = ["compress", str(folder), str(folder / "store"), "--dry-run", "--json"]
    command = [sys.executable, "-m", "bincompress", *arguments]
    times = []
    for _ in range(3):  # the first may compile kernels
        begin = time.perf_counter()
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        times.append(time.perf_counter() - begin)
    return {
        "first_seconds": times[0],
        "seconds": min(times[1:]),
        "source_bytes": found["source_bytes"],
        "expected_bytes": found["expected_bytes"],
        **found["estimate"],
    }


def apart(name: str, *arguments: object) -> Any:
    """Run one of the above in a process of its own, as each needs its own cluster."""
    code = f"import json, sys; from benchmarks.cluster import *; print(json.dumps({name}(*json.loads(sys.argv[1]))))"
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print every figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="layers of the synthetic model (512 x 2048)")
    parser.add_argument("--jobs", type=int, default=10_000, help="empty jobs")
    parser.add_argument("--only", choices=["scaling", "overhead", "dry_run"], help="one part")
    parser.add_argument("--json", action="store_true", help="print as JSON")
    options = parser.parse_args()
    found: dict[str, Any] = {"cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as folder:
        if options.only in (None, "scaling"):
            write_checkpoint(Path(folder) / "model", {**SMALL, "num_hidden_layers": options.layers})
            found["scaling"] = []
            for workers in (1, 2):
                store = f"{folder}/store"
                found["scaling"].append(apart("scaling", f"{folder}/model", store, workers))
                for used in Path(folder).glob("store*"):
                    shutil.rmtree(used)
        if options.only in (None, "overhead"):
            found["overhead"] = apart("overhead", options.jobs)
        if options.only in (None, "dry_run"):
            found["dry_run"] = dry_run(Path(folder) / "config")
    print(json.dumps(found, indent=1) if options.json else _text(found))


def _text(found: dict[str, Any]) -> str:
    lines = [f"{found['cores']} cores"]
    if "scaling" in found:
        lines += [
            f"{row['workers']} worker(s): {row['seconds']:6.2f} s, {row['mb_per_second']:6.1f} MB/s"
            f" (start-up apart: {row['start_up_seconds']:.1f} s, of which ray.init {row['ray_init_seconds']:.1f} s)"
            for row in found["scaling"]
        ]
        best = {n: min(row["seconds"] for row in found["scaling"] if row["workers"] == n) for n in (1, 2)}
        lines.append(f"two workers over one: {best[1] / best[2]:.2f} x (bar 1.8)")
    if "overhead" in found:
        row = found["overhead"]
        lines.append(
            f"{row['jobs']:,} empty jobs: {row['ms_per_job']:.2f} ms each (bar 5),"
            f" {row['driver_cpu_ms_per_job']:.2f} ms"
            f" of the driver's processor time; driver memory {row['memory_mb_at_a_tenth']:.0f} MB at a tenth,"
            f" {row['memory_mb_at_the_end']:.0f} MB at the end (bar: 50 MB more)"
        )
    if "dry_run" in found:
        row = found["dry_run"]
        lines.append(
            f"405B from config.json: {row['seconds']:.2f} s (bar 5; first time {row['first_seconds']:.2f} s),"
            f" {row['jobs']:,} jobs, {row['source_bytes']:,} bytes to {row['expected_bytes']:,},"
            f" {row['core_hours']:.2f} core-hours, {row['cores_for_an_hour']} cores finish in an hour"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
