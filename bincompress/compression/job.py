"""What is done with one tensor, wherever it runs: read, binarize, write, commit, report."""

import functools
import json
import math
import time
import traceback
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import threadpoolctl
import xxhash
from numpy.typing import NDArray

from bincompress.compression.plan import Plan, settings_record
from bincompress.compression.recipe import KEEP
from bincompress.errors import BincompressError, StoreError, TensorError
from bincompress.faults import explain, stops_everything
from bincompress.methods import METHODS
from bincompress.methods.dbellquant import channel_scale
from bincompress.records import Binarized, Inputs, Job, JobReport, Shared, Weight
from bincompress.sources.checkpoint import read_weight
from bincompress.store.store import Store, is_local, open_store
from bincompress.tensors.float8 import from_float8
from cpu_kernels.quantize.counting import greatest_magnitude

BYTES_VERSION = 3  # raised when a change of the program changes the bytes of a tensor
_SAMPLE = 1 << 14  # weights in a tensor's histogram
_BINS = 100
_FINITE = {"BF16": 0x7F7F, "F16": 0x7BFF, "F32": 0x7F7FFFFF}  # greatest finite magnitude


def make_jobs(plan: Plan, store: str, run_id: str) -> list[Job]:
    """Return a job per tensor, the largest first, so that workers finish together."""
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
            plan.statistics if t.inputs_hash else "",
            t.inputs_hash,
            t.shared,
        )
        for t in plan.tensors
    ]
    return largest_first(jobs)


def largest_first(jobs: Iterable[Job]) -> list[Job]:
    """Return jobs in the order in which they are begun."""
    return sorted(jobs, key=lambda job: (-job.source.nbytes, job.name, job.store))


def run_job(job: Job) -> JobReport:
    """Do a job; whatever goes wrong with its tensor comes back in the report."""
    begin = time.perf_counter()

    def failed(error: str, fatal: bool = False) -> JobReport:
        seconds = time.perf_counter() - begin
        return JobReport(job.name, "failed", seconds, 0, error=error, fatal=fatal, store=job.store)

    try:
        store = _opened(job.store, job.run_id)
        weight = read_weight(job.source)
        digest = xxhash.xxh3_128_hexdigest(weight.flat.view(np.uint8).data)
        fingerprint = _fingerprint(job, digest)
        before = store.node_attributes(job.name)
        if before.get("status") == "complete" and before.get("fingerprint") == fingerprint:
            seconds = time.perf_counter() - begin
            return JobReport(job.name, "unchanged", seconds, job.source.nbytes, before["report"], store=job.store)
        report = _write(store, job, weight, fingerprint)
        seconds = time.perf_counter() - begin
        store.write_log(job.name, {"seconds": seconds})
        return JobReport(job.name, "done", seconds, job.source.nbytes, report, store=job.store)
    except BincompressError as error:
        return failed(str(error))
    except MemoryError:
        return failed(f"{job.name}: not enough memory; `--dry-run` shows what a job needs")
    except OSError as error:
        return failed(f"{job.name}: {job.store}: {error.strerror or explain(error)}", fatal=stops_everything(error))
    except Exception as error:  # a fault of the program must not lose the other tensors: it is reported with its place
        known = explain(error)
        if known is not None:
            return failed(f"{job.name}: {job.store}: {known}", fatal=stops_everything(error))
        return failed(f"{job.name}: {traceback.format_exc().strip()}")


@functools.lru_cache(maxsize=4)
def _opened(url: str, run_id: str) -> Store:
    """Open a store once per run and process: its list of tensors does not change within a run."""
    return open_store(url)


def _write(store: Store, job: Job, weight: Weight, fingerprint: dict[str, Any]) -> dict[str, Any]:
    if job.settings.method == KEEP:
        if job.shared is not None:
            weight = _divided(weight, job)
        hashes, stored = store.write_plain(job.name, weight, job.source.shape, job.archive)
        report = {
            "method": KEEP, "groups": 0, "nominal_bits": 8.0 * weight.bits.nbytes / max(1, weight.bits.size),
            "stored_bits": _rounded(8 * stored / max(1, weight.bits.size)), "stored_bytes": stored,
            "relative_error": 0.0, "squared_error": 0.0, "squared_norm": 0.0, "weights": weight.bits.size,
        }  # fmt: skip
        if job.shared is not None:
            report["transformation"] = f"divided by the scale of {', '.join(m.name for m in job.shared.members)}"
        dtype = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[weight.dtype]
        _commit(store, job, {"dtype": dtype, "hashes": hashes, "fingerprint": fingerprint, "report": report})
        return report
    # A whole matrix is counted anyway, and the count finds what is not finite: a pass over the weights less.
    if job.settings.block != "matrix" or job.settings.method != "wgm":
        check_finite(job.name, weight)
    try:
        found = binarize(weight, job)
    except FloatingPointError:
        check_finite(job.name, weight)
        raise
    hashes, stored = store.write_packed(job.name, found, job.archive)
    report = {**_report(found, job, stored, weight.bits.size), "histogram": sample_histogram(weight)}
    attributes = {
        "shape": list(job.source.shape),
        "method": job.settings.method,
        "settings": settings_record(job.settings),
        "block": found.block,
        "terms": list(found.terms),
        "mix": found.mix,
        "coef_exponent": found.coef_exponent,
        "hashes": hashes,
        "fingerprint": fingerprint,
        "report": report,
    }
    _commit(store, job, attributes)
    return report


