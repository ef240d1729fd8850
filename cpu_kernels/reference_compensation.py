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


def flip_block(
    gradient: Floats, hessian: Floats, levels: Floats, classes: Codes, planes: int, passes: int, codes: Codes
) -> tuple[Codes, Floats, float]:
    """Return the codes after `compensation.flip_block`, what was added to the weights, and how much less they cost."""
    codes, gradient, change = codes.copy(), gradient.copy(), np.zeros_like(gradient)
    gained = 0.0
    for row in range(len(gradient)):
        for _ in range(passes):
            moved = False
            for col in range(gradient.shape[1]):
                now = levels[row, codes[row, col]]
                target = now + gradient[row, col] * (np.float32(1.0) / hessian[col, col])
                code = _nearest(levels[row], int(classes[col]), planes, target)
                if abs(target - levels[row, code]) >= abs(target - now) * np.float32(1.0 - 1e-6):
                    continue
                step = levels[row, code] - now
                codes[row, col] = code
                change[row, col] += step
                gained += float(step) * (2.0 * float(gradient[row, col]) - float(step) * float(hessian[col, col]))
                gradient[row] -= step * hessian[col]
                moved = True
            if not moved:
                break
    return codes, change, gained


def look_up(codes: Codes, levels: Floats) -> Floats:
    """Return what `compensation.look_up` writes for all columns."""
    return np.take_along_axis(np.broadcast_to(levels, (len(codes), levels.shape[1])), codes.astype(np.intp), axis=1)


def add_normal(products: Floats, signs: Floats, block: int, first: int) -> NDArray[np.float64]:
    """Return what `compensation.add_normal` writes from the block's own columns on, (rows, coefs, units * coefs)."""
    starts = np.arange(0, products.shape[2], block)
    pairs = np.einsum("krc,orc->rkoc", products.astype(np.float64), signs[:, :, first:].astype(np.float64))
    sums = np.add.reduceat(pairs, starts, axis=3)
    return np.moveaxis(sums, 3, 2).reshape(products.shape[1], len(products), -1)


def dot_blocks(signs: Floats, pulled: Floats, block: int) -> NDArray[np.float64]:
    """Return what `compensation.dot_blocks` writes, (rows, blocks * coefs)."""
    starts = np.arange(0, signs.shape[2], block)
    sums = np.add.reduceat(signs.astype(np.float64) * pulled, starts, axis=2)
    return np.transpose(sums, (1, 2, 0)).reshape(len(pulled), -1)


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
