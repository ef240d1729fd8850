"""Which settings does each tensor get? Defaults, then overrides by pattern; later overrides win.

[defaults]                        # settings as on the command line
method = "wgm"
groups = 2
block = 128

[[tensor]]
pattern = "*.down_proj.weight"    # shell-style, against the tensor's name
groups = 4

[[tensor]]
pattern = "model.layers.0.*"
method = "keep"
"""

import fnmatch
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from bincompress.errors import RecipeError
from bincompress.methods import KEEP, METHODS, Settings, checked, embeddings, method_named, options
from bincompress.methods.declaration import CompensatedSettings
from bincompress.sources.text import UTF_8

# How version 1 of the store lists the settings of a recipe; those that came later follow.
_ORDER = (
    "groups", "solver", "window", "lam", "lam_normalized", "block", "bits", "planes", "scale_bits", "compensate",
    "refine", "epsilon",
)  # fmt: skip
_LATER = frozenset({"rank"})  # listed only where a method has them, so that other stores are as they were
_NOT_GIVEN = {"planes": 0}  # what version 1 writes in place of a method's own default


@dataclass(frozen=True)
class Override:
    """Settings for the tensors whose names match a pattern."""

    pattern: str
    changes: tuple[tuple[str, Any], ...]  # by name, "method" among them


@dataclass(frozen=True)
class Recipe:
    """Everything that decides how a checkpoint is packed."""

    method: str = METHODS[0].name
    values: tuple[tuple[str, Any], ...] = ()  # settings of all tensors that are packed, by name
    embeddings: str = KEEP.method
    overrides: tuple[Override, ...] = ()
    method_given: bool = (
        True  # or any setting of a method; where none was, matrices of few levels are packed losslessly
    )
    embeddings_given: bool = True

    def record(self) -> dict[str, Any]:
        """Return the recipe as JSON, for the store."""
        used = {name for method in self.methods() if method != KEEP.method for name in method_named(method).options()}
        known = {name: owners for name, owners in options().items() if name in used or name not in _LATER}
        given, own = dict(self.values), {} if self.method == KEEP.method else method_named(self.method).options()
        ordered = [name for name in _ORDER if name in known] + [name for name in known if name not in _ORDER]
        usual = {name: own.get(name, known[name][0][1]).default for name in ordered}
        defaults = {name: given.get(name, _NOT_GIVEN.get(name, usual[name])) for name in ordered}
        return {
            "defaults": {"method": self.method, **defaults},
            "embeddings": self.embeddings,
            "tensor": [{"pattern": o.pattern, **dict(o.changes)} for o in self.overrides],
        }

    def settings_for(self, name: str, base: Settings | None = None) -> Settings:
        """Return the settings of one tensor: those of all, changed by every override that matches its name.

        base: settings to begin with in place of the recipe's own. Raises RecipeError where a value is not one that the
        tensor's method takes.
        """
        if base is None:
            method, values = self.method, dict(self.values)
        else:
            method, values = base.method, base.all_values()
        for override in self.overrides:
            if fnmatch.fnmatchcase(name, override.pattern):
                changes = dict(override.changes)
                method = changes.pop("method", method)
                values.update(changes)
        if method == KEEP.method:
            return KEEP
        # What other tensors' methods have stands among the values too.
        known = method_named(method, name).options()
        return checked(method, {key: value for key, value in values.items() if key in known}, name)

    def methods(self) -> list[str]:
        """Return the names of all methods that tensors of this recipe can have."""
        named = [str(dict(override.changes).get("method", "")) for override in self.overrides]
        return [name for name in (self.method, embeddings()[self.embeddings].method, *named) if name]


def not_given(name: str, value: Any) -> bool:
    """Return whether a value in a record of a recipe stands for a setting that was not given."""
    return name in _NOT_GIVEN and bool(_NOT_GIVEN[name] == value)


