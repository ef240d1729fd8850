"""Matrices that a packed file holds as kernels read them: the same numbers, mapped, and in bytes that do not change."""

import hashlib
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bincompress
from bincompress.compression.plan import make_plan
from bincompress.compression.recipe import load_recipe
from bincompress.compression.run import compress
from bincompress.errors import BincompressError
from bincompress.inference import load as loading
from bincompress.inference.load import Loaded, load_decoder
from bincompress.model import low_rank_linear, matrices
from bincompress.model.packed_linear import ActivationSettings
from bincompress.model.store_source import store_config
from bincompress.sources.checkpoint import open_checkpoint
from bincompress.store.pack_files import PackFiles
from bincompress.store.store import Store, open_store
from cpu_kernels.jit import cpu_features
from cpu_kernels.matmul.prepacking import FAMILIES, Part, described, form_of, from_stream, prepack_rows
from cpu_kernels.matmul.tiling import Shape
from tests.conftest import Run, tiny_config, tiny_tensors, write_model
from tests.packs import everything
from tests.ranges import range_server
from tests.test_declarations import write

IDS = np.random.default_rng(3).integers(0, 96, 12)
OWN = form_of()

# Every form that a tensor can have: two planes, one that shares scales, an offset, products of planes, numbers of the
# whole matrix, in low-rank form, and one that is decoded.
RECIPE = """
[defaults]
method = "wgm"
[[tensor]]
pattern = "*layers.0.self_attn.q_proj*"
method = "lowrank"
rank = 24
[[tensor]]
pattern = "*layers.0.self_attn.v_proj*"
method = "lowrank"
rank = 24
[[tensor]]
pattern = "*layers.1.self_attn*"
method = "lowrank"
rank = 24
[[tensor]]
pattern = "*layers.0.mlp.down_proj*"
method = "uniform"
bits = 8
block = "row"
[[tensor]]
pattern = "*layers.1.mlp.down_proj*"
method = "dbllm"
block = 64
[[tensor]]
pattern = "*layers.1.mlp.gate_proj*"
groups = 5
block = "matrix"
[[tensor]]
pattern = "*layers.1.mlp.up_proj*"
groups = 300
block = "matrix"
"""
LISTED = {
    "model.layers.0.self_attn.o_proj.weight": ((0, 1), (63, 7)), "model.layers.1.self_attn.k_proj.weight": ((5, 5),),
}  # fmt: skip
SCALED = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store of every form, as `store`, and packed with this CPU's layout, as `m.zip`."""
    folder = tmp_path_factory.mktemp("laid out")
    (folder / "recipe.toml").write_text(RECIPE)
    model = write_model(folder / "model", tiny_tensors(), tiny_config())
    plan = make_plan(open_checkpoint(model), load_recipe(folder / "recipe.toml", {"embeddings": "4bit"}), LISTED)
    assert compress(plan, str(folder / "store")).complete
    store = open_store(str(folder / "store"))
    scale = np.linspace(0.5, 2, 64, dtype=np.float32)
    attributes = store.complete_attributes(SCALED)
    hashes, _ = store.write_packed(SCALED, replace(store.read_packed(SCALED), in_scale=scale), archive=False)
    store.commit(SCALED, {**{k: v for k, v in attributes.items() if k != "sealed"}, "hashes": hashes})
    bincompress.pack(folder / "store", folder / "m.zip", layout=["auto"])
    return folder


@pytest.fixture
def file(mixed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(mixed / "m.zip", tmp_path / "m.zip"))


def loaded(store: Path | str, **options: Any) -> Loaded:
    return load_decoder(str(store), 1, ActivationSettings(), **options)


def logits(found: Loaded) -> Any:
    """Return those of several tokens together, and then of a single one."""
    cache = found.decoder.new_cache(16)
    return np.concatenate([found.decoder.logits(IDS, cache), found.decoder.logits([5], cache)])


# What it is for


