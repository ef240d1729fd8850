"""Products with several tokens at once: tables of 64 entries of 16 bits, the sums of six columns.

The kernel for one token (lookup.py) has tables of 16 bytes for four columns, in two parts for 8 bits. AVX-512 also
chooses among 64 items of 16 bits in one instruction: one table does for six columns, a sum needs no second part, and
nothing has to be widened. Such tables take longer to make, so that this is for two tokens or more, of which TOGETHER
share the bits of the weights that are taken apart for them. All of this was measured on Zen 4 alone, which chooses so
once a cycle; others may take longer. There one token is multiplied so too, by wide_token.py.

Of three bytes of a row, 24 columns, the lower six bits of each choose from a table, and the upper two of all three from
a fourth. The stream is the lookup kernels' own, and so are all numbers, to the last bit: sums are exact, and float32
operations are the same in the same order.
"""

import functools
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from cpu_kernels.jit import cpu_features, llvm
from cpu_kernels.jit.addresses import (
    float32_items,
    float32_rows,
    int8_rows,
    int32_items,
    int32_rows,
    int64_items,
    uint8_items,
)
from cpu_kernels.jit.compiler import Kernel, inline_whole, kernel
from cpu_kernels.matmul import lookup
from cpu_kernels.matmul.aligned_memory import aligned
from cpu_kernels.matmul.k_tile import add_offset, prefetch_ways
from cpu_kernels.matmul.prepacking import PackedMatrix
from cpu_kernels.matmul.product_kernel import AT, WORDS

CODE = cpu_features.AVX512BW
TILE = 64  # rows, of AVX-512
FEWEST = 2  # tokens that are multiplied so
TOGETHER = 4  # tokens; of 8 the sums do not fit the registers beside the rest: 0.4 x the speed
TILES_AT_ONCE = 32  # which use the tables of a k-tile before those of the next one are made
_TRIPLE = 3  # packed vectors, of 8 columns each, that share four tables
_GROUPS = ([0, 1, 2, 3, 4, 5], [8, 9, 10, 11, 12, 13], [16, 17, 18, 19, 20, 21], [6, 7, 14, 15, 22, 23])  # columns
_TABLE = 128  # bytes of 64 entries
_LANES = 32  # of 16 bits


def table_bytes(words: int) -> int:
    """Return the bytes of one token's tables of a k-tile of `words` words."""
    triples, rest = divmod(8 * words, _TRIPLE)
    return (len(_GROUPS) * triples + rest) * _TABLE


def fits(matrix: PackedMatrix) -> bool:
    """Return whether the matrix is laid out so that this kernel multiplies it."""
    return matrix.kernel == "lookup" and matrix.code == CODE


class Scratch:
    """What the kernel works in, in one thread, for k-tiles of `words` words; `operands` are a job's words for it."""

    def __init__(self, words: int) -> None:
        self._arrays: dict[str, NDArray[Any]] = {
            "tables": aligned(TOGETHER * table_bytes(words)),
            "accumulators": aligned(4 * TILES_AT_ONCE * TOGETHER * TILE),
            "constants": np.empty(TOGETHER, np.int32),
            "factors": np.empty(TOGETHER, np.float32),
            "offsets": np.empty(TOGETHER, np.float32),
        }
        self.operands = {name: array.ctypes.data for name, array in self._arrays.items()}


