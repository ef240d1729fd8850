"""Byte shuffles by instruction set: the only operation of the packed products that names a target instruction."""

from typing import Any

from llvmlite import ir

from cpu_kernels.jit import cpu_features, llvm

_INSTRUCTIONS = {
    cpu_features.SSSE3: "llvm.x86.ssse3.pshuf.b.128",
    cpu_features.AVX2: "llvm.x86.avx2.pshuf.b",
    cpu_features.AVX512BW: "llvm.x86.avx512.pshuf.b.512",
    cpu_features.NEON: "llvm.aarch64.neon.tbl1.v16i8",
}
_WIDTHS = {cpu_features.SSSE3: 16, cpu_features.AVX2: 32, cpu_features.AVX512BW: 64, cpu_features.NEON: 16}


def takes_whole_bytes(instruction_set: int) -> bool:
    """Return whether `shuffle` may be given indices with anything in their upper four bits.

    AVX-512 VBMI's permutation looks at six bits, of which the upper two then choose among equal copies of the table.
    """
    return instruction_set == cpu_features.AVX512BW and cpu_features.has("avx512vbmi")


def shuffle(builder: Any, instruction_set: int, table: Any, index: Any) -> Any:
    """Return table[index] for every byte of `index`, `table` being a vector of 16 bytes.

    All indices are below 16, or `takes_whole_bytes` and their lower four bits count.
    """
    width = _WIDTHS[instruction_set]
    if index.type.count > width:
        half = index.type.count // 2
        parts = [
            shuffle(builder, instruction_set, table, llvm.part(builder, index, start, half)) for start in (0, half)
        ]
        return llvm.join(builder, *parts)
    if instruction_set != cpu_features.NEON and width > 16:
        undefined = ir.Constant(table.type, ir.Undefined)
        table = llvm.select(builder, table, undefined, list(range(16)) * (width // 16))
    name = _INSTRUCTIONS[instruction_set]
    if takes_whole_bytes(instruction_set):
        name = "llvm.x86.avx512.permvar.qi.512"
    return llvm.call(builder, name, ir.VectorType(llvm.I8, width), [table, index])


def load_scales(builder: Any, pointer: Any, lanes: int, half: bool) -> Any:
    """Return `lanes` float32 scales from float16 (`half`) or float32 items at a byte pointer."""
    if half:
        return llvm.load_float16(builder, pointer, lanes)
    return llvm.load(builder, pointer, llvm.F32, lanes, 4)
