"""Products of packed +-1 planes with quantized activations: the choice of kernel, prepacking, threads.

W[r, c] = offset[r, c // block] + sum over planes p of scale[p, r, c // block] * (+1 or -1), with bit i of word j of
a row's plane standing for column 64 j + i. Sums of integers are exact and equal for every kernel.

    matrix = prepack(planes, scale, block=128, cols=3072)
    with Workers(2) as pool:
        y = multiply(matrix, quantize(x), pool=pool)
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from cpu_kernels import handover, vector
from cpu_kernels import stream as layout
from cpu_kernels.activations import (
    Activations,
    Per,
    check_settings,
    empty_activations,
    quantize,
    quantize_tokens,
    quantizing,
)
from cpu_kernels.addresses import address
from cpu_kernels.compiler import Kernel, kernel, out, view
from cpu_kernels.sweep import FIELDS, sweep, table_bytes
from cpu_kernels.workers import Workers

__all__ = [
    "Activations",
    "PackedMatrix",
    "Part",
    "TokenProduct",
    "Workers",
    "kernels",
    "multiply",
    "prepack",
    "prepack_rows",
    "product_kernels",
    "quantize",
]

# Tokens that share one reading of the packed bits: their tables should stay in the second-level cache, and a unit's
# tables (512 bytes per token, 1024 with 8 bits) in the first.
TABLES_IN_CACHE = 512 * 1024
MOST_TOKENS = {6: 32, 8: 16}
FEWEST_TOKENS = 4


@dataclass(frozen=True, eq=False)
class Part:
    """Some rows of a matrix as they are stored."""

    planes: NDArray[np.uint64]  # (planes, rows, words)
    scale: NDArray[np.float32]  # (planes, rows, blocks), or (rows, blocks) with plane_weights
    offset: NDArray[np.float32] | None = None  # (rows, blocks)


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
    units: int
    units_per_block: int
    unit_words: int
    scale_sets: int
    has_offset: int
    half: int  # 1 where the scales are float16
    code: int  # the instruction set's number in vector.py

    @property
    def nbytes(self) -> int:
        """Return the bytes that one product reads."""
        return self.stream.nbytes + self.multipliers.nbytes

    @property
    def tiles(self) -> int:
        """Return the number of row tiles, the unit in which threads share the work."""
        return -(-self.rows // vector.tile_rows(self.code))

    @functools.cached_property
    def operands(self) -> dict[str, int]:
        """What a job says about the matrix; kept, as asking an array for its address takes a microsecond."""
        return {
            "stream": self.stream.ctypes.data,
            "rows": self.rows,
            "units": self.units,
            "units_per_block": self.units_per_block,
            "scale_sets": self.scale_sets,
            "has_offset": self.has_offset,
            "planes": self.plane_weights.size,
            "weights": self.plane_weights.ctypes.data,
            "multipliers": self.multipliers.ctypes.data,
        }


Pool = Workers | ThreadPoolExecutor


def kernels() -> list[str]:
    """Return the names that prepack accepts on this CPU, the default first, such as "lookup-avx2" and "popcount"."""
    return [f"lookup-{vector.NAMES[code]}" for code in vector.shuffle_sets()] + ["popcount"]


def product_kernels(bits: int = 8) -> list[Kernel]:
    """Return what quantize, multiply and prepack compile for the best kernel of this CPU and units of 128 columns."""
    name, code = _choose(None)
    pack = layout.packer(int(name == "lookup"), vector.tile_rows(code))
    sweeps = [sweep(code, bits, 2, half) for half in (1, 0)]
    native = [_aim, handover.serve, handover.lead, handover.dismiss]  # how threads share a product
    return [quantize_tokens, *sweeps, *native, layout.raise_exponents, layout.write_scales, pack]


def _choose(name: str | None) -> tuple[str, int]:
    sets = vector.shuffle_sets()
    if name == "popcount" or (name is None and not sets):
        return "popcount", vector.PORTABLE
    for code in sets:
        if name in (None, "lookup", f"lookup-{vector.NAMES[code]}"):
            return "lookup", code
    raise ValueError(f"kernel {name!r} is unknown or needs what this CPU lacks; available: {', '.join(kernels())}")


def prepack(
    planes: NDArray[np.uint64],
    scale: NDArray[np.float32],
    block: int,
    cols: int,
    offset: NDArray[np.float32] | None = None,
    *,
    plane_weights: Sequence[float] | None = None,
    kernel: str | None = None,
    pool: Pool | None = None,
) -> PackedMatrix:
    """Lay out planes (P, rows, words) with scale (P, rows, blocks) and offset (rows, blocks) for this CPU's kernel.

    `block` is 64, 128, 256, ... or at least `cols` for one block per row. With `plane_weights` (P numbers, say
    8, 4, 2, 1) scale is (rows, blocks) and plane p's scale is plane_weights[p] * scale.
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
) -> PackedMatrix:
    """Lay out several matrices, one below the other, as one: products with the same input (q, k, v) in one go."""
    name, code = _choose(kernel)
    tile = vector.tile_rows(code)
    whole_row = block >= cols
    if not whole_row and block % 64:
        raise ValueError(f"block: {block}; expected a multiple of 64 or at least the {cols} columns")
    unit_words = 2 if whole_row or block % 128 == 0 else 1
    blocks = 1 if whole_row else -(-cols // block)
    units = -(-cols // (64 * unit_words))
    units_per_block = units if whole_row else block // (64 * unit_words)
    count, has_offset = parts[0].planes.shape[0], parts[0].offset is not None
    scale_sets = count if plane_weights is None else 1
    if plane_weights is not None and len(plane_weights) != count:
        raise ValueError(f"plane_weights: {len(plane_weights)} numbers for {count} planes")
    # (scales (sets, rows, blocks), number of the first set, first row), as the bits of float32.
    pieces: list[tuple[NDArray[np.int32], int, int]] = []
    rows = 0
    for part in parts:
        height = part.planes.shape[1]
        scale = part.scale if plane_weights is None else part.scale[None]
        _expect("planes", part.planes, np.uint64, (count, height, -(-cols // 64)))
        _expect("scale", scale, np.float32, (scale_sets, height, blocks))
        pieces.append((np.ascontiguousarray(scale).view(np.int32), 0, rows))
        if (part.offset is not None) != has_offset:
            raise ValueError("offset: given for some of the parts only")
        if part.offset is not None:
            _expect("offset", part.offset, np.float32, (height, blocks))
            pieces.append((np.ascontiguousarray(part.offset[None]).view(np.int32), scale_sets, rows))
        rows += height

    exponents = np.zeros(rows, np.int32)
    for bits, _, row in pieces:
        layout.raise_exponents(bits, row, exponents)
    # Rows of zeros, and of values below any that a store holds, keep a power of two whose inverse is a float32 too.
    np.clip(exponents, 32, 220, out=exponents)
    tiles = -(-rows // tile)
    for half in (1, 0):
        header = (scale_sets + has_offset) * tile * (2 if half else 4)
        block_bytes = units_per_block * count * unit_words * 8 * tile
        tile_bytes = blocks * header + units * count * unit_words * 8 * tile
        stream = _aligned(tiles * tile_bytes)
        inexact: list[int] = []
        for bits, first_set, first_row in pieces:

            def write_some(
                begin: int,
                end: int,
                bits: NDArray[np.int32] = bits,
                first_set: int = first_set,
                row: int = first_row,
                stream: NDArray[np.uint8] = stream,
                half: int = half,
                header: int = header,
                block_bytes: int = block_bytes,
                tile_bytes: int = tile_bytes,
                inexact: list[int] = inexact,
            ) -> None:
                inexact.append(
                    layout.write_scales(
                        bits,
                        first_set,
                        row,
                        tile,
                        block_bytes,
                        header,
                        tile_bytes,
                        half,
                        exponents,
                        stream.view(np.uint16),
                        stream.view(np.int32),
                        begin,
                        end,
                    )
                )

            _share(write_some, first_row // tile, -(-(first_row + bits.shape[1]) // tile), pool)
        if not any(inexact) or not half:
            break
    multipliers = np.ldexp(np.float32(1), exponents - 127 - layout.TOP) if half else np.ones(rows, np.float32)

    write = layout.packer(int(name == "lookup"), tile)
    row = 0
    for part in parts:
        height = part.planes.shape[1]
        planes = np.ascontiguousarray(part.planes)

        def fill(first: int, last: int, planes: NDArray[np.uint64] = planes, row: int = row) -> None:
            write(planes, row, units, units_per_block, unit_words, header, first, last, stream)

        _share(fill, row // tile, -(-(row + height) // tile), pool)
        row += height
    weights = np.ones(count, np.float32) if plane_weights is None else np.array(plane_weights, np.float32)
    return PackedMatrix(
        rows,
        cols,
        block,
        name,
        vector.NAMES[code],
        stream,
        multipliers.astype(np.float32),
        weights,
        units,
        units_per_block,
        unit_words,
        scale_sets,
        int(has_offset),
        half,
        code,
    )


def _expect(name: str, array: NDArray[Any], dtype: type, shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(f"{name}: {array.dtype} {array.shape}; expected {np.dtype(dtype)} {shape}")


def _aligned(size: int, zero: bool = True) -> NDArray[np.uint8]:
    room = np.zeros(size + 63, np.uint8) if zero else np.empty(size + 63, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size]


def _share(work: Callable[[int, int], object], first: int, last: int, pool: Pool | None) -> None:
    """Call work(start, end) on about equal parts of [first, last), one per thread of the pool."""
    threads = 1 if pool is None else pool.threads if isinstance(pool, Workers) else pool._max_workers
    parts = min(threads, last - first)
    if parts <= 1 or pool is None:
        work(first, last)
        return
    edges = [first + (last - first) * k // parts for k in range(parts + 1)]
    if isinstance(pool, Workers):
        pool.run([lambda start=start, end=end: work(start, end) for start, end in itertools.pairwise(edges)])  # type: ignore[misc]
        return
    # The calling thread only waits, so that exactly the executor's threads work.
    waiting: list[Future[object]] = [pool.submit(work, start, end) for start, end in itertools.pairwise(edges)]
    for future in waiting:
        future.result()


def multiply(
    matrix: PackedMatrix, activations: Activations, out: NDArray[np.float32] | None = None, pool: Pool | None = None
) -> NDArray[np.float32]:
    """Return the products (n, rows) of a packed matrix with n quantized tokens: W times (q times its scale).

    `out` may be given (float32, C order); the rows are shared among the threads of `pool`.
    """
    if activations.cols != matrix.cols:
        raise ValueError(f"activations of {activations.cols} columns for a matrix of {matrix.cols}")
    tokens = activations.q.shape[0]
    if out is None:
        out = np.empty((tokens, matrix.rows), np.float32)
    elif out.shape != (tokens, matrix.rows):
        raise ValueError(f"out: {out.shape}; expected {(tokens, matrix.rows)}")
    bits = activations.bits
    run = sweep(matrix.code, bits, matrix.unit_words, matrix.half)
    block = min(tokens, MOST_TOKENS[bits], max(FEWEST_TOKENS, TABLES_IN_CACHE // _table_bytes(matrix, bits)))
    operands = {**matrix.operands, **quantizing(activations, "token"), "result": out.ctypes.data}
    key = matrix.code, matrix.unit_words

    def work(first: int, last: int) -> None:
        shared = activations.prepared.get(key)
        scratch = shared or _Scratch(matrix, bits, block)
        sums = _accumulators(matrix, block)
        own = {"accumulators": sums.ctypes.data, "prepared": int(shared is not None)}
        job = _job({**operands, **scratch.operands, **own})
        run(job.ctypes.data, first, last)
        if tokens <= block and shared is None:
            activations.prepared[key] = scratch

    if tokens <= block and key not in activations.prepared:
        # Few tokens: their tables are made once and serve every matrix with this input and all threads.
        work(0, 0)
    _share(work, 0, matrix.tiles, pool)
    return out


class TokenProduct:
    """The product of a packed matrix with one token, quantized on the way, in one kernel call a thread.

    Every thread quantizes the token and makes its tables for itself, which takes less time than handing them over.
    For one caller at a time; what the kernel works in is kept with `workers`, and shared by their products.

    >>> times = TokenProduct(matrix, 8, "segment", workers)  # doctest: +SKIP
    >>> y = times(x)  # doctest: +SKIP
    """

    def __init__(self, matrix: PackedMatrix, bits: int, per: Per, workers: Workers) -> None:
        check_settings(bits, per)
        self.matrix = matrix
        self._workers = workers
        self._run = sweep(matrix.code, bits, matrix.unit_words, matrix.half)
        jobs = []
        for thread in range(workers.threads):
            # New arrays for each product would be new pages each time: 20 microseconds for 8192 columns.
            key = thread, matrix.cols, matrix.unit_words, matrix.code, bits
            if key not in workers.scratch:
                made = empty_activations(1, matrix.cols, bits), _Scratch(matrix, bits, 1), _accumulators(matrix, 1)
                workers.scratch[key] = made
            activations, scratch, sums = workers.scratch[key]
            own = {**quantizing(activations, per), **scratch.operands, "accumulators": sums.ctypes.data}
            jobs.append(_job({**matrix.operands, **own, "quantize": address(quantize_tokens)}))
        self._jobs = np.stack(jobs)
        self._address = self._jobs.ctypes.data

    def __call__(self, x: NDArray[np.float32], out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Return the product (1, rows) with x (1, cols), C-contiguous; `out` may be given."""
        matrix = self.matrix
        if x.shape != (1, matrix.cols) or x.dtype != np.float32 or not x.flags.c_contiguous:
            raise ValueError(f"x: {x.dtype} {x.shape}; expected float32 {(1, matrix.cols)} in C order")
        result = np.empty((1, matrix.rows), np.float32) if out is None else out
        if result.shape != (1, matrix.rows):
            raise ValueError(f"out: {result.shape}; expected {(1, matrix.rows)}")
        _aim(self._jobs, x, result)
        self._workers.run_kernel(self._run, self._address, self._jobs.strides[0], matrix.tiles)
        return result


_X, _RESULT = FIELDS.index("x"), FIELDS.index("result")


@kernel(types.void(out(types.int64, 2), view(types.float32, 2), out(types.float32, 2)))
def _aim(jobs: Any, x: Any, result: Any) -> None:
    """Write the addresses of x and of the result into jobs (n, fields): Python takes 2 microseconds for each."""
    for k in range(jobs.shape[0]):
        jobs[k, _X] = x.ctypes.data
        jobs[k, _RESULT] = result.ctypes.data


def _table_bytes(matrix: PackedMatrix, bits: int) -> int:
    """Return the bytes of one token's tables or bit slices."""
    return matrix.units * matrix.unit_words * table_bytes(matrix.code, bits)


def _job(operands: dict[str, int]) -> NDArray[np.int64]:
    """Return a job, int64 (fields,), in which what is not given is zero."""
    return np.array([operands.get(field, 0) for field in FIELDS], np.int64)


def _accumulators(matrix: PackedMatrix, tokens: int) -> NDArray[np.uint8]:
    return _aligned(4 * vector.tile_rows(matrix.code) * tokens, zero=False)


class _Scratch:
    """What a kernel prepares for blocks of `tokens` tokens; threads may share it once it is prepared."""

    def __init__(self, matrix: PackedMatrix, bits: int, tokens: int) -> None:
        places = matrix.units * tokens
        self.tokens = tokens
        self.tables = _aligned(_table_bytes(matrix, bits) * tokens, zero=False)
        self.constants = np.empty(places, np.int32)
        self.factors = np.empty(places, np.float32)
        self.offsets = np.empty(places, np.float32)
        self.rooms = np.empty(places, np.int32)

    @functools.cached_property
    def operands(self) -> dict[str, int]:
        """What a job says about it."""
        arrays = ("tables", "constants", "factors", "offsets", "rooms")
        return {"token_block": self.tokens, **{name: getattr(self, name).ctypes.data for name in arrays}}
