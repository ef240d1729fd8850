"""LLVM operations that intrinsics are written with: vectors from arrays and back, lanes, sums, float16, prefetching.

All of it is portable LLVM IR. llvmlite's own helpers reject vector types, so that overloaded names are spelled out.
"""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cpu_kernels.jit import cpu_features

I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()


def constant(item: Any, lanes: int, value: Any) -> Any:
    """Return a constant vector with the same value in every lane."""
    return ir.Constant(ir.VectorType(item, lanes), [value] * lanes)


def splat(builder: Any, value: Any, lanes: int) -> Any:
    """Return a vector with one run-time scalar in every lane."""
    kind = ir.VectorType(value.type, lanes)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
    return select(builder, first, ir.Constant(kind, ir.Undefined), [0] * lanes)


def select(builder: Any, first: Any, second: Any, lanes: Sequence[int]) -> Any:
    """Return the given lanes of two vectors laid end to end."""
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes)))


def join(builder: Any, first: Any, second: Any) -> Any:
    """Return two vectors as one of twice the length."""
    return select(builder, first, second, range(2 * first.type.count))


def part(builder: Any, vector: Any, start: int, count: int) -> Any:
    """Return `count` neighbouring lanes of a vector."""
    return select(builder, vector, ir.Constant(vector.type, ir.Undefined), range(start, start + count))


def data(context: Any, builder: Any, kind: Any, array: Any) -> Any:
    """Return the pointer to an array's first item."""
    return context.make_array(kind)(context, builder, array).data


def item(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    """Return the pointer to the item of an array at a flat index."""
    return at(builder, data(context, builder, kind, array), index)


def at(builder: Any, pointer: Any, index: Any, step: int = 0) -> Any:
    """Return the pointer `index + step` items further."""
    if step:
        index = builder.add(index, ir.Constant(index.type, step))
    return cgutils.gep_inbounds(builder, pointer, index)


def load(builder: Any, pointer: Any, item: Any, lanes: int, align: int) -> Any:
    """Return `lanes` items from any pointer with at least the given alignment in bytes."""
    return builder.load(builder.bitcast(pointer, ir.VectorType(item, lanes).as_pointer()), align=align)


def store(builder: Any, value: Any, pointer: Any, align: int) -> None:
    """Write a vector to any pointer with at least the given alignment in bytes."""
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer()), align=align)


def load_float16(builder: Any, pointer: Any, lanes: int) -> Any:
    """Return `lanes` float16 items from any pointer as float32."""
    if cpu_features.has_float16():
        return builder.fpext(load(builder, pointer, ir.HalfType(), lanes, 2), ir.VectorType(F32, lanes))
    # By integer operations, as LLVM calls a library for float16 where the CPU has no instruction: the exponent and
    # the fraction moved into float32's fields are the value times 2 ** -112.
    wide = builder.sext(load(builder, pointer, I16, lanes, 2), ir.VectorType(I32, lanes))
    moved = builder.and_(builder.shl(wide, constant(I32, lanes, 13)), constant(I32, lanes, 0x8FFFE000))
    return builder.fmul(builder.bitcast(moved, ir.VectorType(F32, lanes)), constant(F32, lanes, 2.0**112))


def population(builder: Any, words: Any) -> Any:
    """Return the number of bits set in each 64-bit lane."""
    return call(builder, f"llvm.ctpop.v{words.type.count}i64", words.type, [words])


def total(builder: Any, values: Any) -> Any:
    """Return the sum of all integer lanes."""
    name = f"llvm.vector.reduce.add.v{values.type.count}i{values.type.element.width}"
    return call(builder, name, values.type.element, [values])


def multiply_add(builder: Any, left: Any, right: Any, addend: Any) -> Any:
    """Return left * right + addend of float32 scalars or vectors, fused where the CPU can."""
    kind = f"v{left.type.count}f32" if isinstance(left.type, ir.VectorType) else "f32"
    return call(builder, f"llvm.fmuladd.{kind}", left.type, [left, right, addend])


def prefetch(builder: Any, pointer: Any, level: int = 2) -> None:
    """Ask for the cache line at `pointer` in the first or second level (an address outside the array is harmless)."""
    arguments = [pointer, ir.Constant(I32, 0), ir.Constant(I32, 4 - level), ir.Constant(I32, 1)]
    call(builder, "llvm.prefetch.p0", ir.VoidType(), arguments)


def call(builder: Any, name: str, result: Any, arguments: Sequence[Any]) -> Any:
    """Call a function that LLVM or the process defines; return what it returns, of type `result`."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


@intrinsic
def as_float32(typing: Any, bits: Any) -> Any:
    """Return the float32 with these 32 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], F32)

    return types.float32(types.uint32), generate
