"""Who does the jobs? A Ray cluster: each job is a task on one core of some node, which reads and writes by itself.

Ray retries nothing here: its retries after the memory monitor's kills are endless by default and cannot ask for more
memory. This driver counts the deaths of each job instead and gives it up by name.
"""

import contextlib
import re
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bincompress import __version__
from bincompress.compression.events import JobEvent, OnEvent
from bincompress.compression.job import run_job
from bincompress.compression.records import Job, JobReport, failed_report
from bincompress.errors import BincompressError
from bincompress.sources.checkpoint import Checkpoint
from bincompress.store.store import is_local
from bincompress.tensors.weight import TensorSource

from .addresses import begins_one, check_address
from .ending import end_watched, watched
from .interrupts import Interrupts, termination_kept
from .nodes import PATIENCE_SECONDS, Nodes
from .task import ENVIRONMENT, run_task

_TICK_SECONDS = 1.0  # how often the driver looks up although no job has finished
_CANCEL_SECONDS = 20.0
# A job may kill its worker, but the loss of a node is seldom a job's fault.
_MOST_DEATHS = {"worker": 3, "memory": 3, "node": 10}
_DEATHS = {
    "worker": "its worker process died",
    "memory": "its worker was killed because the node ran out of memory",
    "node": "its node was lost",
}


def run_ray(
    jobs: Sequence[Job],
    address: str | None = None,
    *,
    max_in_flight: int | None = None,
    memory_per_job: int | None = None,
    patience: float = PATIENCE_SECONDS,
    work: Callable[[Job], JobReport] = run_job,
    on_event: OnEvent = lambda event: None,
) -> Generator[JobReport, None, None]:
    """Run jobs on a Ray cluster and yield a report each, in the order in which they finish.

    address: as ray.init takes it; None is the cluster of RAY_ADDRESS, else one that runs on this machine, else a new
    one. max_in_flight: jobs handed to Ray at once; None follows the number of cores as nodes come and go.
    memory_per_job: bytes that a job claims; None is each job's own plan. patience: seconds to wait for nodes when none
    can hold what is left. The first Ctrl-C stops submitting, the second cancels; KeyboardInterrupt follows either.
    """
    with connected(address) as ray:
        tasks = [_Task(job, job.peak_memory if memory_per_job is None else memory_per_job) for job in jobs]
        run = _Run(ray, tasks, max_in_flight, patience, work, on_event)
        try:
            with Interrupts() as interrupts:
                yield from run.reports(interrupts)
        finally:
            run.cancel()


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Yield Ray, connected to a cluster; a connection that was there before stays, another one is closed."""
    ray = import_ray()
    began = not ray.is_initialized()
    if began:
        connect(ray, address)
    try:
        yield ray
    finally:
        if began:
            ray.shutdown()
            end_watched()


def import_ray() -> Any:
    """Return the module; raises BincompressError where it is not installed."""
    try:
        import ray
    except ImportError:
        raise BincompressError(
            "--runner ray needs Ray, which is not installed: pip install 'bincompress[ray]'"
        ) from None
    return ray


def connect(ray: Any, address: str | None) -> None:
    """Connect to a cluster, or begin one; raises BincompressError where there is none at the address."""
    check_address(address)
    # The dashboard concerns a cluster that is begun here; Ray's client for ray:// knows no such option.
    options = {} if str(address).startswith("ray://") else {"include_dashboard": False}
    try:
        with termination_kept(), watched() if begins_one(address) else contextlib.nullcontext():
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", **options)
    except Exception as error:  # Ray raises whatever its parts raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if re.search(r"token|unauthenticated|authenticat", reason, re.IGNORECASE):
            raise BincompressError(
                f"the Ray cluster at {address or 'the default address'} refuses this driver's token: {reason}; set "
                "RAY_AUTH_MODE and RAY_AUTH_TOKEN as the cluster has them"
            ) from None
        if isinstance(error, OSError) and not isinstance(error, ConnectionError):
            raise BincompressError(f"Ray cannot start: {reason}; RAY_TMPDIR names a short path to write to") from None
        raise BincompressError(
            f"no Ray cluster at {address or 'the default address'}: {reason}; `ray start --head` starts one"
        ) from None


def by_value(ray: Any, function: Callable[..., Any]) -> None:
    """Send this function's code to the workers, whose folder may hold another package of the name `jobs`."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[function.__module__])


