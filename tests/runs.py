"""Plans, runs and what `verify` finds, which many tests share."""

from collections.abc import Callable
from pathlib import Path

from bincompress.compression.plan import Plan, make_plan
from bincompress.compression.recipe import load_recipe
from bincompress.compression.run import Outcome, compress
from bincompress.sources.checkpoint import open_checkpoint
from bincompress.store.store import open_store
from bincompress.store.verify import verify

Tree = Callable[[Path], dict[str, bytes]]


def plan_of(model: Path, **options: object) -> Plan:
    return make_plan(open_checkpoint(model), load_recipe(None, options))


def run(model: Path, store: Path | str, **options: object) -> Outcome:
    return compress(plan_of(model, **options), str(store))


def problems(store: Path | str) -> dict[str, str]:
    return {name: problem for name, problem in verify(open_store(str(store))) if problem}
