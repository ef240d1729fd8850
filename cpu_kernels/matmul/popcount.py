"""Population counts over bit-sliced activations: the portable kernel, and the reference of the others.

Bit a of 64 activations is one word X_a. With two's complement digits w_a the sum of x over the weights that are set
is sum over a of w_a * popcount(W & X_a), and the product of the +-1 weights with x is twice that minus sum x.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from cpu_kernels.jit import vector as v

LANES = 8  # rows side by side: one 512-bit register of words


@intrinsic(prefer_literal=True)
def slice_word(typing: Any, bits: Any, q: Any, start: Any, slices: Any, place: Any) -> Any:
    """Write bits 0, 1, ... of the 64 int8 items of flat q at `start` as consecutive words at byte `place`."""
    if not isinstance(bits, types.IntegerLiteral):
        return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source = v.data(context, builder, signature.args[1], arguments[1])
        target = v.data(context, builder, signature.args[3], arguments[3])
        values = v.load(builder, v.at(builder, source, arguments[2]), v.I8, 64, 1)
        for a in range(bits.literal_value):
            moved = builder.shl(values, v.constant(v.I8, 64, 7 - a))
            word = builder.bitcast(builder.icmp_signed("<", moved, v.constant(v.I8, 64, 0)), v.I64)
            pointer = v.at(builder, target, arguments[4], 8 * a)
            builder.store(word, builder.bitcast(pointer, v.I64.as_pointer()), align=8)
        return context.get_dummy_value()

    return types.void(bits, q, types.intp, slices, types.intp), generate


def emit_unit(
    builder: Any,
    bits: int,
    words: int,
    half: bool,
    packed: Any,
    slices: Any,
    constant: Any,
    factor: Any,
    scales: Any,
    acc: Any,
) -> None:
    """Add the product of one unit (`words` words of 32 rows) with one token to the accumulators."""
    rows = v.tile_rows(v.PORTABLE)
    masks = [
        builder.load(builder.bitcast(v.at(builder, slices, ir.Constant(v.I64, 8 * k)), v.I64.as_pointer()), align=8)
        for k in range(words * bits)
    ]
    for row in range(0, rows, LANES):
        total = v.constant(v.I64, LANES, 0)
        for word in range(words):
            place = v.at(builder, packed, ir.Constant(v.I64, 8 * (word * rows + row)))
            weights = v.load(builder, place, v.I64, LANES, 32)
            for a in range(bits):
                chosen = builder.and_(weights, v.splat(builder, masks[word * bits + a], LANES))
                count = builder.shl(v.population(builder, chosen), v.constant(v.I64, LANES, a))
                total = builder.sub(total, count) if a == bits - 1 else builder.add(total, count)
        narrow = builder.trunc(total, ir.VectorType(v.I32, LANES))
        dots = builder.sub(builder.shl(narrow, v.constant(v.I32, LANES, 1)), v.splat(builder, constant, LANES))
        item = 2 if half else 4
        scale = v.load_scales(builder, v.at(builder, scales, ir.Constant(v.I64, row * item)), LANES, half)
        scale = builder.fmul(scale, v.splat(builder, factor, LANES))
        pointer = v.at(builder, acc, ir.Constant(v.I64, row))
        value = builder.sitofp(dots, ir.VectorType(v.F32, LANES))
        v.store(builder, v.multiply_add(builder, value, scale, v.load(builder, pointer, v.F32, LANES, 4)), pointer, 4)
