"""What the kernels of error compensation mean: their NumPy twins, one weight at a time."""

import itertools

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]


def _nearest(levels: Floats, column_class: int, planes: int, target: np.float32) -> int:
    """Return the code whose level is nearest, the lesser level of two as near."""
    first = column_class << planes
    order = first + np.argsort(levels[first : first + (1 << planes)], kind="stable")
    middles = np.float32(0.5) * (levels[order[:-1]] + levels[order[1:]])
    return int(order[np.count_nonzero(target > middles)])


def round_block(weights: Floats, factor: Floats, levels: Floats, classes: Codes, planes: int) -> tuple[Codes, Floats]:
    """Return the codes and errors of `compensation.round_block`, uint8 and float32 (rows, cols)."""
    left = weights.copy()
    codes, errors = np.empty(weights.shape, np.uint8), np.empty_like(weights)
    for row, col in itertools.product(*map(range, weights.shape)):
        code = _nearest(levels[row], int(classes[col]), planes, left[row, col])
        error = (left[row, col] - levels[row, code]) / factor[col, col]
        codes[row, col], errors[row, col] = code, error
        left[row, col + 1 :] -= error * factor[col, col + 1 :]
    return codes, errors


def move_weights(
    pulled: Floats, hessian: Floats, levels: Floats, classes: Codes, planes: int, block: int, step: int, passes: int,
    codes: Codes,
) -> tuple[Codes, float]:  # fmt: skip
    """Return the codes after `compensation.move_weights` and how much less they cost."""
    codes, gained = codes.copy(), 0.0
    blocks = np.arange(codes.shape[1]) // block
    for row, first in itertools.product(range(len(codes)), range(0, codes.shape[1], block)):
        level = levels[row, first // block]
        for begin in range(first, min(first + block, codes.shape[1]), step):
            part = np.arange(begin, min(first + block, codes.shape[1], begin + step))
            values = levels[row, blocks, codes[row]]
            gradient = (pulled[row] - values @ hessian)[part]
            for _ in range(passes):
                moved = False
                for place, col in enumerate(part):
                    now = level[codes[row, col]]
                    target = now + gradient[place] * (np.float32(1.0) / hessian[col, col])
                    code = _nearest(level, int(classes[col]), planes, target)
                    if abs(target - level[code]) >= abs(target - now) * np.float32(1.0 - 1e-6):
                        continue
                    change = level[code] - now
                    codes[row, col] = code
                    gained += float(change) * (2.0 * float(gradient[place]) - float(change) * float(hessian[col, col]))
                    gradient -= change * hessian[col, part]
                    moved = True
                if not moved:
                    break
    return codes, gained


def look_up(codes: Codes, levels: Floats) -> Floats:
    """Return what `compensation.look_up` writes for all columns."""
    return np.take_along_axis(np.broadcast_to(levels, (len(codes), levels.shape[1])), codes.astype(np.intp), axis=1)


def spread(codes: Codes, features: Floats) -> Floats:
    """Return what `compensation.spread` writes for all columns, (rows, coefs, cols)."""
    return np.ascontiguousarray(features[codes].transpose(0, 2, 1))


def products(codes: Codes, features: Floats, hessian: Floats, block: int) -> Floats:
    """Return what the features of each block's codes come to times H, (blocks, rows, coefs, cols)."""
    starts = range(0, codes.shape[1], block)
    return np.stack([spread(codes[:, i : i + block], features) @ hessian[i : i + block] for i in starts])


def normal_equations(
    pulled: Floats, hessian: Floats, codes: Codes, features: Floats, block: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return what `compensation.normal_equations` writes, (rows, m, m) and (rows, m), m coefficients of all blocks."""
    blocks = np.arange(codes.shape[1]) // block
    owns = blocks == np.arange(blocks[-1] + 1)[:, None]
    # Each coefficient's own feature in its block, nothing elsewhere.
    apart = np.einsum("uc,rkc->rukc", owns, spread(codes, features).astype(np.float64))
    apart = apart.reshape(len(codes), -1, codes.shape[1])
    return apart @ hessian @ apart.transpose(0, 2, 1), np.einsum("rmc,rc->rm", apart, pulled)


def split_two(weights: Floats, importance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the two means of `compensation.split_two`, (rows, 2), by trying every split."""
    found = np.empty((len(weights), 2))
    for row, magnitudes in enumerate(np.abs(weights.astype(np.float64))):
        order = np.argsort(magnitudes, kind="stable")
        values, weight = magnitudes[order], importance[order]
        best = np.inf
        found[row] = np.average(values, weights=weight)
        for split in range(1, values.size):
            means = [
                np.average(v, weights=w)
                for v, w in ((values[:split], weight[:split]), (values[split:], weight[split:]))
            ]
            fitted = np.where(np.arange(values.size) < split, *means)
            error = float(weight @ (values - fitted) ** 2)
            if error < best - 1e-12:
                best, found[row] = error, means
    return found


def fit_scales(
    weights: Floats, importance: NDArray[np.float64], features: Floats, steps: int, coef: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the coefficients of `compensation.fit_scales`, (rows, coefs)."""
    coef = coef.copy()
    for row, values in enumerate(weights):
        for _ in range(steps):
            levels = (features.astype(np.float64) @ coef[row]).astype(np.float32)
            chosen = features[np.abs(values[:, None] - levels).argmin(axis=1)].astype(np.float64)
            normal = (chosen * importance[:, None]).T @ chosen
            normal += 1e-9 * np.trace(normal) * np.eye(len(normal))
            coef[row] = np.linalg.solve(normal, (chosen * importance[:, None]).T @ values)
    return coef
