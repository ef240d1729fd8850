"""Population counts over bit-sliced activations: the portable kernel, and the reference of the others.

Bit a of 64 activations is one word X_a. With two's complement digits w_a the sum of x over the weights that are set
is sum over a of w_a * popcount(W & X_a), and the product of the +-1 weights with x is twice that minus sum x.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from cpu_kernels.jit import cpu_features, llvm
from cpu_kernels.matmul.shuffle import load_scales

LANES = 8  # rows side by side: one 512-bit register of words


@intrinsic(prefer_literal=True)
def slice_word(typing: Any, bits: Any, q: Any, start: Any, slices: Any, place: Any) -> Any:
    """Write bits 0, 1, ... of the 64 int8 items of flat q at `start` as consecutive words at byte `place`."""
    if not isinstance(bits, types.IntegerLiteral):
        return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source = llvm.data(context, builder, signature.args[1], arguments[1])
        target = llvm.data(context, builder, signature.args[3], arguments[3])
        values = llvm.load(builder, llvm.at(builder, source, arguments[2]), llvm.I8, 64, 1)
        for a in range(bits.literal_value):
            moved = builder.shl(values, llvm.constant(llvm.I8, 64, 7 - a))
            word = builder.bitcast(builder.icmp_signed("<", moved, llvm.constant(llvm.I8, 64, 0)), llvm.I64)
            pointer = llvm.at(builder, target, arguments[4], 8 * a)
            builder.store(word, builder.bitcast(pointer, llvm.I64.as_pointer()), align=8)
        return context.get_dummy_value()

    return types.void(bits, q, types.intp, slices, types.intp), generate


def emit_k_tile(
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
    """Add the product of one k-tile (`words` words of 32 rows) with one token to the accumulators."""
    rows = cpu_features.tile_rows(cpu_features.PORTABLE)
    masks = [
        builder.load(
            builder.bitcast(llvm.at(builder, slices, ir.Constant(llvm.I64, 8 * k)), llvm.I64.as_pointer()), align=8
        )
        for k in range(words * bits)
    ]
    for row in range(0, rows, LANES):
        total = llvm.constant(llvm.I64, LANES, 0)
        for word in range(words):
            place = llvm.at(builder, packed, ir.Constant(llvm.I64, 8 * (word * rows + row)))
            weights = llvm.load(builder, place, llvm.I64, LANES, 32)
            for a in range(bits):
                chosen = builder.and_(weights, llvm.splat(builder, masks[word * bits + a], LANES))
                count = builder.shl(llvm.population(builder, chosen), llvm.constant(llvm.I64, LANES, a))
                total = builder.sub(total, count) if a == bits - 1 else builder.add(total, count)
        narrow = builder.trunc(total, ir.VectorType(llvm.I32, LANES))
        dots = builder.sub(builder.shl(narrow, llvm.constant(llvm.I32, LANES, 1)), llvm.splat(builder, constant, LANES))
        item = 2 if half else 4
        scale = load_scales(builder, llvm.at(builder, scales, ir.Constant(llvm.I64, row * item)), LANES, half)
        scale = builder.fmul(scale, llvm.splat(builder, factor, LANES))
        pointer = llvm.at(builder, acc, ir.Constant(llvm.I64, row))
        value = builder.sitofp(dots, ir.VectorType(llvm.F32, LANES))
        llvm.store(
            builder,
            llvm.multiply_add(builder, value, scale, llvm.load(builder, pointer, llvm.F32, LANES, 4)),
            pointer,
            4,
        )
