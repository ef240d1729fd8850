"""LLVM vector operations that plain Numba loops do not reach: 64 weights to one word of a bit plane, sorted lanes.

Everything here is portable LLVM IR (no target instruction by name): a compare of 64 lanes whose result is
reinterpreted as one integer becomes compare + movemask on x86 and the like elsewhere.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 32  # row-blocks that are sorted side by side: one 512-bit or two 256-bit registers of 16-bit keys

_I32 = ir.IntType(32)
_WORD = ir.IntType(64)


def _splat(builder: Any, value: Any, lanes: int) -> Any:
    vector = ir.VectorType(value.type, lanes)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(
        first, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes)
    )


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any, vector: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(cgutils.gep_inbounds(builder, data, index), vector.as_pointer())


def _load(context: Any, builder: Any, array_type: Any, array: Any, index: Any, lanes: int) -> Any:
    item = context.get_data_type(array_type.dtype)
    vector = ir.VectorType(item, lanes)
    pointer = _pointer(context, builder, array_type, array, index, vector)
    return builder.load(pointer, align=item.width // 8)


@intrinsic
def high_bits(typing: Any, array: Any, start: Any) -> Any:
    """Return the highest bit of 64 consecutive items of a flat integer array as one uint64 (item 0 in bit 0)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values = _load(context, builder, signature.args[0], arguments[0], arguments[1], 64)
        zero = ir.Constant(values.type, None)
        return builder.bitcast(builder.icmp_signed("<", values, zero), _WORD)

    return types.uint64(array, types.intp), generate


@intrinsic
def bit_plane(typing: Any, array: Any, start: Any, bit: Any) -> Any:
    """Return bit number `bit` of 64 consecutive items of a flat uint8 array as one uint64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values = _load(context, builder, signature.args[0], arguments[0], arguments[1], 64)
        shift = builder.sub(ir.Constant(ir.IntType(8), 7), builder.trunc(arguments[2], ir.IntType(8)))
        moved = builder.shl(values, _splat(builder, shift, 64))
        return builder.bitcast(builder.icmp_signed("<", moved, ir.Constant(values.type, None)), _WORD)

    return types.uint64(array, types.intp, types.intp), generate


@intrinsic
def four_items(typing: Any, array: Any, start: Any) -> Any:
    """Return four consecutive items of a flat uint16 array as one uint64 (item 0 in the low bits)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, signature.args[0], arguments[0], arguments[1], _WORD)
        return builder.load(pointer, align=2)

    return types.uint64(array, types.intp), generate


@intrinsic
def above(typing: Any, array: Any, start: Any, mask: Any, threshold: Any) -> Any:
    """Return for 64 consecutive items of a flat unsigned array whether `item & mask > threshold`, as one uint64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values = _load(context, builder, signature.args[0], arguments[0], arguments[1], 64)
        masked = builder.and_(values, _splat(builder, arguments[2], 64))
        return builder.bitcast(builder.icmp_unsigned(">", masked, _splat(builder, arguments[3], 64)), _WORD)

    return types.uint64(array, types.intp, array.dtype, array.dtype), generate


@intrinsic
def order_rows(typing: Any, keys: Any, first: Any, second: Any) -> Any:
    """Order rows `first` and `second` of keys (n, LANES) lane by lane: the lesser key goes to the first row."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0]
        vector = ir.VectorType(context.get_data_type(kind.dtype), LANES)
        pointers = []
        for row in arguments[1:]:
            index = builder.mul(row, ir.Constant(row.type, LANES))
            pointers.append(_pointer(context, builder, kind, arguments[0], index, vector))
        width = vector.element.width // 8
        low, high = (builder.load(pointer, align=width) for pointer in pointers)
        swap = builder.icmp_unsigned(">", low, high)
        builder.store(builder.select(swap, high, low), pointers[0], align=width)
        builder.store(builder.select(swap, low, high), pointers[1], align=width)
        return context.get_dummy_value()

    return types.void(keys, types.intp, types.intp), generate


@intrinsic
def add_signed(typing: Any, array: Any, start: Any, signs: Any, value: Any) -> Any:
    """Add `value` to item j of 64 consecutive float32 items where bit j of `signs` is set, subtract it elsewhere."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = ir.VectorType(ir.FloatType(), 64)
        pointer = _pointer(context, builder, signature.args[0], arguments[0], arguments[1], vector)
        mask = builder.bitcast(arguments[2], ir.VectorType(ir.IntType(1), 64))
        negative = builder.fneg(arguments[3])
        signed = builder.select(mask, _splat(builder, arguments[3], 64), _splat(builder, negative, 64))
        builder.store(builder.fadd(builder.load(pointer, align=4), signed), pointer, align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.uint64, types.float32), generate
