"""The values of a tensor in a GGUF file, a few rows at a time: by kernels, or the `gguf` package.

Rows of queries and keys that llama.cpp has put in another order come back in theirs, and 1 is subtracted from the
weights of norms that it has added 1 to. Source: llama.cpp, conversion/llama.py (`LlamaModel.permute`), gemma.py.
"""

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bincompress.errors import CheckpointError
from bincompress.sources.mapping import map_items
from bincompress.sources.quantized.rows import Fill, Floats
from bincompress.tensors.weight import TensorSource

# Types that a kernel of ours knows: bytes and weights of a block, and where its numbers in float16 lie.
_KERNELS = {"Q8_0": (34, 32, (0,)), "Q5_0": (22, 32, (0,)), "Q4_K": (144, 256, (0, 2)), "Q6_K": (210, 256, (208,))}
# Types whose values the package does not compute: number, name, weights and bytes of a block (ggml-common.h).
_OURS = {41: ("Q1_0", 128, 18), 42: ("Q2_0", 64, 18)}
_BITS = {"Q1_0": 1, "Q2_0": 2}
PLAIN = {"F32": 4, "F16": 2, "BF16": 2}  # types whose items lie in the file as a checkpoint has them


def gguf_package() -> Any:
    """Return the `gguf` package; raises CheckpointError where it is not installed."""
    try:
        import gguf
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise CheckpointError(
            "GGUF files need the gguf package, which is not installed: pip install 'bincompress[gguf]'"
        ) from None
    return gguf


@functools.cache
def type_of(number: int) -> tuple[str, int, int] | None:
    """Return the name of a type by its number, the weights of a block and its bytes; None where it is not read."""
    gguf = gguf_package()
    if number in _OURS:
        return _OURS[number]
    known = {int(kind): kind for kind in gguf.GGMLQuantizationType}
    if number not in known:
        return None
    kind = known[number]
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    return (kind.name, weights, size) if kind.name in PLAIN or kind.name in _dequantized(gguf) else None


def _dequantized(gguf: Any) -> set[str]:
    return {kind.name for kind in gguf.quants._type_traits}


def decoder(source: TensorSource) -> Fill:
    """Return what computes the values of rows."""
    encoding = source.encoding
    assert encoding is not None
    (_, part), name = encoding.parts[0], str(encoding.option("type"))
    rows, heads, minus = (int(encoding.option(key)) for key in ("rows", "heads", "minus"))
    items = map_items(part).reshape(rows, -1)
    values_of = _plain(name) if name in PLAIN else _quantized(name)

    def fill(start: int, stop: int, values: Floats) -> None:
        if len(source.shape) == 1:  # its items are the rows of a matrix of one column where they are in another order
            start, stop = 0, rows
        chosen: Any = slice(start, stop)
        if heads:
            chosen = permuted(np.arange(start, stop), rows // heads)
        values[:] = values_of(items[chosen]).reshape(values.shape)
        if minus:
            values -= np.float32(minus)

    return fill


def _plain(name: str) -> Any:
    dtypes: dict[str, Any] = {"F32": np.float32, "F16": np.float16}
    if name in dtypes:
        return lambda items: items.view(dtypes[name])
    return lambda items: (items.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def _quantized(name: str) -> Any:
    if name in _KERNELS:
        return _by_kernel(name)
    if name in _BITS:
        return lambda items: _few_bits(items, _BITS[name])
    gguf = gguf_package()
    kind = gguf.GGMLQuantizationType[name]

    def values_of(items: NDArray[Any]) -> Any:
        with np.errstate(all="ignore"):  # a scale that is not finite is found with the weights that it spoils
            return gguf.quants.dequantize(items, kind)

    return values_of


def _few_bits(items: NDArray[Any], bits: int) -> NDArray[np.float32]:
    """Return values of Q1_0 (-d, d) or Q2_0 (-d, 0, d, 2 d): a scale in float16, then codes of so many bits."""
    blocks = np.ascontiguousarray(items).reshape(-1, 18)
    scales = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    levels = np.array([-1, 1] if bits == 1 else [-1, 0, 1, 2], np.float32)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (blocks[:, 2:, None] >> shifts) & np.uint8((1 << bits) - 1)
    return np.asarray(levels[codes].reshape(len(blocks), -1) * scales, np.float32)


def one_bit(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return rows of two levels, -d and d in each 128 columns, as Q1_0: the inverse of reading them."""
    blocks = values.reshape(-1, 128)
    scales = np.abs(blocks[:, :1]).astype(np.float16).view(np.uint8)
    return np.concatenate([scales, np.packbits(blocks > 0, axis=1, bitorder="little")], axis=1)


def _by_kernel(name: str) -> Any:
    """Return what computes values with a kernel, which is some times as fast as the package."""
    from cpu_kernels.quantize import block_formats

    size, count, places = _KERNELS[name]
    kernel = getattr(block_formats, name.lower())

    def values_of(items: NDArray[Any]) -> Any:
        blocks = np.ascontiguousarray(items).reshape(-1, size)
        halves = (blocks[:, place : place + 2].copy().view(np.float16)[:, 0].astype(np.float32) for place in places)
        values = np.empty((len(blocks), count), np.float32)
        kernel(blocks, *halves, values)
        return values

    return values_of


def permuted(rows: NDArray[np.intp], head: int) -> NDArray[np.intp]:
    """Return which rows of the file these are: it has the two halves of a head's rows in turns; head: rows of one."""
    number, row = np.divmod(rows, head)
    half, place = np.divmod(row, head // 2)
    found: NDArray[np.intp] = number * head + 2 * place + half
    return found
