"""Does a run survive what happens to runs: kills, full disks, other settings, other drivers, bad tensors?"""

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import pytest
import zarr
import zarr.codecs
import zarr.storage

from bincompress.compression.plan import Plan, make_plan
from bincompress.compression.recipe import load_recipe
from bincompress.compression.records import Job, JobReport
from bincompress.compression.run import Outcome, compress
from bincompress.compression.runner import Processes, run_local
from bincompress.errors import StoreError
from bincompress.reporting.inspection import inspect
from bincompress.sources.checkpoint import open_checkpoint
from bincompress.store import files
from bincompress.store.arrays import read_array, write_array
from bincompress.store.files import LocalFiles
from bincompress.store.layout import parse_array, parse_node
from bincompress.store.store import open_store
from bincompress.store.verify import verify
from tests.conftest import tiny_config, tiny_tensors, write_model

Tree = Callable[[Path], dict[str, bytes]]


def plan_of(model: Path, **options: object) -> Plan:
    return make_plan(open_checkpoint(model), load_recipe(None, options))


def run(model: Path, store: Path | str, **options: object) -> Outcome:
    return compress(plan_of(model, **options), str(store))


def problems(store: Path | str) -> dict[str, str]:
    return {name: problem for name, problem in verify(open_store(str(store))) if problem}


def test_a_store_is_complete_and_verifies(tiny_model: Path, tmp_path: Path) -> None:
    outcome = run(tiny_model, tmp_path / "store")
    assert (outcome.done, outcome.unchanged, outcome.failures, outcome.complete) == (21, 0, {}, True)
    assert open_store(str(tmp_path / "store")).attributes["status"] == "complete"
    assert problems(tmp_path / "store") == {}
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("options", [{"embeddings": "8bit"}, {"groups": 5, "block": "matrix"}, {"method": "xnor"}])
def test_bytes_do_not_depend_on_workers_or_chance(
    tiny_model: Path, tmp_path: Path, tree: Tree, options: dict[str, Any]
) -> None:
    run(tiny_model, tmp_path / "one", **options)
    plan = plan_of(tiny_model, **options)
    compress(plan, str(tmp_path / "two"), runner=lambda jobs: run_local(list(reversed(jobs)), workers=2))
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
from tests.test_run import run
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


def test_kill_in_the_middle_and_resume(tiny_model: Path, tmp_path: Path, tree: Tree) -> None:
    store = tmp_path / "store"
    killed = subprocess.run([sys.executable, "-c", KILLED, tiny_model, store], check=False)
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


def test_a_full_disk_stops_the_run_and_keeps_what_is_complete(
    tiny_model: Path, tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, left = tmp_path / "store", 40_000
    real = files.replacing

    class Limited:
        def __init__(self, file: BinaryIO) -> None:
            self.file = file

        def write(self, content: bytes) -> None:
            nonlocal left
            left -= memoryview(content).nbytes
            if left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.file.name)
            self.file.write(content)

    @contextlib.contextmanager
    def replacing(path: Path) -> Iterator[Limited]:
        with real(path) as file:
            yield Limited(file)

    monkeypatch.setattr(files, "replacing", replacing)
    with pytest.raises(StoreError, match=r"No space left on device; (\d+) of 21 tensors are complete: .* run the same"):
        run(tiny_model, store)
    monkeypatch.undo()
    outcome = run(tiny_model, store)
    assert outcome.unchanged > 0
    assert outcome.complete
    run(tiny_model, tmp_path / "undisturbed")
    assert tree(store) == tree(tmp_path / "undisturbed")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", folder], check=False).returncode
    ):
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_really_full_disk(tiny_model: Path, small_disk: Path) -> None:
    with pytest.raises(StoreError, match="No space left on device"):
        run(tiny_model, small_disk / "store")
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    assert run(tiny_model, small_disk / "store").complete
    assert problems(small_disk / "store") == {}


def test_a_folder_that_cannot_be_written(tiny_model: Path) -> None:
    folder = Path(tempfile.mkdtemp(dir="/tmp" if Path("/tmp").is_dir() else None))
    folder.chmod(0o555)
    plan = plan_of(tiny_model)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)  # root writes everywhere
        with pytest.raises(StoreError, match="cannot be written: Permission denied"):
            compress(plan, str(folder / "store"))
    finally:
        os.seteuid(user)
        shutil.rmtree(folder)


def test_a_place_where_no_file_can_be_made(tiny_model: Path) -> None:
    with pytest.raises(StoreError, match="cannot be written"):
        run(tiny_model, "/proc/nothing")


def test_a_store_below_a_file(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="cannot be written"):
        run(tiny_model, tmp_path / "file" / "store")


@pytest.mark.parametrize("archive", [False, True])
def test_a_flipped_bit_is_found_by_name(tiny_model: Path, tmp_path: Path, archive: bool) -> None:
    store = tmp_path / "store"
    plan = make_plan(open_checkpoint(tiny_model), load_recipe(None, {}), archive=archive)
    compress(plan, str(store))
    name = "model.layers.1.self_attn.v_proj.weight"
    chunk = store / "tensors" / name / "planes" / "c" / "0" / "0" / "0"
    content = bytearray(chunk.read_bytes())
    content[100] ^= 4
    chunk.write_bytes(content)
    found = problems(store)
    assert list(found) == [name]
    assert "planes cannot be read" in found[name]
    # With a checksum that fits, the hash in the attributes still tells.
    values = open_store(str(store)).root[f"tensors/{name}/coef"]
    assert isinstance(values, zarr.Array)
    values[0, 0, 0] = np.asarray(values[0, 0, 0]) + 1
    chunk.write_bytes(bytes(content[:100]) + bytes([content[100] ^ 4]) + bytes(content[101:]))
    found = problems(store)
    assert "coef: its bytes are not those that were written" in found[name]


