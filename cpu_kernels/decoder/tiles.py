"""LLVM vector operations of the float kernels: a register tile of a matrix product, sums and maxima over a run.

Plain Numba loops keep accumulators in memory and, without fast-math, do not vectorise reductions; these few
operations do both. All of it is portable LLVM IR.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils as _cgutils
from numba.extending import intrinsic as _intrinsic

from cpu_kernels.jit import cpu_features, llvm

cgutils: Any = _cgutils  # untyped

TILE_ROWS = 4
TILE_COLUMNS = 32
LANES = 16

_VECTOR = ir.VectorType(llvm.F32, LANES)


def intrinsic(function: Callable[..., Any]) -> Any:
    """Mark a function that generates code for a call from a kernel (whose arguments are then other ones)."""
    return _intrinsic(function)


def _load(builder: Any, pointer: Any) -> Any:
    """Load LANES floats, or as many float16 bit patterns (uint16 items) or int8 widened to float32."""
    if pointer.type.pointee == llvm.F32:
        return llvm.load(builder, pointer, llvm.F32, LANES, 4)
    if pointer.type.pointee == llvm.I8:
        wide = builder.sext(llvm.load(builder, pointer, llvm.I8, LANES, 1), ir.VectorType(llvm.I32, LANES))
        return builder.sitofp(wide, _VECTOR)
    return llvm.load_float16(builder, pointer, LANES)


def _vectors_per_pass() -> int:
    # Eight accumulators hide the latency of a multiply-add; 512-bit registers hold two vectors per row for that.
    return 2 if cpu_features.has("avx512f") else 1


@intrinsic
def multiply_tile(
    typing: Any, a: Any, a_start: Any, a_row: Any, b: Any, b_start: Any, b_row: Any, depth: Any, c: Any, c_start: Any,
    c_row: Any, add: Any,
) -> Any:  # fmt: skip
    """Set (or, with `add`, increase) a 4 x 32 tile of c by a (4 x depth) times b (depth x 32).

    Arrays are addressed by flat item index: the tile's first item and the step from one row to the next.
    a and c hold float32; b holds float32, float16 bit patterns as uint16, or int8.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array_a, at_a, row_a, array_b, at_b, row_b, count, array_c, at_c, row_c, adding = arguments
        kinds = signature.args
        from_a, from_b, into = (
            llvm.data(context, builder, kind, array)
            for kind, array in ((kinds[0], array_a), (kinds[3], array_b), (kinds[7], array_c))
        )
        step = _vectors_per_pass()
        for first in range(0, TILE_COLUMNS // LANES, step):
            sums = [[cgutils.alloca_once(builder, _VECTOR) for _ in range(step)] for _ in range(TILE_ROWS)]
            tile = []
            for row in range(TILE_ROWS):
                start = builder.add(at_c, builder.mul(row_c, ir.Constant(row_c.type, row)))
                for column in range(step):
                    index = builder.add(start, ir.Constant(start.type, (first + column) * LANES))
                    pointer = llvm.at(builder, into, index)
                    tile.append((sums[row][column], pointer))
                    begin = builder.select(adding, _load(builder, pointer), ir.Constant(_VECTOR, None))
                    builder.store(begin, sums[row][column])
            with cgutils.for_range(builder, count) as loop:
                base = builder.add(at_b, builder.mul(row_b, loop.index))
                places = [ir.Constant(base.type, (first + column) * LANES) for column in range(step)]
                right = [_load(builder, llvm.at(builder, from_b, builder.add(base, place))) for place in places]
                for row in range(TILE_ROWS):
                    index = builder.add(builder.add(at_a, loop.index), builder.mul(row_a, ir.Constant(row_a.type, row)))
                    left = llvm.splat(builder, builder.load(llvm.at(builder, from_a, index)), LANES)
                    for column in range(step):
                        place = sums[row][column]
                        added = llvm.multiply_add(builder, left, right[column], builder.load(place))
                        builder.store(added, place)
            for place, pointer in tile:
                llvm.store(builder, builder.load(place), pointer, 4)
        return context.get_dummy_value()

    size = types.intp
    return types.void(a, size, size, b, size, size, size, c, size, size, types.boolean), generate


def _over_run(begin: float, step: Callable[[Any, Any, Any], Any], join: Callable[[Any, Any, Any], Any]) -> Any:
    """Return code for a reduction over `count` floats (a multiple of LANES) from flat index `start`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, start, count = arguments
        place = cgutils.alloca_once(builder, _VECTOR)
        builder.store(ir.Constant(_VECTOR, [begin] * LANES), place)
        vectors = builder.sdiv(count, ir.Constant(count.type, LANES))
        with cgutils.for_range(builder, vectors) as loop:
            index = builder.add(start, builder.mul(loop.index, ir.Constant(start.type, LANES)))
            values = _load(builder, llvm.item(context, builder, signature.args[0], array, index))
            builder.store(step(builder, builder.load(place), values), place)
        folded = builder.load(place)
        half = LANES // 2
        while half:
            order = [lane + half if lane < half else lane for lane in range(LANES)]
            moved = llvm.select(builder, folded, folded, order)
            folded = join(builder, folded, moved)
            half //= 2
        return builder.extract_element(folded, ir.Constant(llvm.I32, 0))

    return generate


def _larger(builder: Any, left: Any, right: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", left, right), left, right)


def _sum(builder: Any, left: Any, right: Any) -> Any:
    return builder.fadd(left, right)


def _square_sum(builder: Any, total: Any, values: Any) -> Any:
    return llvm.multiply_add(builder, values, values, total)


@intrinsic
def largest(typing: Any, array: Any, start: Any, count: Any) -> Any:
    """Return the largest of `count` (a multiple of 16) float32 items from flat index `start`."""
    return types.float32(array, types.intp, types.intp), _over_run(float("-inf"), _larger, _larger)


@intrinsic
def total(typing: Any, array: Any, start: Any, count: Any) -> Any:
    """Return the sum of `count` (a multiple of 16) float32 items from flat index `start`."""
    return types.float32(array, types.intp, types.intp), _over_run(0.0, _sum, _sum)


@intrinsic
def square_total(typing: Any, array: Any, start: Any, count: Any) -> Any:
    """Return the sum of squares of `count` (a multiple of 16) float32 items from flat index `start`."""
    return types.float32(array, types.intp, types.intp), _over_run(0.0, _square_sum, _sum)


@intrinsic
def power_of_two(typing: Any, exponent: Any) -> Any:
    """Return 2 ** exponent for an integral float32 exponent in [-126, 127]."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        biased = builder.add(builder.fptosi(arguments[0], llvm.I32), ir.Constant(llvm.I32, 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(llvm.I32, 23)), llvm.F32)

    return types.float32(types.float32), generate


@intrinsic
def multiply_add(typing: Any, left: Any, right: Any, addend: Any) -> Any:
    """Return left * right + addend in float32, with one rounding where the CPU can (Numba alone never fuses)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return llvm.multiply_add(builder, *arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


@intrinsic
def stored_as(typing: Any, value: Any, array: Any) -> Any:
    """Return a float32 as an item of `array`: itself, or for a uint16 array the bit pattern of the nearest float16.

    What float16 cannot hold becomes its largest number.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return arguments[0] if array.dtype == types.float32 else _narrowed(builder, arguments[0])

    return array.dtype(types.float32, array), generate


def _narrowed(builder: Any, value: Any) -> Any:
    """Round a finite float32 to float16 (nearest, ties to even) with integers, as not every CPU has an instruction."""

    def number(constant: int) -> Any:
        return ir.Constant(llvm.I32, constant)

    def choose(condition: Any, first: Any, second: Any) -> Any:
        return builder.select(condition, first, second)

    bits = builder.bitcast(value, llvm.I32)
    sign = builder.and_(builder.lshr(bits, number(16)), number(0x8000))
    size = builder.and_(bits, number(0x7FFFFFFF))
    too_large = builder.icmp_unsigned(">", size, number(0x477FE000))
    size = choose(too_large, number(0x477FE000), size)  # 65504
    # Normal: move the exponent's origin from 127 to 15, and round at the 13 bits that are dropped.
    odd = builder.and_(builder.lshr(size, number(13)), number(1))
    normal = builder.lshr(builder.add(builder.add(size, number(0xC8000FFF)), odd), number(13))
    # Below 2 ** -14: adding 0.5 rounds to the fixed unit 2 ** -24, whose count is left in the low bits.
    lifted = builder.fadd(builder.bitcast(size, llvm.F32), ir.Constant(llvm.F32, 0.5))
    small = builder.sub(builder.bitcast(lifted, llvm.I32), number(0x3F000000))
    pattern = choose(builder.icmp_unsigned("<", size, number(0x38800000)), small, normal)
    return builder.trunc(builder.or_(pattern, sign), llvm.I16)
