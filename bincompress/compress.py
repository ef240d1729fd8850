"""From a checkpoint to a finished store: plan, begin or continue, run the jobs, write the manifest."""

import contextlib
import errno
import os
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from bincompress.errors import StoreError
from bincompress.job import make_jobs
from bincompress.plan import Plan
from bincompress.records import Job, JobReport
from bincompress.runner import run_local
from bincompress.store import begin_store, is_local

Runner = Callable[[Sequence[Job]], Generator[JobReport, None, None]]


@dataclass(frozen=True)
class Outcome:
    """What came of a run."""

    done: int
    unchanged: int
    failures: dict[str, str]  # causes by tensor
    complete: bool


def compress(
    plan: Plan,
    store: str,
    *,
    runner: Runner = run_local,
    overwrite: bool = False,
    on_report: Callable[[JobReport], None] = lambda report: None,
) -> Outcome:
    """Do what a plan says into a store (a path or an fsspec URL); what an equal run has completed stays as it is.

    on_report is called as each job finishes. Raises StoreError where another plan or another driver holds the store,
    or where nothing can be written any more; what was complete stays complete.
    """
    run_id = uuid.uuid4().hex
    with _exclusive(store):
        try:
            opened = begin_store(store, plan.record(), plan.checkpoint.assets(), run_id, overwrite)
        except OSError as error:
            raise StoreError(f"{store}: cannot be written: {_cause(error)}") from None
        done = unchanged = 0
        failures: dict[str, str] = {}
        # Closed at the end, whatever happens: a runner stops its workers then.
        with contextlib.closing(runner(make_jobs(plan, store, run_id))) as reports:
            for report in reports:
                if report.fatal:
                    raise StoreError(
                        f"{report.error}; {done + unchanged} of {len(plan.tensors)} tensors are complete: "
                        "mend the cause and run the same command again to go on from there"
                    )
                done += report.status == "done"
                unchanged += report.status == "unchanged"
                if report.status == "failed":
                    failures[report.name] = report.error
                on_report(report)
        complete = opened.finish({name: error.splitlines()[-1] for name, error in sorted(failures.items())})
    return Outcome(done, unchanged, failures, complete)


def _cause(error: OSError) -> str:
    return f"{error.strerror or error}" + (" (free some space)" if error.errno == errno.ENOSPC else "")


@contextlib.contextmanager
def _exclusive(store: str) -> Iterator[None]:
    """Hold a local store for this process alone; object stores are guarded at commit instead."""
    if not is_local(store):
        yield
        return
    path = Path(store)
    beside = path.parent / f".{path.name}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(beside, timeout=0)
        lock.acquire()
    except Timeout:
        raise StoreError(
            f"{store}: another bincompress is writing to it; wait for it to end, or use another store"
        ) from None
    except OSError as error:
        raise StoreError(
            f"{store}: cannot be written: {error.strerror or error}; choose a path you can write"
        ) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        lock.release()
