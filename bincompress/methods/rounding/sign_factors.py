"""Which two factors of ±1, with scales between and beside them, multiply to a matrix of given rank?

Two steps. First real factors near ±1 times rank-one magnitudes, by ADMM (as DBF, arXiv 2505.11076, and NanoQuant,
arXiv 2602.06694, begin). Then rounds of descent on the output error itself, with the whole Hessian: single signs of
one factor, its scales in closed form, then the other factor.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.quantize.sign_factors import flip_signs

Floats = NDArray[np.float32]

_ITERATIONS = 60  # of ADMM. Three times as many lower the error by 3% at three times the time
_PENALTY = (0.1, 1.0)  # share of a factor's mean square, at the first and the last iteration
# Of the Hessian's part off the diagonal in ADMM: all of it and none of it are 1% and 5% worse in the end.
_COUPLING = 0.5
_ROUNDS = 4  # of descent; the fifth gains less than 1 part in 200
_PASSES = 4  # over a row of signs
_STEP = 64  # columns whose signs are sought before the others hear of it
_DAMPING = 1e-4  # of the mean diagonal, where scales are solved for
_DIAGONAL = 0.01  # of the Hessian's mean diagonal: inputs that were hardly there still have weights
_NO_COUPLING = np.empty((0, 0), np.float32)


@dataclass
class SignFactors:
    """W ~ diag(row) left diag(middle) right^T diag(column)."""

    left: NDArray[np.int8]  # (rows, rank)
    right: NDArray[np.int8]  # (cols, rank)
    row: Floats
    middle: Floats
    column: Floats


def sign_factors(weights: Floats, hessian: Floats | None, rank: int) -> SignFactors:
    """Return the factors (see SignFactors) of weights (rows, cols).

    hessian: (cols, cols), what an error costs; None: every weight's costs the same. Matrix products are NumPy's, one
    thread's if the caller sees to it.
    """
    if hessian is not None:
        hessian = hessian + np.float32(_DIAGONAL * float(np.mean(np.diag(hessian)))) * np.eye(
            len(hessian), dtype=np.float32
        )
    greatest = float(np.max(np.abs(weights), initial=0.0)) or 1.0  # so that squares neither vanish nor overflow
    factors = _begin(weights / np.float32(greatest), hessian, rank)
    _descend(factors, weights / np.float32(greatest), hessian)
    factors.row = factors.row * np.float32(greatest)
    return factors


def _begin(weights: Floats, hessian: Floats | None, rank: int) -> SignFactors:
    """Return factors found by ADMM, in turns: a real factor for the other as it is, and the nearest of signs."""
    size = np.ones(weights.shape[1], np.float32)
    if hessian is not None:
        size = np.sqrt(np.diag(hessian)).astype(np.float32)
        size = np.where(size > 0, size, np.float32(1))
    scaled = weights * size
    left, right = _real_factors(scaled, rank)
    signed_left, signed_right = _signed(left)[0], _signed(right)[0]
    gap_left, gap_right = np.zeros_like(left), np.zeros_like(right)
    coupling = None if hessian is None else _shrunk(hessian, size)
    for iteration in range(_ITERATIONS):
        share = _PENALTY[0] + (_PENALTY[1] - _PENALTY[0]) * iteration / (_ITERATIONS - 1)
        felt = signed_right if coupling is None else coupling @ signed_right
        left = _ridge(signed_right.T @ felt, scaled @ felt, signed_left - gap_left, share)
        signed_left = _signed(left + gap_left)[0]
        gap_left += left - signed_left
        right = _ridge(signed_left.T @ signed_left, scaled.T @ signed_left, signed_right - gap_right, share)
        signed_right = _signed(right + gap_right)[0]
        gap_right += right - signed_right
    _, row, inner_left = _signed(signed_left)
    _, column, inner_right = _signed(signed_right)
    signs = [np.where(part >= 0, 1, -1).astype(np.int8) for part in (signed_left, signed_right)]
    return SignFactors(signs[0], signs[1], row, inner_left * inner_right, column / size)


def _real_factors(scaled: Floats, rank: int) -> tuple[Floats, Floats]:
    """Return real factors (rows, rank), (cols, rank) of the nearest matrix of this rank, turned at random.

    Turned, no component is much larger than another, and all can be ±1 times one size.
    """
    rows, cols = scaled.shape
    wide = scaled if rows <= cols else scaled.T
    values, vectors = np.linalg.eigh((wide @ wide.T).astype(np.float64))
    count = min(rank, len(values))
    kept = np.maximum(values[::-1][:count], 0.0)
    one: Any = vectors[:, ::-1][:, :count]
    other: Any = wide.T.astype(np.float64) @ one
    fourth = np.sqrt(np.sqrt(kept))
    # wide = one (one^T wide); both get the root of the singular values.
    other = np.divide(other, fourth, out=np.zeros_like(other), where=fourth > 1e-9 * max(float(fourth[0]), 1e-30))
    turn, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((rank, rank)))
    narrow, long = ((part @ turn[:count]).astype(np.float32) for part in (one * fourth, other))
    return (narrow, long) if rows <= cols else (long, narrow)


def _signed(factor: Floats) -> tuple[Floats, Floats, Floats]:
    """Return the nearest of a factor (n, rank) that is signs times magnitudes of rank one, and these magnitudes."""
    magnitudes = np.abs(factor)
    of_rows = magnitudes.mean(axis=1)
    for _ in range(2):
        of_ranks = magnitudes.T @ of_rows / max(float(of_rows @ of_rows), 1e-30)
        of_rows = magnitudes @ of_ranks / max(float(of_ranks @ of_ranks), 1e-30)
    return np.copysign(np.outer(of_rows, of_ranks), factor), of_rows, of_ranks


def _shrunk(hessian: Floats, size: Floats) -> Floats:
    coupling: Floats = np.float32(_COUPLING) * (hessian / np.outer(size, size))
    np.fill_diagonal(coupling, 1.0)
    return coupling


def _ridge(gram: Any, target: Any, near: Floats, share: float) -> Floats:
    """Return the least squares factor (n, rank) for normal equations, held near another one."""
    rank = len(gram)
    pull = np.float32(share * max(float(np.trace(gram)) / rank, 1e-30))
    found: Floats = np.linalg.solve(gram + pull * np.eye(rank, dtype=np.float32), (target + pull * near).T).T
    return np.ascontiguousarray(found)


def _descend(factors: SignFactors, weights: Floats, hessian: Floats | None) -> None:
    """Change signs and scales while that lowers the output error, for a few rounds."""
    felt = weights if hessian is None else weights @ hessian
    for _ in range(_ROUNDS):
        right = factors.right * factors.column[:, None]
        of_right, pull = right.T @ (right if hessian is None else hessian @ right), felt @ right
        gram, target = of_right * np.outer(factors.middle, factors.middle), pull * factors.middle
        slope = (factors.left * factors.row[:, None]) @ gram - target
        flip_signs(factors.left, factors.row, slope, gram, _NO_COUPLING, np.empty_like(slope), _PASSES)
        left = factors.left.astype(np.float32)
        lengths = np.einsum("ij,ij->i", left @ gram, left)
        factors.row = _divided(np.einsum("ij,ij->i", left, target), lengths, factors.row)
        left *= factors.row[:, None]
        of_left = left.T @ left
        factors.middle = _solved(of_left * of_right, np.einsum("ij,ij->j", left, pull), factors.middle)
        gram = of_left * np.outer(factors.middle, factors.middle)
        target = np.asarray((felt.T @ left) * factors.middle, np.float32)
        _flip_right(factors, gram, target, hessian)
        right = factors.right.astype(np.float32)
        pull_column = np.einsum("ij,ij->i", right, target)
        if hessian is None:
            lengths = np.einsum("ij,ij->i", right @ gram, right)
            factors.column = _divided(pull_column, lengths, factors.column)
        else:
            factors.column = _solved((right @ gram @ right.T) * hessian, pull_column, factors.column)


def _flip_right(factors: SignFactors, gram: Floats, target: Floats, hessian: Floats | None) -> None:
    """Change signs of the right factor, some columns at a time: with a Hessian they depend on each other."""
    scaled = (factors.right * factors.column[:, None]) @ gram
    slope = (scaled if hessian is None else hessian @ scaled) - target
    if hessian is None:
        flip_signs(factors.right, factors.column, slope, gram, _NO_COUPLING, np.empty_like(slope), _PASSES)
        return
    for first in range(0, len(slope), _STEP):
        part = slice(first, first + _STEP)
        changes = np.empty_like(slope[part])
        own = np.ascontiguousarray(hessian[part, part])
        flips = flip_signs(factors.right[part], factors.column[part], slope[part], gram, own, changes, _PASSES)
        if flips:
            slope[first + _STEP :] += hessian[first + _STEP :, part] @ changes


def _divided(pull: Floats, lengths: Floats, before: Floats) -> Floats:
    """Return least squares scales of single rows; a row that nothing depends on keeps the one that it had."""
    there = lengths > 0
    return np.where(there, pull / np.where(there, lengths, np.float32(1)), before).astype(np.float32)


def _solved(gram: Floats, pull: Floats, before: Floats) -> Floats:
    """Return scales that solve normal equations, slightly damped towards those that were there."""
    exact = gram.astype(np.float64)
    damping = _DAMPING * float(np.trace(exact)) / len(exact)
    if not damping > 0:
        return before
    exact[np.diag_indices_from(exact)] += damping
    return np.linalg.solve(exact, pull + damping * before.astype(np.float64)).astype(np.float32)
