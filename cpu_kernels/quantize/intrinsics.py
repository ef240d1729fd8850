"""LLVM vector operations that plain Numba loops do not reach: 64 weights to one word of a bit plane, sorted lanes.

Everything here is portable LLVM IR (no target instruction by name): a compare of 64 lanes whose result is
reinterpreted as one integer becomes compare + movemask on x86 and the like elsewhere.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from cpu_kernels.jit import llvm

LANES = 32  # row-blocks that are sorted side by side: one 512-bit or two 256-bit registers of 16-bit keys


def _load(context: Any, builder: Any, array_type: Any, array: Any, index: Any, lanes: int) -> Any:
    item = context.get_data_type(array_type.dtype)
    return llvm.load(builder, llvm.item(context, builder, array_type, array, index), item, lanes, item.width // 8)


@intrinsic
def high_bits(typing: Any, array: Any, start: Any) -> Any:
    """Return the highest bit of 64 consecutive items of a flat integer array as one uint64 (item 0 in bit 0)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values = _load(context, builder, signature.args[0], arguments[0], arguments[1], 64)
        zero = ir.Constant(values.type, None)
        return builder.bitcast(builder.icmp_signed("<", values, zero), llvm.I64)

    return types.uint64(array, types.intp), generate


@intrinsic
def bit_plane(typing: Any, array: Any, start: Any, bit: Any) -> Any:
    """Return bit number `bit` of 64 consecutive items of a flat uint8 array as one uint64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values = _load(context, builder, signature.args[0], arguments[0], arguments[1], 64)
        shift = builder.sub(ir.Constant(llvm.I8, 7), builder.trunc(arguments[2], llvm.I8))
        moved = builder.shl(values, llvm.splat(builder, shift, 64))
        return builder.bitcast(builder.icmp_signed("<", moved, ir.Constant(values.type, None)), llvm.I64)

    return types.uint64(array, types.intp, types.intp), generate


@intrinsic
def four_items(typing: Any, array: Any, start: Any) -> Any:
    """Return four consecutive items of a flat uint16 array as one uint64 (item 0 in the low bits)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = llvm.item(context, builder, signature.args[0], arguments[0], arguments[1])
        return builder.load(builder.bitcast(pointer, llvm.I64.as_pointer()), align=2)

    return types.uint64(array, types.intp), generate


@intrinsic
def above(typing: Any, array: Any, start: Any, mask: Any, threshold: Any) -> Any:
    """Return for 64 consecutive items of a flat unsigned array whether `item & mask > threshold`, as one uint64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values = _load(context, builder, signature.args[0], arguments[0], arguments[1], 64)
        masked = builder.and_(values, llvm.splat(builder, arguments[2], 64))
        return builder.bitcast(builder.icmp_unsigned(">", masked, llvm.splat(builder, arguments[3], 64)), llvm.I64)

    return types.uint64(array, types.intp, array.dtype, array.dtype), generate


@intrinsic
def lowest_bit(typing: Any, word: Any) -> Any:
    """Return the number of the lowest bit that is set in a uint64 other than 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return llvm.call(builder, "llvm.cttz.i64", llvm.I64, [arguments[0], ir.Constant(ir.IntType(1), 1)])

    return types.int64(types.uint64), generate


@intrinsic
def order_rows(typing: Any, keys: Any, first: Any, second: Any) -> Any:
    """Order rows `first` and `second` of keys (n, LANES) lane by lane: the lesser key goes to the first row."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0]
        item = context.get_data_type(kind.dtype)
        width = item.width // 8
        pointers = []
        for row in arguments[1:]:
            index = builder.mul(row, ir.Constant(row.type, LANES))
            pointers.append(llvm.item(context, builder, kind, arguments[0], index))
        low, high = (llvm.load(builder, pointer, item, LANES, width) for pointer in pointers)
        swap = builder.icmp_unsigned(">", low, high)
        llvm.store(builder, builder.select(swap, high, low), pointers[0], width)
        llvm.store(builder, builder.select(swap, low, high), pointers[1], width)
        return context.get_dummy_value()

    return types.void(keys, types.intp, types.intp), generate


@intrinsic
def add_signed(typing: Any, array: Any, start: Any, signs: Any, value: Any) -> Any:
    """Add `value` to item j of 64 consecutive float32 items where bit j of `signs` is set, subtract it elsewhere."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = llvm.item(context, builder, signature.args[0], arguments[0], arguments[1])
        mask = builder.bitcast(arguments[2], ir.VectorType(ir.IntType(1), 64))
        negative = builder.fneg(arguments[3])
        signed = builder.select(mask, llvm.splat(builder, arguments[3], 64), llvm.splat(builder, negative, 64))
        llvm.store(builder, builder.fadd(llvm.load(builder, pointer, llvm.F32, 64, 4), signed), pointer, 4)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.uint64, types.float32), generate
