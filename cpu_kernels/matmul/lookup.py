"""Table lookup by byte shuffles: four columns of a register full of rows in one instruction, exact.

For each group of four columns a table holds, for the 16 patterns of weight bits, the sum of |x| over the columns
whose bit agrees with the sign of x. That sum A is not negative, and the product of the +-1 weights with x is
2 A - sum |x|. With 6 bits A fits 7 bits, so two sums add up within a byte; with 8 bits A has 9 bits and is split
into its low 4 and high 5 bits, of which 16 and eight groups add up within a byte. Twice or four times as many do where
the activations themselves say that nothing overflows, as they nearly always do (see HEADROOMS). Bytes are then widened
to 16 bits: the vector is added as 16-bit lanes and its upper bytes beside it; the lower bytes follow by subtraction.
At a k-tile's end 2 A becomes the lower half of a float32 above 2 ** 23, so that one subtraction gives 2 A - sum |x|.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from cpu_kernels.jit import cpu_features, llvm
from cpu_kernels.matmul.shuffle import load_scales, shuffle, takes_whole_bytes

# For one token the next tile is asked for while this one is used, from so many places in turn: every page of the
# stream has its own hardware prefetcher and page walk, so four at a time are read 1.2 x as fast as a plain read, which
# waits at each page's end, and 1.25 x as fast as asking for what lies a fixed distance ahead.
WAYS = 4
LINE = 64  # bytes
# What is asked for so early waits in the second-level cache; so many bytes ahead it is moved to the first (a matrix
# that lies in the second level anyway is multiplied 1.06 to 1.1 x as fast).
NEAR = 2048
# Packed vectors (of two groups, 8 columns) whose sums may be added within a byte, from what is always right to what is
# where sum |x| over the columns of so many vectors is at most CAPACITY. With 8 bits this is said of the high parts.
HEADROOMS = {6: (1, 2, 4), 8: (4, 8)}
CAPACITY = {6: 255, 8: 16 * 255}
LIFT = 0x4B000000  # the bits of the float32 2 ** 23; adding n to them adds n to the number
LOW_HEADROOM = 8  # of the low parts with 8 bits: 16 groups of at most 15


@intrinsic(prefer_literal=True)
def fill_tables(typing: Any, bits: Any, q: Any, start: Any, tables: Any, place: Any) -> Any:
    """Write the tables (of 16 bytes, or low and high parts of 16 each) of the 16 int8 items of flat q at `start`.

    Return the sum of their absolute values.
    """
    if not isinstance(bits, types.IntegerLiteral):
        return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source = llvm.data(context, builder, signature.args[1], arguments[1])
        target = llvm.data(context, builder, signature.args[3], arguments[3])
        zero = llvm.constant(llvm.I8, 16, 0)
        x = llvm.load(builder, llvm.at(builder, source, arguments[2]), llvm.I8, 16, 1)
        negative = builder.icmp_signed("<", x, zero)
        if_set = builder.select(negative, zero, x)
        if_not = builder.sub(if_set, x)
        # Per group: what columns 0 and 1 add for each of their four patterns, and columns 2 and 3 for theirs.
        pairs = []
        for half in (0, 8):
            order: list[list[int]] = [[], []]
            for column in range(half, half + 8, 2):
                for pattern in range(4):
                    for k in (0, 1):
                        order[k].append(column + k + 16 * (pattern >> k & 1))
            pairs.append(builder.add(*(llvm.select(builder, if_not, if_set, lanes) for lanes in order)))
        for group in range(4):
            both = pairs[group // 2]
            first = group % 2 * 8
            lower = llvm.select(builder, both, both, [first + c % 4 for c in range(16)])
            upper = llvm.select(builder, both, both, [first + 4 + c // 4 for c in range(16)])
            if bits.literal_value == 6:
                llvm.store(builder, builder.add(lower, upper), llvm.at(builder, target, arguments[4], 16 * group), 16)
                continue
            wide = ir.VectorType(llvm.I16, 16)
            total = builder.add(builder.zext(lower, wide), builder.zext(upper, wide))
            parts = (
                builder.and_(total, llvm.constant(llvm.I16, 16, 15)),
                builder.lshr(total, llvm.constant(llvm.I16, 16, 4)),
            )
            for k, values in enumerate(parts):
                at = llvm.at(builder, target, arguments[4], 32 * group + 16 * k)
                llvm.store(builder, builder.trunc(values, x.type), at, 16)
        size = builder.zext(builder.add(if_set, if_not), ir.VectorType(llvm.I32, 16))
        return builder.zext(llvm.total(builder, size), llvm.I64)

    return types.intp(bits, q, types.intp, tables, types.intp), generate


class _Sums:
    """Sums of bytes in 16 bits: all lanes mod 65,536, and the upper bytes alone."""

    def __init__(self, builder: Any, rows: int) -> None:
        self.builder = builder
        self.lanes = rows // 2
        self.both = self.upper = llvm.constant(llvm.I16, self.lanes, 0)

    def add(self, values: Any) -> None:
        wide = self.builder.bitcast(values, ir.VectorType(llvm.I16, self.lanes))
        self.both = self.builder.add(self.both, wide)
        self.upper = self.builder.add(self.upper, self.builder.lshr(wide, llvm.constant(llvm.I16, self.lanes, 8)))

    def scaled_add(self, other: "_Sums", shift: int) -> None:
        bits = llvm.constant(llvm.I16, self.lanes, shift)
        self.both = self.builder.add(self.both, self.builder.shl(other.both, bits))
        self.upper = self.builder.add(self.upper, self.builder.shl(other.upper, bits))

    def doubled(self) -> tuple[Any, Any]:
        """Return twice the sums of the lower and of the upper bytes."""
        one, nine = (llvm.constant(llvm.I16, self.lanes, bits) for bits in (1, 9))
        lower = self.builder.sub(self.builder.shl(self.both, one), self.builder.shl(self.upper, nine))
        return lower, self.builder.shl(self.upper, one)


def emit_sums(
    builder: Any, instruction_set: int, bits: int, vectors: int, headroom: int, packed: Any, tables: list[Any],
    prefetch_at: list[Any],
) -> list[tuple[Any, Any]]:  # fmt: skip
    """Return for each token 2 A of a k-tile's even and odd bytes (rows of the first and second half tile), in 16 bits.

    `headroom` is one of HEADROOMS that all tokens' activations allow. As many cache lines as the k-tile has are
    prefetched meanwhile from the pointers `prefetch_at`, from each in turn.
    """
    # Two planes beside each other, so that each table is loaded once for both, were tried for one token: no gain
    # with AVX2 and 30% slower with AVX-512.
    rows = cpu_features.tile_rows(instruction_set)
    fifteen = llvm.constant(llvm.I8, rows, 15)
    parts = 1 if bits == 6 else 2
    per_flush = [headroom] if bits == 6 else [LOW_HEADROOM, headroom]
    sums = [[_Sums(builder, rows) for _ in range(parts)] for _ in tables]
    small: list[list[Any]] = [[None] * parts for _ in tables]
    for g in range(vectors):
        here = llvm.at(builder, packed, ir.Constant(llvm.I64, g * rows))
        if prefetch_at and g * rows % LINE == 0:
            llvm.prefetch(builder, llvm.at(builder, here, ir.Constant(llvm.I64, NEAR)), 1)
            step, way = divmod(g * rows // LINE, len(prefetch_at))
            llvm.prefetch(builder, llvm.at(builder, prefetch_at[way], ir.Constant(llvm.I64, LINE * step)))
        both = llvm.load(builder, here, llvm.I8, rows, 32)
        wide = builder.lshr(
            builder.bitcast(both, ir.VectorType(llvm.I16, rows // 2)), llvm.constant(llvm.I16, rows // 2, 4)
        )
        nibbles = both, builder.bitcast(wide, both.type)
        if not takes_whole_bytes(instruction_set):
            nibbles = builder.and_(nibbles[0], fifteen), builder.and_(nibbles[1], fifteen)
        for t, table in enumerate(tables):
            for n, nibble in enumerate(nibbles):
                for k in range(parts):
                    step = ((2 * g + n) * parts + k) * 16
                    entry = llvm.load(builder, llvm.at(builder, table, ir.Constant(llvm.I64, step)), llvm.I8, 16, 16)
                    found = shuffle(builder, instruction_set, entry, nibble)
                    small[t][k] = found if small[t][k] is None else builder.add(small[t][k], found)
            for k in range(parts):
                if (g + 1) % per_flush[k] == 0:
                    sums[t][k].add(small[t][k])
                    small[t][k] = None
    for token in sums:
        if parts == 2:
            token[0].scaled_add(token[1], 4)
    return [token[0].doubled() for token in sums]


def emit_apply(
    builder: Any, rows: int, half: bool, sums: Any, constants: Any, factors: Any, scales: Any, acc: Any
) -> None:
    """Add (2 A - constant) * factor * scale of each row to the float32 accumulators of each token.

    A constant is given as LIFT + sum |x|: the bits of the float32 2 ** 23 + sum |x|.
    """
    lanes = rows // 4
    lift = llvm.constant(llvm.I16, rows // 2, LIFT >> 16)
    # The first and the last four of every eight 16-bit lanes: one instruction interleaves these of two registers.
    fours = [[start + lane for start in range(first, rows // 2, 8) for lane in range(4)] for first in (0, 4)]
    loaded = []
    for quarter in range(4):
        step = ir.Constant(llvm.I64, quarter * lanes * (2 if half else 4))
        loaded.append(load_scales(builder, llvm.at(builder, scales, step), lanes, half))
    for t, halves in enumerate(sums):
        lifted = llvm.splat(builder, builder.bitcast(constants[t], llvm.F32), lanes)
        factor = llvm.splat(builder, factors[t], lanes)
        for quarter in range(4):
            # 2 A below the upper half of LIFT is the float32 2 ** 23 + 2 A, and the difference is exact.
            order = [place for lane in fours[quarter % 2] for place in (lane, lane + rows // 2)]
            joined = llvm.select(builder, halves[quarter // 2], lift, order)
            value = builder.fsub(builder.bitcast(joined, ir.VectorType(llvm.F32, lanes)), lifted)
            pointer = llvm.at(builder, acc, ir.Constant(llvm.I64, t * rows + quarter * lanes))
            before = llvm.load(builder, pointer, llvm.F32, lanes, 4)
            scale = builder.fmul(loaded[quarter], factor)
            llvm.store(builder, llvm.multiply_add(builder, value, scale, before), pointer, 4)
