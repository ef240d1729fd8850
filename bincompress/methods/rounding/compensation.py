"""Error compensation and refinement: a matrix is rounded so that the layer's outputs move least on calibration data.

Columns are rounded in order and the error of each is spread over those to come (GPTQ, arXiv 2210.17323); then, in
rounds, the scales are fitted anew in closed form and single weights moved to the level that lowers the cost most. All
of it needs only H, the mean of x x^T over the layer's inputs x, and treats rows as independent.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bincompress.methods.rounding.codebook import Codebook, Rounding, levels_of, values_of
from bincompress.methods.rounding.curvature import Curvature
from cpu_kernels.quantize.compensation import move_weights, normal_equations, round_block, solve_each, spread

Floats = NDArray[np.float32]
# From the weights (rows, cols of a block) as compensated so far and the importance of each column: coefficients
# (rows, coefs) and each column's own bits (cols).
Start = Callable[[Floats, NDArray[np.float64]], tuple[NDArray[np.float64], NDArray[np.uint8]]]

_STEP = 128  # columns whose errors wait for one matrix product; also a stretch that stays in the first-level cache
_STRETCH = 512  # columns that one matrix product frees of the errors before them: BLAS is a quarter slower with fewer
_PASSES = 3  # over the columns of a step before the others hear of its moves
_CHUNK_BYTES = 256 << 20  # fewer rows at once would make slower matrix products
_MOST_ROWS = 4096  # of a chunk; fixed by the shape alone, so that the same matrix gives the same bytes everywhere
_RIDGE = 1e-6  # of the normal equations' mean diagonal
_MANY = 256  # unknowns of a system from which on LAPACK is as fast; with 48 it takes 2.5 times as long
_ENOUGH = 1e-4  # a round that lowers the cost by a smaller share is the last


@dataclass(frozen=True)
class Rounded:
    """A matrix as codes and coefficients, with what it costs."""

    codes: NDArray[np.uint8]  # (rows, cols), a column's own bits included
    coef: Floats  # (rows, blocks, coefs)
    column_bits: NDArray[np.uint8]  # (cols,)
    compensated: float  # cost, relative to the outputs' own size, before refinement
    cost: float  # the same at the end
    size: float  # of the outputs: the sum of w H w^T over rows
    rounds: int  # of refinement that were made


def compensate(
    weights: Floats, inputs: Curvature, codebook: Codebook, block: int, start: Start, rounding: Rounding, refine: int
) -> Rounded:
    """Round weights (rows, cols) with error compensation and up to `refine` rounds of refinement.

    block: columns per set of coefficients. Source: GPTQ (arXiv 2210.17323), algorithm 1, with scales found block by
    block; the refinement alternates least squares for the scales and coordinate descent over the weights.
    """
    rows, cols = weights.shape
    blocks = -(-cols // block)
    codes = np.empty((rows, cols), np.uint8)
    coef = np.empty((rows, blocks, codebook.coefs), np.float32)
    column_bits = np.zeros(cols, np.uint8)
    working = weights.copy()  # and, in columns that are rounded, their errors
    stretch = block * max(1, _STRETCH // block)
    for unit, first in enumerate(range(0, cols, block)):
        last = min(cols, first + block)
        if first % stretch == 0:
            after = min(cols, first + stretch)
            working[:, first:after] -= working[:, :first] @ inputs.factor[:first, first:after]
        found, column_bits[first:last] = start(working[:, first:last], inputs.importance[first:last])
        coef[:, unit] = rounding(found)
        levels = levels_of(codebook, coef[:, unit])
        for begin in range(first, last, _STEP):
            part = slice(begin, min(last, begin + _STEP))
            columns = np.ascontiguousarray(working[:, part])
            chosen, errors = np.empty(columns.shape, np.uint8), np.empty(columns.shape, np.float32)
            factor = np.ascontiguousarray(inputs.factor[part, part])
            round_block(columns, factor, levels, column_bits[part], codebook.planes, chosen, errors)
            codes[:, part], working[:, part] = chosen, errors
            working[:, part.stop : after] -= errors @ inputs.factor[part, part.stop : after]
    del working
    before = cost = size = 0.0
    rounds = 0
    step = min(rows, _chunk_rows(codebook.coefs, blocks, cols) if refine else _MOST_ROWS)
    room = np.empty(step * blocks * codebook.coefs * cols if refine else 0, np.float32)
    for row in range(0, rows, step):
        chunk = slice(row, row + step)
        state = _State(weights[chunk], inputs.hessian, codebook, block, codes[chunk], coef[chunk], column_bits, room)
        done = _refine(state, rounding, refine)
        before, cost, size = before + done.before, cost + done.after, size + state.size
        rounds = max(rounds, done.rounds)
        codes[chunk], coef[chunk] = state.codes, state.coef
    share = 1.0 / size if size > 0 else 0.0
    return Rounded(codes, coef, column_bits, before * share, cost * share, size, rounds)


def _chunk_rows(coefs: int, blocks: int, cols: int) -> int:
    return int(np.clip(_CHUNK_BYTES // (4 * blocks * coefs * (cols + 2 * blocks * coefs)), 16, _MOST_ROWS))


class _State:
    """Some rows on their way: codes and coefficients, and w H, which pulls at the rounded weights."""

    def __init__(
        self, weights: Floats, hessian: Floats, codebook: Codebook, block: int, codes: NDArray[np.uint8], coef: Floats,
        column_bits: NDArray[np.uint8], room: Floats,
    ) -> None:  # fmt: skip
        self.weights, self.hessian, self.codebook, self.block = weights, hessian, codebook, block
        self.codes, self.coef, self.column_bits = codes.copy(), coef.copy(), column_bits
        self.room = room
        self.pulled = weights @ hessian

    @cached_property
    def products(self) -> Floats:
        """What the features of each block's codes come to times H, (blocks, rows, coefs, cols).

        Found once and kept up to date: a round changes a few codes in a hundred, and both the scales' equations and,
        after a refit, the gradient follow from these without another product with all of H.
        """
        coefs, rows, cols = self.codebook.coefs, *self.codes.shape
        shape = len(self.starts()), rows, coefs, cols
        found = self.room[: np.prod(shape)].reshape(shape)
        for product, first in zip(found, self.starts(), strict=True):
            last = min(cols, first + self.block)
            signs = np.empty((rows, coefs, last - first), np.float32)
            spread(self.codes, self.codebook.features, first, last, signs)
            np.matmul(signs.reshape(rows * coefs, -1), self.hessian[first:last], out=product.reshape(-1, cols))
        return found

    @cached_property
    def equations(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Least squares for all m scales of each row: the matrices (rows, m, m) and right sides (rows, m)."""
        rows, coefs = len(self.weights), len(self.starts()) * self.codebook.coefs
        normal, wanted = np.empty((rows, coefs, coefs)), np.empty((rows, coefs))
        normal_equations(self.products, self.pulled, self.codes, self.codebook.features, self.block, normal, wanted)
        return normal, wanted

    @cached_property
    def sizes(self) -> NDArray[np.float64]:
        """What each row's outputs amount to."""
        sizes: NDArray[np.float64] = np.einsum("rc,rc->r", self.weights, self.pulled, dtype=np.float64)
        return sizes

    @property
    def size(self) -> float:
        return float(self.sizes.sum())

    @property
    def values(self) -> Floats:
        """The rounded weights."""
        return values_of(self.codebook, self.codes, self.coef, self.block)

    def starts(self) -> range:
        return range(0, self.weights.shape[1], self.block)


