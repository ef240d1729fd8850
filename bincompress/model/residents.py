"""Which experts are in memory where not all of them fit? Those that were used last; the others are read when chosen."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from bincompress.model.linear import Linear
from bincompress.process.machine import size_text

Pair = tuple[Linear, Linear]  # an expert's gate and up as one matrix (2 * inner, hidden), and down (hidden, inner)


class Residents:
    """The experts of all layers that are in memory, up to a number of bytes.

    Threads may ask for different experts at the same time; each may then be over the limit by the one that it reads.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0  # bytes
        self.asked = self.read = 0  # how often an expert was asked for, and was not there
        self._held: OrderedDict[tuple[int, int], tuple[int, Callable[[], None]]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._held)

    def use(self, layer: int, expert: int) -> None:
        """Note that an expert that is there is used."""
        with self._lock:
            self.asked += 1
            if (layer, expert) in self._held:
                self._held.move_to_end((layer, expert))

    def hold(self, layer: int, expert: int, nbytes: int, drop: Callable[[], None]) -> None:
        """Note an expert that was read, and drop those that were not used for longest until all fit the limit."""
        dropped = []
        with self._lock:
            self.asked += 1
            self.read += 1
            self.used -= self._held.pop((layer, expert), (0, drop))[0]  # there where an interrupt came after it
            self._held[layer, expert] = nbytes, drop
            self.used += nbytes
            while self.used > self.limit and len(self._held) > 1:
                size, let_go = self._held.popitem(last=False)[1]
                self.used -= size
                dropped.append(let_go)
        for let_go in dropped:
            let_go()

    def line(self, experts: int) -> str:
        """Return what a summary says, of so many experts in all."""
        share = 100 * self.read / max(1, self.asked)
        return (
            f"experts in memory: {len(self):,} of {experts:,} ({size_text(self.used)}); {share:.1f}% of those that "
            "were chosen had to be read first"
        )


class ColdPairs(Sequence[Pair]):
    """A layer's experts, each read when it is asked for and not in memory."""

    def __init__(self, read: Callable[[int], Pair], count: int, layer: int, residents: Residents) -> None:
        self.forget: Callable[[int], None] = lambda expert: None  # told of each expert that is dropped
        self._read, self._count, self._layer, self._residents = read, count, layer, residents
        self._pairs: dict[int, Pair] = {}

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Pair]:
        return (self[expert] for expert in range(self._count))

    def use(self, experts: Sequence[int]) -> list[int]:
        """Note that those of these that are in memory are used, and return the others."""
        for expert in experts:
            if expert in self._pairs:
                self._residents.use(self._layer, expert)
        return self.absent(experts)

    def absent(self, experts: Sequence[int]) -> list[int]:
        """Return which of these are not in memory."""
        return [expert for expert in experts if expert not in self._pairs]

    def __getitem__(self, expert: int) -> Pair:  # type: ignore[override]
        pair = self._pairs.get(expert)
        if pair is not None:
            return pair
        pair = self._read(expert)
        nbytes = sum(int(getattr(linear, "nbytes", 0)) for linear in pair)
        self._residents.hold(self._layer, expert, nbytes, partial(self._drop, expert))
        self._pairs[expert] = pair
        return pair

    def _drop(self, expert: int) -> None:
        self._pairs.pop(expert, None)
        self.forget(expert)
