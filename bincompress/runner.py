"""Who does the jobs? This process, or a few beside it; reports come back as jobs finish."""

import multiprocessing
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from bincompress.job import run_job
from bincompress.records import Job, JobReport


def run_local(
    jobs: Sequence[Job], workers: int = 1, work: Callable[[Job], JobReport] = run_job
) -> Generator[JobReport, None, None]:
    """Run jobs in this process (workers 1) or in so many processes, and yield a report each; work: what a job is.

    A job whose worker process dies is tried once more, alone; if that one dies too, the job has failed.
    """
    if workers == 1:
        yield from map(work, jobs)
        return
    waiting = list(jobs)
    while waiting:
        suspects: list[Job] = []
        rest: list[Job] = []
        yield from _run_pool(waiting, workers, work, suspects, rest)
        for job in suspects:
            died: list[Job] = []
            yield from _run_pool([job], 1, work, died, [])
            if died:
                error = f"{job.name}: its worker process died twice (out of memory?); try fewer --workers"
                yield JobReport(job.name, "failed", 0.0, 0, error=error, store=job.store)
        waiting = rest


def _run_pool(
    jobs: Sequence[Job], workers: int, work: Callable[[Job], JobReport], suspects: list[Job], rest: list[Job]
) -> Generator[JobReport, None, None]:
    """Run jobs in a pool until all are done or a worker dies: then `suspects` had begun and `rest` had not."""
    # A forked child would inherit Zarr's and Numba's threads half alive.
    context = multiprocessing.get_context("spawn")
    queue = list(jobs)[::-1]
    running: dict[Future[JobReport], Job] = {}
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        try:
            while queue or running:
                while queue and len(running) < workers + 1:  # one more than can run, so that no worker waits
                    running[pool.submit(work, queue[-1])] = queue[-1]
                    queue.pop()
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    report = future.result()
                    del running[future]
                    yield report
        except BrokenProcessPool:
            suspects.extend(running.values())
            rest.extend(queue[::-1])
        finally:
            for future in running:
                future.cancel()
