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

from bincompress.errors import TensorError
from bincompress.methods.forms import Form, Rounding, levels_of, values_of
from cpu_kernels.compensation import add_normal, dot_blocks, flip_block, look_up, round_block

Floats = NDArray[np.float32]
# From the weights (rows, cols of a block) as compensated so far and the importance of each column: coefficients
# (rows, coefs) and each column's own bits (cols).
Start = Callable[[Floats, NDArray[np.float64]], tuple[NDArray[np.float64], NDArray[np.uint8]]]

_DAMPING = 0.01  # of the mean of H's diagonal, as GPTQ has it
_MOST_DAMPING = 1e3
_STEP = 128  # columns whose errors wait for one matrix product; also a stretch that stays in the first-level cache
_STRETCH = 512  # columns whose gradient one matrix product brings up to date: BLAS is a quarter slower with fewer
_PASSES = 3  # over the columns of such a stretch before the others hear of its moves
_CHUNK_BYTES = 256 << 20
_MOST_ROWS = 4096  # of a chunk; fixed by the shape alone, so that the same matrix gives the same bytes everywhere
_RIDGE = 1e-6  # of the normal equations' mean diagonal
_ENOUGH = 1e-4  # a round that lowers the cost by a smaller share is the last


@dataclass(frozen=True)
class Curvature:
    """What an error costs: H damped, float32 (cols, cols), and the upper factor U with H^-1 = U^T U."""

    hessian: Floats
    factor: Floats
    damping: float  # share of the mean diagonal that was added

    @property
    def importance(self) -> NDArray[np.float64]:
        """What rounding each column costs when the later ones make up for it, (cols,)."""
        return 1.0 / np.diag(self.factor).astype(np.float64) ** 2

    def scaled(self, scale: Floats) -> "Curvature":
        """Return what errors cost where the columns are multiplied by a scale (cols) and the inputs divided by it."""
        return Curvature(self.hessian / np.outer(scale, scale), self.factor * scale, self.damping)


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


def curvature(hessian: Floats, name: str = "") -> Curvature:
    """Damp and factorise H (cols, cols); the damping is raised tenfold until the factorisation succeeds.

    Raises TensorError where H is not finite or no damping helps.
    """
    exact = hessian.astype(np.float64)
    mean = float(np.trace(exact)) / len(exact)
    if not np.isfinite(exact).all() or mean < 0:
        raise TensorError(f"{name}: its Hessian is not that of any inputs (not finite or negative); calibrate again")
    mean = mean or 1.0  # inputs that are all zero: every rounding costs the same
    damping = _DAMPING
    while damping < _MOST_DAMPING:
        damped = exact.copy()
        damped[np.diag_indices_from(damped)] += damping * mean
        try:
            # Reversed, the lower factor of H becomes the upper one of its inverse.
            # The factorisation needs float64; its inverse, well conditioned by then, is kept in float32 anyway.
            lower = np.linalg.cholesky(damped[::-1, ::-1]).astype(np.float32)
            factor = _inverse(lower)[::-1, ::-1]
        except np.linalg.LinAlgError:
            damping *= 10
            continue
        if np.isfinite(factor).all():
            return Curvature(exact.astype(np.float32), np.ascontiguousarray(np.triu(factor), np.float32), damping)
        damping *= 10
    raise TensorError(f"{name}: its Hessian cannot be factorised even with {damping:g} times its mean added")


def _inverse(lower: Floats) -> Floats:
    """Return the inverse of a lower triangle, by halves: a sixth of the work that a general inverse takes."""
    size = len(lower)
    if size <= _STEP:
        return np.tril(np.linalg.inv(lower))
    half = size // 2
    found = np.zeros_like(lower)
    found[:half, :half] = _inverse(lower[:half, :half])
    found[half:, half:] = _inverse(lower[half:, half:])
    found[half:, :half] = -found[half:, half:] @ (lower[half:, :half] @ found[:half, :half])
    return found


