"""How are weights rounded to the levels of their row-block so that the layer's outputs move least?

The quadratic form H of a layer's inputs says what an error costs: rows are independent, error d costs d H d^T. Three
steps work on one block of columns, its rows one after the other; what they change is spread over the other columns by
matrix products outside (`bincompress.methods.compensation`).

levels: float32 (rows, codes): what each code of a row stands for in this block. A code's low `planes` bits are chosen
here, the bits above them are the column's own (`classes`, uint8 (cols)).
"""

import numba
import numpy as np

from cpu_kernels.compiler import inline, kernel, out, view

_NEARER = np.float32(1.0 - 1e-6)
U1, I8, F4, F8 = numba.uint8, numba.int64, numba.float32, numba.float64


@inline
def _sort_levels(levels, row, planes, middles, order):
    """Sort a row's levels for each class of columns: the codes in order, and the middles between neighbours.

    middles, order: (classes, 1 << planes), the last middle of each class infinite.
    """
    count = 1 << planes
    for own in range(order.shape[0]):
        for code in range(count):
            place = code
            while place > 0 and levels[row, order[own, place - 1]] > levels[row, own * count + code]:
                order[own, place] = order[own, place - 1]
                place -= 1
            order[own, place] = own * count + code
        for place in range(count - 1):
            low, high = levels[row, order[own, place]], levels[row, order[own, place + 1]]
            middles[own, place] = np.float32(0.5) * (low + high)
        middles[own, count - 1] = np.float32(np.inf)


@inline
def _nearest(middles, order, own, target):
    """Return the code whose level is nearest to the target, the lesser level of two as near."""
    place = 0
    for other in range(middles.shape[1] - 1):
        place += target > middles[own, other]
    return order[own, place]


