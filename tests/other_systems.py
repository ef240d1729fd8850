"""A process as on macOS or Windows: what such a system lacks is not there for our own code (tests/test_systems.py).

A sitecustomize.py calls `become`, so that processes that are started are of that system too. Only modules of this
project see the restricted modules: other packages choose their own code by sys.platform, which stays what it is.
"""

import builtins
import contextlib
import errno
import io
import os
import socket
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

OURS = ("bincompress", "cpu_kernels", "jobs", "bincompress_jobs")
_SOURCES = Path(__file__).parents[1] / "bincompress"

LACKS: dict[str, dict[str, set[str]]] = {
    "macos": {
        "os": {
            "sched_getaffinity", "sched_setaffinity", "posix_fadvise", "posix_fallocate", "copy_file_range", "eventfd",
            "memfd_create", "getrandom", "splice", "pidfd_open", "getxattr", "setxattr", "O_DIRECT", "O_TMPFILE",
            "O_PATH", "O_NOATIME", "unshare", "sched_getscheduler", "getresuid",
        },
        "mmap": {"MADV_HUGEPAGE", "MAP_POPULATE", "MAP_STACK", "MADV_DONTFORK", "MADV_REMOVE"},
        "signal": {"SIGPWR", "SIGSTKFLT", "SIGPOLL", "SIGRTMIN", "SIGRTMAX", "sigtimedwait", "sigwaitinfo"},
        "select": {"epoll"},
        "resource": {"prlimit", "RLIMIT_MSGQUEUE", "RLIMIT_NICE", "RLIMIT_RTPRIO", "RLIMIT_SIGPENDING"},
    },
    "windows": {
        "os": {
            "sched_getaffinity", "sched_setaffinity", "sched_yield", "posix_fadvise", "posix_fallocate",
            "copy_file_range", "eventfd", "memfd_create", "getrandom", "splice", "pidfd_open", "getxattr", "setxattr",
            "O_DIRECT", "O_TMPFILE", "O_PATH", "O_NOATIME", "O_CLOEXEC", "O_NOFOLLOW", "O_DIRECTORY", "O_SYNC",
            "O_NONBLOCK", "unshare", "getuid", "geteuid", "getgid", "getegid", "getgroups", "getlogin_r", "fork",
            "forkpty", "register_at_fork", "pread", "pwrite", "preadv", "pwritev", "readv", "writev", "sendfile",
            "fchmod", "fchown", "chown", "lchown", "chroot", "fchdir", "killpg", "setsid", "getsid", "getpgid",
            "setpgid", "getpgrp", "nice", "getpriority", "setpriority", "statvfs", "fstatvfs", "sysconf", "pathconf",
            "uname", "mkfifo", "mknod", "getloadavg", "wait", "wait3", "wait4", "waitid", "WNOHANG", "posix_spawn",
            "openpty", "ttyname", "set_blocking", "get_blocking", "sync", "lockf", "fdatasync", "O_ACCMODE",
        },
        "mmap": {
            "MAP_PRIVATE", "MAP_SHARED", "MAP_ANONYMOUS", "MAP_ANON", "MAP_POPULATE", "PROT_READ", "PROT_WRITE",
            "PROT_EXEC", "PAGESHIFT", "MADV_HUGEPAGE", "MADV_DONTNEED", "MADV_FREE", "MADV_SEQUENTIAL", "MADV_WILLNEED",
            "MADV_RANDOM", "MADV_NORMAL",
        },
        "signal": {
            "SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGPIPE", "SIGCHLD", "SIGSTOP", "SIGCONT", "SIGTSTP",
            "SIGQUIT", "SIGBUS", "SIGWINCH", "SIGXCPU", "setitimer", "getitimer", "alarm", "pause", "pthread_kill",
            "pthread_sigmask", "sigwait", "sigpending", "siginterrupt", "sigtimedwait", "sigwaitinfo",
        },
        "select": {"poll", "epoll", "kqueue"},
        "socket": {"AF_UNIX", "socketpair_unix", "CMSG_LEN", "SCM_RIGHTS", "SO_REUSEADDR"},
        "time": {"clock_gettime", "clock_getres", "CLOCK_MONOTONIC", "CLOCK_PROCESS_CPUTIME_ID", "tzset"},
    },
}  # fmt: skip
ABSENT = {
    "macos": {"msvcrt", "winreg"},
    "windows": {
        "fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "curses", "readline", "syslog", "posix", "crypt",
    },
}  # fmt: skip


