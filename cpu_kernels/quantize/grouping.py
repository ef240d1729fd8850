"""How are sorted magnitudes split into groups of least cost (WGM, arXiv 2509.03054)?

A solver works on *atoms*: runs of the sorted magnitudes that it never splits (distinct magnitudes for the exact
optimum, single magnitudes for Algorithm 2, windows for Algorithm 3), given as prefix sums over them:
count[i], first[i], second[i] are the number, the sum and the sum of squares of the magnitudes in atoms 0 .. i - 1.

    cost(group) = size * variance + lam / size = (second - first ** 2 / count) + lam / count
"""

import numba
import numpy as np

from cpu_kernels.jit.compiler import inline, kernel, out, view

F8, I4, I8 = numba.float64, numba.int32, numba.int64


@inline
def group_cost(count, first, second, lam, start, end):
    """Return the cost of one group made of atoms start .. end - 1 (end > start)."""
    size = count[end] - count[start]
    total = first[end] - first[start]
    return (second[end] - second[start]) - total * total / size + lam / size


@inline
def push_halves(stack, depth, begin, middle, end, left, start, right):
    """Push what is left and right of `middle`, each with its bounds of best starts; return the new depth."""
    if begin < middle:
        stack[depth, 0], stack[depth, 1], stack[depth, 2], stack[depth, 3] = begin, middle - 1, left, start
        depth += 1
    if middle < end:
        stack[depth, 0], stack[depth, 1], stack[depth, 2], stack[depth, 3] = middle + 1, end, start, right
        depth += 1
    return depth


@inline
def next_row(count, first, second, lam, groups, low, high, best, row, choice, stack):
    """Extend the least costs of `groups - 1` groups (best) by one group more (row), over atoms low .. high.

    choice[j] becomes the start of the last group where atoms low .. j - 1 make `groups` groups. The cost obeys the
    quadrangle inequality, so the best start never moves left as j grows: divide and conquer over j.
    """
    depth = 0
    if low + groups <= high:
        stack[0, 0] = low + groups
        stack[0, 1] = high
        stack[0, 2] = low + groups - 1
        stack[0, 3] = high - 1
        depth = 1
    while depth > 0:
        depth -= 1
        begin, end, left, right = stack[depth, 0], stack[depth, 1], stack[depth, 2], stack[depth, 3]
        middle = (begin + end) // 2
        least = np.inf
        start = left
        for i in range(left, min(right, middle - 1) + 1):
            cost = best[i] + group_cost(count, first, second, lam, i, middle)
            if cost < least:
                least = cost
                start = i
        row[middle] = least
        choice[middle] = start
        depth = push_halves(stack, depth, begin, middle, end, left, start, right)


@inline
def first_row(count, first, second, lam, low, high, row):
    """Write the cost of one group over atoms low .. j - 1 to row[j]."""
    row[low] = np.inf
    for j in range(low + 1, high + 1):
        row[j] = group_cost(count, first, second, lam, low, j)


@inline
def follow_choices(choices, groups, atoms, bounds):
    """Fill bounds[0 .. groups] with the limits of the groups that the choices lead to, from the last to the first."""
    bounds[groups] = atoms
    for k in range(groups, 1, -1):
        bounds[k - 1] = choices[k, bounds[k]]
    bounds[0] = 0


@inline
def solve_exactly(count, first, second, atoms, lam, most, rows, choices, stack, bounds):
    """Return the number of groups (at most `most`) of least total cost; bounds[0 .. groups] are their limits."""
    most = min(most, atoms)
    first_row(count, first, second, lam, 0, atoms, rows[0])
    least = rows[0, atoms]
    groups = 1
    for k in range(2, most + 1):
        next_row(count, first, second, lam, k, 0, atoms, rows[k % 2], rows[1 - k % 2], choices[k], stack)
        if rows[1 - k % 2, atoms] < least:
            least = rows[1 - k % 2, atoms]
            groups = k
    follow_choices(choices, groups, atoms, bounds)
    return groups


@kernel(numba.int64(view(F8, 1), view(F8, 1), view(F8, 1), F8, numba.int64, out(numba.int64, 1)))
def exact_groups(count, first, second, lam, most, bounds):
    """Return the number of groups of least total cost over all atoms, at most `most`, and fill bounds (most + 1).

    count, first, second: float64 (atoms + 1) prefix sums. Source: Algorithm 1, with the argmin's monotonicity.
    """
    atoms = count.size - 1
    rows = np.empty((2, atoms + 1))
    choices = np.empty((most + 1, atoms + 1), np.int32)
    stack = np.empty((128, 4), np.int64)
    return solve_exactly(count, first, second, atoms, lam, most, rows, choices, stack, bounds)


