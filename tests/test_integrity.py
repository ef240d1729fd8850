"""Is what a store says of itself believed only as far as its hashes and the sizes of its files go?"""

import json
import re
import resource
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import ml_dtypes
import numcodecs
import numpy as np
import pytest

from bincompress.calibration.statistics import begin_statistics
from bincompress.compression.plan import make_plan
from bincompress.compression.recipe import load_recipe
from bincompress.compression.run import compress
from bincompress.errors import BincompressError, DamagedError, StoreError
from bincompress.inference.load import load_decoder
from bincompress.model.packed_linear import ActivationSettings
from bincompress.sources.checkpoint import open_checkpoint
from bincompress.store.arrays import first_not_finite
from bincompress.store.layout import SEAL, array_hash, sealed
from bincompress.store.objects import ObjectFiles
from bincompress.store.store import Store, open_store
from bincompress.store.verify import unsealed
from tests.conftest import Run, as_weight, tiny_config, tiny_tensors, write_model
from tests.s3 import s3_server
from tests.test_run import problems, run

NAME = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
HEAD = "lm_head.weight"
EIGHT = ActivationSettings()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    model = write_model(folder / "model", tiny_tensors(), tiny_config())
    run(model, folder / "store")
    compress(make_plan(open_checkpoint(model), load_recipe(None, {}), archive=True), str(folder / "archive"))
    return folder


@pytest.fixture(params=["store", "archive"])
def store(request: pytest.FixtureRequest, made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / request.param, tmp_path / "store"))


def change(path: Path, **changes: Any) -> None:
    """Change attributes in a zarr.json; `...` removes one."""
    node = json.loads(path.read_text())
    node["attributes"] = {k: v for k, v in {**node["attributes"], **changes}.items() if v is not ...}
    path.write_text(json.dumps(node, indent=2))


def node_at(store: Path, name: str) -> Path:
    return store / ("tensors" if "proj" in name else "plain") / name / "zarr.json"


# Attributes


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (NAME, {"terms": [2, 1]}),
        (NAME, {"coef_exponent": 1}),
        (NAME, {"mix": [[1.0, 0.5], [0.0, 1.0]]}),
        (NAME, {"method": "xnor"}),
        (NAME, {"report": {"stored_bytes": 0}}),
        (NAME, {SEAL: {}}),
        (NAME, {SEAL: "x"}),
        (NAME, {SEAL: ...}),  # removed where the root has one
        (NORM, {"dtype": "float16"}),
        (NORM, {"x": 1}),
    ],
)
def test_attributes_that_were_changed_are_found(store: Path, name: str, changes: dict[str, Any], run: Run) -> None:
    change(node_at(store, name), **changes)
    found = problems(store)
    assert list(found) == [name]
    assert "attributes" in found[name]
    with pytest.raises(DamagedError, match=f"{re.escape(name)}: its attributes"):
        load_decoder(str(store), 1, EIGHT)
    code, _, err = run("verify", store)
    assert (code, name in err) == (1, True)
    assert run("generate", store, "a")[0] == 2


def test_attributes_of_another_tensor_are_found(store: Path) -> None:
    first, second = (store / "tensors" / f"model.layers.0.self_attn.{part}_proj.weight" for part in "qk")
    first.rename(store / "x")
    second.rename(first)
    (store / "x").rename(second)
    assert set(problems(store)) == {first.name, second.name}


