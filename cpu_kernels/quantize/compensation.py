"""How are weights rounded to the levels of their row-block so that the layer's outputs move least?

The quadratic form H of a layer's inputs says what an error costs: rows are independent, error d costs d H d^T. Rounding
works on one block of columns, and matrix products outside spread its errors over the others. Refinement works on whole
rows, one after the other, from products of their planes with H that are kept up to date.
"""

import numba
import numpy as np

from cpu_kernels.jit.compiler import inline, inline_whole, kernel, out, view

_NEARER = np.float32(1.0 - 1e-6)
_GROUP = 8  # weights
_TILE = 1024  # columns
_FEW = 512  # weights
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


@kernel(
    F8(out(F4, 4), view(F4, 2), view(F4, 2), view(F4, 3), view(F4, 3), view(F4, 2), view(U1, 1), I8, I8, I8, I8,
       numba.boolean, out(U1, 2), out(F8, 3), out(F8, 2)),
    reassociate=True,
)  # fmt: skip
def move_weights(
    products, pulled, hessian, coef, levels, features, classes, planes, block, step, passes, more, codes, normal, wanted
):
    """Move weights to the level that lowers the cost most; returns how much less it all costs.

    Up to `step` columns of a block are gone over until none moves or `passes` are made, then the next ones. With `more`
    the normal equations of the scales for the new codes are set up too, as `normal_equations` does: a row's products
    are in the cache now.

    products: float32 (blocks, rows, coefs, cols), the features of a block's codes times H, kept up to date with `more`.
    pulled: float32 (rows, cols), w H. hessian: float32 (cols, cols). coef: float32 (rows, blocks, coefs); levels:
    float32 (rows, blocks, codes), what they come to. features: float32 (codes, coefs). codes: uint8 (rows, cols),
    changed. normal, wanted: see `normal_equations`.
    """
    blocks, rows, coefs, cols = products.shape
    count = 1 << planes
    middles = np.empty((features.shape[0] // count, count), np.float32)
    order = np.empty(middles.shape, np.int64)
    gradient = np.empty(cols, np.float32)
    signs = np.empty((coefs, cols), np.float32)
    bounds = np.empty((2, features.shape[0]), np.float32)
    value, low, high = np.empty(step, np.float32), np.empty(step, np.float32), np.empty(step, np.float32)
    before = np.empty(step, np.uint8)
    places = np.empty((coefs + 1, step), np.int64)  # of the moves that matter to each product, and to the gradient
    amounts = np.empty((coefs + 1, step), np.float32)
    found = np.empty(coefs + 1, np.int64)
    inverse = np.empty(cols, np.float32)
    for col in range(cols):
        inverse[col] = np.float32(1.0) / hessian[col, col]
    gained = 0.0
    for row in range(rows):
        gradient[:] = pulled[row]
        for b in range(blocks):
            for k in range(coefs):
                scale, product = coef[row, b, k], products[b, row, k]
                for col in range(cols):
                    gradient[col] -= scale * product[col]
        for b in range(blocks):
            _sort_levels(levels[row], b, planes, middles, order)
            level = levels[row, b]
            for own in range(order.shape[0]):
                for place in range(count):
                    bounds[0, order[own, place]] = middles[own, place - 1] if place > 0 else -np.inf
                    bounds[1, order[own, place]] = middles[own, place]
            for first in range(b * block, min(cols, (b + 1) * block), step):
                last = min(cols, (b + 1) * block, first + step)
                own, pull, share = codes[row][first:last], gradient[first:last], inverse[first:last]
                for col in range(own.size):
                    before[col] = own[col]
                    value[col], low[col], high[col] = level[own[col]], bounds[0, own[col]], bounds[1, own[col]]
                for _ in range(passes):
                    moves = 0
                    for group in range(0, own.size, _GROUP):
                        # Most weights stay: a look at several at once, for one comparison in the place of a search.
                        some = False
                        end = min(own.size, group + _GROUP)
                        if group + _GROUP == end:
                            for col in range(_GROUP):
                                target = value[group + col] + pull[group + col] * share[group + col]
                                some |= (target > high[group + col]) | (target <= low[group + col])
                            if not some:
                                continue
                        for col in range(group, end):
                            now = value[col]
                            target = now + pull[col] * share[col]
                            if low[col] < target <= high[col]:
                                continue
                            code = _nearest(middles, order, classes[first + col], target)
                            # A level as near as the present one is left alone, or rounding would let weights wander.
                            if code == own[col] or abs(target - level[code]) >= abs(target - now) * _NEARER:
                                continue
                            change = level[code] - now
                            own[col] = code
                            value[col], low[col], high[col] = level[code], bounds[0, code], bounds[1, code]
                            moves += 1
                            along = hessian[first + col][first:last]
                            gained += np.float64(change) * (2.0 * pull[col] - np.float64(change) * along[col])
                            for later in range(pull.size):
                                pull[later] -= change * along[later]
                    if moves == 0:
                        break
                found[:] = 0
                for col in range(own.size):
                    if own[col] != before[col]:
                        _note(first + col, level[before[col]] - level[own[col]], coefs, places, amounts, found)
                        for k in range(coefs if more else 0):
                            amount = features[own[col], k] - features[before[col], k]
                            if amount != 0.0:
                                _note(first + col, amount, k, places, amounts, found)
                # In tiles that stay in the first-level cache, so that H's rows are fetched once for all.
                for tile in range(0 if more else last, cols, _TILE):
                    end = min(cols, tile + _TILE)
                    if end > last:
                        _add_rows(hessian, places[coefs], amounts[coefs], found[coefs], max(tile, last), end, gradient)
                    for k in range(coefs if more else 0):
                        _add_rows(hessian, places[k], amounts[k], found[k], tile, end, products[b, row, k])
        if more:
            _normal_of_row(products, pulled, codes, features, block, row, signs, normal, wanted)
    return gained


@kernel(
    numba.void(view(F4, 4), view(F4, 2), view(U1, 2), view(F4, 2), I8, out(F8, 3), out(F8, 2)), reassociate=True
)  # fmt: skip
def normal_equations(products, pulled, codes, features, block, normal, wanted):
    """Set up the least squares problem of all scales of each row, given its codes.

    products: float32 (blocks, rows, coefs, cols): what the features of a block's codes come to times H; pulled: float32
    (rows, cols), w H; features: float32 (codes, coefs). normal: float64 (rows, blocks * coefs, blocks * coefs); wanted:
    float64 (rows, blocks * coefs); both written.
    """
    signs = np.empty((features.shape[1], codes.shape[1]), np.float32)
    for row in range(codes.shape[0]):
        _normal_of_row(products, pulled, codes, features, block, row, signs, normal, wanted)


@inline_whole
def _normal_of_row(products, pulled, codes, features, block, row, signs, normal, wanted):
    """Write one row of `normal_equations`; signs: float32 (coefs, cols), for its own use."""
    blocks, coefs = products.shape[0], products.shape[2]
    for k in range(coefs):
        for col in range(signs.shape[1]):
            signs[k, col] = features[codes[row, col], k]
    for b in range(blocks):
        for k in range(coefs):
            place = b * coefs + k
            for number in range(b, blocks):
                one = products[b, row, k][number * block : (number + 1) * block]
                for other in range(coefs):
                    two = signs[other][number * block : (number + 1) * block]
                    total = np.float32(0.0)
                    for col in range(one.size):
                        total += one[col] * two[col]
                    normal[row, place, number * coefs + other] = total
                    normal[row, number * coefs + other, place] = total
            one = pulled[row][b * block : (b + 1) * block]
            two = signs[k][b * block : (b + 1) * block]
            total = np.float32(0.0)
            for col in range(one.size):
                total += one[col] * two[col]
            wanted[row, place] = total


@inline_whole
def _note(place, amount, which, places, amounts, found):
    places[which, found[which]] = place
    amounts[which, found[which]] = amount
    found[which] += 1


@inline_whole
def _add_rows(matrix, places, amounts, count, begin, end, total):
    """Add rows of a matrix to a total, each times its amount, in columns begin .. end - 1.

    Four at once: the total is read and written less often.
    """
    own = total[begin:end]
    place = 0
    while place + 4 <= count:
        one, two = matrix[places[place]][begin:end], matrix[places[place + 1]][begin:end]
        three, four = matrix[places[place + 2]][begin:end], matrix[places[place + 3]][begin:end]
        a, b, c, d = amounts[place], amounts[place + 1], amounts[place + 2], amounts[place + 3]
        for col in range(own.size):
            own[col] += (a * one[col] + b * two[col]) + (c * three[col] + d * four[col])
        place += 4
    while place < count:
        one, a = matrix[places[place]][begin:end], amounts[place]
        for col in range(own.size):
            own[col] += a * one[col]
        place += 1


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


@kernel(numba.void(view(U1, 2), view(F4, 2), I8, I8, out(F4, 3)))
def spread(codes, features, first, last, signs):
    """Write the features of the codes in columns first .. last - 1.

    codes: uint8 (rows, cols); features: float32 (codes, coefs); signs: float32 (rows, coefs, last - first), written.
    """
    for row in range(codes.shape[0]):
        own = codes[row][first:last]
        for k in range(features.shape[1]):
            sign = signs[row, k]
            for col in range(own.size):
                sign[col] = features[own[col], k]


@kernel(numba.void(view(F4, 2), view(F8, 1), out(F8, 2)))
def split_two(weights, importance, means):
    """Part each row's magnitudes in two groups of least weighted squared error, the exact optimum.

    weights: float32 (rows, cols); importance: float64 (cols), positive; means: float64 (rows, 2), written: the smaller
    group's mean magnitude and the larger one's, equal where all magnitudes are.
    """
    rows, cols = weights.shape
    keys = np.empty(cols, np.int64)
    order = np.empty(cols, np.int64)
    for row in range(rows):
        magnitudes = np.abs(weights[row])
        # One number with the column behind it: no two are the same, and they sort in a quarter of argsort's time.
        patterns = magnitudes.view(np.uint32)
        for col in range(cols):
            keys[col] = np.int64(patterns[col]) << 32 | col
        if cols <= _FEW:
            # A weight's place is the number of those before it: counted in vectors, in half of a sort's time.
            for col in range(cols):
                own, place = keys[col], 0
                for other in keys:
                    place += other < own
                order[place] = col
        else:
            keys.sort()
            for place in range(cols):
                order[place] = keys[place] & 0xFFFFFFFF
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
            col = order[place]
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


@kernel(numba.void(view(F8, 3), view(F8, 2), out(F8, 2)), reassociate=True)
def solve_each(matrices, vectors, solutions):
    """Solve small systems: matrices (count, size, size), positive definite; vectors and solutions (count, size)."""
    size = matrices.shape[1]
    matrix = np.empty((size, size))
    every, factors, inverse = np.arange(size), np.empty(size), np.empty(size)
    for number in range(len(matrices)):
        matrix[:] = matrices[number]
        found = solutions[number]
        found[:] = vectors[number]
        for row in range(size):
            # What elimination leaves stays symmetric: the half above the diagonal will do.
            for k in range(row):
                factors[k] = -matrix[k, row] * inverse[k]
                found[row] += factors[k] * found[k]
            _add_rows(matrix, every, factors, row, row, size, matrix[row])
            inverse[row] = 1.0 / matrix[row, row]
        for k in range(size - 1, -1, -1):
            total = found[k]
            for col in range(k + 1, size):
                total -= matrix[k, col] * found[col]
            found[k] = total * inverse[k]


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
