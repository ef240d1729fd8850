"""Arrays and kernels known by their address, so that a job handed to another thread is a block of numbers."""

import functools
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cpu_kernels.jit import vector as v
from cpu_kernels.jit.compiler import Kernel


@functools.cache
def address(work: Kernel) -> int:
    """Return the native address of a kernel whose arguments are three int64: a block's address, and two of its own."""
    (compiled,) = work.compile().overloads.values()  # type: ignore[attr-defined]
    return int(compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name))


@intrinsic
def call(typing: Any, function: Any, block: Any, first: Any, last: Any) -> Any:
    """Call the kernel at this address, by Numba's convention: two places for what it returns and raises come first."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = v.I8.as_pointer()
        kind = ir.FunctionType(v.I32, [place.as_pointer(), place.as_pointer(), v.I64, v.I64, v.I64])
        places = [cgutils.alloca_once(builder, place) for _ in range(2)]
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [*places, *arguments[1:]])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


# Numba's own function for arrays at an address, carray, takes 0.1 s to compile at each use.
def _build(kind: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        from numba.np.arrayobj import populate_array  # here: a kernel that is loaded, not compiled, needs none of it

        made = context.make_array(kind)(context, builder)
        item = context.get_data_type(kind.dtype)
        size = ir.Constant(v.I64, context.get_abi_sizeof(item))
        address, *shape = arguments
        populate_array(
            made, data=builder.inttoptr(address, item.as_pointer()), shape=shape, itemsize=size, meminfo=None,
            strides=[size] if len(shape) == 1 else [builder.mul(size, shape[1]), size],
        )  # fmt: skip
        return made._getvalue()

    return generate


def _array_of(item: Any) -> Any:
    kind = types.Array(item, 1, "C")

    @intrinsic
    def array(typing: Any, address: Any, size: Any) -> Any:
        return kind(types.int64, types.int64), _build(kind)

    return array


def _rows_of(item: Any) -> Any:
    kind = types.Array(item, 2, "C")

    @intrinsic
    def array(typing: Any, address: Any, rows: Any, columns: Any) -> Any:
        return kind(types.int64, types.int64, types.int64), _build(kind)

    return array


uint8_items, int32_items = _array_of(types.uint8), _array_of(types.int32)
int64_items, float32_items = _array_of(types.int64), _array_of(types.float32)
int8_rows, int32_rows, float32_rows = _rows_of(types.int8), _rows_of(types.int32), _rows_of(types.float32)


@intrinsic(prefer_literal=True)
def local_float32(typing: Any, size: Any) -> Any:
    """Return a float32 array (size,) on the caller's stack, for a literal size; its items are not set."""
    if not isinstance(size, types.IntegerLiteral):
        return None
    kind = types.Array(types.float32, 1, "C")

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        count = ir.Constant(v.I64, size.literal_value)
        place = cgutils.alloca_once(builder, ir.ArrayType(v.F32, size.literal_value))
        place.align = 64
        return _build(kind)(context, builder, signature, [builder.ptrtoint(place, v.I64), count])

    return kind(size), generate