@intrinsic(prefer_literal=True)
def fill_tables(typing: Any, words: Any, q: Any, start: Any, tables: Any, place: Any) -> Any:
    """Write one token's tables of a k-tile, from the int8 items of flat q at `start`, to the bytes tables[place:].

    An entry is twice the sum of |x| over the columns whose bit agrees with the sign of x, as in lookup.py.
    """
    if not isinstance(words, types.IntegerLiteral):
        return None
    triples, rest = divmod(8 * words.literal_value, _TRIPLE)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source = llvm.item(context, builder, signature.args[1], arguments[1], arguments[2])
        target = llvm.item(context, builder, signature.args[3], arguments[3], arguments[4])

        def if_clear_and_if_set(column: int, count: int) -> tuple[Any, Any]:
            place = llvm.at(builder, source, ir.Constant(llvm.I64, column))
            x = builder.sext(llvm.load(builder, place, llvm.I8, count, 1), ir.VectorType(llvm.I16, count))
            twice, zero = builder.add(x, x), llvm.constant(llvm.I16, count, 0)
            if_set = builder.select(builder.icmp_signed(">", x, zero), twice, zero)
            return builder.sub(if_set, twice), if_set

        def summed(found: tuple[Any, Any], columns: list[list[int]]) -> Any:
            """Add up, for lane p, the columns[bit][p] of if_set where this bit of p is 1, of if_clear where it is 0."""
            count = found[0].type.count
            total = None
            for bit, of_lanes in enumerate(columns):
                lanes = [column + count * (p >> bit & 1) for p, column in enumerate(of_lanes)]
                chosen = llvm.select(builder, *found, lanes)
                total = chosen if total is None else builder.add(total, chosen)
            return total

        vectors = []
        for triple in range(triples):
            found = if_clear_and_if_set(24 * triple, 32)
            # Of each group's lower and of its upper three columns, the eight sums, side by side: an entry is two of
            # them.
            lower, upper = (
                summed(found, [[columns[first + bit] for columns in _GROUPS for _ in range(8)] for bit in range(3)])
                for first in (0, 3)
            )
            for group in range(len(_GROUPS)):
                own = [8 * group + (p & 7) for p in range(_LANES)]
                first = llvm.select(builder, lower, lower, own)
                for half in (0, 4):
                    second = llvm.select(builder, upper, upper, [8 * group + half + (p >> 3) for p in range(_LANES)])
                    vectors.append(builder.add(first, second))
        for vector in range(_TRIPLE * triples, _TRIPLE * triples + rest):
            found = if_clear_and_if_set(8 * vector, 8)
            vectors += [summed(found, [[first + bit] * _LANES for bit in range(4)]) for first in (0, 4)]
        for number, entries in enumerate(vectors):
            llvm.store(builder, entries, llvm.at(builder, target, ir.Constant(llvm.I64, 64 * number)), 64)
        return context.get_dummy_value()

    return types.void(words, q, types.intp, tables, types.intp), generate


def _opaque(builder: Any, values: list[Any]) -> list[Any]:
    """Return two vector registers as they are; LLVM knows nothing of that, nor moves what makes them past here."""
    kinds = [value.type for value in values]
    nothing = ir.FunctionType(ir.LiteralStructType(kinds), kinds)
    found = builder.call(ir.InlineAsm(nothing, "", "=v,=v,0,1", side_effect=True), values)
    return [builder.extract_value(found, k) for k in (0, 1)]


def _emit_sums(
    builder: Any, words: int, packed: Any, tables: list[Any], near: Any, ahead: list[Any]
) -> list[list[Any]]:
    """Return for each token 2 A of a k-tile's even and odd bytes, in 16 bits, as lookup.emit_sums does."""
    sixteen = ir.VectorType(llvm.I16, _LANES)
    triples, rest = divmod(8 * words, _TRIPLE)
    totals: list[list[Any]] = [[None, None] for _ in tables]

    def shifted(value: Any, bits: int) -> Any:
        return builder.lshr(value, llvm.constant(llvm.I16, _LANES, bits))

    def bits_of(vector: int) -> Any:
        place = ir.Constant(llvm.I64, TILE * vector)
        line, way = divmod(vector, len(ahead))
        llvm.prefetch(builder, llvm.at(builder, ahead[way], ir.Constant(llvm.I64, TILE * line)))
        llvm.prefetch(builder, llvm.at(builder, near, place), 1)
        return llvm.load(builder, llvm.at(builder, packed, place), llvm.I16, _LANES, 32)

    def add(token: int, half: int, value: Any) -> None:
        before = totals[token][half]
        totals[token][half] = value if before is None else builder.add(before, value)

    def entries(table: Any, number: int) -> Any:
        return llvm.load(builder, llvm.at(builder, table, ir.Constant(llvm.I64, 64 * number)), llvm.I16, _LANES, 64)

    def settle(token: int) -> None:
        """Let LLVM put off no addition: it kept all that was chosen on the stack, 1.7 x the time."""
        totals[token] = _opaque(builder, totals[token])

    for triple in range(triples):
        # Else what is taken apart for later columns is made long before and kept on the stack.
        builder.fence("seq_cst", "singlethread")
        indices = [bits_of(_TRIPLE * triple + n) for n in range(_TRIPLE)]
        upper = None
        for n, value in enumerate(indices):
            mask = llvm.constant(llvm.I16, _LANES, 0x0303 << 2 * n)
            own = builder.and_(shifted(value, 6 - 2 * n), mask)
            upper = own if upper is None else builder.or_(upper, own)
        indices.append(upper)
        # The instruction looks at the lower six bits of 16: even bytes are there as they are, odd ones are moved there.
        halves = [indices, [shifted(value, 8) for value in indices]]
        for t, table in enumerate(tables):
            for group in range(len(_GROUPS)):
                number = 2 * (len(_GROUPS) * triple + group)
                low, high = entries(table, number), entries(table, number + 1)
                for half in (0, 1):
                    chosen = [low, halves[half][group], high]
                    add(t, half, llvm.call(builder, "llvm.x86.avx512.vpermi2var.hi.512", sixteen, chosen))
            settle(t)
    for k in range(rest):
        builder.fence("seq_cst", "singlethread")
        value = bits_of(_TRIPLE * triples + k)
        nibbles = [value, *(shifted(value, bits) for bits in (4, 8, 12))]
        for t, table in enumerate(tables):
            for n in (0, 1):
                chosen_from = entries(table, 2 * (len(_GROUPS) * triples + k) + n)
                for half in (0, 1):
                    arguments = [chosen_from, nibbles[2 * half + n]]  # of 32 entries the upper 16 are equal to these
                    add(t, half, llvm.call(builder, "llvm.x86.avx512.permvar.hi.512", sixteen, arguments))
    return totals


