"""Is anything removed or overwritten that is no part of a store? For every place, and every command that writes one."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from bincompress.calibration.collect import calibrate, run_in_threads
from bincompress.compression.plan import make_plan
from bincompress.compression.recipe import load_recipe
from bincompress.compression.run import compress, compress_all
from bincompress.errors import StoreError
from bincompress.sources.checkpoint import open_checkpoint
from bincompress.store.layout import MODEL, STATISTICS
from bincompress.store.replace import clear, look, put_in_place, remove
from bincompress.store.store import open_store
from tests.conftest import Run, tiny_config, tiny_tensors, write_model
from tests.runs import plan_of, problems
from tests.s3 import s3_environment, s3_server

PACKED, KEPT = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
SAMPLES = np.random.default_rng(5).integers(0, 96, (2, 16))


class Tree:
    """Files of a place, foreign ones put and looked for by the same words in a folder and behind a URL."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._fs, self._root = fsspec.url_to_fs(
            url, **({} if url.startswith(("s3:", "memory:")) else {"auto_mkdir": True})
        )

    def put(self, name: str, content: bytes = b"do not lose") -> None:
        self._fs.pipe_file(f"{self._root}/{name}", content)

    def all(self) -> dict[str, bytes]:
        self._fs.invalidate_cache()
        found = self._fs.find(self._root) if self._fs.exists(self._root) else []
        return {path.removeprefix(self._root).strip("/"): self._fs.cat_file(path) for path in found}


@pytest.fixture
def tiny_model(tmp_path: Path) -> Path:
    """One layer: 12 tensors, each of which takes an S3 server's time."""
    return write_model(tmp_path / "model", tiny_tensors(layers=1), tiny_config(layers=1), shards=2)


@pytest.fixture(scope="module")
def bucket() -> Iterator[None]:
    with s3_server() as (host, port), pytest.MonkeyPatch.context() as patch:
        for name, value in s3_environment(f"http://{host}:{port}").items():
            patch.setenv(name, value)
        yield


