"""Ranges of work over an exact number of threads; kernels release the GIL meanwhile."""

import collections
import threading
from collections.abc import Callable
from functools import partial

from cpu_kernels.parallel.workers import Workers

Task = Callable[[int, int, int], object]  # start, stop, number of the range


def over_ranges(workers: Workers, task: Task, items: int, at_least: int = 1) -> None:
    """Call task(start, stop, number) over 0..items in at most one range per thread, each of `at_least` items."""
    if items < 2 * at_least or workers.threads == 1:  # most calls, of a single token: as little as can be
        task(0, items, 0)
        return
    parts = min(workers.threads, items // at_least)
    bounds = [items * part // parts for part in range(parts + 1)]
    workers.run([partial(task, bounds[part], bounds[part + 1], part) for part in range(parts)])


def in_turn(workers: Workers, task: Callable[[int], object], items: int) -> None:
    """Call task(0) .. task(items - 1), each thread the next one when it is free; after an error none is begun.

    For tasks that differ in length: a thread that another program holds up leaves more of them to the others.
    """
    left = iter(range(items))
    taking = threading.Lock()

    def work() -> None:
        while True:
            with taking:
                number = next(left, None)
            if number is None:
                return
            try:
                task(number)
            except BaseException:
                with taking:
                    collections.deque(left, 0)  # the others find nothing more to do
                raise

    workers.run([work] * min(workers.threads, items))