@kernel(numba.void(out(F4, 2), view(F4, 2), view(F4, 2), view(U1, 1), I8, out(U1, 2), out(F4, 2)))
def round_block(weights, factor, levels, classes, planes, codes, errors):
    """Choose each weight's nearest level, column by column, and let the later columns make up for its error (GPTQ).

    weights: float32 (rows, cols), changed. factor: float32 (cols, cols), the block of the upper factor U with
    H^-1 = U^T U. codes: uint8 (rows, cols); errors: float32 (rows, cols), (w - level) / U[j, j]; both written. The
    columns after this block are to lose errors @ U[block, after].
    """
    cols = weights.shape[1]
    count = 1 << planes
    middles = np.empty((levels.shape[1] // count, count), np.float32)
    order = np.empty(middles.shape, np.int64)
    for row in range(weights.shape[0]):
        _sort_levels(levels, row, planes, middles, order)
        for col in range(cols):
            value = weights[row, col]
            code = _nearest(middles, order, classes[col], value)
            error = (value - levels[row, code]) / factor[col, col]
            codes[row, col] = code
            errors[row, col] = error
            # Slices counted from zero: an index that might be negative keeps a loop from being vectorised.
            left, along = weights[row][col + 1 :], factor[col][col + 1 :]
            for later in range(left.size):
                left[later] -= error * along[later]


@kernel(F8(out(F4, 2), view(F4, 2), view(F4, 2), view(U1, 1), I8, I8, out(U1, 2), out(F4, 2)))
def flip_block(gradient, hessian, levels, classes, planes, passes, codes, change):
    """Move weights to the level that lowers the cost most, column by column, until none moves or `passes` are made.

    gradient: float32 (rows, cols), the block of (w - q) H, kept up to date within the block. hessian: float32
    (cols, cols), H's block. codes: uint8 (rows, cols), changed. change: float32 (rows, cols), written: what was added
    to q; the gradient of all columns outside is to lose change @ H[block]. Returns how much less it all costs.
    """
    rows, cols = gradient.shape
    count = 1 << planes
    middles = np.empty((levels.shape[1] // count, count), np.float32)
    order = np.empty(middles.shape, np.int64)
    inverse = np.empty(cols, np.float32)
    for col in range(cols):
        inverse[col] = np.float32(1.0) / hessian[col, col]
    gained = 0.0
    for row in range(rows):
        _sort_levels(levels, row, planes, middles, order)
        change[row] = np.float32(0.0)
        for _ in range(passes):
            moved = 0
            for col in range(cols):
                now = levels[row, codes[row, col]]
                target = now + gradient[row, col] * inverse[col]
                code = _nearest(middles, order, classes[col], target)
                # A level as near as the present one is left alone, or rounding would let weights wander.
                if code == codes[row, col] or abs(target - levels[row, code]) >= abs(target - now) * _NEARER:
                    continue
                step = levels[row, code] - now
                codes[row, col] = code
                change[row, col] += step
                moved += 1
                gained += np.float64(step) * (2.0 * gradient[row, col] - np.float64(step) * hessian[col, col])
                pull, along = gradient[row], hessian[col]
                for other in range(pull.size):
                    pull[other] -= step * along[other]
            if moved == 0:
                break
    return gained


@kernel(numba.void(view(U1, 2), view(F4, 2), I8, I8, out(F4, 2)))
def look_up(codes, levels, first, last, values):
    """Write levels[row, codes[row, col]] to values[row, col] for columns first .. last - 1; one row of levels will do.

    codes: uint8 (rows, cols); levels: float32 (rows or 1, codes); values: float32 (rows, cols).
    """
    several = levels.shape[0] > 1
    for row in range(codes.shape[0]):
        own, found = codes[row][first:last], values[row][first:last]
        level = levels[row if several else 0]
        for col in range(own.size):
            found[col] = level[own[col]]


@kernel(numba.void(view(F4, 3), view(F4, 3), I8, I8, out(F8, 3)), reassociate=True)
def add_normal(products, signs, block, first, normal):
    """Fill one block's rows of the normal equations of all scales of a row.

    products: float32 (coefs, rows, width): the block's features times H, for the columns from `first`, the block's own
    first one, to the last; signs: float32 (coefs, rows, cols): the features; normal: float64 (rows, blocks * coefs,
    blocks * coefs), of which the block's rows from its own columns on are written.
    """
    coefs, rows, width = products.shape
    unit = first // block
    for row in range(rows):
        for k in range(coefs):
            for other in range(coefs):
                for number in range((width + block - 1) // block):
                    start = number * block
                    one = products[k, row][start : start + block]
                    two = signs[other, row][first + start : first + start + block]
                    total = np.float32(0.0)
                    for col in range(one.size):
                        total += one[col] * two[col]
                    normal[row, unit * coefs + k, (unit + number) * coefs + other] = total


@kernel(numba.void(view(F4, 3), view(F4, 2), I8, out(F8, 2)), reassociate=True)
def dot_blocks(signs, pulled, block, wanted):
    """Write the right sides of the normal equations: each feature's product with w H, block by block.

    signs: float32 (coefs, rows, cols); pulled: float32 (rows, cols); wanted: float64 (rows, blocks * coefs).
    """
    coefs, rows, cols = signs.shape
    for row in range(rows):
        for k in range(coefs):
            for number in range((cols + block - 1) // block):
                one = signs[k, row][number * block : (number + 1) * block]
                two = pulled[row][number * block : (number + 1) * block]
                total = np.float32(0.0)
                for col in range(one.size):
                    total += one[col] * two[col]
                wanted[row, number * coefs + k] = total


@kernel(numba.void(view(F4, 2), view(F8, 1), out(F8, 2)))
def split_two(weights, importance, means):
    """Part each row's magnitudes in two groups of least weighted squared error, the exact optimum.

    weights: float32 (rows, cols); importance: float64 (cols), positive; means: float64 (rows, 2), written: the smaller
    group's mean magnitude and the larger one's, equal where all magnitudes are.
    """
    rows, cols = weights.shape
    keys = np.empty(cols, np.int64)
    for row in range(rows):
        magnitudes = np.abs(weights[row])
        # Sorted as one number with their columns behind them, in a quarter of argsort's time.
        patterns = magnitudes.view(np.uint32)
        for col in range(cols):
            keys[col] = np.int64(patterns[col]) << 32 | col
        keys.sort()
        weight = 0.0
        total = 0.0
        for col in range(cols):
            weight += importance[col]
            total += importance[col] * magnitudes[col]
        best = -1.0
        low_weight = 0.0
        low_total = 0.0
        means[row, 0] = total / weight
        means[row, 1] = total / weight
        for place in range(cols - 1):
            col = keys[place] & 0xFFFFFFFF
            low_weight += importance[col]
            low_total += importance[col] * magnitudes[col]
            # The sum of squares is the same for all splits, so the best one has the greatest share explained.
            explained = low_total**2 / low_weight + (total - low_total) ** 2 / (weight - low_weight)
            if explained > best:
                best = explained
                means[row, 0] = low_total / low_weight
                means[row, 1] = (total - low_total) / (weight - low_weight)


@kernel(numba.void(view(F4, 2), view(F8, 1), view(F4, 2), I8, out(F8, 2)))
def fit_scales(weights, importance, features, steps, coef):
    """Improve each row's coefficients: every weight to its nearest level, then least squares, in turn (Lloyd).

    weights: float32 (rows, cols); importance: float64 (cols), positive; features: float32 (codes, coefs); coef: float64
    (rows, coefs), where to begin; overwritten.
    """
    codes, coefs = features.shape
    levels = np.empty((1, codes), np.float32)
    middles = np.empty((1, codes), np.float32)
    order = np.empty((1, codes), np.int64)
    planes = 0
    while 1 << planes < codes:
        planes += 1
    sums = np.empty(codes)
    counts = np.empty(codes)
    normal = np.empty((coefs, coefs))
    wanted = np.empty(coefs)
    for row in range(weights.shape[0]):
        for _ in range(steps):
            for code in range(codes):
                total = 0.0
                for k in range(coefs):
                    total += features[code, k] * coef[row, k]
                levels[0, code] = total
                sums[code] = 0.0
                counts[code] = 0.0
            _sort_levels(levels, 0, planes, middles, order)
            for col in range(weights.shape[1]):
                code = _nearest(middles, order, 0, weights[row, col])
                sums[code] += importance[col] * weights[row, col]
                counts[code] += importance[col]
            _normal_of(features, sums, counts, normal, wanted)
            _solve_in_place(normal, wanted)
            coef[row] = wanted


@inline
def _normal_of(features, sums, counts, normal, wanted):
    """Set up least squares for levels that hold weights of these sums and counts."""
    coefs = wanted.size
    for k in range(coefs):
        wanted[k] = 0.0
        for other in range(coefs):
            normal[k, other] = 0.0
    for code in range(sums.size):
        for k in range(coefs):
            wanted[k] += features[code, k] * sums[code]
            for other in range(coefs):
                normal[k, other] += features[code, k] * features[code, other] * counts[code]
    trace = 0.0
    for k in range(coefs):
        trace += normal[k, k]
    for k in range(coefs):
        normal[k, k] += 1e-9 * trace  # levels that no weight has leave directions open


@inline
def _solve_in_place(matrix, vector):
    """Replace the vector by the solution; the matrix (symmetric, positive definite) is used up."""
    size = vector.size
    for k in range(size):
        if matrix[k, k] == 0.0:
            vector[k] = 0.0  # no weights at all
            continue
        for row in range(k + 1, size):
            factor = matrix[row, k] / matrix[k, k]
            for col in range(k, size):
                matrix[row, col] -= factor * matrix[k, col]
            vector[row] -= factor * vector[k]
    for k in range(size - 1, -1, -1):
        total = vector[k]
        for col in range(k + 1, size):
            total -= matrix[k, col] * vector[col]
        vector[k] = total / matrix[k, k] if matrix[k, k] != 0.0 else 0.0
