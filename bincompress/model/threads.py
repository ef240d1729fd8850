"""Ranges of work over an exact number of threads; kernels release the GIL meanwhile."""

from collections.abc import Callable
from functools import partial

from cpu_kernels.products import Workers

Task = Callable[[int, int, int], object]  # start, stop, number of the range


def over_ranges(workers: Workers, task: Task, items: int, at_least: int = 1) -> None:
    """Call task(start, stop, number) over 0..items in at most one range per thread, each of `at_least` items."""
    parts = max(1, min(workers.threads, items // max(1, at_least)))
    if parts == 1:
        task(0, items, 0)
        return
    bounds = [items * part // parts for part in range(parts + 1)]
    workers.run([partial(task, bounds[part], bounds[part + 1], part) for part in range(parts)])
