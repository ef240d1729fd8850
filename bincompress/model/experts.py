"""A mixture of experts: which experts the tokens choose, and the products with the chosen ones alone."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from bincompress.model.config import Experts, ModelConfig
from bincompress.model.linear import DenseLinear, Floats, Linear, WeightSource
from bincompress.model.packed_linear import PackedLinear
from bincompress.model.threads import in_turn, over_ranges
from cpu_kernels.decoder.norms import GATES
from cpu_kernels.decoder.routing import choose_experts, mix_experts
from cpu_kernels.matmul.chosen import ChosenProducts
from cpu_kernels.parallel.workers import Workers

_TOKENS_PER_THREAD = 16  # whose experts are chosen, and whose outputs are added up
_EXPERTS_PER_THREAD = 2  # from so many on a thread takes the next expert; else all of them share each product
Pair = tuple[Linear, Linear]  # an expert's gate and up as one matrix (2 * inner, hidden), and down (hidden, inner)
Numbers = NDArray[np.int64]


class ExpertLayer:
    """What a layer has in place of a dense MLP: a router (experts, hidden) and a pair of matrices an expert.

    For one caller at a time, who holds the workers' lock.
    """

    def __init__(
        self, config: ModelConfig, experts: Experts, router: Linear, pairs: Sequence[Pair], workers: Workers
    ) -> None:
        self.router, self.pairs = router, pairs
        self.hidden, self.inner, self.count = config.hidden, experts.inner, experts.count
        self._chosen, self._normalized = experts.chosen, int(experts.normalized)
        self._gate = GATES[config.activation]
        self._no_bias = np.zeros(2 * experts.inner, np.float32)
        self._workers = workers
        # Of one token: handing a router's few rows to other threads takes longer than multiplying them.
        self._router_alone = router.alone() if isinstance(router, DenseLinear) else router
        self._gate_ups = ChosenProducts(experts.count, 2 * experts.inner, config.hidden, workers)
        self._downs = ChosenProducts(experts.count, config.hidden, experts.inner, workers)
        self._seen = np.zeros(experts.count, np.bool_)  # experts that were put into both, or cannot be
        self._places = np.arange(experts.chosen)[None]

    def __call__(self, x: Floats) -> Floats:
        """Return what the chosen experts make of x (n, hidden), (n, hidden): each expert's weights are read once."""
        chosen, weights = self.choose(x)
        if len(x) == 1:
            made, places = self._of_token(chosen[0], x), self._places
        else:
            made, places = self._of_tokens(chosen, x)
        result = np.empty((len(x), self.hidden), np.float32)
        over_ranges(
            self._workers,
            lambda start, stop, _: mix_experts(made, places, weights, start, stop, result),
            len(x),
            _TOKENS_PER_THREAD,
        )
        return result

    def choose(self, x: Floats) -> tuple[Numbers, Floats]:
        """Return each token's experts (n, chosen), by ascending number, and their weights."""
        logits = self.router(x) if len(x) > 1 else self._router_alone(x)
        chosen = np.empty((len(x), self._chosen), np.int64)
        weights = np.empty((len(x), self._chosen), np.float32)
        over_ranges(
            self._workers,
            lambda start, stop, _: choose_experts(logits, self._normalized, start, stop, chosen, weights),
            len(x),
            _TOKENS_PER_THREAD,
        )
        return chosen, weights

    def gated(self, expert: int, x: Floats) -> Floats:
        """Return what an expert's down matrix reads where its gate and up matrices read x."""
        return self.gate(self.pairs[expert][0](x))

    def gate(self, gate_up: Floats) -> Floats:
        """Return the gated values (n, inner) of gate_up (n, 2 * inner)."""
        inner = np.empty((len(gate_up), self.inner), np.float32)
        self._gate(gate_up, self._no_bias, 0, len(gate_up), inner)
        return inner

    def down(self, expert: int, inner: Floats) -> Floats:
        """Return the products of an expert's down matrix."""
        return self.pairs[expert][1](inner)

    def _of_token(self, numbers: Numbers, x: Floats) -> Floats:
        """Return what these experts make of one token, (experts, hidden)."""
        pairs = [self.pairs[number] for number in numbers.tolist()]
        if not self._seen[numbers].all():
            for number, pair in zip(numbers.tolist(), pairs, strict=True):
                self._see(number, pair)
        if self._gate_ups.has(numbers) and self._downs.has(numbers):
            return self._downs(numbers, self.gate(self._gate_ups(numbers, x)))
        return np.concatenate([down(self.gate(gate_up(x))) for gate_up, down in pairs])

    def _see(self, number: int, pair: Pair) -> None:
        """Put an expert's matrices where one call multiplies several, if they can be."""
        for products, linear in zip((self._gate_ups, self._downs), pair, strict=True):
            if isinstance(linear, PackedLinear):
                linear.put(products, number)
        self._seen[number] = True

    def forget(self, number: int) -> None:
        """Let go of an expert's matrices; those in `pairs` are the caller's."""
        self._gate_ups.remove(number)
        self._downs.remove(number)
        self._seen[number] = False

    def _of_tokens(self, chosen: Numbers, x: Floats) -> tuple[Floats, Numbers]:
        """Return what the experts make of the tokens, one after the other, and the row of each token's experts."""
        groups = by_expert(chosen)
        order = np.concatenate([group for _, group in groups])
        ends = np.cumsum([len(group) for _, group in groups])
        places = np.empty(chosen.size, np.int64)
        places[order] = np.arange(chosen.size)
        made = np.empty((chosen.size, self.hidden), np.float32)

        def fill(item: int, product: Callable[[Linear, Floats], Floats]) -> None:
            expert, group = groups[item]
            gate_up, down = self.pairs[expert]
            inner = self.gate(product(gate_up, x[group // chosen.shape[1]]))
            made[ends[item] - len(group) : ends[item]] = product(down, inner)

        several = len(groups) >= _EXPERTS_PER_THREAD * self._workers.threads
        if several and all(isinstance(linear, PackedLinear) for expert, _ in groups for linear in self.pairs[expert]):
            in_turn(self._workers, lambda item: fill(item, _alone), len(groups))
        else:
            for item in range(len(groups)):
                fill(item, _shared)
        return made, places.reshape(chosen.shape)


def _alone(linear: Linear, x: Floats) -> Floats:
    assert isinstance(linear, PackedLinear)
    return linear.alone(x)


def _shared(linear: Linear, x: Floats) -> Floats:
    return linear(x)


def by_expert(chosen: Numbers) -> list[tuple[int, Numbers]]:
    """Return each expert that any token chose, by ascending number, with the items of `chosen` (flat) that are it."""
    order = np.argsort(chosen, axis=None, kind="stable")
    found, starts = np.unique(chosen.reshape(-1)[order], return_index=True)
    return [(int(expert), group) for expert, group in zip(found, np.split(order, starts[1:]), strict=True)]


def read_experts(config: ModelConfig, source: WeightSource, layer: int, workers: Workers) -> ExpertLayer | None:
    """Read a layer's mixture of experts; None where it has a dense MLP."""
    experts = config.experts_of(layer)
    if experts is None:
        return None
    pairs: list[Pair] = []
    for expert in range(experts.count):
        gate_up, down = config.names.of_expert(layer, expert)
        pairs.append((source.linear(gate_up), source.linear([down])))
    return ExpertLayer(config, experts, source.linear([config.router_of(layer)]), pairs, workers)
