"""How a kernel is compiled: one signature each, on first use, kept for other processes (see kernel_cache.py).

Numba's own cache is not safe when several processes compile one function at the same time, and its key ignores callees
in other files and survives a change of them. A kernel that is kept is loaded without Numba's compiler, so that a
program whose kernels are there starts early (see numba_private.py).
"""

import contextlib
import functools
import hashlib
import threading
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any, cast

import numba

from cpu_kernels.jit import numba_private
from cpu_kernels.jit.kernel_cache import cache_folder, kernel_folder, kernel_lock, not_kept
from cpu_kernels.jit.numba_settings import check_settings

_process_lock = threading.RLock()
_listeners: list[Callable[[str], None]] = []

# The "numpy" error model divides without a branch for zero, which would keep loops from being vectorised.
_KERNEL: dict[str, Any] = {"nogil": True, "error_model": "numpy", **numba_private.KERNEL_OPTIONS}
_HELPER: dict[str, Any] = {**_KERNEL, **numba_private.HELPER_OPTIONS}


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
    signature: Any, named: str = "", reassociate: bool = False, **helpers: Callable[..., Any]
) -> "Callable[[Callable[..., Any]], Kernel]":
    """Mark a kernel: compiled for `signature` alone, on first use, without the GIL held while it runs.

    Arguments of other types raise TypeError instead of compiling a second version. `reassociate` lets float sums be
    taken in any order, so that they vectorise; their last bits then depend on the CPU. helpers: functions made for this
    kernel, under the names of the globals that it calls them by. Closed over they would be a part of the cache's key,
    another one in every process. named: the kernel's own name, where one function makes several with other helpers.
    """

    def mark(function: Callable[..., Any]) -> Kernel:
        whole = _with_globals(function, helpers, named) if helpers else function
        return cast(Kernel, functools.wraps(function)(Kernel(whole, signature, reassociate)))

    return mark


def _with_globals(function: Callable[..., Any], more: dict[str, Callable[..., Any]], named: str) -> Callable[..., Any]:
    """Return the function with globals of its own, under another name where one is given."""
    plain = cast(FunctionType, function)
    copy = FunctionType(
        plain.__code__, {**plain.__globals__, **more}, plain.__name__, plain.__defaults__, plain.__closure__
    )
    copy.__qualname__, copy.__module__, copy.__doc__ = named or plain.__qualname__, plain.__module__, plain.__doc__
    copy.__name__ = named or plain.__name__
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
        """Load the kernel from the cache or compile it, and return the callable.

        Raises KernelError where Numba's settings let no kernel be compiled.
        """
        with _process_lock:
            if self._compiled is None:
                check_settings()
                self._compiled = _dispatcher(self)
            return self._compiled

    def name(self) -> str:
        """Return a name that no other kernel has: of one function's, signature and closed-over numbers differ."""
        cells = [cell.cell_contents for cell in self.function.__closure__ or ()]
        if not all(isinstance(value, bool | int | float | str) for value in cells):
            raise TypeError(f"{self.function.__name__}: a kernel closes over numbers alone; give functions as helpers")
        digest = hashlib.sha256(repr((self.function.__module__, str(self.signature), cells)).encode())
        return f"{self.function.__name__}-{digest.hexdigest()[:12]}"


def _dispatcher(wanted: Kernel) -> Callable[..., Any]:
    decorate = numba.njit(**_KERNEL, fastmath={"reassoc", "contract"} if wanted.reassociate else False)
    dispatcher: Any = decorate(wanted.function)
    name = wanted.name()
    folder = kernel_folder(name)
    announced = functools.partial(_announce, wanted.function.__name__)
    if folder is None:
        announced()
        dispatcher.compile(wanted.signature)
    else:
        first = int(hashlib.sha256(name.encode()).hexdigest()[:12], 16) << 16
        with numba_private.numbered_from(first), kernel_lock(folder) as lock:
            # One that cannot be made (a source that is not there) leaves the kernel in memory, as for plain njit.
            try:
                numba_private.use_cache(dispatcher, wanted.function, folder, lock, announced, not_kept)
            except (OSError, RuntimeError) as error:
                not_kept(error)
                announced()
            dispatcher.compile(wanted.signature)
    dispatcher.disable_compile()
    return cast(Callable[..., Any], dispatcher)


def _announce(name: str) -> None:
    for tell in _listeners:
        tell(name)


@contextlib.contextmanager
def announce(tell: Callable[[str], None]) -> Iterator[None]:
    """Call `tell(kernel name)` whenever a kernel is really compiled (not loaded from the cache) in this block.

    Raises KernelError at once where Numba's settings let no kernel be compiled; says where none can be kept.
    """
    check_settings()
    cache_folder()
    _listeners.append(tell)
    try:
        yield
    finally:
        _listeners.remove(tell)


def after_fork() -> None:
    """Renew the locks, in a process that has been forked: a thread that is not there any more may have held them."""
    global _process_lock
    _process_lock = threading.RLock()
    numba_private.renew_locks()
