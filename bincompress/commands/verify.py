"""bincompress verify"""

import sys

import click

from bincompress.commands.shared import print_json


@click.command()
@click.argument("store")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(store: str, as_json: bool) -> None:
    """Check every byte of STORE against its hashes and the format. Exit code 1: damage was found.

    \b
    Example:
      bincompress verify ./store
    """
    problems = check(store, as_json)
    if as_json:
        print_json({"store": store, "ok": not problems, "problems": problems})
    elif not problems:
        click.echo(f"{store}: every tensor is as it was written")
    for name, problem in problems.items():
        click.echo(f"{name}: {problem}", err=True)
    if problems:
        sys.exit(1)


def check(store: str, quiet: bool) -> dict[str, str]:
    """Return the problems of a store by tensor, with a progress bar."""
    from tqdm import tqdm

    from bincompress.store.store import open_store
    from bincompress.store.verify import verify

    opened = open_store(store)
    results = tqdm(
        verify(opened), total=len(opened.tensors()) + 1, desc="verify", unit="tensor", disable=True if quiet else None
    )
    return {name: problem for name, problem in results if problem}
