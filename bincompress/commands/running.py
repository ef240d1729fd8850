"""How do the verbs run jobs: options that say who does them, and a bar with counts?"""

from __future__ import annotations

import contextlib
import errno
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import click

from bincompress.commands.out_file import OutFile
from bincompress.commands.shared import address_option, byte_bar, kernels_announced

if TYPE_CHECKING:
    from bincompress.api import CompressionResult
    from bincompress.compression.planning import Planned
    from bincompress.compression.progress import OnProgress, Progress
    from bincompress.compression.records import JobReport

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class Size(click.ParamType[int]):
    """A number of bytes, such as 800MB or 4GB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the bytes that a text names."""
        text = str(value).strip().upper()
        number = text.rstrip("BKMGT")
        try:
            found = int(float(number) * _UNITS[text[len(number) :].strip()])
        except (KeyError, ValueError, OverflowError):
            found = -1
        if found < 0:
            self.fail(f"{value!r}: expected a size such as 800MB or 4GB", param, ctx)
        return found


class Rate(Size):
    """Bytes a second, such as 200MB."""

    name = "bytes/s"


_OPTIONS = [
    click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="local: processes."),
    click.option(
        "--runner",
        type=click.Choice(["local", "ray"]),
        default="local",
        show_default=True,
        help="Where jobs run: on this machine or on a Ray cluster.",
    ),
    address_option,
    click.option(
        "--max-in-flight",
        type=click.IntRange(min=1),
        help="ray: most jobs handed to Ray at once.  [default: a few more than cores]",
    ),
    click.option(
        "--memory-per-job", type=Size(), help="ray: memory reserved for each job, such as 4GB.  [default: as planned]"
    ),
    click.option(
        "--events",
        type=OutFile(appends=True),
        help="Append a JSON line to this file for each event of a job.",
    ),
]
_RUN_OPTIONS = [
    click.option("--dry-run", is_flag=True, help="Show what would be done: bytes, memory, core-hours."),
    click.option("--rate", type=Rate(), help="--dry-run: source bytes a second of one core.  [default: measured here]"),
    click.option(
        "--overwrite",
        is_flag=True,
        help="Replace a store made with other settings: it is removed before the new one is written.",
    ),
    click.option("--export-only", is_flag=True, help="Make a store although it will not run here, to export it."),
    click.option("--archive", is_flag=True, help="Compress the arrays with zstd: smaller, slower to load."),
    click.option("--verbose", "-v", is_flag=True, help="A line per tensor."),
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
]
_NAMES = ("workers", "runner", "address", "max_in_flight", "memory_per_job", "events")


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a command that makes stores; those that say who does the jobs come as one `placement`."""

    @functools.wraps(command)
    def gathered(**options: Any) -> Any:
        from bincompress.compression.placement import Placement

        chosen = {name: options.pop(name) for name in _NAMES}
        return command(placement=Placement(**chosen), **options)

    for option in reversed([*_OPTIONS, *_RUN_OPTIONS]):
        gathered = option(gathered)
    return gathered


@contextlib.contextmanager
def run_bar(verbose: bool, quiet: bool) -> Iterator[OnProgress]:
    """Yield a progress callback that draws a bar over bytes for each task, with a line per tensor where `verbose`."""
    bars: dict[str, Any] = {}

    def on_progress(progress: Progress) -> None:
        bar = bars.get(progress.task)
        if bar is None:
            for other in bars.values():
                other.close()
            bar = bars[progress.task] = byte_bar(progress.bytes_total, progress.task, quiet)
        if progress.message:
            _say(bar, progress.message)
        report = progress.report
        if report is not None and (report.status == "failed" or (verbose and "method" in report.report)):
            _say(bar, _line(report))
        bar.set_postfix_str(_counts(progress), refresh=False)
        bar.update(progress.bytes_done - bar.n)
        if progress.stage:
            bar.refresh()

    def say(line: str) -> None:
        shown = [bar for bar in bars.values() if not bar.disable]
        _say(shown[-1], line) if shown else click.echo(line, err=True)

    with kernels_announced(say=say):
        try:
            yield on_progress
        finally:
            for bar in bars.values():
                bar.close()


def say_notes(planned: Planned, store: str = "") -> None:
    """Say what the user should know before the work; store: of which, where there are several."""
    for note in planned.notes:
        click.echo(f"note: {store}: {note}" if store else f"note: {note}", err=True)


def finish(results: Iterable[CompressionResult], quiet: bool) -> None:
    """Show what a run made, unless `quiet`, and exit with 1 where tensors failed."""
    from bincompress.reporting.inspection import totals

    complete = True
    for result in results:
        complete &= result.complete
        if quiet:
            continue
        again = f", {result.unchanged} already complete" if result.unchanged else ""
        failed = f", {len(result.failures)} FAILED" if result.failures else ""
        click.echo(f"{result.store}: {result.done} tensors done{again}{failed}")
        click.echo("\n".join([*totals(result.total), *result.kept, *result.remarks]))
        unrefined = {name: found["refinement"] for name, found in result.tensors.items() if "refinement" in found}
        if unrefined:
            name = min(unrefined)
            click.echo(f"not refined: {len(unrefined)} tensors, such as {name} ({unrefined[name]})")
    if not complete:
        sys.exit(1)


def _counts(progress: Progress) -> str:
    parts = [progress.stage] if progress.stage else []
    parts += [] if progress.running is None else [f"{progress.running} running"]
    parts += [f"{progress.done}/{progress.total} done"] + ([f"{progress.failed} failed"] if progress.failed else [])
    return ", ".join(parts)


def _say(bar: Any, line: str) -> None:
    """Write a line without breaking the bar; a full disk under the messages does not stop the run."""
    try:
        bar.write(line, file=sys.stderr) if not bar.disable else click.echo(line, err=True)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise


def _line(report: JobReport) -> str:
    if report.status == "failed":
        return f"FAILED {report.error}"
    found = report.report
    return (
        f"{report.name}  {report.status}  {found['method']}  groups {found['groups']}  "
        f"nominal {found['nominal_bits']:.3f}  "
        f"stored {found['stored_bits']:.3f} bits  error {found['relative_error']:.3g}  {report.seconds:.3f} s"
    )
