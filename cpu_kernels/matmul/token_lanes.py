"""Products with many tokens at once: a table entry holds the sums of all tokens for one pattern of four weight bits.

The lookup kernels have rows in the lanes of a register and read a table for each token. Here the lanes are tokens: for
four columns, entry p of a table has for each of 32 tokens the sum of x with the signs that the bits of p say, in 16
bits. A row adds up the entries that its bits choose: one load and one addition for 32 tokens, in place of two shuffles
and two additions for 64 rows of one token. With AVX-512 (Zen 4) the lookup kernels take 1.6 x the time for 32 tokens,
1.4 x for 16, and less than this below FEWEST. The stream is the lookup kernels' own, and so are all numbers, to the
last bit: sums are exact, and float32 operations are the same in the same order.
"""

import functools
import threading
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from cpu_kernels.jit import cpu_features, llvm
from cpu_kernels.jit.compiler import Kernel, kernel, out, view
from cpu_kernels.matmul.activations import Activations
from cpu_kernels.matmul.aligned_memory import aligned
from cpu_kernels.matmul.prepacking import PackedMatrix
from cpu_kernels.matmul.shuffle import load_scales

LANES = 32  # tokens: of 16 bits each, one register of AVX-512
FEW_LANES = 16  # as many for fewer tokens
FEWEST = 12  # tokens of a block that are multiplied so
SIZES = (LANES, FEW_LANES)
CODE = cpu_features.AVX512BW
TILE = 64  # rows, of AVX-512
_TILES_AT_ONCE = 32  # whose accumulators (8 KB each) stay in the second-level cache
_ENTRIES = 16  # of a table of four columns
_kept = threading.local()


def blocks(tokens: int) -> list[tuple[int, int]]:
    """Return the blocks of tokens, start and stop, that are multiplied so; the tokens after them are too few."""
    found, start = [], 0
    while tokens - start >= FEWEST:
        left = tokens - start
        # Of 17 to 20 tokens all lanes of a block of 32 would take longer than 16 and a few by the other kernel.
        size = FEW_LANES if FEW_LANES < left <= FEW_LANES + 4 else min(left, LANES)
        found.append((start, start + size))
        start += size
    return found


def fits(matrix: PackedMatrix) -> bool:
    """Return whether the matrix is laid out so that `multiply_block` may be asked."""
    return matrix.kernel == "lookup" and matrix.code == CODE


@intrinsic(prefer_literal=True)
def _fill_tables(typing: Any, lanes: Any, turned: Any, tables: Any) -> Any:
    """Write the tables of the columns of turned, int16 (columns * lanes,)."""
    if not isinstance(lanes, types.IntegerLiteral):
        return None
    count = lanes.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source = llvm.data(context, builder, signature.args[1], arguments[1])
        target = llvm.data(context, builder, signature.args[2], arguments[2])
        size = context.make_array(signature.args[1])(context, builder, arguments[1]).nitems
        with cgutils.for_range(builder, builder.sdiv(size, ir.Constant(size.type, 4 * count))) as loop:
            at = builder.mul(loop.index, ir.Constant(loop.index.type, 4 * count))
            to = builder.mul(loop.index, ir.Constant(loop.index.type, _ENTRIES * count))
            x = [llvm.load(builder, llvm.at(builder, source, at, k * count), llvm.I16, count, 32) for k in range(4)]
            total = builder.add(builder.add(x[0], x[1]), builder.add(x[2], x[3]))
            entries = [builder.sub(llvm.constant(llvm.I16, count, 0), total)]
            twice = [builder.add(value, value) for value in x]
            for pattern in range(1, _ENTRIES):  # one bit more than an entry that is there
                lowest = (pattern & -pattern).bit_length() - 1
                entries.append(builder.add(entries[pattern & (pattern - 1)], twice[lowest]))
            for pattern, entry in enumerate(entries):
                llvm.store(builder, entry, llvm.at(builder, target, to, pattern * count), 32)
        return context.get_dummy_value()

    return types.void(lanes, turned, tables), generate


