"""Numba's settings (NUMBA_... variables, .numba_config.yaml, numba.config): which change code, which cannot work?"""

import functools
import subprocess
import sys
import warnings

from cpu_kernels.errors import KernelError

# Numba reads its settings when it is first imported. It warns of those that it cannot read, with a traceback, and goes
# on with its default: here they are kept for one line (see check_settings).
with warnings.catch_warnings(record=True) as _warned:
    warnings.simplefilter("always", RuntimeWarning)
    import llvmlite.binding
    import numba

_UNREAD = [str(one.message).splitlines()[0] for one in _warned if "NUMBA_" in str(one.message)]
for _one in _warned:
    if "NUMBA_" not in str(_one.message):
        warnings.warn_explicit(_one.message, _one.category, _one.filename, _one.lineno)

# Helpers and intrinsics are marked when their modules are imported: what is switched on later comes too late for them.
_DISABLED_AT_IMPORT = bool(numba.config.DISABLE_JIT)  # type: ignore[attr-defined]

# What says where files lie, how many threads there are and what is printed. All others count as changing code, those of
# later releases too: one too many costs a compilation, one too few would leave slow code for ever.
_CHANGE_NO_CODE = {
    "ALWAYS_WARN_UNINIT_VAR", "CACHE_DIR", "CACHE_LOCATOR_CLASSES", "CAPTURED_ERRORS", "CHROME_TRACE", "COLOR_SCHEME",
    "DEVELOPER_MODE", "DIFF_IR", "DISABLE_CUDA", "DISABLE_JIT", "DISABLE_PERFORMANCE_WARNINGS",
    "DISABLE_TYPEINFER_FAIL_CACHE", "ENABLE_CUDASIM", "FORCE_CUDA_CC", "FULL_TRACEBACKS", "FUNCTION_CACHE_SIZE",
    "GDB_BINARY", "HIGHLIGHT_DUMPS", "HTML", "LLVM_PASS_TIMINGS", "NUMBA_DEFAULT_NUM_THREADS", "NUMBA_NUM_THREADS",
    "PARALLEL_DIAGNOSTICS", "SHOW_HELP", "THREADING_LAYER", "THREADING_LAYER_PRIORITY", "TRACE",
}  # fmt: skip
_CHANGE_NO_CODE_PREFIXES = ("CUDA_", "DEBUG_PRINT_", "DUMP_")


def code_settings() -> list[str]:
    """Return the settings in force that may change what is compiled, as "NAME=value", in order."""
    # Python leaves assertions and docstrings out then, and Numba compiles the bytecode.
    optimized = [f"PYTHONOPTIMIZE={sys.flags.optimize}"] if sys.flags.optimize else []
    return optimized + [
        f"{name}={value!r}"
        for name, value in sorted(vars(numba.config).items())  # type: ignore[attr-defined]
        if name.isupper()
        and name not in _CHANGE_NO_CODE
        and not name.startswith(_CHANGE_NO_CODE_PREFIXES)
        and (value is None or isinstance(value, bool | int | float | str))
    ]


def check_settings() -> None:
    """Raise KernelError for settings under which no kernel can be compiled."""
    if numba.config.DISABLE_JIT or _DISABLED_AT_IMPORT:  # type: ignore[attr-defined]
        raise KernelError("NUMBA_DISABLE_JIT is set, and kernels run compiled only: unset it and start again")
    if _UNREAD:
        raise KernelError(f"{_UNREAD[0].removesuffix('.')}: Numba cannot read it; change or unset it")
    config = vars(numba.config)  # type: ignore[attr-defined]
    if config["CPU_NAME"] is not None or config["CPU_FEATURES"] is not None:
        _check_cpu(config["CPU_NAME"], config["CPU_FEATURES"])


# Compiled in a process of its own: LLVM ends the process where it is asked for a CPU that it cannot compile for.
_TRIAL = "import numba; assert numba.njit('float64(float64)')(lambda x: 2.0 * x + 1.0)(2.0) == 5.0"


@functools.cache
def _check_cpu(name: str | None, features: str | None) -> None:
    """Raise KernelError for a CPU that this one is not, or for which LLVM cannot compile."""
    told = f"NUMBA_CPU_NAME={name or ''} NUMBA_CPU_FEATURES={features or ''}"
    host = llvmlite.binding.get_host_cpu_features()
    for feature in (features or "").split(","):
        if feature.startswith("+") and host.get(feature[1:]) is False:
            raise KernelError(f"{told}: this CPU has no {feature[1:]}; change or unset them")
    done = subprocess.run([sys.executable, "-P", "-c", _TRIAL], capture_output=True, text=True, errors="replace")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise KernelError(f"{told}: no kernel can be compiled with them ({last}); change or unset them")
