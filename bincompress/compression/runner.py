"""Who does the jobs? This process, or a few beside it; reports come back as jobs finish."""

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from bincompress.blas import one_blas_thread
from bincompress.compression.job import run_job
from bincompress.records import Job, JobReport


class Processes:
    """Worker processes: begun when first needed, and kept for every run until the `with` block ends."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._executor: ProcessPoolExecutor | None = None

    def submit(self, work: Callable[[Job], JobReport], job: Job) -> Future[JobReport]:
        """Hand a job to a process."""
        if self._executor is None:
            # A forked child would inherit Zarr's and Numba's threads half alive.
            context = multiprocessing.get_context("spawn")
            # Ctrl-C is this process's to act on: a worker that dies of it may hold the lock of the queue of jobs.
            self._executor = ProcessPoolExecutor(
                self.count, mp_context=context, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)
            )
        return self._executor.submit(work, job)

    def end(self) -> None:
        """Wait for what runs; the next job begins new processes."""
        if self._executor is not None:
            self._executor.shutdown()
        self._executor = None

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *error: object) -> None:
        self.end()


def run_local(
    jobs: Sequence[Job],
    workers: int = 1,
    work: Callable[[Job], JobReport] = run_job,
    processes: Processes | None = None,
) -> Generator[JobReport, None, None]:
    """Run jobs in this process (workers 1) or in so many processes, and yield a report each; work: what a job is.

    A job whose worker process dies is tried once more, alone; if that one dies too, the job has failed. processes: to
    be used and left running, where several runs follow each other.
    """
    if workers == 1:
        for job in jobs:
            with one_blas_thread():  # in the caller's process, which keeps its own setting
                report = work(job)
            yield report
        return
    waiting = list(jobs)
    with contextlib.nullcontext(processes) if processes is not None else Processes(workers) as pool:
        while waiting:
            suspects: list[Job] = []
            rest: list[Job] = []
            yield from _run_pool(waiting, pool, work, suspects, rest)
            for job in suspects:
                died: list[Job] = []
                with Processes(1) as alone:
                    yield from _run_pool([job], alone, work, died, [])
                if died:
                    error = f"{job.name}: its worker process died twice (out of memory?); try fewer --workers"
                    yield JobReport(job.name, "failed", 0.0, 0, error=error, store=job.store)
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
        pool.end()
        suspects.extend(running.values())
        rest.extend(queue[::-1])
    finally:
        for future in running:
            future.cancel()
