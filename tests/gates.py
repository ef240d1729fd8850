"""What tests have the workers and drivers of a cluster do; a module of its own, so that they can import it."""

import functools
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bincompress.compression.job import run_job
from bincompress.compression.records import Job, JobReport
from bincompress.compression.run import compress


def wait_for(condition: Callable[[], Any]) -> Any:
    """Wait until something is so, and return it."""
    end = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < end, "waited a minute in vain"
        time.sleep(0.02)
    return found


class Notes:
    """What jobs write down as they begin, and where they wait to be released."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def begin(self, name: str) -> int:
        import ray

        with open(self.folder / f"{name}.runs", "a") as file:
            file.write(f"{os.getpid()} {ray.get_runtime_context().get_node_id()}\n")
        return len(self.runs(name))

    def runs(self, name: str) -> list[tuple[int, str]]:
        path = self.folder / f"{name}.runs"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(int(line.split()[0]), line.split()[1]) for line in lines if len(line.split()) == 2]

    def all_runs(self) -> dict[str, list[tuple[int, str]]]:
        return {path.name[:-5]: self.runs(path.name[:-5]) for path in self.folder.glob("*.runs")}

    def done_twice(self) -> set[str]:
        return {name for name, runs in self.all_runs().items() if len(runs) > 1}

    def release(self) -> None:
        (self.folder / "release").touch()

    def wait(self) -> None:
        wait_for((self.folder / "release").exists)


def gated(folder: Path, held: str, job: Job) -> JobReport:
    """A job that notes its run; the first run of `held` waits to be released."""
    notes = Notes(folder)
    if notes.begin(job.name) == 1 and job.name == held:
        notes.wait()
    return run_job(job)


def dies(name: str, job: Job) -> JobReport:
    if job.name == name:
        os._exit(9)
    return run_job(job)


def dies_when_done(name: str, job: Job) -> JobReport:
    """A job that is done, and of which its first run does not tell."""
    report = run_job(job)
    if job.name == name and not job.again:
        os._exit(9)
    return report


def probe(job: Job) -> JobReport:
    """A job that tells which kernels it compiled, and how its process is set up."""
    from cpu_kernels.jit.compiler import announce
    from cpu_kernels.jit.kernel_cache import cache_folder

    compiled: list[str] = []
    with announce(compiled.append):
        report = run_job(job)
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
    found = {"compiled": compiled, "cache": str(cache_folder()), "threads": [os.environ[name] for name in names]}
    return replace(report, report={**found, "pid": os.getpid()})


def drive(address: str, model: str, store: str, folder: str, held: str, events: str) -> None:
    """The driver that tests kill or interrupt."""
    from jobs.runner import run_ray
    from tests.runs import plan_of

    with open(events, "a", buffering=1) as log:
        runner = functools.partial(
            run_ray,
            address=address,
            max_in_flight=1,
            work=functools.partial(gated, Path(folder), held),
            on_event=lambda event: print(event.event, file=log),
        )
        try:
            compress(plan_of(Path(model)), store, runner=runner)
        except KeyboardInterrupt:
            sys.exit(130)


def held_job(folder: Path, job: Job) -> JobReport:
    """A job that writes down its process and then waits to be released."""
    (folder / f"{os.getpid()}.pid").touch()
    wait_for((folder / "release").exists)
    return run_job(job)


def held_command(folder: str, *arguments: str) -> None:
    """The command line, with jobs that wait to be released."""
    import bincompress.compression.job
    from bincompress import cli

    bincompress.compression.job.run_job = functools.partial(held_job, Path(folder))  # type: ignore[assignment]
    sys.argv = ["bincompress", *arguments]
    cli.main()


def end_at_once() -> None:
    """What a process does that can do no job."""
    os._exit(1)
