"""How is a matrix laid out for one kernel of this CPU, from planes and scales as they are stored?"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.jit import cpu_features
from cpu_kernels.jit.compiler import Kernel
from cpu_kernels.matmul import stream as layout
from cpu_kernels.matmul.aligned_memory import ALIGNMENT, aligned, allocate
from cpu_kernels.matmul.tiling import Shape, Tiling, tiling_of
from cpu_kernels.parallel.workers import Pool, share

_EXPONENTS = 64  # of stored scales: within what a row's multiplier and the products with it can be

# Kinds of CPU that a matrix can be laid out for, on any machine: the kernel, and the instruction set's number.
FAMILIES = {
    "avx512": ("lookup", cpu_features.AVX512BW),
    "avx2": ("lookup", cpu_features.AVX2),
    "ssse3": ("lookup", cpu_features.SSSE3),
    "neon": ("lookup", cpu_features.NEON),
    "portable": ("popcount", cpu_features.PORTABLE),
}


@dataclass(frozen=True, eq=False)
class Part:
    """Some rows of a matrix as they are stored."""

    planes: NDArray[np.uint64]  # (planes, rows, words)
    scale: NDArray[Any]  # float16 or float32 (planes, rows, blocks), or (rows, blocks) with plane_weights
    offset: NDArray[Any] | None = None  # of the same dtype (rows, blocks)
    exponent: int = 0  # scales and offsets are 2 ** exponent times these numbers

    @property
    def sets(self) -> list[NDArray[Any]]:
        """The numbers by sets: scales and, where there is one, the offset; each (sets, rows, blocks)."""
        scale = self.scale if self.scale.ndim == 3 else self.scale[None]
        return [scale] if self.offset is None else [scale, self.offset[None]]

    @property
    def as_stored(self) -> bool:
        """Whether a float16 stream may hold the numbers as they are: multipliers have such a power of two."""
        return self.scale.dtype == np.float16 and abs(self.exponent) <= _EXPONENTS

    def singles(self) -> list[NDArray[np.int32]]:
        """Return `sets` with their power of two, as the bits of float32."""
        exact = (np.ldexp(part.astype(np.float32), self.exponent) for part in self.sets)
        return [np.ascontiguousarray(part).view(np.int32) for part in exact]


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A matrix laid out for one kernel of this CPU; `nbytes` is what a product reads of it."""

    rows: int
    cols: int
    block: int
    kernel: str  # "lookup" or "popcount"
    instruction_set: str  # "avx512bw", "avx2", "ssse3", "neon" or "portable"
    stream: NDArray[np.uint8]
    multipliers: NDArray[np.float32]  # (rows,)
    plane_weights: NDArray[np.float32]  # (planes,), all 1 where each plane has scales
    k_tiles: int
    k_tiles_per_block: int
    k_tile_words: int
    scale_sets: int
    has_offset: int
    half: int  # 1 where the scales are float16
    code: int  # the instruction set's number in vector.py
    # What a job says about the matrix; kept, as asking an array for its address takes a microsecond. Not a cached
    # property: before Python 3.12 these have one lock for all objects, which an interrupt can leave held.
    operands: dict[str, int] = field(init=False, repr=False)

    @property
    def nbytes(self) -> int:
        """Return the bytes that one product reads."""
        return self.stream.nbytes + self.multipliers.nbytes

    @property
    def tiles(self) -> int:
        """Return the number of row tiles, which threads share."""
        return -(-self.rows // cpu_features.tile_rows(self.code))

    def __post_init__(self) -> None:
        operands = {
            "stream": self.stream.ctypes.data,
            "rows": self.rows,
            "k_tiles": self.k_tiles,
            "k_tiles_per_block": self.k_tiles_per_block,
            "scale_sets": self.scale_sets,
            "has_offset": self.has_offset,
            "planes": self.plane_weights.size,
            "weights": self.plane_weights.ctypes.data,
            "multipliers": self.multipliers.ctypes.data,
        }
        object.__setattr__(self, "operands", operands)


def kernels() -> list[str]:
    """Return the names that prepack accepts on this CPU, the default first, such as "lookup-avx2" and "popcount"."""
    return [f"lookup-{cpu_features.NAMES[code]}" for code in cpu_features.shuffle_sets()] + ["popcount"]


def choose(name: str | None) -> tuple[str, int]:
    """Return the kernel of a name, the best of this CPU if there is none, and its instruction set's number."""
    sets = cpu_features.shuffle_sets()
    if name == "popcount" or (name is None and not sets):
        return "popcount", cpu_features.PORTABLE
    for code in sets:
        if name in (None, "lookup", f"lookup-{cpu_features.NAMES[code]}"):
            return "lookup", code
    raise ValueError(f"kernel {name!r} is unknown or needs what this CPU lacks; available: {', '.join(kernels())}")


def form_of(kernel: str | None = None, family: str | None = None) -> str:
    """Return the name of the form in which a kernel of this CPU, or a family's, reads matrices, such as "lookup64".

    Streams of one form have the same bytes, whatever CPU they are made on or for.
    """
    name, code = choose(kernel) if family is None else FAMILIES[family]
    return f"{name}{cpu_features.tile_rows(code)}"


def described(form: str) -> str:
    """Return a form's name with the families that read it, as "lookup64 (avx512, avx2)"; unknown ones as they are."""
    families = [family for family in FAMILIES if form_of(family=family) == form]
    return f"{form} ({', '.join(families)})" if families else form


def prepack(
    planes: NDArray[np.uint64],
    scale: NDArray[Any],
    block: int,
    cols: int,
    offset: NDArray[Any] | None = None,
    *,
    plane_weights: Sequence[float] | None = None,
    kernel: str | None = None,
    pool: Pool | None = None,
) -> PackedMatrix:
    """Lay out planes (P, rows, words) with scale (P, rows, blocks) and offset (rows, blocks) for this CPU's kernel.

    Both are float32 or float16. `block` is 64, 128, 256, ... or at least `cols` for one block per row. With
    `plane_weights` (P numbers, say 8, 4, 2, 1) scale is (rows, blocks) and plane p's scale is plane_weights[p] * scale.
    """
    part = Part(planes, scale, offset)
    return prepack_rows([part], block, cols, plane_weights=plane_weights, kernel=kernel, pool=pool)


def prepack_rows(
    parts: Sequence[Part],
    block: int,
    cols: int,
    *,
    plane_weights: Sequence[float] | None = None,
    kernel: str | None = None,
    pool: Pool | None = None,
    own_pages: bool = False,
    family: str | None = None,
) -> PackedMatrix:
    """Lay out several matrices, one below the other, as one: products with the same input (q, k, v) in one go.

    own_pages: in memory that no other matrix shares, which is given back as soon as this one is no longer used. family:
    of FAMILIES, for another CPU than this one, instead of a kernel.
    """
    name, code = choose(kernel) if family is None else FAMILIES[family]
    shape = Shape(
        rows=sum(part.planes.shape[1] for part in parts),
        cols=cols,
        block=block,
        planes=parts[0].planes.shape[0],
        plane_weights=None if plane_weights is None else tuple(plane_weights),
        has_offset=parts[0].offset is not None,
    )
    tiling = tiling_of(shape, cpu_features.tile_rows(code))
    _check_parts(parts, tiling, plane_weights is not None, -(-cols // 64))
    stream, multipliers, half = _stream_begun(parts, tiling, pool, own_pages)
    _write_tiles(parts, tiling, half, layout.packer(int(name == "lookup"), tiling.tile), stream, pool)
    return _matrix(shape, tiling, name, code, stream, multipliers, half)


def from_stream(
    shape: Shape, half: bool, stream: NDArray[np.uint8], multipliers: NDArray[np.float32], kernel: str | None = None
) -> PackedMatrix:
    """Return a matrix whose stream, of `form_of(kernel)`, and multipliers (rows,) are there: nothing is laid out.

    half: whether its scales are float16. The arrays are only read; the stream begins with a cache line. Raises
    ValueError where their sizes are not those of such a matrix: kernels read as far as its shape says.
    """
    name, code = choose(kernel)
    tiling = tiling_of(shape, cpu_features.tile_rows(code))
    _expect("stream", stream, np.uint8, (tiling.stream_bytes(int(half)),))
    _expect("multipliers", multipliers, np.float32, (shape.rows,))
    if stream.ctypes.data % ALIGNMENT or multipliers.ctypes.data % 4:
        raise ValueError(f"stream: begins at {stream.ctypes.data % ALIGNMENT} bytes past a multiple of {ALIGNMENT}")
    return _matrix(shape, tiling, name, code, stream, multipliers, int(half))


def _matrix(
    shape: Shape, tiling: Tiling, name: str, code: int, stream: NDArray[np.uint8],
    multipliers: NDArray[np.float32], half: int,
) -> PackedMatrix:  # fmt: skip
    weights = shape.plane_weights
    return PackedMatrix(
        rows=shape.rows,
        cols=shape.cols,
        block=shape.block,
        kernel=name,
        instruction_set=cpu_features.NAMES[code],
        stream=stream,
        multipliers=multipliers,
        plane_weights=np.ones(shape.planes, np.float32) if weights is None else np.array(weights, np.float32),
        k_tiles=tiling.k_tiles,
        k_tiles_per_block=tiling.k_tiles_per_block,
        k_tile_words=tiling.k_tile_words,
        scale_sets=shape.scale_sets,
        has_offset=int(shape.has_offset),
        half=half,
        code=code,
    )


def _check_parts(parts: Sequence[Part], tiling: Tiling, shared: bool, words: int) -> None:
    for part in parts:
        height = part.planes.shape[1]
        if (part.offset is None) != (parts[0].offset is None):
            raise ValueError("offset: given for some of the parts only")
        _expect("planes", part.planes, np.uint64, (tiling.count, height, words))
        dtype = np.float16 if part.scale.dtype == np.float16 else np.float32
        shape = height, tiling.blocks
        _expect("scale", part.scale, dtype, shape if shared else (tiling.count, *shape))
        if part.offset is not None:
            _expect("offset", part.offset, dtype, shape)


def _stream_begun(
    parts: Sequence[Part], tiling: Tiling, pool: Pool | None, own_pages: bool
) -> tuple[NDArray[np.uint8], NDArray[np.float32], int]:
    """Return a stream, the rows' multipliers and whether its scales are float16.

    Scales that it holds as they are stored are not in it yet: they are written with the bits.
    """
    edges = list(itertools.accumulate((part.planes.shape[1] for part in parts), initial=0))
    multipliers = np.ones(tiling.rows, np.float32)
    exponents = np.zeros(tiling.rows, np.int32)
    singles: list[tuple[int, int, NDArray[np.int32]]] = []  # first row, first set, bits of float32
    for part, row, end in zip(parts, edges[:-1], edges[1:], strict=True):
        if part.as_stored:
            multipliers[row:end] = 2.0**part.exponent
            continue
        found = _placed(part, row)
        for _, _, bits in found:
            layout.raise_exponents(bits, row, exponents)
        # Rows of zeros, and of values below any that a store holds, keep a power of two whose inverse is float32 too.
        np.clip(exponents[row:end], 32, 220, out=exponents[row:end])
        multipliers[row:end] = np.ldexp(1.0, exponents[row:end] - 127 - layout.TOP)
        singles += found
    size = tiling.stream_bytes(half=1)
    # In an arena it could not be given back.
    stream = aligned(size, zero=True) if singles else allocate(size, own_pages)
    if all(_write_singles(*piece, exponents, tiling, 1, stream, pool) == 0 for piece in singles):
        return stream, multipliers, 1
    stream = allocate(tiling.stream_bytes(half=0), own_pages)
    for part, row in zip(parts, edges[:-1], strict=True):
        for piece in _placed(part, row):
            _write_singles(*piece, exponents, tiling, 0, stream, pool)
    return stream, np.ones(tiling.rows, np.float32), 0


def _placed(part: Part, row: int) -> list[tuple[int, int, NDArray[np.int32]]]:
    scale, *offset = part.singles()
    return [(row, 0, scale), *((row, len(scale), bits) for bits in offset)]


def _write_singles(
    row: int,
    first_set: int,
    bits: NDArray[np.int32],
    exponents: NDArray[np.int32],
    tiling: Tiling,
    half: int,
    stream: NDArray[np.uint8],
    pool: Pool | None,
) -> int:
    """Write float32 scales into the stream and return how many are no float16 values."""
    inexact: list[int] = []

    def write(begin: int, end: int) -> None:
        inexact.append(
            layout.write_scales(
                bits, first_set, row, tiling.tile, tiling.block_bytes, tiling.header(half), tiling.tile_bytes(half),
                half, exponents, stream.view(np.uint16), stream.view(np.int32), begin, end,
            )
        )  # fmt: skip

    share(write, row // tiling.tile, -(-(row + bits.shape[1]) // tiling.tile), pool)
    return sum(inexact)


def _write_tiles(
    parts: Sequence[Part], tiling: Tiling, half: int, write: Kernel, stream: NDArray[np.uint8], pool: Pool | None
) -> None:
    """Write the parts' bits into the stream, and the scales that are float16 and stay as they are stored."""
    row = 0
    for part in parts:
        planes, scale = np.ascontiguousarray(part.planes), np.empty((0, 0, tiling.blocks), np.uint16)
        if half and part.as_stored:
            scale = np.ascontiguousarray(np.concatenate(part.sets) if len(part.sets) > 1 else part.sets[0])
        fill = functools.partial(
            write, planes, scale.view(np.uint16), row, tiling.k_tiles, tiling.k_tiles_per_block, tiling.k_tile_words,
            tiling.header(half), stream,
        )  # fmt: skip
        share(fill, row // tiling.tile, -(-(row + planes.shape[1]) // tiling.tile), pool)
        row += planes.shape[1]


def _expect(name: str, array: NDArray[Any], dtype: type, shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(f"{name}: {array.dtype} {array.shape}; expected {np.dtype(dtype)} {shape}")