# SO_REUSEADDR is there on Windows, where it lets two processes have one address: not what our code wants.
_MORE: dict[str, dict[str, Any]] = {
    "os": {"O_BINARY": 0},
    "socket": {"SO_EXCLUSIVEADDRUSE": socket.SO_REUSEADDR},
}


class _Restricted(ModuleType):
    """A module without some of its names."""

    def __init__(self, whole: ModuleType, lacks: set[str], more: dict[str, Any]) -> None:
        super().__init__(whole.__name__)
        self.__dict__.update(more)
        object.__setattr__(self, "_whole", whole)
        object.__setattr__(self, "_lacks", lacks)

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__["_lacks"]:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(self.__dict__["_whole"], name)


def become(system: str) -> None:
    """Let this process's own code see no more than the system, "macos" or "windows", has."""
    more: dict[str, dict[str, Any]] = _MORE if system == "windows" else {}
    original = builtins.__import__
    shown: dict[str, ModuleType] = {}

    def restricted(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        package = (globals or {}).get("__package__") or (globals or {}).get("__name__") or ""
        if package == "__main__" and str((globals or {}).get("__file__")).startswith(str(_SOURCES)):
            package = OURS[0]  # a program of ours that is started by its file
        if level or package.split(".")[0] not in OURS:
            return original(name, globals, locals, fromlist, level)
        if name.split(".")[0] in ABSENT[system]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if name == "msvcrt":
            return _msvcrt()
        found = original(name, globals, locals, fromlist, level)
        if name in LACKS[system]:
            return shown.setdefault(name, _Restricted(found, LACKS[system][name], more.get(name, {})))
        return found

    builtins.__import__ = restricted
    _without_proc()
    if system == "macos":
        import psutil

        del psutil.Process.cpu_affinity
    else:
        _hold_open_files()
        _remove_locks()


def _without_proc() -> None:
    """Let Path.open find neither /proc nor /sys."""
    whole = io.open

    def open_(file: Any, *arguments: Any, **options: Any) -> Any:
        if str(file).startswith(("/proc", "/sys")):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file))
        return whole(file, *arguments, **options)

    io.open = open_


def _msvcrt() -> Any:
    import fcntl

    def locking(descriptor: int, mode: int, size: int) -> None:
        assert (mode, size) == (2, 1)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    return SimpleNamespace(LK_NBLCK=2, locking=locking)


def _remove_locks() -> None:
    """Let filelock remove its file once it is released, and not before, as it does on Windows."""
    import filelock

    class Lock(filelock.UnixFileLock):
        def _release(self) -> None:
            super()._release()
            with contextlib.suppress(OSError):
                os.unlink(self.lock_file)

    filelock.FileLock = Lock  # type: ignore[misc, assignment]


def _hold_open_files() -> None:
    """Let a file that this process has open or mapped be neither replaced nor renamed nor removed, as on Windows."""

    def guarded(name: str, places: int) -> Callable[..., None]:
        whole = getattr(os, name)

        def call(*paths: Any, **options: Any) -> None:
            for path in paths[:places]:
                if held := _held(path, options.get("dir_fd")):
                    raise PermissionError(errno.EACCES, "used by another process", held)
            whole(*paths, **options)

        return call

    for name, places in (("replace", 2), ("rename", 2), ("unlink", 1), ("remove", 1)):
        setattr(os, name, guarded(name, places))
    import shutil

    shutil._use_fd_functions = False  # type: ignore[attr-defined]


def _held(path: Any, folder: int | None) -> str | None:
    base = str(Path(f"/proc/self/fd/{folder}").readlink()) if folder is not None else ""
    wanted = os.path.realpath(os.path.join(base, os.fspath(path)))  # noqa: PTH118
    using = set()
    for number in os.listdir("/proc/self/fd"):  # noqa: PTH208
        try:
            using.add(str(Path(f"/proc/self/fd/{number}").readlink()))
        except FileNotFoundError:
            continue
    with open("/proc/self/maps", encoding="utf-8") as maps:
        using.update(line.split(None, 5)[-1].rstrip("\n") for line in maps)
    return next((one for one in using if one == wanted or one.startswith(f"{wanted}/")), None)
