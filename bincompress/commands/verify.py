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

    from bincompress.errors import DamagedError
    from bincompress.store.store import open_store
    from bincompress.store.verify import unsealed, verify

    try:
        opened = open_store(store)
    except DamagedError as error:
        return {"zarr.json": str(error)}
    results = tqdm(
        verify(opened), total=len(opened.tensors()) + 2, desc="verify", unit="tensor", disable=True if quiet else None
    )
    problems = {name: problem for name, problem in results if problem}
    bare = unsealed(opened) if not problems else []
    if bare:
        click.echo(
            f"note: the attributes of {len(bare)} tensors are under no hash (an earlier version wrote them): their "
            "arrays were checked against hashes, their attributes for their form only",
            err=True,
        )
    return problems
