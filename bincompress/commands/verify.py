"""bincompress verify"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from bincompress.commands.shared import kernels_announced, print_json

if TYPE_CHECKING:
    from bincompress.compression.recompute import Proof
    from bincompress.store.store import Store


@click.command()
@click.argument("store")
@click.option("--source", metavar="MODEL", help="Also make tensors from this checkpoint once more, and compare bytes.")
@click.option("--sample", type=click.IntRange(min=1), help="source: at most this many tensors.  [default: all]")
@click.option("--seed", type=int, default=0, show_default=True, help="sample: which ones.")
@click.option("--statistics", metavar="STATS", help="source: the statistics that calibrated tensors were made with.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(
    store: str, source: str | None, sample: int | None, seed: int, statistics: str | None, as_json: bool
) -> None:
    """Check every byte of STORE against its hashes and the format. Exit code 1: damage was found, or a difference.

    With --source this proves where a store comes from: its tensors are made from the checkpoint (a folder or a Hub id)
    once more, with the settings that the store tells, and compared byte for byte. A store that was trained, distilled
    or calibrated with --sequential does not follow from its source alone; that is refused with exit code 2.

    \b
    Examples:
      bincompress verify ./store
      bincompress verify ./model.bincompress.zip --source ./Llama-3.2-1B --sample 20
    """
    from bincompress.errors import DamagedError
    from bincompress.store.store import open_store

    proof = None
    try:
        opened = open_store(store)
    except DamagedError as error:
        problems = {"zarr.json": str(error)}
    else:
        proof = _proof(opened, source, sample, seed, statistics)
        problems = {**(proof.problems if proof else {}), **check(opened, proof, as_json)}
    made = [] if proof is None else proof.names
    if as_json:
        print_json({"store": store, "ok": not problems, "problems": problems, "source": source, "recomputed": made})
    elif not problems:
        click.echo(f"{store}: every tensor is as it was written")
        if proof is not None:
            click.echo(f"{len(made)} of {len(opened.tensors())} tensors made from {source} once more: the same bytes")
    for name, problem in problems.items():
        click.echo(f"{name}: {problem}", err=True)
    if problems:
        sys.exit(1)


def _proof(store: Store, source: str | None, sample: int | None, seed: int, statistics: str | None) -> Proof | None:
    if source is None and sample is None and statistics is None:
        return None
    from bincompress.api import prove  # and what compressing needs, only where it is asked for

    return prove(store, source, sample, seed, statistics)


def check(store: Store, proof: Proof | None, quiet: bool) -> dict[str, str]:
    """Return the problems of a store by tensor, with a progress bar."""
    from tqdm import tqdm

    from bincompress.store.laid_out import forms_in
    from bincompress.store.verify import parts, unsealed, verify

    forms = forms_in(store)

    def results() -> Iterator[tuple[str, str]]:
        yield from verify(store)
        if forms:
            from bincompress.model.laying_out import compare as laid_out_problems

            yield from laid_out_problems(store)
        if proof is not None:
            from bincompress.compression.recompute import compare

            yield from compare(proof)

    total = parts(store) + len(forms) + (0 if proof is None else len(proof.jobs))
    problems: dict[str, str] = {}
    with (
        kernels_announced(),
        tqdm(total=total, desc="verify", unit="tensor", disable=True if quiet else None) as bar,
    ):
        for name, problem in results():
            bar.update()
            if problem:
                problems.setdefault(name, problem)
    bare = unsealed(store) if not problems else []
    if bare:
        click.echo(
            f"note: the attributes of {len(bare)} tensors are under no hash (an earlier version wrote them): their "
            "arrays were checked against hashes, their attributes for their form only",
            err=True,
        )
    return problems