def test_nothing_is_laid_out_anew_and_the_numbers_are_the_same(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = logits(loaded(mixed / "store"))
    read = set[str]()
    whole = Store.read_stored

    def stored(self: Store, name: str, *arguments: Any, **options: Any) -> Any:
        read.add(name)
        return whole(self, name, *arguments, **options)

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("laid out anew")

    monkeypatch.setattr(Store, "read_stored", stored)
    for module in (matrices, low_rank_linear):
        monkeypatch.setattr(module, "prepack_rows", refuse)
    found = loaded(mixed / "m.zip")
    assert np.array_equal(logits(found), expected)
    # Rows of the embedding, and a matrix that is decoded.
    assert read == {"model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"}
    assert found.notes == ()


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc")
def test_matrices_lie_in_one_shared_mapping_of_the_file(file: Path) -> None:
    found = loaded(file)
    mappings = re.findall(
        rf"^\S+ (\S+) \S+ \S+ \S+ +{re.escape(str(file))}$", Path("/proc/self/smaps").read_text(), re.M
    )
    # That of all matrices, and those of arrays that are read from the planes.
    assert set(mappings) == {"r--s"}
    assert len(mappings) < 10
    assert found.decoder.head.matrix.stream.flags.writeable is False  # type: ignore[attr-defined]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_is_made_on_every_machine(mixed: Path, tmp_path: Path, family: str) -> None:
    form = form_of(family=family)
    done = bincompress.pack(mixed / "store", tmp_path / "m.zip", layout=[family])
    assert done.laid_out == (form,)
    assert bincompress.verify(tmp_path / "m.zip").ok
    kernel = {"lookup32": "lookup-ssse3", "popcount32": "popcount"}.get(form)
    found = loaded(tmp_path / "m.zip", kernel=kernel)
    assert np.array_equal(logits(found), logits(loaded(mixed / "store", kernel=kernel)))
    assert [note.split(": ")[1] for note in found.notes] == (
        [] if form_of(kernel) == form else [f"holds matrices that are laid out for {described(form)}"]
    )


def test_several_families_in_one_file_in_any_order(mixed: Path, tmp_path: Path, run: Run) -> None:
    options = [("--layout", family) for family in ("portable", "neon", "avx2", "avx512")]
    for name, chosen in (("a", options), ("b", options[::-1])):
        code, out, _ = run("pack", mixed / "store", tmp_path / f"{name}.zip", *(part for one in chosen for part in one))
        forms = "lookup32 (ssse3, neon), lookup64 (avx512, avx2), popcount32 (portable)"
        assert (code, f"holds matrices laid out for {forms}, too" in out) == (0, True)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    inspected = bincompress.inspect(tmp_path / "a.zip")["total"]
    assert list(inspected["laid_out"]) == ["lookup32", "lookup64", "popcount32"]
    assert inspected["store_bytes"] == bincompress.inspect(mixed / "m.zip")["total"]["store_bytes"]
    code, _, errors = run("pack", mixed / "store", tmp_path / "c.zip", "--layout", "sparc")
    assert (code, errors) == (
        2, "error: --layout sparc: expected avx512, avx2, ssse3, neon, portable, or auto for this CPU\n"
    )  # fmt: skip


def test_a_packed_file_gets_a_layout_and_a_folder_none(mixed: Path, tmp_path: Path, run: Run) -> None:
    bincompress.pack(mixed / "store", tmp_path / "plain.zip")
    bincompress.pack(tmp_path / "plain.zip", tmp_path / "again.zip", layout=["auto"])
    content = (tmp_path / "again.zip").read_bytes()
    assert content == (mixed / "m.zip").read_bytes()
    assert bincompress.pack(mixed / "store", tmp_path / "again.zip", layout="auto").unchanged
    with pytest.raises(BincompressError, match="holds another packed store"):
        bincompress.pack(mixed / "store", tmp_path / "again.zip")
    code, _, errors = run("unpack", tmp_path / "again.zip", tmp_path / "back")
    assert (code, f"laid out for {OWN} are no part of the store" in errors) == (0, True)
    assert everything(tmp_path / "back") == everything(mixed / "store")
    bincompress.pack(mixed / "store", tmp_path / "again.zip", overwrite=True)
    assert (tmp_path / "again.zip").read_bytes() == (tmp_path / "plain.zip").read_bytes()


def test_experts_that_are_dropped_are_mapped_by_themselves(tmp_path: Path, run: Run) -> None:
    assert run("compress", write(tmp_path / "model", "Qwen3MoeForCausalLM"), tmp_path / "store")[0] == 0
    bincompress.pack(tmp_path / "store", tmp_path / "m.zip", layout=["auto"])
    opened = open_store(str(tmp_path / "m.zip"))
    config = store_config(opened, opened.read_assets())
    names = loading._expert_names(config)
    first = next(iter(names.values()))
    expert = sum(loading._stored_bytes(opened, name) for name, place in names.items() if place == first)
    found = loaded(tmp_path / "m.zip", memory=loading._needed(opened, config) - 2 * expert)
    assert found.decoder.residents is not None
    assert np.array_equal(logits(found), logits(loaded(tmp_path / "store")))
    assert 0 < len(found.decoder.residents) < found.decoder.residents.read


def test_behind_a_url_it_is_verified_and_not_used(mixed: Path) -> None:
    with range_server(mixed) as server:
        url = f"{server.url}/m.zip"
        assert bincompress.verify(url).ok
        assert np.array_equal(logits(loaded(url)), logits(loaded(mixed / "store")))


def test_float32_activations_are_multiplied_with_the_planes(mixed: Path) -> None:
    found, expected = (load_decoder(str(mixed / name), 1, ActivationSettings(16)) for name in ("m.zip", "store"))
    assert np.array_equal(logits(found), logits(expected))


# Its bytes


@pytest.mark.parametrize(
    ("form", "digest"),
    [
        ("lookup64", "9e4e420e4335e854fe040d3c02efb51cc5ff9829302d8a13ca3fc5ed27bbdb33"),
        ("lookup32", "55f4d81a6a347c0fd7e759315265327b0651c3e9ebe4da85a6a99a33bbbceb4d"),
        ("popcount32", "6443333993f62560002d6dae8b3dac4d7538187263188e4ed389c4230a0a718a"),
    ],
)
def test_a_stream_of_version_1_has_these_bytes(form: str, digest: str) -> None:
    """Others are another version: files that are there would be multiplied wrongly."""
    random = np.random.default_rng(1)
    planes: Any = random.integers(0, 1 << 64, (2, 70, 5), np.uint64)
    planes[..., -1] &= np.uint64((1 << 44) - 1)
    scale, offset = (random.integers(1, 1000, shape).astype(np.float16) for shape in ((2, 70, 3), (70, 3)))
    family = next(family for family in FAMILIES if form_of(family=family) == form)
    matrix = prepack_rows([Part(planes, scale, offset, 3)], 128, 300, family=family)
    assert hashlib.sha256(matrix.stream.tobytes() + matrix.multipliers.tobytes()).hexdigest() == digest


def test_arrays_begin_with_a_page(mixed: Path) -> None:
    files = open_store(str(mixed / "m.zip")).files
    assert isinstance(files, PackFiles)
    chunks = [entry for name, entry in files.entries.items() if name.endswith("/c/0") and name.startswith("laid_out/")]
    assert chunks
    assert {entry.start % 4096 for entry in chunks} == {0}
    root: Any = open_store(str(mixed / "m.zip")).root
    stream = root[f"laid_out/{OWN}/lm_head.weight/stream"]
    assert stream.shape == (np.asarray(stream[:]).size,)


def test_a_stream_of_another_size_is_no_matrix() -> None:
    matrix = prepack_rows([Part(np.zeros((2, 70, 5), np.uint64), np.ones((2, 70, 3), np.float16))], 128, 300)
    shape = Shape(70, 300, 128, 2, None, False)
    found = from_stream(shape, True, matrix.stream, matrix.multipliers)
    assert {**found.operands, "weights": 0} == {**matrix.operands, "weights": 0}
    for stream, multipliers in (
        (matrix.stream[:-1], matrix.multipliers),
        (matrix.stream, matrix.multipliers[:-1]),
        (np.concatenate([matrix.stream, matrix.stream])[1 : 1 + matrix.stream.size], matrix.multipliers),
    ):
        with pytest.raises(ValueError, match=r"expected|begins at"):
            from_stream(shape, True, stream, multipliers)
    with pytest.raises(ValueError, match="expected"):
        from_stream(replace(shape, rows=135), True, matrix.stream, matrix.multipliers)
    assert cpu_features.tile_rows(matrix.code) in (32, 64)
