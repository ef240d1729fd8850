"""A model's tensors as training has them so far: those of the store that it began with, under what has been trained."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bincompress.distillation.low_rank import FactorsBeginning, TrainedFactors, from_flat
from bincompress.distillation.model import Student, values_of
from bincompress.distillation.planes import Beginning, TrainedPlanes, form_of, refuse_untrainable
from bincompress.distillation.settings import DistillError
from bincompress.distillation.student import StoredMatrix
from bincompress.model.config import ModelConfig
from bincompress.sources.checkpoint import Checkpoint, read_weight
from bincompress.store.store import Store
from bincompress.tensors.dequantize import dequantize
from bincompress.tensors.forms import Stored, is_low_rank
from bincompress.tensors.low_rank import LowRankTensor
from bincompress.tensors.packed import PackedTensor


class Tensors:
    """The tensors that training begins with; `put` sets what it has made of some of them."""

    def __init__(
        self, store: Store, config: ModelConfig, teacher: Checkpoint, scale_bits: int | None = None,
        keep_latents: bool = False,
    ) -> None:  # fmt: skip
        """teacher: the unquantized model; scale_bits: of the trained matrices' scales, None to keep them.

        keep_latents: whether training goes on from latents that are put here, 2 bytes a weight.
        Raises DistillError where a matrix of a layer cannot be trained, or none is packed.
        """
        self.store = store
        self._config = config
        self._teacher = teacher
        self._scale_bits = scale_bits
        self.keeps_latents = keep_latents
        self.packed: dict[str, Stored] = {}
        self.vectors: dict[str, NDArray[np.float32]] = {}
        self._latents: dict[str, NDArray[np.float16]] = {}
        kinds = store.tensors()
        in_layers = [name for layer in range(config.layers) for name in self.names_of(layer)]
        self._planes = {name for name in in_layers if kinds[name] == "packed"}
        if not self._planes:
            raise DistillError(f"{store.url}: no matrix of its layers is packed, so there are no planes to train")
        for name in self._planes:
            refuse_untrainable(name, store.complete_attributes(name), scale_bits)

    def names_of(self, layer: int) -> list[str]:
        """Return the names of a layer's tensors."""
        prefix = self._config.declaration.names.layer.format(layer=layer)
        return [name for name in self._config.tensors() if name.startswith(prefix)]

    def put(
        self, packed: Mapping[str, Stored], vectors: dict[str, NDArray[np.float32]],
        latents: dict[str, NDArray[np.float16]],
    ) -> None:  # fmt: skip
        """Take what training has made of some tensors."""
        self.packed |= packed
        self.vectors |= vectors
        if self.keeps_latents:
            self._latents |= latents

    def with_trained(self, name: str, planes: NDArray[np.uint64], numbers: NDArray[Any], exponent: int) -> Stored:
        """Return a matrix with other planes and coefficients; raises ValueError where these do not fit it."""
        factors = self._low_rank(name)
        if factors is not None:
            return from_flat(factors, planes, numbers, exponent)
        before = self._stored(name).tensor
        if planes.shape != before.planes.shape or numbers.shape != before.numbers.shape:
            raise ValueError(f"{name}: planes {planes.shape} and numbers {numbers.shape} do not fit the store's")
        return replace(before, planes=planes, numbers=numbers, exponent=exponent)

    def check_vectors(self, vectors: dict[str, NDArray[np.float32]]) -> None:
        """Raise ValueError where vectors are not those of this model."""
        shapes = self._config.tensors()
        for name, values in vectors.items():
            if values.shape != shapes[name] or values.dtype != np.float32 or not np.isfinite(values).all():
                raise ValueError(f"{name}: {values.shape} {values.dtype} does not fit {shapes[name]}, or is not finite")

    def student(self, names: Collection[str], device: torch.device, dtype: torch.dtype) -> Student:
        """Return these tensors ready to be trained: planes of the layers' matrices, and vectors.

        Embeddings, the head and matrices that the store keeps are not trained.
        """
        forms: dict[Any, list[Beginning]] = {}
        low_rank: list[TrainedFactors] = []
        vectors, kept = {}, {}
        for name in names:
            shape = self._config.tensors()[name]
            factors = self._low_rank(name) if name in self._planes else None
            if factors is not None:
                source = read_weight(self._teacher.tensors[name]).float32().reshape(shape)
                begin = FactorsBeginning(name, factors, source, self._latents.get(name))
                low_rank.append(TrainedFactors(begin, device))
            elif name in self._planes:
                stored = self._stored(name)
                source = read_weight(self._teacher.tensors[name]).float32().reshape(shape)
                forms.setdefault(form_of(stored), []).append(Beginning(stored, source, self._latents.get(name)))
            elif len(shape) == 1:
                vectors[name] = self._plain(name, device)
            else:
                kept[name] = self.fixed(name, device, dtype)
        return Student({}, [*(TrainedPlanes(form, device) for form in forms.values()), *low_rank], vectors, kept, dtype)

    def fixed(self, name: str, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor's values as they are now: vectors in float32, matrices in dtype."""
        if name in self.packed or self.store.tensors()[name] == "packed":
            stored = self._low_rank(name) or self._stored(name).tensor
            return torch.from_numpy(dequantize(stored)).to(device).to(dtype)
        values = self._plain(name, device)
        return values if values.ndim == 1 else values.to(dtype)

    def _plain(self, name: str, device: torch.device) -> torch.Tensor:
        if name in self.vectors:
            return torch.from_numpy(self.vectors[name].copy()).to(device)
        return values_of(self.store.read_plain(name)[0], self._config.tensors()[name], device)

    def _low_rank(self, name: str) -> LowRankTensor | None:
        """Return a matrix in low-rank form as it is now; None for one in another."""
        trained = self.packed.get(name)
        if trained is None and is_low_rank(self.store.complete_attributes(name)):
            trained = self.store.read_stored(name, check_hashes=True)
        return trained if isinstance(trained, LowRankTensor) else None

    def _stored(self, name: str) -> StoredMatrix:
        trained = self.packed.get(name)
        if isinstance(trained, PackedTensor):
            method: Any = self.store.complete_attributes(name)["method"]
            return StoredMatrix(name, str(method), trained)
        found = StoredMatrix.read(self.store, name)
        return (
            found if self._scale_bits is None or name not in self._planes else found.with_scale_bits(self._scale_bits)
        )
