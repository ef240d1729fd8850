"""The low-rank form: what a method makes, what a store has, what is refused, and what the engine multiplies."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bincompress.compression.plan import make_plan
from bincompress.compression.recipe import load_recipe
from bincompress.compression.run import compress
from bincompress.errors import DamagedError, RecipeError, StoreError
from bincompress.inference.load import load_decoder
from bincompress.methods import Inputs, make_settings, method_named
from bincompress.methods.rounding.sign_factors import _descend, sign_factors
from bincompress.model.low_rank_linear import MIDDLE_BITS, DecodedLowRank, LowRankEmbedding, low_rank_linear
from bincompress.model.packed_linear import ActivationSettings
from bincompress.sources.checkpoint import open_checkpoint, read_weight
from bincompress.store.export import export
from bincompress.store.layout import sealed
from bincompress.store.pack import pack, unpack
from bincompress.store.store import open_store
from bincompress.store.verify import verify
from bincompress.tensors.dequantize import dequantize, dequantize_at, to_bfloat16
from bincompress.tensors.forms import assemble
from bincompress.tensors.low_rank import LowRankTensor, packed_signs
from bincompress.tensors.weight import Weight
from cpu_kernels.parallel.workers import Workers
from cpu_kernels.quantize.sign_factors import flip_signs
from cpu_kernels.reference import products
from cpu_kernels.reference import sign_factors as twin
from tests.conftest import tiny_config, tiny_tensors, write_model


def weight_of(values: Any) -> Weight:
    return Weight(np.ascontiguousarray(values, np.float32).view(np.uint32), "F32")


def random_tensor(rows: int, cols: int, rank: int, seed: int = 0) -> tuple[LowRankTensor, np.ndarray[Any, Any]]:
    """Return a tensor with scales of any sign, and its weights by the formula in float64."""
    chance = np.random.default_rng(seed)
    left, right = (chance.choice([-1, 1], (rank, size)) for size in (rows, cols))
    scales = [chance.standard_normal(size).astype(np.float16) for size in (rows, rank, cols)]
    tensor = LowRankTensor(packed_signs(left), packed_signs(right), scales[0], scales[1], scales[2], -3)
    row, middle, column = (scale.astype(np.float64) for scale in scales)
    return tensor, np.outer(row, column) * ((left.T * middle) @ right) / 8


SHAPES = [(1, 1, 1), (63, 65, 7), (64, 64, 64), (70, 130, 65), (200, 129, 140)]


@pytest.mark.parametrize(("rows", "cols", "rank"), SHAPES)
def test_weights_are_those_of_the_formula(rows: int, cols: int, rank: int) -> None:
    tensor, expected = random_tensor(rows, cols, rank)
    np.testing.assert_allclose(dequantize(tensor), expected, rtol=1e-4, atol=1e-4)
    part = slice(rows // 3, rows // 3 + 2)
    np.testing.assert_allclose(dequantize(tensor, part), expected[part], rtol=1e-4, atol=1e-4)
    again = assemble({"shape": [rows, cols], **tensor.attributes()}, tensor.arrays())
    assert isinstance(again, LowRankTensor)
    assert np.array_equal(dequantize(again), dequantize(tensor))
    ids = np.array([0, rows - 1, 0])
    np.testing.assert_allclose(LowRankEmbedding(tensor).rows_of(ids), expected[ids], rtol=1e-4, atol=1e-4)
    assert not tensor.problem()


def test_bits_are_laid_out_as_the_format_says() -> None:
    """Literal words: bit i of word j of row k is row or column 64 j + i; one bit is +1."""
    values = np.array([[1.0, -1.0, 1.0, 1.0]] * 2 + [[-1.0, 1.0, -1.0, -1.0]])
    found = method_named("lowrank").binarize(weight_of(values), make_settings("lowrank", rank=1))
    left, right = int(found.tensor.left[0, 0]), int(found.tensor.right[0, 0])
    assert (left, right) in ((0b011, 0b1101), (0b100, 0b0010))
    np.testing.assert_allclose(dequantize(found.tensor), values, rtol=1e-3)  # scales are float16
    assert found.squared_error < 1e-5
    assert found.nominal_bits == (1 * (3 + 4) + 16 * (3 + 4 + 1)) / 12


def test_listed_weights_replace_what_the_formula_gives() -> None:
    tensor, expected = random_tensor(70, 130, 20)
    listed = replace(
        tensor, listed_index=np.array([5, 131, 9000], np.uint64), listed_value=np.array([7, 8, 9], np.float32)
    )
    expected.reshape(-1)[[5, 131, 9000]] = [7, 8, 9]
    np.testing.assert_allclose(dequantize(listed), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dequantize_at(listed, np.array([1, 0]), np.array([1, 5])), [8, 7], rtol=1e-6)
    np.testing.assert_allclose(LowRankEmbedding(listed).rows_of(np.array([1])), expected[[1]], rtol=1e-4, atol=1e-4)
    x = np.random.default_rng(1).standard_normal((3, 130)).astype(np.float32)
    with Workers(1) as workers:
        for linear in (DecodedLowRank(listed, workers), low_rank_linear([listed], ActivationSettings(), workers)):
            error = linear(x) - x @ expected.T
            assert float(np.square(error).mean() / np.square(x @ expected.T).mean()) < 5e-3


@pytest.mark.parametrize(("rows", "cols"), [(1, 40), (63, 64), (64, 65), (100, 30)])
def test_the_report_says_the_error_of_what_is_stored(rows: int, cols: int) -> None:
    values = np.random.default_rng(2).standard_normal((rows, cols))
    weight = weight_of(values)
    found = method_named("lowrank").binarize(weight, make_settings("lowrank", rank=12))
    error = float(np.square(weight.float32() - dequantize(found.tensor), dtype=np.float64).sum())
    assert found.squared_error == pytest.approx(error, rel=1e-5)
    assert found.squared_error < found.squared_norm
    assert found.tensor.problem() == ""


def test_zeros_and_magnitudes_beyond_squares_are_packed() -> None:
    zeros = method_named("lowrank").binarize(weight_of(np.zeros((8, 70))), make_settings("lowrank", rank=4))
    assert not dequantize(zeros.tensor).any()
    values = np.random.default_rng(3).standard_normal((40, 70))
    plain, large, small = (
        method_named("lowrank").binarize(weight_of(values * 2.0**power), make_settings("lowrank", rank=20))
        for power in (0, 110, -110)
    )
    for other, power in ((large, 110), (small, -110)):
        assert np.array_equal(other.tensor.left, plain.tensor.left)
        np.testing.assert_array_equal(dequantize(other.tensor), dequantize(plain.tensor) * np.float32(2.0**power))


def test_calibration_lowers_the_output_error_at_the_same_bits() -> None:
    chance = np.random.default_rng(4)
    values = chance.standard_normal((96, 128)).astype(np.float32)
    x = chance.standard_normal((600, 128)) @ (chance.standard_normal((128, 128)) * np.geomspace(1, 0.02, 128))
    hessian = (x.T @ x / len(x)).astype(np.float32)
    inputs = Inputs("w", hessian, np.abs(x).max(0).astype(np.float32))
    weight = weight_of(values)
    plain = method_named("lowrank").binarize(weight, make_settings("lowrank", bits=1.5))
    found = method_named("lowrank").binarize(weight, make_settings("lowrank", bits=1.5, compensate=True), inputs)
    errors = []
    for made in (plain, found):
        away = (values - dequantize(made.tensor)).astype(np.float64)
        errors.append(np.sum(away @ hessian * away) / np.sum(values @ hessian * values))
    assert errors[1] < 0.7 * errors[0]
    assert found.notes["output_error"] == pytest.approx(errors[1], rel=1e-3)
    assert found.notes["rank"] == plain.notes["rank"]


def test_every_round_of_descent_lowers_the_error() -> None:
    chance = np.random.default_rng(5)
    values = chance.standard_normal((50, 70)).astype(np.float32)
    root = chance.standard_normal((70, 70)).astype(np.float32)
    hessian = root @ root.T + np.eye(70, dtype=np.float32)
    factors = sign_factors(values, hessian, 30)

    def error() -> float:
        made = (factors.left * factors.row[:, None] * factors.middle) @ (factors.right * factors.column[:, None]).T
        return float(np.sum((values - made) @ hessian * (values - made)))

    factors.left[:5] *= -1  # a bad place to go on from
    errors = [error()]
    for _ in range(2):
        _descend(factors, values, hessian)
        errors.append(error())
    assert errors[0] > 1.2 * errors[1] >= 1.2 * errors[2]


@pytest.mark.parametrize("coupled", [False, True])
def test_the_kernel_flips_what_its_twin_flips(coupled: bool) -> None:
    """Whole numbers, which both add up exactly."""
    chance = np.random.default_rng(6)
    root = chance.integers(-2, 3, (12, 12))
    gram = (root @ root.T).astype(np.float32)
    spread = chance.integers(-1, 2, (9, 9))
    coupling = (spread @ spread.T + np.eye(9)).astype(np.float32) if coupled else np.empty((0, 0), np.float32)
    signs = chance.choice([-1, 1], (9, 12)).astype(np.int8)
    scale = chance.integers(1, 4, 9).astype(np.float32)
    slope = chance.integers(-200, 200, (9, 12)).astype(np.float32)
    found: list[Any] = [signs.copy(), scale, slope.copy(), gram, coupling, np.full((9, 12), np.nan, np.float32)]
    expected = [part.copy() for part in found]
    run: Any = flip_signs
    flips = run(*found, 3)
    run = twin.flip_signs
    assert flips == run(*expected, 3) > 0
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bits", [8, 6])
def test_products_are_those_of_the_twin(threads: int, bits: Any) -> None:
    """Two products of one plane, quantized between: near NumPy's, and alike for one token and several."""
    tensors = [random_tensor(rows, 140, rank, rank)[0] for rows, rank in ((70, 40), (33, 150), (200, 64))]
    x = np.random.default_rng(7).standard_normal((5, 140)).astype(np.float32)
    with Workers(threads) as workers:
        linear = low_rank_linear(tensors, ActivationSettings(bits), workers)
        found = linear(x)
        alone = np.concatenate([linear(token[None]) for token in x])
        np.testing.assert_array_equal(found, alone)
        first = 0
        for tensor in tensors:
            rows, cols, rank = *tensor.shape, tensor.rank
            scaled = products.quantize(x * tensor.column_scale.astype(np.float32), bits, "segment")
            right = tensor.rank_scale.astype(np.float32)[None, :, None]
            middle = products.multiply(tensor.right[None], right, cols, cols, scaled).astype(np.float32)
            left = np.ldexp(tensor.row_scale.astype(np.float32), tensor.exponent)[None, :, None]
            turned = tensor.left_by_rows(slice(0, rows))[None]
            expected = products.multiply(turned, left, rank, rank, products.quantize(middle, MIDDLE_BITS, "segment"))
            # A middle value on the edge of two steps may fall on either side: a step of one input.
            error = np.abs(found[:, first : first + rows] - expected)
            assert float(error.max()) < 0.02 * float(np.abs(expected).max())
            assert float(np.sqrt(np.square(error).mean() / np.square(expected).mean())) < 1e-3
            first += rows
        exact = np.concatenate([DecodedLowRank(tensor, workers)(x) for tensor in tensors], axis=1)
    expected = np.concatenate([x @ dequantize(tensor).T for tensor in tensors], axis=1)
    np.testing.assert_allclose(exact, expected, rtol=1e-3, atol=1e-3)
    share = float(np.square(found - exact).mean() / np.square(exact).mean())
    assert share < (5e-3 if bits == 8 else 2e-2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("low rank") / "model"
    return write_model(folder, tiny_tensors(1, 64, 96), tiny_config(1, 64, 96))


@pytest.fixture(scope="module")
def store(model: Path) -> str:
    """A store whose linear layers have rank 24, but for k_proj, which has planes; up_proj lists two weights."""
    recipe = model.parent / "recipe.toml"
    recipe.write_text('[defaults]\nmethod = "lowrank"\nrank = 24\n[[tensor]]\npattern = "*k_proj*"\nmethod = "wgm"\n')
    kept = {"model.layers.0.mlp.up_proj.weight": ((0, 1), (5, 7))}
    plan = make_plan(open_checkpoint(model), load_recipe(recipe, {}), kept)
    url = str(model.parent / "store")
    assert compress(plan, url).complete
    return url


def test_a_store_is_read_verified_packed_and_exported(model: Path, store: str, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    opened = open_store(store)
    assert opened.attributes["version"] == 2
    assert [problem for _, problem in verify(opened) if problem] == []
    name = "model.layers.0.mlp.up_proj.weight"
    values = dequantize(opened.read_stored(name, check_hashes=True))
    source = read_weight(open_checkpoint(model).tensors[name]).float32()
    assert values[0, 1] == source[0, 1]
    assert values[5, 7] == source[5, 7]
    report = opened.report(name)
    assert report["squared_error"] == pytest.approx(float(np.square(source - values).sum()), rel=1e-4)
    nbytes = sum(path.stat().st_size for path in Path(store, "tensors", name).rglob("c/**/*") if path.is_file())
    assert report["stored_bits"] == pytest.approx(8 * nbytes / source.size, rel=1e-5)
    pack(store, str(tmp_path / "s.zip"))
    unpack(str(tmp_path / "s.zip"), str(tmp_path / "again"))
    assert np.array_equal(dequantize(open_store(str(tmp_path / "again")).read_stored(name)), values)
    exported = load_file(export(opened, tmp_path / "folder") / "model-00001-of-00001.safetensors")
    assert np.array_equal(np.asarray(exported[name]).view(np.uint16), to_bfloat16(values))
    with pytest.raises(StoreError, match=f"{name}: is stored in low-rank form, and planes are needed here"):
        opened.read_packed(name)


def test_the_decoder_runs_it(store: str) -> None:
    """Logits of 8-bit activations are near those of float32 ones; tokens give alone what they give together."""
    found, ids = {}, np.arange(2, 9)
    for bits in (8, 16):
        loaded = load_decoder(store, 1, ActivationSettings(bits))
        decoder = loaded.decoder
        found[bits] = decoder.logits(ids, decoder.new_cache(16))
        assert ("low rank" in loaded.paths["model.layers.0.self_attn.q_proj.weight"]) is True
    share = float(np.square(found[8] - found[16]).mean() / np.square(found[16]).mean())
    assert 0 < share < 1e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 23}, "does not fit rank 23"),
        ({"rank": True}, "rank: True; expected a whole number"),
        ({"shape": [1 << 20, 1 << 20]}, "does not fit rank 24"),
        ({"coef_exponent": 501}, "coef_exponent: 501"),
    ],
)
def test_attributes_that_do_not_fit_are_refused(store: str, change: dict[str, Any], message: str) -> None:
    opened = open_store(store)
    name = "model.layers.0.mlp.down_proj.weight"
    arrays = dict(opened.stored_arrays(name))
    with pytest.raises(ValueError, match=message):
        assemble({**opened.complete_attributes(name), **change}, arrays)


