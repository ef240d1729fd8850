"""How are figures of texts and tasks shown?"""

from collections.abc import Sequence
from typing import Any

import click

from bincompress.inference.evaluate import Evaluation
from bincompress.scoring.measure import TaskRow, TextRow

_WHOLE = "all texts"


def rows_as_json(rows: Sequence[TextRow | TaskRow]) -> dict[str, Any]:
    """Return rows as JSON objects; the fields of a single text stand beside them as well."""
    texts = [row.as_dict() for row in rows if isinstance(row, TextRow)]
    tasks = [row.as_dict() for row in rows if isinstance(row, TaskRow)]
    alone = texts[0] if len(rows) == len(texts) == 1 else {}
    return {**alone, **({"texts": texts} if texts else {}), **({"tasks": tasks} if tasks else {})}


def print_rows(rows: Sequence[TextRow | TaskRow]) -> None:
    """Print a single text's figures in sentences, anything else as tables."""
    texts = [row for row in rows if isinstance(row, TextRow)]
    tasks = [row for row in rows if isinstance(row, TaskRow)]
    if len(texts) == 1:
        _print_text(texts[0].found, texts[0].activations)
    elif texts:
        _print_table(*_of_texts(texts))
    if tasks:
        _print_table(*_of_tasks(tasks))


def _print_text(found: Evaluation, activations: str) -> None:
    overlap = "" if found.stride == found.context else f", one every {found.stride}"
    click.echo(
        f"perplexity {found.perplexity:.4f}  "
        f"({found.tokens:,} tokens scored, {found.windows} windows of {found.context}{overlap})"
    )
    click.echo(f"activations {activations}")
    if found.baseline_perplexity is not None:
        ratio = found.perplexity / found.baseline_perplexity
        click.echo(f"baseline perplexity {found.baseline_perplexity:.4f}, ratio {ratio:.4f}")
        click.echo(
            f"mean KL divergence {found.kl_divergence:.5f} nats, "
            f"top-1 agreement {100 * (found.top1_agreement or 0):.2f}%"
        )


def _of_texts(rows: Sequence[TextRow]) -> tuple[list[str], list[list[str]]]:
    """Return the head and the cells of a table of texts.

    Where float32 activations are among the runs, `rise` is how far the perplexity lies above theirs.
    """
    exact = {row.text: row.found.perplexity for row in rows if row.activations == "float32"}
    rises = bool(exact) and len({row.activations for row in rows}) > 1
    compared = rows[0].found.baseline_perplexity is not None
    head = ["text", "activations", "tokens", "perplexity"]
    head += ["rise"] * rises + ["baseline", "ratio", "KL", "top-1"] * compared
    cells = []
    for row in rows:
        found = row.found
        own = [row.text or _WHOLE, row.activations, f"{found.tokens:,}", f"{found.perplexity:.4f}"]
        if rises:
            own.append(f"{100 * (found.perplexity / exact[row.text] - 1):.2f}%")
        if found.baseline_perplexity is not None:
            own += [
                f"{found.baseline_perplexity:.4f}", f"{found.perplexity / found.baseline_perplexity:.4f}",
                f"{found.kl_divergence:.5f}", f"{100 * (found.top1_agreement or 0):.2f}%",
            ]  # fmt: skip
        cells.append(own)
    return head, cells


def _of_tasks(rows: Sequence[TaskRow]) -> tuple[list[str], list[list[str]]]:
    """Return the head and the cells of a table of tasks."""
    compared = any(row.baseline is not None for row in rows)
    head = ["task", "activations", "questions", "acc", "acc_norm"] + ["baseline acc", "baseline acc_norm"] * compared
    cells = []
    for row in rows:
        own = [row.task, row.activations, f"{row.found.questions:,}"]
        for found in (row.found, *([row.baseline] if row.baseline is not None else [])):
            own += [_share(found.acc, found.acc_stderr), _share(found.acc_norm, found.acc_norm_stderr)]
        cells.append(own)
    return head, cells


def _share(value: float, stderr: float | None) -> str:
    return f"{value:.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")


def _print_table(head: list[str], cells: list[list[str]]) -> None:
    """Print cells in columns; the first two are texts, the others numbers."""
    widths = [max(len(row[place]) for row in (head, *cells)) for place in range(len(head))]
    for row in (head, *cells):
        aligned = [
            text.ljust(width) if place < 2 else text.rjust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        click.echo("  ".join(aligned).rstrip())