def _commit(store: Store, job: Job, attributes: dict[str, Any]) -> None:
    if not is_local(job.store):
        holder = open_store(job.store).attributes.get("run_id")
        if holder != job.run_id:
            raise StoreError(f"{job.name}: another run has taken over {job.store}; wait for it, or use another store")
    store.commit(job.name, attributes)


def _fingerprint(job: Job, content: str) -> dict[str, Any]:
    source = job.source
    return {
        "file": Path(source.file).name,
        "offset": source.offset,
        "nbytes": source.nbytes,
        "dtype": source.dtype,
        "content": content,
        "settings": settings_record(job.settings),
        "kept": xxhash.xxh3_128_hexdigest(json.dumps(job.kept).encode()) if job.kept else "",
        "archive": job.archive,
        "bytes_version": BYTES_VERSION,
        **({"inputs": job.inputs_hash} if job.inputs_hash else {}),
        **({"shared": _shared_record(job.shared)} if job.shared else {}),
    }


def _shared_record(shared: Shared) -> dict[str, Any]:
    """Return what the bytes of a norm and its readers hang on beside the tensor itself."""
    return {"members": list(_contents(shared)), "settings": settings_record(shared.settings)}


def _contents(shared: Shared) -> tuple[str, ...]:
    return tuple(xxhash.xxh3_128_hexdigest(read_weight(member).flat.view(np.uint8).data) for member in shared.members)


def check_finite(name: str, weight: Weight) -> None:
    """Raise TensorError naming the first NaN or infinity of a weight."""
    limit = _FINITE[weight.dtype]
    if greatest_magnitude(weight.flat) <= limit:
        return
    for row in range(weight.shape[0]):
        values = weight.float32(slice(row, row + 1))[0]
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            raise TensorError(
                f"{name}: {values[bad[0]]} at row {row}, column {bad[0]}; expected finite weights "
                "(is the checkpoint damaged? `--keep` leaves a tensor as it is)"
            )


def binarize(weight: Weight, job: Job) -> Binarized:
    """Run the job's method; single weights to keep take no part in it and are listed with their exact values."""
    method = METHODS[job.settings.method]
    inputs = _inputs(job)
    if inputs is None and job.settings.calibrated:  # some methods could do without, and give other planes
        raise TensorError(f"{job.name}: the statistics of its inputs are gone; calibrate again")
    if not job.kept:
        return method(weight, job.settings, inputs)
    rows, cols = (np.array(part) for part in zip(*job.kept, strict=True))
    exact = weight.float32()[rows, cols] if weight.dtype == "F32" else _values(weight, rows, cols)
    stand_in = Weight(weight.bits.copy(), weight.dtype)
    for row, col in job.kept:
        # A neighbour's value in its place leaves the unit's distribution as it would be without it.
        stand_in.bits[row, col] = stand_in.bits[row, col - 1 if col else min(1, weight.shape[1] - 1)]
    found = method(stand_in, job.settings, inputs)
    stood = _values(stand_in, rows, cols).astype(np.float64)
    flat = (rows * weight.shape[1] + cols).astype(np.uint64)
    formula = np.where(np.isin(flat, found.listed_index), 0.0, _formula_at(found, rows, cols))
    index = np.concatenate([flat, found.listed_index[~np.isin(found.listed_index, flat)]])
    value = np.concatenate([exact, np.zeros(index.size - flat.size, np.float32)])
    order = np.argsort(index)
    return replace(
        found,
        listed_index=index[order],
        listed_value=value[order],
        squared_error=max(0.0, found.squared_error - float(np.sum((stood - formula) ** 2))),
        squared_norm=found.squared_norm + float(np.sum(exact.astype(np.float64) ** 2 - stood**2)),
        notes={**found.notes, "kept": len(job.kept)},
    )


