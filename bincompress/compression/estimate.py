"""How long will a plan take? From a rate given, or from jobs on small random matrices, timed on this machine."""

import math
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bincompress.compression.job import run_job
from bincompress.compression.plan import PlannedTensor
from bincompress.compression.records import Job
from bincompress.errors import TensorError
from bincompress.methods import KEEP, Settings, method_named
from bincompress.sources.checkpoint import ITEM_BYTES
from bincompress.store.store import begin_store
from bincompress.tensors.weight import TensorSource

_SAMPLE_WEIGHTS = (1 << 18, 1 << 21)  # two sizes part what a job costs from what a weight costs
_SAMPLE_COLS = 1024  # where error compensation is timed
_REPEATS = 3
_ENOUGH_SECONDS = 0.5
_HOUR = 3600.0


@dataclass(frozen=True)
class Estimate:
    """What a plan costs on cores like the one that was measured."""

    jobs: int
    source_bytes: int
    core_seconds: float
    longest_job_seconds: float
    measured: bool  # here, on random weights in files that the disk cache holds; else the rate was given

    @property
    def core_hours(self) -> float:
        """Hours that one core needs."""
        return self.core_seconds / _HOUR

    @property
    def cores_for_an_hour(self) -> int:
        """Cores that finish within an hour; 0 where the longest job alone takes longer."""
        return 0 if self.longest_job_seconds > _HOUR else max(1, math.ceil(self.core_hours))

    def record(self) -> dict[str, Any]:
        """Return the estimate as JSON."""
        return {**asdict(self), "core_hours": self.core_hours, "cores_for_an_hour": self.cores_for_an_hour}

    def line(self) -> str:
        """Return the estimate as a line of text."""
        rate = self.source_bytes / max(self.core_seconds, 1e-9) / 1e6
        source = "measured here" if self.measured else "given"
        finish = (
            f"{self.cores_for_an_hour} core{'s' if self.cores_for_an_hour > 1 else ''} like it finish in an hour"
            if self.cores_for_an_hour
            else "no number of cores finishes in an hour"
        )
        return (
            f"{self.jobs:,} jobs, {self.core_hours:.3g} core-hours at {rate:,.0f} MB/s a core ({source}), "
            f"the longest job {self.longest_job_seconds:.3g} s; {finish}"
        )


def estimate(tensors: Iterable[PlannedTensor], rate: float | None = None) -> Estimate:
    """Return what these tensors cost; rate: bytes of the source that a core does in a second, None to measure."""
    tensors = list(tensors)
    if rate is not None:
        seconds = [tensor.source.nbytes / rate for tensor in tensors]
    else:
        groups: dict[tuple[Settings, str], list[PlannedTensor]] = {}
        for tensor in tensors:
            groups.setdefault((tensor.settings, tensor.source.dtype), []).append(tensor)
        seconds = []
        for (settings, dtype), group in groups.items():
            widest = max(tensor.source.shape[-1] if tensor.source.shape else 1 for tensor in group)
            cols = max(1, min(widest, _SAMPLE_COLS) if settings.calibrated else widest)
            fixed, each = _measured(settings, dtype, cols)
            for tensor in group:
                # With a Hessian a weight costs as much as there are columns that its error is spread over.
                wider = tensor.source.shape[-1] / cols if settings.calibrated else 1.0
                seconds.append(fixed + each * wider * math.prod(tensor.source.shape))
    total = sum(tensor.source.nbytes for tensor in tensors)
    return Estimate(len(tensors), total, sum(seconds), max(seconds, default=0.0), rate is None)


def _measured(settings: Settings, dtype: str, cols: int) -> tuple[float, float]:
    """Return the seconds of a job and of each weight in it: whole jobs, reading and writing included."""
    dtype = dtype if dtype in ITEM_BYTES else "BF16"
    few, many = ((max(1, weights // cols), cols) for weights in _SAMPLE_WEIGHTS)
    with tempfile.TemporaryDirectory() as folder:
        _job_seconds(Path(folder) / "kernels", settings, dtype, few)  # compiles or loads them
        short, long = (_job_seconds(Path(folder) / f"{shape[0]}", settings, dtype, shape) for shape in (few, many))
    each = max(0.0, long - short) / max(1, math.prod(many) - math.prod(few))
    return max(0.0, short - each * math.prod(few)), each


def _job_seconds(folder: Path, settings: Settings, dtype: str, shape: tuple[int, int]) -> float:
    """Return the least seconds of a few equal jobs."""
    folder.mkdir()
    file = folder / "sample"
    _write_sample(file, shape, dtype, settings != KEEP and method_named(settings.method).recognize is not None)
    source = TensorSource("sample.weight", dtype, shape, str(file), 0, file.stat().st_size)
    statistics = _sample_statistics(folder, shape[1]) if settings.calibrated else ""
    kind = "plain" if settings == KEEP else "packed"
    times: list[float] = []
    while len(times) < _REPEATS and sum(times) < _ENOUGH_SECONDS:
        store = f"{folder}/store-{len(times)}"
        begin_store(store, {"tensors": {source.name: kind}}, {}, "", overwrite=False)
        begin = time.perf_counter()
        report = run_job(Job(store, source.name, source, settings, statistics=statistics))
        times.append(time.perf_counter() - begin)
        if report.status != "done":
            raise TensorError(f"these settings cannot be timed here: {report.error}; give --rate")
    return min(times)


def _sample_statistics(folder: Path, cols: int) -> str:
    """Write statistics of inputs that never were, for the sample, and return their place."""
    from bincompress.calibration.statistics import begin_statistics

    url = str(folder / "statistics")
    x = np.random.default_rng(0).standard_normal((2 * cols, cols), np.float32)
    found = begin_statistics(url, {"inputs": {"sample.weight": "sample.weight"}}, overwrite=False)
    arrays = {"hessian": x.T @ x / np.float32(len(x)), "absmax": np.abs(x).max(axis=0)}
    found.write("sample.weight", ["sample.weight"], len(x), arrays)
    found.finish()
    return url


def _write_sample(path: Path, shape: tuple[int, int], dtype: str, few_levels: bool) -> None:
    values = np.random.default_rng(0).standard_normal(shape, np.float32) * np.float32(0.02)
    if few_levels:
        values = np.rint(values * np.float32(50)).clip(-1, 1)
    if dtype == "BF16":
        (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16).tofile(path)
    else:
        values.astype(np.float16 if dtype == "F16" else np.float32).tofile(path)
