"""A mixture of experts: which experts the tokens choose, and the products with the chosen ones alone."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bincompress.model.config import Experts, ModelConfig
from bincompress.model.expert_parts import Biases, Shared, read_biases, read_shared
from bincompress.model.linear import Floats, Linear, WeightSource
from bincompress.model.packed_linear import PackedLinear
from bincompress.model.residents import ColdPairs, Pair, Residents
from bincompress.model.threads import in_turn, over_ranges
from cpu_kernels.decoder.gates import clamped_gate
from cpu_kernels.decoder.norms import GATES
from cpu_kernels.decoder.routing import choose_by_logits, choose_by_sigmoid, choose_experts, mix_experts
from cpu_kernels.matmul.chosen import ChosenProducts
from cpu_kernels.parallel.workers import Workers

_TOKENS_PER_THREAD = 16  # whose experts are chosen, and whose outputs are added up
_EXPERTS_PER_THREAD = 2  # from so many on a thread takes the next expert; else all of them share each product
Numbers = NDArray[np.int64]


class ExpertLayer:
    """What a layer has in place of a dense MLP: a router (experts, hidden) and a pair of matrices an expert.

    For one caller at a time, who holds the workers' lock.
    """

    def __init__(
        self, config: ModelConfig, experts: Experts, router: Linear, pairs: Sequence[Pair], workers: Workers,
        biases: Biases | None = None, shared: Shared | None = None, offsets: Floats | None = None,
    ) -> None:  # fmt: skip
        self.router, self.pairs = router, pairs
        self.hidden, self.inner, self.count = config.hidden, experts.inner, experts.count
        self._experts, self._normalized, self._offsets = experts, int(experts.normalized), offsets
        self._gate, self._clamp = GATES[config.activation], experts.clamp
        self._no_bias = np.zeros(2 * experts.inner, np.float32)
        self._biases, self.shared = biases, shared
        self._workers = workers
        self._gate_ups = ChosenProducts(experts.count, 2 * experts.inner, config.hidden, workers)
        self._downs = ChosenProducts(experts.count, config.hidden, experts.inner, workers)
        self._put: dict[int, Pair] = {}  # experts that were put into both, or cannot be: their matrices stay with them
        self._places = np.arange(experts.chosen)[None]
        if isinstance(pairs, ColdPairs):
            pairs.forget = self._forget

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
        if self.shared is not None:
            result += self.shared.down(self.shared.gated(x), x)
        return result

    def choose(self, x: Floats) -> tuple[Numbers, Floats]:
        """Return each token's experts (n, chosen), by ascending number, and their weights."""
        logits = self.router(x)
        if self._biases is not None:
            logits += self._biases.router
        experts, offsets = self._experts, self._offsets
        chosen = np.empty((len(x), experts.chosen), np.int64)
        weights = np.empty((len(x), experts.chosen), np.float32)

        def choose(start: int, stop: int, _: int) -> None:
            if experts.choice == "softmax":
                choose_experts(logits, self._normalized, start, stop, chosen, weights)
            elif experts.choice == "logits":
                choose_by_logits(logits, start, stop, chosen, weights)
            else:
                added, scale = experts.added, experts.scale
                choose_by_sigmoid(logits, offsets, self._normalized, added, scale, start, stop, chosen, weights)

        over_ranges(self._workers, choose, len(x), _TOKENS_PER_THREAD)
        return chosen, weights

    def gated(self, expert: int, x: Floats) -> Floats:
        """Return what an expert's down matrix reads where its gate and up matrices read x."""
        return self._gated(expert, self.pairs[expert][0](x))

    def _gated(self, experts: int | Numbers, gate_up: Floats, out: Floats | None = None) -> Floats:
        """Return the gated values (n, inner) of gate_up (n, 2 * inner); `out` may be given.

        experts: the one that all rows are of, or that of each row, whose biases are added to gate_up.
        """
        inner = np.empty((len(gate_up), self.inner), np.float32) if out is None else out
        if self._biases is not None:
            gate_up += self._biases.gate_up[experts]
        if self._clamp is None:
            self._gate(gate_up, self._no_bias, 0, len(gate_up), inner)
        else:
            clamped_gate(gate_up, *self._clamp, 0, len(gate_up), inner)
        return inner

    def down(self, expert: int, inner: Floats) -> Floats:
        """Return what an expert's down matrix gives, with its bias."""
        made = self.pairs[expert][1](inner)
        self._add_bias(expert, made)
        return made

    def _add_bias(self, experts: int | Numbers, made: Floats) -> None:
        if self._biases is not None:
            made += self._biases.down[experts]

    def _of_token(self, numbers: Numbers, x: Floats) -> Floats:
        """Return what these experts make of one token, (experts, hidden)."""
        if isinstance(self.pairs, ColdPairs):
            absent = self.pairs.use(numbers.tolist())
            if len(absent) > 1:
                in_turn(self._workers, lambda item: self.pairs[absent[item]], len(absent))
        given = {number: self.pairs[number] for number in numbers.tolist()}
        for number, pair in given.items():
            if self._put.get(number) is not pair:
                self._put_in(number, pair)
        if self._gate_ups.has(numbers) and self._downs.has(numbers):
            made = self._downs(numbers, self._gated(numbers, self._gate_ups(numbers, x)))
        else:
            made = np.concatenate([down(self._gated(number, gate_up(x))) for number, (gate_up, down) in given.items()])
        self._add_bias(numbers, made)
        if isinstance(self.pairs, ColdPairs):
            for number in self.pairs.absent(list(given)):  # dropped for another one of these
                self._forget(number)
        return made

    def _put_in(self, number: int, pair: Pair) -> None:
        """Put an expert's matrices where one call multiplies several, if they can be."""
        for products, linear in zip((self._gate_ups, self._downs), pair, strict=True):
            products.remove(number)
            if isinstance(linear, PackedLinear):
                linear.put(products, number)
        self._put[number] = pair

    def _forget(self, number: int) -> None:
        """Take out the matrices of an expert that is no longer in memory."""
        self._gate_ups.remove(number)
        self._downs.remove(number)
        self._put.pop(number, None)

    def _of_tokens(self, chosen: Numbers, x: Floats) -> tuple[Floats, Numbers]:
        """Return what the experts make of the tokens, one after the other, and the row of each token's experts."""
        groups = by_expert(chosen)
        order = np.concatenate([group for _, group in groups])
        ends = np.cumsum([len(group) for _, group in groups])
        places = np.empty(chosen.size, np.int64)
        places[order] = np.arange(chosen.size)
        rooms: list[_Room] = self._workers.scratch.setdefault("experts", [_Room()])
        made = rooms[0].array("made", chosen.size, self.hidden)  # the caller's, who holds the workers' lock
        free, rest = rooms[1:], list[int]()

        def alone(item: int) -> None:
            expert, group = groups[item]
            gate_up, down = self._pair(expert)
            if not (isinstance(gate_up, PackedLinear) and isinstance(down, PackedLinear)):
                rest.append(item)
                return
            try:
                room = free.pop()
            except IndexError:  # the first time that so many threads are at work
                room = _Room()
                rooms.append(room)
            n = len(group)
            read = room.array("read", n, self.hidden)
            np.take(x, group // chosen.shape[1], axis=0, out=read)
            first = gate_up.alone(read, room.array("gate_up", n, 2 * self.inner))
            own = made[ends[item] - n : ends[item]]
            down.alone(self._gated(expert, first, room.array("inner", n, self.inner)), own)
            self._add_bias(expert, own)
            free.append(room)

        if len(groups) >= _EXPERTS_PER_THREAD * self._workers.threads:
            in_turn(self._workers, alone, len(groups))
        else:
            rest += range(len(groups))
        for item in rest:
            expert, group = groups[item]
            gate_up, down = self._pair(expert)
            own = made[ends[item] - len(group) : ends[item]]
            own[:] = down(self._gated(expert, gate_up(x[group // chosen.shape[1]])))
            self._add_bias(expert, own)
        return made, places.reshape(chosen.shape)

    def _pair(self, expert: int) -> Pair:
        """Return an expert's matrices, and note that they are used."""
        if isinstance(self.pairs, ColdPairs):
            self.pairs.use([expert])
        return self.pairs[expert]


class _Room:
    """Arrays that are kept between calls: new memory for each would be new pages each time."""

    def __init__(self) -> None:
        self._kept: dict[str, Floats] = {}

    def array(self, name: str, rows: int, cols: int) -> Floats:
        """Return the array (rows, cols) of this name; what it held is lost."""
        kept = self._kept.get(name)
        if kept is None or kept.size < rows * cols:
            kept = self._kept[name] = np.empty(rows * cols, np.float32)
        return kept[: rows * cols].reshape(rows, cols)


def by_expert(chosen: Numbers) -> list[tuple[int, Numbers]]:
    """Return each expert that any token chose, by ascending number, with the items of `chosen` (flat) that are it."""
    order = np.argsort(chosen, axis=None, kind="stable")
    found, starts = np.unique(chosen.reshape(-1)[order], return_index=True)
    return [(int(expert), group) for expert, group in zip(found, np.split(order, starts[1:]), strict=True)]


def read_experts(
    config: ModelConfig, source: WeightSource, layer: int, workers: Workers, residents: Residents | None = None
) -> ExpertLayer | None:
    """Read a layer's mixture of experts; None where it has a dense MLP.

    residents: of all layers, where experts are read as they are chosen.
    """
    experts = config.experts_of(layer)
    if experts is None:
        return None

    def read(expert: int) -> Pair:
        gate_up, down = config.names.of_expert(layer, expert)
        return source.linear(gate_up), source.linear([down])

    router = source.linear([config.router_of(layer)])
    pairs: Sequence[Pair]
    if residents is None:
        pairs = [read(expert) for expert in range(experts.count)]
    else:
        pairs = ColdPairs(read, experts.count, layer, residents)
    biases, shared = read_biases(config, source, layer), read_shared(config, source, layer)
    offsets = np.zeros(experts.count, np.float32)
    if experts.has_offsets:
        offsets = np.asarray(source.vector([config.names.of_layer(layer, config.names.router_offset)]))
    return ExpertLayer(config, experts, router, pairs, workers, biases, shared, offsets)