@dataclass(frozen=True)
class _Refined:
    before: float  # cost
    after: float
    rounds: int


def _refine(state: _State, rounding: Rounding, rounds: int) -> _Refined:
    """Refit scales and move weights in turn; returns the rounds made and what they gained."""
    if not rounds:
        error = state.weights - state.values
        cost = float(np.einsum("rc,rc->", error, error @ state.hessian, dtype=np.float64))
        return _Refined(cost, cost, 0)
    first = cost = 0.0
    for done in range(1, rounds + 1):
        before, after = _refit(state, rounding)
        if done == 1:
            first = before
        cost = after - _flip(state, done < rounds)
        if before - cost <= _ENOUGH * before:
            return _Refined(first, cost, done)
    return _Refined(first, cost, rounds)


def _refit(state: _State, rounding: Rounding) -> tuple[float, float]:
    """Solve for the scales of every row, given its planes: least squares under H; kept where it costs less.

    Returns the cost before and after, which the normal equations tell.
    """
    coefs, rows = state.codebook.coefs, len(state.weights)
    blocks = len(state.starts())
    normal, wanted = state.equations

    def costs(coef: NDArray[Any]) -> NDArray[np.float64]:
        flat = coef.reshape(rows, -1).astype(np.float64)
        quadratic = np.einsum("ri,ri->r", np.matmul(normal, flat[:, :, None])[:, :, 0], flat)
        found: NDArray[np.float64] = state.sizes + quadratic - 2 * np.einsum("ri,ri->r", flat, wanted)
        return found

    before = costs(state.coef)
    diagonal = np.einsum("rii->ri", normal)
    diagonal += _RIDGE * diagonal.mean(axis=1, keepdims=True) + np.finfo(np.float64).tiny
    solved = _solve(normal, wanted).reshape(rows, blocks, coefs)
    turned = (solved < 0) & (rounding.bits == 8)  # these are stored without signs, which go into the planes
    coef = rounding(np.where(turned, -solved, solved))
    after = costs(np.where(turned, -coef, coef))
    better = after < before
    state.coef[better] = coef[better]
    _turn(state, turned & better[:, None, None])
    return float(before.sum()), float(np.where(better, after, before).sum())


def _solve(matrices: NDArray[np.float64], vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    solutions = np.empty_like(vectors)
    if vectors.shape[1] > _MANY:
        solutions[:] = np.linalg.solve(matrices, vectors[:, :, None])[:, :, 0]
    else:
        solve_each(matrices, vectors, solutions)
    return solutions


def _turn(state: _State, turned: NDArray[np.bool_]) -> None:
    """Turn planes, turned (rows, blocks, planes), and their products with them."""
    for unit, first in enumerate(state.starts()):
        if turned[:, unit].any():
            masks = (turned[:, unit] << np.arange(turned.shape[2], dtype=np.uint8)).sum(axis=1, dtype=np.uint8)
            state.codes[:, first : first + state.block] ^= masks[:, None]
            state.products[unit][turned[:, unit]] *= -1


def _flip(state: _State, more: bool) -> float:
    """Go over the columns once, moving weights to better levels; returns how much less they cost."""
    levels = np.stack([levels_of(state.codebook, coef) for coef in state.coef.transpose(1, 0, 2)], axis=1)
    gained: float = move_weights(
        state.products, state.pulled, state.hessian, state.coef, levels, state.codebook.features, state.column_bits,
        state.codebook.planes, state.block, min(_STEP, state.block), _PASSES, more, state.codes,
        *state.equations,
    )  # fmt: skip
    return gained
