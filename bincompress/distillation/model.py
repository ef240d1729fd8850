"""Teacher and student: one decoder over the checkpoint's weights, and over those that a store's coefficients give."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bincompress.distillation.decoder import TorchDecoder
from bincompress.distillation.loss import deviation_aware
from bincompress.distillation.settings import DistillSettings
from bincompress.distillation.student import StoredMatrix, TrainedMatrix
from bincompress.model.config import ModelConfig
from bincompress.sources.checkpoint import Checkpoint, read_weight
from bincompress.store.store import Store
from bincompress.tensors.weight import Weight

_LOGITS_AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 27}  # items of a chunk of logits


class Student:
    """The weights of a store: packed matrices by their coefficients, norms if asked, all others as they are."""

    def __init__(
        self, store: Store, config: ModelConfig, device: torch.device, dtype: torch.dtype, norms: bool
    ) -> None:
        self.matrices: dict[str, TrainedMatrix] = {}
        self._kept: dict[str, Tensor] = {}
        self._norms: dict[str, Tensor] = {}
        self._norm_units: dict[str, Tensor] = {}
        self.norms_moved: dict[str, Tensor] = {}
        kinds = store.tensors()
        for name, shape in config.tensors().items():
            if kinds[name] == "packed":
                self.matrices[name] = TrainedMatrix(StoredMatrix.read(store, name), device)
                continue
            values = _values(store.read_plain(name)[0], shape, device)
            if norms and name.endswith("norm.weight"):
                self._norms[name] = values
                self._norm_units[name] = values.square().mean().sqrt()
                self.norms_moved[name] = torch.zeros_like(values, requires_grad=True)
            else:
                self._kept[name] = values if values.ndim == 1 else values.to(dtype)

    def parameters(self) -> list[Tensor]:
        """Return what is trained, in the order of the tensors' names."""
        matrices = [self.matrices[name].moved for name in sorted(self.matrices)]
        return matrices + [self.norms_moved[name] for name in sorted(self.norms_moved)]

    def norms(self) -> dict[str, Tensor]:
        """Return the trained norm weights as they are now, with gradient."""
        return {name: base + self._norm_units[name] * self.norms_moved[name] for name, base in self._norms.items()}

    def weights(self) -> dict[str, Tensor]:
        """Return all weights; those of packed matrices and trained norms are leaves that gather a gradient."""
        found = dict(self._kept)
        for name, matrix in self.matrices.items():
            found[name] = matrix.weight().requires_grad_()
        for name, norm in self.norms().items():
            found[name] = norm.detach().requires_grad_()
        return found

    def backward(self, weights: Mapping[str, Tensor]) -> None:
        """Carry the gradients of `weights` over to the trained parameters, and release them."""
        for name, matrix in self.matrices.items():
            gradient = weights[name].grad
            if gradient is not None:
                matrix.backward(gradient)
                weights[name].grad = None
        for name, norm in self.norms().items():
            gradient = weights[name].grad
            if gradient is not None:
                norm.backward(gradient)


def teacher_weights(
    checkpoint: Checkpoint, config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return a checkpoint's weights: vectors in float32, matrices in dtype."""
    found = {}
    for name, shape in config.tensors().items():
        values = _values(read_weight(checkpoint.tensors[name]), shape, device)
        found[name] = values if values.ndim == 1 else values.to(dtype)
    return found


def _values(weight: Weight, shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.from_numpy(np.array(weight.float32())).reshape(shape).to(device)


class Predictions:
    """What teacher and student predict for windows of tokens, and how far apart they are."""

    def __init__(self, decoder: TorchDecoder, settings: DistillSettings, device: torch.device) -> None:
        self.decoder = decoder
        self.device = device
        self._settings = settings
        self._step = max(1, _LOGITS_AT_ONCE[device.type] // decoder.config.vocab)

    @contextlib.contextmanager
    def arithmetic(self) -> Iterator[None]:
        """Multiply in bfloat16 where the settings say so."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._settings.dtype == "bf16"):
            yield

    def ids(self, windows: Any) -> Tensor:
        """Return windows of tokens on the device."""
        return torch.from_numpy(np.ascontiguousarray(windows)).to(self.device)

    def logits(self, weights: Mapping[str, Tensor], ids: Tensor) -> Tensor:
        """Return logits (batch, n, vocab) as float16, the form in which they are kept on disk, too."""
        with torch.no_grad(), self.arithmetic():
            states = self.decoder.states(weights, ids)
            result = torch.empty(*ids.shape, self.decoder.config.vocab, dtype=torch.float16, device=self.device)
            flat, rows = result.view(-1, result.shape[-1]), states.reshape(-1, states.shape[-1])
            for start in range(0, len(rows), self._step):
                flat[start : start + self._step] = self.decoder.head(weights, rows[start : start + self._step])
        return result

    def learn(self, weights: Mapping[str, Tensor], ids: Tensor, expected: Tensor, tokens: int) -> float:
        """Gather the gradients of a part of a batch in `weights`; return its share of the batch's mean loss.

        ids (windows, n), expected (windows, n, vocab): the teacher's logits; tokens: those of the whole batch.
        """
        total = 0.0
        settings = self._settings
        with self.arithmetic():
            states = self.decoder.states(weights, ids)
            # The head works in chunks, so that the logits of a long batch are never all there at once.
            rows = states.detach().reshape(-1, states.shape[-1]).requires_grad_()
            flat = expected.view(-1, expected.shape[-1])
            for start in range(0, len(rows), self._step):
                part = slice(start, start + self._step)
                found = self.decoder.head(weights, rows[part])
                loss = deviation_aware(flat[part].float(), found, settings.lam, settings.gamma)
                share = loss.sum() / tokens
                share.backward()
                total += float(share.detach())
        states.backward(rows.grad.view_as(states) if rows.grad is not None else None)
        return total

    def text_loss(self, weights: Mapping[str, Tensor], ids: Tensor) -> float:
        """Return the sum of the negative log likelihoods of windows (windows, n), each from its second token."""
        total = 0.0
        with torch.no_grad(), self.arithmetic():
            states = self.decoder.states(weights, ids)
            for window, own in zip(ids, states, strict=True):
                for start in range(0, len(window) - 1, self._step):
                    following = window[start + 1 : start + 1 + self._step]
                    scores = self.decoder.head(weights, own[start : start + len(following)]).log_softmax(-1)
                    total -= float(scores.gather(1, following[:, None]).double().sum())
        return total
