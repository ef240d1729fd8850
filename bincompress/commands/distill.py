"""bincompress distill"""

from pathlib import Path
from typing import Any

import click

from bincompress.commands.options import rounded_inputs_option
from bincompress.commands.out_file import OutFolder
from bincompress.commands.shared import print_json

_WRITTEN_TOKENS = 1 << 18
_PLACES = ("device", "threads", "checkpoint_every")


@click.command()
@click.argument("store")
@click.option("--teacher", metavar="SOURCE", required=True, help="The checkpoint that STORE was made from.")
@click.option("--text", type=click.Path(dir_okay=False, path_type=Path), help="Text to train on.")
@click.option("--data-free", is_flag=True, help="Train on text that the teacher writes itself.")
@click.option(
    "--written-tokens",
    type=int,
    help="Tokens of training text that the teacher generates.  [default: 0; --data-free: 262144]",
)
@click.option("--out", metavar="STORE2", required=True, help="The store to write.")
@click.option("--steps", type=int, default=500, show_default=True, help="Optimizer steps.")
@click.option("--batch", type=int, default=4, show_default=True, help="Windows per step.")
@click.option("--context", type=int, default=512, show_default=True, help="Tokens per window.")
@click.option(
    "--accumulate",
    type=int,
    default=1,
    show_default=True,
    help="Split each batch into this many parts (gradient accumulation).",
)
@click.option(
    "--lr", type=float, default=0.01, show_default=True, help="Learning rate, relative to a row's typical coefficient."
)
@click.option(
    "--warmup", type=float, default=0.05, show_default=True, help="Share of the steps for warm-up; then cosine decay."
)
@click.option(
    "--lam", type=float, default=0.0, show_default=True, help="Extra weight of ambiguous tokens (DB-LLM). 0: plain."
)
@click.option(
    "--gamma", type=float, default=0.5, show_default=True, help="The teacher's share in the ambiguity of a token."
)
@click.option("--norms", is_flag=True, help="Train the norm weights, too.")
@click.option(
    "--rechoose-planes",
    is_flag=True,
    help="Choose planes anew half-way, where their method can; keep them if they help.",
)
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where to train."
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bf16"]),
    default="float32",
    show_default=True,
    help="Type of the matrix products.",
)
@rounded_inputs_option
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: PyTorch's]")
@click.option("--cache-logits", type=OutFolder(), help="Folder to cache the teacher's logits in.")
@click.option(
    "--validation-share", type=float, default=0.02, show_default=True, help="Share of the text held out for validation."
)
@click.option("--evaluate-every", type=int, default=50, show_default=True, help="Steps between validations.")
@click.option(
    "--patience", type=int, default=5, show_default=True, help="Validations without improvement before training stops."
)
@click.option(
    "--checkpoint-every", type=click.IntRange(min=0),
    help="Steps between checkpoints. 0: none.  [default: by time, at most 1/20 of the run's]",
)  # fmt: skip
@click.option("--work", type=OutFolder(), help="Folder for checkpoints.  [default: beside STORE2]")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the window order and of generated text.")
@click.option(
    "--overwrite", is_flag=True, help="Begin anew, and replace STORE2 (in a folder: when the result is there)."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    store: str, teacher: str, text: Path | None, out: str, work: Path | None, cache_logits: Path | None,
    data_free: bool, written_tokens: int | None, activation_bits: str, overwrite: bool, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Train the coefficients of STORE against the model that it was made from, and write them to a new store.

    Planes stay as they are; STORE is not changed. Part of the text is held out: the result is the state that predicts
    it best. The same command resumes an interrupted run, with the same result. Needs PyTorch:
    pip install 'bincompress[distill]'.

    \b
    Examples:
      bincompress distill ./store --teacher ./Llama-3.2-1B --text train.txt --out ./better --norms
      bincompress distill ./store --teacher ./Llama-3.2-1B --data-free --out ./better --lam 0.1 --dtype bf16
      bincompress distill ./store --teacher ./Llama-3.2-1B --text train.txt --out ./better --batch 8 --accumulate 4
    """
    from tqdm import tqdm

    from bincompress import api
    from bincompress.distillation.settings import DistillSettings
    from bincompress.errors import BincompressError

    if data_free and text is not None:
        raise BincompressError(
            "expected either --text FILE or --data-free; --written-tokens N adds the teacher's own to a text"
        )
    written = (_WRITTEN_TOKENS if data_free else 0) if written_tokens is None else written_tokens
    places = {key: options.pop(key) for key in _PLACES} | {"work": work, "cached_logits": cache_logits}
    bits: Any = int(activation_bits)
    settings = DistillSettings(**options, written_tokens=written, activation_bits=bits)
    with tqdm(total=settings.steps, desc="distill", unit="step", disable=True if as_json else None) as bar:

        def on_step(progress: Any) -> None:
            bar.update(progress.step - bar.n)
            at, held_out = progress.judged[-1]
            bar.set_postfix_str(f"loss {progress.losses[-1]:.4f}, held-out perplexity {held_out:.3f} at {at}")

        found = api.distill(
            store, teacher, out, text=text, settings=settings, overwrite=overwrite, on_step=on_step,
            on_written=lambda done, total: bar.set_postfix_str(f"the teacher has written {done:,} of {total:,} tokens"),
            **places,
        )  # fmt: skip
    if as_json:
        print_json({"store": out, **found.record()})
        return
    if found.resumed_at:
        click.echo(f"resumed from step {found.resumed_at}")
    if found.stopped:
        click.echo(f"stopped at step {found.steps}: {found.stopped}")
    click.echo(
        f"{out}: held-out perplexity {found.start:.4f} -> {found.best:.4f} (unquantized {found.teacher:.4f}), "
        f"best at step {found.best_step} of {found.steps}, {found.seconds:.0f} s"
    )
