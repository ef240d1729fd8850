"""Does the process that compiles ahead know what a model of experts, sinks and states takes for its first token?"""

import subprocess
import sys
from pathlib import Path

import pytest

from bincompress import compress
from bincompress.inference.model_kernels import kernels_beside_llamas
from bincompress.inference.warmup import _all_kernels
from bincompress.model.config import parse
from tests.test_declarations import config_of, write

GENERATE = """
import gc, sys
sys.argv = ["bincompress", "generate", {store!r}, "t5 t6", "--max-tokens", "2"]
from bincompress.cli import main
main()
gc.unfreeze()
from bincompress.inference import warmup
from cpu_kernels.jit.compiler import Kernel
used = [kernel for kernel in gc.get_objects() if isinstance(kernel, Kernel) and kernel._compiled]
ahead = warmup._all_kernels([kernel.name() for kernel in warmup._expected])
print()
print("used:", len(used))
print("others:", *(kernel.__name__ for kernel in used if kernel not in ahead))
"""


@pytest.mark.parametrize("architecture", ["GptOssForCausalLM", "Qwen3_5MoeForCausalLM", "BitNetForCausalLM"])
def test_kernels_have_names_that_the_second_process_knows(architecture: str) -> None:
    found = kernels_beside_llamas(parse(config_of(architecture)))
    assert len(found) > 1
    assert set(found) <= set(_all_kernels([kernel.name() for kernel in found]))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["GptOssForCausalLM", "Qwen3_5MoeForCausalLM"])
def test_the_first_token_takes_no_kernel_that_is_not_compiled_ahead(architecture: str, tmp_path: Path) -> None:
    compress(str(write(tmp_path / "model", architecture)), str(tmp_path / "store"), groups=4, block=64)
    script = GENERATE.format(store=str(tmp_path / "store"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    used, others = (line.split(":", 1)[1].strip() for line in done.stdout.splitlines()[-2:])
    assert int(used) > 12
    small = {"multiply", "multiply_token", "multiply_wide"}  # of matrices as small as these, which no model has
    assert set(others.split()) <= small
