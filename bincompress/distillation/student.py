"""How do stored planes and coefficients become weights that can be trained?

Here planes are fixed (`bincompress.distillation.planes` trains them too). What is trained is each stored coefficient's
distance from where it began, in units of its row's typical coefficient, so that matrices and rows of different
magnitude learn alike.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bincompress.distillation.settings import DistillError
from bincompress.methods.rounding.codebook import Rounding
from bincompress.methods.rounding.coefficients import to_float16
from bincompress.store.store import Store
from bincompress.tensors.float8 import from_float8, to_float8
from bincompress.tensors.forms import is_low_rank
from bincompress.tensors.packed import PackedTensor

_MOST_TERMS = 256  # each takes a pass over the weights


@dataclass(frozen=True)
class StoredMatrix:
    """A packed tensor as the store has it, with the method that made it."""

    name: str
    method: str
    tensor: PackedTensor

    @classmethod
    def read(cls, store: Store, name: str) -> "StoredMatrix":
        """Read a packed tensor; raises DamagedError, StoreError or DistillError."""
        attributes = store.complete_attributes(name)
        if is_low_rank(attributes):
            raise DistillError(
                f"{name}: is stored in low-rank form, whose scales are trained with its factors: "
                "`bincompress train --start STORE` trains both"
            )
        method, terms = str(attributes["method"]), len(attributes["terms"])
        if terms > _MOST_TERMS:
            raise DistillError(
                f"{name}: has {terms:,} terms, expected at most {_MOST_TERMS} to be trained: begin with a store of "
                "fewer groups"
            )
        return cls(name, method, store.read_packed(name, check_hashes=True))

    def coefficients(self) -> NDArray[np.float32]:
        """Return the stored coefficients (stored, rows or 1, blocks or 1) as values."""
        numbers, exponent = self.tensor.numbers, self.tensor.exponent
        if numbers.dtype == np.uint8:
            return from_float8(numbers, exponent)
        return np.ldexp(numbers.astype(np.float32), exponent)

    def rounded(self, values: NDArray[np.float32]) -> tuple[NDArray[Any], int]:
        """Return coefficients in the form in which they are stored, with their exponent."""
        dtype, exponent = self.tensor.numbers.dtype, self.tensor.exponent
        if dtype == np.uint8:
            return to_float8(np.ldexp(values.astype(np.float64), -exponent)), exponent
        if dtype == np.float16:
            return to_float16(values.astype(np.float64))
        return np.ldexp(values, -exponent).astype(dtype), exponent

    def with_scale_bits(self, bits: int) -> "StoredMatrix":
        """Return the same planes with coefficients stored in 16 or 8 bits, rounded anew where that changes them."""
        tensor = self.tensor
        if tensor.numbers.dtype != (np.uint8 if bits == 16 else np.float16):
            return self
        values = self.coefficients().astype(np.float64)
        if bits == 8:
            rounding = Rounding(8, float(np.abs(values).max(initial=0.0)))
            return self._with(to_float8(np.ldexp(values, -rounding.exponent)), rounding.exponent)
        return self._with(*to_float16(values))

    def _with(self, numbers: NDArray[Any], exponent: int) -> "StoredMatrix":
        return replace(self, tensor=replace(self.tensor, numbers=numbers, exponent=exponent))


class TrainedMatrix:
    """A matrix whose coefficients are trained: `weight` builds it, `backward` takes its gradient to them."""

    def __init__(self, stored: StoredMatrix, device: torch.device) -> None:
        self.stored = stored
        tensor, cols = stored.tensor, stored.tensor.shape[1]
        self._block = tensor.block if tensor.numbers.shape[2] > 1 else cols
        self._blocks = -(-cols // self._block)
        self.set_planes(tensor.planes, device)
        self._columns = [self._blocked(_signs(plane[None], cols).to(device)) for plane in tensor.column_planes]
        self._base = base = torch.from_numpy(stored.coefficients().copy()).to(device)
        self._unit = typical_of_rows(base)
        self._mix = None if tensor.mix is None else torch.tensor(tensor.mix, device=device)
        self._in_scale = None if tensor.in_scale is None else torch.from_numpy(tensor.in_scale.copy()).to(device)
        self._listed = torch.from_numpy(tensor.listed_index.astype(np.int64)).to(device)
        self._listed_value = torch.from_numpy(tensor.listed_value.copy()).to(device)
        self._power = None
        if tensor.numbers.dtype == np.uint8:
            self._power = torch.tensor(2.0**tensor.exponent, device=device)
        self.moved = torch.zeros_like(base, requires_grad=True)  # the trained parameter

    def parameters(self) -> dict[str, Tensor]:
        """Return what is trained by what it is."""
        return {"coefficients": self.moved}

    def packed(self) -> PackedTensor:
        """Return the matrix as it is now, in the form that is stored."""
        numbers, exponent = self.stored.rounded(self.values())
        return replace(self.stored.tensor, planes=self.planes, numbers=numbers, exponent=exponent)

    def set_planes(self, planes: NDArray[np.uint64], device: torch.device) -> None:
        """Take other planes (planes, rows, words)."""
        cols = self.stored.tensor.shape[1]
        self.planes = planes
        self._rows = [self._blocked(_signs(plane, cols).to(device)) for plane in planes]

    def coefficients(self) -> Tensor:
        """Return the stored coefficients as they are now, (stored, rows or 1, blocks or 1), with gradient."""
        values = self._base + self._unit * self.moved
        return values if self._power is None else nearest_float8(values, self._power)

    def values(self) -> NDArray[np.float32]:
        """Return the stored coefficients as they are now."""
        found: NDArray[np.float32] = self.coefficients().detach().cpu().numpy()
        return found

    def _of_terms(self) -> Tensor:
        stored = self.coefficients()
        return stored if self._mix is None else torch.einsum("ti,irb->trb", self._mix, stored)

    def weight(self) -> Tensor:
        """Return the matrix (rows, cols), float32, without gradient."""
        with torch.no_grad():
            rows, cols = self.stored.tensor.shape
            result = torch.zeros(rows, self._blocks, self._block, device=self._base.device)
            for coef, signs in self._parts(self._of_terms()):
                result.addcmul_(signs.expand_as(result).to(result.dtype), coef[:, :, None].expand_as(result))
            weight = result.view(rows, -1)[:, :cols].contiguous()
            if self._in_scale is not None:
                weight *= self._in_scale
            weight.view(-1)[self._listed] = self._listed_value
        return weight

    def backward(self, gradient: Tensor) -> None:
        """Add a gradient of the matrix (rows, cols), which is overwritten, to that of the coefficients."""
        gradient.view(-1)[self._listed] = 0.0
        if self._in_scale is not None:
            gradient *= self._in_scale
        blocked = self._blocked(gradient)
        terms = self._of_terms()
        own = torch.stack([(blocked * signs).sum(-1) for _, signs in self._parts(terms.detach())])
        terms.backward(own if terms.shape[1] > 1 else own.sum(1, keepdim=True))

    def _parts(self, terms: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every term's coefficients (rows or 1, blocks) and product of planes (rows or 1, blocks, block)."""
        planes = [*self._rows, *self._columns]
        for coef, mask in zip(terms, self.stored.tensor.terms, strict=True):
            signs = torch.ones(1, 1, 1, dtype=torch.int8, device=terms.device)
            for number, plane in enumerate(planes):
                if mask >> number & 1:
                    signs = plane if signs.numel() == 1 else signs * plane
            yield coef, signs

    def _blocked(self, matrix: Tensor) -> Tensor:
        """Return (rows, cols) as (rows, blocks, block), with zeros behind the last column."""
        missing = self._blocks * self._block - matrix.shape[1]
        if missing:
            matrix = torch.nn.functional.pad(matrix, (0, missing))
        return matrix.view(matrix.shape[0], self._blocks, self._block)


