"""The tensors of a GGUF file: what each is called, which type holds it, and its bytes, some rows at a time."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bincompress.errors import StoreError
from bincompress.model.architectures import ARCHITECTURES
from bincompress.model.config import ModelConfig
from bincompress.sources.fused import fused_names
from bincompress.sources.gguf.blocks import PLAIN, gguf_package, one_bit, permuted
from bincompress.sources.gguf.names import Family, file_name, heads_in_turns, one_more
from bincompress.store.arrays import let_go
from bincompress.store.store import Store
from bincompress.tensors.dequantize import dequantize
from bincompress.tensors.packed import PackedTensor

GgufType = Literal["f16", "q8_0"]
Ternary = Literal["tq2_0", "tq1_0"]
Rows = Callable[[slice], NDArray[np.float32]]

_AT_ONCE = 1 << 20  # values in memory
_FIRST_ROWS = 8  # that show in most cases that a matrix has more levels
_LARGEST_HALF = 65504.0
_Q8_LEVELS = 127.0


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file."""

    name: str  # in the file
    parts: tuple[str, ...]  # in the store, one below the other
    shape: tuple[int, ...]  # rows first
    type: str = "F32"
    exact: bool = True  # whether the type gives every weight of the store
    heads: int = 0  # whose rows lie in turns, 0: in their order
    plus_one: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape[:-1]) * row_bytes(self.type, self.shape[-1])


