"""Does the same command go on from every state that a kill or a full disk leaves, and does one process write alone?"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from bincompress.compression.run import compress
from bincompress.errors import StoreError
from bincompress.store import files
from bincompress.store.export import export
from bincompress.store.layout import group_node
from bincompress.store.lock import exclusive
from bincompress.store.objects import ObjectFiles
from bincompress.store.store import begin_store, open_store
from tests.conftest import Run, tiny_config, tiny_tensors, write_model
from tests.forked import Forked
from tests.runs import Tree, plan_of, problems, run

# Begins a store (or statistics) in a child that is killed at its N-th write, half of which is done; then goes on.
KILLED = """
import contextlib, os, shutil, signal, sys, uuid
from pathlib import Path
from bincompress.calibration.statistics import begin_statistics
from bincompress.store import files, zarr_access
from bincompress.store.store import begin_store

what, folder, old = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "old"
PLAN = {"source": {"id": "a", "revision": "", "fingerprint": "f"}, "tensors": {"x.weight": "plain"}}
ASSETS = {"config.json": b"{}" * 400, "tokenizer.json": b"[]" * 4000, "empty": b""}
real = files.replacing


def begin(overwrite, number=2):
    if what == "store":
        begin_store(str(folder / "store"), {**PLAN, "number": number}, ASSETS, "", overwrite)
    else:
        begin_statistics(str(folder / "store"), {"inputs": {}, "number": number}, overwrite)


def tree():
    store = folder / "store"
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def killed_at(number, when):
    seen = 0

    @contextlib.contextmanager
    def replacing(path):
        nonlocal seen
        seen += 1
        if seen == number:
            path.parent.mkdir(parents=True, exist_ok=True)
            if when == "within":
                (path.parent / f".{uuid.uuid4().hex}.partial").write_bytes(b'{"attri')
            os.kill(os.getpid(), signal.SIGKILL)
        with real(path) as file:
            yield file

    files.replacing = zarr_access.replacing = replacing


begin(False)
expected = tree()
points = 0
for number in range(1, 100):
    for when in ("before", "within"):
        shutil.rmtree(folder / "store", ignore_errors=True)
        if old:
            begin(False, number=1)
        child = os.fork()
        if not child:
            killed_at(number, when)
            begin(old)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        # With other bytes of its own: an old store that was not touched yet is there whole, and is to be replaced.
        begin(old)
        assert tree() == expected, (number, when)
        if status == 0:
            print(points)
            sys.exit()
        assert os.WTERMSIG(status) == signal.SIGKILL
        points += 1
