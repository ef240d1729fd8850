"""How far is a run? Counts kept from a runner's events and reports, for whoever watches."""

from collections.abc import Callable
from dataclasses import dataclass

from bincompress.compression.events import EventLog, JobEvent, event_of
from bincompress.compression.records import JobReport


@dataclass(frozen=True)
class Progress:
    """A moment of a run, for a progress callback."""

    task: str  # "compress", "try settings"
    bytes_done: int
    bytes_total: int  # of the source
    done: int  # tensors
    failed: int
    total: int
    running: int | None = None  # where the runner tells
    stage: str = ""  # what is done between jobs, such as collecting statistics
    report: JobReport | None = None  # of the tensor that has just finished
    message: str = ""  # something that the user should see


OnProgress = Callable[[Progress], None]


def ignore(progress: Progress) -> None:
    """Take no notice."""


class Tracker:
    """Keeps the counts of one run, writes its event log and tells a callback."""

    def __init__(self, task: str, bytes_total: int, total: int, tell: OnProgress, log: EventLog | None = None) -> None:
        self._task, self._bytes_total, self._total = task, bytes_total, total
        self._tell, self._log = tell, log
        self._bytes_done = self._done = self._failed = 0
        self._running: int | None = None
        self._stage = ""
        self._told()

    def on_event(self, event: JobEvent) -> None:
        """Take note of what a runner tells beside its reports."""
        if self._log is not None:
            self._log.write(event)
        running = self._running or 0
        if event.event == "submitted":
            self._running = running + 1
            self._told()
            return
        if event.event == "lost":
            self._running = max(0, running - 1)
        self._told(message=event.detail)

    def on_report(self, report: JobReport) -> None:
        """Take note of a finished job."""
        if self._log is not None:
            self._log.write(event_of(report))
        if self._running is not None and not report.follows:
            self._running = max(0, self._running - 1)
        self._done += report.status != "failed"
        self._failed += report.status == "failed"
        self._bytes_done += report.bytes_read
        self._told(report=report)

    def on_stage(self, stage: str) -> None:
        """Take note of what is done between jobs; empty where jobs run again."""
        self._stage = stage
        self._told()

    def _told(self, report: JobReport | None = None, message: str = "") -> None:
        self._tell(
            Progress(
                self._task, self._bytes_done, self._bytes_total, self._done, self._failed, self._total, self._running,
                self._stage, report, message,
            )
        )  # fmt: skip
