"""bincompress demo"""

import sys
from pathlib import Path

import click

_PROMPT = "The scheduler"
_TOKENS = 60


@click.command()
@click.argument("store", default="bincompress-demo")
def command(store: str) -> None:
    """Compress the small model that ships with the package into STORE (./bincompress-demo), verify it, generate text.

    \b
    Example:
      bincompress demo
    """
    from importlib.resources import as_file, files

    from bincompress import api
    from bincompress.commands.running import run_bar
    from bincompress.commands.verify import check
    from bincompress.inference.warmup import compiling_ahead
    from bincompress.reporting.inspection import table
    from bincompress.store.store import open_store
    from cpu_kernels.jit.compiler import announce

    # A second process compiles the kernels that run the model while this one compiles those that pack it.
    with compiling_ahead() as ahead, announce(lambda _: ahead()):
        with as_file(files("bincompress") / "demo_model") as folder, run_bar(verbose=False, quiet=False) as progress:
            # So small a model bears two planes only with calibration; with eight groups a matrix it still writes
            # sentences.
            result = api.compress(Path(folder), store, groups=8, block="matrix", embeddings="8bit", progress=progress)
        click.echo(table({"tensors": result.tensors, "total": result.total}))
        problems = check(open_store(store), None, quiet=False)
        for name, problem in problems.items():
            click.echo(f"{name}: {problem}", err=True)
        if problems or not result.complete:
            sys.exit(1)
        click.echo(f"\nverified: every tensor of {store} is as it was written. The packed model writes:\n")
        _write_text(store)
    click.echo("\nNext:")
    click.echo(f'  bincompress generate {store} "{_PROMPT}" --seed 7')
    click.echo(f"  bincompress bench {store}")
    click.echo("  bincompress compress --help")


def _write_text(store: str) -> None:
    from dataclasses import replace

    from bincompress import load
    from bincompress.commands.shared import kernels_announced

    with kernels_announced():
        model = load(store)
        sampling = replace(model.defaults.sampling, temperature=0.6, seed=1)
        click.echo(_PROMPT, nl=False)
        for piece in model.stream(_PROMPT, replace(model.defaults, max_tokens=_TOKENS, sampling=sampling)):
            click.echo(piece, nl=False)
    click.echo()
