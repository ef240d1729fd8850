"""How a kernel is compiled: one signature each, on first use, cached per CPU, safe with many processes.

Numba's own cache is not safe when several processes compile one function at the same time, and its key
ignores callees in other files and survives a change of them. Here the cache folder's name holds a hash of every
kernel source, the versions and the CPU; in it each kernel has a folder of its own with a file lock, held while the
kernel is loaded or compiled, so that processes compile different kernels at the same time and none of them twice.

A kernel is loaded without Numba's compiler (see _KernelCache), so that a program whose kernels are cached starts early.
"""

import contextlib
import fcntl
import functools
import hashlib
import itertools
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any, cast

import llvmlite
import llvmlite.binding
import numba
import numpy as np
from numba.core import event
from numba.core.bytecode import FunctionIdentity
from numba.core.caching import CompileResultCacheImpl, FunctionCache
from numba.core.runtime._nrt_python import c_helpers

_process_lock = threading.RLock()

# The "numpy" error model divides without a branch for zero, which would keep loops from being vectorised. Nothing calls
# kernels as C callbacks, nor helpers from Python; wrappers for that took a tenth of the time of compiling.
_KERNEL: dict[str, Any] = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True}
_HELPER: dict[str, Any] = {**_KERNEL, "no_cpython_wrapper": True}


def view(dtype: Any, ndim: int) -> numba.types.Array:
    """Return the Numba type of a C-contiguous array that a kernel only reads (writable arrays fit too)."""
    return numba.types.Array(dtype, ndim, "C", readonly=True)


def out(dtype: Any, ndim: int) -> numba.types.Array:
    """Return the Numba type of a C-contiguous array that a kernel writes."""
    return numba.types.Array(dtype, ndim, "C")


