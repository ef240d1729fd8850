"""Is the kernel cache safe when many processes start at once, and does it tell when it compiles?"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest

from cpu_kernels.decoder.attention import ATTEND
from cpu_kernels.jit import compiler
from cpu_kernels.matmul.stream import packer
from cpu_kernels.quantize.counting import greatest_magnitude

PROBE = """
import numpy as np
from cpu_kernels.jit.compiler import announce
from cpu_kernels.quantize.counting import MAGNITUDES, count_magnitudes, greatest_magnitude
told = []
with announce(told.append):
    bits = np.arange(300, dtype=np.uint16)
    counts = np.zeros((4, MAGNITUDES), np.uint32)
    count_magnitudes(bits, counts)
    assert greatest_magnitude(bits) == 299 and greatest_magnitude(bits.astype(np.uint32)) == 299
    assert counts[0, :300].sum() == 300
print(*told)
"""
PROBED = ["_greatest", "_greatest", "count_magnitudes"]


def compiled(cache: Path, processes: int, probe: str = PROBE) -> list[str]:
    """Return the names of the kernels that so many processes, started at once, compiled between them."""
    environment = {**os.environ, "BINCOMPRESS_CACHE": str(cache)}
    running = [
        subprocess.Popen([sys.executable, "-c", probe], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    names = " ".join(process.communicate()[0] for process in running).split()
    assert all(process.returncode == 0 for process in running)
    return sorted(names)


@pytest.mark.slow
def test_many_processes_share_one_compilation(tmp_path: Path) -> None:
    # Each kernel is compiled by whichever process comes first, so one process may compile this one, another that one.
    assert compiled(tmp_path / "shared", 4) == PROBED
    assert compiled(tmp_path / "shared", 1) == []


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_compiles_in_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert "count_magnitudes" in compiled(tmp_path / "file", 1)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds what the probe needs."""
    folder = tmp_path_factory.mktemp("cache")
    assert compiled(folder, 1) == PROBED
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nbi", "nbc"])
def test_damaged_files_of_a_cache_are_compiled_anew(cache: Path, tmp_path: Path, kind: str) -> None:
    """Each of the probe's kernels in another way: an empty file, one of something else, and one that was cut off."""
    shutil.copytree(cache, tmp_path, dirs_exist_ok=True)
    used = [*tmp_path.glob(f"*/count_magnitudes-*/*.{kind}"), *tmp_path.glob(f"*/_greatest-*/*.{kind}")]
    for damaged, content in zip(used, (b"", b"not a pickle", None), strict=True):
        damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2] if content is None else content)
    assert compiled(tmp_path, 1) == PROBED
    assert compiled(tmp_path, 1) == []


@pytest.mark.slow
def test_a_full_disk_does_not_stop_what_is_compiled(tmp_path: Path) -> None:
    # A limit on the size of files stands for the disk.
    full = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    full += "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
    assert "count_magnitudes" in compiled(tmp_path, 1, full + PROBE)
    assert "count_magnitudes" in compiled(tmp_path, 1)
    assert compiled(tmp_path, 1) == []


def test_another_type_is_refused_instead_of_compiled() -> None:
    with pytest.raises(KeyError):
        greatest_magnitude(np.zeros(3, np.float64))
    kernel = compiler.kernel(numba.int64(compiler.view(numba.int64, 1)))(lambda items: items[0])
    assert kernel(np.array([7])) == 7
    with pytest.raises(TypeError, match="No matching definition"):
        kernel(np.array([7.0]))


PRODUCT = """
import numpy as np
from cpu_kernels.jit.compiler import announce
from cpu_kernels.matmul.activations import quantize
from cpu_kernels.matmul.prepacking import prepack
from cpu_kernels.matmul.products import TokenProduct, multiply
from cpu_kernels.parallel.workers import Workers
told = []
random = np.random.default_rng(0)
planes = random.integers(0, 1 << 63, (2, 70, 4), np.uint64)
scale = random.standard_normal((2, 70, 2), np.float32)
x = random.standard_normal((3, 256), np.float32)
with announce(told.append), Workers(2) as workers:
    matrix = prepack(planes, scale, block=128, cols=256, pool=workers)
    products = multiply(matrix, quantize(x), pool=workers)
    token = TokenProduct(matrix, 8, "segment", workers)(x[:1])
print(*told, "products:" + products.tobytes().hex() + token.tobytes().hex())
"""


@pytest.mark.slow
def test_the_kernels_of_products_are_loaded_by_the_next_process_and_give_the_same(tmp_path: Path) -> None:
    first, second = compiled(tmp_path, 1, PRODUCT), compiled(tmp_path, 1, PRODUCT)
    assert {"multiply", "multiply_token"} & set(first)  # of one token, by the kernel of this CPU
    assert len(second) == 1  # the products: no kernel was compiled
    assert second[0] in first


def test_a_kernel_closes_over_numbers_alone() -> None:
    helper = compiler.inline(lambda x: x + 1)
    mark = compiler.kernel(numba.int64(numba.int64))
    with pytest.raises(TypeError, match="closes over numbers alone"):
        mark(lambda x: helper(x)).compile()
    assert compiler.kernel(numba.int64(numba.int64), helper=helper)(_calls_helper)(1) == 2


def _calls_helper(x: int) -> int:
    return helper(x)  # type: ignore[name-defined, no-any-return]  # noqa: F821


@pytest.mark.slow
def test_another_kernel_is_compiled_while_one_is_being_compiled(tmp_path: Path) -> None:
    # As many processes as hold a lock each: this one's must not stop the other.
    code = "import time; from cpu_kernels.jit import kernel_cache as c\n"
    code += "with c.kernel_lock(c.kernel_folder('some-kernel')) as lock:\n"
    code += "    lock(); print('held', flush=True); time.sleep(60)"
    environment = {**os.environ, "BINCOMPRESS_CACHE": str(tmp_path)}
    holder = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert "count_magnitudes" in compiled(tmp_path, 1)
        assert holder.poll() is None
    finally:
        holder.kill()
        holder.communicate()


def test_kernels_that_differ_in_closed_over_numbers_or_signature_differ_in_name() -> None:
    names = {kernel.name() for kernel in (packer(1, 32), packer(1, 64), packer(0, 32), *ATTEND.values())}
    assert len(names) == 6


# Helpers that close over different numbers and are not inlined: each has a function of its own in the native code.
APART = """
import sys
from numba import types
from numba.extending import intrinsic
from cpu_kernels.jit.compiler import announce, inline, kernel

@intrinsic
def stay_apart(typing):
    def generate(context, builder, signature, arguments):
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()
    return types.void(), generate

def adder(number):
    @inline
    def add(x):
        stay_apart()
        return x + number

    @kernel(types.int64(types.int64), _add=add)
    def run(x):
        return _add(x) + number - number
    return run

def told(numbers):
    compiled = []
    with announce(compiled.append):
        sums = [adder(number)(0) for number in numbers]
    print("run" in compiled, *sums)
"""


@pytest.mark.slow
def test_kernels_that_several_processes_compiled_do_not_call_each_others_helpers(tmp_path: Path) -> None:
    (tmp_path / "adders.py").write_text(APART)
    begin = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import adders; "
    for number in (1, 2):
        assert compiled(tmp_path / "cache", 1, f"{begin}adders.told([{number}])") == [str(number), "True"]
    assert compiled(tmp_path / "cache", 1, f"{begin}adders.told([1, 2])") == ["1", "2", "False"]
