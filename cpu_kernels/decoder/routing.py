"""Which experts does a token go to? The largest of the router's probabilities, chosen as torch.topk chooses.

Among equal probabilities the ones that are chosen depend on the algorithm, so it is that of torch on a CPU: nth_element
of the GNU C++ library, or its partial_sort where few of many are chosen.
"""

from typing import Any

import numpy as np
from numba import types

from cpu_kernels.jit.compiler import inline, kernel, out, view

_F4, _SIZE = types.float32, types.intp
_NAN = np.int32(0x7FFFFFFF)  # above all numbers, as in torch
_PARTIAL = 64  # torch sorts partially where this many times the chosen are at most all


@inline
def _swap(keys: Any, ids: Any, a: Any, b: Any) -> None:
    keys[a], keys[b] = keys[b], keys[a]
    ids[a], ids[b] = ids[b], ids[a]


@inline
def _sift(keys: Any, ids: Any, first: Any, hole: Any, size: Any, key: Any, number: Any) -> None:
    """Put an item into the heap at `first` whose place `hole` is free; the smallest key is at its top."""
    top = hole
    child = hole
    while child < (size - 1) // 2:
        child = 2 * (child + 1)
        if keys[first + child] > keys[first + child - 1]:
            child -= 1
        keys[first + hole], ids[first + hole] = keys[first + child], ids[first + child]
        hole = child
    if size % 2 == 0 and child == (size - 2) // 2:
        child = 2 * (child + 1) - 1
        keys[first + hole], ids[first + hole] = keys[first + child], ids[first + child]
        hole = child
    while hole > top and keys[first + (hole - 1) // 2] > key:
        parent = (hole - 1) // 2
        keys[first + hole], ids[first + hole] = keys[first + parent], ids[first + parent]
        hole = parent
    keys[first + hole], ids[first + hole] = key, number


@inline
def _heap_select(keys: Any, ids: Any, first: Any, middle: Any, last: Any) -> None:
    """Move the largest keys of first .. last - 1 to first .. middle - 1, the smallest of them at first."""
    size = middle - first
    for parent in range((size - 2) // 2 if size > 1 else -1, -1, -1):
        _sift(keys, ids, first, parent, size, keys[first + parent], ids[first + parent])
    for i in range(middle, last):
        if keys[i] > keys[first]:
            key, number = keys[i], ids[i]
            keys[i], ids[i] = keys[first], ids[first]
            _sift(keys, ids, first, 0, size, key, number)


@inline
def _partition(keys: Any, ids: Any, first: Any, last: Any) -> Any:
    """Part first .. last - 1 at the median of three of them; return where the second part begins."""
    a, b, c = first + 1, first + (last - first) // 2, last - 1
    if keys[a] > keys[b]:
        middle = b if keys[b] > keys[c] else c if keys[a] > keys[c] else a
    else:
        middle = a if keys[a] > keys[c] else c if keys[b] > keys[c] else b
    _swap(keys, ids, first, middle)
    pivot = keys[first]
    low, high = first + 1, last
    while True:
        while keys[low] > pivot:
            low += 1
        high -= 1
        while pivot > keys[high]:
            high -= 1
        if low >= high:
            return low
        _swap(keys, ids, low, high)
        low += 1


@inline
def _insertion_sort(keys: Any, ids: Any, first: Any, last: Any) -> None:
    for i in range(first + 1, last):
        key, number = keys[i], ids[i]
        place = i
        while place > first and key > keys[place - 1]:
            keys[place], ids[place] = keys[place - 1], ids[place - 1]
            place -= 1
        keys[place], ids[place] = key, number


@inline
def _largest_first(keys: Any, ids: Any, count: Any) -> None:
    """Move the `count` largest keys, with their ids, to the front."""
    first, last, nth = 0, keys.size, count - 1
    if count * _PARTIAL <= keys.size:
        _heap_select(keys, ids, 0, count, last)
        return
    depth = 0
    while (1 << (depth + 1)) <= last:
        depth += 1
    depth *= 2
    while last - first > 3:
        if depth == 0:
            _heap_select(keys, ids, first, nth + 1, last)
            _swap(keys, ids, first, nth)
            return
        depth -= 1
        cut = _partition(keys, ids, first, last)
        if cut <= nth:
            first = cut
        else:
            last = cut
    _insertion_sort(keys, ids, first, last)


@inline
def _choose(values: Any, count: Any, keys: Any, ids: Any) -> None:
    """Move the ids of the `count` largest values, none of them a negative zero, to the front by ascending number."""
    bits = values.view(np.int32)
    for e in range(values.size):
        # With their other bits turned, negative numbers too have the order of their bits.
        key = bits[e] if bits[e] >= 0 else np.int32(bits[e] ^ _NAN)
        keys[e] = key if values[e] == values[e] else _NAN
        ids[e] = e
    _largest_first(keys, ids, count)
    ids[:count].sort()


@kernel(types.void(view(_F4, 2), types.int64, _SIZE, _SIZE, out(types.int64, 2), out(_F4, 2)))
def choose_experts(logits: Any, normalized: Any, start: Any, stop: Any, chosen: Any, weights: Any) -> None:
    """For tokens start .. stop - 1: write the experts that they go to, by ascending number, and their weights.

    logits (n, experts), chosen and weights (n, k). A weight is the softmax over all experts, divided by the sum of
    the chosen ones where `normalized` is 1.
    """
    experts, count = logits.shape[1], chosen.shape[1]
    probabilities = np.empty(experts, np.float32)
    keys = np.empty(experts, np.int32)
    ids = np.empty(experts, np.int64)
    for token in range(start, stop):
        largest = logits[token, 0]
        for e in range(experts):
            largest = max(largest, logits[token, e])
        total = np.float32(0)
        for e in range(experts):
            probabilities[e] = np.exp(np.float32(logits[token, e] - largest))
            total += probabilities[e]
        for e in range(experts):
            probabilities[e] /= total
        _choose(probabilities, count, keys, ids)
        total = np.float32(0)
        for i in range(count):
            chosen[token, i] = ids[i]
            weights[token, i] = probabilities[ids[i]]
            total += weights[token, i]
        if normalized:
            for i in range(count):
                weights[token, i] /= total


@kernel(types.void(view(_F4, 2), view(_F4, 1), types.int64, _F4, _F4, _SIZE, _SIZE, out(types.int64, 2), out(_F4, 2)))
def choose_by_sigmoid(
    logits: Any, offsets: Any, normalized: Any, added: Any, scale: Any, start: Any, stop: Any, chosen: Any, weights: Any
) -> None:
    """For tokens start .. stop - 1: as `choose_experts`, by the sigmoid of each logit plus the expert's offset.

    offsets (experts,). A weight is the sigmoid, divided by the sum of the chosen ones and `added` where `normalized`
    is 1, times scale.
    """
    experts, count = logits.shape[1], chosen.shape[1]
    sigmoids = np.empty(experts, np.float32)
    row = np.empty(experts, np.float32)
    keys = np.empty(experts, np.int32)
    ids = np.empty(experts, np.int64)
    for token in range(start, stop):
        for e in range(experts):
            sigmoids[e] = np.float32(1) / (np.float32(1) + np.exp(-logits[token, e]))
            row[e] = sigmoids[e] + offsets[e] + np.float32(0)  # no negative zero
        _choose(row, count, keys, ids)
        total = added
        for i in range(count):
            chosen[token, i] = ids[i]
            weights[token, i] = sigmoids[ids[i]]
            total += weights[token, i]
        for i in range(count):
            weights[token, i] = (weights[token, i] / total if normalized else weights[token, i]) * scale


@kernel(types.void(view(_F4, 2), _SIZE, _SIZE, out(types.int64, 2), out(_F4, 2)))
def choose_by_logits(logits: Any, start: Any, stop: Any, chosen: Any, weights: Any) -> None:
    """For tokens start .. stop - 1: as `choose_experts`, by the largest logits, the softmax being over those alone."""
    experts, count = logits.shape[1], chosen.shape[1]
    row = np.empty(experts, np.float32)
    keys = np.empty(experts, np.int32)
    ids = np.empty(experts, np.int64)
    for token in range(start, stop):
        for e in range(experts):
            row[e] = logits[token, e] + np.float32(0)  # no negative zero
        _choose(row, count, keys, ids)
        largest = row[ids[0]]
        for i in range(count):
            chosen[token, i] = ids[i]
            largest = max(largest, row[ids[i]])
        total = np.float32(0)
        for i in range(count):
            weights[token, i] = np.exp(np.float32(row[ids[i]] - largest))
            total += weights[token, i]
        for i in range(count):
            weights[token, i] /= total


@kernel(types.void(view(_F4, 2), view(types.int64, 2), view(_F4, 2), _SIZE, _SIZE, out(_F4, 2)))
def mix_experts(made: Any, places: Any, weights: Any, start: Any, stop: Any, result: Any) -> None:
    """For tokens start .. stop - 1: result = the sum of what their experts made, each times its weight.

    made (rows, hidden); places (n, k): the row of each of a token's experts; weights (n, k); result (n, hidden).
    """
    for token in range(start, stop):
        row = result[token]
        row[:] = 0
        for i in range(places.shape[1]):
            own, weight = made[places[token, i]], weights[token, i]
            for d in range(np.uint64(row.size)):
                row[d] += own[d] * weight