def test_a_damaged_asset_is_found(tiny_model: Path, tmp_path: Path) -> None:
    run(tiny_model, tmp_path / "store")
    array = open_store(str(tmp_path / "store")).root["assets/config.json"]
    assert isinstance(array, zarr.Array)
    array[0] = 32
    assert "bytes are not those" in problems(tmp_path / "store")["assets"]


def test_other_versions_and_other_stores_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    run(tiny_model, tmp_path / "store")
    root = zarr.open_group(tmp_path / "store")
    root.attrs["version"] = 99
    with pytest.raises(StoreError, match="store version 99; this program reads version 1"):
        open_store(str(tmp_path / "store"))
    with pytest.raises(StoreError, match="no such store"):
        open_store(str(tmp_path / "nowhere"))
    zarr.create_group(tmp_path / "zarr")
    with pytest.raises(StoreError, match="not a bincompress store"):
        open_store(str(tmp_path / "zarr"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError, match="not a Zarr v3 store"):
        open_store(str(tmp_path / "folder"))


def test_kept_weights_come_back_exactly(tmp_path: Path) -> None:
    from bincompress.tensors.dequantize import dequantize

    tensors = tiny_tensors()
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name][[2, 2, 9], [0, 159, 70]] = np.array([40.0, -30.0, 0.0], ml_dtypes.bfloat16)
    model = write_model(tmp_path / "model", tensors, tiny_config())
    kept = {name: ((2, 0), (2, 159), (9, 70))}
    tried: list[dict[str, Any]] = [{}, {"groups": 4, "block": "matrix"}, {"method": "xnor"}]
    for number, options in enumerate(tried):
        store = tmp_path / f"store{number}"
        plan = make_plan(open_checkpoint(model), load_recipe(None, options), kept)
        assert compress(plan, str(store)).complete
        opened = open_store(str(store))
        weights = dequantize(opened.read_packed(name))
        assert weights[[2, 2, 9], [0, 159, 70]].tolist() == [40.0, -30.0, 0.0]
        exact = tensors[name].astype(np.float64)
        report = opened.node_attributes(name)["report"]
        assert report["relative_error"] == pytest.approx(np.sum((weights - exact) ** 2) / np.sum(exact**2), rel=1e-4)
        assert report["kept"] == 3


def test_stored_bits_are_the_files_bytes(tiny_model: Path, tmp_path: Path) -> None:
    for archive in (False, True):
        store = tmp_path / f"store-{archive}"
        compress(make_plan(open_checkpoint(tiny_model), load_recipe(None, {}), archive=archive), str(store))
        found = inspect(open_store(str(store)))
        total = 0
        for name, report in found["tensors"].items():
            kind = "tensors" if report["method"] != "keep" else "plain"
            files = [path for path in (store / kind / name).rglob("*") if path.is_file() and path.name != "zarr.json"]
            assert report["stored_bytes"] == sum(path.stat().st_size for path in files)
            total += report["stored_bytes"]
        assert found["total"]["stored_bytes"] == total


@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize("dtype", ["uint64", "float16", "float32", "uint16", "uint8"])
@pytest.mark.parametrize(
    ("shape", "rows"), [((), 1), ((3,), 3), ((2, 5), 2), ((7, 4), 3), ((2, 3, 4), 3), ((2, 5, 4), 2), ((0, 4), 1)]
)
def test_arrays_written_here_have_zarrs_own_bytes(
    tmp_path: Path, tree: Tree, dtype: str, shape: tuple[int, ...], rows: int, archive: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    values = np.random.default_rng(0).integers(0, 200, shape).astype(dtype)
    axis = 1 if len(shape) == 3 else 0
    if values.size and rows != (shape[axis] if shape else 1):  # so small a limit that chunks have so many rows
        monkeypatch.setattr("bincompress.store.layout.CHUNK_LIMIT", -(-values.nbytes // -(-shape[axis] // rows)))
    chunks = tuple(rows if i == axis else size for i, size in enumerate(shape))
    stored = write_array(LocalFiles(tmp_path / "ours"), "a", values, archive, {"x": [1, 0.5], "\u00e9": None})
    zstd = [zarr.codecs.ZstdCodec(level=9)] if archive else []
    array = zarr.create_array(
        zarr.storage.LocalStore(tmp_path / "zarrs"), name="a", shape=shape, chunks=chunks, dtype=dtype, filters=None,
        compressors=[*zstd, zarr.codecs.Crc32cCodec()], zarr_format=3, config={"write_empty_chunks": True},
    )  # fmt: skip
    if values.size:
        array[...] = values
    array.attrs.put({"x": [1, 0.5], "\u00e9": None})
    theirs = {name: content for name, content in tree(tmp_path / "zarrs").items() if name.startswith("a/")}
    assert tree(tmp_path / "ours") == theirs
    assert stored == sum(len(content) for name, content in theirs.items() if not name.endswith("zarr.json"))
    layout = parse_array(parse_node(theirs["a/zarr.json"]))
    np.testing.assert_array_equal(read_array(LocalFiles(tmp_path / "zarrs"), "a", layout), values)