def test_the_shape_of_a_kept_tensor_is_under_the_hash(store: Path) -> None:
    path = node_at(store, HEAD)
    node = json.loads(path.read_text())
    node["shape"] = node["chunk_grid"]["configuration"]["chunk_shape"] = node["shape"][::-1]
    chunk = store / "plain" / HEAD / "c" / "0" / "0"
    assert chunk.exists()  # of as many bytes as before
    path.write_text(json.dumps(node))
    assert "its zarr.json is not the one that was written" in problems(store)[HEAD]
    with pytest.raises(DamagedError, match=r"its zarr.json is not the one that was written"):
        load_decoder(str(store), 1, EIGHT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensors": {}}, "attributes are not those that were written"),
        ({"status": "incomplete"}, "attributes are not those that were written"),
        ({"config": {"hidden_size": 1}}, "attributes are not those that were written"),
        ({"tensors": {"../../etc": "packed"}}, "which names no tensor"),
        ({"tensors": {"a": 5}}, "which names no tensor"),
    ],
)
def test_a_root_that_was_changed_is_found(store: Path, changes: dict[str, Any], message: str, run: Run) -> None:
    change(store / "zarr.json", **changes)
    with pytest.raises(StoreError, match=message):
        open_store(str(store))
    code, _, err = run("verify", store)
    assert (code, message in err, err.count("\n")) == (1 if "written" in message else 2, True, 1)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [({}, "its root lists no tensors"), ({NORM: "plain"}, "its root does not list .* lies there")],
)
def test_a_list_of_tensors_that_lacks_some_does_not_verify(
    store: Path, tensors: dict[str, str], message: str, run: Run
) -> None:
    root = json.loads((store / "zarr.json").read_text())
    attributes = sealed("", {**root["attributes"], "tensors": tensors})  # with a hash that fits
    (store / "zarr.json").write_text(json.dumps({**root, "attributes": attributes}))
    found = problems(store)
    assert list(found) == ["zarr.json"]
    assert re.search(message, found["zarr.json"])
    assert run("verify", store)[0] == 1


def without_seals(store: Path) -> None:
    for path in store.rglob("zarr.json"):
        if SEAL in json.loads(path.read_text())["attributes"]:
            change(path, **{SEAL: ...})


def test_stores_of_earlier_versions_load_and_verify_says_what_it_cannot(made: Path, store: Path, run: Run) -> None:
    decoder = load_decoder(str(store), 1, EIGHT).decoder
    expected = decoder.logits([1, 2, 3], decoder.new_cache(8))
    without_seals(store)
    assert len(unsealed(open_store(str(store)))) == 21
    decoder = load_decoder(str(store), 1, EIGHT).decoder
    np.testing.assert_array_equal(decoder.logits([1, 2, 3], decoder.new_cache(8)), expected)
    code, out, err = run("verify", store)
    assert (code, "every tensor is as it was written" in out) == (0, True)
    assert "the attributes of 21 tensors are under no hash (an earlier version wrote them)" in err
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    plan = make_plan(open_checkpoint(made / "model"), load_recipe(None, {}), archive=_is_archive(store))
    assert compress(plan, str(store)).unchanged == 21
    assert before == {path: path.read_bytes() for path in before}


def _is_archive(store: Path) -> bool:
    return bool(json.loads((store / "zarr.json").read_text())["attributes"]["archive"])


def test_a_tensor_whose_attributes_were_changed_is_written_again(made: Path, store: Path) -> None:
    good = node_at(store, NAME).read_bytes()
    change(node_at(store, NAME), terms=[2, 1])
    plan = make_plan(open_checkpoint(made / "model"), load_recipe(None, {}), archive=_is_archive(store))
    outcome = compress(plan, str(store))
    assert (outcome.done, outcome.unchanged) == (1, 20)
    assert node_at(store, NAME).read_bytes() == good


# Sizes


