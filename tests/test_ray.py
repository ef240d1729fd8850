"""Does a run on a real cluster survive what happens to clusters, and give the bytes of the run in process?"""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from bincompress import api, cli
from bincompress.calibration.collect import calibrate, run_in_threads, text_record
from bincompress.compression.events import JobEvent
from bincompress.compression.plan import make_plan
from bincompress.compression.recipe import load_recipe
from bincompress.compression.run import Outcome, Runner, compress
from bincompress.compression.runner import run_local
from bincompress.compression.sequential import in_sequence
from bincompress.errors import BincompressError, StoreError
from bincompress.sources.checkpoint import open_checkpoint
from bincompress.store.store import open_store
from jobs.calibration import run_on_ray
from jobs.runner import run_ray
from tests.gates import Notes, dies, gated, probe, wait_for
from tests.runs import Tree, plan_of, problems, run
from tests.s3 import CuttingProxy, s3_environment, s3_server
from tests.test_calibrate import SAMPLES

ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402

pytestmark = pytest.mark.slow  # a cluster, whose nodes start and end

LARGEST = "model.layers.0.mlp.down_proj.weight"  # begun first
AddNode = Callable[..., Any]
GB = 1 << 30


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without cores, to which tests add nodes."""
    quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 20}
    head = {"num_cpus": 0, "memory": GB, "object_store_memory": 100 << 20, "_system_config": quick}
    # What no test looks at: a dozen processes, which take longer to start than the cluster.
    head |= {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))  # of workers, for tests.gates
        started = Cluster(initialize_head=True, connect=False, head_node_args=head)
        ray.init(address=started.address, log_to_driver=False, logging_level="ERROR")
        yield started
        ray.shutdown()
        started.shutdown()


@pytest.fixture
def add_node(cluster: Cluster) -> Iterator[AddNode]:
    def add(num_cpus: int = 1, memory: int = 4 * GB, **environment: str) -> Any:
        return cluster.add_node(
            num_cpus=num_cpus, memory=memory, object_store_memory=100 << 20, env_vars=environment or None
        )

    before = set(cluster.worker_nodes)
    yield add
    remove(cluster, set(cluster.worker_nodes) - before)


def remove(cluster: Cluster, nodes: set[Any]) -> None:
    """End these nodes and wait until the cluster knows; until then it would still send them jobs, to be lost."""
    for node in nodes:
        # Ray's own `allow_graceful` kills it after a second, and a killed one is missed only after ten.
        for raylet in node.all_processes["raylet"]:
            raylet.process.terminate()
    for node in nodes:
        for raylet in node.all_processes["raylet"]:
            with contextlib.suppress(subprocess.TimeoutExpired):
                raylet.process.wait(20)
        cluster.remove_node(node)
    left = {node.node_id for node in cluster.list_all_nodes()}
    wait_for(lambda: {node["NodeID"] for node in ray.nodes() if node["Alive"]} <= left)


@pytest.fixture
def home(cluster: Cluster) -> None:
    """A node of two cores that tests share, as starting one takes seconds; those that look at nodes go without."""
    # A machine that stood still for a while finds its nodes declared dead, though their records are still here.
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    remove(cluster, {node for node in cluster.worker_nodes if node.node_id not in alive})
    if not cluster.worker_nodes:
        cluster.add_node(num_cpus=2, memory=4 * GB, object_store_memory=100 << 20)


@pytest.fixture
def no_home(cluster: Cluster) -> None:
    """No node but those that the test adds."""
    remove(cluster, set(cluster.worker_nodes))


@pytest.fixture
def notes(tmp_path: Path) -> Notes:
    return Notes(tmp_path / "notes")


def on_ray(model: Path, store: Path | str, **options: Any) -> tuple[Outcome, list[JobEvent]]:
    events: list[JobEvent] = []
    runner = functools.partial(run_ray, on_event=events.append, **options)
    return compress(plan_of(model), str(store), runner=runner), events


def begin_on_ray(model: Path, store: Path, notes: Notes) -> Callable[[], tuple[Outcome, list[JobEvent]]]:
    """Begin a run whose first job waits for its release, beside the test; the returned function waits for its end."""
    future: Future[tuple[Outcome, list[JobEvent]]] = Future()

    def work() -> None:
        try:
            future.set_result(on_ray(model, store, work=functools.partial(gated, notes.folder, LARGEST)))
        except BaseException as error:
            future.set_exception(error)

    # Not a pool's thread: where a test fails before the job is released, the process would wait for it for ever.
    threading.Thread(target=work, daemon=True).start()
    return future.result


def assert_same_store(model: Path, store: Path, tree: Tree) -> None:
    run(model, store.with_name("undisturbed"))
    assert tree(store) == tree(store.with_name("undisturbed"))
    assert problems(store) == {}


def test_a_killed_worker(home: None, tiny_model: Path, tmp_path: Path, tree: Tree, notes: Notes) -> None:
    end = begin_on_ray(tiny_model, tmp_path / "store", notes)
    os.kill(wait_for(lambda: notes.runs(LARGEST))[0][0], signal.SIGKILL)
    outcome, events = end()
    assert (outcome.done, outcome.complete) == (21, True)
    assert [event.name for event in events if event.event == "lost"] == [LARGEST]
    assert notes.done_twice() == {LARGEST}
    assert_same_store(tiny_model, tmp_path / "store", tree)


@pytest.mark.parametrize("end", ["killed", "interrupted", "interrupted twice"])
def test_a_driver_ends_early_and_the_next_one_goes_on(
    cluster: Cluster, home: None, tiny_model: Path, tmp_path: Path, tree: Tree, notes: Notes, end: str
) -> None:
    held, store, events = "lm_head.weight", tmp_path / "store", tmp_path / "events"
    code = "import sys; from tests.gates import drive; drive(*sys.argv[1:])"
    arguments = [cluster.address, tiny_model, store, notes.folder, held, events]
    driver = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], cwd=Path(__file__).parents[1])
    worker, _ = wait_for(lambda: notes.runs(held))[0]
    before = set(notes.all_runs()) - {held}
    if end == "killed":
        driver.kill()
        assert driver.wait(60) == -signal.SIGKILL
    else:
        driver.send_signal(signal.SIGINT)
        wait_for(lambda: "stopping" in events.read_text())
        if end == "interrupted":
            notes.release()
            before |= {held}
        else:
            driver.send_signal(signal.SIGINT)
        assert driver.wait(60) == 130
    wait_for(lambda: not psutil.pid_exists(worker))
    assert len(notes.all_runs()) < 21
    assert on_ray(tiny_model, store)[0].unchanged == len(before)
    assert_same_store(tiny_model, store, tree)


def test_a_job_that_always_dies_is_given_up_by_name(home: None, tiny_model: Path, tmp_path: Path, tree: Tree) -> None:
    store = tmp_path / "store"
    outcome, events = on_ray(tiny_model, store, work=functools.partial(dies, LARGEST))
    assert list(outcome.failures) == [LARGEST]
    assert "its worker process died (3 of at most 3 times)" in outcome.failures[LARGEST]
    assert [event.event for event in events if event.name == LARGEST] == ["submitted", "lost"] * 2 + ["submitted"]
    assert (outcome.done, outcome.complete) == (20, False)
    outcome, _ = on_ray(tiny_model, store)
    assert (outcome.done, outcome.unchanged) == (1, 20)
    assert_same_store(tiny_model, store, tree)


def large_first(size: int, **options: Any) -> Runner:
    """A runner for which the first job needs so many bytes of memory."""
    return lambda jobs: run_ray([replace(jobs[0], peak_memory=size), *jobs[1:]], **options)


def test_a_job_too_big_for_every_node(
    home: None, add_node: AddNode, tiny_model: Path, tmp_path: Path, tree: Tree
) -> None:
    store = tmp_path / "store"
    outcome = compress(plan_of(tiny_model), str(store), runner=large_first(1 << 45, patience=0))
    assert list(outcome.failures) == [LARGEST]
    assert "needs 35,184,372 MB of memory, and the largest node has 4,295 MB" in outcome.failures[LARGEST]
    assert outcome.done == 20
    added: list[JobEvent] = []

    def on_event(event: JobEvent) -> None:
        if event.event == "waiting":
            added.append(event)
            add_node(memory=16 * GB)

    outcome = compress(plan_of(tiny_model), str(store), runner=large_first(8 * GB, on_event=on_event))
    assert (outcome.done, outcome.unchanged, len(added)) == (1, 20, 1)
    assert_same_store(tiny_model, store, tree)


def test_a_node_with_another_version(home: None, tiny_model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("jobs.runner.__version__", "0.0.1")
    with pytest.raises(
        StoreError, match=r"has bincompress .*, the driver 0\.0\.1; install the same version .*; 0 of 21"
    ):
        on_ray(tiny_model, tmp_path / "store")


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["bincompress", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as error:
        return int(str(error.code or 0))
    return 0


def test_the_command_line(
    home: None, tiny_model: Path, tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, events = tmp_path / "store", tmp_path / "events.jsonl"
    options = ["--runner", "ray", "--max-in-flight", 3, "--memory-per-job", "500MB", "--events", events]
    assert call(monkeypatch, "compress", tiny_model, store, *options) == 0
    seen = [json.loads(line) for line in events.read_text().splitlines()]
    flying = most = 0
    for event in seen:
        flying += 1 if event["event"] == "submitted" else -1
        most = max(most, flying)
    assert (most, flying, len(seen)) == (3, 0, 42)
    assert all(event["node"] and event["seconds"] > 0 for event in seen if event["event"] == "done")
    assert_same_store(tiny_model, store, tree)
    manifest = tmp_path / "models.toml"
    manifest.write_text("".join(f'[[model]]\nsource = "{tiny_model}"\nstore = "{tmp_path / n}"\n' for n in "ab"))
    assert call(monkeypatch, "batch", manifest, "--runner", "ray") == 0
    assert tree(tmp_path / "a") == tree(tmp_path / "b") == tree(store)


def kill_one(name: str) -> bool:
    """Kill a worker of this test's cluster that is doing such a task, if there is one."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[:1] == [name]:
                process.kill()
                return True
    return False


