"""Is work shared among exactly the threads that there are, and nothing of it kept?"""

import threading
import weakref

import pytest

from bincompress.model.threads import in_turn, over_ranges
from cpu_kernels.parallel.workers import Workers


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("items", [1, 2, 7])
def test_every_item_is_done_once(threads: int, items: int) -> None:
    done: list[int] = []
    with Workers(threads) as workers:
        in_turn(workers, done.append, items)
        assert sorted(done) == list(range(items))
        over_ranges(workers, lambda start, stop, _: done.extend(range(start, stop)), items)
    assert sorted(done) == sorted([*range(items), *range(items)])


def test_a_thread_that_is_held_up_leaves_the_rest_to_the_others() -> None:
    done: list[int] = []
    last = threading.Event()

    def task(item: int) -> None:
        if item == 0:
            last.wait()
        done.append(item)
        if item == 5:
            last.set()

    with Workers(2) as workers:
        in_turn(workers, task, 6)
    assert sorted(done) == list(range(6))


def test_an_error_of_an_item_is_passed_on() -> None:
    def task(item: int) -> None:
        if item == 3:
            raise ValueError("item 3")

    with Workers(2) as workers, pytest.raises(ValueError, match="item 3"):
        in_turn(workers, task, 5)


def test_after_an_error_no_other_item_is_begun() -> None:
    done: list[int] = []

    def task(item: int) -> None:
        if item == 0:
            raise ValueError("item 0")
        done.append(item)

    with Workers(2) as workers, pytest.raises(ValueError, match="item 0"):
        in_turn(workers, task, 1_000_000)
    assert len(done) < 999_999


def test_waiting_threads_keep_nothing_of_what_they_did() -> None:
    class Task:
        def __call__(self) -> None:
            pass

    with Workers(2) as workers:
        tasks = [Task(), Task()]
        kept = [weakref.ref(task) for task in tasks]
        workers.run(tasks)
        del tasks
        assert [task() for task in kept] == [None, None]
