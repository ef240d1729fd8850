"""Do the limits that `ulimit` sets leave the memory that this program takes before it has read anything?"""

from bincompress.errors import BincompressError
from bincompress.process.machine import allowed_cpus, resource_limits, size_text

# Bytes, measured on x86: what the libraries take, and what a small model and the compiler take beyond. NumPy's BLAS
# takes a buffer and a stack for each CPU as it is imported, and ends the process where it does not get them.
_LIBRARIES = {"-v": 270_000_000, "-d": 50_000_000}
_MODEL = {"-v": 350_000_000, "-d": 300_000_000}
_BLAS_THREAD, _BLAS_THREADS = 41_000_000, 64


def refuse_small_limit() -> None:
    """Raise BincompressError where a memory limit is below what the libraries take: they would end the process."""
    for _, limit, option in resource_limits():
        if limit < _needed(option):
            raise BincompressError(_too_small(limit, option))


def limit_reached() -> str | None:
    """Return in one line which memory limit is too small, when memory could not be had; None where none is set."""
    _, limit, option = min(resource_limits(), default=(0, 0, ""))
    return _too_small(limit, option) if option else None


def _needed(option: str) -> int:
    return _LIBRARIES[option] + _BLAS_THREAD * min(allowed_cpus(), _BLAS_THREADS)


def _too_small(limit: int, option: str) -> str:
    needed = _needed(option)
    return (
        f"the memory limit is too small: `ulimit {option}` allows {size_text(limit)}, the program needs "
        f"{size_text(needed)}, and about {size_text(needed + _MODEL[option])} to run a small model; raise it "
        f"(`ulimit {option} unlimited`)"
    )