def test_calibration_loses_a_worker_and_gives_the_local_bytes(
    home: None, tiny_model: Path, tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(tiny_model)
    monkeypatch.setattr("bincompress.calibration.collect._PART_TOKENS", 64)  # the driver alone decides what a part is
    samples = np.random.default_rng(0).integers(0, 96, (5, 32))
    here, there = tmp_path / "here", tmp_path / "there"
    calibrate(checkpoint, samples, str(here), runner=run_in_threads(2))
    with ThreadPoolExecutor(1) as pool:
        end = pool.submit(calibrate, checkpoint, samples, str(there), runner=run_on_ray(None, str(there)))
        wait_for(lambda: kill_one("ray::run_part"))
        end.result()
    assert tree(here) == tree(there)
    (tiny_model / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(BincompressError, match=r"layer 0, part 0: .*; the same command resumes"):
        calibrate(checkpoint, samples, str(there), runner=run_on_ray(None, str(there)), overwrite=True)


def test_layer_after_layer_gives_the_local_bytes(home: None, tiny_model: Path, tmp_path: Path, tree: Tree) -> None:
    recipe = load_recipe(None, {"method": "dbellquant", "planes": 1})
    plan = make_plan(open_checkpoint(tiny_model), recipe, sequence=text_record(SAMPLES))
    for store, runner in ((tmp_path / "here", run_local), (tmp_path / "there", run_ray)):
        compress(plan, str(store), runner=in_sequence(plan.checkpoint, SAMPLES, str(store), runner))
    assert tree(tmp_path / "here") == tree(tmp_path / "there")


def test_training_loses_a_worker_and_gives_the_local_bytes(
    home: None, letters_model: Path, tmp_path: Path, tree: Tree
) -> None:
    torch = pytest.importorskip("torch")
    settings = pytest.importorskip("bincompress.distillation.settings")
    torch.set_num_threads(1)
    text = tmp_path / "text.txt"
    text.write_text("".join(map(chr, np.random.default_rng(3).integers(33, 127, 900))))
    layers = settings.LayerSettings(windows=24, context=16, passes=2, inputs="unquantized")
    here, there = str(tmp_path / "here"), str(tmp_path / "there")
    api.train(letters_model, here, text, layers=layers, device="cpu", threads=1)
    with ThreadPoolExecutor(1) as pool:
        end = pool.submit(
            api.train, letters_model, there, text, layers=layers, device="cpu", threads=1, runner="ray", address="auto"
        )
        wait_for(lambda: kill_one("ray::run_layer"))
        end.result()
    same = [{name: open_store(url).complete_attributes(name)["hashes"] for name in open_store(url).tensors()}
            for url in (here, there)]  # fmt: skip
    assert same[0] == same[1]


def test_without_ray(tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert call(monkeypatch, "compress", tiny_model, tiny_model.parent / "store", "--runner", "ray") == 2
    assert "pip install 'bincompress[ray]'" in capsys.readouterr().err


@pytest.mark.parametrize("with_its_worker", [False, True])
def test_a_killed_raylet(
    no_home: None, add_node: AddNode, tiny_model: Path, tmp_path: Path, tree: Tree, notes: Notes, with_its_worker: bool
) -> None:
    nodes = [add_node(), add_node()]
    end = begin_on_ray(tiny_model, tmp_path / "store", notes)
    worker, place = wait_for(lambda: notes.runs(LARGEST))[0]
    (node,) = [node for node in nodes if node.node_id == place]
    (raylet,) = node.all_processes["raylet"]
    os.kill(raylet.process.pid, signal.SIGKILL)
    if with_its_worker:
        os.kill(worker, signal.SIGKILL)
    else:
        notes.release()  # an orphaned worker may live long enough to finish its job
    outcome, events = end()
    assert (outcome.done, outcome.complete) == (21, True)
    lost = {event.name for event in events if event.event == "lost"}
    assert lost == ({LARGEST} if with_its_worker else notes.done_twice())
    assert notes.done_twice() <= {LARGEST}
    assert_same_store(tiny_model, tmp_path / "store", tree)


def test_a_node_comes_and_goes(
    no_home: None, cluster: Cluster, add_node: AddNode, tiny_model: Path, tmp_path: Path, tree: Tree, notes: Notes
) -> None:
    add_node()
    end = begin_on_ray(tiny_model, tmp_path / "store", notes)
    wait_for(lambda: notes.runs(LARGEST))
    guest = add_node()
    wait_for(lambda: any(run[1] == guest.node_id for runs in notes.all_runs().values() for run in runs))
    cluster.remove_node(guest, allow_graceful=True)
    notes.release()
    outcome, events = end()
    assert (outcome.done, outcome.complete) == (21, True)
    assert notes.done_twice() <= {event.name for event in events if event.event == "lost"}
    assert_same_store(tiny_model, tmp_path / "store", tree)


def test_a_cluster_without_cores(no_home: None, cluster: Cluster, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(BincompressError, match="no node of the Ray cluster has a core for the 21 jobs"):
        on_ray(tiny_model, tmp_path / "store", patience=0)
    there = str(tmp_path / "there")
    with pytest.raises(BincompressError, match="no node of the Ray cluster has a core for the rest of layer 0"):
        calibrate(
            open_checkpoint(tiny_model), np.ones((1, 8), np.int64), there, runner=run_on_ray(None, there, patience=0)
        )


def test_threads_and_the_kernel_cache(no_home: None, add_node: AddNode, tiny_model: Path, tmp_path: Path) -> None:
    for name in ("home", "temporary"):
        (tmp_path / name).mkdir()
    add_node(
        num_cpus=2,
        HOME=str(tmp_path / "home"),
        TMPDIR=str(tmp_path / "temporary"),
        BINCOMPRESS_CACHE="",
        XDG_CACHE_HOME="",
    )
    found: list[dict[str, Any]] = []
    compress(
        plan_of(tiny_model),
        str(tmp_path / "store"),
        runner=functools.partial(run_ray, work=probe),
        on_report=lambda report: found.append(report.report),
    )
    assert len({report["pid"] for report in found}) == 2
    # Numba's cache has a file of code (.nbc) for each kernel: as many were compiled, so none of them twice.
    cached = list((tmp_path / "temporary").rglob("*.nbc"))
    kernels = {path.name.split("-")[0].split(".")[-1] for path in cached}
    compiled = [name for report in found for name in report["compiled"] if name in kernels]
    assert len(compiled) == len(cached) > 0
    assert all(report["threads"] == ["1", "1", "1"] for report in found)
    assert all(report["cache"].startswith(str(tmp_path / "temporary")) for report in found)
    assert not list((tmp_path / "home").rglob("*.nbi"))


def test_object_store_with_dropped_connections(
    no_home: None, add_node: AddNode, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_server() as upstream, CuttingProxy(upstream) as proxy:
        environment = s3_environment(proxy.url) | {"AWS_MAX_ATTEMPTS": "2"}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        add_node(num_cpus=2, **environment)
        url = "s3://bucket/ray"
        proxy.cut(f"{LARGEST}/planes/c/0", times=1)
        outcome, _ = on_ray(tiny_model, url)
        assert (outcome.done, outcome.failures, proxy.cuts) == (21, {}, 1)
        proxy.cut(f"ray-second/tensors/{LARGEST}/planes/c/0", times=1000)
        outcome, _ = on_ray(tiny_model, "s3://bucket/ray-second")
        assert list(outcome.failures) == [LARGEST]
        assert outcome.done == 20
        proxy.cut("", times=0)
        outcome, _ = on_ray(tiny_model, "s3://bucket/ray-second")
        assert (outcome.done, outcome.unchanged) == (1, 20)
        run(tiny_model, tmp_path / "local")
        local = open_store(str(tmp_path / "local"))
        for remote in (open_store(url), open_store("s3://bucket/ray-second")):
            assert remote.attributes == local.attributes
            for name in local.tensors():
                assert remote.node_attributes(name) == local.node_attributes(name)
            assert problems(remote.url) == {}
