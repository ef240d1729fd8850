"""How do the two factors of a low-rank matrix learn? Each sign keeps a latent number; what is multiplied is its sign.

Forward: W = diag(row) left diag(middle) right^T diag(column), left and right the signs of latents. Backward: the
gradient of a sign goes to its latent as if there were no rounding (straight-through estimator, Bengio et al. 2013), and
exactly to the scales. At the end latents are dropped: signs and scales are stored as ever.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bincompress.methods.rounding.coefficients import to_float16
from bincompress.tensors.low_rank import LowRankTensor, packed_signs, signs

_FARTHEST = 2.0  # latents beyond this, in means of a factor's magnitudes, are pulled further out by no gradient
_INSIDE = 0.1  # how far from zero a latent begins whose sign is another one than its least squares value has
_RIDGE = 1e-2  # share of the mean diagonal, where least squares values are sought


@dataclass(frozen=True)
class FactorsBeginning:
    """A matrix as it is stored, with what its latents begin as."""

    name: str
    tensor: LowRankTensor
    source: NDArray[np.float32]  # (rows, cols): the unquantized weights
    latents: NDArray[np.float16] | None = None  # (rows + cols, rank): those that an earlier training left


class TrainedFactors:
    """A matrix whose factors and scales are trained.

    `latent` (rows + cols, rank) holds those of the left factor and of the right one, in means of their magnitudes;
    `moved` (rows + rank + cols,) is what each scale has moved, in units of its kind's root mean square.
    """

    def __init__(self, begin: FactorsBeginning, device: torch.device) -> None:
        self.name = begin.name
        self._tensor = tensor = begin.tensor
        rows, cols = tensor.shape
        self._sizes = [rows, tensor.rank, cols]
        kinds = [
            torch.from_numpy(scale.astype(np.float32)).to(device)
            for scale in (tensor.row_scale, tensor.rank_scale, tensor.column_scale)
        ]
        kinds[1] = kinds[1] * 2.0**tensor.exponent
        self._base = torch.cat(kinds)
        self._unit = torch.cat([kind.square().mean().sqrt().clamp_min(1e-12).expand_as(kind) for kind in kinds])
        self._listed = torch.from_numpy(tensor.listed_index.astype(np.int64)).to(device)
        self._listed_value = torch.from_numpy(tensor.listed_value.copy()).to(device)
        self.moved = torch.zeros_like(self._base, requires_grad=True)
        stored = torch.from_numpy(
            np.concatenate([signs(tensor.left, rows).T, signs(tensor.right, cols).T]).astype(np.float32)
        ).to(device)
        if begin.latents is not None:
            latent = torch.from_numpy(begin.latents.astype(np.float32)).to(device)
        else:
            latent = self._least_squares(stored, torch.from_numpy(np.array(begin.source, np.float32)).to(device))
        # Half floats may have lost the sign of the smallest.
        self.latent = torch.where(latent * stored > 0, latent, _INSIDE * stored).requires_grad_()

    @property
    def names(self) -> list[str]:
        """The matrix's name, as groups of matrices have several."""
        return [self.name]

    def parameters(self) -> dict[str, Tensor]:
        """Return what is trained by what it is."""
        return {"coefficients": self.moved, "planes": self.latent}

    def weights(self) -> dict[str, Tensor]:
        """Return the matrix (rows, cols), float32, without gradient."""
        with torch.no_grad():
            left, right, (row, middle, column) = *self._signs(), self._scales()
            weight = (left * middle) @ right.T * row[:, None] * column
            if self._listed.numel():
                weight.view(-1)[self._listed] = self._listed_value
            return {self.name: weight}

    @torch.no_grad()
    def backward(self, gradients: Mapping[str, Tensor]) -> None:
        """Add the gradient of the matrix (rows, cols), which is overwritten, to those of latents and scales."""
        gradient = gradients[self.name].float()
        if self._listed.numel():
            gradient.view(-1)[self._listed] = 0.0
        left, right, (row, middle, column) = *self._signs(), self._scales()
        pull = gradient @ (right * column[:, None])  # (rows, rank): what each left sign feels, before its own scales
        of_left = pull * middle
        of_row = (of_left * left).sum(1)
        of_left *= row[:, None]
        scaled_left = left * row[:, None]
        of_middle = (pull * scaled_left).sum(0)
        of_right = (gradient.T @ scaled_left) * middle
        of_column = (of_right * right).sum(1)
        of_right *= column[:, None]
        found = torch.cat([of_left, of_right])
        outside = (self.latent.abs() > _FARTHEST) & (found * self.latent < 0)
        self.latent.grad = found.masked_fill_(outside, 0.0)
        self.moved.grad = torch.cat([of_row, of_middle, of_column]) * self._unit

    @torch.no_grad()
    def packed(self) -> dict[str, LowRankTensor]:
        """Return the matrix as it is now, in the form that is stored."""
        left, right = self._signs()
        numbers, exponents = [], []
        for scale in self._scales():
            rounded, exponent = to_float16(scale.double().cpu().numpy())
            numbers.append(rounded)
            exponents.append(exponent)
        planes = [packed_signs(np.ascontiguousarray(part.T.cpu().numpy())) for part in (left, right)]
        made = replace(
            self._tensor, left=planes[0], right=planes[1], row_scale=numbers[0], rank_scale=numbers[1],
            column_scale=numbers[2], exponent=sum(exponents),
        )  # fmt: skip
        return {self.name: made}

    @torch.no_grad()
    def codes(self) -> Tensor:
        """Return the signs as they are now, uint8 (rows + cols, rank)."""
        return (self.latent > 0).to(torch.uint8)

    @torch.no_grad()
    def latents(self) -> dict[str, NDArray[np.float16]]:
        """Return the latents as they are now."""
        return {self.name: self.latent.to(torch.float16).cpu().numpy()}

    def _signs(self) -> tuple[Tensor, Tensor]:
        found = torch.where(self.latent > 0, 1.0, -1.0)
        left, right = found.split([self._sizes[0], self._sizes[2]])
        return left, right

    def _scales(self) -> list[Tensor]:
        return list((self._base + self._unit * self.moved).detach().split(self._sizes))

    def _least_squares(self, stored: Tensor, source: Tensor) -> Tensor:
        """Return real factors, each the best for the other's signs: a sign is the surer the larger it is there."""
        left, right = stored.split([self._sizes[0], self._sizes[2]])
        row, middle, column = self._base.split(self._sizes)
        found = []
        for own, other, weights in (
            (left * row[:, None], right * column[:, None] * middle, source),
            (right * column[:, None], left * row[:, None] * middle, source.T),
        ):
            gram = other.T @ other
            share = _RIDGE * gram.diagonal().mean().clamp_min(1e-30)
            gram.diagonal().add_(share)
            real = torch.linalg.solve(gram, (weights @ other + share * own).T).T
            # Positive where it agrees with the sign as it is stored; scales themselves may be negative.
            agreement = real * own.sign()
            found.append(agreement / real.abs().mean(1, keepdim=True).clamp_min(1e-30))
        return torch.cat(found) * stored


