"""How do the verbs run jobs: in this process or on a cluster, with one bar and an event log?"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bincompress.commands.shared import byte_bar, kernels_announced

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from bincompress.compression.events import EventLog, JobEvent, OnEvent
    from bincompress.compression.plan import Plan
    from bincompress.compression.recipe import Recipe
    from bincompress.compression.run import Outcome, Runner
    from bincompress.records import Job, JobReport
    from bincompress.sources.checkpoint import Checkpoint

    Wrapped = Callable[[Runner, Callable[[str], None]], Runner]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class Size(click.ParamType[int]):
    """A number of bytes, such as 800MB or 4GB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the bytes that a text names."""
        text = str(value).strip().upper()
        number = text.rstrip("BKMGT")
        try:
            return int(float(number) * _UNITS[text[len(number) :].strip()])
        except (KeyError, ValueError, OverflowError):
            self.fail(f"{value!r}: expected a size such as 800MB or 4GB", param, ctx)


class Rate(Size):
    """Bytes a second, such as 200MB."""

    name = "bytes/s"


@dataclass(frozen=True)
class Placement:
    """Who does the jobs, and what is written about them."""

    runner: str = "local"
    workers: int = 1
    address: str | None = None
    max_in_flight: int | None = None
    memory_per_job: int | None = None
    events: Path | None = None

    def make(
        self,
        on_event: OnEvent,
        work: Callable[[Job], JobReport] | None = None,
        kept: contextlib.ExitStack | None = None,
    ) -> Runner:
        """Return the runner; raises BincompressError where options and runner do not go together.

        work: what a job is, by default `run_job`. kept: where the runner is called several times, what it keeps its
        worker processes or its connection for.
        """
        from bincompress.compression.job import run_job
        from bincompress.compression.runner import Processes, run_local
        from bincompress.errors import BincompressError

        work = work or run_job

        cluster = {"--address": self.address, "--max-in-flight": self.max_in_flight}
        for option, value in {**cluster, "--memory-per-job": self.memory_per_job}.items():
            if self.runner == "local" and value is not None:
                raise BincompressError(f"{option} is for --runner ray; the local runner takes --workers")
        if self.runner == "local":
            processes = kept.enter_context(Processes(self.workers, on_event)) if kept is not None else None
            return functools.partial(run_local, workers=self.workers, work=work, processes=processes, on_event=on_event)
        if self.workers != 1:
            raise BincompressError("--workers is for --runner local; --max-in-flight bounds the jobs on a cluster")
        from bincompress.own_jobs import own_jobs

        ray_runner = own_jobs("runner")

        if kept is not None:
            kept.enter_context(ray_runner.connected(self.address))
        return functools.partial(
            ray_runner.run_ray,
            address=self.address,
            max_in_flight=self.max_in_flight,
            memory_per_job=self.memory_per_job,
            on_event=on_event,
            work=work,
        )


_OPTIONS = [
    click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Processes (local)."),
    click.option(
        "--runner",
        type=click.Choice(["local", "ray"]),
        default="local",
        show_default=True,
        help="Who does the jobs: this machine or a Ray cluster.",
    ),
    click.option(
        "--address", help="ray: auto, HOST:PORT or ray://HOST:10001.  [default: RAY_ADDRESS, or this machine]"
    ),
    click.option(
        "--max-in-flight", type=click.IntRange(min=1), help="ray: jobs at once.  [default: as there are cores]"
    ),
    click.option("--memory-per-job", type=Size(), help="ray: claimed for a job, such as 4GB.  [default: as planned]"),
    click.option(
        "--events",
        type=click.Path(dir_okay=False, path_type=Path),
        help="Append a JSON line for each thing that happens to a job.",
    ),
]


def placement_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say who does the jobs; the command takes them as one `placement`."""

    @functools.wraps(command)
    def gathered(**options: Any) -> Any:
        chosen = {field.name: options.pop(field.name) for field in fields(Placement)}
        return command(placement=Placement(**chosen), **options)

    for option in reversed(_OPTIONS):
        gathered = option(gathered)
    return gathered


