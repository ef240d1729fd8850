"""What does a method declare, so that every other part of the program can use it without knowing its name?"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from bincompress.methods.inputs import Inputs
from bincompress.tensors.forms import Stored
from bincompress.tensors.low_rank import LowRankTensor
from bincompress.tensors.packed import PackedTensor
from bincompress.tensors.weight import Weight

Block = Literal[64, 128, 256, "row", "matrix"]


def option(default: Any, text: str, *, flag: str = "", least: float | None = None, most: float | None = None) -> Any:
    """Return the field of a method's setting.

    text: what it is, for `--help`. flag: of the command line; by default the field's name with dashes. least, most:
    the values that it may have; a field whose type is a Literal may have the values of that.
    """
    return field(default=default, metadata={"text": text, "flag": flag, "least": least, "most": most})


class Size(NamedTuple):
    """What a matrix takes in the store."""

    planes: int  # bits a weight
    coefficients: int  # stored for each row-block, or for the matrix


@dataclass(frozen=True)
class Settings:
    """How one tensor is packed; what a method needs beside the block, it adds in a class of its own."""

    method: ClassVar[str]
    block: Block = option(128, "columns of a row that share scales, a whole row, or the whole matrix")

    @property
    def calibrated(self) -> bool:
        """Whether statistics of the layer's inputs are needed."""
        return False

    @property
    def coefficient_bytes(self) -> int:
        """Bytes of each stored coefficient."""
        return 4 if self.block == "matrix" else 2

    def block_columns(self, cols: int) -> int:
        """Return how many of a row's columns share coefficients."""
        return self.block if isinstance(self.block, int) else cols

    def record(self) -> dict[str, Any]:
        """Return the settings that matter to the method's bytes, as JSON."""
        return {"method": self.method, **self.all_values()}

    def all_values(self) -> dict[str, Any]:
        """Return every setting by name."""
        return self.values(*(one.name for one in fields(self)))

    def values(self, *names: str) -> dict[str, Any]:
        """Return some settings by name."""
        return {name: getattr(self, name) for name in names}

    def problem(self, shape: tuple[int, int]) -> str:
        """Return what is wrong with the settings for a matrix of this shape, beyond single values; empty if nothing."""
        return ""


@dataclass(frozen=True)
class CompensatedSettings(Settings):
    """Settings of a method that can round with error compensation."""

    scale_bits: Literal[8, 16] = option(16, "bits of each stored scale (with error compensation)")
    compensate: bool = option(
        False, "error compensation (GPTQ): spread each column's rounding error over the columns that follow"
    )
    refine: int = option(
        0, "rounds of refinement after error compensation: refit the scales, then flip single bits", least=0
    )

    @property
    def calibrated(self) -> bool:
        """Whether statistics of the layer's inputs are needed."""
        return self.compensate

    @property
    def coefficient_bytes(self) -> int:
        """Bytes of each stored coefficient."""
        return 4 if self.block == "matrix" else self.scale_bits // 8

    def calibrated_record(self, *own: str) -> dict[str, Any]:
        """Return what matters to the bytes with error compensation, as JSON; own: names of the method's settings."""
        shared = self.values("block", "scale_bits", "compensate", "refine")
        return {"method": self.method, **self.values(*own), **shared, "compensate": True}

    def problem(self, shape: tuple[int, int]) -> str:
        """Return what is wrong with the settings for a matrix of this shape, beyond single values; empty if nothing."""
        if self.calibrated and self.block == "matrix":
            return "error compensation works on rows and row-blocks, not on a whole matrix; choose another --block"
        if not self.calibrated and (self.refine or self.scale_bits == 8):
            used = "--refine" if self.refine else "--scale-bits 8"
            return f"{used} is part of error compensation: add --compensate and --stats"
        return ""


@dataclass(frozen=True)
class Keep(Settings):
    """The settings of a tensor that stays as it is."""

    method: ClassVar[str] = "keep"

    def record(self) -> dict[str, Any]:
        """Return what matters to the bytes, as JSON."""
        return {"method": self.method}


KEEP = Keep()


@dataclass(frozen=True)
class Made:
    """What a method makes of a matrix, in whatever form."""

    tensor: Stored
    squared_error: float
    squared_norm: float
    scales: int  # of the whole matrix: a group's, a plane's or another that is stored
    groups: int  # most groups of magnitudes in one row-block
    notes: dict[str, Any] = field(default_factory=dict)  # what a reader of the report should know

    @property
    def nominal_bits(self) -> float:
        """Bits a weight as the grouping paper (arXiv 2509.03054) counts them: see `nominal_bits`."""
        rows, cols = self.tensor.shape
        return nominal_bits(self.scales, self.tensor.scale_bytes, rows * cols, nominal_signs(self.tensor))


@dataclass(frozen=True)
class Binarized(Made):
    """What a method makes of a matrix that is stored as planes and coefficients."""

    tensor: PackedTensor


def nominal_signs(tensor: Stored) -> int:
    """Return the signs that the nominal figure counts: one a weight, or those of both factors in the low-rank form."""
    rows, cols = tensor.shape
    return tensor.rank * (rows + cols) if isinstance(tensor, LowRankTensor) else rows * cols


