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
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from bincompress.errors import RecipeError
from bincompress.records import Settings

KEEP = "keep"
EMBEDDINGS = ("keep", "4bit", "8bit")
_MOST_PLANES = 4
_BLOCKS = (64, 128, 256, "row", "matrix")
_USUAL_BLOCK = {"dbllm": 64}  # where a method's paper has another than 128
_SOLVERS = ("exact", "greedy", "windowed")
_TYPES: dict[str, tuple[type, ...]] = {
    "method": (str,), "groups": (int,), "solver": (str,), "window": (int,), "lam": (int, float),
    "lam_normalized": (bool,), "block": (int, str), "bits": (int,), "planes": (int,), "scale_bits": (int,),
    "compensate": (bool,), "refine": (int,), "epsilon": (int, float),
}  # fmt: skip


@dataclass(frozen=True)
class Override:
    """Settings for the tensors whose names match a pattern."""

    pattern: str
    changes: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides how a checkpoint is packed."""

    defaults: Settings = field(default_factory=Settings)
    embeddings: str = KEEP
    overrides: tuple[Override, ...] = ()

    def record(self) -> dict[str, Any]:
        """Return the recipe as JSON, for the store."""
        return {
            "defaults": asdict(self.defaults),
            "embeddings": self.embeddings,
            "tensor": [{"pattern": o.pattern, **dict(o.changes)} for o in self.overrides],
        }

    def settings_for(self, name: str, base: Settings) -> Settings:
        """Return the settings of one tensor: `base`, changed by every override that matches its name."""
        for override in self.overrides:
            if fnmatch.fnmatchcase(name, override.pattern):
                base = _changed(base, dict(override.changes), override.pattern)
        return base


def load_recipe(path: Path | None, options: dict[str, Any], keep: tuple[str, ...] = ()) -> Recipe:
    """Return the recipe of a TOML file (or none), with the command line's options over its defaults.

    options: settings by name, and "embeddings". keep: patterns of tensors to leave as they are, applied last.
    Raises RecipeError naming the key, what was expected and what was found.
    """
    found: dict[str, Any] = {}
    if path is not None:
        try:
            found = tomllib.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise RecipeError(f"{path}: not readable as TOML: {error}") from None
    _known(found, {"defaults", "tensor"}, f"{path}")
    defaults, tensors = found.get("defaults", {}), found.get("tensor", [])
    if not isinstance(defaults, dict) or not isinstance(tensors, list) or not all(isinstance(t, dict) for t in tensors):
        raise RecipeError(f"{path}: expected a [defaults] table and [[tensor]] tables")
    merged = _with_block({**defaults, **options})
    embeddings = merged.pop("embeddings", KEEP)
    if embeddings not in EMBEDDINGS:
        raise RecipeError(f"embeddings: expected one of {', '.join(EMBEDDINGS)}, found {embeddings!r}")
    overrides = []
    for number, tensor in enumerate(tensors, 1):
        pattern = tensor.get("pattern")
        where = f"{path}: [[tensor]] number {number}"
        if not isinstance(pattern, str):
            raise RecipeError(f'{where}: expected a pattern, such as pattern = "*.down_proj.weight"')
        changes = _with_block({key: value for key, value in tensor.items() if key != "pattern"})
        _changed(Settings(), changes, where)
        overrides.append(Override(pattern, tuple(changes.items())))
    overrides += [Override(pattern, (("method", KEEP),)) for pattern in keep]
    return Recipe(_changed(Settings(), merged, f"{path or 'options'}"), embeddings, tuple(overrides))


def _with_block(given: dict[str, Any]) -> dict[str, Any]:
    """Return settings with the block of their method's paper, where they name such a method and no block."""
    usual = _USUAL_BLOCK.get(str(given.get("method")))
    return given if usual is None or "block" in given else {**given, "block": usual}


def _known(found: dict[str, Any], names: set[str], where: str) -> None:
    for key in found:
        if key not in names:
            raise RecipeError(f"{where}: unknown key {key!r}; known: {', '.join(sorted(names))}")


