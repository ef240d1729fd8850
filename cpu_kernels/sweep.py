"""The loop around both kernels: token blocks, tiles of rows, blocks and units of columns, planes, tokens.

The packed stream of a matrix is read in order, once per block of tokens. Per tile of 32 or 64 rows and per block of
columns it holds the scales of every plane (and of the offset), then for every unit of 64 or 128 columns and every
plane the packed bits (see stream.py).
"""

import functools
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from cpu_kernels import lookup, popcount
from cpu_kernels import vector as v
from cpu_kernels.compiler import Kernel, kernel, out, view

TOGETHER = 4  # tokens that share one pass over the packed bits of a unit


def table_bytes(instruction_set: int, bits: int) -> int:
    """Return the bytes of prepared activations (tables or bit slices) per 64 columns of one token."""
    if instruction_set == v.PORTABLE:
        return 8 * bits
    return 256 if bits == 6 else 512


@intrinsic(prefer_literal=True)
def _unit(
    typing: Any,
    instruction_set: Any,
    bits: Any,
    words: Any,
    half: Any,
    tokens: Any,
    stream: Any,
    packed: Any,
    scales: Any,
    tables: Any,
    table: Any,
    constants: Any,
    factors: Any,
    first: Any,
    weight: Any,
    acc: Any,
    place: Any,
) -> Any:
    """Add the product of one unit of one plane with `tokens` tokens to acc[place:]; positions are bytes or items."""
    literals = (instruction_set, bits, words, half, tokens)
    if not all(isinstance(literal, types.IntegerLiteral) for literal in literals):
        return None
    chosen, width, count, is_half, together = (literal.literal_value for literal in literals)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args
        base = v.data(context, builder, kinds[5], arguments[5])
        packed_at, scales_at = v.at(builder, base, arguments[6]), v.at(builder, base, arguments[7])
        tables_at = v.at(builder, v.data(context, builder, kinds[8], arguments[8]), arguments[9])
        constants_at = v.at(builder, v.data(context, builder, kinds[10], arguments[10]), arguments[12])
        factors_at = v.at(builder, v.data(context, builder, kinds[11], arguments[11]), arguments[12])
        acc_at = v.at(builder, v.data(context, builder, kinds[14], arguments[14]), arguments[15])
        steps = [ir.Constant(v.I64, t) for t in range(together)]
        constant = [builder.load(v.at(builder, constants_at, step)) for step in steps]
        factor = [builder.fmul(builder.load(v.at(builder, factors_at, step)), arguments[13]) for step in steps]
        if chosen == v.PORTABLE:
            popcount.emit_unit(
                builder, width, count, bool(is_half), packed_at, tables_at, constant[0], factor[0], scales_at, acc_at
            )
        else:
            size = table_bytes(chosen, width) * count
            token_tables = [v.at(builder, tables_at, ir.Constant(v.I64, t * size)) for t in range(together)]
            sums = lookup.emit_sums(builder, chosen, width, 8 * count, packed_at, token_tables, together == 1)
            lookup.emit_apply(builder, v.tile_rows(chosen), bool(is_half), sums, constant, factor, scales_at, acc_at)
        return context.get_dummy_value()

    index = types.intp
    signature = types.void(
        *literals, stream, index, index, tables, index, constants, factors, index, types.float32, acc, index
    )
    return signature, generate


@intrinsic(prefer_literal=True)
def _add_offset(typing: Any, rows: Any, half: Any, stream: Any, scales: Any, value: Any, acc: Any, place: Any) -> Any:
    """Add value * offset of each row to acc[place:]."""
    if not isinstance(rows, types.IntegerLiteral) or not isinstance(half, types.IntegerLiteral):
        return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args
        lanes = 16
        base = v.at(builder, v.data(context, builder, kinds[2], arguments[2]), arguments[3])
        target = v.at(builder, v.data(context, builder, kinds[5], arguments[5]), arguments[6])
        item = 2 if half.literal_value else 4
        for row in range(0, rows.literal_value, lanes):
            offset = v.load_scales(
                builder, v.at(builder, base, ir.Constant(v.I64, row * item)), lanes, bool(half.literal_value)
            )
            pointer = v.at(builder, target, ir.Constant(v.I64, row))
            before = v.load(builder, pointer, v.F32, lanes, 4)
            after = v.multiply_add(builder, offset, v.splat(builder, arguments[4], lanes), before)
            v.store(builder, after, pointer, 4)
        return context.get_dummy_value()

    return types.void(rows, half, stream, types.intp, types.float32, acc, types.intp), generate


