"""The intrinsics of the product kernels: the product of one k-tile (64 or 128 columns), offsets, prefetching."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from cpu_kernels.jit import cpu_features, llvm
from cpu_kernels.matmul import lookup, popcount
from cpu_kernels.matmul.shuffle import load_scales


def table_bytes(instruction_set: int, bits: int) -> int:
    """Return the bytes of prepared activations (tables or bit slices) per 64 columns of one token."""
    if instruction_set == cpu_features.PORTABLE:
        return 8 * bits
    return 256 if bits == 6 else 512


@intrinsic(prefer_literal=True)
def multiply_k_tile(
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
    headrooms: Any,
    first: Any,
    weight: Any,
    acc: Any,
    place: Any,
    prefetch_at: Any,
    apart: Any,
) -> Any:
    """Add the product of one k_tile of one plane with `tokens` tokens to acc[place:]; positions are bytes or items.

    One token leaves time to ask for the stream at `prefetch_at`, prefetch_at + apart, ... meanwhile.
    """
    literals = (instruction_set, bits, words, half, tokens)
    if not all(isinstance(literal, types.IntegerLiteral) for literal in literals):
        return None
    chosen, width, count, is_half, together = (literal.literal_value for literal in literals)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args
        base = llvm.data(context, builder, kinds[5], arguments[5])
        packed_at, scales_at = llvm.at(builder, base, arguments[6]), llvm.at(builder, base, arguments[7])
        tables_at = llvm.at(builder, llvm.data(context, builder, kinds[8], arguments[8]), arguments[9])
        steps = [ir.Constant(llvm.I64, t) for t in range(together)]

        def of_tokens(k: int) -> list[Any]:
            first = llvm.at(builder, llvm.data(context, builder, kinds[k], arguments[k]), arguments[13])
            return [builder.load(llvm.at(builder, first, step)) for step in steps]

        def constants_and_factors() -> tuple[list[Any], list[Any]]:
            return of_tokens(10), [builder.fmul(factor, arguments[14]) for factor in of_tokens(11)]

        acc_at = llvm.at(builder, llvm.data(context, builder, kinds[15], arguments[15]), arguments[16])
        if chosen == cpu_features.PORTABLE:
            constant, factor = constants_and_factors()
            popcount.emit_k_tile(
                builder, width, count, bool(is_half), packed_at, tables_at, constant[0], factor[0], scales_at, acc_at
            )
        else:
            size = table_bytes(chosen, width) * count
            token_tables = [llvm.at(builder, tables_at, ir.Constant(llvm.I64, t * size)) for t in range(together)]
            asked = [llvm.at(builder, base, arguments[17])]
            for _ in range(1, lookup.WAYS):
                asked.append(llvm.at(builder, asked[-1], arguments[18]))
            prefetch_at = asked if together == 1 else []
            # Else tables are loaded before the loop over planes and kept on the stack, for want of registers: with
            # AVX-512 and 8 bits a product took 1.1 x the time.
            builder.fence("seq_cst", "singlethread")
            sums = _sums(builder, chosen, width, 8 * count, of_tokens(12), packed_at, token_tables, prefetch_at)
            # Loaded after the branches for headroom, where it takes no instruction to have them in every lane.
            constant, factor = constants_and_factors()
            lookup.emit_apply(
                builder, cpu_features.tile_rows(chosen), bool(is_half), sums, constant, factor, scales_at, acc_at
            )
        return context.get_dummy_value()

    index = types.intp
    signature = types.void(
        *literals, stream, index, index, tables, index, constants, factors, headrooms, index, types.float32, acc, index,
        index, index,
    )  # fmt: skip
    return signature, generate


def _sums(
    builder: Any, instruction_set: int, bits: int, vectors: int, headrooms: list[Any], packed: Any, tables: list[Any],
    prefetch_at: list[Any],
) -> list[list[Any]]:  # fmt: skip
    """Return lookup.emit_sums with the most headroom that all tokens have; its code is there once for each.

    Several tokens at once keep to what is always right: AVX-512 gains 2% by more, and compiling takes 2 s longer.
    """
    possible = lookup.HEADROOMS[bits] if len(tables) == 1 else lookup.HEADROOMS[bits][:1]
    least = headrooms[0]
    for headroom in headrooms[1:]:
        least = builder.select(builder.icmp_signed("<", headroom, least), headroom, least)
    after = builder.append_basic_block("summed")
    found = []
    for headroom in reversed(possible):
        following = None
        if headroom > possible[0]:
            enough, following = builder.append_basic_block("headroom"), builder.append_basic_block("less")
            builder.cbranch(builder.icmp_signed(">=", least, ir.Constant(llvm.I32, headroom)), enough, following)
            builder.position_at_end(enough)
        sums = lookup.emit_sums(builder, instruction_set, bits, vectors, headroom, packed, tables, prefetch_at)
        found.append((sums, builder.block))
        builder.branch(after)
        if following:
            builder.position_at_end(following)
    builder.position_at_end(after)
    chosen = []
    for t in range(len(tables)):
        halves = [builder.phi(total.type) for total in found[0][0][t]]
        for sums, block in found:
            for phi, total in zip(halves, sums[t], strict=True):
                phi.add_incoming(total, block)
        chosen.append(halves)
    return chosen


@intrinsic(prefer_literal=True)
def prefetch_ways(typing: Any, stream: Any, prefetch_at: Any, apart: Any) -> Any:
    """Ask for the cache lines of the stream at `prefetch_at`, prefetch_at + apart, ..."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = llvm.at(builder, llvm.data(context, builder, signature.args[0], arguments[0]), arguments[1])
        for _ in range(lookup.WAYS):
            llvm.prefetch(builder, place)
            place = llvm.at(builder, place, arguments[2])
        return context.get_dummy_value()

    return types.void(stream, types.intp, types.intp), generate


@intrinsic(prefer_literal=True)
def add_offset(typing: Any, rows: Any, half: Any, stream: Any, scales: Any, value: Any, acc: Any, place: Any) -> Any:
    """Add value * offset of each row to acc[place:]."""
    if not isinstance(rows, types.IntegerLiteral) or not isinstance(half, types.IntegerLiteral):
        return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args
        lanes = 16
        base = llvm.at(builder, llvm.data(context, builder, kinds[2], arguments[2]), arguments[3])
        target = llvm.at(builder, llvm.data(context, builder, kinds[5], arguments[5]), arguments[6])
        item = 2 if half.literal_value else 4
        for row in range(0, rows.literal_value, lanes):
            offset = load_scales(
                builder, llvm.at(builder, base, ir.Constant(llvm.I64, row * item)), lanes, bool(half.literal_value)
            )
            pointer = llvm.at(builder, target, ir.Constant(llvm.I64, row))
            before = llvm.load(builder, pointer, llvm.F32, lanes, 4)
            after = llvm.multiply_add(builder, offset, llvm.splat(builder, arguments[4], lanes), before)
            llvm.store(builder, after, pointer, 4)
        return context.get_dummy_value()

    return types.void(rows, half, stream, types.intp, types.float32, acc, types.intp), generate
