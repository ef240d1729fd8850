"""What travels between the driver of a run and its workers: small frozen records, paths and no data."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from bincompress.methods import Settings
from bincompress.tensors.weight import TensorSource


@dataclass(frozen=True)
class Shared:
    """The matrices that read one norm's output, whose columns are scaled alike, and the settings that say how."""

    members: tuple[TensorSource, ...]
    settings: Settings
    norm_offset: float = 0.0  # what the decoder adds to the norm's stored weights


@dataclass(frozen=True)
class Job:
    """One tensor's work: what to read, what to do, where to write. Paths only, so that it can travel."""

    store: str
    name: str
    source: TensorSource
    settings: Settings
    kept: tuple[tuple[int, int], ...] = ()  # single weights kept exactly, (row, column)
    archive: bool = False
    run_id: str = ""
    peak_memory: int = 0  # bytes, as planned; 0: not known
    required: bool = False  # whether the model cannot run with numbers in it that are not finite
    statistics: str = ""  # the store of what calibration found; empty: not needed
    inputs_hash: str = ""  # of what it found of this tensor's inputs
    shared: Shared | None = None  # of a norm and of the matrices that read it, where a transformation is folded into it
    fallback: Settings | None = None  # where `settings` give every weight exactly and that turns out to be impossible
    others: tuple["Job", ...] = ()  # of the same tensor, for other stores: done after this one, which reads it for all
    again: bool = False  # whether this run has handed it out before, and what came of it was lost

    def handed_out_again(self) -> "Job":
        """Return the job as it is handed out after a worker was lost, which may have done it without telling."""
        return replace(self, again=True, others=tuple(other.handed_out_again() for other in self.others))


@dataclass(frozen=True)
class JobReport:
    """What came of a job: small, so that it can travel back."""

    name: str
    status: Literal["done", "unchanged", "failed"]
    seconds: float
    bytes_read: int
    report: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    fatal: bool = False  # the others would fail too: a full disk, a folder that cannot be written
    store: str = ""  # where it belongs: one run may fill several stores
    node: str = ""  # the machine that did it, where there are several
    others: tuple["JobReport", ...] = ()  # of the job's others
    follows: bool = False  # whether it is one of another job's others

    def each(self) -> Iterator["JobReport"]:
        """Yield the report, and those of the job's others."""
        yield replace(self, others=())
        for other in self.others:
            yield replace(other, node=self.node, follows=True)


def failed_report(job: Job, error: str, seconds: float = 0.0, fatal: bool = False) -> JobReport:
    """Return the report of a job that failed."""
    others = tuple(failed_report(other, error, fatal=fatal) for other in job.others)
    return JobReport(job.name, "failed", seconds, 0, error=error, fatal=fatal, store=job.store, others=others)