def compensate(
    weights: Floats, inputs: Curvature, form: Form, block: int, start: Start, rounding: Rounding, refine: int
) -> Rounded:
    """Round weights (rows, cols) to levels of `form` with error compensation and up to `refine` rounds of refinement.

    block: columns per set of coefficients. Source: GPTQ algorithm 1 with scales found block by block; refinement after
    papers 2 and 3's shared need, see the README's "Calibrated binarization".
    """
    rows, cols = weights.shape
    blocks = -(-cols // block)
    codes = np.empty((rows, cols), np.uint8)
    coef = np.empty((rows, blocks, form.coefs), np.float32)
    column_bits = np.zeros(cols, np.uint8)
    working = weights.copy()
    for unit, first in enumerate(range(0, cols, block)):
        last = min(cols, first + block)
        found, column_bits[first:last] = start(working[:, first:last], inputs.importance[first:last])
        coef[:, unit] = rounding(found)
        levels = levels_of(form, coef[:, unit])
        for begin in range(first, last, _STEP):
            part = slice(begin, min(last, begin + _STEP))
            columns = np.ascontiguousarray(working[:, part])
            chosen, errors = np.empty(columns.shape, np.uint8), np.empty(columns.shape, np.float32)
            factor = np.ascontiguousarray(inputs.factor[part, part])
            round_block(columns, factor, levels, column_bits[part], form.planes, chosen, errors)
            codes[:, part] = chosen
            working[:, part.stop :] -= errors @ inputs.factor[part, part.stop :]
    del working
    before = after = size = 0.0
    rounds = 0
    step = _chunk_rows(form.coefs, blocks, cols)
    for row in range(0, rows, step):
        chunk = slice(row, row + step)
        state = _State(weights[chunk], inputs.hessian, form, block, codes[chunk], coef[chunk], column_bits)
        done = _refine(state, rounding, refine)
        before, after, size = before + done.before, after + done.after, size + state.size
        rounds = max(rounds, done.rounds)
        codes[chunk], coef[chunk] = state.codes, state.coef
    share = 1.0 / size if size > 0 else 0.0
    return Rounded(codes, coef, column_bits, before * share, after * share, size, rounds)


def _chunk_rows(coefs: int, blocks: int, cols: int) -> int:
    return int(np.clip(_CHUNK_BYTES // max(4 * coefs * cols, 8 * (blocks * coefs) ** 2), 16, _MOST_ROWS))


class _State:
    """Some rows on their way: codes and coefficients, and w H, which pulls at the rounded weights."""

    def __init__(
        self, weights: Floats, hessian: Floats, form: Form, block: int, codes: NDArray[np.uint8], coef: Floats,
        column_bits: NDArray[np.uint8],
    ) -> None:  # fmt: skip
        self.weights, self.hessian, self.form, self.block = weights, hessian, form, block
        self.codes, self.coef, self.column_bits = codes.copy(), coef.copy(), column_bits
        self.pulled = weights @ hessian

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
        return values_of(self.form, self.codes, self.coef, self.block)

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
        cost = after - _flip(state)
        if before - cost <= _ENOUGH * before:
            return _Refined(first, cost, done)
    return _Refined(first, cost, rounds)


def _refit(state: _State, rounding: Rounding) -> tuple[float, float]:
    """Solve for the scales of every row, given its planes: least squares under H; kept where it costs less.

    Returns the cost before and after, which the normal equations tell.
    """
    coefs, rows = state.form.coefs, len(state.weights)
    blocks = len(state.starts())
    normal, wanted = _normal_equations(state)

    def costs(coef: NDArray[Any]) -> NDArray[np.float64]:
        flat = coef.reshape(rows, -1).astype(np.float64)
        quadratic = np.einsum("ri,ri->r", np.matmul(normal, flat[:, :, None])[:, :, 0], flat)
        found: NDArray[np.float64] = state.sizes + quadratic - 2 * np.einsum("ri,ri->r", flat, wanted)
        return found

    before = costs(state.coef)
    diagonal = np.einsum("rii->ri", normal)
    diagonal += _RIDGE * diagonal.mean(axis=1, keepdims=True) + np.finfo(np.float64).tiny
    solved = np.linalg.solve(normal, wanted[:, :, None])[:, :, 0].reshape(rows, blocks, coefs)
    codes, coef, signed = state.codes, rounding(solved.astype(np.float64)), None
    if rounding.bits == 8:
        codes, coef = _turned(state, solved < 0), rounding(np.abs(solved).astype(np.float64))
        signed = np.where(solved < 0, -coef, coef)
    after = costs(coef if signed is None else signed)
    better = after < before
    state.codes[better], state.coef[better] = codes[better], coef[better]
    return float(before.sum()), float(np.where(better, after, before).sum())


def _normal_equations(state: _State) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the matrices (rows, m, m) and right sides (rows, m) of all m scales of each row."""
    coefs, rows, cols = state.form.coefs, *state.weights.shape
    blocks = len(state.starts())
    signs = np.empty((coefs, rows, cols), np.float32)
    for own, feature in zip(signs, np.ascontiguousarray(state.form.features.T), strict=True):
        look_up(state.codes, feature[None], 0, cols, own)
    normal = np.zeros((rows, blocks * coefs, blocks * coefs))
    wanted = np.empty((rows, blocks * coefs))
    scratch = np.empty(coefs * rows * cols, np.float32)  # new memory for every product would cost as much as it
    for unit, first in enumerate(state.starts()):
        block = slice(first, min(cols, first + state.block))
        products = scratch[: coefs * rows * (cols - first)].reshape(coefs, rows, cols - first)
        np.matmul(signs[:, :, block], state.hessian[block, first:], out=products)
        add_normal(products, signs, state.block, first, normal)
        here = slice(unit * coefs, (unit + 1) * coefs)
        normal[:, here, here] *= 0.5  # both halves of it are there already
    dot_blocks(signs, state.pulled, state.block, wanted)
    return normal + normal.transpose(0, 2, 1), wanted


def _turned(state: _State, negative: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Return codes with the planes turned whose scales came out negative, negative (rows, blocks, planes)."""
    codes = state.codes.copy()
    masks = (negative.astype(np.uint8) << np.arange(state.form.planes, dtype=np.uint8)).sum(axis=2, dtype=np.uint8)
    for unit, first in enumerate(state.starts()):
        codes[:, first : first + state.block] ^= masks[:, unit, None]
    return codes


def _flip(state: _State) -> float:
    """Go over the columns once, moving weights to better levels; returns how much less they cost."""
    gained = 0.0
    values, cols = state.values, state.weights.shape[1]
    for begin in range(0, cols, _STRETCH):
        # Only this stretch's gradient, with all moves so far in it: one matrix product for a whole pass.
        stretch = slice(begin, min(cols, begin + _STRETCH))
        gradient = state.pulled[:, stretch] - values @ state.hessian[stretch].T
        for first in range(begin, stretch.stop, min(_STEP, state.block)):
            part = slice(first, min(stretch.stop, first + min(_STEP, state.block)))
            here = slice(first - begin, part.stop - begin)
            codes, pulls = np.ascontiguousarray(state.codes[:, part]), np.ascontiguousarray(gradient[:, here])
            change = np.empty(pulls.shape, np.float32)
            levels = levels_of(state.form, state.coef[:, first // state.block])
            hessian = np.ascontiguousarray(state.hessian[part, part])
            gained += flip_block(
                pulls, hessian, levels, state.column_bits[part], state.form.planes, _PASSES, codes, change
            )
            state.codes[:, part] = codes
            values[:, part] += change
            gradient[:, here.stop :] -= change @ state.hessian[part, part.stop : stretch.stop]
    return gained