def absolute(job: Job) -> Job:
    """Return a job with the driver's relative paths resolved: workers run in other folders."""

    def source(tensor: TensorSource) -> TensorSource:
        return tensor.moved(absolute_url)

    shared = job.shared and replace(job.shared, members=tuple(source(member) for member in job.shared.members))
    return replace(
        job, store=absolute_url(job.store), source=source(job.source), shared=shared,
        statistics=absolute_url(job.statistics) if job.statistics else "",
        others=tuple(absolute(other) for other in job.others),
    )  # fmt: skip


def absolute_checkpoint(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint with the driver's relative paths resolved."""
    tensors = {name: one.moved(absolute_url) for name, one in checkpoint.tensors.items()}
    return replace(checkpoint, folder=checkpoint.folder.absolute(), tensors=tensors)


def absolute_url(url: str) -> str:
    """Return a local path from the root, and any other URL as it is."""
    return str(Path(url).absolute()) if is_local(url) else url


@dataclass(frozen=True)
class _Task:
    job: Job
    memory: int  # bytes that it claims of a node

    @property
    def key(self) -> tuple[str, str]:
        return self.job.store, self.job.name


class _Run:
    """The jobs of one run: waiting, in flight, or set aside because no node can hold them."""

    def __init__(
        self, ray: Any, tasks: Sequence[_Task], max_in_flight: int | None, patience: float,
        work: Callable[[Job], JobReport], on_event: OnEvent,
    ) -> None:  # fmt: skip
        self.ray = ray
        self.queue = deque(tasks)
        self.flying: dict[Any, _Task] = {}
        self.aside: list[_Task] = []
        self.deaths: Counter[tuple[tuple[str, str], str]] = Counter()
        self.max_in_flight = max_in_flight
        self.patience = patience
        self.work = work
        self.on_event = on_event
        self.nodes = Nodes(ray)
        by_value(ray, run_task)
        self.remote = ray.remote(num_cpus=1, max_retries=0, runtime_env={"env_vars": ENVIRONMENT})(run_task)

    def reports(self, interrupts: Interrupts) -> Iterator[JobReport]:
        """Run everything; after the first interrupt only what is in flight."""
        told = False
        while self.queue or self.flying or self.aside:
            if not interrupts.asked:
                self._submit()
            elif not self.flying:
                break
            elif not told:
                told = True
                detail = f"{len(self.flying)} jobs are in flight and will finish; interrupt again to cancel them"
                self.on_event(JobEvent("stopping", detail=detail))
            if self.flying:
                yield from self._collect()
            elif self.aside:
                yield from self._wait_for_nodes(interrupts)
        if interrupts.asked:
            raise KeyboardInterrupt

    def cancel(self) -> None:
        """Stop what is in flight and wait until it is gone, so that nobody writes when the store is released."""
        with contextlib.suppress(Exception):  # the cluster may be gone, and with it the tasks
            for reference in self.flying:
                self.ray.cancel(reference, force=True)
            if self.flying:
                self.ray.wait(list(self.flying), num_returns=len(self.flying), timeout=_CANCEL_SECONDS)

    def _submit(self) -> None:
        self.nodes.look()
        # A few more than there are cores, so that none waits for the driver.
        most = self.max_in_flight or self.nodes.cpus + max(2, self.nodes.cpus // 4)
        self._take_back()
        while self.queue and len(self.flying) < most:
            task = self.queue.popleft()
            if not self.nodes.hold(task.memory):
                self._set_aside(task)
                continue
            claim = {"memory": task.memory} if task.memory else {}
            reference = self.remote.options(**claim).remote(self.work, absolute(task.job), __version__)
            self.flying[reference] = task
            self.on_event(JobEvent("submitted", task.job.store, task.job.name))

    def _set_aside(self, task: _Task) -> None:
        self.aside.append(task)
        self.on_event(JobEvent("waiting", task.job.store, task.job.name, detail=self._too_big(task)))

    def _take_back(self) -> None:
        self.queue.extendleft(task for task in reversed(self.aside) if self.nodes.hold(task.memory))
        self.aside = [task for task in self.aside if not self.nodes.hold(task.memory)]

    def _too_big(self, task: _Task) -> str:
        return (
            f"{task.job.name}: needs {task.memory / 1e6:,.0f} MB of memory, and the largest node has "
            f"{self.nodes.largest_memory / 1e6:,.0f} MB; add a larger node, or claim less with --memory-per-job"
        )

    def _wait_for_nodes(self, interrupts: Interrupts) -> Iterator[JobReport]:
        """Wait for a node that can hold a job set aside; then what still fits nowhere has failed."""
        deadline = time.monotonic() + self.patience
        while not interrupts.asked:
            self.nodes.look()
            self._take_back()
            if self.queue:
                return
            if time.monotonic() >= deadline:
                break
            time.sleep(0.1)
        else:
            self.aside = []
            return
        if not self.nodes.cpus:
            raise self.nodes.none_for(f"the {len(self.aside)} jobs that are left")
        yield from (_failed(task.job, self._too_big(task)) for task in self.aside)
        self.aside = []

    def _collect(self) -> Iterator[JobReport]:
        ready, _ = self.ray.wait(list(self.flying), num_returns=1, timeout=_TICK_SECONDS)
        if ready:
            ready, _ = self.ray.wait(list(self.flying), num_returns=len(self.flying), timeout=0)
        else:
            self._recall_stranded()
        for reference in ready:
            yield from self._land(self.flying.pop(reference), reference)

    def _recall_stranded(self) -> None:
        """Set aside what waits in Ray for a node that is gone; Ray itself would wait for ever."""
        self.nodes.look()
        for reference, task in [item for item in self.flying.items() if not self.nodes.hold(item[1].memory)]:
            self.ray.cancel(reference, force=True)
            del self.flying[reference]
            self._set_aside(task)

    def _land(self, task: _Task, reference: Any) -> Iterator[JobReport]:
        """Yield a finished task's report, or count its death and put it back, or give it up."""
        errors = self.ray.exceptions
        try:
            report, named = self.ray.get(reference), task.job.others
            others = tuple(replace(one, store=job.store) for one, job in zip(report.others, named, strict=False))
            yield replace(report, store=task.job.store, others=others)
            return
        except errors.OutOfMemoryError:
            kind = "memory"
        except (errors.NodeDiedError, errors.LocalRayletDiedError):
            kind = "node"
        except (errors.RayTaskError, errors.RuntimeEnvSetupError) as error:
            # Faults of tensors come back in reports: this one is of the node, and would meet the others too.
            reason = str(error).strip().splitlines()[-1]
            text = (
                f"{task.job.name}: a node cannot run jobs: {reason}; "
                f"is bincompress {__version__} installed on every node?"
            )
            yield _failed(task.job, text, fatal=True)
            return
        except errors.RayError:
            kind = "worker"
        self.deaths[task.key, kind] += 1
        count = self.deaths[task.key, kind]
        text = f"{task.job.name}: {_DEATHS[kind]} ({count} of at most {_MOST_DEATHS[kind]} times)"
        if count >= _MOST_DEATHS[kind]:
            advice = "is the job too large for its node? --memory-per-job claims more for each"
            yield _failed(task.job, f"{text}; it claimed {task.memory / 1e6:,.0f} MB: {advice}")
            return
        self.on_event(JobEvent("lost", task.job.store, task.job.name, detail=text))
        if kind == "memory":
            task = replace(task, memory=min(2 * task.memory, max(task.memory, self.nodes.largest_memory)))
        self.queue.appendleft(replace(task, job=task.job.handed_out_again()))


def _failed(job: Job, error: str, fatal: bool = False) -> JobReport:
    return failed_report(job, error, fatal=fatal)
