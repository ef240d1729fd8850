"""Does the chosen product kernel give right products on this CPU? Tried once for each kernel cache, in milliseconds.

A compiler's fault, or a CPU that has not what it says, would otherwise be seen as a model that writes nonsense.
"""

import contextlib
from typing import Any

import numpy as np

from cpu_kernels.errors import KernelError
from cpu_kernels.jit import cpu_features
from cpu_kernels.jit.kernel_cache import cache_folder, say_once
from cpu_kernels.matmul.activations import LEVELS, quantize
from cpu_kernels.matmul.prepacking import choose, kernels, prepack
from cpu_kernels.matmul.products import TokenProduct, multiply
from cpu_kernels.parallel.workers import Workers
from cpu_kernels.reference import products


def sound_kernel(asked: str | None, bits: int, trial: bool = True) -> str | None:
    """Return the kernel to be used: the one asked for, or without one the fastest that gives right products.

    trial: whether kernels that were not tried yet are, which compiles them; else they pass for sound. bits: of the
    activations. Which others were left out is said once. Raises KernelError where the one asked for, or every one, is
    wrong.
    """
    if asked is not None:
        name, code = choose(asked)
        full = name if name == "popcount" else f"lookup-{cpu_features.NAMES[code]}"
        if not _sound(full, bits, trial):
            raise KernelError(
                f"kernel {full}: gives wrong products on this CPU; leave --kernel out, and please report it"
            )
        return asked
    wrong: list[str] = []
    for name in kernels():
        if _sound(name, bits, trial):
            if wrong:
                say_once(
                    f"the kernels {', '.join(wrong)} give wrong products on this CPU: {name} is used, which is slower; "
                    "please report it, with what `bincompress bench --verbose` prints"
                )
            return name if wrong else None
        wrong.append(name)
    raise KernelError(f"no kernel gives right products on this CPU ({', '.join(wrong)}); please report it")


def _sound(name: str, bits: int, trial: bool) -> bool:
    folder = cache_folder()
    record = None if folder is None else folder / f"self-test-{name}-{bits}"
    with contextlib.suppress(OSError):
        if record is not None:
            return record.read_text("utf-8") != "wrong"
    if not trial:
        return True
    right = _right(name, bits)
    with contextlib.suppress(OSError):  # a full disk: the next process tries again
        if record is not None:
            record.write_text("right" if right else "wrong", "utf-8")
    return right


def _right(name: str, bits: int) -> bool:
    """Return whether a kernel's products of integers are exactly those of NumPy, of one token and of several.

    The matrix is ragged and has two planes, float16 scales and an offset: the form that nearly every store has, and the
    only one whose kernel is compiled for it.
    """
    random = np.random.default_rng(bits)
    rows, cols, tokens = 130, 300, 5
    planes: Any = random.integers(0, 1 << 64, (2, rows, -(-cols // 64)), np.uint64)
    planes[..., -1] &= np.uint64((1 << cols % 64) - 1)
    scale = 2.0 ** random.integers(-1, 2, (2, rows, 3))
    offset = 2.0 ** random.integers(-1, 2, (rows, 3))
    x = np.rint(random.uniform(-9, 9, (tokens, cols))).astype(np.float32)
    x[:, 0] = LEVELS[bits]  # so that the activations' scale is 1, and all sums are exact
    expected = products.multiply(
        planes, scale.astype(np.float32), 128, cols, products.quantize(x, bits, "token"), offset.astype(np.float32)
    )
    matrix = prepack(planes, scale.astype(np.float16), 128, cols, offset.astype(np.float16), kernel=name)
    several = multiply(matrix, quantize(x, bits))
    one = TokenProduct(matrix, bits, "token", Workers(1))(x[:1])
    return bool(np.array_equal(several, expected) and np.array_equal(one, expected[:1]))
