"""Who does the jobs: this process, a few beside it, or a Ray cluster?"""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bincompress.compression.events import OnEvent
from bincompress.compression.job import run_job
from bincompress.compression.records import Job, JobReport
from bincompress.compression.run import Runner
from bincompress.compression.runner import Processes, run_local
from bincompress.errors import BincompressError


@dataclass(frozen=True)
class Placement:
    """Who does the jobs, and where events are written."""

    runner: Literal["local", "ray"] = "local"
    workers: int = 1  # local: processes; 1 is this one
    address: str | None = None  # ray: as ray.init takes it
    max_in_flight: int | None = None  # ray: jobs at once
    memory_per_job: int | None = None  # ray: bytes claimed for a job
    events: Path | None = None  # a file to which a JSON line is appended for each thing that happens to a job

    def make(
        self,
        on_event: OnEvent,
        work: Callable[[Job], JobReport] = run_job,
        held: contextlib.ExitStack | None = None,
    ) -> Runner:
        """Return the runner; raises BincompressError where settings and runner do not go together.

        work: what a job is. held: where the runner is called several times, what keeps its worker processes or its
        connection meanwhile.
        """
        cluster = {"--address": self.address, "--max-in-flight": self.max_in_flight}
        for option, value in {**cluster, "--memory-per-job": self.memory_per_job}.items():
            if self.runner == "local" and value is not None:
                raise BincompressError(f"{option} is for --runner ray; the local runner takes --workers")
        if self.runner == "local":
            processes = held.enter_context(Processes(self.workers, on_event)) if held is not None else None
            return functools.partial(run_local, workers=self.workers, work=work, processes=processes, on_event=on_event)
        if self.workers != 1:
            raise BincompressError("--workers is for --runner local; on a cluster use --max-in-flight")
        from bincompress.process.own_jobs import own_jobs

        ray_runner = own_jobs("runner")

        if held is not None:
            held.enter_context(ray_runner.connected(self.address))
        return functools.partial(
            ray_runner.run_ray,
            address=self.address,
            max_in_flight=self.max_in_flight,
            memory_per_job=self.memory_per_job,
            on_event=on_event,
            work=work,
        )
