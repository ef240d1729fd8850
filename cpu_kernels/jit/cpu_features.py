"""What can the CPU do that this process compiles for, and which instruction sets do kernels choose among?"""

import functools
import platform
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


def has(feature: str) -> bool:
    """Return whether this process compiles for a CPU with a feature, by LLVM's name for it."""
    return _target_features().get(feature, False)


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
    try:
        return dict(llvmlite.binding.get_host_cpu_features())
    except RuntimeError:  # LLVM does not know this kind of CPU
        return {}