def load_recipe(path: Path | None, given: Mapping[str, Any], keep: Iterable[str] = ()) -> Recipe:
    """Return the recipe of a TOML file (or none), with the command line's options over its defaults.

    given: settings by name, and "embeddings". keep: patterns of tensors to leave as they are, applied last.
    Raises RecipeError naming the key, what was expected and what was found.
    """
    found: dict[str, Any] = {}
    if path is not None:
        try:
            found = tomllib.loads(path.read_text(UTF_8))
        except (OSError, ValueError) as error:
            raise RecipeError(f"{path}: not readable as TOML: {error}") from None
    _known(found, {"defaults", "tensor"}, f"{path}")
    defaults, tensors = found.get("defaults", {}), found.get("tensor", [])
    if not isinstance(defaults, dict) or not isinstance(tensors, list) or not all(isinstance(t, dict) for t in tensors):
        raise RecipeError(f"{path}: expected a [defaults] table and [[tensor]] tables")
    where = f"{path or 'options'}"
    merged = {**defaults, **given}
    embeddings_given = "embeddings" in merged
    chosen = merged.pop("embeddings", KEEP.method)
    if chosen not in embeddings():
        raise RecipeError(f"embeddings: expected one of {', '.join(embeddings())}, found {chosen!r}")
    merged = _level(merged, where)
    overrides = []
    for number, tensor in enumerate(tensors, 1):
        pattern = tensor.get("pattern")
        here = f"{path}: [[tensor]] number {number}"
        if not isinstance(pattern, str):
            raise RecipeError(f'{here}: expected a pattern, such as pattern = "*.down_proj.weight"')
        changes = _level({key: value for key, value in tensor.items() if key != "pattern"}, here)
        overrides.append(Override(pattern, tuple(changes.items())))
    overrides += [Override(pattern, (("method", KEEP.method),)) for pattern in keep]
    method_given = bool(merged)
    method = str(merged.pop("method", METHODS[0].name))
    recipe = Recipe(method, tuple(merged.items()), chosen, tuple(overrides), method_given, embeddings_given)
    _refuse_unused(recipe, where)
    return recipe


def _level(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return one table's settings, each checked for its kind, with those that its method has in its own way."""
    # The field is `lam` because `lambda` is a word of Python; recipes write either.
    changes = {key.replace("-", "_").replace("lambda", "lam"): value for key, value in given.items()}
    known = options()
    _known(changes, {"method", *known}, where)
    method = changes.get("method")
    if method is not None and not isinstance(method, str):
        raise RecipeError(f"{where}: method: expected str, found {method!r}")
    if method not in (None, KEEP.method):
        changes |= {key: value for key, value in _own_defaults(str(method), where).items() if key not in changes}
    for key, value in changes.items():
        problems = {owner.name: (option.flag[2:], option.problem(value)) for owner, option in known.get(key, ())}
        if problems and all(problem for _, problem in problems.values()):
            flag, problem = problems.get(str(method)) or next(iter(problems.values()))
            raise RecipeError(f"{where}: {flag}: {problem}")
    return changes


def _own_defaults(method: str, where: str) -> dict[str, Any]:
    """Return the defaults that a method has in place of those that methods share, as its paper has another block."""
    shared = {one.name: one.default for one in fields(CompensatedSettings)}
    own = method_named(method, where).options()
    return {name: own[name].default for name in own if name in shared and own[name].default != shared[name]}


def _refuse_unused(recipe: Recipe, where: str) -> None:
    """Refuse settings that none of the recipe's methods has: they would change nothing."""
    methods = {name for name in recipe.methods() if name != KEEP.method}
    used = {key for name in methods for key in method_named(name, where).options()}
    for key, _ in recipe.values:
        if key not in used:
            owners = ", ".join(method.name for method, _ in options()[key])
            raise RecipeError(
                f"{where}: {key.replace('_', '-')} is a setting of {owners}, and no tensor has such a method; leave it "
                "out, or choose the method"
            )


def _known(found: Mapping[str, Any], names: set[str], where: str) -> None:
    for key in found:
        if key not in names:
            raise RecipeError(f"{where}: unknown key {key!r}; known: {', '.join(sorted(names))}")


def load_kept_weights(path: Path) -> dict[str, tuple[tuple[int, int], ...]]:
    """Read the single weights to keep exactly, one a line: tensor name, row, column ('#' begins a comment)."""
    kept: dict[str, set[tuple[int, int]]] = {}
    try:
        lines = path.read_text(UTF_8).splitlines()
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: not readable: {error}") from None
    for number, line in enumerate(lines, 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        if len(words) != 3 or not words[1].isdecimal() or not words[2].isdecimal():
            raise RecipeError(f"{path}:{number}: expected 'tensor row column', found {line.strip()!r}")
        kept.setdefault(words[0], set()).add((int(words[1]), int(words[2])))
    return {name: tuple(sorted(places)) for name, places in kept.items()}