_SIGNATURE = types.void(
    view(types.uint8, 1),  # stream
    types.intp,  # rows
    types.intp,  # units
    types.intp,  # units per block
    types.intp,  # sets of scales per block
    types.intp,  # 1 where an offset follows them
    view(types.float32, 1),  # weight of each plane (1 where it has scales of its own)
    view(types.float32, 1),  # multiplier of each row
    view(types.int8, 2),  # q
    view(types.float32, 2),  # scale of each token and 128 columns
    view(types.int32, 2),  # sum of q per 64 columns
    view(types.int32, 2),  # sum of |q| per 64 columns
    out(types.uint8, 1),  # prepared tables or slices of one token block
    out(types.int32, 1),  # prepared constants
    out(types.float32, 1),  # prepared factors
    out(types.float32, 1),  # prepared sums of x
    types.intp,  # tokens per block
    types.intp,  # 1 where they are prepared already
    types.intp,  # first tile
    types.intp,  # tile after the last
    out(types.float32, 2),  # result
)


@functools.cache
def sweep(instruction_set: int, bits: int, words: int, half: int) -> Kernel:
    """Return the kernel for one instruction set, activation width, unit of `words` words and float16 or 32 scales."""
    tile = v.tile_rows(instruction_set)
    portable = 1 if instruction_set == v.PORTABLE else 0
    together = 1 if portable else TOGETHER
    per_word = table_bytes(instruction_set, bits)
    item = 2 if half else 4
    part_bytes = per_word * lookup.GROUP // 64 if not portable else 0

    @kernel(_SIGNATURE)
    def multiply(
        stream: Any,
        rows: Any,
        units: Any,
        units_per_block: Any,
        scale_sets: Any,
        has_offset: Any,
        weights: Any,
        multipliers: Any,
        q: Any,
        token_scale: Any,
        sums: Any,
        absolute: Any,
        tables: Any,
        constants: Any,
        factors: Any,
        offsets: Any,
        token_block: Any,
        prepared: Any,
        first: Any,
        last: Any,
        result: Any,
    ) -> None:
        planes = weights.size
        unit_bytes = words * 8 * tile
        scale_bytes = tile * item
        header = (scale_sets + has_offset) * scale_bytes
        blocks = (units + units_per_block - 1) // units_per_block
        tile_bytes = blocks * header + units * planes * unit_bytes
        shared = 1 if scale_sets < planes else 0
        flat = q.reshape(q.size)
        accumulators = np.empty(token_block * tile + 16, np.float32)
        base = (64 - accumulators.ctypes.data % 64) % 64 // 4
        for start in range(0, q.shape[0], token_block):
            count = min(token_block, q.shape[0] - start)
            if not prepared:
                for t in range(count):
                    for u in range(units):
                        place = u * count + t
                        total = 0
                        size = 0
                        for w in range(u * words, (u + 1) * words):
                            total += sums[start + t, w]
                            size += absolute[start + t, w]
                        constants[place] = total if portable else size
                        factor = token_scale[start + t, u * words // 2]
                        factors[place] = factor
                        offsets[place] = factor * np.float32(total)
                        for w in range(words):
                            at = (start + t) * q.shape[1] + (u * words + w) * 64
                            to = (place * words + w) * per_word
                            if portable:
                                popcount.slice_word(bits, flat, at, tables, to)
                            else:
                                for g in range(16):
                                    lookup.fill_table(bits, flat, at + 4 * g, tables, to + g * part_bytes)
            for number in range(first, last):
                position = number * tile_bytes
                accumulators[:] = 0
                unit = 0
                while unit < units:
                    scales = position
                    position += header
                    end = min(unit + units_per_block, units)
                    if has_offset:
                        for t in range(count):
                            value = np.float32(0)
                            for u in range(unit, end):
                                value += offsets[u * count + t]
                            _add_offset(
                                tile,
                                half,
                                stream,
                                scales + scale_sets * scale_bytes,
                                value,
                                accumulators,
                                base + t * tile,
                            )
                    for u in range(unit, end):
                        for p in range(planes):
                            scale = scales if shared else scales + p * scale_bytes
                            weight = weights[p]
                            t = 0
                            while t + together <= count:
                                place = u * count + t
                                _unit(
                                    instruction_set,
                                    bits,
                                    words,
                                    half,
                                    together,
                                    stream,
                                    position,
                                    scale,
                                    tables,
                                    place * words * per_word,
                                    constants,
                                    factors,
                                    place,
                                    weight,
                                    accumulators,
                                    base + t * tile,
                                )
                                t += together
                            while t < count:
                                place = u * count + t
                                _unit(
                                    instruction_set,
                                    bits,
                                    words,
                                    half,
                                    1,
                                    stream,
                                    position,
                                    scale,
                                    tables,
                                    place * words * per_word,
                                    constants,
                                    factors,
                                    place,
                                    weight,
                                    accumulators,
                                    base + t * tile,
                                )
                                t += 1
                            position += unit_bytes
                    unit = end
                for t in range(count):
                    for r in range(number * tile, min((number + 1) * tile, rows)):
                        result[start + t, r] = accumulators[base + t * tile + r - number * tile] * multipliers[r]

    return multiply