def _changed(base: Settings, changes: dict[str, Any], where: str) -> Settings:
    # The field is `lam` because `lambda` is a word of Python; recipes write either.
    changes = {key.replace("-", "_").replace("lambda", "lam"): value for key, value in changes.items()}
    _known(changes, {field.name for field in fields(Settings)}, where)
    for key, value in changes.items():
        if not isinstance(value, _TYPES[key]) or (isinstance(value, bool) and bool not in _TYPES[key]):
            kinds = " or ".join(kind.__name__ for kind in _TYPES[key])
            raise RecipeError(f"{where}: {key}: expected {kinds}, found {value!r}")
    return replace(base, **changes)


def check_settings(settings: Settings, name: str, shape: tuple[int, int]) -> None:
    """Raise RecipeError where settings are unknown, out of range or cannot be met by a matrix of this shape."""
    from bincompress.methods import METHODS

    def refuse(text: str) -> None:
        raise RecipeError(f"{name}: {text}")

    if settings.method not in METHODS:
        refuse(f"unknown method {settings.method!r}; known: {', '.join(sorted([*METHODS, KEEP]))}")
    if settings.block not in _BLOCKS:
        refuse(f"block {settings.block!r}: expected one of {', '.join(map(str, _BLOCKS))}")
    if settings.method == "uniform":
        if settings.block == "matrix" or not 1 <= settings.bits <= 8:
            refuse(f"method uniform takes 1 to 8 bits per row or row-block, found {settings.bits} per {settings.block}")
        return
    if settings.method == "dbllm" and settings.block == "matrix":
        refuse("method dbllm takes scales per row or row-block, found block matrix")
    _check_calibrated(settings, refuse)
    if settings.method != "wgm":
        return
    if not 1 <= settings.groups <= 256:
        refuse(f"groups {settings.groups}: expected 1 to 256")
    if settings.solver not in _SOLVERS:
        refuse(f"unknown solver {settings.solver!r}; known: {', '.join(_SOLVERS)}")
    if not 0 <= settings.lam < float("inf"):
        refuse(f"lambda {settings.lam}: expected a number of at least 0")
    rows, cols = shape
    unit = rows * cols if settings.block == "matrix" else cols if settings.block == "row" else int(settings.block)
    if settings.solver == "windowed" and not 1 <= settings.window <= max(1, min(unit, rows * cols) // settings.groups):
        refuse(
            f"window {settings.window}: {settings.groups} groups in a unit of {unit:,} weights need a window of 1 to "
            f"{max(1, unit // settings.groups):,}; try --window {max(1, unit // settings.groups // 8)}"
        )


def _check_calibrated(settings: Settings, refuse: Callable[[str], None]) -> None:
    """Refuse what only works with, or does not work with, error compensation."""
    most = 2 if settings.method == "dbellquant" else _MOST_PLANES
    if not 1 <= settings.plane_count <= most:
        refuse(f"planes {settings.planes}: expected 1 to {most}")
    if not 0 <= settings.epsilon <= 1:
        refuse(f"epsilon {settings.epsilon}: expected 0 to 1")
    if settings.scale_bits not in (8, 16):
        refuse(f"scale bits {settings.scale_bits}: expected 8 or 16")
    if settings.refine < 0:
        refuse(f"refine {settings.refine}: expected at least 0 rounds")
    if not settings.calibrated:
        few = settings.scale_bits == 8
        found = {"--refine": settings.refine, "--scale-bits 8": few, "--planes": settings.planes > 1}
        for option, used in found.items():
            if used:
                refuse(f"{option} is a part of error compensation: give --compensate and --stats too")
        return
    if settings.block == "matrix":
        refuse("error compensation works on rows and row-blocks, not on a whole matrix; choose another --block")
    if settings.method in ("billm", "dbllm") and settings.scale_bits == 8:
        refuse(f"8-bit scales have no sign, and {settings.method}'s coefficients do")
    if settings.method == "wgm":
        if settings.groups not in (1, 2, 4, 8, 16):
            refuse(f"groups {settings.groups}: with error compensation 1, 2, 4, 8 or 16")
        if settings.scale_bits == 8 and settings.groups > 2:
            refuse("8-bit scales are for one or two groups (more have coefficients of both signs)")
        if settings.solver != "exact" or settings.lam:
            refuse("error compensation finds its groups by itself; leave --solver and --lambda out")


def load_kept_weights(path: Path) -> dict[str, tuple[tuple[int, int], ...]]:
    """Read the single weights to keep exactly, one a line: tensor name, row, column ('#' begins a comment)."""
    kept: dict[str, set[tuple[int, int]]] = {}
    try:
        lines = path.read_text("utf-8").splitlines()
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
