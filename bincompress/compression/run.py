"""From checkpoints to finished stores: plan, begin or continue, run the jobs, write the manifests."""

import contextlib
import errno
import uuid
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from bincompress.compression.job import largest_first, of_one_tensor
from bincompress.compression.plan import Plan
from bincompress.compression.records import Job, JobReport
from bincompress.compression.runner import run_local
from bincompress.errors import StoreError
from bincompress.process.faults import explain
from bincompress.store.lock import exclusive
from bincompress.store.store import Store, begin_store, check_begin

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
    return compress_all({store: plan}, runner=runner, overwrite=overwrite, on_report=on_report)[store]


def compress_all(
    plans: Mapping[str, Plan],
    *,
    runner: Runner = run_local,
    overwrite: bool = False,
    on_report: Callable[[JobReport], None] = lambda report: None,
) -> dict[str, Outcome]:
    """Do several plans, each into its store, as `compress` does one: a single queue, the largest matrices first.

    A tensor that several of them read is read once.
    """
    run_id = uuid.uuid4().hex
    with contextlib.ExitStack() as held:
        for store in plans:
            held.enter_context(exclusive(store))
        for store, plan in plans.items():  # before any is changed
            _refused(store, plan, overwrite)
        opened = {store: _begin(plan, store, run_id, overwrite) for store, plan in plans.items()}
        every = largest_first(job for store, plan in plans.items() for job in make_jobs(plan, store, run_id))
        jobs = of_one_tensor(every)
        counts: dict[str, Counter[str]] = {store: Counter() for store in plans}
        failures: dict[str, dict[str, str]] = {store: {} for store in plans}
        # Closed at the end, whatever happens: a runner stops its workers then.
        with contextlib.closing(runner(jobs)) as reports:
            for report in chain.from_iterable(found.each() for found in reports):
                if report.fatal:
                    complete = sum(count["done"] + count["unchanged"] for count in counts.values())
                    raise StoreError(
                        f"{report.error}; {complete} of {len(every)} tensors are complete: "
                        "fix the cause and run the same command again to resume"
                    )
                counts[report.store][report.status] += 1
                if report.status == "failed":
                    failures[report.store][report.name] = report.error
                on_report(report)
        outcomes = {}
        for store, failed in failures.items():
            causes = {name: error.splitlines()[-1] for name, error in sorted(failed.items())}
            finished = opened[store].finish(causes)
            outcomes[store] = Outcome(counts[store]["done"], counts[store]["unchanged"], failed, finished)
    return outcomes


def make_jobs(plan: Plan, store: str, run_id: str) -> list[Job]:
    """Return a job per tensor, the largest first."""
    jobs = [
        Job(
            store,
            t.source.name,
            t.source,
            t.settings,
            t.kept,
            plan.archive,
            run_id,
            t.peak_memory,
            t.kind == "other",
            plan.statistics if t.inputs_hash else "",
            t.inputs_hash,
            t.shared,
            t.fallback,
        )
        for t in plan.tensors
    ]
    return largest_first(jobs)


def _refused(store: str, plan: Plan, overwrite: bool) -> None:
    try:
        check_begin(store, plan.record(), overwrite)
    except OSError as error:
        raise StoreError(f"{store}: cannot be read: {_cause(error)}") from None


def _begin(plan: Plan, store: str, run_id: str, overwrite: bool) -> Store:
    try:
        return begin_store(store, plan.record(), plan.checkpoint.assets(), run_id, overwrite)
    except OSError as error:
        raise StoreError(f"{store}: cannot be written: {_cause(error)}") from None


def _cause(error: OSError) -> str:
    known = explain(error) if error.strerror is None or error.errno not in errno.errorcode else None
    return known or f"{error.strerror or error}" + (" (free some space)" if error.errno == errno.ENOSPC else "")
