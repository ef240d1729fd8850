"""Where does the last group of a prefix begin at the least cost? Some candidates at a time, with the scalar's results.

The exact solver spends its time in this search. Every candidate's cost is computed by the same operations in the same
order as in `grouping.group_cost`, and of equal costs the first wins, so that the choice is that of the scalar loop.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from cpu_kernels.jit import llvm

CANDIDATES = 8  # arrays that are searched must be readable for so many items past the last candidate
F64 = ir.DoubleType()


def _costs(builder: Any, pointers: Any, ends: Any, lam: Any, first: Any, last: Any, lanes: int) -> tuple[Any, Any]:
    """Return the costs of the starts from `first` on, infinite past `last`, and the starts."""
    best, count, total, squares = (
        llvm.load(builder, llvm.at(builder, pointer, first), F64, lanes, 8) for pointer in pointers
    )
    number, whole, whole_squares = (llvm.splat(builder, value, lanes) for value in ends)
    size = builder.fsub(number, count)
    apart = builder.fsub(whole, total)
    cost = builder.fsub(builder.fsub(whole_squares, squares), builder.fdiv(builder.fmul(apart, apart), size))
    if lam is not None:
        cost = builder.fadd(cost, builder.fdiv(llvm.splat(builder, lam, lanes), size))
    cost = builder.fadd(best, cost)
    places = ir.Constant(ir.VectorType(llvm.I64, lanes), list(range(lanes)))
    inside = builder.icmp_signed("<=", places, llvm.splat(builder, builder.sub(last, first), lanes))
    starts = builder.add(llvm.splat(builder, first, lanes), places)
    return builder.select(inside, cost, llvm.constant(F64, lanes, float("inf"))), starts


def _least(builder: Any, values: Any) -> Any:
    """Return the least lane."""
    less = builder.fcmp_ordered if values.type.element == F64 else builder.icmp_signed
    while values.type.count > 1:
        half = values.type.count // 2
        low, high = llvm.part(builder, values, 0, half), llvm.part(builder, values, half, half)
        values = builder.select(less("<", low, high), low, high)
    return builder.extract_element(values, ir.Constant(llvm.I32, 0))


def _narrow(builder: Any, costs: Any, left: Any) -> tuple[Any, Any]:
    """Return the least cost, and its first place, of candidates that fit one vector."""
    least = _least(builder, costs)
    equal = builder.bitcast(
        builder.fcmp_ordered("==", costs, llvm.splat(builder, least, costs.type.count)), ir.IntType(costs.type.count)
    )
    wide = builder.zext(equal, llvm.I64)
    place = llvm.call(builder, "llvm.cttz.i64", llvm.I64, [wide, ir.Constant(ir.IntType(1), 0)])
    return least, builder.add(left, place)


def _wide(builder: Any, candidates: Any, costs: Any, starts: Any, left: Any, right: Any) -> tuple[Any, Any]:
    """Return the least cost and its first place of more candidates than one vector; the first are in costs, starts."""
    begun = builder.block
    loop, after = builder.append_basic_block("more"), builder.append_basic_block("most")
    step = ir.Constant(llvm.I64, CANDIDATES)
    second = builder.add(left, step)
    builder.branch(loop)

    builder.position_at_end(loop)
    place, least, chosen = builder.phi(llvm.I64), builder.phi(costs.type), builder.phi(starts.type)
    here, here_starts = candidates(place)
    better = builder.fcmp_ordered("<", here, least)
    following = builder.add(place, step)
    found = builder.select(better, here, least), builder.select(better, here_starts, chosen)
    for phi, initial, new in ((place, second, following), (least, costs, found[0]), (chosen, starts, found[1])):
        phi.add_incoming(initial, begun)
        phi.add_incoming(new, loop)
    builder.cbranch(builder.icmp_signed("<=", following, right), loop, after)

    builder.position_at_end(after)
    lowest = _least(builder, found[0])
    equal = builder.fcmp_ordered("==", found[0], llvm.splat(builder, lowest, CANDIDATES))
    first = _least(builder, builder.select(equal, found[1], llvm.constant(llvm.I64, CANDIDATES, (1 << 63) - 1)))
    return lowest, first


def _search(context: Any, builder: Any, signature: Any, arguments: Any, with_lambda: bool) -> Any:
    best, count, first, second, row = (
        llvm.data(context, builder, kind, array) for kind, array in zip(signature.args[:5], arguments[:5], strict=True)
    )
    pointers = (best, count, first, second)
    end, left, right = arguments[6:]
    ends = [builder.load(llvm.at(builder, pointer, end)) for pointer in pointers[1:]]
    lam = arguments[5] if with_lambda else None
    eight, many, done = (builder.append_basic_block(name) for name in ("eight", "many", "done"))
    last = builder.sub(right, left)
    found = []
    costs, starts = _costs(builder, pointers, ends, lam, left, right, CANDIDATES)
    builder.cbranch(builder.icmp_signed("<", last, ir.Constant(llvm.I64, CANDIDATES)), eight, many)

    builder.position_at_end(eight)
    found.append((*_narrow(builder, costs, left), builder.block))
    builder.branch(done)

    builder.position_at_end(many)

    def candidates(place: Any) -> tuple[Any, Any]:
        return _costs(builder, pointers, ends, lam, place, right, CANDIDATES)

    found.append((*_wide(builder, candidates, costs, starts, left, right), builder.block))
    builder.branch(done)

    builder.position_at_end(done)
    least, start = builder.phi(F64), builder.phi(llvm.I64)
    for cost, place, block in found:
        least.add_incoming(cost, block)
        start.add_incoming(place, block)
    builder.store(least, llvm.at(builder, row, end))
    return start


@intrinsic
def best_start(
    typing: Any, best: Any, count: Any, first: Any, second: Any, row: Any, lam: Any, end: Any, left: Any, right: Any
) -> Any:
    """Return the first i in left .. right with the least best[i] + cost of the group of atoms i .. end - 1.

    row[end] becomes that least sum. best, count, first, second: float64, finite in left .. right, readable for
    CANDIDATES items past `right`.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _search(context, builder, signature, arguments, True)

    place = types.intp
    return place(best, count, first, second, row, types.float64, place, place, place), generate


@intrinsic
def best_start_plain(
    typing: Any, best: Any, count: Any, first: Any, second: Any, row: Any, lam: Any, end: Any, left: Any, right: Any
) -> Any:
    """Do what `best_start` does where lambda is 0, with one division a candidate."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _search(context, builder, signature, arguments, False)

    place = types.intp
    return place(best, count, first, second, row, types.float64, place, place, place), generate
