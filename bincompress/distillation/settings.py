"""What can be chosen of a distillation, and what is refused?"""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, cast

from bincompress.errors import BincompressError


class DistillError(BincompressError):
    """A distillation cannot begin or go on."""


_ACTIVATION_BITS = (6, 8, 16)
_BITS_EXPECTED = "6, 8 or 16"


class Checked:
    """Settings that refuse values by the names of their options, and can be compared with another run's."""

    _OPTIONS: ClassVar[dict[str, str]] = {}  # of settings whose options have other names

    def _check(self, name: str, expected: str, holds: bool) -> None:
        if not holds:
            raise DistillError(f"{self.option(name)} {getattr(self, name)}: expected {expected}")

    @classmethod
    def option(cls, name: str) -> str:
        """Return the option of the command line for a setting."""
        return "--" + cls._OPTIONS.get(name, name).replace("_", "-")

    def check_context(self, most: int) -> None:
        """Raise DistillError for windows that are longer than the model's limit."""
        context = getattr(self, "context")  # noqa: B009 (every kind of settings has one)
        self._check("context", f"at most {most}, the model's limit", context <= most)

    def record(self) -> dict[str, Any]:
        """Return the settings as JSON, for the store."""
        return asdict(cast(Any, self))

    def difference(self, other: dict[str, Any]) -> str:
        """Return the first setting that another run's record has otherwise, with both values; empty if none."""
        for field in fields(cast(Any, self)):
            found, wanted = other.get(field.name), getattr(self, field.name)
            if found != wanted:
                return f"--{field.name.replace('_', '-')} was {found!r} and is {wanted!r} now"
        return ""


@dataclass(frozen=True)
class DistillSettings(Checked):
    """How the coefficients of a store are trained; all of it decides the result."""

    steps: int = 500
    batch: int = 4  # windows of a step
    accumulate: int = 1  # parts in which a batch is worked on, one after the other
    context: int = 512  # tokens of a window
    lr: float = 0.01  # share of a row's typical coefficient that a step may change
    warmup: float = 0.05  # share of the steps
    gamma: float = 0.5  # the teacher's share in how ambiguous a token is
    lam: float = 0.0  # weight of ambiguous tokens; 0 is plain distillation
    norms: bool = False
    planes: bool = False  # train planes too, and every vector of the layers
    lr_planes: float = 0.003  # share of a matrix's standard deviation that a step may move a latent
    activation_bits: Literal[6, 8, 16] = 16  # of what packed matrices read while they are trained; 16: not rounded
    rechoose_planes: bool = False
    dtype: Literal["float32", "bf16"] = "float32"
    validation_share: float = 0.02
    evaluate_every: int = 50
    patience: int = 5  # evaluations without a better one before it stops
    written_tokens: int = 0  # that the teacher writes, to be trained on beside the text or in its place
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "evaluate_every", "patience"):
            self._check(name, "at least 1", getattr(self, name) >= 1)
        self._check("context", "at least 2", self.context >= 2)
        if self.planes and self.rechoose_planes:
            raise DistillError("--rechoose-planes is for planes that are not trained")
        self._check("accumulate", f"a divisor of the batch of {self.batch}", self.batch % self.accumulate == 0)
        for name in ("lr", "lr_planes"):
            self._check(name, "a number above 0", 0 < getattr(self, name) < math.inf)
        self._check("lam", "a number of at least 0", 0 <= self.lam < math.inf)
        for name in ("seed", "written_tokens"):
            self._check(name, "at least 0", getattr(self, name) >= 0)
        for name in ("gamma", "warmup"):
            self._check(name, "0 to 1", 0 <= getattr(self, name) <= 1)
        self._check("activation_bits", _BITS_EXPECTED, self.activation_bits in _ACTIVATION_BITS)
        self._check("validation_share", "above 0 and at most 0.5", 0 < self.validation_share <= 0.5)

    @property
    def advice(self) -> str:
        """What to change where memory runs out."""
        return (
            f"{self.batch // self.accumulate} windows of {self.context} tokens were trained at once: raise "
            f"--accumulate (a divisor of --batch {self.batch}) or lower --context"
        )


HELD_OUT = 8  # windows on which layers are judged


@dataclass(frozen=True)
class LayerSettings(Checked):
    """How the layers of a model are trained one after the other; all of it decides the result."""

    windows: int = 512  # of the text, on which every layer is trained
    context: int = 256  # tokens of a window
    passes: int = 4  # over the windows
    batch: int = 4  # windows of a step
    lr: float = 0.01  # share of a row's typical coefficient that a step may change
    lr_planes: float = 0.01  # share of a matrix's standard deviation that a step may move a latent
    dtype: Literal["float32", "bf16"] = "float32"
    activation_bits: Literal[6, 8, 16] = 16  # of what packed matrices read while they are trained; 16: not rounded
    seed: int = 0
    inputs: Literal["trained", "unquantized"] = "trained"  # of which model's layers a layer reads the output
    finish_passes: int = 1  # with unquantized inputs: over the windows, layer after layer, to end with

    _OPTIONS: ClassVar[dict[str, str]] = {
        name: f"layer_{name}" for name in ("context", "batch", "lr", "lr_planes", "inputs")
    }

    def __post_init__(self) -> None:
        for name in ("windows", "passes", "batch"):
            self._check(name, "at least 1", getattr(self, name) >= 1)
        self._check("finish_passes", "at least 0", self.finish_passes >= 0)
        self._check("activation_bits", _BITS_EXPECTED, self.activation_bits in _ACTIVATION_BITS)
        self._check("inputs", "trained or unquantized", self.inputs in ("trained", "unquantized"))
        self._check("context", "at least 2", self.context >= 2)
        self._check("seed", "at least 0", self.seed >= 0)
        for name in ("lr", "lr_planes"):
            self._check(name, "a number above 0", 0 < getattr(self, name) < math.inf)
