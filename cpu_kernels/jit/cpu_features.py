"""What can the CPU do that this process compiles for, and which instruction sets do kernels choose among?"""

import ctypes
import functools
import platform
import sys
from typing import Any

import llvmlite.binding
import numba

# Instruction sets are passed to kernel factories as these numbers, because literal integers are what a cached kernel's
# closure and an intrinsic can share.
PORTABLE, SSSE3, AVX2, AVX512BW, NEON = range(5)
NAMES = {PORTABLE: "portable", SSSE3: "ssse3", AVX2: "avx2", AVX512BW: "avx512bw", NEON: "neon"}

X86 = platform.machine().lower() in ("x86_64", "amd64")
ARM = platform.machine().lower() in ("arm64", "aarch64")


def shuffle_sets() -> list[int]:
    """Return the instruction sets with a byte shuffle that this process compiles for, the fastest first."""
    if ARM:
        return [NEON]
    known = [(AVX512BW, ("avx512f", "avx512bw")), (AVX2, ("avx2",)), (SSSE3, ("ssse3",))]
    return [number for number, needed in known if all(map(has, needed))]


def tile_rows(instruction_set: int) -> int:
    """Return how many matrix rows one tile holds: as many as two registers have bytes, or one of AVX-512.

    Two share each table that is loaded for one token: 1.1 x as fast as one with AVX2.
    """
    return 64 if instruction_set in (AVX2, AVX512BW) else 32


def has_float16() -> bool:
    """Return whether float16 is widened to float32 in one instruction."""
    return ARM or has("f16c")


def is_zen() -> bool:
    """Return whether this is an AMD CPU of the Zen kind, by LLVM's name for it."""
    return _host_name().startswith("znver")


def has(feature: str) -> bool:
    """Return whether this process compiles for a CPU with a feature, by LLVM's name for it."""
    return _target_features().get(feature, False)


@functools.cache
def _host_name() -> str:
    return str(llvmlite.binding.get_host_cpu_name())


def _target_features() -> dict[str, bool]:
    # As Numba decides: NUMBA_CPU_FEATURES takes the place of the host's features, NUMBA_ENABLE_AVX=0 restricts them.
    config: Any = numba.config
    if config.CPU_FEATURES is not None:
        return {name[1:]: name[0] == "+" for name in config.CPU_FEATURES.split(",") if name}
    if config.ENABLE_AVX:
        return _host_features()
    return {name: there and not name.startswith("avx") for name, there in _host_features().items()}


@functools.cache
def _host_features() -> dict[str, bool]:
    # Once, as asking takes 0.3 ms, for every matrix that is laid out.
    if ARM:
        return arm_features()
    try:
        return dict(llvmlite.binding.get_host_cpu_features())
    except RuntimeError:  # LLVM does not know this kind of CPU
        return {}


# What Linux says of a 64-bit Arm CPU (asm/hwcap.h): the word of the auxiliary vector, the bit, and LLVM's name for it.
_HWCAP, _HWCAP2 = 16, 26
_ARM_BITS = {
    "neon": (_HWCAP, 1), "aes": (_HWCAP, 3), "crc": (_HWCAP, 7), "lse": (_HWCAP, 8), "fullfp16": (_HWCAP, 10),
    "dotprod": (_HWCAP, 20), "sve": (_HWCAP, 22), "fp16fml": (_HWCAP, 23), "sve2": (_HWCAP2, 1),
    "i8mm": (_HWCAP2, 13), "bf16": (_HWCAP2, 14), "sme": (_HWCAP2, 23),
}  # fmt: skip
# And macOS, in `sysctl hw.optional`.
_ARM_NAMES = {
    "aes": "FEAT_AES", "crc": "FEAT_CRC32", "lse": "FEAT_LSE", "fullfp16": "FEAT_FP16", "dotprod": "FEAT_DotProd",
    "fp16fml": "FEAT_FHM", "i8mm": "FEAT_I8MM", "bf16": "FEAT_BF16", "sme": "FEAT_SME",
}  # fmt: skip


def arm_features() -> dict[str, bool]:
    """Return what the system says of this 64-bit Arm CPU, by LLVM's names.

    LLVM itself reads /proc/cpuinfo, which emulators and containers do not always have, and names none of most CPUs.
    Every such CPU has NEON, so that it counts as there where nobody is to be asked.
    """
    found = dict.fromkeys(_ARM_BITS, False) | {"neon": True}
    library = ctypes.CDLL(None) if sys.platform != "win32" else None
    if hasattr(library, "getauxval"):
        return found | features_of(_auxiliary(library, _HWCAP), _auxiliary(library, _HWCAP2))
    if hasattr(library, "sysctlbyname"):
        return found | {name: _sysctl(library, f"hw.optional.arm.{asked}") for name, asked in _ARM_NAMES.items()}
    return found


def features_of(hwcap: int, hwcap2: int) -> dict[str, bool]:
    """Return the features that the two words of a Linux auxiliary vector name, by LLVM's names."""
    words = {_HWCAP: hwcap, _HWCAP2: hwcap2}
    return {name: bool(words[word] >> bit & 1) for name, (word, bit) in _ARM_BITS.items()}


def _auxiliary(library: Any, word: int) -> int:
    ask = library.getauxval
    ask.argtypes, ask.restype = [ctypes.c_ulong], ctypes.c_ulong
    return int(ask(word))


def _sysctl(library: Any, name: str) -> bool:
    value, size = ctypes.c_int(0), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
    failed = library.sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0))
    return not failed and bool(value.value)
