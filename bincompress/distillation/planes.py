"""How do planes learn? Each weight keeps a latent number; what is multiplied is the stored level nearest to it.

Forward: a latent becomes the nearest of the levels that the planes and coefficients of its row-block can give.
Backward: the gradient of the level goes to the latent as if rounding were not there (straight-through estimator,
Bengio et al. 2013), and exactly to the coefficients. At the end latents are dropped; planes and coefficients are
stored as ever.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bincompress.distillation.fused import fused
from bincompress.distillation.settings import DistillError
from bincompress.distillation.student import StoredMatrix, nearest_float8, typical_of_rows
from bincompress.methods import Settings, method_named
from bincompress.methods.rounding.codebook import Codebook
from bincompress.tensors.forms import is_low_rank
from bincompress.tensors.packed import PackedTensor
from cpu_kernels.quantize.latents import latent_gradients, levels_of_latents
from cpu_kernels.quantize.packing import pack_codes, words_for

_MOST_PLANES = 4  # 16 levels; every level takes a pass over the weights
_INSIDE = 0.1  # of a cell: how far from its edge a latent begins whose weight lies in another cell


@dataclass(frozen=True)
class Beginning:
    """A matrix as it is stored, with what its latents begin as."""

    stored: StoredMatrix
    source: NDArray[np.float32]  # (rows, cols): the unquantized weights, which are the latents within their cells
    latents: NDArray[np.float16] | None = None  # (units, block): those that an earlier training left, in their place


def form_of(stored: StoredMatrix) -> tuple[Any, ...]:
    """Return what must be equal for matrices to be trained as one."""
    tensor = stored.tensor
    return len(tensor.planes), tensor.terms, tensor.mix, _block(tensor), tensor.numbers.dtype.str


class TrainedPlanes:
    """Matrices of one form whose planes and coefficients are trained, as one: a GPU has few and large steps to do.

    A unit is what shares coefficients, a row-block; the units of all matrices follow each other. `latent` (units,
    block) is measured in its matrix's standard deviation and `moved` (stored coefficients, units) in its row's typical
    coefficient, so that matrices and rows of different magnitude learn alike.
    """

    def __init__(self, beginnings: Sequence[Beginning], device: torch.device) -> None:
        """Take matrices of one form."""
        self._parts = [_Part(each, device) for each in beginnings]
        tensor = beginnings[0].stored.tensor
        features = Codebook(len(tensor.planes), tensor.terms, tensor.mix).features
        self._features = torch.from_numpy(features).to(device)
        self._base = torch.cat([part.base for part in self._parts], 1)
        self._unit = torch.cat([part.unit for part in self._parts], 1)
        self._power = None
        if tensor.numbers.dtype == np.uint8:
            self._power = torch.cat([part.power for part in self._parts])
        # Coefficients of a whole matrix are those of many units.
        owners = _owners(self._parts, device)
        self._owner = None if owners.numel() == self._base.shape[1] else owners
        self._deviation = torch.cat([part.deviation for part in self._parts])
        self.moved = torch.zeros_like(self._base, requires_grad=True)
        self._ascending = torch.empty(0)
        latent = torch.cat([part.begin for part in self._parts])
        codes = torch.cat([part.codes for part in self._parts])
        with torch.no_grad():
            self.latent = self._into_cells(latent, codes).requires_grad_()
        for part in self._parts:
            part.forget_beginning()

    @property
    def names(self) -> list[str]:
        """The matrices' names, in their order."""
        return [part.stored.name for part in self._parts]

    def parameters(self) -> dict[str, Tensor]:
        """Return what is trained by what it is."""
        return {"coefficients": self.moved, "planes": self.latent}

    def weights(self) -> dict[str, Tensor]:
        """Return the matrices (rows, cols), float32, without gradient."""
        self._ascending = self._levels().sort(0).values
        with torch.no_grad():
            found = _nearest(self.latent, self._ascending, self._thresholds(self._ascending))
            return {part.stored.name: part.finished(own) for part, own in self._split(found)}

    def backward(self, gradients: Mapping[str, Tensor]) -> None:
        """Add gradients of the matrices (rows, cols), which are overwritten, to those of latents and coefficients.

        They are of the last `weights`; parameters have not changed since.
        """
        of_units = torch.cat([part.of_formula(gradients[part.stored.name]) for part in self._parts])
        ascending = self._ascending
        fixed = ascending.detach()
        margin = (fixed[1:] - fixed[:-1])[[0, -1]] * (1.0 if len(fixed) == 2 else 0.5)
        limits = torch.stack([fixed[0] - margin[0], fixed[-1] + margin[1]]) / self._deviation
        latent, sums = _gradients(self.latent.detach(), of_units, self._thresholds(fixed), limits)
        self.latent.grad = latent.mul_(self._deviation[:, None])
        ascending.backward(sums - torch.cat([sums[1:], torch.zeros_like(sums[:1])]))

    @torch.no_grad()
    def packed(self) -> dict[str, PackedTensor]:
        """Return the matrices as they are now, in the form that is stored."""
        values, found = self.coefficients(), {}
        done = 0
        for part, codes in self._split(self.codes()):
            stored, count = part.stored, part.base.shape[1]
            own = values[:, done : done + count].reshape(stored.tensor.numbers.shape)
            done += count
            numbers, exponent = stored.rounded(own.cpu().numpy())
            planes = part.planes_of(codes, len(stored.tensor.planes))
            found[stored.name] = replace(stored.tensor, planes=planes, numbers=numbers, exponent=exponent)
        return found

    @torch.no_grad()
    def codes(self) -> Tensor:
        """Return the codes that latents have now, uint8 (units, block): bit p is that of plane p."""
        ascending, order = self._levels().sort(0)
        place = torch.zeros(self.latent.shape, dtype=torch.int64, device=self.latent.device)
        for threshold in self._thresholds(ascending):
            place += self.latent > threshold[:, None]
        return order.T.gather(1, place).to(torch.uint8)

    @torch.no_grad()
    def latents(self) -> dict[str, NDArray[np.float16]]:
        """Return the latents of every matrix as they are now."""
        return {part.stored.name: own.to(torch.float16).cpu().numpy() for part, own in self._split(self.latent)}

    def coefficients(self) -> Tensor:
        """Return the stored coefficients as they are now, (stored, units or matrices), with gradient."""
        values = self._base + self._unit * self.moved
        return values if self._power is None else nearest_float8(values, self._power)

    def _levels(self) -> Tensor:
        """Return the levels of every unit by code, (codes, units), with gradient."""
        levels = self._features @ self.coefficients()
        return levels if self._owner is None else levels[:, self._owner]

    def _thresholds(self, ascending: Tensor) -> Tensor:
        """Return the middles between ascending levels, in the latents' units."""
        return (ascending[1:] + ascending[:-1]) / (2 * self._deviation)

    def _into_cells(self, latent: Tensor, codes: Tensor) -> Tensor:
        """Return latents moved into the cells of their stored codes where they lie elsewhere."""
        ascending, order = self._levels().sort(0)
        place = order.argsort(0).T.gather(1, codes.long())
        thresholds = self._thresholds(ascending)
        inside = _INSIDE * (ascending[1:] - ascending[:-1]) / self._deviation
        infinite = torch.full_like(thresholds[:1], torch.inf)

        def edges(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
            of_cells = torch.cat([-infinite, low]), torch.cat([high, infinite])
            below, above = (edge.T.gather(1, place) for edge in of_cells)
            return below, above

        low, high = edges(thresholds, thresholds)
        within = (latent > low) & (latent <= high)
        return torch.where(within, latent, latent.clamp(*edges(thresholds + inside, thresholds - inside)))

    def _split(self, of_units: Tensor) -> Iterator[tuple["_Part", Tensor]]:
        yield from zip(self._parts, of_units.split([part.units for part in self._parts]), strict=True)


class _Part:
    """One matrix of several that are trained as one."""

    def __init__(self, begin: Beginning, device: torch.device) -> None:
        self.stored = begin.stored
        tensor = begin.stored.tensor
        rows, cols = tensor.shape
        self.block = _block(tensor)
        self.blocks = -(-cols // self.block)
        self.units = rows * self.blocks
        base = torch.from_numpy(begin.stored.coefficients().copy()).to(device)
        self.unit = typical_of_rows(base).expand_as(base).reshape(len(base), -1)
        self.base = base.reshape(len(base), -1)
        self.power = torch.full((self.base.shape[1],), 2.0**tensor.exponent, device=device)
        self._in_scale = None if tensor.in_scale is None else torch.from_numpy(tensor.in_scale.copy()).to(device)
        self._listed = torch.from_numpy(tensor.listed_index.astype(np.int64)).to(device)
        self._listed_value = torch.from_numpy(tensor.listed_value.copy()).to(device)
        weights = torch.from_numpy(np.array(begin.source, np.float32)).to(device)
        if self._in_scale is not None:
            weights = torch.where(self._in_scale != 0, weights / self._in_scale, 0.0)
        deviation = weights.std().clamp_min(1e-12)
        self.deviation = deviation.expand(self.units)
        self.begin = self._of_units(weights) / deviation
        if begin.latents is not None:
            self.begin = torch.from_numpy(begin.latents).to(device).float().view_as(self.begin)
        self.codes = self._of_units(torch.from_numpy(_codes_of(tensor.planes, cols)).to(device))

    def forget_beginning(self) -> None:
        """Drop what only the beginning needed."""
        self.begin = self.codes = torch.empty(0)

    def finished(self, of_units: Tensor) -> Tensor:
        """Return the matrix (rows, cols) of what the formula gives: channels scaled, listed weights in their places."""
        weight = self._matrix(of_units).contiguous()
        if self._in_scale is not None:
            weight = weight * self._in_scale
        if self._listed.numel():
            weight = weight.clone()
            weight.view(-1)[self._listed] = self._listed_value
        return weight

    def of_formula(self, gradient: Tensor) -> Tensor:
        """Return the gradient of what the formula gives, by unit, from that of the matrix, which is overwritten."""
        if self._listed.numel():
            gradient.view(-1)[self._listed] = 0.0
        if self._in_scale is not None:
            gradient = gradient * self._in_scale
        return self._of_units(gradient)

    def planes_of(self, codes: Tensor, count: int) -> NDArray[np.uint64]:
        """Return the planes (count, rows, words) of codes by unit."""
        found = np.ascontiguousarray(self._matrix(codes).cpu().numpy())
        planes = np.empty((count, found.shape[0], words_for(found.shape[1])), np.uint64)
        pack_codes(found.reshape(-1), found.shape[1], planes)
        return planes

    def _of_units(self, matrix: Tensor) -> Tensor:
        """Return (rows, cols) as (units, block), with zeros behind the last column of a row."""
        missing = self.blocks * self.block - matrix.shape[1]
        padded = torch.nn.functional.pad(matrix, (0, missing)) if missing else matrix
        return padded.reshape(self.units, self.block)

    def _matrix(self, of_units: Tensor) -> Tensor:
        rows, cols = self.stored.tensor.shape
        return of_units.reshape(rows, -1)[:, :cols]


def refuse_untrainable(name: str, attributes: Mapping[str, Any], scale_bits: int | None) -> None:
    """Raise DistillError for a matrix of a store, by its attributes, whose planes cannot be trained as asked."""
    planes, method = 0, attributes["method"]
    if is_low_rank(attributes):
        if scale_bits == 8:
            raise DistillError(f"{name}: scales of the low-rank form have 16 bits; leave --scale-bits 8 out")
        return
    for term in attributes["terms"]:
        planes |= term
    _refuse_planes(name, method, "column_planes" in attributes["hashes"], planes.bit_length())
    if scale_bits == 8 and (attributes["mix"] is not None or 0 in attributes["terms"]):
        raise DistillError(f"{name}: 8-bit scales have no sign, and coefficients of method {method} do; use 16 bits")


def refuse_untrainable_settings(name: str, settings: Settings) -> None:
    """Raise DistillError for a matrix that is to be packed in a way in which its planes cannot be trained."""
    method = method_named(settings.method)
    _refuse_planes(name, method.name, method.column_planes, method.size(settings).planes)


def _refuse_planes(name: str, method: str, of_columns: bool, count: int) -> None:
    if of_columns:
        raise DistillError(
            f"{name}: method {method} gives some columns planes of their own, which are not trained; begin with "
            "another method"
        )
    if not 1 <= count <= _MOST_PLANES:
        raise DistillError(
            f"{name}: has {count} planes, expected 1 to {_MOST_PLANES}: begin with fewer groups or planes"
        )


def _codes_of(planes: NDArray[np.uint64], cols: int) -> NDArray[np.uint8]:
    """Return the codes (rows, cols) of planes (planes, rows, words)."""
    codes = np.zeros((planes.shape[1], cols), np.uint8)
    for number, plane in enumerate(planes):
        bits = np.unpackbits(np.ascontiguousarray(plane).view(np.uint8), axis=1, count=cols, bitorder="little")
        codes |= bits << np.uint8(number)
    return codes


def _block(tensor: PackedTensor) -> int:
    """Return how many columns of a row a unit has."""
    return min(tensor.block, tensor.shape[1]) if tensor.numbers.shape[2] > 1 else tensor.shape[1]


def _owners(parts: Sequence[_Part], device: torch.device) -> Tensor:
    """Return which coefficients each unit has, (units,)."""
    found, first = [], 0
    for part in parts:
        count = part.base.shape[1]
        own = torch.arange(part.units, device=device)
        found.append(first + (own if count == part.units else torch.zeros_like(own)))
        first += count
    return torch.cat(found)


def _nearest(latent: Tensor, levels: Tensor, thresholds: Tensor) -> Tensor:
    """Return the level nearest to each latent (units, block); levels (levels, units) ascend."""
    if latent.is_cuda:
        return fused(_nearest_on_gpu, latent)(latent, levels[0], levels[1:] - levels[:-1], thresholds)
    found = torch.empty_like(latent)
    arrays = (latent.detach().numpy(), _by_unit(levels), _by_unit(thresholds), found.numpy())
    _in_threads(lambda part: levels_of_latents(*(array[part] for array in arrays)), len(latent))
    return found


def _gradients(latent: Tensor, gradient: Tensor, thresholds: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of latents (units, block), and its sum over the weights above each threshold.

    limits (2, units): beyond these no gradient pulls a latent further out. Sums (levels, units): the first is over all
    weights.
    """
    if latent.is_cuda:
        return fused(_gradients_on_gpu, latent)(latent, gradient, thresholds, limits)
    found = torch.empty_like(latent)
    sums = np.empty((len(latent), len(thresholds) + 1), np.float32)
    arrays = (latent.numpy(), gradient.float().numpy(), _by_unit(thresholds), _by_unit(limits))

    def run(part: slice) -> None:
        latent_gradients(*(array[part] for array in arrays), found.numpy()[part], sums[part])

    _in_threads(run, len(sums))
    return found, torch.from_numpy(np.ascontiguousarray(sums.T))


def _nearest_on_gpu(latent: Tensor, lowest: Tensor, steps: Tensor, thresholds: Tensor) -> Tensor:
    result = lowest[:, None].expand(latent.shape)
    for step, threshold in zip(steps, thresholds, strict=True):
        result = result + torch.where(latent > threshold[:, None], step[:, None], 0.0)
    return result


def _gradients_on_gpu(latent: Tensor, gradient: Tensor, thresholds: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    gradient = gradient.float()
    sums = [gradient.sum(1)]
    sums += [torch.where(latent > threshold[:, None], gradient, 0.0).sum(1) for threshold in thresholds]
    low, high = limits[0][:, None], limits[1][:, None]
    outward = ((latent < low) & (gradient > 0)) | ((latent > high) & (gradient < 0))
    return torch.where(outward, 0.0, gradient), torch.stack(sums)


def _by_unit(numbers: Tensor) -> NDArray[np.float32]:
    """Return (n, units) as NumPy's (units, n)."""
    return np.ascontiguousarray(numbers.detach().numpy().T, np.float32)


def _in_threads(run: Callable[[slice], None], units: int) -> None:
    """Run a kernel over parts of the units, on as many threads as PyTorch uses."""
    threads = torch.get_num_threads()
    step = max(1, -(-units // threads))
    parts = [slice(start, start + step) for start in range(0, units, step)]
    if len(parts) == 1:
        run(parts[0])
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, parts))
