"""Threads that share the work of one call: Python functions, or a kernel's items without a return to Python."""

import functools
import itertools
import os
import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.jit import compiler
from cpu_kernels.jit.addresses import NATIVE_CALLS, address
from cpu_kernels.jit.compiler import Kernel
from cpu_kernels.parallel import spin_wait

Done = queue.SimpleQueue[BaseException | None]


class Workers:
    """A pool of `threads` threads, of which the caller's is one: `threads - 1` are started, and end with close().

    Jobs of several threads run one after the other. A process that is forked starts threads of its own when it has a
    job, and a call that an interrupt ended early disturbs no later one.
    """

    def __init__(self, threads: int) -> None:
        if threads < 1:
            raise ValueError(f"threads: {threads}; expected at least 1")
        self.threads = threads
        self._tasks: list[queue.SimpleQueue[tuple[Callable[[], object], Done] | None]] = []
        # Whoever uses `scratch` in several jobs holds this meanwhile; jobs take it, too.
        self.lock = threading.RLock()
        self.busy = False  # for the holder of the lock, who may be called again in its own thread
        self.scratch: dict[Any, Any] = {}  # what kernels keep between jobs, used by one job at a time
        # Workers that wait in native code; all others wait in their queue of tasks.
        self._slots = np.full((threads - 1) * spin_wait.SLOT_WORDS, spin_wait.PARKED, np.int64)
        self._job = np.zeros(spin_wait.job_words(threads), np.int64)
        self._waiting = False  # some may be waiting in native code
        self._parked = True  # some may not be
        self._unsettled = False  # a run was left before all of its tasks had ended
        # The threads know nothing of this object, so that they end with it.
        self._end = weakref.finalize(self, _end, self._tasks)
        self._start()
        _ALL.add(self)

    def _start(self) -> None:
        for number in range(len(self._tasks), self.threads - 1):
            tasks: queue.SimpleQueue[tuple[Callable[[], object], Done] | None] = queue.SimpleQueue()
            arguments = number, tasks, self._slots, self._job
            threading.Thread(target=_serve, args=arguments, name=f"product-{number + 1}", daemon=True).start()
            self._tasks.append(tasks)

    def after_fork(self) -> None:
        """Forget, in a process that has just been forked, the threads of its parent and the locks that they held."""
        self.lock = threading.RLock()
        self._tasks.clear()
        self._slots.fill(spin_wait.PARKED)
        self._waiting, self._parked, self._unsettled, self.busy = False, True, False, False

    def run(self, tasks: Sequence[Callable[[], object]]) -> None:
        """Run at most `threads` tasks, the first in the calling thread, and return when all have ended."""
        if len(tasks) > self.threads:
            raise ValueError(f"{len(tasks)} tasks for {self.threads} threads")
        with self.lock:
            self._start()
            if self._waiting:
                spin_wait.stop_workers(self._slots)
                self._waiting, self._parked = False, True
            self.settle()
            self._unsettled = True
            done: Done = queue.SimpleQueue()
            # Queues, not a Future per task: 24 microseconds for a round trip, about 50 fewer than an executor.
            for target, task in zip(self._tasks, tasks[1:], strict=False):
                target.put((task, done))
            failed: BaseException | None = None
            try:
                tasks[0]()
            finally:
                for _ in tasks[1:]:
                    failed = done.get() or failed
            self._unsettled = False
            if failed is not None:
                raise failed

    def claim(self) -> None:
        """Prepare for jobs that share `scratch`, with the lock held; raises RuntimeError in the midst of such jobs.

        The lock does not keep a thread from calling again what it is in, as a signal handler may.
        """
        if self.busy:
            raise RuntimeError("called again, by the same thread, from within a call (from a signal handler?)")
        self.settle()

    def settle(self) -> None:
        """Wait for tasks of an earlier run whose caller did not: an interrupt may come at any moment of a run."""
        if self._unsettled:
            done: Done = queue.SimpleQueue()
            for target in self._tasks:
                target.put((_nothing, done))
            for _ in self._tasks:
                done.get()
            self._unsettled = False

    def run_kernel(
        self, kernel: "Kernel | Callable[[int, int, int], object]", blocks: int, step: int, items: int
    ) -> None:
        """Share items 0 .. items - 1 of a kernel's work among the threads, of which thread k is given block k.

        `blocks` is the address of the first of them and `step` the bytes to the next; the kernel takes (address of
        its block, first item, item after the last), and must not raise. A Python function will do in its place where
        there are no NATIVE_CALLS.
        """
        if not NATIVE_CALLS and self.threads > 1:
            edges = itertools.pairwise(items * k // self.threads for k in range(self.threads + 1))
            self.run([functools.partial(kernel, blocks + k * step, *edge) for k, edge in enumerate(edges)])
            return
        with self.lock:
            if self.threads == 1:
                kernel(blocks, 0, items)
                return
            assert isinstance(kernel, Kernel)
            self.settle()
            function = address(kernel)
            if self._parked:
                self._wake()
            parked = spin_wait.run_shared(self._slots, self._job, function, blocks, step, items)
            self._parked = parked > 0

    def _wake(self) -> None:
        spin_wait.compile_all()  # here, so that no worker keeps a job waiting meanwhile
        self._start()
        for number, tasks in enumerate(self._tasks):
            place = number * spin_wait.SLOT_WORDS
            if self._slots[place] == spin_wait.PARKED:
                self._slots[place] = spin_wait.IDLE
                tasks.put((_wait_for_jobs, _NOBODY))
        self._waiting = True

    def close(self) -> None:
        """End the threads."""
        self._end()
        self._tasks.clear()
        self._slots = self._slots[:0]
        self.threads = 1

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _serve(
    number: int,
    tasks: "queue.SimpleQueue[tuple[Callable[[], object], Done] | None]",
    slots: NDArray[np.int64],
    job: NDArray[np.int64],
) -> None:
    while (found := tasks.get()) is not None:
        task, done = found
        del found
        if task is _wait_for_jobs:
            spin_wait.work(slots, job, number)
            continue
        failed: BaseException | None = None
        try:
            task()
        except BaseException as error:
            failed = error
        del task  # which would keep what it worked on, a whole model perhaps, until the next one comes
        done.put(failed)
        del failed, done


def _end(threads: "list[queue.SimpleQueue[tuple[Callable[[], object], Done] | None]]") -> None:
    for tasks in threads:
        tasks.put(None)


def _wait_for_jobs() -> None:
    """Stand in a worker's queue for waiting in native code."""


def _nothing() -> None:
    """Stand in a worker's queue behind what it still has to do."""


_NOBODY: Done = queue.SimpleQueue()  # waits for the end of _wait_for_jobs
_ALL: "weakref.WeakSet[Workers]" = weakref.WeakSet()


def _after_fork() -> None:
    for workers in list(_ALL):
        workers.after_fork()
    compiler.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


Pool = Workers | ThreadPoolExecutor


def share(work: Callable[[int, int], object], first: int, last: int, pool: Pool | None) -> None:
    """Call work(start, end) on about equal parts of [first, last), one per thread of the pool."""
    threads = 1 if pool is None else pool.threads if isinstance(pool, Workers) else pool._max_workers
    parts = min(threads, last - first)
    if parts <= 1 or pool is None:
        work(first, last)
        return
    edges = [first + (last - first) * k // parts for k in range(parts + 1)]
    if isinstance(pool, Workers):
        pool.run([lambda start=start, end=end: work(start, end) for start, end in itertools.pairwise(edges)])  # type: ignore[misc]
        return
    # The calling thread only waits, so that exactly the executor's threads work.
    waiting: list[Future[object]] = [pool.submit(work, start, end) for start, end in itertools.pairwise(edges)]
    for future in waiting:
        future.result()
