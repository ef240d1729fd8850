"""bincompress kernels"""

import sys
from pathlib import Path

import click

from bincompress.commands.out_file import OutFile
from bincompress.commands.shared import print_json


@click.group()
def command() -> None:
    """Ship the kernels that are compiled here to machines with the same CPU and the same versions.

    \b
    Examples:
      bincompress warmup ./store
      bincompress kernels export kernels.zip
      bincompress kernels import kernels.zip --sha256 DIGEST
    """


@command.command("export")
@click.argument("file", type=OutFile())
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def export(file: Path, as_json: bool) -> None:
    """Write the kernels that are compiled on this machine into FILE, and print its SHA-256.

    `bincompress warmup STORE` first compiles those that run a store.
    """
    from cpu_kernels.jit.kernel_archive import export_kernels

    count, digest = export_kernels(file)
    if as_json:
        print_json({"file": str(file), "kernels": count, "sha256": digest})
        return
    click.echo(f"{file}: {count} kernels, {file.stat().st_size / 1e6:,.1f} MB, sha256 {digest}")
    click.echo(f"  bincompress kernels import {file} --sha256 {digest}")


@command.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--sha256", metavar="DIGEST", help="What `kernels export` printed, had from whom you trust.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def import_(file: Path, sha256: str | None, as_json: bool) -> None:
    """Put the kernels of FILE into this machine's cache.

    FILE is a program: whoever wrote it can do here whatever you can. So its SHA-256 has to be given, as `kernels
    export` printed it, or the file be confirmed at the prompt. Kernels for another CPU, Python, Numba, llvmlite or
    NumPy, or of another version of bincompress, are refused.
    """
    from bincompress.errors import BincompressError
    from cpu_kernels.jit.kernel_archive import digest_of, import_kernels

    if sha256 is None:
        sha256 = digest_of(file)
        if sys.stdin is None or not sys.stdin.isatty():
            raise BincompressError(
                f"{file}: holds native code, which runs as you; give --sha256, as `bincompress kernels "
                "export` printed it"
            )
        click.confirm(
            f"{file} holds native code, which will run as you. sha256 {sha256}\nDo you trust whoever made it?",
            abort=True,
        )
    new, there = import_kernels(file, sha256)
    if as_json:
        print_json({"file": str(file), "imported": new, "there": there})
        return
    click.echo(f"{file}: {new} kernels imported, {there} were there")
