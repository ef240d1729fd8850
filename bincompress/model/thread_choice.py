"""How many threads are fastest just now? Fewer than there are, while another program has one of their cores.

The system takes a thread off its core for milliseconds, and all others wait for it at the end of every product.
"""

import time

from bincompress.process import systems
from cpu_kernels.parallel.workers import Workers

WINDOW = 0.08  # seconds of work that one measurement takes: several turns of two programs on one core
_LAPS = 2  # and so many laps at least
PUT_OFF = 30  # threads put off their cores, per second, from which fewer may be faster: one busy core gives 100 or more
FIRST_WAIT, LAST_WAIT = 0.5, 2.0  # seconds from one trial to the next: doubled while trials change nothing
_REST = 10  # ... and so many times as long as a measurement takes, where passes are slow
REMEMBERED = 20.0  # seconds for which a measurement of other numbers of threads is believed
_NEAR = 1.15  # all threads are not doubted while they are so many times faster than fewer were
_GAIN = 1.02  # another number must be so many times faster to be used
_FLATTERED = 1.1  # threads that were put off are so many times slower in the long run than in a short measurement
FEW_TOKENS = 16  # passes of so many are measured whole, as their layers are short


class ThreadChoice:
    """Chooses among all threads, one less, and one, by the times that work takes.

    All work until many were put off their cores and are not much faster than fewer were. Then the same kind of work is
    measured with each number in turn, and the fastest is kept. While fewer work, all are tried again now and then.
    """

    def __init__(self, most: int) -> None:
        self.threads = most  # to be used for the work that comes next
        self._most = most
        self._kept = most  # what trials found; `threads` differs from it during one
        self._numbers = sorted({most, max(1, most - 1), 1}, reverse=True)
        self._left: list[int] = []  # numbers that this trial has still to measure
        self._rates: dict[int, float] = {}  # work per second that it has measured, or less where threads were put off
        self._wait, self._last = FIRST_WAIT, -REMEMBERED
        self._taken = 0.0  # seconds of the last measurement in a trial
        self._restart()

    def _restart(self) -> None:
        self._work = self._seconds = 0.0
        self._laps = self._put_off = 0

    def record(self, now: float, seconds: float, work: float, put_off: int) -> None:
        """Learn how long some work took with `threads` threads, and how often one was put off; may change `threads`.

        now: seconds of a clock that never goes back; work: in any unit, the same each time.
        """
        self._seconds += seconds
        self._work += work
        self._laps += 1
        self._put_off += put_off
        if self._seconds < WINDOW or self._laps < _LAPS:
            return
        measured = self._seconds
        rate, put_off_rate = self._work / self._seconds, self._put_off / self._seconds
        self._restart()
        put_off_often = put_off_rate >= PUT_OFF and self.threads > 1
        lasting = rate / _FLATTERED if put_off_often else rate
        if self._left:
            self._rates[self._left.pop(0)], self._taken = lasting, measured
        elif self._doubtful(now, rate, put_off_often):
            self._rates = {self._kept: lasting}
            self._left = [number for number in self._numbers if number != self._kept]
        else:
            return
        if self._left:
            self.threads = self._left[0]
        else:
            self._decide(now)

    def _doubtful(self, now: float, rate: float, put_off_often: bool) -> bool:
        """Return whether other numbers of threads are to be tried."""
        since = now - self._last
        if self._kept < self._most:
            return since >= max(self._wait, _REST * self._taken)
        if not put_off_often:
            return False
        fewer = max((found for number, found in self._rates.items() if number < self._most), default=rate)
        if rate < _NEAR * fewer:
            return since >= max(self._wait, _REST * self._taken)
        return since >= max(REMEMBERED, 10 * _REST * self._taken)

    def _decide(self, now: float) -> None:
        best = max(self._rates, key=lambda number: self._rates[number])
        if self._rates[best] > _GAIN * self._rates[self._kept]:
            self._kept, self._wait = best, FIRST_WAIT
        else:
            self._wait = min(2 * self._wait, LAST_WAIT)
        self.threads, self._last = self._kept, now


class Adapting:
    """Sets how many of the workers work, pass by pass; for one caller at a time, who holds their lock."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        # By the tokens of a pass: a token's share of a pass is less in one of many.
        self._choices: dict[int, ThreadChoice] = {}
        self._choice: ThreadChoice | None = None
        self._by_layer = False
        self._begun, self._put_off = 0.0, 0

    def begin(self, tokens: int) -> None:
        """Begin a pass of so many tokens."""
        self._choice = None
        put_off = systems.times_put_off() if self._workers.threads > 1 else None
        if put_off is None:  # one thread, or Windows, which does not count: all threads are used always
            return
        kind = min(tokens, FEW_TOKENS + 1)
        if (choice := self._choices.get(kind)) is None:
            choice = self._choices[kind] = ThreadChoice(self._workers.threads)
        self._choice, self._by_layer = choice, tokens > FEW_TOKENS
        self._workers.active = choice.threads
        self._put_off = put_off
        self._begun = time.perf_counter()

    def layer_done(self, work: int) -> None:
        """Learn, in a pass of many tokens, that a layer has done so much work, in any unit."""
        if self._by_layer and self._choice is not None:
            self._record(self._choice, work)

    def pass_done(self) -> None:
        """Learn, of a pass of few tokens, that its logits are there."""
        choice, self._choice = self._choice, None
        if choice is not None and not self._by_layer:
            self._record(choice, 1)

    def _record(self, choice: ThreadChoice, work: int) -> None:
        now, put_off = time.perf_counter(), systems.times_put_off() or 0
        choice.record(now, now - self._begun, work, put_off - self._put_off)
        self._workers.active = choice.threads
        self._begun, self._put_off = now, put_off
