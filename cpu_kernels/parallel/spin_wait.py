"""Handing native work to threads that wait in native code: about a microsecond, where waking a thread takes 24.

Each worker has a turn, a word that it and the leading thread pass to and fro. A worker that has waited long enough
falls asleep, which is to say that it returns to Python. The leading thread does the share of a worker that sleeps,
and of one that has not begun when its own is done, because another program has the core.
A job is a kernel's address (see addresses.py) with one block of int64 arguments per thread.
"""

import functools
import platform
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cpu_kernels.jit import vector as v
from cpu_kernels.jit.addresses import call
from cpu_kernels.jit.compiler import inline, kernel, out

READY, POSTED, RUNNING, ASLEEP, LEAVE = range(5)  # what a turn says; LEAVE asks a waiting worker to return to Python
SPACING = 8  # words from turn to turn, so that no two share a cache line
ALONE = 1_000  # looks at a turn before the core is offered to other threads, which a busy machine has: 50 microseconds
PATIENCE = 3_000  # looks before a worker falls asleep: 1 or 2 milliseconds, longer than most sampling takes
_FUNCTION, _BLOCKS, _STRIDE, _ITEMS, _TAKEN = range(5)  # words of a posted job; then whether each worker was posted to


def posted_words(threads: int) -> int:
    """Return the int64 words that a posted job takes."""
    return _TAKEN + threads


def _word(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    return v.at(builder, v.data(context, builder, kind, array), index)


@intrinsic
def _look(typing: Any, turns: Any, place: Any) -> Any:
    """Return turns[place], and see all that was written before it was set."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(_word(context, builder, signature.args[0], *arguments), "acquire", 8)

    return types.int64(turns, types.intp), generate


@intrinsic
def _set(typing: Any, turns: Any, place: Any, value: Any) -> Any:
    """Set turns[place] and show all that was written before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _word(context, builder, signature.args[0], *arguments[:2])
        builder.store_atomic(arguments[2], pointer, "release", 8)
        return context.get_dummy_value()

    return types.void(turns, types.intp, types.int64), generate


@intrinsic
def _exchange(typing: Any, turns: Any, place: Any, expected: Any, value: Any) -> Any:
    """Set turns[place] where it is `expected`, and return whether it was."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _word(context, builder, signature.args[0], *arguments[:2])
        found = builder.cmpxchg(pointer, arguments[2], arguments[3], "acq_rel", "acquire")
        return builder.zext(builder.extract_value(found, 1), v.I64)

    return types.int64(turns, types.intp, types.int64, types.int64), generate


@intrinsic
def _pause(typing: Any) -> Any:
    """Leave the core to its other hardware thread for a moment."""
    machine = platform.machine().lower()

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if machine in ("x86_64", "amd64"):
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        elif machine in ("arm64", "aarch64"):
            kind = ir.FunctionType(ir.VoidType(), [v.I32])
            hint = cgutils.get_or_insert_function(builder.module, kind, "llvm.aarch64.hint")
            builder.call(hint, [ir.Constant(v.I32, 1)])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def _yield(typing: Any) -> Any:
    """Offer the core to another thread."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(v.I32, [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), generate


@inline
def _wait_a_little(looks: Any) -> None:
    if looks < ALONE:
        _pause()
    else:
        _yield()


@kernel(types.intp(out(types.int64, 1), out(types.int64, 1), *[types.intp] * 4))
def lead(turns: Any, posted: Any, function: Any, blocks: Any, stride: Any, items: Any) -> Any:
    """Share items 0 .. items - 1 of a job among this thread and the workers; return how many workers were asleep.

    turns int64 (workers * SPACING,), posted int64 (posted_words(threads),); thread k's arguments lie at
    blocks + k * stride. The job must not raise.
    """
    workers = turns.size // SPACING
    threads = workers + 1
    posted[_FUNCTION], posted[_BLOCKS], posted[_STRIDE], posted[_ITEMS] = function, blocks, stride, items
    asleep = 0
    for k in range(workers):
        posted[_TAKEN + k] = _exchange(turns, k * SPACING, READY, POSTED)
        asleep += 1 - posted[_TAKEN + k]
    call(function, blocks, 0, items // threads)
    for k in range(workers):
        if not posted[_TAKEN + k] or _exchange(turns, k * SPACING, POSTED, READY):
            call(function, blocks, items * (k + 1) // threads, items * (k + 2) // threads)
    for k in range(workers):
        looks = 0
        while _look(turns, k * SPACING) == RUNNING:
            _wait_a_little(looks)
            looks += 1
    return asleep


@kernel(types.void(out(types.int64, 1), out(types.int64, 1), types.intp))
def serve(turns: Any, posted: Any, number: Any) -> None:
    """Do worker `number`'s share of every job that `lead` posts, until none came for a while or LEAVE is said."""
    threads = turns.size // SPACING + 1
    place = number * SPACING
    looks = 0
    while looks < PATIENCE or not _exchange(turns, place, READY, ASLEEP):
        turn: Any = _look(turns, place)
        if turn == POSTED and _exchange(turns, place, POSTED, RUNNING):
            first = posted[_ITEMS] * (number + 1) // threads
            last = posted[_ITEMS] * (number + 2) // threads
            call(posted[_FUNCTION], posted[_BLOCKS] + (number + 1) * posted[_STRIDE], first, last)
            _set(turns, place, READY)
            looks = 0
        elif turn == LEAVE:
            _set(turns, place, ASLEEP)
            return
        else:
            _wait_a_little(looks)
            looks += 1


@kernel(types.void(out(types.int64, 1)))
def dismiss(turns: Any) -> None:
    """Ask all waiting workers to return to Python."""
    for place in range(0, turns.size, SPACING):
        _exchange(turns, place, READY, LEAVE)


@functools.cache
def compile_all() -> None:
    """Compile (or load) the kernels of this file."""
    for one in (lead, serve, dismiss):
        one.compile()  # type: ignore[attr-defined]