@intrinsic(prefer_literal=True)
def wide_k_tile(
    typing: Any, words: Any, half: Any, together: Any, stream: Any, packed: Any, scales: Any, near: Any, ahead: Any,
    apart: Any, tables: Any, table: Any, constants: Any, factors: Any, first: Any, weight: Any, acc: Any, place: Any,
) -> Any:  # fmt: skip
    """Add the product of one k-tile of one plane with `together` tokens to acc[place:]; positions are bytes or items.

    Their tables begin at `table`, their constants and factors at `first`. The stream at `near` is asked for meanwhile,
    for the first-level cache, and that at `ahead` for the second; of one token at ahead + apart, ... in turn.
    """
    literals = (words, half, together)
    if not all(isinstance(literal, types.IntegerLiteral) for literal in literals):
        return None
    count, is_half, tokens = (literal.literal_value for literal in literals)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args
        base = llvm.data(context, builder, kinds[3], arguments[3])
        packed_at, scales_at, near_at, ahead_at = (llvm.at(builder, base, arguments[k]) for k in (4, 5, 6, 7))
        asked = [ahead_at]
        while tokens == 1 and len(asked) < lookup.WAYS:
            asked.append(llvm.at(builder, asked[-1], arguments[8]))
        table = llvm.item(context, builder, kinds[9], arguments[9], arguments[10])
        steps = [ir.Constant(llvm.I64, t) for t in range(tokens)]
        own = [llvm.at(builder, table, ir.Constant(llvm.I64, t * table_bytes(count))) for t in range(tokens)]
        sums = _emit_sums(builder, count, packed_at, own, near_at, asked)

        def of_tokens(k: int) -> list[Any]:
            begin = llvm.item(context, builder, kinds[k], arguments[k], arguments[13])
            return [builder.load(llvm.at(builder, begin, step)) for step in steps]

        scaled = [builder.fmul(factor, arguments[14]) for factor in of_tokens(12)]
        acc_at = llvm.item(context, builder, kinds[15], arguments[15], arguments[16])
        lookup.emit_apply(builder, TILE, bool(is_half), sums, of_tokens(11), scaled, scales_at, acc_at)
        return context.get_dummy_value()

    index = types.intp
    signature = types.void(
        *literals, stream, index, index, index, index, index, tables, index, constants, factors, index, types.float32,
        acc, index,
    )  # fmt: skip
    return signature, generate


