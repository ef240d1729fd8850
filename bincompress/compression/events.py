"""What happened to which job, and when? One JSON object a line, for programs that watch a run."""

import contextlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Literal

from bincompress.compression.records import JobReport
from bincompress.errors import BincompressError


@dataclass(frozen=True)
class JobEvent:
    """Something that happened to a job, or to the run where `name` is empty."""

    event: Literal["submitted", "lost", "waiting", "stopping", "done", "unchanged", "failed"]
    store: str = ""
    name: str = ""
    node: str = ""
    seconds: float = 0.0
    bytes_read: int = 0
    detail: str = ""


_LOG = logging.getLogger(__name__)
OnEvent = Callable[[JobEvent], None]


def event_of(report: JobReport) -> JobEvent:
    """Return a finished job's event."""
    return JobEvent(
        report.status, report.store, report.name, report.node, report.seconds, report.bytes_read, report.error
    )


class EventLog:
    """A file to which events are appended as they happen; without a path, nothing is written."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def __enter__(self) -> "EventLog":
        if self.path is not None:
            try:
                # Line by line, so that a watcher sees each event at once and a killed driver loses none.
                self._file = open(self.path, "a", buffering=1, encoding="utf-8")
            except OSError as error:
                raise BincompressError(f"{self.path}: cannot be written: {error.strerror or error}") from None
        return self

    def write(self, event: JobEvent) -> None:
        """Append one event with the time (seconds since 1970); where that fails, say so once and go on without."""
        if self._file is None:
            return
        try:
            self._file.write(json.dumps({"time": round(time.time(), 3), **asdict(event)}) + "\n")
        except OSError as error:
            _LOG.warning("%s: cannot be written: %s; the run goes on without it", self.path, error.strerror or error)
            self._close()

    def _close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # what could not be written is tried once more
                self._file.close()
        self._file = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
