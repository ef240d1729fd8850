"""Teacher and student: one decoder over the checkpoint's weights, and over those that a store's coefficients give."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bincompress.distillation.decoder import TorchDecoder
from bincompress.distillation.fused import fused
from bincompress.distillation.loss import deviation_aware
from bincompress.distillation.low_rank import TrainedFactors
from bincompress.distillation.planes import TrainedPlanes
from bincompress.distillation.settings import DistillSettings
from bincompress.distillation.student import StoredMatrix, TrainedMatrix
from bincompress.model.config import ModelConfig
from bincompress.sources.checkpoint import Checkpoint, read_weight
from bincompress.store.store import Store
from bincompress.tensors.forms import Stored
from bincompress.tensors.weight import Weight

Rows = Callable[[slice], Tensor]  # logits (n, vocab) of some tokens
_LOGITS_AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 27}  # items of a chunk of logits


class Student:
    """The weights of a store, or some of them: packed matrices and vectors that are trained, all others as they are."""

    def __init__(
        self,
        matrices: Mapping[str, TrainedMatrix],
        planes: Sequence[TrainedPlanes | TrainedFactors],
        vectors: Mapping[str, Tensor],
        kept: Mapping[str, Tensor],
        dtype: torch.dtype,
    ) -> None:
        """matrices: those whose coefficients are trained; planes: those whose planes are, too; kept: all others.

        dtype: of the trained matrices that it gives.
        """
        self.matrices = dict(matrices)
        self.planes = list(planes)
        self._kept = dict(kept)
        self._dtype = dtype
        self._vectors = _Vectors(vectors) if vectors else None

    @classmethod
    def of_store(
        cls, store: Store, config: ModelConfig, device: torch.device, dtype: torch.dtype, norms: bool
    ) -> "Student":
        """Return a store's weights whose coefficients are trained and, with `norms`, its norms too."""
        matrices: dict[str, TrainedMatrix] = {}
        vectors, kept = {}, {}
        kinds = store.tensors()
        for name, shape in config.tensors().items():
            if kinds[name] == "packed":
                matrices[name] = TrainedMatrix(StoredMatrix.read(store, name), device)
            elif norms and name.endswith("norm.weight"):
                vectors[name] = values_of(store.read_plain(name)[0], shape, device)
            else:
                values = values_of(store.read_plain(name)[0], shape, device)
                kept[name] = values if values.ndim == 1 else values.to(dtype)
        return cls(matrices, [], vectors, kept, torch.float32)

    def parameters(self) -> dict[str, list[Tensor]]:
        """Return what is trained, by what it is: coefficients, planes, vectors."""
        found: dict[str, list[Tensor]] = {"coefficients": [], "planes": [], "vectors": []}
        for _, matrix in sorted(self.matrices.items()):
            found["coefficients"].append(matrix.moved)
        for group in self.planes:
            for kind, values in group.parameters().items():
                found[kind].append(values)
        if self._vectors is not None:
            found["vectors"].append(self._vectors.moved)
        return found

    def vectors(self) -> dict[str, Tensor]:
        """Return the trained vectors as they are now, with gradient."""
        return self._vectors.values() if self._vectors is not None else {}

    def weights(self) -> dict[str, Tensor]:
        """Return all weights; those that are trained are leaves that gather a gradient."""
        found = dict(self._kept)
        for name, matrix in self.matrices.items():
            found[name] = matrix.weight().to(self._dtype).requires_grad_()
        for group in self.planes:
            for name, weight in group.weights().items():
                found[name] = weight.to(self._dtype).requires_grad_()
        for name, vector in self.vectors().items():
            found[name] = vector.detach().clone().requires_grad_()
        return found

    def backward(self, weights: Mapping[str, Tensor]) -> None:
        """Carry the gradients of `weights` over to the trained parameters, and release them."""
        for name, matrix in self.matrices.items():
            gradient = weights[name].grad
            if gradient is not None:
                matrix.backward(gradient)
                weights[name].grad = None
        for group in self.planes:
            group.backward({name: _gradient(weights[name]) for name in group.names})
            for name in group.names:
                weights[name].grad = None
        if self._vectors is not None:
            self._vectors.backward(weights)

    def packed(self) -> dict[str, Stored]:
        """Return the trained matrices as they are now, in the form that is stored."""
        found: dict[str, Stored] = {name: matrix.packed() for name, matrix in self.matrices.items()}
        for group in self.planes:
            found |= group.packed()
        return found


