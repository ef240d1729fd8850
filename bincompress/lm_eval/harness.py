"""Tasks of lm-evaluation-harness with a store, where that package is installed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bincompress.errors import BincompressError


@dataclass(frozen=True)
class HarnessTasks:
    """Names of tasks or groups, and how the harness asks them.

    fewshot: examples before each question; as a task says if None. limit: most questions of a task. include_path: a
    folder of more tasks. chat_template: questions are put as a user's messages.
    """

    names: Sequence[str]
    fewshot: int | None = None
    limit: int | None = None
    include_path: str | None = None
    chat_template: bool = False


def check_tasks(wanted: HarnessTasks) -> Any:
    """Return the harness's manager of these tasks; raise BincompressError where it or one of them is not there."""
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise BincompressError(
            "--tasks needs lm_eval, which is not installed: pip install 'bincompress[lm-eval]'"
        ) from None
    manager = TaskManager(include_path=wanted.include_path)
    for name in wanted.names:
        if not manager.match_tasks([name]):
            raise BincompressError(
                f"--tasks: {name!r:.60} is not a task of lm-evaluation-harness; `lm_eval ls tasks` lists them, and "
                "--include-path FOLDER adds some"
            )
    return manager


def run_tasks(wanted: HarnessTasks, manager: Any, store: str, **engine: Any) -> dict[str, Any]:
    """Return what `lm_eval.simple_evaluate` returns; engine: arguments of `HarnessRequests`."""
    import lm_eval

    from bincompress.lm_eval.model import BincompressLM

    found: dict[str, Any] = lm_eval.simple_evaluate(
        model=BincompressLM(store=store, **engine),
        tasks=list(wanted.names),
        num_fewshot=wanted.fewshot,
        limit=wanted.limit,
        apply_chat_template=wanted.chat_template,
        fewshot_as_multiturn=wanted.chat_template,
        task_manager=manager,
        log_samples=False,
    )
    return found


def table(found: dict[str, Any]) -> str:
    """Return the harness's own table of results."""
    from lm_eval.utils import make_table

    lines = [str(make_table(found))]
    if found.get("groups"):
        lines.append(str(make_table(found, "groups")))
    return "\n".join(lines)
