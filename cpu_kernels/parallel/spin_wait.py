"""Handing native work to threads that wait in native code: about a microsecond, where waking a thread takes 24.

Each worker has a slot, whose first word is its state; the worker and the calling thread set it by slots. A worker that
has spun to its limit parks, which is to say that it reslots to Python. The calling thread does the share of a worker
that is parked, and of one that has not begun when its own is done, because another program has the core.
A job is a kernel's address (see addresses.py) with one block of int64 arguments per thread.
"""

import functools
import os
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from cpu_kernels.jit import cpu_features, llvm
from cpu_kernels.jit.addresses import call
from cpu_kernels.jit.compiler import inline, kernel, out

IDLE, SUBMITTED, RUNNING, PARKED, STOP = range(5)  # a worker's states; STOP asks one that is idle to return to Python
SLOT_WORDS = 8  # so that no two slots share a cache line
YIELD_LIMIT = 1_000  # spins before the core is offered to other threads, which a busy machine has: 50 microseconds
SPIN_LIMIT = 3_000  # spins before a worker parks: 1 or 2 milliseconds, longer than most sampling takes
_FUNCTION, _BLOCKS, _STRIDE, _ITEMS, _GIVEN = range(5)  # words of a job; then whether each worker was given it


def job_words(threads: int) -> int:
    """Return the int64 words that a job takes."""
    return _GIVEN + threads


@intrinsic
def _state(typing: Any, slots: Any, place: Any) -> Any:
    """Return slots[place], and see all that was written before it was set."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(llvm.item(context, builder, signature.args[0], *arguments), "acquire", 8)

    return types.int64(slots, types.intp), generate


@intrinsic
def _set_state(typing: Any, slots: Any, place: Any, value: Any) -> Any:
    """Set slots[place] and show all that was written before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = llvm.item(context, builder, signature.args[0], *arguments[:2])
        builder.store_atomic(arguments[2], pointer, "release", 8)
        return context.get_dummy_value()

    return types.void(slots, types.intp, types.int64), generate


@intrinsic
def _exchange(typing: Any, slots: Any, place: Any, expected: Any, value: Any) -> Any:
    """Set slots[place] where it is `expected`, and return whether it was."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = llvm.item(context, builder, signature.args[0], *arguments[:2])
        found = builder.cmpxchg(pointer, arguments[2], arguments[3], "acq_rel", "acquire")
        return builder.zext(builder.extract_value(found, 1), llvm.I64)

    return types.int64(slots, types.intp, types.int64, types.int64), generate


@intrinsic
def _pause(typing: Any) -> Any:
    """Leave the core to its other hardware thread for a moment."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if cpu_features.X86:
            llvm.call(builder, "llvm.x86.sse2.pause", ir.VoidType(), [])
        elif cpu_features.ARM:
            llvm.call(builder, "llvm.aarch64.hint", ir.VoidType(), [ir.Constant(llvm.I32, 1)])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def _yield(typing: Any) -> Any:
    """Offer the core to another thread."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        llvm.call(builder, "SwitchToThread" if os.name == "nt" else "sched_yield", llvm.I32, [])
        return context.get_dummy_value()

    return types.void(), generate


@inline
def _spin(spins: Any) -> None:
    if spins < YIELD_LIMIT:
        _pause()
    else:
        _yield()


@kernel(types.intp(out(types.int64, 1), out(types.int64, 1), *[types.intp] * 4))
def run_shared(slots: Any, job: Any, function: Any, blocks: Any, stride: Any, items: Any) -> Any:
    """Share items 0 .. items - 1 of a job among this thread and the workers; return how many workers were parked.

    slots int64 (workers * SLOT_WORDS,), job int64 (job_words(threads),); thread k's arguments lie at
    blocks + k * stride. The job must not raise.
    """
    workers = slots.size // SLOT_WORDS
    threads = workers + 1
    job[_FUNCTION], job[_BLOCKS], job[_STRIDE], job[_ITEMS] = function, blocks, stride, items
    parked = 0
    for k in range(workers):
        job[_GIVEN + k] = _exchange(slots, k * SLOT_WORDS, IDLE, SUBMITTED)
        parked += 1 - job[_GIVEN + k]
    call(function, blocks, 0, items // threads)
    for k in range(workers):
        if not job[_GIVEN + k] or _exchange(slots, k * SLOT_WORDS, SUBMITTED, IDLE):
            call(function, blocks, items * (k + 1) // threads, items * (k + 2) // threads)
    for k in range(workers):
        spins = 0
        while _state(slots, k * SLOT_WORDS) == RUNNING:
            _spin(spins)
            spins += 1
    return parked


@kernel(types.void(out(types.int64, 1), out(types.int64, 1), types.intp))
def work(slots: Any, job: Any, number: Any) -> None:
    """Do worker `number`'s share of every job that `run_shared` submits, until none came for a while or STOP."""
    threads = slots.size // SLOT_WORDS + 1
    place = number * SLOT_WORDS
    spins = 0
    while spins < SPIN_LIMIT or not _exchange(slots, place, IDLE, PARKED):
        state: Any = _state(slots, place)
        if state == SUBMITTED and _exchange(slots, place, SUBMITTED, RUNNING):
            first = job[_ITEMS] * (number + 1) // threads
            last = job[_ITEMS] * (number + 2) // threads
            call(job[_FUNCTION], job[_BLOCKS] + (number + 1) * job[_STRIDE], first, last)
            _set_state(slots, place, IDLE)
            spins = 0
        elif state == STOP:
            _set_state(slots, place, PARKED)
            return
        else:
            _spin(spins)
            spins += 1


@kernel(types.void(out(types.int64, 1)))
def stop_workers(slots: Any) -> None:
    """Ask all idle workers to return to Python."""
    for place in range(0, slots.size, SLOT_WORDS):
        _exchange(slots, place, IDLE, STOP)


@functools.cache
def compile_all() -> None:
    """Compile (or load) the kernels of this file."""
    for one in (run_shared, work, stop_workers):
        one.compile()  # type: ignore[attr-defined]
