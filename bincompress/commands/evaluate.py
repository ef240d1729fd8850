"""bincompress evaluate"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bincompress.commands.options import engine_options_for_several_bits
from bincompress.commands.shared import kernels_announced, print_json
from bincompress.errors import BincompressError

if TYPE_CHECKING:
    from bincompress.lm_eval.harness import HarnessTasks
    from bincompress.scoring.measure import Engine, TaskRow, TextRow, Wanted

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command()
@click.argument("store")
@click.option(
    "--text", "texts", type=_FILE, multiple=True,
    help="Text that the model was not trained or calibrated on (repeatable).",
)  # fmt: skip
@click.option("--context", type=int, help="Tokens per window.  [default: 1024, or the model's limit]")
@click.option("--stride", type=int, help="Tokens from one window to the next; less than the context: they overlap.")
@click.option("--windows", type=int, help="Use at most this many windows, from the start.  [default: the whole text]")
@click.option(
    "--task", "files", type=_FILE, multiple=True,
    help="Questions with choices, JSON lines of context, choices and answer (repeatable).",
)  # fmt: skip
@click.option("--tasks", help="Tasks of lm-evaluation-harness, separated by commas, such as arc_easy,hellaswag.")
@click.option("--limit", type=click.IntRange(min=1), help="Use at most this many questions of a task.")
@click.option("--num-fewshot", type=click.IntRange(min=0), help="--tasks: examples before a question.")
@click.option("--include-path", type=click.Path(file_okay=False, exists=True), help="--tasks: folder of more tasks.")
@click.option("--apply-chat-template", is_flag=True, help="--tasks: put questions as a user's messages.")
@click.option(
    "--baseline", metavar="SOURCE", help="The unquantized checkpoint (folder, .gguf file or Hub id) to compare with."
)
@engine_options_for_several_bits
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(store: str, as_json: bool, baseline: str | None, **options: Any) -> None:
    """Measure the perplexity of the model in STORE on texts, or how many questions it answers rightly.

    A text is tokenized as a whole; consecutive windows are scored, each from its second token. Several numbers of
    --activation-bits give a table. STORE may also be an unquantized checkpoint folder or a .gguf file, which runs in
    float32.

    \b
    Examples:
      bincompress evaluate ./store --text held_out.txt --windows 16
      bincompress evaluate ./store --text held_out.txt --baseline ./Llama-3.2-1B --json
      bincompress evaluate ./store --text prose.txt --text code.txt --activation-bits 16,8,6
      bincompress evaluate ./store --task questions.jsonl
      bincompress evaluate ./store --tasks arc_easy,hellaswag --limit 100
    """
    from bincompress.commands.evaluated import print_rows, rows_as_json
    from bincompress.lm_eval.harness import check_tasks, table
    from bincompress.scoring.measure import Engine

    wanted, harness = _wanted(options), _harness(options, baseline)
    engine = Engine(
        options["threads"],
        options["activation_bits"],
        options["activation_scale"],
        options["kernel"],
        options["memory"],
        int(options["kv_bits"]),
    )
    engine.settings(store)
    manager = check_tasks(harness) if harness is not None else None
    with kernels_announced():
        rows = _measured(store, wanted, engine, baseline, as_json)
        results = {} if harness is None else _harness_results(store, harness, manager, engine)
    if as_json:
        print_json(
            {"store": store, "baseline": baseline, **rows_as_json(rows), **({"lm_eval": results} if results else {})}
        )
        return
    print_rows(rows)
    for activations, found in results.items():
        click.echo(f"activations {activations}")
        click.echo(table(found))


def _wanted(options: dict[str, Any]) -> "Wanted":
    """Read what is to be scored, before any model is loaded."""
    from bincompress.scoring.measure import Wanted
    from bincompress.scoring.questions import read_questions
    from bincompress.sources.text import read_text

    if not (options["texts"] or options["files"] or options["tasks"]):
        raise BincompressError("nothing to evaluate: give --text FILE, --task FILE.jsonl or --tasks NAMES")
    for name in ("windows", "stride"):
        if options[name] is not None and not options["texts"]:
            raise BincompressError(f"--{name} is for --text")
    if options["limit"] is not None and not (options["files"] or options["tasks"]):
        raise BincompressError("--limit is for --task and --tasks")
    for name, paths in (("--text", options["texts"]), ("--task", options["files"])):
        if twice := [path for path in paths if paths.count(path) > 1]:
            raise BincompressError(f"{name} {twice[0]}: is given twice")
    return Wanted(
        {str(path): read_text(path) for path in options["texts"]},
        {str(path): read_questions(path)[: options["limit"]] for path in options["files"]},
        options["context"], options["windows"], options["stride"],
    )  # fmt: skip


def _harness(options: dict[str, Any], baseline: str | None) -> "HarnessTasks | None":
    """Return the tasks of lm-evaluation-harness that are asked for."""
    from bincompress.lm_eval.harness import HarnessTasks

    if not options["tasks"]:
        for name in ("num_fewshot", "include_path", "apply_chat_template"):
            if options[name] not in (None, False):
                raise BincompressError(f"--{name.replace('_', '-')} is for --tasks")
        return None
    if baseline is not None:
        raise BincompressError("--baseline is for --text and --task; evaluate the checkpoint with --tasks by itself")
    if options["kv_bits"] != "16":
        raise BincompressError("--kv-bits 8 is for --text and --task; --tasks runs with 16-bit keys and values")
    names = [name.strip() for name in options["tasks"].split(",") if name.strip()]
    return HarnessTasks(
        names, options["num_fewshot"], options["limit"], options["include_path"], options["apply_chat_template"]
    )


def _measured(
    store: str, wanted: "Wanted", engine: "Engine", baseline: str | None, hidden: bool
) -> "list[TextRow | TaskRow]":
    from tqdm import tqdm

    from bincompress.scoring.measure import measure

    if not (wanted.texts or wanted.tasks):
        return []
    with tqdm(desc="evaluate", disable=True if hidden else None) as bar:
        shown = ""

        def progress(what: str, done: int, total: int) -> None:
            nonlocal shown
            if what != shown:
                bar.reset(total)
                bar.set_description(what, refresh=False)
                shown = what
            bar.update(done - bar.n)

        return list(measure(store, wanted, engine, baseline, progress))


def _harness_results(store: str, harness: "HarnessTasks", manager: Any, engine: "Engine") -> dict[str, Any]:
    """Return the harness's results by how activations are rounded."""
    from bincompress.lm_eval.harness import run_tasks
    from bincompress.scoring.models import activations_of
    from bincompress.sources.hub import is_checkpoint

    return {
        "float32" if is_checkpoint(store) else activations_of(settings): run_tasks(
            harness, manager, store, threads=engine.threads, activation_bits=settings.bits,
            activation_scale=settings.per, kernel=engine.kernel, memory=engine.memory, batch_size="auto",
        )
        for settings in engine.settings(store)
    }  # fmt: skip