@inline_whole
def _prepare(
    words: Any, k_tile: Any, start: Any, count: Any, size: Any, q: Any, token_scale: Any, absolute: Any, constants: Any,
    factors: Any, tables: Any,
) -> None:  # fmt: skip
    """Make the constants, factors and tables of a k-tile, of `count` tokens from `start` on."""
    flat = q.reshape(q.size)
    for t in range(count):
        magnitude = 0
        for w in range(k_tile * words, (k_tile + 1) * words):
            magnitude += absolute[start + t, w]
        constants[t] = lookup.LIFT + magnitude
        factors[t] = token_scale[start + t, k_tile * words // 2]
        fill_tables(words, flat, (start + t) * q.shape[1] + k_tile * words * 64, tables, t * size)


@functools.cache
def wide_kernel(words: int, half: int) -> Kernel:
    """Return the kernel for k-tiles of `words` words and float16 or 32 scales.

    It takes the address of a job as product_kernel's does, for tokens that are quantized already, and computes tiles
    first .. last - 1. Its scratch: `tables` of TOGETHER tokens, `accumulators` float32 (TILES_AT_ONCE * TOGETHER *
    TILE,), `constants`, `factors` and `offsets` (TOGETHER,).
    """
    scale_bytes = TILE * (2 if half else 4)
    k_tile_bytes = words * 8 * TILE
    size = table_bytes(words)

    @kernel(types.void(types.int64, types.int64, types.int64))
    def multiply_wide(job_address: Any, first: Any, last: Any) -> None:
        job = int64_items(job_address, WORDS)
        rows, k_tiles, k_tiles_per_block = job[AT.rows], job[AT.k_tiles], job[AT.k_tiles_per_block]
        scale_sets, has_offset, planes = job[AT.scale_sets], job[AT.has_offset], job[AT.planes]
        tokens, segments = job[AT.tokens], job[AT.segments]
        stream = uint8_items(job[AT.stream], 1)
        weights = float32_items(job[AT.weights], planes)
        multipliers = float32_items(job[AT.multipliers], rows)
        q = int8_rows(job[AT.q], tokens, 128 * segments)
        token_scale = float32_rows(job[AT.scale], tokens, segments)
        sums = int32_rows(job[AT.sums], tokens, 2 * segments)
        absolute = int32_rows(job[AT.absolute], tokens, 2 * segments)
        tables = uint8_items(job[AT.tables], TOGETHER * size)
        constants = int32_items(job[AT.constants], TOGETHER)
        factors = float32_items(job[AT.factors], TOGETHER)
        offsets = float32_items(job[AT.offsets], TOGETHER)
        acc = float32_items(job[AT.accumulators], TILES_AT_ONCE * TOGETHER * TILE)
        result = float32_rows(job[AT.result], tokens, rows)
        header = (scale_sets + has_offset) * scale_bytes
        scale_step = 0 if scale_sets < planes else scale_bytes
        blocks = (k_tiles + k_tiles_per_block - 1) // k_tiles_per_block
        tile_bytes = blocks * header + k_tiles * planes * k_tile_bytes
        # What nothing before has asked for.
        for number in range(first, min(first + TILES_AT_ONCE, last)):
            for step in range(0, header + planes * k_tile_bytes, lookup.WAYS * lookup.LINE):
                prefetch_ways(stream, number * tile_bytes + step, lookup.LINE)
        for chunk in range(first, last, TILES_AT_ONCE):
            end = min(chunk + TILES_AT_ONCE, last)
            for start in range(0, tokens, TOGETHER):
                count = min(TOGETHER, tokens - start)
                acc[: (end - chunk) * TOGETHER * TILE] = 0
                constants[:] = lookup.LIFT  # those of tokens that are not there, with the factor 0
                factors[:] = 0
                scales_at = 0
                place = 0
                for k_tile in range(k_tiles):
                    begins = k_tile % k_tiles_per_block == 0
                    if begins:
                        scales_at = place
                        place += header
                        if has_offset:
                            last_of_block = min(k_tile + k_tiles_per_block, k_tiles)
                            _block_sums(words, k_tile, last_of_block, start, count, token_scale, sums, offsets)
                    _prepare(
                        words, k_tile, start, count, size, q, token_scale, absolute, constants, factors, tables
                    )  # fmt: skip
                    # The same tile's next k-tile is asked for, and at the last one the first of a later tile.
                    ahead = planes * k_tile_bytes
                    if k_tile == k_tiles - 1:
                        ahead = (end - chunk) * tile_bytes - place
                    for number in range(chunk, end):
                        base = number * tile_bytes
                        own = (number - chunk) * TOGETHER * TILE
                        near = tile_bytes if number + 1 < end else ahead - (number - chunk) * tile_bytes
                        if begins and has_offset:
                            at = base + scales_at + scale_sets * scale_bytes
                            for t in range(count):
                                add_offset(TILE, half, stream, at, offsets[t], acc, own + t * TILE)
                        scale = base + scales_at
                        position = base + place
                        for p in range(planes):
                            if count > 2:
                                wide_k_tile(
                                    words, half, TOGETHER, stream, position, scale, position + near, position + ahead,
                                    0, tables, 0, constants, factors, 0, weights[p], acc, own,
                                )  # fmt: skip
                            else:
                                wide_k_tile(
                                    words, half, 2, stream, position, scale, position + near, position + ahead,
                                    0, tables, 0, constants, factors, 0, weights[p], acc, own,
                                )  # fmt: skip
                            scale += scale_step
                            position += k_tile_bytes
                    place += planes * k_tile_bytes
                for number in range(chunk, end):
                    for t in range(count):
                        own = ((number - chunk) * TOGETHER + t) * TILE
                        for r in range(min(TILE, rows - number * TILE)):
                            result[start + t, number * TILE + r] = acc[own + r] * multipliers[number * TILE + r]

    return multiply_wide


@inline_whole
def _block_sums(
    words: Any, first: Any, last: Any, start: Any, count: Any, token_scale: Any, sums: Any, offsets: Any
) -> None:
    """Write the sums of x over k-tiles first .. last - 1, of `count` tokens from `start` on."""
    for t in range(count):
        value = np.float32(0)
        for u in range(first, last):
            total = 0
            for w in range(u * words, (u + 1) * words):
                total += sums[start + t, w]
            value += np.float32(token_scale[start + t, u * words // 2] * np.float32(total))
        offsets[t] = value
