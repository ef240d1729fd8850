"""How does a matrix become planes and coefficients? One file a method, with its declaration at the end.

A new method is a new file here and a line in METHODS: see CONTRIBUTING.md.
"""

from collections.abc import Iterator
from typing import Any

from bincompress.errors import RecipeError
from bincompress.methods import billm, dbellquant, dbllm, lossless, lowrank, uniform, wgm, xnor
from bincompress.methods.declaration import KEEP, Binarized, Keep, Made, Method, Option, Recognized, Settings
from bincompress.methods.inputs import Inputs

__all__ = [
    "KEEP", "METHODS", "Binarized", "Inputs", "Keep", "Made", "Method", "Option", "Recognized", "Settings", "checked",
    "embeddings", "make_settings", "method_named", "of_planes", "options",
]  # fmt: skip

# The first is the default; settings that several methods have are described by the first of these.
METHODS: list[Method] = [
    wgm.METHOD, uniform.METHOD, xnor.METHOD, dbellquant.METHOD, billm.METHOD, dbllm.METHOD, lossless.METHOD,
    lowrank.METHOD,
]  # fmt: skip


def method_named(name: str, where: str = "") -> Method:
    """Return a method's declaration; raises RecipeError, beginning with `where`, for an unknown name."""
    for method in METHODS:
        if method.name == name:
            return method
    known = ", ".join(sorted([*(method.name for method in METHODS), KEEP.method]))
    raise RecipeError(f"{where + ': ' if where else ''}unknown method {name!r}; known: {known}")


def of_planes(planes: int) -> dict[str, Any]:
    """Return the method, and its settings, that gives a matrix 1 to 4 planes without calibration."""
    return {"method": xnor.METHOD.name} if planes == 1 else {"method": wgm.METHOD.name, "groups": 1 << (planes - 1)}


def options() -> dict[str, list[tuple[Method, Option]]]:
    """Return every setting by name, with the methods that have it."""
    found: dict[str, list[tuple[Method, Option]]] = {}
    for method in METHODS:
        for name, option in method.options().items():
            found.setdefault(name, []).append((method, option))
    return found


def make_settings(method: str, **values: Any) -> Any:
    """Return an object of a method's settings class; raises RecipeError for an unknown method, setting or value."""
    return checked(method, values, f"method {method}")


def checked(method: str, values: dict[str, Any], where: str) -> Settings:
    """Return a method's settings, "keep" included; raises RecipeError, beginning with `where`, as `settings` does."""
    if method == KEEP.method:
        return KEEP
    declared = method_named(method, where)
    known = declared.options()
    for name, value in values.items():
        if name not in known:
            raise RecipeError(f"{where}: {method} has no setting {name!r}; it has {', '.join(sorted(known))}")
        problem = known[name].problem(value)
        if problem:
            raise RecipeError(f"{where}: {known[name].flag[2:]}: {problem}")
    return declared.settings(**values)


def embeddings() -> dict[str, Settings]:
    """Return what embeddings and output heads can become, by the name of the choice; "keep" leaves them."""
    return {KEEP.method: KEEP} | dict(_embeddings())


def _embeddings() -> Iterator[tuple[str, Settings]]:
    for method in METHODS:
        yield from method.embeddings.items()