def _inputs(job: Job) -> Inputs | None:
    """Read what calibration found of the tensor's inputs; None where its settings do not ask for it."""
    if not job.statistics:
        return None
    from bincompress.calibration.statistics import open_unfinished

    # One thread, whatever the machine has: BLAS sums in another order with more, and a job is one core's work.
    threadpoolctl.threadpool_limits(1, user_api="blas")
    if job.shared is None:
        return open_unfinished(job.statistics).read(job.name)
    scale = _shared_scale(job.shared, _contents(job.shared), job.statistics, job.inputs_hash)
    found = open_unfinished(job.statistics).read(job.shared.members[0].name)
    return replace(found, name=job.name, channel_scale=scale)


@functools.lru_cache(maxsize=512)  # one of every norm: for those of its readers that this process has
def _shared_scale(shared: Shared, contents: tuple[str, ...], statistics: str, inputs_hash: str) -> NDArray[np.float32]:
    """Return the scale of a norm's channels, found from all its readers; contents and inputs_hash tell them apart."""
    from bincompress.calibration.statistics import open_unfinished

    members = [read_weight(member) for member in shared.members]
    for source, weight in zip(shared.members, members, strict=True):
        check_finite(source.name, weight)
    scale = channel_scale(members, open_unfinished(statistics).read(shared.members[0].name), shared.settings)
    scale.flags.writeable = False
    return scale


def _divided(norm: Weight, job: Job) -> Weight:
    """Return a norm's weight divided by the scale that its readers' columns are multiplied by, float32."""
    inputs = _inputs(job)
    assert inputs is not None
    assert inputs.channel_scale is not None
    divided = norm.float32() / inputs.channel_scale
    return Weight(divided.view(np.uint32), "F32")


def _values(weight: Weight, rows: Any, cols: Any) -> Any:
    return Weight(weight.bits[rows, cols][None], weight.dtype).float32()[0]


def _formula_at(found: Binarized, rows: NDArray[np.intp], cols: NDArray[np.intp]) -> NDArray[np.float64]:
    """Return the weights that planes and coefficients give at single places, float64."""
    coef = (
        from_float8(found.coef, found.coef_exponent).astype(np.float64)
        if found.coef.dtype == np.uint8
        else np.ldexp(found.coef.astype(np.float64), found.coef_exponent)
    )
    if found.mix is not None:
        coef = np.einsum("ti,irb->trb", np.array(found.mix), coef)
    coef = np.broadcast_to(coef, (coef.shape[0], found.planes.shape[1], coef.shape[2]))
    values = []
    for row, col in zip(rows, cols, strict=True):
        words = found.planes[:, row, col // 64]
        if found.column_planes.size:
            words = np.concatenate([words, found.column_planes[:, col // 64]])
        bits = words >> np.uint64(col % 64) & np.uint64(1)
        signs = [math.prod(1.0 if bits[p] else -1.0 for p in range(len(bits)) if mask >> p & 1) for mask in found.terms]
        values.append(float(np.dot(signs, coef[:, row, col // found.block])))
    return np.array(values)


def sample_histogram(weight: Weight) -> dict[str, Any]:
    """Return a histogram of evenly spaced weights, for the report: the original is not in the store."""
    sample = np.ascontiguousarray(weight.flat[:: max(1, weight.bits.size // _SAMPLE)])
    values = Weight(sample[None], weight.dtype).float32()[0].astype(np.float64)
    # Single weights far out would leave the bell a spike in the middle.
    reach = min(float(np.max(np.abs(values), initial=0.0)), 6.0 * float(np.std(values))) or 1.0
    counts, _ = np.histogram(values, bins=_BINS, range=(-reach, reach))
    return {"low": _rounded(-reach), "high": _rounded(reach), "counts": counts.tolist()}


def _rounded(value: float) -> float:
    """Return six significant digits, so that the last bit of a sum does not change a store's bytes."""
    return float(f"{value:.6g}")


def _report(found: Binarized, job: Job, stored: int, weights: int) -> dict[str, Any]:
    relative = found.squared_error / found.squared_norm if found.squared_norm else 0.0
    return {
        "method": job.settings.method,
        "groups": found.groups,
        "nominal_bits": _rounded(found.nominal_bits),
        "stored_bits": _rounded(8 * stored / weights),
        "stored_bytes": stored,
        "relative_error": _rounded(relative),
        "squared_error": _rounded(found.squared_error),
        "squared_norm": _rounded(found.squared_norm),
        "weights": weights,
        **found.notes,
    }
