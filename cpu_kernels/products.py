"""Products of packed +-1 planes with quantized activations: the choice of kernel, prepacking, threads.

W[r, c] = offset[r, c // block] + sum over planes p of scale[p, r, c // block] * (+1 or -1), with bit i of word j of
a row's plane standing for column 64 j + i. Sums of integers are exact and equal for every kernel.

    matrix = prepack(planes, scale, block=128, cols=3072)
    with Workers(2) as pool:
        y = multiply(matrix, quantize(x), pool=pool)
"""

import itertools
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpu_kernels import activations, vector
from cpu_kernels import stream as layout
from cpu_kernels.activations import Activations, quantize
from cpu_kernels.compiler import Kernel
from cpu_kernels.sweep import sweep, table_bytes

__all__ = [
    "Activations",
    "PackedMatrix",
    "Part",
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


class Workers:
    """A pool of `threads` threads, of which the caller's is one: `threads - 1` are started, and end with close()."""

    def __init__(self, threads: int) -> None:
        if threads < 1:
            raise ValueError(f"threads: {threads}; expected at least 1")
        self.threads = threads
        self._tasks: list[queue.SimpleQueue[Callable[[], object] | None]] = []
        self._done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        for number in range(threads - 1):
            tasks: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
            self._tasks.append(tasks)
            threading.Thread(target=self._serve, args=(tasks,), name=f"product-{number + 1}", daemon=True).start()

    def _serve(self, tasks: "queue.SimpleQueue[Callable[[], object] | None]") -> None:
        while (task := tasks.get()) is not None:
            try:
                task()
            except BaseException as error:
                self._done.put(error)
            else:
                self._done.put(None)

    def run(self, tasks: Sequence[Callable[[], object]]) -> None:
        """Run at most `threads` tasks, the first in the calling thread, and return when all have ended."""
        if len(tasks) > self.threads:
            raise ValueError(f"{len(tasks)} tasks for {self.threads} threads")
        with self._lock:
            # Queues, not a Future per task: 24 microseconds for a round trip, about 50 fewer than an executor.
            for target, task in zip(self._tasks, tasks[1:], strict=False):
                target.put(task)
            failed: BaseException | None = None
            try:
                tasks[0]()
            finally:
                for _ in tasks[1:]:
                    failed = self._done.get() or failed
            if failed is not None:
                raise failed

    def close(self) -> None:
        """End the threads."""
        for tasks in self._tasks:
            tasks.put(None)
        self._tasks = []
        self.threads = 1

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


Pool = Workers | ThreadPoolExecutor


def kernels() -> list[str]:
    """Return the names that prepack accepts on this CPU, the default first, such as "lookup-avx2" and "popcount"."""
    return [f"lookup-{vector.NAMES[code]}" for code in vector.shuffle_sets()] + ["popcount"]


def product_kernels(bits: int = 8) -> list[Kernel]:
    """Return what quantize, multiply and prepack compile for the best kernel of this CPU and units of 128 columns."""
    name, code = _choose(None)
    pack = layout.packer(int(name == "lookup"), vector.tile_rows(code))
    sweeps = [sweep(code, bits, 2, half) for half in (1, 0)]
    return [activations._quantize, *sweeps, layout.raise_exponents, layout.write_scales, pack]


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
    per_token = matrix.units * matrix.unit_words * table_bytes(matrix.code, bits)
    block = min(tokens, MOST_TOKENS[bits], max(FEWEST_TOKENS, TABLES_IN_CACHE // per_token))
    result = out

    def work(first: int, last: int, prepared: bool = True) -> None:
        tables = shared if shared is not None else _scratch(matrix, block, per_token)
        run(
            matrix.stream,
            matrix.rows,
            matrix.units,
            matrix.units_per_block,
            matrix.scale_sets,
            matrix.has_offset,
            matrix.plane_weights,
            matrix.multipliers,
            activations.q,
            activations.scale,
            activations.sums,
            activations.absolute,
            *tables,
            block,
            prepared and shared is not None,
            first,
            last,
            result,
        )

    shared = None
    if tokens <= block:
        # Few tokens: their tables are made once and serve every matrix with this input and all threads.
        key = matrix.code, matrix.unit_words
        shared = activations.prepared.get(key)
        if shared is None:
            shared = _scratch(matrix, block, per_token)
            work(0, 0, prepared=False)
            activations.prepared[key] = shared
    _share(work, 0, matrix.tiles, pool)
    return out


Scratch = tuple[NDArray[np.uint8], NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]


def _scratch(matrix: PackedMatrix, tokens: int, per_token: int) -> Scratch:
    places = matrix.units * tokens
    return (
        _aligned(per_token * tokens, zero=False),
        np.empty(places, np.int32),
        np.empty(places, np.float32),
        np.empty(places, np.float32),
    )
