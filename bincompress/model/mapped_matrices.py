"""Matrices that a packed store holds as the product kernels read them: mapped where they lie, and not laid out anew."""

from collections.abc import Sequence

import numpy as np

from bincompress.errors import DamagedError
from bincompress.model.linear import Floats
from bincompress.model.low_rank_linear import Factors, LowRankLinear
from bincompress.model.packed_linear import ActivationSettings, Listed, PackedLinear, ScaledLinear
from bincompress.store.laid_out import VERSION, LaidOut, Record, forms_in
from bincompress.store.store import Store
from cpu_kernels.matmul.prepacking import PackedMatrix, described, form_of, from_stream
from cpu_kernels.parallel.workers import Workers


class MappedMatrices:
    """The matrices of a packed store that are laid out for the kernel that multiplies.

    Threads may ask for different ones at the same time.
    """

    def __init__(
        self, laid_out: LaidOut, store: Store, settings: ActivationSettings, workers: Workers, kernel: str | None,
        apart: frozenset[str],
    ) -> None:  # fmt: skip
        self._laid_out, self._store = laid_out, store
        self._settings, self._workers, self._kernel, self._apart = settings, workers, kernel, apart

    def has(self, names: Sequence[str]) -> bool:
        """Return whether the first of these tensors is there, with those that it is one matrix with."""
        return self._laid_out.starting(names) is not None or self._is_low_rank(names[0])

    def next_of(self, names: Sequence[str]) -> tuple[list[str], PackedLinear | ScaledLinear | LowRankLinear] | None:
        """Return the matrix that the first of these tensors are, with their names; None where the first is not there.

        Raises DamagedError where a matrix is not what was written, or was made of other tensors.
        """
        record = self._laid_out.starting(names)
        if record is not None:
            return list(record.tensors), self._of_planes(record)
        count = next((k for k, name in enumerate(names) if not self._is_low_rank(name)), len(names))
        if not count:
            return None
        factors = [self._factors(name) for name in names[:count]]
        return list(names[:count]), LowRankLinear(factors, self._settings, self._workers)

    def _is_low_rank(self, name: str) -> bool:
        return all(f"{name}/{factor}" in self._laid_out.records for factor in ("left", "right"))

    def _of_planes(self, record: Record) -> PackedLinear | ScaledLinear:
        matrix, difference = self._matrix(record)
        listed, row = [], 0
        for name in record.tensors:
            found = self._listed(name, difference)
            if found is not None:
                listed.append((row, found))
                difference = difference[len(found.rows) :]
            row += self._store.shape(name)[0]
            self._store.check_attributes(name)
        linear = PackedLinear(matrix, listed, self._settings, self._workers)
        in_scale = self._store.read_part(record.tensors[0], "in_scale")
        if in_scale is None:
            return linear
        if len(record.tensors) > 1 or in_scale.shape != (matrix.cols,) or in_scale.dtype != np.float32:
            raise DamagedError(f"{self._store.url}: {record.name}: in_scale {in_scale.shape} does not fit its matrix")
        return ScaledLinear(linear, in_scale)

    def _factors(self, name: str) -> Factors:
        left, difference = self._matrix(self._laid_out.records[f"{name}/left"])
        right, _ = self._matrix(self._laid_out.records[f"{name}/right"])
        scale = self._store.read_part(name, "column_scale")
        if scale is None or scale.shape != (right.cols,) or scale.dtype != np.float16:
            raise DamagedError(f"{self._store.url}: {name}: column_scale does not fit its matrix")
        self._store.check_attributes(name)
        return Factors(right, left, scale.astype(np.float32), self._listed(name, difference))

    def _matrix(self, record: Record) -> tuple[PackedMatrix, Floats]:
        """Return a matrix, and what its listed weights are above what it says."""
        shape, arrays = self._laid_out.arrays(record, own=record.tensors[0] in self._apart)
        try:
            matrix = from_stream(shape, record.half, arrays["stream"], arrays["multipliers"], self._kernel)
        except ValueError as error:
            raise DamagedError(f"{self._store.url}: {record.name}: {error}") from None
        return matrix, arrays.get("difference", np.empty(0, np.float32))

    def _listed(self, name: str, difference: Floats) -> Listed | None:
        """Return the listed weights of a tensor, whose differences come first among these."""
        index = self._store.read_part(name, "listed_index")
        if index is None or not index.size:
            return None
        rows, cols = self._store.shape(name)
        if index.ndim != 1 or index.dtype != np.uint64 or int(index.max()) >= rows * cols:
            raise DamagedError(f"{self._store.url}: {name}: listed weights lie outside the matrix")
        return Listed(*np.divmod(index.astype(np.int64), cols), difference[: index.size])


def mapped_matrices(
    store: Store, settings: ActivationSettings, workers: Workers, kernel: str | None, apart: frozenset[str]
) -> tuple[MappedMatrices | None, tuple[str, ...]]:
    """Return what a store holds for this kernel, None where that is nothing, and what a user should know of it.

    apart: tensors whose matrices are mapped by themselves, and given back with each.
    """
    forms = forms_in(store) if settings.bits != 16 else {}  # which decodes weights from the planes
    if not forms:
        return None, ()
    form = form_of(kernel)
    again = (
        f"matrices are laid out anew for {described(form)}; `bincompress pack --layout auto` makes a file for this CPU"
    )
    if form not in forms:
        return None, (f"{store.url}: holds matrices that are laid out for {', '.join(map(described, forms))}: {again}",)
    found = LaidOut(store, form)
    if found.version != VERSION:
        note = f"{store.url}: holds matrices laid out by version {found.version!r:.40}, not {VERSION}: {again}"
        return None, (note,)
    return (MappedMatrices(found, store, settings, workers, kernel, apart) if found.is_near else None), ()