"""


@pytest.mark.parametrize(("what", "least"), [("store", 22), ("statistics", 6)])
@pytest.mark.parametrize("old", ["", "old"])
def test_a_kill_at_any_write_of_a_beginning(forked: Forked, tmp_path: Path, what: str, least: int, old: str) -> None:
    found = forked(what, tmp_path, old, code=KILLED)
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) >= least


@pytest.mark.parametrize(
    "attributes",
    [{"format": "bincompress"}, {}, {"format": "bincompress", "version": 1, "status": "beginning"}],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_beginnings_of_earlier_versions_are_gone_on_with(
    tiny_model: Path, tmp_path: Path, attributes: dict[str, object], overwrite: bool
) -> None:
    store = tmp_path / "store"
    store.mkdir()
    (store / "zarr.json").write_bytes(group_node(attributes))
    (store / "assets").mkdir()
    (store / "assets" / "zarr.json").write_bytes(group_node({}))
    if attributes:
        (store / "assets" / "config.json" / "c").mkdir(parents=True)
        (store / "assets" / "config.json" / "c" / "0").write_bytes(b"half")
    (store / ".0123456789abcdef0123456789abcdef.partial").write_bytes(b"{")
    (store / files.LOCK).write_bytes(b"")
    with pytest.raises(StoreError):
        open_store(str(store))
    assert compress(plan_of(tiny_model), str(store), overwrite=overwrite).complete
    assert problems(store) == {}
    assert sorted(path.name for path in store.iterdir()) == ["assets", "log", "plain", "tensors", "zarr.json"]


def test_a_beginning_is_named_to_who_reads_it(tmp_path: Path, run: Run) -> None:
    (tmp_path / "zarr.json").write_bytes(group_node({"format": "bincompress", "version": 1, "status": "beginning"}))
    code, _, err = run("inspect", tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert "a run ended while it was creating this store; run the same command again" in err


def test_an_object_store_goes_on_from_a_killed_beginning(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class KilledError(BaseException):
        pass

    real = ObjectFiles.write
    for number in range(1, 9):
        left = number

        def write(self: ObjectFiles, key: str, parts: object) -> None:
            nonlocal left
            left -= 1
            if not left:
                raise KilledError
            real(self, key, parts)  # type: ignore[arg-type]

        url = f"memory://killed-{number}"
        monkeypatch.setattr(ObjectFiles, "write", write)
        with pytest.raises(KilledError):
            run(tiny_model, url)
        monkeypatch.undo()
        assert run(tiny_model, url).complete
        assert problems(url) == {}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few kilobytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_at_any_moment_of_the_beginning(tiny_model: Path, disk: Path) -> None:
    plan = plan_of(tiny_model)
    for size in ("4k", "8k", "12k", "16k", "24k", "32k", "64k", "100k"):
        subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)
        with pytest.raises(StoreError, match="No space left on device"):
            compress(plan, str(disk / "store"))
    subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
    assert compress(plan, str(disk / "store")).complete
    assert problems(disk / "store") == {}


def test_events_on_a_full_disk_do_not_stop_the_run(tiny_model: Path, tmp_path: Path, run: Run) -> None:
    code, _, _ = run("compress", tiny_model, tmp_path / "store", "--events", "/dev/full", "--json")
    assert code == 0
    assert problems(tmp_path / "store") == {}


def test_events_that_cannot_be_written_are_named_once(
    tiny_model: Path, tmp_path: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    run("compress", tiny_model, tmp_path / "store", "--events", "/dev/full", "--json")
    assert [record.getMessage() for record in caplog.records] == [
        "/dev/full: cannot be written: No space left on device; the run goes on without it"
    ]


def test_a_renamed_model_is_gone_on_with(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, tree: Tree
) -> None:
    run(tiny_model, tmp_path / "store")
    before = tree(tmp_path / "store")
    shutil.copytree(tiny_model, tmp_path / "renamed")
    outcome = run(tmp_path / "renamed", tmp_path / "store")
    assert (outcome.done, outcome.unchanged) == (0, 21)
    assert tree(tmp_path / "store") == before
    assert "begun from a source named 'model'; this one is named 'renamed' and has the same headers" in caplog.text
    other = write_model(tmp_path / "other", tiny_tensors(layers=1), tiny_config(layers=1))
    with pytest.raises(StoreError, match=r"other settings: source\.fingerprint is"):
        run(other, tmp_path / "store")


def test_two_revisions_of_one_source_are_two_sources() -> None:
    plan = {"source": {"id": "a/b", "revision": "1", "fingerprint": "f"}, "tensors": {}}
    begin_store("memory://revisions", plan, {}, "", overwrite=False)
    begin_store(
        "memory://revisions", {**plan, "source": {"id": "b", "revision": "", "fingerprint": "f"}}, {}, "", False
    )
    with pytest.raises(StoreError, match=r"source\.revision is '1' there and '2' now"):
        begin_store("memory://revisions", {**plan, "source": {**plan["source"], "revision": "2"}}, {}, "", False)  # type: ignore[dict-item]


# Places and the lock


def test_in_the_folder_where_one_is(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    for name in ("here", "out"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run("compress", tiny_model, ".")[0] == 0
    assert problems(tmp_path / "here") == {}
    assert not (tmp_path / "here" / files.LOCK).exists()
    monkeypatch.chdir(tmp_path / "out")
    assert run("export", tmp_path / "here", ".")[0] == 0
    assert {path.name for path in Path().iterdir()} >= {"config.json", "model.safetensors.index.json"}
    assert not list(Path().glob(".*"))


AS_NOBODY = """
import os, sys
from pathlib import Path
from bincompress.store.export import export
from bincompress.store.store import begin_store, open_store
from bincompress.store.lock import exclusive
os.chdir("/")
os.setgroups([]); os.setgid(65534); os.setuid(65534)
place = sys.argv[1]
with exclusive(place):
    store = begin_store(place, {"tensors": {}}, {"config.json": b"{}"}, "", False)
    store.finish({})