def row_bytes(kind: str, cols: int) -> int:
    """Return the bytes of a row of a type."""
    gguf = gguf_package()
    weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return int(cols // weights * size)


def named_tensors(store: Store, config: ModelConfig, family: Family) -> list[Tensor]:
    """Return the tensors that the decoder uses; raises StoreError where one has no name in GGUF files."""
    own = list(config.tensors())
    usual = list(replace(config, names=ARCHITECTURES[config.architecture].names).tensors())
    called = dict(zip(usual, own, strict=True))
    found = []
    for whole, parts in fused_names({"model_type": family.model_type}, usual).items():
        name = file_name(family, whole)
        if name is None:
            raise StoreError(f"{called.get(whole, whole)}: {family.architecture} has no such tensor in GGUF files")
        places = tuple(called[part] for part in parts)
        heads = heads_in_turns(family, whole, config.heads, config.kv_heads)
        found.append(Tensor(name, places, _shape(store, places), heads=heads, plus_one=one_more(family, whole)))
    return found


def _shape(store: Store, parts: tuple[str, ...]) -> tuple[int, ...]:
    shapes = [store.shape(part) for part in parts]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def typed(store: Store, tensor: Tensor, kind: GgufType, ternary: Ternary) -> Tensor:
    """Return a tensor with its type: one that is exact where there is one, else the one asked for.

    A packed matrix is read for it, with its hashes. Raises DamagedError, or StoreError where it is not of floats.
    """
    if len(tensor.shape) == 1:
        return tensor
    dtypes = {"packed" if store.tensors()[part] == "packed" else _dtype(store, part) for part in tensor.parts}
    halves = kind.upper() if kind == "f16" or not tensor.shape[-1] % 32 else "F16"
    if len(dtypes) == 1 and "packed" not in dtypes:
        plain = dtypes.pop()
        chosen = halves if kind == "q8_0" and halves == "Q8_0" else plain
        return replace(tensor, type=chosen, exact=chosen == plain)
    exact = _exact_type(store, tensor, ternary)
    return replace(tensor, type=exact or halves, exact=exact is not None)


def _dtype(store: Store, name: str) -> str:
    dtype = store.read_plain(name)[0].dtype
    if dtype not in PLAIN:
        raise StoreError(f"{name}: {dtype}; a GGUF file is written of floats")
    return dtype


def _exact_type(store: Store, tensor: Tensor, ternary: Ternary) -> str | None:
    """Return the type of few levels that gives every weight, None where none does."""
    gguf, cols = gguf_package(), tensor.shape[-1]
    known = {entry.name for entry in gguf.GGMLQuantizationType}
    left = {
        name: test
        for name, block, test in (("Q1_0", 128, _two_levels), (ternary.upper(), 256, _three_levels))
        if name in known and not cols % block
    }
    for part in tensor.parts:
        rows, count = rows_of(store, part, check=True)
        starts = [0, *range(_FIRST_ROWS, count, max(1, _AT_ONCE // cols))]
        for start, stop in zip(starts, [*starts[1:], count], strict=True):
            if not left or start >= count:
                break
            values = rows(slice(start, stop))
            left = {name: test for name, test in left.items() if test(values)}
    return next(iter(left), None)


def _half(scales: NDArray[np.float32]) -> bool:
    with np.errstate(over="ignore"):
        return bool((scales.astype(np.float16).astype(np.float32) == scales).all())


def _two_levels(values: NDArray[np.float32]) -> bool:
    sizes = np.abs(values.reshape(-1, 128))
    return bool((sizes == sizes[:, :1]).all()) and _half(sizes[:, 0])


def _three_levels(values: NDArray[np.float32]) -> bool:
    sizes = np.abs(values.reshape(-1, 256))
    largest = sizes.max(axis=1)
    return bool(((sizes == 0) | (sizes == largest[:, None])).all()) and _half(largest)


def rows_of(store: Store, name: str, check: bool = False) -> tuple[Rows, int]:
    """Return what gives rows of a stored tensor as float32, and how many there are; check: its hashes, too."""
    if store.tensors()[name] == "packed":
        packed = store.read_stored(name, check_hashes=check)
        if check and isinstance(packed, PackedTensor):
            let_go(packed.planes)
        return (lambda rows: dequantize(packed, rows)), packed.shape[0]
    weight, _ = store.read_plain(name, check_hashes=True)
    return weight.float32, weight.shape[0]


def chunks(store: Store, tensor: Tensor) -> Iterator[NDArray[Any]]:
    """Yield the bytes of a tensor as the file has them; raises StoreError where a weight is too large for its type."""
    cols = tensor.shape[-1]
    if len(tensor.shape) == 1:
        yield _vector(store, tensor).view(np.uint8)
        return
    head = tensor.shape[0] // tensor.heads if tensor.heads else 1
    step = max(1, _AT_ONCE // cols // head) * head
    for part in tensor.parts:
        rows, count = rows_of(store, part)
        for start in range(0, count, step):
            values = rows(slice(start, min(start + step, count)))
            if tensor.heads:
                values = _in_turns(values, head)
            yield _encoded(tensor, values)


def _vector(store: Store, tensor: Tensor) -> NDArray[np.float32]:
    values = np.concatenate([rows_of(store, part)[0](slice(None)).reshape(-1) for part in tensor.parts])
    if tensor.heads:
        values = _in_turns(values, len(values) // tensor.heads)
    return np.ascontiguousarray(values + np.float32(1) if tensor.plus_one else values)


def _in_turns(values: NDArray[np.float32], head: int) -> NDArray[np.float32]:
    """Return whole heads with the rows of their halves in turns, as llama.cpp has them."""
    found = np.empty_like(values)
    found[permuted(np.arange(len(values)), head)] = values
    return found


def _encoded(tensor: Tensor, values: NDArray[np.float32]) -> NDArray[np.uint8]:
    gguf = gguf_package()
    largest = float(np.abs(values).max(initial=0))
    limit = {"F16": _LARGEST_HALF, "Q8_0": _LARGEST_HALF * _Q8_LEVELS}.get(tensor.type, math.inf)
    if not largest <= limit:
        raise StoreError(
            f"{', '.join(tensor.parts)}: holds a weight of {largest:g}; {tensor.type} holds up to {limit:g}"
        )
    if tensor.type == "Q1_0":
        found: NDArray[Any] = one_bit(values)
    else:
        kind = gguf.GGMLQuantizationType[tensor.type]
        found = gguf.quants.quantize(np.ascontiguousarray(values), kind)
    return np.ascontiguousarray(found).view(np.uint8)