@intrinsic(prefer_literal=True)
def _add_row(
    typing: Any, lanes: Any, vectors: Any, stream: Any, place: Any, tables: Any, factors: Any, factor: Any, scale: Any,
    acc: Any, row: Any,
) -> Any:  # fmt: skip
    """Add the products of a row of one plane of a k-tile to acc[row:], of so many tokens.

    Its bits are `vectors` bytes of the stream from `place` on, TILE apart; factors[factor:] are those of the tokens.
    """
    if not isinstance(lanes, types.IntegerLiteral) or not isinstance(vectors, types.IntegerLiteral):
        return None
    count = lanes.literal_value
    shift = (2 * count).bit_length() - 1

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args
        packed = llvm.item(context, builder, kinds[2], arguments[2], arguments[3])
        entries = builder.bitcast(llvm.data(context, builder, kinds[4], arguments[4]), llvm.I8.as_pointer())
        sums: list[Any] = [None, None]
        for g in range(vectors.literal_value):
            bits = builder.zext(builder.load(llvm.at(builder, packed, ir.Constant(llvm.I64, g * TILE))), llvm.I64)
            # Bytes from a table's begin to the entry. Made for all rows of a tile at once and kept in 16 bits they
            # took longer: 16 tokens 1.25 x the time, 32 tokens 1.1 x.
            low = builder.shl(builder.and_(bits, ir.Constant(llvm.I64, 15)), ir.Constant(llvm.I64, shift))
            high = builder.shl(builder.and_(bits, ir.Constant(llvm.I64, 240)), ir.Constant(llvm.I64, shift - 4))
            for n, step in enumerate((low, high)):
                # The constant last, so that it becomes a part of the load's address.
                distance = ir.Constant(llvm.I64, (2 * g + n) * _ENTRIES * 2 * count)
                entry = llvm.load(
                    builder, llvm.at(builder, llvm.at(builder, entries, step), distance), llvm.I16, count, 32
                )
                sums[n] = entry if sums[n] is None else builder.add(sums[n], entry)
        value = builder.sitofp(builder.add(*sums), ir.VectorType(llvm.F32, count))
        of_tokens = llvm.load(
            builder, llvm.item(context, builder, kinds[5], arguments[5], arguments[6]), llvm.F32, count, 4
        )
        by = builder.fmul(llvm.splat(builder, arguments[7], count), of_tokens)
        pointer = llvm.item(context, builder, kinds[8], arguments[8], arguments[9])
        before = llvm.load(builder, pointer, llvm.F32, count, 4)
        llvm.store(builder, llvm.multiply_add(builder, value, by, before), pointer, 4)
        return context.get_dummy_value()

    index = types.intp
    return types.void(lanes, vectors, stream, index, tables, factors, index, types.float32, acc, index), generate


@intrinsic(prefer_literal=True)
def _add_scaled(typing: Any, lanes: Any, values: Any, scale: Any, acc: Any, row: Any) -> Any:
    """Add scale times the values of so many tokens to acc[row:]."""
    if not isinstance(lanes, types.IntegerLiteral):
        return None
    count = lanes.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args
        value = llvm.load(builder, llvm.data(context, builder, kinds[1], arguments[1]), llvm.F32, count, 4)
        pointer = llvm.item(context, builder, kinds[3], arguments[3], arguments[4])
        before = llvm.load(builder, pointer, llvm.F32, count, 4)
        after = llvm.multiply_add(builder, llvm.splat(builder, arguments[2], count), value, before)
        llvm.store(builder, after, pointer, 4)
        return context.get_dummy_value()

    return types.void(lanes, values, types.float32, acc, types.intp), generate


@intrinsic(prefer_literal=True)
def _widen(typing: Any, half: Any, stream: Any, place: Any, scales: Any, at: Any) -> Any:
    """Write the TILE scales at a byte place of the stream, float16 (`half`) or float32, to scales[at:]."""
    if not isinstance(half, types.IntegerLiteral):
        return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source = llvm.item(context, builder, signature.args[1], arguments[1], arguments[2])
        target = llvm.item(context, builder, signature.args[3], arguments[3], arguments[4])
        item = 2 if half.literal_value else 4
        for row in range(0, TILE, 16):
            found = load_scales(
                builder, llvm.at(builder, source, ir.Constant(llvm.I64, row * item)), 16, bool(half.literal_value)
            )
            llvm.store(builder, found, llvm.at(builder, target, ir.Constant(llvm.I64, row)), 4)
        return context.get_dummy_value()

    return types.void(half, stream, types.intp, scales, types.intp), generate


_F4, _I4, _SIZE = types.float32, types.int32, types.intp