HUGE = 1 << 36
NODES: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("huge shape", lambda node: node.update(shape=[2, 160, HUGE])),
    ("huge everything", lambda node: _grid(node, [HUGE, HUGE, HUGE])),
    ("huge chunk", lambda node: _grid(node, node["shape"], [HUGE, 160, 1])),
    ("small chunks", lambda node: _grid(node, [HUGE, HUGE, 1], [1, 1, 1])),
    ("many chunks", lambda node: _grid(node, [HUGE, 160, 1], [1, 160, 1])),
    ("many dimensions", lambda node: _grid(node, [1] * 10_000)),
    ("some dimensions", lambda node: _grid(node, [HUGE] * 16)),
    ("negative", lambda node: _grid(node, [-1, 160, 1])),
    ("beyond integers", lambda node: _grid(node, [10**400, 160, 1])),
    ("floats", lambda node: _grid(node, [2.0, 160, 1])),
    ("infinite", lambda node: _grid(node, [float("inf"), 160, 1])),
    ("texts", lambda node: _grid(node, ["2", "160", "1"])),
    ("no shape", lambda node: node.pop("shape")),
    ("no grid", lambda node: node.update(chunk_grid=None)),
    ("another grid", lambda node: node["chunk_grid"].update(name="rectilinear")),
    ("no codecs", lambda node: node.update(codecs=[])),
    ("codecs of nothing", lambda node: node.update(codecs=[1, 2])),
    ("blosc", lambda node: node.update(codecs=[{"name": "bytes"}, {"name": "blosc"}, {"name": "crc32c"}])),
    ("zstd twice", lambda node: node.update(codecs=[{"name": "bytes"}, *2 * [{"name": "zstd"}], {"name": "crc32c"}])),
    ("sharding", lambda node: node.update(codecs=[{"name": "sharding_indexed", "configuration": {}}])),
    ("big-endian", lambda node: node["codecs"][0].update(configuration={"endian": "big"})),
    ("strings", lambda node: node.update(data_type="string")),
    ("objects", lambda node: node.update(data_type={"name": "object"})),
    ("raw bytes", lambda node: node.update(data_type=f"r{HUGE}")),
    ("complex", lambda node: node.update(data_type="complex128")),
    ("another separator", lambda node: node["chunk_key_encoding"].update(configuration={"separator": "."})),
    ("transformers", lambda node: node.update(storage_transformers=[{"name": "x"}])),
    ("a group", lambda node: node.update(node_type="group")),
]


def _grid(node: dict[str, Any], shape: list[Any], chunks: list[Any] | None = None) -> None:
    node["shape"] = shape
    node["chunk_grid"]["configuration"]["chunk_shape"] = shape if chunks is None else chunks


@pytest.mark.parametrize("seal", [True, False])
@pytest.mark.parametrize(("what", "edit"), NODES, ids=[what for what, _ in NODES])
def test_made_up_metadata_asks_for_no_memory(
    store: Path, what: str, edit: Callable[[dict[str, Any]], Any], seal: bool
) -> None:
    if not seal:  # as in a store of an earlier version, where nothing else says what the array is
        without_seals(store)
    path = store / "tensors" / NAME / "planes" / "zarr.json"
    node = json.loads(path.read_text())
    edit(node)
    path.write_text(json.dumps(node))
    with limited(), pytest.raises(DamagedError, match=f"{NAME}: "):
        open_store(str(store)).read_packed(NAME, check_hashes=True)
    with limited():
        assert list(problems(store)) == [NAME]


class limited:  # noqa: N801 - a context
    """No more than half a gigabyte of memory beyond what the process has."""

    def __enter__(self) -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        self.before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + (512 << 20), self.before[1]))

    def __exit__(self, *error: object) -> None:
        resource.setrlimit(resource.RLIMIT_AS, self.before)


def test_coded_bytes_are_not_asked_how_much_they_need(made: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(made / "archive", tmp_path / "store"))
    without_seals(store)
    chunk = store / "tensors" / NAME / "planes" / "c" / "0" / "0" / "0"
    # A frame header that promises 2 ** 40 bytes.
    bomb = b"\x28\xb5\x2f\xfd" + bytes([0b11100000]) + (1 << 40).to_bytes(8, "little") + b"\x01\x00\x00"
    chunk.write_bytes(bomb + google_crc32c.value(bomb).to_bytes(4, "little"))
    with limited(), pytest.raises(DamagedError, match=f"{NAME}: array planes cannot be read"):
        open_store(str(store)).read_packed(NAME)
    # And bytes that are many more than the array has, or fewer.
    for size in (1 << 20, 8):
        other = bytes(numcodecs.Zstd(level=1).encode(bytes(size)))
        chunk.write_bytes(other + google_crc32c.value(other).to_bytes(4, "little"))
        with limited(), pytest.raises(DamagedError, match=f"{NAME}: array planes cannot be read"):
            open_store(str(store)).read_packed(NAME)


