"""Who does the jobs? This process, or a few beside it; reports come back as jobs finish."""

import multiprocessing
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from bincompress.job import run_job
from bincompress.records import Job, JobReport

_TRIES = 2  # of a job whose worker died


def run_local(jobs: Sequence[Job], workers: int = 1) -> Generator[JobReport, None, None]:
    """Run jobs in this process (workers 1) or in so many processes, and yield a report each."""
    if workers == 1:
        yield from map(run_job, jobs)
        return
    waiting = list(jobs)
    tries: dict[str, int] = {}
    while waiting:
        broken: list[Job] = []
        yield from _run_pool(waiting, workers, broken)
        waiting = []
        for job in broken:
            tries[job.name] = tries.get(job.name, 0) + 1
            if tries[job.name] < _TRIES:
                waiting.append(job)
            else:
                error = f"{job.name}: its worker process died {_TRIES} times (out of memory?); try fewer --workers"
                yield JobReport(job.name, "failed", 0.0, 0, error=error)
        # What broke a pool is tried again alone, so that it takes nobody with it.
        workers = 1 if broken else workers


def _run_pool(jobs: Sequence[Job], workers: int, broken: list[Job]) -> Generator[JobReport, None, None]:
    """Run jobs in a pool until all are done or a worker dies; then `broken` holds the jobs without a report."""
    # A forked child would inherit Zarr's and Numba's threads half alive.
    context = multiprocessing.get_context("spawn")
    queue = list(jobs)[::-1]
    running: dict[Future[JobReport], Job] = {}
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        try:
            while queue or running:
                while queue and len(running) < 2 * workers:
                    job = queue.pop()
                    try:
                        running[pool.submit(run_job, job)] = job
                    except BrokenProcessPool:
                        queue.append(job)
                        break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    report = future.result()
                    del running[future]
                    yield report
        except BrokenProcessPool:
            broken.extend([*running.values(), *queue])
        finally:
            for future in running:
                future.cancel()