@functools.cache
def block_kernel(words: int, half: int, lanes: int) -> Kernel:
    """Return the kernel for k-tiles of `words` words, float16 or float32 scales and so many tokens.

    It writes the products of up to `lanes` tokens, of tiles first .. last - 1, to result (tokens, rows).
    """
    vectors = 8 * words
    scale_bytes = TILE * (2 if half else 4)
    k_tile_bytes = words * 8 * TILE
    columns = 64 * words

    @kernel(
        types.void(
            view(types.uint8, 1), view(_F4, 1), view(_F4, 1), _SIZE, _SIZE, _SIZE, _SIZE, view(types.int8, 2),
            view(_F4, 2), view(_I4, 2), _SIZE, _SIZE, out(types.int16, 1), out(types.int16, 1),
            out(_F4, 1), out(_F4, 1), out(_F4, 2),
        )
    )  # fmt: skip
    def multiply_tokens(
        stream: Any, weights: Any, multipliers: Any, k_tiles: Any, k_tiles_per_block: Any, scale_sets: Any,
        has_offset: Any, q: Any, token_scale: Any, token_sums: Any, first: Any, last: Any, turned: Any, tables: Any,
        scales: Any, acc: Any, result: Any,
    ) -> None:  # fmt: skip
        count, planes, rows = q.shape[0], weights.size, multipliers.size
        header = (scale_sets + has_offset) * scale_bytes
        blocks = (k_tiles + k_tiles_per_block - 1) // k_tiles_per_block
        tile_bytes = blocks * header + k_tiles * planes * k_tile_bytes
        factors = np.zeros(planes * lanes, np.float32)
        values = np.zeros(lanes, np.float32)
        for chunk in range(first, last, _TILES_AT_ONCE):
            end = min(chunk + _TILES_AT_ONCE, last)
            acc[: (end - chunk) * TILE * lanes] = 0
            for k_tile in range(k_tiles):
                block = k_tile // k_tiles_per_block
                for t in range(count):
                    for c in range(columns):
                        turned[c * lanes + t] = q[t, k_tile * columns + c]
                    factor = token_scale[t, k_tile * words // 2]
                    for p in range(planes):
                        factors[p * lanes + t] = factor * weights[p]
                _fill_tables(lanes, turned, tables)
                begins = k_tile % k_tiles_per_block == 0
                if begins and has_offset:
                    for t in range(count):
                        value = np.float32(0)
                        for u in range(k_tile, min(k_tile + k_tiles_per_block, k_tiles)):
                            total = 0
                            for w in range(u * words, (u + 1) * words):
                                total += token_sums[t, w]
                            value += np.float32(token_scale[t, u * words // 2] * np.float32(total))
                        values[t] = value
                for number in range(chunk, end):
                    position = number * tile_bytes + block * header + block * k_tiles_per_block * planes * k_tile_bytes
                    for s in range(scale_sets):
                        _widen(half, stream, position + s * scale_bytes, scales, s * TILE)
                    own = (number - chunk) * TILE * lanes
                    if begins and has_offset:
                        at = scale_sets * TILE
                        _widen(half, stream, position + scale_sets * scale_bytes, scales, at)
                        for r in range(TILE):
                            _add_scaled(lanes, values, scales[at + r], acc, own + r * lanes)
                    position += header + (k_tile % k_tiles_per_block) * planes * k_tile_bytes
                    for p in range(planes):
                        s = p * TILE if scale_sets == planes else 0
                        for b in range(TILE):
                            # The row that byte b of a packed vector is of (see stream.py).
                            i = b & 15
                            r = ((i & 1) << 5) + ((i >> 3) << 4) + ((i & 7) >> 1) + ((b >> 4) << 2)
                            _add_row(
                                lanes, vectors, stream, position + b, tables, factors, p * lanes, scales[s + r], acc,
                                own + r * lanes,
                            )  # fmt: skip
                        position += k_tile_bytes
            for number in range(chunk, end):
                own = (number - chunk) * TILE * lanes
                for t in range(count):
                    for r in range(min(TILE, rows - number * TILE)):
                        result[t, number * TILE + r] = acc[own + r * lanes + t] * multipliers[number * TILE + r]

    return multiply_tokens


def multiply_block(
    matrix: PackedMatrix, activations: Activations, start: int, stop: int, first: int, last: int,
    result: NDArray[np.float32],
) -> None:  # fmt: skip
    """Write the products of tokens start .. stop - 1, at most LANES, of tiles first .. last - 1 to result (n, rows)."""
    lanes = LANES if stop - start > FEW_LANES else FEW_LANES
    columns = 64 * matrix.k_tile_words
    turned, tables, acc = _scratch()
    turned[: columns * lanes] = 0  # the lanes of tokens that are not there
    scales = np.empty((matrix.scale_sets + 1) * TILE, np.float32)
    rows = slice(start, stop)
    block_kernel(matrix.k_tile_words, matrix.half, lanes)(
        matrix.stream, matrix.plane_weights, matrix.multipliers, matrix.k_tiles, matrix.k_tiles_per_block,
        matrix.scale_sets, matrix.has_offset, activations.q[rows], activations.scale[rows], activations.sums[rows],
        first, last, turned[: columns * lanes], tables, scales, acc, result[rows],
    )  # fmt: skip


def _scratch() -> tuple[NDArray[np.int16], NDArray[np.int16], NDArray[np.float32]]:
    """Return what the calling thread works in: new memory for each product would be new pages each time."""
    found: tuple[Any, Any, Any] | None = getattr(_kept, "arrays", None)
    if found is None:
        found = _kept.arrays = (
            aligned(2 * 128 * LANES).view(np.int16),
            aligned(2 * 32 * _ENTRIES * LANES).view(np.int16),
            aligned(4 * _TILES_AT_ONCE * TILE * LANES).view(np.float32),
        )
    return found