class _Vectors:
    """Vectors that are trained, as one: `moved` is what each has moved, in units of its root mean square."""

    def __init__(self, vectors: Mapping[str, Tensor]) -> None:
        self._sizes = {name: values.numel() for name, values in vectors.items()}
        typical = [values.square().mean().sqrt().clamp_min(1e-12).expand(values.numel()) for values in vectors.values()]
        self._base = torch.cat(list(vectors.values()))
        self._unit = torch.cat(typical)
        self.moved = torch.zeros_like(self._base, requires_grad=True)

    def values(self) -> dict[str, Tensor]:
        """Return the vectors as they are now, with gradient."""
        return dict(
            zip(self._sizes, (self._base + self._unit * self.moved).split(list(self._sizes.values())), strict=True)
        )

    def backward(self, weights: Mapping[str, Tensor]) -> None:
        """Carry the gradients of `weights` over to `moved`."""
        self.moved.grad = self._unit * torch.cat([_gradient(weights[name]) for name in self._sizes])


def _gradient(values: Tensor) -> Tensor:
    """Return a leaf's gradient, zeros where nothing has reached it."""
    return values.grad if values.grad is not None else torch.zeros_like(values)


def trained_vectors(student: Student) -> dict[str, NDArray[np.float32]]:
    """Return a student's trained vectors as they are now."""
    return {name: values.detach().float().cpu().numpy() for name, values in student.vectors().items()}


def teacher_weights(
    checkpoint: Checkpoint, config: ModelConfig, device: torch.device, dtype: torch.dtype,
    names: Collection[str] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Return a checkpoint's weights, or those of these names: vectors in float32, matrices in dtype."""
    found = {}
    shapes = config.tensors()
    for name in shapes if names is None else names:
        values = values_of(read_weight(checkpoint.tensors[name]), shapes[name], device)
        found[name] = values if values.ndim == 1 else values.to(dtype)
    return found


def values_of(weight: Weight, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return a tensor's values on a device, float32."""
    return torch.from_numpy(np.array(weight.float32())).reshape(shape).to(device)


class Predictions:
    """What teacher and student predict for windows of tokens, and how far apart they are."""

    def __init__(self, decoder: TorchDecoder, settings: DistillSettings, device: torch.device) -> None:
        self.decoder = decoder
        self.device = device
        self._settings = settings
        self.rows_at_once = max(1, _LOGITS_AT_ONCE[device.type] // decoder.config.vocab)

    def ids(self, windows: Any) -> Tensor:
        """Return windows of tokens on the device."""
        return torch.from_numpy(np.ascontiguousarray(windows)).to(self.device)

    @torch.no_grad()
    def states(self, weights: Mapping[str, Tensor], ids: Tensor) -> Tensor:
        """Return what the head reads at every token of windows, in the type of the products (tokens, hidden)."""
        return self.decoder.states(weights, ids).flatten(0, 1).to(self.decoder.dtype)

    def learn(self, weights: Mapping[str, Tensor], ids: Tensor, expected: Rows, tokens: int) -> float:
        """Gather the gradients of a part of a batch in `weights`; return its share of the batch's mean loss.

        ids (windows, n); expected: gives the teacher's logits of some of the tokens; tokens: those of the whole batch.
        """
        total = torch.zeros((), device=self.device)
        settings = self._settings
        loss_of = fused(deviation_aware, total)
        states = self.decoder.states(weights, ids)
        # The head works in chunks, so that the logits of a long batch are never all there at once.
        rows = states.detach().flatten(0, 1).requires_grad_()
        for start in range(0, len(rows), self.rows_at_once):
            part = slice(start, start + self.rows_at_once)
            found = self.decoder.head(weights, rows[part])
            share = loss_of(expected(part), found, settings.lam, settings.gamma).sum() / tokens
            share.backward()
            total += share.detach()
        states.backward(rows.grad.view_as(states) if rows.grad is not None else None)
        return float(total)

    def text_loss(self, weights: Mapping[str, Tensor], ids: Tensor) -> float:
        """Return the sum of the negative log likelihoods of windows (windows, n), each from its second token."""
        total = 0.0
        with torch.no_grad():
            states = self.decoder.states(weights, ids)
            for window, own in zip(ids, states, strict=True):
                for start in range(0, len(window) - 1, self.rows_at_once):
                    following = window[start + 1 : start + 1 + self.rows_at_once]
                    scores = self.decoder.head(weights, own[start : start + len(following)]).log_softmax(-1)
                    total -= float(scores.gather(1, following[:, None]).double().sum())
        return total