@pytest.fixture(params=["folder", "memory", pytest.param("s3", marks=pytest.mark.slow), "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place that is not there yet, of each kind."""
    if request.param == "s3":
        request.getfixturevalue("bucket")
        return f"s3://bucket/{tmp_path.name}"
    return {
        "folder": str(tmp_path / "place"), "memory": f"memory://{tmp_path.name}", "file": f"file://{tmp_path}/place",
    }[request.param]  # fmt: skip


def stats(model: Path, url: str, overwrite: bool = False, samples: Any = SAMPLES) -> None:
    calibrate(open_checkpoint(model), samples, url, runner=run_in_threads(1), overwrite=overwrite)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("writes", ["compress", "calibrate"])
def test_foreign_files_are_neither_removed_nor_written_among(
    tiny_model: Path, url: str, writes: str, overwrite: bool
) -> None:
    place = Tree(url)
    place.put("thesis.txt")
    place.put("tensors/data.bin")
    before = place.all()
    assert len(before) == 2
    write: Any = (
        stats
        if writes == "calibrate"
        else lambda model, url, overwrite: compress(plan_of(model), url, overwrite=overwrite)
    )
    with pytest.raises(StoreError, match=r"(not a bincompress store|no statistics) \(.*thesis.txt\); nothing was cha"):
        write(tiny_model, url, overwrite)
    assert place.all() == before


@pytest.mark.slow
def test_overwriting_leaves_what_is_no_part_of_the_store_and_names_it(
    tiny_model: Path, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    place = Tree(url)
    compress(plan_of(tiny_model), url)
    foreign = [".git/HEAD", "README.md", ".gitattributes", "tensors/notes.txt", "assets/c.txt", "x.partial", "c/0"]
    foreign += [f"tensors/{PACKED}/mine.txt", f"tensors/{PACKED}/planes/mine.txt", f"plain/{KEPT}/mine.txt"]
    foreign += ["plain/other/zarr.json.bak", "assets/config.json/mine.txt"]
    for name in foreign:
        place.put(name)
    assert compress(plan_of(tiny_model, groups=4), url, overwrite=True).complete
    found = place.all()
    assert {name: found[name] for name in foreign} == dict.fromkeys(foreign, b"do not lose")
    assert "left as it is, as it is no part of a store: .git/, .gitattributes, README.md, assets/c.txt" in caplog.text
    assert problems(url) == {}
    assert open_store(url).attributes["recipe"]["defaults"]["groups"] == 4
    # And nothing of the old store is left: the rest is what a new place gets.
    fresh = Tree(f"{url}-fresh")
    compress(plan_of(tiny_model, groups=4), fresh.url)
    own = {name: content for name, content in found.items() if name not in foreign and not name.startswith("log/")}
    assert own == {name: content for name, content in fresh.all().items() if not name.startswith("log/")}


def test_going_on_leaves_what_lies_among_the_arrays_of_a_tensor(tiny_model: Path, url: str) -> None:
    place = Tree(url)
    compress(plan_of(tiny_model), url)
    foreign = [f"tensors/{PACKED}/mine.txt", f"tensors/{PACKED}/planes/mine.txt", f"plain/{KEPT}/mine.txt"]
    foreign += ["assets/config.json/mine.txt", "plain/other/notes.txt"]
    for name in foreign:
        place.put(name)
    for broken in (f"tensors/{PACKED}", f"plain/{KEPT}"):
        place.put(f"{broken}/zarr.json", b"{}")
    config = json.loads((tiny_model / "config.json").read_text())
    (tiny_model / "config.json").write_text(json.dumps(config, indent=1))  # the same model in other bytes
    assert compress(plan_of(tiny_model), url).unchanged == 10
    found = place.all()
    assert {name: found[name] for name in foreign} == dict.fromkeys(foreign, b"do not lose")
    assert problems(url) == {}


@pytest.mark.slow
def test_overwriting_statistics_leaves_the_rest(tiny_model: Path, url: str, caplog: pytest.LogCaptureFixture) -> None:
    place = Tree(url)
    stats(tiny_model, url)
    for name in ("README.md", "inputs/mine.txt"):
        place.put(name)
    stats(tiny_model, url, overwrite=True, samples=SAMPLES[:1])
    found = place.all()
    assert (found["README.md"], found["inputs/mine.txt"]) == (b"do not lose", b"do not lose")
    assert "no part of a store: README.md, inputs/mine.txt" in caplog.text
    assert json.loads(found["zarr.json"])["attributes"]["samples"] == 1
    before = place.all()
    with pytest.raises(StoreError, match=r"its format is 'bincompress-statistics'.; nothing was"):
        compress(plan_of(tiny_model), url, overwrite=True)
    assert place.all() == before
    remove(url, STATISTICS)
    assert set(place.all()) == {"README.md", "inputs/mine.txt"}


@pytest.mark.parametrize("place", ["s3://bucket/.", "s3://bucket/a/..", "s3://bucket/../a"])
def test_a_place_with_dots_is_refused(bucket: None, tiny_model: Path, run: Run, place: str) -> None:
    code, _, err = run("compress", tiny_model, place)
    assert (code, err.count("\n")) == (2, 1)
    assert f"{place}: object stores take . and .. for names of their own" in err


@pytest.mark.parametrize("whole", ["s3://bucket", "s3://bucket/", "s3://bucket//"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_whole_bucket_is_refused(
    bucket: None, tiny_model: Path, run: Run, tmp_path: Path, whole: str, overwrite: bool
) -> None:
    Tree("s3://bucket/other").put("x.txt")
    option = ["--overwrite"] if overwrite else []
    code, _, err = run("compress", tiny_model, whole, *option)
    assert (code, err.count("\n")) == (2, 1)
    assert f"{whole}: is a whole bucket, which may hold other things; give a place in it" in err
    with pytest.raises(StoreError, match="is a whole bucket"):
        stats(tiny_model, whole, overwrite)
    assert Tree("s3://bucket/other").all() == {"x.txt": b"do not lose"}


def test_no_store_of_a_batch_is_changed_where_one_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    compress(plan_of(tiny_model), str(tmp_path / "first"))
    Tree(str(tmp_path / "second")).put("thesis.txt")
    before = Tree(str(tmp_path)).all()
    plans = {str(tmp_path / name): plan_of(tiny_model, groups=4) for name in ("first", "second")}
    with pytest.raises(StoreError, match=r"second: not a bincompress store \(thesis.txt\)"):
        compress_all(plans, overwrite=True)
    assert Tree(str(tmp_path)).all() == before


def test_links_in_a_store_are_not_followed(tiny_model: Path, tmp_path: Path) -> None:
    store, away = tmp_path / "store", tmp_path / "away"
    compress(plan_of(tiny_model), str(store))
    away.mkdir()
    (away / "data.bin").write_bytes(b"do not lose")
    (away / "zarr.json").write_bytes(b"do not lose")
    (store / "log").rename(tmp_path / "log")
    for name, target in (
        ("log", tmp_path / "log"),
        ("tensors/elsewhere", away),
        ("plain/zarr.json", away / "zarr.json"),
        ("mine", away),
        ("dangling", tmp_path / "nowhere"),
    ):
        (store / name).unlink(missing_ok=True)
        (store / name).symlink_to(target)
    logs = Tree(str(tmp_path / "log")).all()
    assert compress(plan_of(tiny_model, groups=4), str(store), overwrite=True).complete
    assert Tree(str(away)).all() == {"data.bin": b"do not lose", "zarr.json": b"do not lose"}
    assert Tree(str(tmp_path / "log")).all() == logs
    assert (store / "mine").is_symlink()
    assert (store / "dangling").is_symlink()
    assert not (store / "log").is_symlink()
    assert problems(store) == {}


def test_a_store_behind_a_link_is_replaced_where_it_is(tiny_model: Path, tmp_path: Path) -> None:
    compress(plan_of(tiny_model), str(tmp_path / "real"))
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert compress(plan_of(tiny_model, groups=4), str(tmp_path / "link"), overwrite=True).complete
    assert (tmp_path / "link").is_symlink()
    assert problems(tmp_path / "real") == {}


def test_what_is_written_elsewhere_first_takes_the_place_of_what_is_removed(tiny_model: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    compress(plan_of(tiny_model), str(store))
    Tree(str(store)).put("tensors/notes.txt")
    compress(plan_of(tiny_model, groups=4), str(store / ".bincompress-new"))
    assert compress(plan_of(tiny_model), str(store)).unchanged == 12  # what lies there changes nothing yet
    place = look(str(store), MODEL)
    assert (place.state, place.foreign) == ("store", ("tensors/notes.txt",))
    put_in_place(place, 1)
    assert not list((store / ".bincompress-new").iterdir())
    assert open_store(str(store)).attributes["recipe"]["defaults"]["groups"] == 4
    assert (store / "tensors" / "notes.txt").read_bytes() == b"do not lose"


def test_a_foreign_place_cannot_be_cleared(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="nothing was changed"):
        clear(look(str(tmp_path), MODEL), 1)
    remove(str(tmp_path), MODEL)
    assert (tmp_path / "file").read_text() == "x"


def test_the_work_folder_of_distill_keeps_what_is_not_its_own(tmp_path: Path) -> None:
    from bincompress.distillation.places import remove_work

    for name in (
        "checkpoint.pt",
        "checkpoint.partial",
        "written-0-64-16.npy",
        "layer-0003.safetensors",
        "written-by-me.txt",
        "thesis.txt",
    ):
        (tmp_path / name).write_text("x")
    remove_work(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thesis.txt", "written-by-me.txt"]


def test_an_empty_zarr_group_of_somebody_else_with_arrays_is_not_ours(tmp_path: Path, tiny_model: Path) -> None:
    import zarr

    root = zarr.create_group(tmp_path / "theirs")
    root.create_array("tensors/a", shape=(3,), dtype="uint8")
    before = Tree(str(tmp_path / "theirs")).all()
    for overwrite in (False, True):
        with pytest.raises(StoreError, match="nothing was changed"):
            compress(
                make_plan(open_checkpoint(tiny_model), load_recipe(None, {})),
                str(tmp_path / "theirs"),
                overwrite=overwrite,
            )
    assert Tree(str(tmp_path / "theirs")).all() == before
