"""Who does the jobs? This process, or a few beside it; reports come back as jobs finish."""

import contextlib
import multiprocessing
import signal
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from importlib.machinery import ModuleSpec
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from types import TracebackType

from bincompress.compression.events import JobEvent, OnEvent
from bincompress.compression.job import run_job
from bincompress.compression.records import Job, JobReport, failed_report
from bincompress.errors import BincompressError
from bincompress.process.blas import one_blas_thread
from bincompress.process.interrupts import end_with, termination_came


class Processes:
    """Worker processes: begun when first needed, and kept for every run until the `with` block ends.

    They end with this process, however it ends. When the block is left by an interrupt, the jobs that run are
    finished; another interrupt, or a request to terminate, ends them at once.
    """

    def __init__(self, count: int, on_event: OnEvent = lambda event: None) -> None:
        self.count = count
        self.on_event = on_event
        self._executor: ProcessPoolExecutor | None = None
        self._first: Future[None] | None = None
        self._running: set[Future[JobReport]] = set()

    def submit(self, work: Callable[[Job], JobReport], job: Job) -> Future[JobReport]:
        """Hand a job to a process."""
        with _main_left_out(work):
            if self._executor is None:
                # A forked child would inherit Zarr's and Numba's threads half alive.
                context = multiprocessing.get_context("spawn")
                self._executor = ProcessPoolExecutor(self.count, mp_context=context, initializer=_begin)
                self._first = self._executor.submit(_nothing)
            future = self._executor.submit(work, job)
        self._running.add(future)
        future.add_done_callback(self._running.discard)
        return future

    def check_started(self) -> None:
        """Raise BincompressError where no process has come so far as to do a job, which then is no job's fault."""
        if self._first is not None and self._first.done() and self._first.exception() is not None:
            raise BincompressError(
                "the worker processes end as soon as they begin; --workers 1 does without them (is there enough "
                "memory? are more processes allowed?)"
            )

    def end(self, interrupted: bool = False) -> None:
        """Wait for what runs; the next job begins new processes."""
        executor, self._executor = self._executor, None
        if executor is None:
            return
        processes = list((executor._processes or {}).values())
        manager = getattr(executor, "_executor_manager_thread", None)
        try:
            if termination_came():
                raise KeyboardInterrupt
            if interrupted and self._running:
                left = f"{min(self.count, len(self._running))} jobs that run are finished"
                self.on_event(JobEvent("stopping", detail=f"{left}; interrupt again to end at once"))
            executor.shutdown(wait=False, cancel_futures=True)
            _wait_for_end(processes)
        except KeyboardInterrupt:
            for process in processes:
                process.kill()
            executor.shutdown(wait=False)
            _wait_for_end(processes)
            if not termination_came():
                raise
        finally:
            if manager is not None:
                manager.join()

    def __enter__(self) -> "Processes":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(kind is not None and issubclass(kind, KeyboardInterrupt | GeneratorExit))


def _wait_for_end(processes: Sequence[BaseProcess]) -> None:
    """Wait until all of these have ended; an interrupt ends the waiting and does no other harm.

    Joining the pool's thread instead would: interrupted there, Python 3.11 takes the thread for ended, and closes what
    it still reads.
    """
    left = {process.sentinel for process in processes}
    while left:
        left -= set(connection.wait(list(left)))


def _begin() -> None:
    """Prepare a worker process."""
    # Ctrl-C is the parent's to act on: a worker that dies of it may hold the lock of the queue of jobs.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with(multiprocessing.parent_process())


def _nothing() -> None:
    """Show that a process has begun."""


@contextlib.contextmanager
def _main_left_out(work: Callable[[Job], JobReport]) -> Iterator[None]:
    """Keep new processes from running the caller's script again, as they do to find functions that it defines.

    A script that compresses without asking for `__name__ == "__main__"` would begin everything anew in each of them.
    """
    main = sys.modules["__main__"]
    if getattr(getattr(work, "func", work), "__module__", "") == "__main__":
        yield
        return
    spec = main.__spec__
    # multiprocessing leaves out what was begun by `python -m package`, and looks at nothing but this to know.
    main.__spec__ = ModuleSpec("bincompress.__main__", None)
    try:
        yield
    finally:
        main.__spec__ = spec


def run_local(
    jobs: Sequence[Job],
    workers: int = 1,
    work: Callable[[Job], JobReport] = run_job,
    processes: Processes | None = None,
    on_event: OnEvent = lambda event: None,
) -> Generator[JobReport, None, None]:
    """Run jobs in this process (workers 1) or in so many processes, and yield a report each; work: what a job is.

    A job whose worker process dies is tried once more, alone; if that one dies too, the job has failed. processes: to
    be used and left running, where several runs follow each other. on_event: told what an interrupt waits for.
    """
    if workers == 1:
        for job in jobs:
            with one_blas_thread():  # in the caller's process, which keeps its own setting
                report = work(job)
            yield report
        return
    waiting = list(jobs)
    with contextlib.nullcontext(processes) if processes is not None else Processes(workers, on_event) as pool:
        while waiting:
            suspects: list[Job] = []
            rest: list[Job] = []
            yield from _run_pool(waiting, pool, work, suspects, rest)
            for job in suspects:
                died: list[Job] = []
                with Processes(1) as alone:
                    yield from _run_pool([job.handed_out_again()], alone, work, died, [])
                if died:
                    error = f"{job.name}: its worker process died twice (out of memory?); try fewer --workers"
                    yield failed_report(job, error)
            waiting = rest


def _run_pool(
    jobs: Sequence[Job], pool: Processes, work: Callable[[Job], JobReport], suspects: list[Job], rest: list[Job]
) -> Generator[JobReport, None, None]:
    """Run jobs in a pool until all are done or a worker dies: then `suspects` had begun and `rest` had not."""
    queue = list(jobs)[::-1]
    running: dict[Future[JobReport], Job] = {}
    try:
        while queue or running:
            while queue and len(running) < pool.count + 1:  # one more than can run, so that no worker waits
                running[pool.submit(work, queue[-1])] = queue[-1]
                queue.pop()
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                report = future.result()
                del running[future]
                yield report
    except BrokenProcessPool:
        pool.check_started()
        pool.end()
        suspects.extend(running.values())
        rest.extend(queue[::-1])
    finally:
        for future in running:
            future.cancel()