def run_plans(
    plans: Mapping[str, Plan],
    placement: Placement,
    *,
    overwrite: bool,
    verbose: bool,
    quiet: bool,
    wrapped: Wrapped | None = None,
) -> dict[str, Outcome]:
    """Do plans by store, with one bar over all bytes, an event log, and a line per tensor where `verbose`.

    wrapped: makes the runner of the one that placement names and of a function that takes what is done beside jobs.
    """
    from bincompress.compression.events import EventLog
    from bincompress.compression.run import compress_all

    total = sum(plan.source_bytes for plan in plans.values())
    with (
        byte_bar(total, "compress", quiet) as bar,
        kernels_announced(None if bar.disable else bar),
        EventLog(placement.events) as log,
        contextlib.ExitStack() as kept,
    ):
        progress = _Progress(bar, log, sum(len(plan.tensors) for plan in plans.values()), verbose)
        runner = placement.make(progress.on_event, kept=kept if wrapped is not None else None)
        if wrapped is not None:
            runner = wrapped(runner, progress.on_stage)
        return compress_all(plans, runner=runner, overwrite=overwrite, on_report=progress.on_report)


def layer_after_layer(checkpoint: Checkpoint, samples: NDArray[np.int64], store: str) -> Wrapped:
    """Return what makes a runner collect statistics between the jobs of a layer, on all CPUs of this machine."""
    from bincompress.compression.sequential import in_sequence
    from bincompress.inference.load import usable_threads

    return lambda runner, tell: in_sequence(checkpoint, samples, store, runner, threads=usable_threads(), tell=tell)


def spread_bits(plan: Plan, target_bits: float, placement: Placement, quiet: bool) -> Recipe:
    """Try every matrix with several settings and return the recipe that spends a number of bits best."""
    from bincompress.compression.allocation import Trial, run_trials, spread, spreadable, trial_jobs
    from bincompress.errors import BincompressError

    tensors = spreadable(plan)
    trials = {}
    with (
        byte_bar(sum(tensor.source.nbytes for tensor in tensors), "try settings", quiet) as bar,
        kernels_announced(None if bar.disable else bar),
        contextlib.closing(placement.make(lambda event: None, run_trials)(trial_jobs(plan, tensors))) as reports,
    ):
        for report in reports:
            if report.status == "failed":
                raise BincompressError(report.error)
            trials[report.name] = [Trial(**trial) for trial in report.report["trials"]]
            bar.update(report.bytes_read)
    return spread(plan, trials, target_bits)


class _Progress:
    """The bar's counts, kept from events and reports."""

    def __init__(self, bar: Any, log: EventLog, total: int, verbose: bool) -> None:
        self.bar = bar
        self.log = log
        self.total = total
        self.verbose = verbose
        self.running = self.done = self.failed = 0
        self.stage = ""
        self.counts_running = False  # the local runner tells of no beginnings

    def on_event(self, event: JobEvent) -> None:
        """Take note of what a runner tells beside its reports."""
        self.log.write(event)
        if event.event == "submitted":
            self.counts_running = True
            self.running += 1
        else:
            self.running -= event.event == "lost"
            self.say(event.detail)
        self.show()

    def on_report(self, report: JobReport) -> None:
        """Take note of a finished job."""
        from bincompress.compression.events import event_of

        self.log.write(event_of(report))
        self.running = max(0, self.running - 1)
        self.done += report.status != "failed"
        self.failed += report.status == "failed"
        if self.verbose or report.status == "failed":
            self.say(_line(report))
        self.show()
        self.bar.update(report.bytes_read)

    def on_stage(self, what: str) -> None:
        """Take note of what is done between jobs."""
        self.stage = what
        self.show()
        self.bar.refresh()

    def show(self) -> None:
        """Put the counts behind the bar."""
        parts = ([self.stage] if self.stage else []) + ([f"{self.running} running"] if self.counts_running else [])
        parts += [f"{self.done}/{self.total} done"] + ([f"{self.failed} failed"] if self.failed else [])
        self.bar.set_postfix_str(", ".join(parts), refresh=False)

    def say(self, line: str) -> None:
        """Write a line without breaking the bar."""
        self.bar.write(line, file=sys.stderr) if not self.bar.disable else click.echo(line, err=True)


def _line(report: Any) -> str:
    if report.status == "failed":
        return f"FAILED {report.error}"
    found = report.report
    return (
        f"{report.name}  {report.status}  {found['method']}  groups {found['groups']}  "
        f"nominal {found['nominal_bits']:.3f}  "
        f"stored {found['stored_bits']:.3f} bits  error {found['relative_error']:.3g}  {report.seconds:.3f} s"
    )
