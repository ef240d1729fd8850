"""Are fewer threads used while another program has a core, all of them otherwise, and are results the same bits?"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bincompress.inference.load import load_decoder
from bincompress.model import thread_choice
from bincompress.model.cache import KvCache
from bincompress.model.packed_linear import ActivationSettings
from bincompress.model.thread_choice import REMEMBERED, ThreadChoice

LAP = 0.01  # seconds of work of one thread


class Machine:
    """A machine that is told how fast it is with so many threads, and how often one is put off, per second."""

    def __init__(self, most: int) -> None:
        self.choice, self.now = ThreadChoice(most), 100.0
        self.used: list[tuple[float, int]] = []  # seconds of each lap, and the threads that it had

    def work(self, seconds: float, speed: Callable[[int], float], put_off: Callable[[int], float]) -> dict[int, float]:
        """Work so long, and return the share of the time that each number of threads had."""
        end, used, left = self.now + seconds, dict[int, float](), 0.0
        while self.now < end:
            threads = self.choice.threads
            lap = LAP / speed(threads)
            self.now += lap
            left += put_off(threads) * lap
            self.choice.record(self.now, lap, 1.0, int(left))
            left %= 1
            used[threads] = used.get(threads, 0.0) + lap / seconds
        return used


def quiet(threads: int) -> float:
    return 0.8 * threads + 0.2


def never(threads: int) -> float:
    return 0.0


def often(threads: int) -> float:
    return 120.0 if threads > 1 else 0.0


@pytest.mark.parametrize("threads", [2, 4, 8])
def test_on_a_quiet_machine_all_threads_work(threads: int) -> None:
    assert Machine(threads).work(60, quiet, never) == {threads: pytest.approx(1, abs=0.01)}


def test_threads_that_are_put_off_and_lose_little_are_doubted_rarely() -> None:
    used = Machine(2).work(10 * REMEMBERED, quiet, often)
    assert used[1] < 0.01  # of the time, which costs less than 0.5%


def test_one_thread_works_while_the_other_is_held_up_and_both_soon_after() -> None:
    machine = Machine(2)
    machine.work(1, quiet, never)
    used = machine.work(10, lambda threads: 1.0 if threads == 1 else 0.85, often)
    assert used[1] > 0.9
    machine.work(2.5, quiet, never)
    assert machine.work(10, quiet, never) == {2: pytest.approx(1, abs=0.01)}


def test_of_many_threads_one_less_works_beside_one_busy_core() -> None:
    machine = Machine(8)
    used = machine.work(20, lambda threads: threads if threads < 8 else 4.0, lambda threads: 120.0 * (threads == 8))
    assert used[7] > 0.85


def test_a_slow_pass_is_enough_for_a_measurement() -> None:
    choice, now = ThreadChoice(2), 0.0
    for _ in range(6):  # a second each with two threads, half of that with one
        seconds = 1.0 if choice.threads == 2 else 0.5
        now += seconds
        choice.record(now, seconds, 1.0, 200)
    assert choice.threads == 1


def test_logits_are_the_same_bits_whatever_number_of_threads_works(
    demo_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = np.arange(3, 80)
    changes = 0

    class Restless(ThreadChoice):
        def record(self, now: float, seconds: float, work: float, put_off: int) -> None:
            nonlocal changes
            self.threads, changes = 1 + changes % 3, changes + 1

    def logits(threads: int) -> list[np.ndarray]:
        decoder = load_decoder(str(demo_store), threads, ActivationSettings(), None, None).decoder
        cache: KvCache = decoder.new_cache(128, "float16")
        found = [decoder.next_logits(part, cache) for part in (ids[:60], ids[60:65], *ids[65:, None])]
        assert decoder.workers.threads == threads
        decoder.workers.close()
        return found

    expected = logits(1)
    np.testing.assert_array_equal(logits(2), expected)
    monkeypatch.setattr(thread_choice, "ThreadChoice", Restless)
    np.testing.assert_array_equal(logits(3), expected)
    assert changes > 12


def test_a_thread_that_is_put_off_is_seen(demo_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the system counts reaches the choice, and what it chooses the workers."""
    resource = pytest.importorskip("resource")
    counted = 0

    class Usage:
        @property
        def ru_nivcsw(self) -> int:
            nonlocal counted
            counted += 50
            return counted

    monkeypatch.setattr(resource, "getrusage", lambda who: Usage())
    monkeypatch.setattr(thread_choice, "WINDOW", 0.0)
    decoder = load_decoder(str(demo_store), 2, ActivationSettings(), None, None).decoder
    cache = decoder.new_cache(32, "float16")
    seen = set()
    for token in range(3, 12):
        decoder.next_logits([token], cache)
        seen.add(decoder.workers.active)
    assert seen == {1, 2}
    decoder.workers.close()