def test_a_large_array_coded_in_a_few_bytes_is_refused(made: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(made / "archive", tmp_path / "store"))
    without_seals(store)
    path = store / "tensors" / NAME / "planes" / "zarr.json"
    node = json.loads(path.read_text())
    _grid(node, [2, 160, 1 << 20])  # 2.5 GB in a file of a few kilobytes
    path.write_text(json.dumps(node))
    with (
        limited(),
        pytest.raises(DamagedError, match=r"bytes are said to hold 2,684,354,560; expected at most 1024 ti"),
    ):
        open_store(str(store)).read_packed(NAME)


@pytest.mark.parametrize(("what", "edit"), NODES, ids=[what for what, _ in NODES])
def test_made_up_statistics_ask_for_no_memory(tmp_path: Path, what: str, edit: Callable[[dict[str, Any]], Any]) -> None:
    made = begin_statistics(str(tmp_path), {"inputs": {NAME: NAME}}, overwrite=False)
    made.write(NAME, [NAME], 1, {"hessian": np.eye(64, dtype=np.float32), "absmax": np.ones(64, np.float32)})
    np.testing.assert_array_equal(made.read(NAME).hessian, np.eye(64))
    path = tmp_path / "inputs" / NAME / "hessian" / "zarr.json"
    node = json.loads(path.read_text())
    edit(node)
    path.write_text(json.dumps(node))
    with limited(), pytest.raises(DamagedError, match="hessian cannot be read"):
        made.read(NAME)


def test_behind_a_url_too(made: Path, tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}-sizes"
    run(made / "model", url)
    files = ObjectFiles(url)
    for edit in (edit for what, edit in NODES if what != "a group"):
        key = f"tensors/{NAME}/planes/zarr.json"
        before = files.read(key)
        assert before is not None
        node = json.loads(before)
        edit(node)
        files.write(key, [json.dumps(node).encode()])
        with limited():
            assert list(problems(url)) == [NAME]
        files.write(key, [before])
    assert problems(url) == {}
    nodes = json.loads(files.read("nodes/zarr.json") or b"")
    nodes["attributes"]["tensors"][NAME][SEAL]["arrays"]["planes"]["shape"][2] = HUGE
    files.write("nodes/zarr.json", [json.dumps(nodes).encode()])
    with limited(), pytest.raises(DamagedError, match=NAME):
        load_decoder(url, 1, EIGHT)
    assert list(problems(url)) == ["zarr.json"]
    assert "nodes is not what its tensors say" in problems(url)["zarr.json"]
    assert run(made / "model", url).unchanged == 21
    assert problems(url) == {}


# What is not finite


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_the_first_value_that_is_not_finite(dtype: str) -> None:
    values = np.random.default_rng(0).standard_normal(300_000).astype(np.float32)
    greatest = {"BF16": float(ml_dtypes.finfo(ml_dtypes.bfloat16).max), "F16": 65504.0, "F32": 3.4028234e38}[dtype]  # type: ignore[no-untyped-call]
    values[:4] = [greatest, -greatest, -0.0, 1e-7]
    assert first_not_finite(as_weight(values, dtype).bits, dtype) is None
    for place in (0, 131_071, 131_072, 299_999):
        for bad in (np.nan, -np.nan, np.inf, -np.inf):
            broken = values.copy()
            broken[[place, -1]] = bad
            assert first_not_finite(as_weight(broken, dtype).bits, dtype) == place
    assert first_not_finite(np.empty(0, np.uint16), "BF16") is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [NORM, "model.norm.weight"])
