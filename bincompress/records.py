"""What travels between the stages of a run: plain frozen records."""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Block = int | Literal["row", "matrix"]


@dataclass(frozen=True)
class TensorSource:
    """Where a tensor lies: bytes offset .. offset + nbytes of a safetensors file, with its dtype and shape."""

    name: str
    dtype: str  # as safetensors writes it: "BF16", "F16", "F32"
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Settings:
    """How one tensor is packed. `method` "keep" leaves it as it is."""

    method: str = "wgm"
    groups: int = 2
    solver: Literal["exact", "greedy", "windowed"] = "exact"
    window: int = 512
    lam: float = 0.0
    lam_normalized: bool = False
    block: Block = 128
    bits: int = 4  # of the uniform method
    planes: int = 0  # of xnor and dbellquant: binary planes, each with a scale of its own; 0: 1 and 2 of them
    scale_bits: Literal[16, 8] = 16
    compensate: bool = False  # round with error compensation under the layer's Hessian
    refine: int = 0  # rounds of scale refit and bit flips after it
    epsilon: float = 0.85  # of dbellquant: what the inputs' size counts in its first scale

    @property
    def plane_count(self) -> int:
        """How many planes xnor or dbellquant make."""
        return self.planes or (2 if self.method == "dbellquant" else 1)

    @property
    def calibrated(self) -> bool:
        """Whether statistics of the layer's inputs are needed."""
        return self.method != "keep" and (self.compensate or self.method in ("billm", "dbellquant"))


@dataclass(frozen=True)
class Inputs:
    """What calibration found of a linear layer's inputs x."""

    name: str
    hessian: NDArray[np.float32]  # (cols, cols): the mean of x x^T
    absmax: NDArray[np.float32]  # (cols,): the greatest |x|
    # (cols,): of a transformation that is folded into the norm before the layer; its columns are multiplied by it.
    channel_scale: NDArray[np.float32] | None = None
    # Where the layers before are binarized already, with x* and r* for what the unquantized model has in that place:
    drift: NDArray[np.float32] | None = None  # (cols, cols): the mean of (x* - x) x^T
    # (rows, cols): of (r* - r) x^T, r the residual stream after the unquantized matrix has added to it; of one that
    # does so, in place of drift.
    lack: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Weight:
    """A matrix as the checkpoint has it: float bit patterns, uint16 (BF16, F16) or uint32 (F32), shape (rows, cols)."""

    bits: NDArray[Any]
    dtype: str

    @property
    def shape(self) -> tuple[int, int]:
        """Rows (out_features) and cols (in_features)."""
        rows, cols = self.bits.shape
        return rows, cols

    @property
    def flat(self) -> NDArray[Any]:
        """The patterns in one dimension, row-major, without a copy."""
        return self.bits.reshape(-1)

    def float32(self, rows: slice = slice(None)) -> NDArray[np.float32]:
        """Return the exact values of these rows."""
        part = self.bits[rows]
        if self.dtype == "BF16":
            return (part.astype(np.uint32) << np.uint32(16)).view(np.float32)
        if self.dtype == "F16":
            return part.view(np.float16).astype(np.float32)
        return part.view(np.float32)


@dataclass(frozen=True)
class Binarized:
    """A matrix as planes and coefficients (the formula of the README's "Store format").

    The coefficient of term t is 2 ** coef_exponent * sum over i of mix[t][i] * coef[i]; without a mix, that of coef[t].
    """

    planes: NDArray[np.uint64]  # (planes, rows, words)
    coef: NDArray[Any]  # float16 or 8-bit floats (stored, rows, blocks), or float32 (stored, 1, 1) for a whole matrix
    terms: tuple[int, ...]  # bit masks over planes, column planes after them
    block: int  # columns per coefficient
    squared_error: float
    squared_norm: float
    nominal_bits: float  # the paper's formula: signs and scales, without which weight is in which group
    groups: int  # most groups in one unit
    coef_exponent: int = 0
    mix: tuple[tuple[float, ...], ...] | None = None
    column_planes: NDArray[np.uint64] = field(default_factory=lambda: np.empty((0, 0), np.uint64))  # (planes, words)
    in_scale: NDArray[np.float32] | None = None  # (cols,): multiplies the formula's columns
    listed_index: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))  # flat, ascending
    listed_value: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))  # exact values
    notes: dict[str, Any] = field(default_factory=dict)  # what a reader of the report should know


@dataclass(frozen=True)
class Shared:
    """The matrices that read one norm's output, whose columns are scaled alike, and the settings that say how."""

    members: tuple[TensorSource, ...]
    settings: Settings


@dataclass(frozen=True)
class Job:
    """One tensor's work: what to read, what to do, where to write. Paths only, so that it can travel."""

    store: str
    name: str
    source: TensorSource
    settings: Settings
    kept: tuple[tuple[int, int], ...] = ()  # single weights kept exactly, (row, column)
    archive: bool = False
    run_id: str = ""
    peak_memory: int = 0  # bytes, as planned; 0: not known
    statistics: str = ""  # the store of what calibration found; empty: not needed
    inputs_hash: str = ""  # of what it found of this tensor's inputs
    shared: Shared | None = None  # of a norm and of the matrices that read it, where a transformation is folded into it


@dataclass(frozen=True)
class JobReport:
    """What came of a job: small, so that it can travel back."""

    name: str
    status: Literal["done", "unchanged", "failed"]
    seconds: float
    bytes_read: int
    report: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    fatal: bool = False  # the others would fail too: a full disk, a folder that cannot be written
    store: str = ""  # where it belongs: one run may fill several stores
    node: str = ""  # the machine that did it, where there are several
