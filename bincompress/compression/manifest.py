"""Which models go into which stores? A manifest in TOML, a table a model.

[[model]]
source = "./Llama-3.2-1B"         # a checkpoint folder or a Hub id
store = "./stores/llama-1b"       # a path or an fsspec URL
recipe = "recipes/two.toml"       # optional; paths are read as on the command line

Several recipes are a list, and {recipe} in the store stands for each one's name without its ending.
"""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bincompress.errors import RecipeError
from bincompress.sources.text import UTF_8
from bincompress.store.store import is_local

RECIPE = "{recipe}"
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
    entries = [
        entry
        for number, model in enumerate(models, 1)
        for entry in _entries(model, f"{path}: [[model]] number {number}")
    ]
    places: dict[str, str] = {}
    for entry in entries:
        place = str(Path(entry.store).resolve()) if is_local(entry.store) else entry.store.rstrip("/")
        if place in places:
            raise RecipeError(f"{path}: {entry.store} is the store of {places[place]} and of {entry.source}")
        places[place] = entry.source
    return entries


def stores_of(store: str, recipes: Sequence[Path]) -> dict[str, Path]:
    """Return the recipes by store, {recipe} in it standing for each one's name; raises RecipeError where two are one.

    A single recipe needs no {recipe}.
    """
    if len(recipes) > 1 and RECIPE not in store:
        raise RecipeError(
            f"{store}: {len(recipes)} recipes need a store each: put {RECIPE} into its name, such as {store}-{RECIPE}; "
            "it becomes each recipe's name without its ending"
        )
    found: dict[str, Path] = {}
    for recipe in recipes:
        place = store.replace(RECIPE, recipe.stem)
        if place in found:
            raise RecipeError(f"{place}: is the store of {found[place]} and of {recipe}; give the recipes other names")
        found[place] = recipe
    return found


def _entries(model: object, where: str) -> list[Entry]:
    if not isinstance(model, dict):
        raise RecipeError(f"{where}: expected a table, found {model!r:.60}")
    for key, value in model.items():
        if key not in _KEYS:
            raise RecipeError(f"{where}: unknown key {key!r}; known: {', '.join(_KEYS)}")
        listed = value if key == "recipe" and isinstance(value, list) and value else [value]
        if not all(isinstance(one, str) and one for one in listed):
            raise RecipeError(f"{where}: {key}: expected a text, found {value!r:.60}")
    for key in _REQUIRED:
        if key not in model:
            raise RecipeError(f"{where}: lacks {key}")
    source, store, recipes = model["source"], model["store"], model.get("recipe")
    if recipes is None:
        return [Entry(source, store, None)]
    listed = [Path(recipe) for recipe in (recipes if isinstance(recipes, list) else [recipes])]
    try:
        return [Entry(source, place, recipe) for place, recipe in stores_of(store, listed).items()]
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None