def nominal_bits(scales: int, scale_bytes: int, weights: int, signs: int | None = None) -> float:
    """Return the grouping paper's bits a weight, for every method: its signs, and the scales at their width.

    signs: how many there are; None: one a weight. It leaves out which scales a weight has. A whole matrix's scales,
    stored in 4 bytes, count 16 bits as in the paper.
    """
    return (1.0 if signs is None else signs / weights) + 8 * min(scale_bytes, 2) * scales / weights


class Recognized(NamedTuple):
    """What a method that gives every weight exactly would make of a matrix."""

    nbytes: int  # of planes and coefficients
    planes: int
    levels: str  # in words


class Binarize(Protocol):
    """How a matrix becomes planes, given the method's own settings; inputs: None without calibration."""

    def __call__(self, weight: Weight, settings: Any, inputs: Inputs | None = None, /) -> Any:
        """Return what is `Made` of it, a `Binarized` by most methods; raises TensorError."""


@dataclass(frozen=True)
class Method:
    """One way from a matrix to planes and coefficients. All that the program knows of it stands here.

    Functions take the method's own settings where they are named so.
    """

    summary: str  # one line, for tables and --help
    settings: type[Settings]  # whose fields are its options, on the command line and in recipes
    binarize: Binarize
    size: Callable[[Any], Size]

    # Bytes of all arrays of a matrix of so many rows and columns, without checksums; None: `size` tells them.
    nbytes: Callable[[Any, int, int], int] | None = None
    # Whether its tensors have the low-rank form, which programs that read version 1 of the store do not know.
    low_rank: bool = False
    # Whether binarize raises FloatingPointError by itself where a weight is not finite, at no cost.
    finds_nonfinite: Callable[[Any], bool] = lambda settings: False
    # Bytes a weight beside its own and its planes' bytes, at the height of a job, for a source's dtype.
    scratch_bytes: Callable[[Any, str], float] = lambda settings, dtype: 0.6
    # Other settings among which bits can be spread for a tensor that has these; empty: it keeps its settings.
    trials: Callable[[Any], Sequence[CompensatedSettings]] = lambda settings: ()
    # The scale of the input channels that all matrices share which read one norm; None: it scales none.
    channel_scale: Callable[[Sequence[Weight], Inputs, Any], NDArray[np.float32]] | None = None
    # What `--embeddings` offers: settings by the name of the choice.
    embeddings: Mapping[str, Settings] = field(default_factory=dict)
    # What it makes of a matrix of this shape without any loss, told from some of its rows; None: it is not for it. Such
    # a method is used where nothing else was asked for, and binarize raises LossError where a weight differs.
    recognize: Callable[[Weight, tuple[int, int]], Recognized | None] | None = None
    # Whether planes that are one for all rows choose among its coefficients; such planes are not trained.
    column_planes: bool = False
    # Whether its tensors count among the binary ones in totals (embeddings of evenly spaced levels do not).
    binary: bool = True
    # What a report says of planes (planes, rows, words) of so many columns.
    describe_planes: Callable[[NDArray[np.uint64], int], dict[str, Any]] = lambda planes, cols: {}
    # The planes nearest to a weight for stored coefficients (stored, rows, blocks); None: they cannot be chosen anew.
    choose_planes: Callable[[Weight, NDArray[np.float32], int], NDArray[np.uint64]] | None = None
    # Histograms before and after a transformation that its reports hold, by name, with their reach to both sides.
    histograms: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What the method is called."""
        return self.settings.method

    def options(self) -> dict[str, "Option"]:
        """Return the method's settings by name."""
        hints = get_type_hints(self.settings)
        return {one.name: Option.of(one, hints[one.name]) for one in fields(self.settings)}


@dataclass(frozen=True)
class Option:
    """A setting as the command line and recipes see it."""

    name: str
    flag: str  # of the command line
    text: str
    default: Any
    kind: type[Any]  # bool, int, float or str, or object where the choices have several
    choices: tuple[Any, ...]  # empty: any value of its kind within its limits
    least: float | None
    most: float | None

    @classmethod
    def of(cls, one: "Field[Any]", hint: Any) -> "Option":
        """Return the option of a field of a settings class with its type."""
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        kinds = {type(choice) for choice in choices} or {hint}
        kind = kinds.pop() if len(kinds) == 1 else object
        if kind not in (bool, int, float, str, object) or one.default is MISSING or "text" not in one.metadata:
            raise TypeError(f"setting {one.name}: expected `name: bool, int, float, str or Literal = option(...)`")
        more = one.metadata
        flag = more["flag"] or "--" + one.name.replace("_", "-")
        return cls(one.name, flag, more["text"], one.default, kind, choices, more["least"], more["most"])

    def problem(self, value: Any) -> str:
        """Return what is wrong with a value, as "expected ..., found ..."; empty if nothing."""
        found = f", found {value!r:.60}"
        if self.choices:
            good = any(value == choice and type(value) is type(choice) for choice in self.choices)
            return "" if good else f"expected one of {', '.join(map(str, self.choices))}{found}"
        takes = (int, float) if self.kind is float else (self.kind,)
        if not isinstance(value, takes) or (isinstance(value, bool) and self.kind is not bool):
            return f"expected {self.kind.__name__}{found}"
        low = self.least is not None and not value >= self.least
        high = self.most is not None and not value <= self.most
        if not (low or high):
            return ""
        limits = f"at least {self.least:g}" if self.most is None else f"{self.least or 0:g} to {self.most:g}"
        return f"expected {limits}{found}"
