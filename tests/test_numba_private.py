"""What happens where Numba's private API is not as the kernels expect it?"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import pytest
from numba.core import bytecode, caching, callconv, codegen, cpu, dispatcher
from numba.core.compiler import CompileResult

from cpu_kernels.jit import kernel_cache, numba_private
from cpu_kernels.matmul.prepacking import kernels

ROOT = Path(__file__).parents[1]

CHANGED: list[tuple[Any, str, Any, str]] = [
    (numba, "version_info", type("Version", (), {"short": (0, 99)}), "release"),
    (bytecode.FunctionIdentity, "_unique_ids", iter([1]), "_unique_ids"),
    (dispatcher.Dispatcher, "compile", lambda self, sig: None, "Dispatcher.compile"),
    (cpu, "CPUTargetOptions", object, "wrappers"),
    (caching.FunctionCache, "_load_overload", lambda self, sig: None, "_load_overload"),
    (caching.CompileResultCacheImpl, "reduce", lambda self, cres, more: None, "reduce"),
    (CompileResult, "_rebuild", classmethod(lambda cls, target_context, code: None), "_rebuild"),
    (codegen.JITCodeLibrary, "get_pointer_to_function", lambda self: 0, "get_pointer_to_function"),
    (callconv.CPUCallConv, "get_function_type", lambda self, restype, argtypes: "void ()", "convention"),
]


@pytest.mark.parametrize(("owner", "name", "value", "told"), CHANGED)
def test_a_change_is_noticed(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, value: Any, told: str) -> None:
    assert numba_private.find_problem() is None
    monkeypatch.setattr(owner, name, value)
    assert told in (numba_private.find_problem() or "")


def test_a_name_that_is_gone_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(bytecode.FunctionIdentity, "_unique_ids")
    assert "_unique_ids" in (numba_private.find_problem() or "")


# A change that Numba itself does not mind, made before the kernels are imported.
CHANGE = "from numba.core import caching; caching.CompileResultCacheImpl.reduce = lambda self, cres, more=None: None\n"


@pytest.mark.slow
def test_without_it_kernels_of_every_kind_still_equal_their_twins(tmp_path: Path) -> None:
    (tmp_path / "changed_numba.py").write_text(CHANGE)
    suite = str(ROOT / "tests" / "test_kernels_short.py")
    # Nothing is kept, so that all are compiled here: of the products with 8 bits alone, by tables and by counting.
    products = "test_products_of_blocks_and_of_single_tokens_equal_their_twin"
    both = {f"{name}-{bits}" for name in kernels() for bits in (6, 8)}
    # By its place below the root folder, "/".
    left_out = [f"--deselect={suite[1:]}::{products}[{one}]" for one in both - {f"{kernels()[0]}-8", "popcount-8"}]
    command = [
        sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--noconftest", "-p", "changed_numba",
        "--rootdir", "/", *left_out,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    environment["BINCOMPRESS_CACHE"] = str(tmp_path / "cache")
    done = subprocess.run([*command, suite], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert f"{len(left_out)} deselected" in done.stdout
    assert not (tmp_path / "cache").exists()  # nothing is kept that could be wrong


def test_it_is_said_once(tmp_path: Path) -> None:
    use = "from cpu_kernels.quantize.compensation import look_up\nfrom cpu_kernels.matmul.dense import bfloat16_rows\n"
    use += "look_up.compile(); bfloat16_rows.compile()\n"
    done = subprocess.run(
        [sys.executable, "-c", CHANGE + use],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"Numba {numba.__version__} is not as expected (CompileResultCacheImpl.reduce()): every")
    assert kernel_cache.cache_is_kept()  # in this process, where nothing is changed
