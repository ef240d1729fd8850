"""Products of packed +-1 planes with quantized activations, shared among threads.

W[r, c] = offset[r, c // block] + sum over planes p of scale[p, r, c // block] * (+1 or -1), with bit i of word j of
a row's plane standing for column 64 j + i. Sums of integers are exact and equal for every kernel.

    matrix = prepack(planes, scale, block=128, cols=3072)
    with Workers(2) as pool:
        y = multiply(matrix, quantize(x), pool=pool)
"""

import threading
from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from cpu_kernels.jit import cpu_features
from cpu_kernels.jit.addresses import NATIVE_CALLS, address
from cpu_kernels.jit.compiler import Kernel, kernel, out, view
from cpu_kernels.matmul import stream as layout
from cpu_kernels.matmul import wide_lookup, wide_token
from cpu_kernels.matmul.activations import (
    QUANTIZING,
    Activations,
    Per,
    check_settings,
    empty_activations,
    quantize_tokens,
    quantizing,
)
from cpu_kernels.matmul.aligned_memory import aligned
from cpu_kernels.matmul.k_tile import table_bytes
from cpu_kernels.matmul.prepacking import PackedMatrix, choose
from cpu_kernels.matmul.product_kernel import FIELDS, product_kernel
from cpu_kernels.parallel import spin_wait
from cpu_kernels.parallel.workers import Pool, Workers, share

# Tokens that share one reading of the packed bits: their tables should stay in the second-level cache, and a k-tile's
# tables (512 bytes per token, 1024 with 8 bits) in the first.
TABLES_IN_CACHE = 512 * 1024
MOST_TOKENS = {6: 32, 8: 16}
FEWEST_TOKENS = 4
MOST_FEW = 16  # tokens whose activations are kept from one FewTokensProduct to the next


def product_kernels(bits: int = 8) -> list[Kernel]:
    """Return what multiply, quantize, threads and prepack compile, in this order.

    For the best kernel of this CPU, k-tiles of 128 columns and float16 scales: others are rare, and take 5 s more.
    """
    name, code = choose(None)
    pack = layout.packer(int(name == "lookup"), cpu_features.tile_rows(code))
    sharing: list[Any] = [_set_operands]  # how threads share a product
    if NATIVE_CALLS:
        sharing += [spin_wait.work, spin_wait.run_shared, spin_wait.stop_workers]
    if code == wide_lookup.CODE:
        sharing.append(wide_lookup.wide_kernel(2, 1))
    of_token = wide_token.token_kernel(2, 1) if wide_token.used(code) else product_kernel(code, bits, 2, 1)
    return [of_token, quantize_tokens, *sharing, pack]


