"""Is the kernel cache safe when many processes start at once, and does it tell when it compiles?"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cpu_kernels import compiler
from cpu_kernels.counting import greatest_magnitude

PROBE = """
import numpy as np
from cpu_kernels.compiler import announce
from cpu_kernels.counting import MAGNITUDES, count_magnitudes, greatest_magnitude
told = []
with announce(told.append):
    bits = np.arange(300, dtype=np.uint16)
    counts = np.zeros((4, MAGNITUDES), np.uint32)
    count_magnitudes(bits, counts)
    assert greatest_magnitude(bits) == 299 and greatest_magnitude(bits.astype(np.uint32)) == 299
    assert counts[0, :300].sum() == 300
print(bool(told))
"""


def probes(cache: Path, number: int) -> list[bool]:
    environment = {**os.environ, "BINCOMPRESS_CACHE": str(cache)}
    running = [
        subprocess.Popen([sys.executable, "-c", PROBE], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(number)
    ]
    counts = [process.communicate()[0].strip() == "True" for process in running]
    assert all(process.returncode == 0 for process in running)
    return counts


def test_many_processes_share_one_compilation(tmp_path: Path) -> None:
    assert sorted(probes(tmp_path, 4)) == [False, False, False, True]
    assert probes(tmp_path, 1) == [False]


def test_a_cache_that_cannot_be_written_compiles_in_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert probes(tmp_path / "file", 1) == [True]


def test_another_type_is_refused_instead_of_compiled() -> None:
    with pytest.raises(KeyError):
        greatest_magnitude(np.zeros(3, np.float64))
    kernel = compiler.kernel(compiler.numba.int64(compiler.view(compiler.numba.int64, 1)))(lambda items: items[0])
    assert kernel(np.array([7])) == 7
    with pytest.raises(TypeError, match="No matching definition"):
        kernel(np.array([7.0]))
