"""bincompress report"""

import os
from pathlib import Path

import click

from bincompress.commands.out_file import OutFile
from bincompress.commands.shared import kernels_announced

_MARKED = 4096  # bytes, among which the title of such a page is


@click.command()
@click.argument("store")
@click.option(
    "--out",
    type=OutFile(),
    default=Path("report.html"),
    show_default=True,
    help="The page to write.",
)
@click.option("--tensor", help="The tensor whose weights are shown.  [default: the one of greatest error]")
def command(store: str, out: Path, tensor: str | None) -> None:
    """Write one self-contained HTML page about STORE: bits and error by layer, weights and levels, times, settings.

    \b
    Example:
      bincompress report ./store --out report.html
    """
    from bincompress.errors import BincompressError
    from bincompress.reporting.page import report_page
    from bincompress.store.store import open_store

    refuse_foreign(out)
    # A notebook names its own way of drawing here, which matplotlib refuses to start with outside of it.
    os.environ.pop("MPLBACKEND", None)
    with kernels_announced():
        page = report_page(open_store(store), tensor)
    try:
        _replace(out, page)
    except OSError as error:
        raise BincompressError(f"{out}: cannot be written: {error.strerror}") from None
    click.echo(f"{out}: written, {len(page):,} bytes")


def refuse_foreign(path: Path) -> None:
    """Raise BincompressError where a file is there that is not a page of this command, before any work."""
    from bincompress.errors import BincompressError

    if not path.is_file():
        return
    try:
        with open(path, "rb") as file:
            begin = file.read(_MARKED)
    except OSError as error:
        raise BincompressError(f"{path}: cannot be read: {error.strerror}") from None
    if begin and not (begin.lower().startswith(b"<!doctype html") and b"<title>bincompress: " in begin):
        raise BincompressError(
            f"{path}: is there, and is not a report of bincompress; nothing was changed: give another --out"
        )


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all; what is no file, such as a pipe, is written as it goes."""
    if path.exists() and not path.is_file():
        path.write_text(text, "utf-8")
        return
    target = path.resolve()  # a link stays one
    beside = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        beside.write_text(text, "utf-8")
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
