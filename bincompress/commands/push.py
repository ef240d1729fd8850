"""bincompress push"""

from pathlib import Path

import click

from bincompress.commands.shared import stage_bars


@click.command()
@click.argument("store")
@click.argument("repo", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="Make a new repository that others cannot see.")
@click.option("--revision", help="The branch to upload to; it is made where it is not there.  [default: main]")
@click.option(
    "--base-model", metavar="OWNER/NAME", help="The unquantized model on the Hub.  [default: as the store says]"
)
@click.option("--license", "licence", help="The licence, as the Hub names it.  [default: the base model's]")
@click.option(
    "--evaluation",
    "evaluations",
    multiple=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="What `bincompress evaluate --json` printed, for the card (repeatable).",
)
@click.option("--overwrite", is_flag=True, help="Replace a README.md that bincompress did not write.")
@click.option("--dry-run", is_flag=True, help="Show the model card, and upload nothing.")
def command(
    store: str, repo: str, private: bool, revision: str | None, base_model: str | None, licence: str | None,
    evaluations: tuple[Path, ...], overwrite: bool, dry_run: bool,
) -> None:  # fmt: skip
    """Upload STORE to the Hugging Face Hub as OWNER/NAME: one file, config and tokenizer, and a model card.

    Log in before (hf auth login). The same command finishes an interrupted upload; what is there is not uploaded again.

    \b
    Examples:
      bincompress push ./store me/Llama-3.2-1B-2bit --dry-run
      bincompress push ./store me/Llama-3.2-1B-2bit --private --evaluation result.json
    """
    from bincompress import api

    with stage_bars(quiet=False) as on_stage:
        done = api.push(
            store, repo, private=private, revision=revision, base_model=base_model, licence=licence,
            evaluations=evaluations, overwrite=overwrite, dry_run=dry_run, progress=on_stage,
        )  # fmt: skip
    for note in done.notes:
        click.echo(f"note: {note}", err=True)
    if dry_run:
        click.echo(done.card, nl=False)
        click.echo(f"would upload to {repo}: {', '.join(done.files)}", err=True)
        return
    click.echo(f"{repo}: uploaded {', '.join(done.files)}: {done.url}")