def inline(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a helper that kernels of the same package call; it is compiled into each of them."""
    return cast(Callable[..., Any], numba.njit(**_HELPER)(function))


def inline_whole(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a helper whose body replaces its call, so that integer literals given to it stay literals."""
    return cast(Callable[..., Any], numba.njit(**_HELPER, inline="always")(function))


def kernel(
    signature: Any, reassociate: bool = False, **helpers: Callable[..., Any]
) -> "Callable[[Callable[..., Any]], Kernel]":
    """Mark a kernel: compiled for `signature` alone, on first use, without the GIL held while it runs.

    Arguments of other types raise TypeError instead of compiling a second version. `reassociate` lets float sums be
    taken in any order, so that they vectorise; their last bits then depend on the CPU. helpers: functions made for this
    kernel, under the names of the globals that it calls them by. Closed over they would be a part of the cache's key,
    another one in every process.
    """

    def mark(function: Callable[..., Any]) -> Kernel:
        whole = _with_globals(function, helpers) if helpers else function
        return cast(Kernel, functools.wraps(function)(Kernel(whole, signature, reassociate)))

    return mark


def _with_globals(function: Callable[..., Any], more: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
    """Return the function with globals of its own."""
    plain = cast(FunctionType, function)
    copy = FunctionType(
        plain.__code__, {**plain.__globals__, **more}, plain.__name__, plain.__defaults__, plain.__closure__
    )
    copy.__qualname__, copy.__module__, copy.__doc__ = plain.__qualname__, plain.__module__, plain.__doc__
    return copy


class Kernel:
    """A function that compiles itself when it is first called."""

    def __init__(self, function: Callable[..., Any], signature: Any, reassociate: bool = False) -> None:
        self.function = function
        self.signature = signature
        self.reassociate = reassociate
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, *arguments: Any) -> Any:
        """Run the kernel."""
        return (self._compiled or self.compile())(*arguments)

    def compile(self) -> Callable[..., Any]:
        """Load the kernel from the cache or compile it, and return the callable."""
        with _process_lock:
            if self._compiled is None:
                with _cache_folder(self._name()) as folder:
                    self._compiled = _dispatcher(self, folder)
            return self._compiled

    def _name(self) -> str:
        """Return a name that no other kernel has: of one function's, signature and closed-over numbers differ."""
        cells = [cell.cell_contents for cell in self.function.__closure__ or ()]
        if not all(isinstance(value, bool | int | float | str) for value in cells):
            raise TypeError(f"{self.function.__name__}: a kernel closes over numbers alone; give functions as helpers")
        digest = hashlib.sha256(repr((self.function.__module__, str(self.signature), cells)).encode())
        return f"{self.function.__name__}-{digest.hexdigest()[:12]}"


def _dispatcher(wanted: Kernel, folder: Path | None) -> Callable[..., Any]:
    decorate = numba.njit(**_KERNEL, fastmath={"reassoc", "contract"} if wanted.reassociate else False)
    dispatcher: Any = decorate(wanted.function)
    if folder is not None:
        dispatcher._cache = _kernel_cache(wanted.function, folder)  # asked by compile(), which also writes to it
    with _numbered_after(wanted._name()):
        dispatcher.compile(wanted.signature)
    dispatcher.disable_compile()
    return cast(Callable[..., Any], dispatcher)


@contextlib.contextmanager
def _numbered_after(name: str) -> Iterator[None]:
    """Let Numba number the functions that it compiles from a number on that the kernel's name gives.

    Native code names a function after its Python name, the types of its arguments and this number, which Numba counts
    from 1 in every process. Of two with one name, helpers that close over different numbers say, a process that loads
    what two others compiled would keep the first alone, and the second kernel would call the first one's.
    """
    before = FunctionIdentity._unique_ids
    FunctionIdentity._unique_ids = itertools.count(int(hashlib.sha256(name.encode()).hexdigest()[:12], 16) << 16)
    try:
        yield
    finally:
        FunctionIdentity._unique_ids = before


def _kernel_cache(function: Callable[..., Any], folder: Path) -> "_KernelCache":
    config: Any = numba.config
    before = config.CACHE_DIR
    # Set only while the cache is made: the folder is fixed then, and other users of Numba keep theirs.
    config.CACHE_DIR = str(folder)
    try:
        return _KernelCache(function)
    finally:
        config.CACHE_DIR = before


class _NativeCode(CompileResultCacheImpl):  # type: ignore[misc]
    """What the cache keeps of a compiled function: its native code, and little of what compiling others could need.

    Numba keeps LLVM's intermediate code too, for functions that call this one; reading it is half the time of loading.
    No compiled function can call a kernel: Numba does not know the class Kernel. What Numba looks for in that code when
    it loads a function, the names that the native code defines, it finds in empty functions.
    Numba also keeps what inlined functions keep their constants in; without constants, it names modules to import.
    """

    def reduce(self, compiled: Any) -> Any:
        """Return what is written to the cache."""
        (name, kind, (native, _)), *others, environments = super().reduce(compiled)
        described = compiled.fndesc
        names = _empty_functions([described.llvm_func_name, described.llvm_cpython_wrapper_name])
        return (name, kind, (native, names)), *others, tuple(kept for kept in environments if kept.consts)


def _empty_functions(names: Iterable[str]) -> bytes:
    """Return the intermediate code of functions that do nothing."""
    text = "".join(f'define void @"{name}"() {{ ret void }}\n' for name in names)
    return cast(bytes, llvmlite.binding.parse_assembly(text).as_bitcode())


class _KernelCache(FunctionCache):  # type: ignore[misc]
    """Numba's cache of one function, from which a kernel is loaded without readying the compiler.

    Numba's own first imports and registers all that a function could use, which takes 0.2 s and which compiling does
    itself; native code needs the runtime's symbols alone.
    """

    _impl_class = _NativeCode

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return the compiled function for a signature, or None where the cache has none that can be read."""
        _offer_runtime()
        try:
            return self._load_overload(sig, target_context)
        except Exception:  # as many kinds as there are ways to damage a pickle, by a power cut say
            self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep a compiled function; where the disk is full, this process alone has it."""
        with contextlib.suppress(OSError):
            super().save_overload(sig, data)


@functools.cache
def _offer_runtime() -> None:
    """Let native code find Numba's runtime, which allocates arrays.

    Numba's own way (rtsys.initialize) also compiles what compiling needs of it: 25 ms.
    """
    for name, place in c_helpers.items():
        llvmlite.binding.add_symbol(name if name.startswith("_") else f"NRT_{name}", place)


@contextlib.contextmanager
def _cache_folder(kernel: str) -> Iterator[Path | None]:
    """Yield a kernel's locked folder, or None where no folder can be written (then each process compiles anew)."""
    every = cache_path()
    folder = every / kernel
    try:
        every.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Compiled code is loaded from here: not from a folder that somebody else made under a name that can be guessed.
        if every.stat().st_uid != os.getuid():
            raise PermissionError(f"{every} belongs to another user")
        folder.mkdir(exist_ok=True)
        handle = open(folder / "lock", "a")  # noqa: SIM115 (closed by the with below)
    except OSError:
        yield None
        return
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield folder


@functools.cache
def cache_path() -> Path:
    """Return the folder for compiled kernels: BINCOMPRESS_CACHE, or the user's cache folder, or the temporary one."""
    chosen = os.environ.get("BINCOMPRESS_CACHE")
    if chosen:
        base = Path(chosen)
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "bincompress"
        if not _writable(base):
            base = Path(tempfile.gettempdir()) / f"bincompress-{os.getuid()}"
    return base / f"kernels-{_identity()}"


def cache_is_kept() -> bool:
    """Return whether what this process compiles will be there for others."""
    return _writable(cache_path())


def _writable(folder: Path) -> bool:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK)


def _identity() -> str:
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for source in sorted(package.rglob("*.py")):
        digest.update(source.relative_to(package).as_posix().encode() + b"\0" + source.read_bytes())
    host = llvmlite.binding.get_host_cpu_name() + llvmlite.binding.get_host_cpu_features().flatten()
    for version in (numba.__version__, llvmlite.__version__, np.__version__, host):
        digest.update(version.encode() + b"\0")
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def announce(tell: Callable[[str], None]) -> Iterator[None]:
    """Call `tell(kernel name)` whenever a kernel is really compiled (not loaded from the cache) in this block."""

    class Listener(event.Listener):  # type: ignore[misc]
        def on_start(self, seen: Any) -> None:
            tell(seen.data["dispatcher"].py_func.__name__)

        def on_end(self, seen: Any) -> None:
            pass

    with event.install_listener("numba:compile", Listener()):
        yield