@kernel(numba.void(view(F8, 1), view(F8, 1), view(F8, 1), F8, I8, I8, I8, I8, out(F8, 1), out(I4, 1)))
def cost_rows(count, first, second, lam, low, high, most, half, costs, crossing):
    """Least costs of exactly 1 .. most groups over atoms low .. high - 1, without a table of choices.

    costs: float64 (most + 1), costs[k] for k groups (infinite where there are fewer atoms than groups).
    crossing: int32 (1), where group `half` ends in the best split into `most` groups. Two rows of memory instead of
    `most`: called again on both halves it gives all limits (Hirschberg), for matrices of millions of distinct values.
    """
    size = count.size
    rows = np.empty((2, size))
    choice = np.empty(size, np.int32)
    passed = np.empty((2, size), np.int32)
    stack = np.empty((128, 4), np.int64)
    costs[:] = np.inf
    first_row(count, first, second, lam, low, high, rows[0])
    costs[1] = rows[0, high]
    for k in range(2, most + 1):
        now = 1 - k % 2
        before = k % 2
        next_row(count, first, second, lam, k, low, high, rows[before], rows[now], choice, stack)
        if low + k <= high:
            costs[k] = rows[now, high]
        if k == half + 1:
            for j in range(low + k, high + 1):
                passed[now, j] = choice[j]
        elif k > half:
            for j in range(low + k, high + 1):
                passed[now, j] = passed[before, choice[j]]
    crossing[0] = passed[1 - most % 2, high]


@inline
def _goes_before(keys, places, a, b):
    return keys[a] < keys[b] or (keys[a] == keys[b] and places[a, 0] < places[b, 0])


@inline
def _swap(keys, places, a, b):
    keys[a], keys[b] = keys[b], keys[a]
    for part in range(3):
        places[a, part], places[b, part] = places[b, part], places[a, part]


@inline
def _sink(keys, places, size, place):
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        if child + 1 < size and _goes_before(keys, places, child + 1, child):
            child += 1
        if not _goes_before(keys, places, child, place):
            break
        _swap(keys, places, child, place)
        place = child


@inline
def _push(keys, places, size, key, left, middle, right):
    keys[size] = key
    places[size, 0], places[size, 1], places[size, 2] = left, middle, right
    place = size
    while place > 0 and _goes_before(keys, places, place, (place - 1) // 2):
        _swap(keys, places, place, (place - 1) // 2)
        place = (place - 1) // 2
    return size + 1


@inline
def merge_greedily(count, first, second, atoms, lam, most, keys, places, ends, starts, bounds):
    """Merge the adjacent pair whose merged cost is least (ties: the leftmost) until `most` groups remain.

    keys (2 * atoms), places (2 * atoms, 3): the heap. ends, starts (atoms + 1): where the group that starts (ends) at
    an atom ends (starts). Returns the number of groups; bounds[0 .. groups] are their limits. Source: Algorithm 2.
    """
    for i in range(atoms):
        ends[i] = i + 1
        starts[i + 1] = i
    size = 0
    for i in range(atoms - 1):
        keys[size] = group_cost(count, first, second, lam, i, i + 2)
        places[size, 0], places[size, 1], places[size, 2] = i, i + 1, i + 2
        size += 1
    for place in range(size // 2 - 1, -1, -1):
        _sink(keys, places, size, place)
    groups = atoms
    while groups > most:
        left, middle, right = places[0, 0], places[0, 1], places[0, 2]
        size -= 1
        keys[0] = keys[size]
        for part in range(3):
            places[0, part] = places[size, part]
        _sink(keys, places, size, 0)
        # An entry is stale once either of its groups has been merged with another.
        if ends[left] != middle or starts[right] != middle or ends[middle] != right:
            continue
        ends[left] = right
        starts[right] = left
        ends[middle] = -1
        starts[middle] = -1
        groups -= 1
        if left > 0:
            before = starts[left]
            size = _push(keys, places, size, group_cost(count, first, second, lam, before, right), before, left, right)
        if right < atoms:
            after = ends[right]
            size = _push(keys, places, size, group_cost(count, first, second, lam, left, after), left, right, after)
    at = 0
    for group in range(groups):
        bounds[group] = at
        at = ends[at]
    bounds[groups] = atoms
    return groups


@kernel(numba.int64(view(F8, 1), view(F8, 1), view(F8, 1), F8, numba.int64, out(numba.int64, 1)))
def merged_groups(count, first, second, lam, most, bounds):
    """Return the number of groups that greedy merging leaves (at most `most`) and fill bounds (most + 1).

    Source: Algorithm 2 with single magnitudes as atoms, Algorithm 3 with windows as atoms.
    """
    atoms = count.size - 1
    keys = np.empty(2 * atoms + 2)
    places = np.empty((2 * atoms + 2, 3), np.int32)
    ends = np.empty(atoms + 1, np.int32)
    starts = np.empty(atoms + 1, np.int32)
    return merge_greedily(count, first, second, atoms, lam, most, keys, places, ends, starts, bounds)
