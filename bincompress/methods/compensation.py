"""Error compensation and refinement: a matrix is rounded so that the layer's outputs move least on calibration data.

Columns are rounded in order and the error of each is spread over those to come (GPTQ, arXiv 2210.17323); then, in
rounds, the scales are fitted anew in closed form and single weights moved to the level that lowers the cost most. All
of it needs only H, the mean of x x^T over the layer's inputs x, and treats rows as independent.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bincompress.errors import TensorError
from bincompress.methods.forms import Form, Rounding, levels_of, values_of
from cpu_kernels.compensation import add_normal, flip_block, round_block

Floats = NDArray[np.float32]
# From the weights (rows, cols of a block) as compensated so far and the importance of each column: coefficients
# (rows, coefs) and each column's own bits (cols).
Start = Callable[[Floats, NDArray[np.float64]], tuple[NDArray[np.float64], NDArray[np.uint8]]]

_DAMPING = 0.01  # of the mean of H's diagonal, as GPTQ has it
_MOST_DAMPING = 1e3
_STEP = 128  # columns whose errors wait for one matrix product; also a stretch that stays in the first-level cache
_PASSES = 3  # over the columns of such a stretch before the others hear of its moves
_CHUNK_BYTES = 256 << 20
_MOST_ROWS = 1024  # of a chunk; fixed by the shape alone, so that the same matrix gives the same bytes everywhere
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
            lower = np.linalg.cholesky(damped[::-1, ::-1])
            factor = np.linalg.inv(lower)[::-1, ::-1]
        except np.linalg.LinAlgError:
            damping *= 10
            continue
        if np.isfinite(factor).all():
            return Curvature(exact.astype(np.float32), np.ascontiguousarray(np.triu(factor), np.float32), damping)
        damping *= 10
    raise TensorError(f"{name}: its Hessian cannot be factorised even with {damping:g} times its mean added")


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
        before += state.cost
        size += state.size
        rounds = max(rounds, _refine(state, rounding, refine))
        after += state.cost
        codes[chunk], coef[chunk] = state.codes, state.coef
    share = 1.0 / size if size > 0 else 0.0
    return Rounded(codes, coef, column_bits, before * share, after * share, size, rounds)


def _chunk_rows(coefs: int, blocks: int, cols: int) -> int:
    return int(np.clip(_CHUNK_BYTES // max(4 * coefs * cols, 8 * (blocks * coefs) ** 2), 16, _MOST_ROWS))


class _State:
    """Some rows on their way: codes, coefficients, the rounded weights q, and the gradient (w - q) H."""

    def __init__(
        self, weights: Floats, hessian: Floats, form: Form, block: int, codes: NDArray[np.uint8], coef: Floats,
        column_bits: NDArray[np.uint8],
    ) -> None:  # fmt: skip
        self.weights, self.hessian, self.form, self.block = weights, hessian, form, block
        self.codes, self.coef, self.column_bits = codes.copy(), coef.copy(), column_bits
        self.pulled = weights @ hessian
        self.values = values_of(form, self.codes, self.coef, block)
        self.gradient = self.pulled - self.values @ hessian

    @property
    def size(self) -> float:
        return float(np.sum(self.weights * self.pulled, dtype=np.float64))

    @property
    def costs(self) -> NDArray[np.float64]:
        """What each row's error costs."""
        costs: NDArray[np.float64] = np.einsum("rc,rc->r", self.weights - self.values, self.gradient, dtype=np.float64)
        return costs

    @property
    def cost(self) -> float:
        return float(self.costs.sum())

    def starts(self) -> range:
        return range(0, self.weights.shape[1], self.block)


def _refine(state: _State, rounding: Rounding, rounds: int) -> int:
    """Refit scales and move weights in turn; returns the rounds made."""
    cost = state.cost
    for done in range(rounds):
        _refit(state, rounding)
        moves = _flip(state)
        before, cost = cost, state.cost
        if moves == 0 or before - cost <= _ENOUGH * before:
            return done + 1
    return rounds


def _refit(state: _State, rounding: Rounding) -> None:
    """Solve for the scales of every row, given its planes: least squares under H; kept where it costs less."""
    coefs, block, rows = state.form.coefs, state.block, len(state.weights)
    blocks = len(state.starts())
    signs = np.ascontiguousarray(np.moveaxis(state.form.features[state.codes], -1, 0))
    normal = np.zeros((rows, blocks * coefs, blocks * coefs))
    wanted = np.empty((rows, blocks * coefs))
    for unit, first in enumerate(state.starts()):
        own = slice(first, min(signs.shape[2], first + block))
        products = np.matmul(signs[:, :, own], state.hessian[own, first:])
        add_normal(products, np.ascontiguousarray(signs[:, :, first:]), block, unit, normal)
        pulled = np.einsum("krc,rc->rk", signs[:, :, own], state.pulled[:, own], dtype=np.float64)
        wanted[:, unit * coefs : (unit + 1) * coefs] = pulled
    upper = np.triu_indices(blocks * coefs, 1)
    normal[:, upper[1], upper[0]] = normal[:, upper[0], upper[1]]
    diagonal = np.einsum("rii->ri", normal)
    diagonal += _RIDGE * diagonal.mean(axis=1, keepdims=True) + np.finfo(np.float64).tiny
    solved = np.linalg.solve(normal, wanted[:, :, None])[:, :, 0].reshape(rows, blocks, coefs)
    codes = state.codes
    if rounding.bits == 8:
        codes = _turned(state, solved < 0)
        solved = np.abs(solved)
    coef = rounding(solved.astype(np.float64))
    values = values_of(state.form, codes, coef, block)
    gradient = state.pulled - values @ state.hessian
    better = np.einsum("rc,rc->r", state.weights - values, gradient, dtype=np.float64) < state.costs
    for old, new in ((state.codes, codes), (state.coef, coef), (state.values, values), (state.gradient, gradient)):
        if old is not new:
            old[better] = new[better]


def _turned(state: _State, negative: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Return codes with the planes turned whose scales came out negative, negative (rows, blocks, planes)."""
    codes = state.codes.copy()
    masks = (negative.astype(np.uint8) << np.arange(state.form.planes, dtype=np.uint8)).sum(axis=2, dtype=np.uint8)
    for unit, first in enumerate(state.starts()):
        codes[:, first : first + state.block] ^= masks[:, unit, None]
    return codes


def _flip(state: _State) -> int:
    """Go over the columns once, moving weights to better levels; returns how many moved."""
    moves = 0
    for unit, first in enumerate(state.starts()):
        levels = levels_of(state.form, state.coef[:, unit])
        last = min(state.weights.shape[1], first + state.block)
        for begin in range(first, last, _STEP):
            part = slice(begin, min(last, begin + _STEP))
            gradient = np.ascontiguousarray(state.gradient[:, part])
            codes = np.ascontiguousarray(state.codes[:, part])
            change = np.empty(gradient.shape, np.float32)
            hessian = np.ascontiguousarray(state.hessian[part, part])
            moved = flip_block(
                gradient, hessian, levels, state.column_bits[part], state.form.planes, _PASSES, codes, change
            )
            if moved:
                moves += moved
                state.codes[:, part] = codes
                state.values[:, part] += change
                state.gradient -= change @ state.hessian[part]
    return moves
