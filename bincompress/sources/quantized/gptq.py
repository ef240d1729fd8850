"""GPTQ and AWQ: 4-bit or 8-bit integers in words, transposed, with scales and zero points by groups of inputs.

Every value is scale * (integer - zero point), exactly. GPTQ packs along the inputs, the lowest bits first; its zero
points are stored less 1 where the checkpoint format is "gptq", as they are where it is "gptq_v2". AWQ ("gemm") packs
along the outputs, in the order 0, 2, 4, 6, 1, 3, 5, 7.
Sources: AutoGPTQ, qlinear_cuda_old.py; GPTQModel, convert_gptq_v1_to_v2_format; AutoAWQ, packing_utils.py.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bincompress.errors import CheckpointError
from bincompress.sources.mapping import map_floats, map_items
from bincompress.sources.quantized.rows import Fill, Floats, integers, multiply, subtract
from bincompress.tensors.weight import Encoding, TensorSource, encoded

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which output each 4 bits of a word are of, the lowest first
_AWQ_PLACES = tuple(AWQ_ORDER.index(output) for output in range(8))


def gptq_source(
    name: str, parts: dict[str, TensorSource], bits: int, group: int, plus_one: bool, what: str
) -> TensorSource:
    """Return the matrix (outputs, inputs) of GPTQ.

    parts: "weight", "zeros", "scales", and "group" (the group of each input) where there is one. group: inputs of
    one. plus_one: whether zero points are stored less 1.
    """
    words, outputs = parts["weight"].shape
    options = (("bits", bits), ("group", group), ("plus_one", plus_one))
    return encoded(name, "F32", (outputs, words * 32 // bits), Encoding(what, "gptq", tuple(parts.items()), options))


def awq_source(name: str, parts: dict[str, TensorSource], group: int, what: str) -> TensorSource:
    """Return the matrix (outputs, inputs) of AWQ; parts: "weight", "zeros", "scales"."""
    inputs, words = parts["weight"].shape
    options = (("group", group),)
    return encoded(name, "F32", (words * 8, inputs), Encoding(what, "awq", tuple(parts.items()), options))


def gptq_decoder(source: TensorSource) -> Fill:
    """Return what computes the values of rows."""
    encoding = source.encoding
    assert encoding is not None
    parts, bits, width = dict(encoding.parts), encoding.option("bits"), encoding.option("group")
    words = map_items(parts["weight"])
    scales = np.ascontiguousarray(map_floats(parts["scales"]).T)
    stored = integers(map_items(parts["zeros"]), bits)
    if encoding.option("plus_one"):  # a zero point of 0 is stored as the greatest integer
        stored = (stored + np.uint8(1)) & np.uint8((1 << bits) - 1)
    zeros = np.ascontiguousarray(stored.T.astype(np.float32))
    groups = _groups(parts.get("group"), width, scales.shape[1])

    def fill(start: int, stop: int, values: Floats) -> None:
        values[:] = integers(words[:, start:stop].T, bits)
        if groups is None:
            subtract(values, zeros[start:stop], width)
            multiply(values, scales[start:stop], width)
        else:
            values -= zeros[start:stop][:, groups]
            values *= scales[start:stop][:, groups]

    return fill


def _groups(part: TensorSource | None, width: int, count: int) -> NDArray[Any] | None:
    """Return the group of each input; None where inputs are in the order of their groups."""
    if part is None:
        return None
    groups = map_items(part)
    if groups.size and not 0 <= groups.min() <= groups.max() < count:
        raise CheckpointError(outside(part.name, groups, count))
    return None if np.array_equal(groups, np.arange(groups.size) // width) else groups


def outside(name: str, groups: NDArray[Any], count: int) -> str:
    """Return the message of groups that are not there."""
    return f"{name}: groups {groups.min()} to {groups.max()}; expected 0 to {count - 1}, as there are scales"


def awq_decoder(source: TensorSource) -> Fill:
    """Return what computes the values of rows."""
    encoding = source.encoding
    assert encoding is not None
    parts, width = dict(encoding.parts), encoding.option("group")
    words = map_items(parts["weight"])
    scales = np.ascontiguousarray(map_floats(parts["scales"]).T)
    zeros = _awq_integers(map_items(parts["zeros"])).astype(np.float32)

    def fill(start: int, stop: int, values: Floats) -> None:
        first, last = start // 8, -(-stop // 8)
        values[:] = _awq_integers(words[:, first:last])[start - 8 * first : stop - 8 * first]
        subtract(values, zeros[start:stop], width)
        multiply(values, scales[start:stop], width)

    return fill


def _awq_integers(words: NDArray[Any]) -> NDArray[np.uint8]:
    """Return the integers of words (n, w), in the order of the outputs, as (8 * w, n)."""
    split = integers(words, 4).reshape(len(words), -1, 8)
    return np.ascontiguousarray(split[:, :, _AWQ_PLACES].reshape(len(words), -1).T)
