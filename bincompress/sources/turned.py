"""Experts of gpt-oss: each matrix lies as (columns, rows), and the rows of gate and up take turns.

Of MXFP4 the blocks lie by rows, so that an expert's rows are read as they are.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bincompress.errors import CheckpointError
from bincompress.sources.mapping import map_items
from bincompress.sources.quantized import mxfp4
from bincompress.sources.quantized.rows import Fill, Floats
from bincompress.tensors.weight import Encoding, TensorSource, Weight, encoded

_MXFP4 = "MXFP4"


def matrix_of(tensor: TensorSource, name: str, expert: int, number: int, parts: int) -> TensorSource:
    """Return one matrix (rows, columns) of a tensor (experts, columns, parts * rows): of an expert its part `number`.

    Raises CheckpointError where the tensor is stored as anything but floats or MXFP4.
    """
    experts, cols, height = tensor.shape
    options = (("first", number), ("step", parts))
    if tensor.encoding is None:
        own = _slice(tensor, expert, experts)
        encoding = Encoding(f"{tensor.dtype}, columns first", "turned", (("weight", own),), options)
    elif tensor.encoding.format == _MXFP4:
        found = tuple((role, _slice(part, expert, experts)) for role, part in tensor.encoding.parts)
        encoding = Encoding(_MXFP4, "mxfp4 rows", found, options)
    else:
        raise CheckpointError(
            f"{tensor.name}: experts in one 3-D tensor stored as {tensor.encoding.format} are not read; expected BF16, "
            "F16, F32 or MXFP4"
        )
    return encoded(name, tensor.dtype, (height // parts, cols), encoding)


def whole_of(parts: Sequence[NDArray[Any]], count: int) -> NDArray[Any]:
    """Return the tensor (count, columns, rows of all parts) of the matrices of `count` experts, in their order."""
    each = len(parts) // count
    stacked = np.stack(parts).reshape(count, each, *parts[0].shape)
    # (count, part, row, column) to (count, column, row, part): rows take turns.
    turned = stacked.transpose(0, 3, 2, 1)
    return np.ascontiguousarray(turned.reshape(count, parts[0].shape[1], -1))


def _slice(tensor: TensorSource, expert: int, experts: int) -> TensorSource:
    """Return what is one expert's of a tensor whose first axis are the experts."""
    nbytes = tensor.nbytes // experts
    return replace(tensor, shape=tensor.shape[1:], offset=tensor.offset + expert * nbytes, nbytes=nbytes)


def _rows(source: TensorSource, start: int, stop: int) -> slice:
    """Return which of the rows of all parts are these rows of this part."""
    assert source.encoding is not None
    first, step = source.encoding.option("first"), source.encoding.option("step")
    return slice(first + start * step, first + (stop - 1) * step + 1, step)


def _plain(source: TensorSource) -> Fill:
    assert source.encoding is not None
    part = source.encoding.parts[0][1]
    items = map_items(part)

    def fill(start: int, stop: int, values: Floats) -> None:
        values[:] = Weight(np.ascontiguousarray(items[:, _rows(source, start, stop)].T), part.dtype).float32()

    return fill


def _blocks(source: TensorSource) -> Fill:
    assert source.encoding is not None
    parts = dict(source.encoding.parts)
    blocks, scales = map_items(parts["blocks"]), map_items(parts["scales"])

    def fill(start: int, stop: int, values: Floats) -> None:
        rows = _rows(source, start, stop)
        values[:] = mxfp4.values_of(blocks[rows], scales[rows])

    return fill


DECODERS: dict[str, Callable[[TensorSource], Fill]] = {"turned": _plain, "mxfp4 rows": _blocks}
