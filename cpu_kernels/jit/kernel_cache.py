"""Where are compiled kernels kept, may they be trusted, and who compiles one that several processes want?

Compiled code is loaded and run, so that it comes only from folders that nobody else can write to. Where there is no
such folder every process compiles for itself: that costs seconds and is said once, and it stops nothing.

The folder's name holds a hash of every kernel source, the versions, Numba's settings and the CPU. In it each kernel has
a folder of its own with a file lock, held while it is compiled, so that processes compile different kernels at the same
time and none of them twice.
"""

import contextlib
import functools
import hashlib
import logging
import multiprocessing
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import llvmlite
import llvmlite.binding
import numba
import numpy as np

from cpu_kernels.jit import cpu_features, numba_private
from cpu_kernels.jit.numba_settings import code_settings

_logger = logging.getLogger("cpu_kernels")
_said: set[str] = set()


def say_once(notice: str) -> None:
    """Log a warning, once in a process and not in those that it starts to share its work."""
    if notice not in _said and multiprocessing.parent_process() is None:
        _logger.warning(notice)
    _said.add(notice)


@functools.cache
def cache_folder() -> Path | None:
    """Return the folder for compiled kernels, made and trusted; None, which is said once, where there is none.

    BINCOMPRESS_CACHE if it is set, else the user's cache folder, else one in the folder for temporary files.
    """
    if numba_private.PROBLEM is not None:
        say_once(
            f"Numba {numba.__version__} is not as expected ({numba_private.PROBLEM}): every process compiles its "
            f"kernels anew, and threads share work more slowly; install a Numba from {_release(numba_private.OLDEST)} "
            f"to below {_release(numba_private.BELOW)}"
        )
        return None
    looked = []
    for check, base in _candidates():
        try:
            folder = _made(check, base / f"kernels-{_identity()}")
        except (OSError, RuntimeError) as error:
            why = "not a folder" if isinstance(error, FileExistsError) else getattr(error, "strerror", None) or error
            looked.append(f"{base} ({why})")
        else:
            return folder
    say_once(
        "kernels are compiled anew by every process, which takes seconds: no folder to keep them in; looked at "
        f"{', '.join(looked) or 'none, as there is neither a home nor a temporary folder'}; BINCOMPRESS_CACHE names one"
    )
    return None


def cache_is_kept() -> bool:
    """Return whether what this process compiles will be there for others."""
    return cache_folder() is not None


def kernel_folder(kernel: str) -> Path | None:
    """Return the folder of one kernel, or None where it cannot be made."""
    folder = cache_folder()
    if folder is None:
        return None
    try:
        (folder / kernel).mkdir(exist_ok=True)
    except OSError as error:
        not_kept(error)
        return None
    return folder / kernel


def is_compiled(kernel: str) -> bool:
    """Return whether the cache has a kernel of this name; one of another CPU or version lies in another folder."""
    base = cache_folder()
    return base is not None and any((base / kernel).glob("*.nbc"))


@contextlib.contextmanager
def kernel_lock(folder: Path) -> Iterator[Callable[[], None]]:
    """Yield a function that waits until no other process compiles the kernel of this folder; held until the end."""
    with contextlib.ExitStack() as held:

        def lock() -> None:
            from filelock import FileLock  # here: 40 ms, for processes that compile

            try:
                held.enter_context(FileLock(folder / "lock"))
            except (OSError, NotImplementedError) as error:  # the latter: a file system that has no locks
                not_kept(error)

        yield lock


def not_kept(error: Exception) -> None:
    """Say that a compiled kernel is not kept."""
    say_once(f"compiled kernels are not kept in {cache_folder()}: {getattr(error, 'strerror', None) or error}")


def _candidates() -> Iterator[tuple[Callable[[Path], None], Path]]:
    """Yield folders in which the cache may lie, each with what has to hold of it."""
    chosen = os.environ.get("BINCOMPRESS_CACHE")
    if chosen:
        yield _expect_nothing, Path(chosen).absolute()
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    with contextlib.suppress(RuntimeError):  # neither HOME nor an entry for this user
        home = home.expanduser()
        if home.is_absolute():
            yield _expect_own, home / "bincompress"
    with contextlib.suppress(OSError):  # no folder for temporary files either
        user = f"-{os.getuid()}" if hasattr(os, "getuid") else ""  # Windows has one such folder for each user
        yield _expect_private, Path(tempfile.gettempdir()).absolute() / f"bincompress{user}"


def _expect_nothing(base: Path) -> None:
    """Trust a folder that the user named; the one below it is looked at."""


def _expect_own(base: Path) -> None:
    _check(base, stat.S_IWOTH)


def _expect_private(base: Path) -> None:
    """Expect 0700: under a name that can be guessed, in a folder where everybody may make one."""
    _check(base, stat.S_IRWXG | stat.S_IRWXO)


def _made(check: Callable[[Path], None], folder: Path) -> Path:
    """Return the folder, made if need be, or raise OSError where it cannot be written or trusted."""
    folder.parent.parent.mkdir(parents=True, exist_ok=True)
    for one in (folder.parent, folder):
        with contextlib.suppress(FileExistsError):
            one.mkdir(mode=0o700)
    check(folder.parent)
    _check(folder, stat.S_IWGRP | stat.S_IWOTH)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError("cannot be written")
    return folder


def _check(folder: Path, forbidden: int) -> None:
    """Raise OSError unless this is a folder, no link to one, of this user and without the forbidden rights."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError("not a folder")
    if not hasattr(os, "getuid"):  # Windows: rights are inherited from the user's own folder
        return
    if found.st_uid != os.getuid():
        raise PermissionError("belongs to another user")
    if found.st_mode & forbidden:
        raise PermissionError("others may write to it" if forbidden & stat.S_IWOTH else "others may enter it")


@functools.cache
def _identity() -> str:
    digest = hashlib.sha256()
    for part in (
        sources_digest(),
        numba.__version__,
        llvmlite.__version__,
        np.__version__,
        cpu_name(),
        *code_settings(),
    ):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]


def cpu_name() -> str:
    """Return the CPU that kernels are compiled for, with its features: LLVM's name, and what else is known."""
    told = f"{llvmlite.binding.get_host_cpu_name()} {llvmlite.binding.get_host_cpu_features().flatten()}"
    # Of an Arm CPU LLVM names few features.
    return f"{told} {sorted(cpu_features.arm_features().items())}" if cpu_features.ARM else told


@functools.cache
def sources_digest() -> str:
    """Return a hash of the kernels' sources; raises RuntimeError where they are not there."""
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    sources = sorted(package.rglob("*.py"))
    if not sources:
        raise RuntimeError("the kernels' sources, which compiled ones are known by, are not there")
    for source in sources:
        digest.update(source.relative_to(package).as_posix().encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]


def _release(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
