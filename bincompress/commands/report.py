"""bincompress report"""

from pathlib import Path

import click

from bincompress.commands.shared import kernels_announced


@click.command()
@click.argument("store")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
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

    with kernels_announced():
        page = report_page(open_store(store), tensor)
    try:
        out.write_text(page, "utf-8")
    except OSError as error:
        raise BincompressError(f"{out}: cannot be written: {error.strerror}") from None
    click.echo(f"{out}: written, {len(page):,} bytes")
