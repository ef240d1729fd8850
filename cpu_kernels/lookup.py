"""Table lookup by byte shuffles: four columns of a register full of rows in one instruction, exact.

For each group of four columns a table holds, for the 16 patterns of weight bits, the sum of |x| over the columns
whose bit agrees with the sign of x. That sum A is not negative, and the product of the +-1 weights with x is
2 A - sum |x|. With 6 bits A fits 7 bits, so two sums add up within a byte; with 8 bits A has 9 bits and is split
into its low 4 and high 5 bits, of which 16 and eight groups add up within a byte. Twice or four times as many do where
the activations themselves say that nothing overflows, as they nearly always do (see ROOMS). Bytes are then widened to
16 bits: the vector is added as 16-bit lanes and its upper bytes beside it, and the lower bytes follow by subtraction.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from cpu_kernels import vector as v

GROUP = 4  # columns per table
# For one token the next tile is asked for while this one is used, from so many places in turn: every page of the
# stream has its own hardware prefetcher and page walk, so four at a time are read 1.2 x as fast as a plain read, which
# waits at each page's end, and 1.25 x as fast as asking for what lies a fixed distance ahead.
WAYS = 4
LINE = 64  # bytes
# Packed vectors (of two groups, 8 columns) whose sums may be added within a byte, from what is always right to what is
# where sum |x| over the columns of so many vectors is at most CAPACITY. With 8 bits this is said of the high parts.
ROOMS = {6: (1, 2, 4), 8: (4, 8)}
CAPACITY = {6: 255, 8: 16 * 255}
LOW_ROOM = 8  # of the low parts with 8 bits: 16 groups of at most 15


@intrinsic(prefer_literal=True)
def fill_table(typing: Any, bits: Any, q: Any, start: Any, tables: Any, place: Any) -> Any:
    """Write the table (16 bytes, or low and high parts of 16 each) of the four int8 items of flat q at `start`.

    Return the sum of their absolute values.
    """
    if not isinstance(bits, types.IntegerLiteral):
        return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source = v.data(context, builder, signature.args[1], arguments[1])
        target = v.data(context, builder, signature.args[3], arguments[3])
        item = v.I8 if bits.literal_value == 6 else v.I16
        zero = ir.Constant(item, 0)
        total = v.constant(item, 16, 0)
        whole = below = zero
        for k in range(GROUP):
            x = builder.load(v.at(builder, source, arguments[2], k), align=1)
            x = x if item == v.I8 else builder.sext(x, item)
            whole = builder.add(whole, x)
            chosen = ir.Constant(ir.VectorType(item, 16), [-(c >> k & 1) for c in range(16)])
            total = builder.add(total, builder.and_(v.splat(builder, x, 16), chosen))
            below = builder.add(below, builder.select(builder.icmp_signed("<", x, zero), x, zero))
        total = builder.sub(total, v.splat(builder, below, 16))
        if item == v.I8:
            v.store(builder, total, v.at(builder, target, arguments[4]), 16)
        else:
            byte = ir.VectorType(v.I8, 16)
            low = builder.trunc(builder.and_(total, v.constant(item, 16, 15)), byte)
            high = builder.trunc(builder.lshr(total, v.constant(item, 16, 4)), byte)
            v.store(builder, low, v.at(builder, target, arguments[4]), 16)
            v.store(builder, high, v.at(builder, target, arguments[4], 16), 16)
        return builder.zext(builder.sub(builder.sub(whole, below), below), v.I64)

    return types.intp(bits, q, types.intp, tables, types.intp), generate


class _Sums:
    """Sums of bytes in 16 bits: all lanes mod 65,536, and the upper bytes alone."""

    def __init__(self, builder: Any, rows: int) -> None:
        self.builder = builder
        self.lanes = rows // 2
        self.both = self.upper = v.constant(v.I16, self.lanes, 0)

    def add(self, values: Any) -> None:
        wide = self.builder.bitcast(values, ir.VectorType(v.I16, self.lanes))
        self.both = self.builder.add(self.both, wide)
        self.upper = self.builder.add(self.upper, self.builder.lshr(wide, v.constant(v.I16, self.lanes, 8)))

    def scaled_add(self, other: "_Sums", shift: int) -> None:
        bits = v.constant(v.I16, self.lanes, shift)
        self.both = self.builder.add(self.both, self.builder.shl(other.both, bits))
        self.upper = self.builder.add(self.upper, self.builder.shl(other.upper, bits))

    def split(self) -> tuple[Any, Any]:
        eight = v.constant(v.I16, self.lanes, 8)
        return self.builder.sub(self.both, self.builder.shl(self.upper, eight)), self.upper


def emit_sums(
    builder: Any, instruction_set: int, bits: int, vectors: int, room: int, packed: Any, tables: list[Any],
    ahead: list[Any],
) -> list[tuple[Any, Any]]:  # fmt: skip
    """Return for each token the sums A of a unit's even and odd bytes (rows of the first and second half tile).

    `room` is one of ROOMS that all tokens' activations allow. As many cache lines as the unit has are asked for
    meanwhile at the pointers `ahead`, from each in turn.
    """
    # Two planes beside each other, so that each table is loaded once for both, were tried for one token: no gain
    # with AVX2 and 30% slower with AVX-512.
    rows = v.tile_rows(instruction_set)
    fifteen = v.constant(v.I8, rows, 15)
    parts = 1 if bits == 6 else 2
    per_flush = [room] if bits == 6 else [LOW_ROOM, room]
    sums = [[_Sums(builder, rows) for _ in range(parts)] for _ in tables]
    small: list[list[Any]] = [[None] * parts for _ in tables]
    for g in range(vectors):
        here = v.at(builder, packed, ir.Constant(v.I64, g * rows))
        if ahead and g * rows % LINE == 0:
            step, way = divmod(g * rows // LINE, len(ahead))
            v.prefetch(builder, v.at(builder, ahead[way], ir.Constant(v.I64, LINE * step)))
        both = v.load(builder, here, v.I8, rows, 32)
        wide = builder.lshr(builder.bitcast(both, ir.VectorType(v.I16, rows // 2)), v.constant(v.I16, rows // 2, 4))
        nibbles = both, builder.bitcast(wide, both.type)
        if not v.takes_whole_bytes(instruction_set):
            nibbles = builder.and_(nibbles[0], fifteen), builder.and_(nibbles[1], fifteen)
        for t, table in enumerate(tables):
            for n, nibble in enumerate(nibbles):
                for k in range(parts):
                    step = ((2 * g + n) * parts + k) * 16
                    entry = v.load(builder, v.at(builder, table, ir.Constant(v.I64, step)), v.I8, 16, 16)
                    found = v.shuffle(builder, instruction_set, entry, nibble)
                    small[t][k] = found if small[t][k] is None else builder.add(small[t][k], found)
            for k in range(parts):
                if (g + 1) % per_flush[k] == 0:
                    sums[t][k].add(small[t][k])
                    small[t][k] = None
    for token in sums:
        if parts == 2:
            token[0].scaled_add(token[1], 4)
    return [token[0].split() for token in sums]


def emit_apply(
    builder: Any, rows: int, half: bool, sums: Any, constants: Any, factors: Any, scales: Any, acc: Any
) -> None:
    """Add (2 A - constant) * factor * scale of each row to the float32 accumulators of each token."""
    lanes = 16
    loaded: dict[int, Any] = {}
    for t, halves in enumerate(sums):
        place = v.at(builder, acc, ir.Constant(v.I64, t * rows))
        for number, total in enumerate(halves):
            # Both 2 A - constant and A fit 16 bits (127 * 128 = 16,256), so this stays exact.
            constant = v.splat(builder, builder.trunc(constants[t], v.I16), rows // 2)
            dots = builder.sub(builder.shl(total, v.constant(v.I16, rows // 2, 1)), constant)
            for start in range(0, rows // 2, lanes):
                row = number * rows // 2 + start
                if row not in loaded:
                    step = ir.Constant(v.I64, row * (2 if half else 4))
                    loaded[row] = v.load_scales(builder, v.at(builder, scales, step), lanes, half)
                wide = builder.sext(v.part(builder, dots, start, lanes), ir.VectorType(v.I32, lanes))
                value = builder.sitofp(wide, ir.VectorType(v.F32, lanes))
                scale = builder.fmul(loaded[row], v.splat(builder, factors[t], lanes))
                pointer = v.at(builder, place, ir.Constant(v.I64, row))
                before = v.load(builder, pointer, v.F32, lanes, 4)
                v.store(builder, v.multiply_add(builder, value, scale, before), pointer, 4)
