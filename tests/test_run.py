"""Does a run survive what happens to runs: kills, full disks, other settings, other drivers, bad tensors?"""

import contextlib
import functools
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bincompress.compression.records import Job, JobReport
from bincompress.compression.run import compress
from bincompress.compression.runner import Processes, run_local
from bincompress.errors import StoreError
from bincompress.reporting.inspection import inspect
from bincompress.store.store import open_store
from tests.conftest import tiny_config, tiny_tensors, write_model
from tests.forked import Forked
from tests.gates import dies_when_done
from tests.runs import Tree, plan_of, problems, run


def test_a_store_is_complete_and_verifies(tiny_model: Path, tmp_path: Path) -> None:
    outcome = run(tiny_model, tmp_path / "store")
    assert (outcome.done, outcome.unchanged, outcome.failures, outcome.complete) == (21, 0, {}, True)
    assert open_store(str(tmp_path / "store")).attributes["status"] == "complete"
    assert problems(tmp_path / "store") == {}
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("options", [{"embeddings": "8bit"}, {"groups": 5, "block": "matrix"}, {"method": "xnor"}])
def test_bytes_do_not_depend_on_workers_or_chance(
    tiny_model: Path, tmp_path: Path, tree: Tree, processes: Processes, options: dict[str, Any]
) -> None:
    run(tiny_model, tmp_path / "one", **options)
    plan = plan_of(tiny_model, **options)
    runner = functools.partial(run_local, workers=2, processes=processes)
    compress(plan, str(tmp_path / "two"), runner=lambda jobs: runner(list(reversed(jobs))))
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_a_store_may_have_any_name(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("s", "g"):  # which stand in "assets/" and "log/" too
        assert run(tiny_model, name).complete
        assert problems(name) == {}


def test_an_interrupt_is_not_for_workers() -> None:
    with Processes(1) as processes:
        assert processes.submit(ignores_interrupts, None).result()  # type: ignore[arg-type]


def ignores_interrupts(_: object) -> bool:
    return signal.getsignal(signal.SIGINT) == signal.SIG_IGN


KILLED = """
import os, signal, sys
from pathlib import Path
from typing import BinaryIO
from bincompress.store.store import Store
from tests.runs import run
real, seen = Store.commit, 0
def commit(self, name, attributes):
    global seen
    seen += 1
    if seen == 6:
        os.kill(os.getpid(), signal.SIGKILL)  # the arrays of the sixth tensor lie there, its commit does not
    real(self, name, attributes)
Store.commit = commit
run(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_kill_in_the_middle_and_resume(forked: Forked, tiny_model: Path, tmp_path: Path, tree: Tree) -> None:
    store = tmp_path / "store"
    killed = forked(tiny_model, store, code=KILLED)
    assert killed.returncode == -9
    assert open_store(str(store)).attributes["status"] == "incomplete"
    (store / "tensors" / ".0123.partial").write_bytes(b"what a killed writer leaves")
    outcome = run(tiny_model, store)
    assert (outcome.done, outcome.unchanged) == (16, 5)
    run(tiny_model, tmp_path / "undisturbed")
    assert tree(store) == tree(tmp_path / "undisturbed")


def test_a_changed_source_is_noticed(tiny_model: Path, tmp_path: Path) -> None:
    run(tiny_model, tmp_path / "store")
    for path in tiny_model.glob("*.safetensors"):
        content = bytearray(path.read_bytes())
        content[-2] ^= 1
        path.write_bytes(content)
    outcome = run(tiny_model, tmp_path / "store")
    assert (outcome.done, outcome.unchanged) == (2, 19)


def test_a_store_that_was_copied_and_touched_is_the_same_store(tiny_model: Path, tmp_path: Path, tree: Tree) -> None:
    """As archives, working trees and file browsers leave it."""
    run(tiny_model, tmp_path / "store")
    copied = tmp_path / "copied"
    shutil.copytree(tmp_path / "store", copied, copy_function=shutil.copyfile)  # without times and modes
    for path in copied.rglob("*"):
        os.utime(path, (0, 0))
    before = tree(copied)
    assert before == tree(tmp_path / "store")
    (copied / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (copied / ".git").mkdir()
    (copied / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    assert problems(copied) == {}
    outcome = run(tiny_model, copied)
    assert (outcome.done, outcome.unchanged, outcome.complete) == (0, 21, True)
    assert (copied / ".git" / "HEAD").read_text() == "ref: refs/heads/main\n"


def test_other_settings_are_refused_and_nothing_is_lost(tiny_model: Path, tmp_path: Path, tree: Tree) -> None:
    store = tmp_path / "store"
    run(tiny_model, store)
    before = tree(store)
    with pytest.raises(StoreError, match=r"recipe\.defaults\.groups is 2 there and 4 now; .*--overwrite"):
        run(tiny_model, store, groups=4)
    other = write_model(tmp_path / "other", tiny_tensors(layers=1), tiny_config(layers=1))
    with pytest.raises(StoreError, match="other settings: source"):
        run(other, store)
    assert tree(store) == before
    assert compress(plan_of(tiny_model, groups=4), str(store), overwrite=True).complete
    assert open_store(str(store)).attributes["recipe"]["defaults"]["groups"] == 4


def test_overwrite_removes_nothing_but_stores(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "precious"
    folder.mkdir()
    (folder / "thesis.txt").write_text("words")
    with pytest.raises(StoreError, match="not a bincompress store"):
        compress(plan_of(tiny_model), str(folder), overwrite=True)
    with pytest.raises(StoreError, match="nothing was changed"):
        run(tiny_model, folder)
    assert (folder / "thesis.txt").read_text() == "words"


@pytest.mark.parametrize("options", [{}, {"block": "matrix"}, {"block": "matrix", "method": "xnor"}])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_bad_tensor_fails_by_name_and_the_others_are_done(
    tmp_path: Path, value: float, options: dict[str, Any]
) -> None:
    tensors = tiny_tensors()
    bad = "model.layers.1.mlp.up_proj.weight"
    tensors[bad][3, 5] = value
    model = write_model(tmp_path / "model", tensors, tiny_config())
    store = tmp_path / "store"
    outcome = run(model, store, **options)
    assert list(outcome.failures) == [bad]
    assert "row 3, column 5; expected finite weights" in outcome.failures[bad]
    assert (outcome.done, outcome.complete) == (20, False)
    assert open_store(str(store)).attributes["failures"] == outcome.failures
    found = inspect(open_store(str(store)))
    assert found["tensors"][bad]["status"] == "missing"
    assert found["total"]["complete"] == 20
    assert list(problems(store)) == [bad]


@pytest.mark.slow
def test_a_dead_worker_is_retried_and_given_up_by_name(tiny_model: Path, tmp_path: Path) -> None:
    # A job whose settings kill whoever runs it stands for one that runs out of memory.
    jobs: list[Job] = []

    def collect(found: Sequence[Job]) -> Iterator[JobReport]:
        jobs.extend(found)
        return
        yield

    compress(plan_of(tiny_model), str(tmp_path / "store"), runner=collect)  # type: ignore[arg-type]
    deadly = Job(str(tmp_path / "store"), jobs[0].name, jobs[0].source, _Deadly())  # type: ignore[arg-type]
    reports = {report.name: report for report in run_local([deadly, *jobs[1:]], workers=2)}
    assert len(reports) == 21
    assert "worker process died twice" in reports[deadly.name].error
    assert {report.status for report in reports.values() if report.name != deadly.name} == {"done"}


@pytest.mark.slow
def test_what_a_dead_worker_had_done_counts_as_done_by_this_run_alone(tiny_model: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def runner(jobs: Sequence[Job]) -> Iterator[JobReport]:
        return run_local(jobs, workers=2, work=functools.partial(dies_when_done, name))

    for done, unchanged in ((21, 0), (0, 21)):  # a fresh store, and one that an earlier run has completed
        outcome = compress(plan_of(tiny_model), str(tmp_path / "store"), runner=runner)  # type: ignore[arg-type]
        assert (outcome.done, outcome.unchanged, outcome.failures, outcome.complete) == (done, unchanged, {}, True)
    assert problems(tmp_path / "store") == {}


class _Deadly:
    def __reduce__(self) -> tuple[Callable[[int], object], tuple[int]]:
        return os._exit, (9,)


def test_two_drivers_at_once(tiny_model: Path, tmp_path: Path) -> None:
    inside, leave = threading.Event(), threading.Event()

    def slow(jobs: Sequence[Job]) -> Iterator[JobReport]:
        inside.set()
        assert leave.wait(60)
        yield from run_local(jobs)

    first = threading.Thread(
        target=lambda: compress(plan_of(tiny_model), str(tmp_path / "store"), runner=slow)  # type: ignore[arg-type]
    )
    first.start()
    assert inside.wait(60)
    try:
        with pytest.raises(StoreError, match="another bincompress is writing to it"):
            run(tiny_model, tmp_path / "store")
    finally:
        leave.set()
        first.join()
    assert problems(tmp_path / "store") == {}


def test_an_object_store_notices_a_second_driver_at_commit(tiny_model: Path) -> None:
    url = "memory://two-drivers"

    def interrupted(jobs: Sequence[Job]) -> Iterator[JobReport]:
        reports = run_local(jobs)
        yield next(reports)
        assert run(tiny_model, url).complete  # a second driver takes over while the first is between two jobs
        yield from reports

    with contextlib.suppress(StoreError):
        outcome = compress(plan_of(tiny_model), url, runner=interrupted)  # type: ignore[arg-type]
        assert not outcome.failures
    assert problems(url) == {}
    assert "run_id" not in open_store(url).attributes


def test_an_object_store_has_the_same_bytes_and_resumes(tiny_model: Path, tmp_path: Path) -> None:
    url = "memory://plain-store"
    assert run(tiny_model, url).done == 21
    assert run(tiny_model, url).unchanged == 21
    run(tiny_model, tmp_path / "local")
    local, remote = open_store(str(tmp_path / "local")), open_store(url)
    for name in local.tensors():
        assert local.node_attributes(name) == remote.node_attributes(name)
