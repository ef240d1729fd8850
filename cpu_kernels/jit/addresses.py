"""Arrays and kernels known by their address, so that a job handed to another thread is a block of numbers.

Where Numba's private API is not as expected (see numba_private.py), arrays are made by Numba's carray, and kernels are
called from Python: NATIVE_CALLS is false.
"""

import functools
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types  # type: ignore[attr-defined]
from numba.core import cgutils
from numba.extending import intrinsic

from cpu_kernels.jit import llvm, numba_private
from cpu_kernels.jit.compiler import Kernel, inline, inline_whole

NATIVE_CALLS = numba_private.PROBLEM is None


@functools.cache
def address(work: Kernel) -> int:
    """Return the native address of a kernel whose arguments are three int64: a block's address, and two of its own."""
    if not NATIVE_CALLS:
        raise RuntimeError(f"no kernel has an address that could be called: Numba's {numba_private.PROBLEM}")
    return numba_private.native_address(work.compile())


@intrinsic
def call(typing: Any, function: Any, block: Any, first: Any, last: Any) -> Any:
    """Call the kernel at this address, which is one that `address` returned."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if NATIVE_CALLS:
            numba_private.call_native(context, builder, arguments[0], list(arguments[1:]))
        else:  # never reached, as there are no addresses; not silent if it were
            trap = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, trap, "llvm.trap"), [])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


def _array_of(item: Any, dimensions: int) -> Any:
    """Return a function for kernels that makes an array from an address and up to four sizes."""
    if not NATIVE_CALLS:
        return _carray_of(item, dimensions)
    kind = types.Array(item, dimensions, "C")

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, *shape = arguments
        return numba_private.array_at(context, builder, kind, address, shape)

    signature = kind(*[types.int64] * (1 + dimensions))

    @intrinsic
    def items(typing: Any, address: Any, size: Any) -> Any:
        return signature, generate

    @intrinsic
    def rows(typing: Any, address: Any, rows: Any, columns: Any) -> Any:
        return signature, generate

    @intrinsic
    def parts(typing: Any, address: Any, parts: Any, rows: Any, columns: Any) -> Any:
        return signature, generate

    @intrinsic
    def groups(typing: Any, address: Any, groups: Any, parts: Any, rows: Any, columns: Any) -> Any:
        return signature, generate

    return (items, rows, parts, groups)[dimensions - 1]


def _carray_of(item: Any, dimensions: int) -> Any:
    kind = types.CPointer(item)

    @intrinsic
    def pointer(typing: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(kind))

        return kind(types.int64), generate

    @inline
    def items(address: Any, size: Any) -> Any:
        return carray(pointer(address), (size,))

    @inline
    def rows(address: Any, rows: Any, columns: Any) -> Any:
        return carray(pointer(address), (rows, columns))

    @inline
    def parts(address: Any, parts: Any, rows: Any, columns: Any) -> Any:
        return carray(pointer(address), (parts, rows, columns))

    @inline
    def groups(address: Any, groups: Any, parts: Any, rows: Any, columns: Any) -> Any:
        return carray(pointer(address), (groups, parts, rows, columns))

    return (items, rows, parts, groups)[dimensions - 1]


uint8_items, int32_items = _array_of(types.uint8, 1), _array_of(types.int32, 1)
int64_items, float32_items = _array_of(types.int64, 1), _array_of(types.float32, 1)
int8_rows, int32_rows, float32_rows = (_array_of(item, 2) for item in (types.int8, types.int32, types.float32))
uint16_rows = _array_of(types.uint16, 2)

# Of a cache of keys and values (see attention.py).
float32_keys, uint16_keys, int8_keys = (_array_of(item, 4) for item in (types.float32, types.uint16, types.int8))
float32_values, uint16_values, int8_values = (_array_of(item, 3) for item in (types.float32, types.uint16, types.int8))


@intrinsic(prefer_literal=True)
def _local_float32(typing: Any, size: Any) -> Any:
    if not isinstance(size, types.IntegerLiteral):
        return None
    kind = types.Array(types.float32, 1, "C")

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        count = ir.Constant(llvm.I64, size.literal_value)
        place = cgutils.alloca_once(builder, ir.ArrayType(llvm.F32, size.literal_value))
        place.align = 64
        return numba_private.array_at(context, builder, kind, builder.ptrtoint(place, llvm.I64), [count])

    return kind(size), generate


@inline_whole
def _allocated_float32(size: Any) -> Any:
    return np.empty(size, np.float32)


local_float32: Any = _local_float32 if NATIVE_CALLS else _allocated_float32
"""A float32 array (size,) on the caller's stack, for a literal size; its items are not set."""
