"""Which models go into which stores? A manifest in TOML, a table a model.

[[model]]
source = "./Llama-3.2-1B"         # a checkpoint folder or a Hub id
store = "./stores/llama-1b"       # a path or an fsspec URL
recipe = "recipes/two.toml"       # optional; paths are read as on the command line
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path

from bincompress.errors import RecipeError
from bincompress.sources.text import UTF_8
from bincompress.store.store import is_local

_REQUIRED = ("source", "store")
_KEYS = (*_REQUIRED, "recipe")


@dataclass(frozen=True)
class Entry:
    """One model of a manifest."""

    source: str
    store: str
    recipe: Path | None


def read_manifest(path: Path) -> list[Entry]:
    """Return a manifest's models; raises RecipeError naming the entry and what was expected."""
    try:
        found = tomllib.loads(path.read_text(UTF_8))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: not readable as TOML: {error}") from None
    models = found.get("model")
    if set(found) != {"model"} or not isinstance(models, list) or not models:
        raise RecipeError(f"{path}: expected [[model]] tables and nothing else, found {sorted(found)}")
    entries = [_entry(model, f"{path}: [[model]] number {number}") for number, model in enumerate(models, 1)]
    places: dict[str, str] = {}
    for entry in entries:
        place = str(Path(entry.store).resolve()) if is_local(entry.store) else entry.store.rstrip("/")
        if place in places:
            raise RecipeError(f"{path}: {entry.store} is the store of {places[place]} and of {entry.source}")
        places[place] = entry.source
    return entries


def _entry(model: object, where: str) -> Entry:
    if not isinstance(model, dict):
        raise RecipeError(f"{where}: expected a table, found {model!r:.60}")
    for key, value in model.items():
        if key not in _KEYS:
            raise RecipeError(f"{where}: unknown key {key!r}; known: {', '.join(_KEYS)}")
        if not isinstance(value, str) or not value:
            raise RecipeError(f"{where}: {key}: expected a text, found {value!r:.60}")
    for key in _REQUIRED:
        if key not in model:
            raise RecipeError(f"{where}: lacks {key}")
    return Entry(model["source"], model["store"], Path(model["recipe"]) if "recipe" in model else None)
