"""How do stored tensors become matrices as the product kernels read them, laid out anew from their planes?"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

import numpy as np

from bincompress.model.lowering import Lowered, lower
from bincompress.model.packed_linear import Listed
from bincompress.tensors.dequantize import dequantize
from bincompress.tensors.forms import Stored
from bincompress.tensors.low_rank import LowRankTensor
from bincompress.tensors.packed import PackedTensor
from cpu_kernels.matmul.prepacking import PackedMatrix, prepack_rows

Entry = tuple[str, Stored | None, Lowered | None]  # a tensor's name, how it is stored, and its planes
LOW_RANK = "low rank"  # what neighbours of that form share
_ROWS_AT_ONCE = 256  # whose planes are decoded to find what listed weights differ by


def runs(found: Sequence[tuple[str, Stored | None]], bits: int) -> Iterator[tuple[object, list[Entry]]]:
    """Yield runs of neighbours that are laid out as one, with what they share; None where they are not laid out.

    bits: of the activations.
    """
    entries = [(name, packed, _lowered(packed, bits)) for name, packed in found]
    for kind, group in groupby(entries, key=lambda entry: _kind(entry, bits)):
        yield kind, list(group)


def _lowered(packed: Stored | None, bits: int) -> Lowered | None:
    return lower(packed) if isinstance(packed, PackedTensor) and bits != 16 else None


def _kind(entry: Entry, bits: int) -> object:
    """Return what neighbours have to share to be laid out as one matrix; None where a tensor is multiplied in float32.

    bits: of the activations.
    """
    name, packed, lowered = entry
    if isinstance(packed, LowRankTensor):
        return None if bits == 16 else LOW_RANK
    if lowered is None or packed is None:
        return None
    return lowered.kind if packed.in_scale is None else name


def lay_out(
    entries: Sequence[Entry], kernel: str | None = None, own_pages: bool = False, family: str | None = None
) -> PackedMatrix:
    """Lay out a run of tensors of planes as one matrix; the options are those of `prepack_rows`."""
    lowered = [entry for _, _, entry in entries if entry is not None]
    cols = next(packed.shape[1] for _, packed, _ in entries if packed is not None)
    return prepack_rows(
        [entry.part for entry in lowered],
        lowered[0].block,
        cols,
        plane_weights=lowered[0].plane_weights,
        kernel=kernel,
        own_pages=own_pages,
        family=family,
    )


def differences(packed: PackedTensor) -> Listed:
    """Return what the listed weights of a matrix are above what its planes say."""
    rows, cols = np.divmod(packed.listed_index.astype(np.int64), packed.shape[1])
    difference = np.empty(rows.size, np.float32)
    bare = replace(packed, listed_index=np.empty(0, np.uint64), listed_value=np.empty(0, np.float32), in_scale=None)
    values = packed.listed_value if packed.in_scale is None else packed.listed_value / packed.in_scale[cols]
    start = 0
    while start < rows.size:
        first = int(rows[start])
        stop = int(np.searchsorted(rows, first + _ROWS_AT_ONCE))
        decoded = dequantize(bare, slice(first, int(rows[stop - 1]) + 1))
        difference[start:stop] = values[start:stop] - decoded[rows[start:stop] - first, cols[start:stop]]
        start = stop
    return Listed(rows, cols, difference)
