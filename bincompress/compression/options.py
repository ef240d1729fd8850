"""What may `compress` be told beside a source, a recipe and a store? One typed list, for all functions that take it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

from bincompress.errors import RecipeError
from bincompress.methods import options as method_options
from bincompress.methods.declaration import Block


class MethodSettings(TypedDict, total=False):
    """`method`, the settings of methods, and what becomes of embeddings, as a recipe's defaults have them.

    For type checkers: the values that a method takes are in its declaration, which is what is checked when it runs.
    """

    method: str
    embeddings: Literal["keep", "4bit", "8bit", "lossless"]
    block: Block
    groups: int
    solver: Literal["exact", "greedy", "windowed"]
    window: int
    lam: float
    lam_normalized: bool
    bits: float
    planes: int
    rank: int
    scale_bits: Literal[8, 16]
    compensate: bool
    refine: int
    epsilon: float
    activation_bits: Literal[6, 8, 16]
    smoothing: float


class CompressionOptions(MethodSettings, total=False):
    """What `compress`, `plan` and `fit` take beside what each has of its own; see `compress`."""

    keep: Sequence[str]
    keep_weights: str | Path | Mapping[str, tuple[tuple[int, int], ...]] | None
    stats: str | None
    sequential: str | Path | None
    samples: int | None
    context: int | None
    target_bits: float | None
    archive: bool
    export_only: bool
    text_only: bool


_NOT_OF_METHODS = CompressionOptions.__annotations__.keys() - MethodSettings.__annotations__.keys()


def check_names(given: Mapping[str, Any]) -> None:
    """Raise RecipeError for a name that is neither an option nor a setting of a declared method."""
    known = {*_NOT_OF_METHODS, "method", "embeddings", *method_options()}
    for name in given:
        if name not in known:
            raise RecipeError(f"options: unknown key {name!r}; known: {', '.join(sorted(known))}")


def settings_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the options that a recipe's defaults may have: of methods, and of embeddings."""
    return {name: value for name, value in given.items() if name not in _NOT_OF_METHODS}