def multiply(
    matrix: PackedMatrix, activations: Activations, out: NDArray[np.float32] | None = None, pool: Pool | None = None
) -> NDArray[np.float32]:
    """Return the products (n, rows) of a packed matrix with n quantized tokens: W times (q times its scale).

    `out` may be given (float32, C order); the rows are shared among the threads of `pool`.
    """
    if activations.cols != matrix.cols:
        raise ValueError(f"activations of {activations.cols} columns for a matrix of {matrix.cols}")
    tokens = activations.q.shape[0]
    if out is None:
        out = np.empty((tokens, matrix.rows), np.float32)
    elif out.shape != (tokens, matrix.rows):
        raise ValueError(f"out: {out.shape}; expected {(tokens, matrix.rows)}")
    if tokens >= wide_lookup.FEWEST and wide_lookup.fits(matrix):
        _multiply_wide(matrix, activations, out, pool)
        return out
    bits = activations.bits
    run = _token_kernel(matrix, bits)
    block = min(tokens, MOST_TOKENS[bits], max(FEWEST_TOKENS, TABLES_IN_CACHE // _table_bytes(matrix, bits)))
    operands = {**matrix.operands, **quantizing(activations, "token"), "result": out.ctypes.data}
    key = matrix.code, matrix.k_tile_words, wide_token.prepared_for(matrix)

    def work(first: int, last: int) -> None:
        shared = activations.prepared.get(key)
        scratch = shared or _scratch(matrix, bits, block)
        sums = _accumulators(matrix, block)
        own = {"accumulators": sums.ctypes.data, "prepared": int(shared is not None)}
        job = _job({**operands, **scratch.operands, **own})
        run(job.ctypes.data, first, last)
        if tokens <= block and shared is None:
            activations.prepared[key] = scratch

    if tokens <= block and key not in activations.prepared:
        # Few tokens: their tables are made once and serve every matrix with this input and all threads.
        work(0, 0)
    share(work, 0, matrix.tiles, pool)
    return out


def _multiply_wide(
    matrix: PackedMatrix, activations: Activations, out: NDArray[np.float32], pool: Pool | None
) -> None:  # fmt: skip
    operands = {**matrix.operands, **quantizing(activations, "token"), "result": out.ctypes.data}
    run = wide_lookup.wide_kernel(matrix.k_tile_words, matrix.half)
    if isinstance(pool, Workers):
        with pool.lock:  # as the threads' scratch is used
            jobs = np.stack(
                [_job({**operands, **_wide_scratch(pool.scratch, k, matrix).operands}) for k in range(pool.threads)]
            )
            pool.run_kernel(run, jobs.ctypes.data, jobs.strides[0], matrix.tiles)
        return

    def work(first: int, last: int) -> None:
        job = _job({**operands, **_wide_scratch(vars(_own), 0, matrix).operands})
        run(job.ctypes.data, first, last)

    share(work, 0, matrix.tiles, pool)


_own = threading.local()  # scratch of threads that have no Workers


def _wide_scratch(kept: dict[Any, Any], thread: int, matrix: PackedMatrix) -> wide_lookup.Scratch:
    """Return what a thread works in: new memory for each product would be new pages each time."""
    key = f"wide {thread} {matrix.k_tile_words}"
    if key not in kept:
        kept[key] = wide_lookup.Scratch(matrix.k_tile_words)
    found: wide_lookup.Scratch = kept[key]
    return found


class TokenProduct:
    """The product of a packed matrix with one token, quantized on the way, in one kernel call a thread.

    Every thread quantizes the token and makes its tables for itself, which takes less time than handing them over.
    For one caller at a time; what the kernel works in is kept with `workers`, and shared by their products.

    >>> times = TokenProduct(matrix, 8, "segment", workers)  # doctest: +SKIP
    >>> y = times(x)  # doctest: +SKIP
    """

    def __init__(self, matrix: PackedMatrix, bits: int, per: Per, workers: Workers) -> None:
        check_settings(bits, per)
        self.matrix = matrix
        self._workers = workers
        self.kernel = _token_kernel(matrix, bits)
        jobs = []
        for thread in range(workers.threads):
            # New arrays for each product would be new pages each time: 20 microseconds for 8192 columns.
            key = thread, matrix.cols, matrix.k_tile_words, matrix.code, bits, wide_token.prepared_for(matrix)
            if key not in workers.scratch:
                made = empty_activations(1, matrix.cols, bits), _scratch(matrix, bits, 1), _accumulators(matrix, 1)
                workers.scratch[key] = made
            activations, scratch, sums = workers.scratch[key]
            own = {**quantizing(activations, per), **scratch.operands, "accumulators": sums.ctypes.data}
            quantizer = address(quantize_tokens) if NATIVE_CALLS else 0
            jobs.append(_job({**matrix.operands, **own, "quantize": quantizer}))
        self.jobs = np.stack(jobs)  # int64 (threads, fields)
        self._address, self._step, self._tiles = self.jobs.ctypes.data, self.jobs.strides[0], matrix.tiles

    def __call__(self, x: NDArray[np.float32], out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Return the product (1, rows) with x (1, cols), C-contiguous; `out` may be given."""
        matrix = self.matrix
        if x.shape != (1, matrix.cols) or x.dtype != np.float32 or not x.flags.c_contiguous:
            raise ValueError(f"x: {x.dtype} {x.shape}; expected float32 {(1, matrix.cols)} in C order")
        result = np.empty((1, matrix.rows), np.float32) if out is None else out
        if result.shape != (1, matrix.rows):
            raise ValueError(f"out: {result.shape}; expected {(1, matrix.rows)}")
        _set_operands(self.jobs, x, result)
        run = self.kernel if NATIVE_CALLS else self._quantize_and_run
        self._workers.run_kernel(run, self._address, self._step, self._tiles)
        return result

    def _quantize_and_run(self, job: int, first: int, last: int) -> None:
        """Do from Python what the kernel does where it can call another one."""
        quantize_tokens(job + 8 * _QUANTIZING, 0, 1)
        self.kernel(job, first, last)


class FewTokensProduct:
    """The product of a packed matrix with 2 to MOST_FEW tokens, quantized on the way, in two kernel calls a thread.

    For one caller at a time; what the kernels work in is kept with `workers`, and shared by their products. For a
    matrix that `wide_lookup.fits`.

    >>> times = FewTokensProduct(matrix, 8, "segment", workers)  # doctest: +SKIP
    >>> y = times(x)  # doctest: +SKIP
    """

    def __init__(self, matrix: PackedMatrix, bits: int, per: Per, workers: Workers) -> None:
        check_settings(bits, per)
        self.matrix = matrix
        self._workers = workers
        self._kernel = wide_lookup.wide_kernel(matrix.k_tile_words, matrix.half)
        key = "few tokens", matrix.cols, bits
        if key not in workers.scratch:
            workers.scratch[key] = empty_activations(MOST_FEW, matrix.cols, bits)
        given = {**matrix.operands, **quantizing(workers.scratch[key], per)}
        scratch = [_wide_scratch(workers.scratch, thread, matrix) for thread in range(workers.threads)]
        self._jobs = np.stack([_job({**given, **own.operands}) for own in scratch])
        self._address, self._step, self._tiles = self._jobs.ctypes.data, self._jobs.strides[0], matrix.tiles

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the products (n, rows) with x (n, cols), C-contiguous."""
        matrix, tokens = self.matrix, len(x)
        if x.shape[1:] != (matrix.cols,) or x.dtype != np.float32 or not x.flags.c_contiguous or tokens > MOST_FEW:
            raise ValueError(f"x: {x.dtype} {x.shape}; expected float32 (1 to {MOST_FEW}, {matrix.cols}) in C order")
        result = np.empty((tokens, matrix.rows), np.float32)
        _set_operands(self._jobs, x, result)
        self._workers.run_kernel(quantize_tokens, self._address + 8 * _QUANTIZING, 0, tokens)
        self._workers.run_kernel(self._kernel, self._address, self._step, self._tiles)
        return result


_QUANTIZING = FIELDS.index(QUANTIZING[0])
_X, _RESULT, _TOKENS = FIELDS.index("x"), FIELDS.index("result"), FIELDS.index("tokens")


@kernel(types.void(out(types.int64, 2), view(types.float32, 2), out(types.float32, 2)))
def _set_operands(jobs: Any, x: Any, result: Any) -> None:
    """Write the tokens and addresses of x and of the result into jobs (n, fields): Python takes 2 us for each."""
    for k in range(jobs.shape[0]):
        jobs[k, _X] = x.ctypes.data
        jobs[k, _RESULT] = result.ctypes.data
        jobs[k, _TOKENS] = x.shape[0]


def _table_bytes(matrix: PackedMatrix, bits: int) -> int:
    """Return the bytes of one token's tables or bit slices."""
    return matrix.k_tiles * matrix.k_tile_words * table_bytes(matrix.code, bits)


def _job(operands: dict[str, int]) -> NDArray[np.int64]:
    """Return a job, int64 (fields,), in which what is not given is zero."""
    if unknown := operands.keys() - set(FIELDS):
        raise ValueError(f"a job has no fields {sorted(unknown)}")
    return np.array([operands.get(field, 0) for field in FIELDS], np.int64)


def _token_kernel(matrix: PackedMatrix, bits: int) -> Kernel:
    """Return the kernel that multiplies one token, or any number where the CPU has no kernel for several."""
    if wide_token.multiplies(matrix):
        return wide_token.token_kernel(matrix.k_tile_words, matrix.half)
    return product_kernel(matrix.code, bits, matrix.k_tile_words, matrix.half)


def _scratch(matrix: PackedMatrix, bits: int, tokens: int) -> "_Scratch | wide_token.Scratch":
    return wide_token.Scratch(matrix) if wide_token.multiplies(matrix) else _Scratch(matrix, bits, tokens)


def _accumulators(matrix: PackedMatrix, tokens: int) -> NDArray[np.uint8]:
    if wide_token.multiplies(matrix):
        return wide_token.accumulators()
    return aligned(4 * cpu_features.tile_rows(matrix.code) * tokens)


class _Scratch:
    """What a kernel prepares for blocks of `tokens` tokens; threads may share it once it is prepared."""

    def __init__(self, matrix: PackedMatrix, bits: int, tokens: int) -> None:
        places = matrix.k_tiles * tokens
        self.tokens = tokens
        self.tables = aligned(_table_bytes(matrix, bits) * tokens)
        self.constants = np.empty(places, np.int32)
        self.factors = np.empty(places, np.float32)
        self.offsets = np.empty(places, np.float32)
        self.headrooms = np.empty(places, np.int32)
        # What a job says about it. Not a cached property: before Python 3.12 these have one lock for all objects, which
        # an interrupt can leave held, and every other thread then waits for it forever.
        arrays = ("tables", "constants", "factors", "offsets", "headrooms")
        self.operands = {"token_block": tokens, **{name: getattr(self, name).ctypes.data for name in arrays}}
