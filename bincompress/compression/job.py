"""What is done with one tensor, wherever it runs: read, prepare, binarize, write, report."""

import functools
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal

from bincompress.compression.fingerprint import fingerprint
from bincompress.compression.prepare import prepare
from bincompress.compression.records import Job, JobReport, failed_report
from bincompress.compression.tensor_report import tensor_report
from bincompress.errors import BincompressError, LossError
from bincompress.methods import KEEP, Made
from bincompress.process.faults import explain, stops_everything
from bincompress.sources.checkpoint import read_weight
from bincompress.store.report import report_problem
from bincompress.store.store import Store, open_to_write
from bincompress.tensors.weight import TensorSource, Weight


def largest_first(jobs: Iterable[Job]) -> list[Job]:
    """Return jobs in the order in which they are begun, so that workers finish together."""
    return sorted(jobs, key=lambda job: (-job.source.nbytes, job.name, job.store))


def of_one_tensor(jobs: Iterable[Job]) -> list[Job]:
    """Return jobs in their order, those of one tensor for several stores as one, which reads it once."""
    found: dict[TensorSource, list[Job]] = {}
    for job in jobs:
        found.setdefault(job.source, []).append(job)
    return [
        replace(first, others=tuple(others), peak_memory=max(job.peak_memory for job in (first, *others)))
        for first, *others in found.values()
    ]


def run_job(job: Job) -> JobReport:
    """Do a job and its others; whatever goes wrong with a tensor comes back in the report."""
    read = functools.lru_cache(maxsize=1)(lambda: read_weight(job.source))
    report = _run(job, read)
    return replace(report, others=tuple(_run(other, read) for other in job.others))


def _run(job: Job, read: Callable[[], Weight]) -> JobReport:
    begin = time.perf_counter()
    try:
        status, report = _done(job, read)
    except BincompressError as error:
        return failed_report(job, str(error), time.perf_counter() - begin)
    except MemoryError:
        text = f"{job.name}: not enough memory; `--dry-run` shows what a job needs"
        return failed_report(job, text, time.perf_counter() - begin)
    except Exception as error:  # a fault of the program must not lose the other tensors: it is reported with its place
        known = (error.strerror if isinstance(error, OSError) else None) or explain(error)
        text = f"{job.name}: {job.store}: {known}" if known else f"{job.name}: {traceback.format_exc().strip()}"
        return failed_report(job, text, time.perf_counter() - begin, fatal=bool(known) and stops_everything(error))
    seconds = time.perf_counter() - begin
    return JobReport(job.name, status, seconds, job.source.nbytes, report, store=job.store)


def _done(job: Job, read: Callable[[], Weight]) -> tuple[Literal["done", "unchanged"], dict[str, Any]]:
    """Do a job that is not done already; returns whether this run did it, and the tensor's report."""
    begin = time.perf_counter()
    store = _opened(job.store, job.run_id)
    weight = read()
    mark = fingerprint(job, weight)
    before = store.look_at(job.name)
    if (
        before.get("status") == "complete"
        and before.get("fingerprint") == mark
        and not report_problem(before.get("report"))
    ):
        told_by_log = job.again and store.read_log(job.name).get("run_id") == job.run_id
        return "done" if told_by_log else "unchanged", before["report"]
    written: Weight | Made
    if job.settings == KEEP:
        written = plain = prepare(job, weight, mark).as_it_is()
        bad = store.check_plain(job.name, plain, job.source.shape, refuse=job.required)
        hashes, nbytes = store.write_plain(job.name, plain, job.source.shape, job.archive)
        attributes: dict[str, Any] = {"dtype": plain.dtype_name}
    else:
        job, found = binarized_or_fallback(job, weight, mark)
        written, bad = found, ""
        hashes, nbytes = store.write_packed(job.name, found.tensor, job.archive)
        record = {"shape": list(job.source.shape), "method": job.settings.method, "settings": job.settings.record()}
        attributes = {**record, **found.tensor.attributes()}
    report = tensor_report(job, weight, written, nbytes, bad)
    # Before it is complete: whoever does a complete one again after a lost report finds out by whom it was done.
    store.write_log(job.name, {"seconds": time.perf_counter() - begin, "run_id": job.run_id})
    store.commit(job.name, {**attributes, "hashes": hashes, "fingerprint": mark, "report": report})
    return "done", report


def binarized_or_fallback(job: Job, weight: Weight, mark: dict[str, Any]) -> tuple[Job, Made]:
    """Return what the method makes of the tensor, and the job with the settings that were used in the end.

    mark: the job's fingerprint. Where a method that gives every weight exactly cannot, the job's fallback is used, and
    the report says so; raises LossError where there is none.
    """
    try:
        return job, prepare(job, weight, mark).binarized()
    except LossError as error:
        if job.fallback is None:
            raise LossError(f"{job.name}: {error}") from None
        job, cause = replace(job, settings=job.fallback), str(error)
    found = prepare(job, weight, mark).binarized()
    return job, replace(found, notes={**found.notes, "not_lossless": cause})


@functools.lru_cache(maxsize=4)
def _opened(url: str, run_id: str) -> Store:
    """Open a store once per run and process: its list of tensors does not change within a run."""
    return open_to_write(url, run_id)