def test_a_norm_that_is_not_finite_is_refused(tmp_path: Path, run: Run, name: str, value: float) -> None:
    tensors = tiny_tensors()
    tensors[name][5] = value
    code, _, err = run("compress", write_model(tmp_path / "model", tensors, tiny_config()), tmp_path / "store")
    assert code == 1
    assert f"FAILED {name}: {value} at [5]; expected finite values" in err
    assert list(problems(tmp_path / "store")) == [name]


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", HEAD])
def test_a_kept_matrix_that_is_not_finite_is_recorded_named_and_runs_nowhere(
    tmp_path: Path, run: Run, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = tiny_tensors()
    tensors[name][3, 7] = np.nan
    store = tmp_path / "store"
    code, _, _ = run("compress", write_model(tmp_path / "model", tensors, tiny_config()), store)
    assert code == 0
    assert f"{name}: nan at [3, 7]; expected finite values; it is kept as it is, and `verify` and" in caplog.text
    report = open_store(str(store)).complete_attributes(name)["report"]
    assert report["not_finite"] == "nan at [3, 7]; expected finite values"
    assert list(problems(store)) == [name]
    assert run("verify", store)[0] == 1
    with pytest.raises(BincompressError, match=rf"{name}: nan at \[3, 7\]; expected finite values"):
        load_decoder(str(store), 1, EIGHT)


def test_a_store_of_an_earlier_version_with_a_norm_that_is_not_finite(made: Path, tmp_path: Path, run: Run) -> None:
    store = Path(shutil.copytree(made / "store", tmp_path / "store"))
    chunk = store / "plain" / NORM / "c" / "0"
    values = np.frombuffer(chunk.read_bytes()[:-4], np.uint16).copy()
    values[9] = 0x7F80
    chunk.write_bytes(values.tobytes() + google_crc32c.value(values.view(np.uint8)).to_bytes(4, "little"))
    without_seals(store)
    change(node_at(store, NORM), hashes={"array": array_hash(values)})
    assert "inf at [9]; expected finite values" in problems(store)[NORM]
    with pytest.raises(StoreError, match=rf"{NORM}: inf at \[9\]; expected finite values"):
        load_decoder(str(store), 1, EIGHT)


# Requests


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Methods and paths of requests to an S3 server, as they are sent."""
    session = pytest.importorskip("aiobotocore.httpsession").AIOHTTPSession
    sent: list[str] = []
    real = session.send

    async def send(self: Any, request: Any) -> Any:
        sent.append(f"{request.method} {request.url}")
        return await real(self, request)

    monkeypatch.setattr(session, "send", send)
    with s3_server() as (host, port):
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        yield sent


def counted(requests: list[str], what: Callable[[], Any]) -> tuple[int, Counter[str]]:
    """Return how many requests were sent, and how many for each tensor."""
    requests.clear()
    what()
    return len(requests), Counter(
        match[1] for line in requests if (match := re.search(r"(?:tensors|plain|log)(?:/|%2F)([\w.]+)", line))
    )


@pytest.mark.slow
def test_requests_for_each_tensor(requests: list[str], tiny_model: Path, tmp_path: Path) -> None:
    url, count = "s3://bucket/store", 21
    total, each = counted(requests, lambda: run(tiny_model, url))
    # A listing, two for each array, its attributes, its log and a look at them; the holder of the store is asked for.
    assert max(each.values()) <= 8
    assert total <= 10 * count
    total, each = counted(requests, lambda: load_decoder(url, 1, EIGHT))
    assert max(each.values()) <= 2
    assert total <= 2 * count + 12
    total, _ = counted(requests, lambda: run(tiny_model, url))
    assert total <= 4 * count
    assert problems(url) == {}
    # A store that was uploaded has no object of all attributes, and loads all the same.
    import s3fs

    run(tiny_model, tmp_path / "local")
    s3fs.S3FileSystem().put(str(tmp_path / "local"), "bucket/uploaded", recursive=True)
    total, each = counted(requests, lambda: load_decoder("s3://bucket/uploaded", 1, EIGHT))
    assert max(each.values()) <= 3
    assert total <= 3 * count + 12
    assert problems("s3://bucket/uploaded") == {}


def test_no_zarr_is_imported_to_load_or_write(made: Path, tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from bincompress.store.store import begin_store, open_store\n"
        "store = open_store(sys.argv[1])\n"
        "[store.read_packed(name) for name, kind in store.tensors().items() if kind == 'packed']\n"
        "begin_store(sys.argv[2], {'tensors': {}}, {'a': b'b'}, '', False)\n"
        "sys.exit('zarr' in sys.modules)\n"
    )
    arguments = [sys.executable, "-c", script, str(made / "archive"), str(tmp_path / "new")]
    assert subprocess.run(arguments, check=False).returncode == 0
    assert isinstance(open_store(str(tmp_path / "new")), Store)