def flat(tensor: LowRankTensor) -> tuple[NDArray[np.uint64], NDArray[np.float16]]:
    """Return a tensor's planes and its scales, each in one dimension, as files of trained layers hold them."""
    scales = [tensor.row_scale, tensor.rank_scale, tensor.column_scale]
    return np.concatenate([tensor.left.reshape(-1), tensor.right.reshape(-1)]), np.concatenate(scales)


def from_flat(before: LowRankTensor, planes: NDArray[np.uint64], numbers: NDArray[Any], exponent: int) -> LowRankTensor:
    """Return a tensor with other planes and scales, as `flat` gives them; raises ValueError where they do not fit."""
    own_planes, own_numbers = flat(before)
    if planes.shape != own_planes.shape or numbers.shape != own_numbers.shape or numbers.dtype != np.float16:
        raise ValueError(f"planes {planes.shape} and scales {numbers.shape} do not fit rank {before.rank}")
    left, right = np.split(planes, [before.left.size])
    row, rank, column = np.split(numbers, np.cumsum([before.row_scale.size, before.rank]))
    return replace(
        before, left=left.reshape(before.left.shape), right=right.reshape(before.right.shape), row_scale=row,
        rank_scale=rank, column_scale=column, exponent=exponent,
    )  # fmt: skip