def test_a_few_bytes_cannot_ask_for_much_memory() -> None:
    rows = cols = 1 << 20
    arrays: dict[str, Any] = {
        "left_planes": np.zeros((1, rows // 64), np.uint64), "right_planes": np.zeros((1, cols // 64), np.uint64),
        "row_scale": np.ones(rows, np.float16), "rank_scale": np.ones(1, np.float16),
        "column_scale": np.ones(cols, np.float16),
    }  # fmt: skip
    with pytest.raises(ValueError, match="rank 1 for shape 1048576 x 1048576; expected at least a bit for 16 weights"):
        assemble({"shape": [rows, cols], "rank": 1, "coef_exponent": 0}, arrays)


def test_values_that_the_format_has_not_are_found() -> None:
    tensor, _ = random_tensor(70, 130, 20)
    words = tensor.left.copy()
    words[3, -1] |= np.uint64(1 << 63)
    assert replace(tensor, left=words).problem() == "padding bits of left_planes are not zero"
    scale = tensor.row_scale.copy()
    scale[0] = np.nan
    assert replace(tensor, row_scale=scale).problem() == "a scale is not finite"
    assert "not finite in float32" in replace(tensor, exponent=130).problem()


def test_version_1_cannot_have_the_form(store: str, tmp_path: Path) -> None:
    unpacked = tmp_path / "old"
    pack(store, str(tmp_path / "s.zip"))
    unpack(str(tmp_path / "s.zip"), str(unpacked))
    node = json.loads((unpacked / "zarr.json").read_text())
    for version, message in (
        (1, "has the low-rank form, which a store of version 1 cannot have"),
        (3, "reads versions 1"),
    ):
        node["attributes"] = sealed("", {**node["attributes"], "version": version})
        (unpacked / "zarr.json").write_text(json.dumps(node))
        with pytest.raises(StoreError, match=message) as caught:
            open_store(str(unpacked)).read_stored("model.layers.0.mlp.down_proj.weight")
        assert isinstance(caught.value, DamagedError) == (version == 1)


def test_a_store_without_the_form_is_as_it_was(model: Path, tmp_path: Path) -> None:
    plan = make_plan(open_checkpoint(model), load_recipe(None, {}))
    assert "version" not in plan.record()
    assert "rank" not in plan.record()["recipe"]["defaults"]
    assert compress(plan, str(tmp_path / "store")).complete
    assert open_store(str(tmp_path / "store")).attributes["version"] == 1


def test_bits_choose_the_greatest_rank_and_what_is_too_small_is_refused() -> None:
    method = method_named("lowrank")
    for bits in (0.55, 0.8, 1.2):
        settings = make_settings("lowrank", bits=bits)
        assert method.nbytes is not None
        stored = 8 * (method.nbytes(settings, 512, 1536) + 20) / (512 * 1536)
        assert bits - (2048 + 16) / (512 * 1536) < stored <= bits
        assert settings.problem((512, 1536)) == ""
    assert "rank -" in make_settings("lowrank", bits=0.55).problem((8, 8))
    assert "expected at least 31: choose more bits (rank 31 takes" in make_settings("lowrank", rank=10).problem(
        (512, 512 * 16)
    )
    assert "give one of them" in make_settings("lowrank", rank=100, bits=0.8).problem((512, 512))
    assert "expected at most 1024" in make_settings("lowrank", rank=1025).problem((512, 512))
    with pytest.raises(RecipeError, match=r"bits: expected 0\.1 to 4, found 5"):
        make_settings("lowrank", bits=5)
