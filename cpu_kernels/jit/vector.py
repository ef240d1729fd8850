"""LLVM building blocks of the packed products: vectors from arrays, byte shuffles by instruction set, float16 scales.

Only the byte shuffle names a target instruction; the rest is portable LLVM IR.
"""

import functools
import platform
from collections.abc import Sequence
from typing import Any

import llvmlite.binding
import numba
from llvmlite import ir
from numba.core import cgutils

I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()

# Instruction sets are passed to kernel factories as these numbers, because literal integers are what a cached kernel's
# closure and an intrinsic can share.
PORTABLE, SSSE3, AVX2, AVX512BW, NEON = range(5)
NAMES = {PORTABLE: "portable", SSSE3: "ssse3", AVX2: "avx2", AVX512BW: "avx512bw", NEON: "neon"}


def tile_rows(instruction_set: int) -> int:
    """Return how many matrix rows one tile holds: as many as two registers have bytes, or one of AVX-512.

    Two share each table that is loaded for one token: 1.1 x as fast as one with AVX2.
    """
    return 64 if instruction_set in (AVX2, AVX512BW) else 32


def shuffle_sets() -> list[int]:
    """Return the instruction sets with a byte shuffle that this process compiles for, the fastest first."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return [NEON]
    features = _target_features()
    known = [(AVX512BW, ("avx512f", "avx512bw")), (AVX2, ("avx2",)), (SSSE3, ("ssse3",))]
    return [number for number, needed in known if all(features.get(name) for name in needed)]


def has_float16() -> bool:
    """Return whether this process compiles for a CPU that widens float16 to float32 in one instruction."""
    return bool(_target_features().get("f16c"))


def takes_whole_bytes(instruction_set: int) -> bool:
    """Return whether `shuffle` may be given indices with anything in their upper four bits.

    AVX-512 VBMI's permutation looks at six bits, of which the upper two then choose among equal copies of the table.
    """
    return instruction_set == AVX512BW and bool(_target_features().get("avx512vbmi"))


def _target_features() -> dict[str, bool]:
    # NUMBA_CPU_NAME and NUMBA_CPU_FEATURES restrict what Numba compiles for, so they restrict the choice as well.
    config: Any = numba.config
    if config.CPU_NAME is None and config.CPU_FEATURES is None:
        return _host_features()
    stated = (config.CPU_FEATURES or "").split(",")
    return {name[1:]: name[0] == "+" for name in stated if name}


@functools.cache
def _host_features() -> dict[str, bool]:
    # Once, as asking takes 0.3 ms, for every matrix that is laid out.
    return dict(llvmlite.binding.get_host_cpu_features())


def constant(item: Any, lanes: int, value: Any) -> Any:
    """Return a constant vector with the same value in every lane."""
    return ir.Constant(ir.VectorType(item, lanes), [value] * lanes)


def splat(builder: Any, value: Any, lanes: int) -> Any:
    """Return a vector with one run-time scalar in every lane."""
    kind = ir.VectorType(value.type, lanes)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
    return builder.shuffle_vector(
        first, ir.Constant(kind, ir.Undefined), ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
    )


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


def population(builder: Any, words: Any) -> Any:
    """Return the number of bits set in each 64-bit lane."""
    # llvmlite's own helper rejects vector types, so the overloaded name is spelled out.
    kind = ir.FunctionType(words.type, [words.type])
    name = f"llvm.ctpop.v{words.type.count}i64"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [words])


def total(builder: Any, values: Any) -> Any:
    """Return the sum of all integer lanes."""
    kind = ir.FunctionType(values.type.element, [values.type])
    name = f"llvm.vector.reduce.add.v{values.type.count}i{values.type.element.width}"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [values])


def multiply_add(builder: Any, left: Any, right: Any, addend: Any) -> Any:
    """Return left * right + addend, fused where the CPU can."""
    kind = ir.FunctionType(left.type, [left.type] * 3)
    name = f"llvm.fmuladd.v{left.type.count}f32"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [left, right, addend])


def prefetch(builder: Any, pointer: Any, level: int = 2) -> None:
    """Ask for the cache line at `pointer` in the first or second level (an address outside the array is harmless)."""
    kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [pointer, ir.Constant(I32, 0), ir.Constant(I32, 4 - level), ir.Constant(I32, 1)])


def shuffle(builder: Any, instruction_set: int, table: Any, index: Any) -> Any:
    """Return table[index] for every byte of `index`, `table` being a vector of 16 bytes.

    All indices are below 16, or `takes_whole_bytes` and their lower four bits count.
    """
    width = {SSSE3: 16, AVX2: 32, AVX512BW: 64, NEON: 16}[instruction_set]
    if index.type.count > width:
        half = index.type.count // 2
        parts = [shuffle(builder, instruction_set, table, part(builder, index, start, half)) for start in (0, half)]
        return join(builder, *parts)
    vector = ir.VectorType(I8, width)
    if instruction_set != NEON and width > 16:
        table = select(builder, table, ir.Constant(table.type, ir.Undefined), list(range(16)) * (width // 16))
    name = {
        SSSE3: "llvm.x86.ssse3.pshuf.b.128",
        AVX2: "llvm.x86.avx2.pshuf.b",
        AVX512BW: "llvm.x86.avx512.pshuf.b.512",
        NEON: "llvm.aarch64.neon.tbl1.v16i8",
    }[instruction_set]
    if takes_whole_bytes(instruction_set):
        name = "llvm.x86.avx512.permvar.qi.512"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector, vector]), name)
    return builder.call(function, [table, index])


def load_scales(builder: Any, pointer: Any, lanes: int, half: bool) -> Any:
    """Return `lanes` float32 scales from float16 (`half`) or float32 items at a byte pointer."""
    if not half:
        return load(builder, pointer, F32, lanes, 4)
    if has_float16():
        return builder.fpext(load(builder, pointer, ir.HalfType(), lanes, 2), ir.VectorType(F32, lanes))
    # By integer operations, as LLVM calls a library for float16 where the CPU has no instruction: the exponent and
    # the fraction moved into float32's fields are the value times 2 ** -112.
    wide = builder.sext(load(builder, pointer, I16, lanes, 2), ir.VectorType(I32, lanes))
    moved = builder.and_(builder.shl(wide, constant(I32, lanes, 13)), constant(I32, lanes, 0x8FFFE000))
    return builder.fmul(builder.bitcast(moved, ir.VectorType(F32, lanes)), constant(F32, lanes, 2.0**112))