export(open_store(place), Path(sys.argv[2]))
"""


def test_a_writable_folder_below_one_that_is_not(forked: Forked) -> None:
    if os.geteuid():
        pytest.skip("acting as another user needs root")
    above = Path(tempfile.mkdtemp())  # which others may enter, as they may not `tmp_path`
    try:
        above.chmod(0o755)
        for name in ("store", "out"):
            (above / name).mkdir()
            os.chown(above / name, 65534, 65534)
        (above / "store" / "lost+found").mkdir()
        found = forked(above / "store", above / "out", code=AS_NOBODY)
        assert found.returncode == 0, found.stderr
        assert open_store(str(above / "store")).attributes["status"] == "complete"
        assert (above / "out" / "config.json").read_bytes() == b"{}"
        assert sorted(path.name for path in above.iterdir()) == ["out", "store"]
    finally:
        shutil.rmtree(above)


HOLDING = """
import sys
from bincompress.store.lock import exclusive
with exclusive(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_lock_whatever_name_the_store_has(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real)
    monkeypatch.chdir(real)
    for first, others in ((link, (real, Path())), (real, (link, Path(), real / ".." / "link")), (Path(), (real, link))):
        arguments = [sys.executable, "-c", HOLDING, str(first)]
        with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
            assert holder.stdout is not None
            assert holder.stdin is not None
            assert holder.stdout.readline() == "held\n"
            for other in others:
                with pytest.raises(StoreError, match="another bincompress is writing to it"):
                    compress(plan_of(tiny_model), str(other))
            holder.stdin.close()
        assert holder.returncode == 0
    assert not list(real.iterdir())
    assert compress(plan_of(tiny_model), str(link)).complete


def test_the_lock_of_a_killed_run_is_nobodys(tiny_model: Path, tmp_path: Path) -> None:
    store = tmp_path / "a" / "store"
    arguments = [sys.executable, "-c", HOLDING, str(store)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        holder.kill()
    assert (store / files.LOCK).exists()
    assert compress(plan_of(tiny_model), str(store)).complete
    assert not (store / files.LOCK).exists()


def test_the_lock_leaves_no_folder_behind(tmp_path: Path) -> None:
    with exclusive(str(tmp_path / "a" / "b")):
        assert (tmp_path / "a" / "b").is_dir()
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    with exclusive(str(tmp_path / "mine")):
        pass
    assert (tmp_path / "mine").is_dir()


# Export


def test_an_export_killed_while_it_took_its_place_is_done_again(tiny_model: Path, tmp_path: Path) -> None:
    run(tiny_model, tmp_path / "store")
    store, out = open_store(str(tmp_path / "store")), tmp_path / "out"
    partial = out / ".bincompress-export"
    partial.mkdir(parents=True)
    (partial / ".moved").write_text("config.json\nmodel-00001-of-00001.safetensors")
    (partial / "config.json").write_text("half")
    (out / "model-00001-of-00001.safetensors").write_text("half")
    assert json.loads((export(store, out) / "config.json").read_text()) == tiny_config()
    assert not partial.exists()


def test_an_export_goes_among_nothing_else(tiny_model: Path, tmp_path: Path) -> None:
    run(tiny_model, tmp_path / "store")
    store, out = open_store(str(tmp_path / "store")), tmp_path / "out"
    (out / ".bincompress-export").mkdir(parents=True)
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(StoreError, match="exists and is not an empty folder"):
        export(store, out)
    assert (out / "thesis.txt").read_text() == "mine"