def typical_of_rows(base: Tensor) -> Tensor:
    """Return the unit in which each row's coefficients (stored, rows or 1, blocks or 1) move, (1, rows or 1, 1)."""
    unit = base.square().mean((0, 2), keepdim=True).sqrt()
    return torch.where(unit > 0, unit, unit.mean().clamp_min(1e-12))


def nearest_float8(values: Tensor, power: Tensor) -> Tensor:
    """Return the values as 8-bit floats times `power` will have them; the gradient is as if rounding were not there.

    8-bit coefficients are coarse, so what is trained is what will be stored.
    """
    levels, middle = _float8_levels(values.device)
    rounded = levels[torch.bucketize(values.detach() / power, middle)] * power
    return values + (rounded - values.detach())


@functools.cache
def _float8_levels(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the 256 values that an 8-bit coefficient can have, and the middles between them."""
    levels = torch.from_numpy(from_float8(np.arange(256, dtype=np.uint8), 0)).to(device)
    return levels, (levels[1:] + levels[:-1]) / 2


def _signs(plane: NDArray[np.uint64], cols: int) -> Tensor:
    """Return a plane (rows, words) as +1 and -1, int8 (rows, cols)."""
    bits = np.unpackbits(np.ascontiguousarray(plane).view(np.uint8), axis=1, count=cols, bitorder="little")
    return torch.from_numpy((bits.astype(np.int8) << 1) - 1)
