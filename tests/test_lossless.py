"""Models trained at low bits come in without loss: every form and block, detection, and what only looks like it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from bincompress import api
from bincompress.errors import LossError, RecipeError
from bincompress.inference.load import load_decoder
from bincompress.methods import lossless, make_settings
from bincompress.methods.rounding.few_levels import FORMS, reached, split
from bincompress.model.checkpoint_source import load_checkpoint
from bincompress.model.lowering import lower
from bincompress.model.packed_linear import ActivationSettings
from bincompress.sources.checkpoint import open_checkpoint, read_weight
from bincompress.store.store import open_store
from bincompress.tensors.dequantize import dequantize
from bincompress.tensors.packed import PackedTensor
from bincompress.tensors.weight import Weight
from cpu_kernels.matmul.activations import quantize
from cpu_kernels.matmul.prepacking import prepack_rows
from cpu_kernels.matmul.products import multiply
from cpu_kernels.quantize.few_levels import MOST_LEVELS, find_levels, level_codes, merge_levels
from cpu_kernels.reference import few_levels as reference
from cpu_kernels.reference.planes import pack_bits
from tests.conftest import Run, as_weight, tiny_config, tiny_tensors, write_model

SETTINGS = make_settings("lossless")
LEVELS = {
    "one bit": ([-1.0, 1.0], 1),
    "{0, 1}": ([0.0, 1.0], 1),
    "ternary": ([-1.0, 0.0, 1.0], 2),
    "two bits": ([-1.0, 0.0, 1.0, 2.0], 2),
    "two bits, negative": ([-2.0, -1.0, 0.0, 1.0], 2),
    "odd": ([-3.0, -1.0, 1.0, 3.0], 2),
    "two magnitudes": ([-1.0, -0.25, 0.25, 1.0], 2),
    "unlike": ([-1.0, 0.0, 0.625], 2),
    "any four": ([-1.0, 0.125, 0.5, 0.75], 2),
}
shapes = st.tuples(st.integers(1, 5), st.sampled_from([1, 7, 31, 32, 33, 63, 64, 65, 96, 100, 129, 257]))


def made(
    levels: list[float], block: int | str, shape: tuple[int, int] = (24, 300), seed: int = 0
) -> NDArray[np.float64]:
    """Return a random matrix of these levels times a scale of each block, row or of the matrix."""
    random = np.random.default_rng(seed)
    rows, cols = shape
    if block == "matrix":
        scale = np.full(shape, 0.37)
    else:
        width = cols if block == "row" else int(block)
        scale = np.repeat(np.exp(random.standard_normal((rows, -(-cols // width)))), width, axis=1)[:, :cols]
    return np.asarray(random.choice(levels, shape) * scale)


def stored_bits(tensor: PackedTensor) -> float:
    return 8 * sum(array.nbytes for array in tensor.arrays().values()) / (tensor.shape[0] * tensor.shape[1])


@given(shapes, st.integers(0, 2**32 - 1), st.integers(1, 6), st.sampled_from(["BF16", "F32"]))
def test_levels_are_found_as_their_twin_does(shape: tuple[int, int], seed: int, number: int, dtype: str) -> None:
    random = np.random.default_rng(seed)
    pool = np.array([0.0, -0.0, 0.5, -0.5, 3.0, -7.0, 1e-30])[:number]
    weight, rows, cols = as_weight(random.choice(pool, shape), dtype), *shape
    levels = np.empty((rows, -(-cols // 32), MOST_LEVELS), weight.bits.dtype)
    counts = np.empty(levels.shape[:2], np.uint8)
    find_levels(weight.flat, cols, 32, levels, counts)
    for factor in (1, 2, 3):
        merged = np.empty((rows, -(-levels.shape[1] // factor), MOST_LEVELS), levels.dtype)
        merged_counts = np.empty(merged.shape[:2], np.uint8)
        merge_levels(levels, counts, factor, merged, merged_counts)
        expected = reference.levels_of_units(weight.float32(), 32 * factor)
        for row in range(rows):
            for unit, values in enumerate(expected[row]):
                count = int(merged_counts[row, unit])
                assert count == min(len(values), MOST_LEVELS + 1)
                if count <= MOST_LEVELS:
                    assert set(Weight(merged[row, unit, None, :count], dtype).float32()[0].tolist()) == values


@given(shapes, st.integers(0, 2**32 - 1), st.sampled_from([32, 64, 1000]))
def test_codes_of_levels_equal_their_twin(shape: tuple[int, int], seed: int, step: int) -> None:
    random = np.random.default_rng(seed)
    levels = random.choice(np.array([-1.0, 0.0, 1.0], np.float32), (shape[0], -(-shape[1] // step), 3))
    weights = random.choice(np.array([-1.0, 0.0, -0.0, 1.0], np.float32), shape)
    codes = np.empty(shape, np.uint8)
    missing = level_codes(weights, step, levels, codes)
    expected, expected_missing = reference.level_codes(weights, step, levels)
    np.testing.assert_array_equal(codes, expected)
    assert missing == expected_missing


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.text)
def test_levels_of_a_form_are_what_a_reader_computes(form: Any, halves: bool) -> None:
    codebook = split(form.codebook) if halves else form.codebook
    numbers = np.random.default_rng(1).standard_normal((codebook.coefs, 3, 1)).astype(np.float32)
    codes = np.arange(64) % (1 << codebook.planes)
    planes = np.stack([np.tile(pack_bits((codes >> p & 1).astype(bool)), (3, 1)) for p in range(codebook.planes)])
    column = pack_bits(np.arange(64) >= 32)[None] if halves else np.empty((0, 0), np.uint64)
    tensor = PackedTensor(planes, numbers, codebook.terms, 64, (3, 64), 0, codebook.mix, column)
    values = dequantize(tensor)
    for bit in (0, 1) if halves else (0,):
        levels, part = reached(codebook, numbers, bit)[:, 0], slice(32 * bit, 32 * bit + 32 if halves else 64)
        np.testing.assert_array_equal(values[:, part], levels[:, codes[part]])


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("block", ["matrix", "row", 256, 128, 64, 32])
@pytest.mark.parametrize("kind", LEVELS)
def test_every_weight_is_exact(kind: str, block: int | str, dtype: str) -> None:
    levels, planes = LEVELS[kind]
    weight = as_weight(made(levels, block), dtype)
    found = lossless.binarize(weight, SETTINGS)
    np.testing.assert_array_equal(dequantize(found.tensor), weight.float32())
    exact = weight.float32().astype(np.float64)
    assert (found.squared_error, found.notes["lossless"], len(found.tensor.planes)) == (0.0, True, planes)
    assert found.squared_norm == pytest.approx(float(np.sum(exact**2)), rel=1e-12)
    seen = lossless.recognize(weight, weight.shape)
    assert seen is not None
    assert seen.nbytes <= sum(array.nbytes for array in found.tensor.arrays().values())


@pytest.mark.parametrize(
    ("kind", "block", "most"),
    [
        ("one bit", 128, 1.13), ("one bit", "row", 1.02), ("one bit", "matrix", 1.001), ("one bit", 32, 1.52),
        ("ternary", 128, 2.13), ("ternary", 256, 2.07), ("ternary", "matrix", 2.001), ("ternary", 32, 2.52),
        ("two bits", 128, 2.13), ("two bits", 64, 2.26), ("two magnitudes", 128, 2.26),
    ],
)  # fmt: skip
def test_scales_belong_to_the_coarsest_block_that_is_exact(kind: str, block: int | str, most: float) -> None:
    found = lossless.binarize(as_weight(made(LEVELS[kind][0], block, (64, 1024)), "BF16"), SETTINGS)
    assert stored_bits(found.tensor) <= most
    assert found.notes["unit"] == block


@pytest.mark.parametrize("kind", ["one bit", "ternary", "two bits"])
@pytest.mark.parametrize("block", ["matrix", "row", 128])
def test_scales_that_float16_lacks_are_stored_as_float32(kind: str, block: int | str) -> None:
    weight = as_weight(made(LEVELS[kind][0], block), "F32")
    found = lossless.binarize(weight, SETTINGS)
    np.testing.assert_array_equal(dequantize(found.tensor), weight.float32())
    assert found.tensor.numbers.dtype == np.float32
    apart = np.exp(np.linspace(-60, 60, 24))[:, None]  # powers of two that no float16 spans
    weight = as_weight(made([-1.0, 1.0], "matrix") * apart, "BF16")
    found = lossless.binarize(weight, SETTINGS)
    np.testing.assert_array_equal(dequantize(found.tensor), weight.float32())


@given(shapes, st.integers(0, 2**32 - 1), st.sampled_from(sorted(LEVELS)), st.sampled_from(["BF16", "F16", "F32"]))
def test_ragged_shapes_are_exact(shape: tuple[int, int], seed: int, kind: str, dtype: str) -> None:
    weight = as_weight(np.random.default_rng(seed).choice(LEVELS[kind][0], shape), dtype)
    try:
        found = lossless.binarize(weight, SETTINGS)
    except LossError:
        assert weight.bits.size < 16  # as many numbers as weights
        return
    np.testing.assert_array_equal(dequantize(found.tensor), weight.float32())
    if shape[1] % 64:
        assert not np.any(found.tensor.planes[:, :, -1] >> np.uint64(shape[1] % 64))


def test_zeros_of_every_kind() -> None:
    ternary = made([-1.0, 0.0, 1.0], "row")
    negative = np.where(ternary == 0, -0.0, ternary)
    rows = np.where(np.arange(24)[:, None] % 3 == 0, 0.0, made([-1.0, 1.0], "row"))
    blocks = np.where(np.arange(300) // 128 == 1, 0.0, made([-1.0, 1.0], 128))
    for values, planes in ((negative, 2), (rows, 1), (blocks, 1), (np.zeros((5, 70)), 1), (np.full((5, 70), 0.3), 1)):
        weight = as_weight(values, "BF16")
        found = lossless.binarize(weight, SETTINGS)
        np.testing.assert_array_equal(dequantize(found.tensor), weight.float32())
        assert len(found.tensor.planes) == planes


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("block", ["matrix", "row", 128, 32])
@pytest.mark.parametrize("kind", LEVELS)
def test_the_engine_multiplies_every_form(kind: str, block: int | str, dtype: str) -> None:
    levels = made(LEVELS[kind][0], block).astype(ml_dtypes.bfloat16)  # of float32 not all can be told apart
    found = lossless.binarize(as_weight(levels, dtype), SETTINGS)
    lowered = lower(found.tensor)
    assert lowered is not None
    matrix = prepack_rows([lowered.part], lowered.block, 300, plane_weights=lowered.plane_weights)
    x = np.random.default_rng(2).standard_normal((5, 300)).astype(np.float32)
    activations = quantize(x)
    exact = activations.q[:, :300] * np.repeat(activations.scale, 128, axis=1)[:, :300]
    expected = exact.astype(np.float64) @ dequantize(found.tensor).astype(np.float64).T
    assert np.abs(multiply(matrix, activations) - expected).max() < 1e-4 * np.abs(expected).max()


def test_what_is_not_of_few_levels_is_refused_with_its_place() -> None:
    random = as_weight(np.random.default_rng(0).standard_normal((20, 100)), "BF16")
    with pytest.raises(LossError, match="row 0, columns 0 to 31 hold more than 4 different values"):
        lossless.binarize(random, SETTINGS)
    spoilt = made([-1.0, 0.0, 1.0], "matrix")
    spoilt[17, 70:73] = 0.11, 0.12, 0.13
    with pytest.raises(LossError, match="row 17, columns 64 to 95 hold more than 4 different values"):
        lossless.binarize(as_weight(spoilt, "BF16"), SETTINGS)
    spoilt[17, 70] = np.nan
    assert lossless.recognize(as_weight(spoilt, "BF16"), spoilt.shape) is None
    assert lossless.recognize(random, random.shape) is None
    narrow = as_weight(np.random.default_rng(0).standard_normal((500, 4)), "BF16")
    assert lossless.recognize(narrow, narrow.shape) is None  # four values a row are no sign of few levels


def test_pairs_whose_sums_round_are_sought_among_their_neighbours() -> None:
    random, exact, plain = np.random.default_rng(3), 0, 0
    for _ in range(70):
        pair = np.sort((random.standard_normal(2) * 0.05).astype(np.float32))
        codebook = FORMS[1].codebook
        plain += set(reached(codebook, pair.reshape(2, 1, 1)).ravel().tolist()) == set(pair.tolist())
        values = pair[random.integers(0, 2, (4, 128))]
        weight = as_weight(values, "F32")
        if lossless.recognize(weight, weight.shape) is None:
            continue
        found = lossless.binarize(weight, SETTINGS)
        np.testing.assert_array_equal(dequantize(found.tensor), values)
        exact += len(found.tensor.planes) == 1
    assert exact > plain


def test_few_levels_that_float32_cannot_give_are_named(tmp_path: Path) -> None:
    levels = np.array([0.01, 0.05], np.float32)

    def spoil(tensors: dict[str, Any]) -> None:
        for name, value in tensors.items():
            if "up_proj" in name:
                tensors[name] = levels[np.random.default_rng(0).integers(0, 2, value.shape)]

    model = low_bit_model(tmp_path / "model", "ternary", spoil=spoil)
    remarks = api.plan(model, headers_only=False).remarks()
    assert "few levels, but planes and scales cannot give them exactly in float32: 2 matrices" in remarks


def low_bit_model(
    folder: Path, kind: str, block: int | str = "row", spoil: Callable[[dict[str, Any]], None] = lambda tensors: None
) -> Path:
    """Write a tiny Llama whose every matrix, embedding and head too, has few levels."""
    tensors = tiny_tensors(hidden=128, inner=320)
    for number, (name, value) in enumerate(sorted(tensors.items())):
        if value.ndim == 2:
            values = 0.05 * made(LEVELS[kind][0], block, value.shape, number)
            tensors[name] = values.astype(ml_dtypes.bfloat16)
    spoil(tensors)
    return write_model(folder, tensors, tiny_config(hidden=128, inner=320))


@pytest.mark.parametrize(("kind", "block", "planes"), [("one bit", 128, 1), ("ternary", "row", 2)])
def test_a_model_comes_in_without_loss_and_runs(
    kind: str, block: int | str, planes: int, tmp_path: Path, run: Run
) -> None:
    model = low_bit_model(tmp_path / "model", kind, block)
    code, out, _ = run("compress", model, tmp_path / "store")
    assert code == 0
    assert "lossless       every weight has the value that it has in the source" in out
    assert "few levels: 16 matrices with" in out
    assert "packed by method lossless" in out
    assert "relative squared error 0\n" in out
    checkpoint, store = open_checkpoint(model), open_store(str(tmp_path / "store"))
    for name, tensor in checkpoint.tensors.items():
        if len(tensor.shape) == 2:
            packed = store.read_packed(name, check_hashes=True)
            np.testing.assert_array_equal(dequantize(packed), read_weight(tensor).float32())
            assert len(packed.planes) == planes
    assert run("verify", tmp_path / "store")[0] == 0
    assert "lossless       every weight" in run("inspect", tmp_path / "store")[1]
    assert api.compress(model, tmp_path / "store").unchanged == len(checkpoint.tensors)
    dry = run("compress", model, tmp_path / "none", "--dry-run")[1]
    assert "packed by method lossless" in dry
    assert "lossless" in dry.splitlines()[0]
    ids = np.random.default_rng(0).integers(0, 96, 40)
    exact = load_checkpoint(model)
    expected = exact.logits(ids, exact.new_cache(40))
    for bits, most in ((16, 1e-6), (8, 0.01)):
        decoder = load_decoder(str(tmp_path / "store"), 1, ActivationSettings(bits)).decoder
        found = decoder.logits(ids, decoder.new_cache(40))
        assert np.abs(found - expected).mean() < most * np.abs(expected).max()


def test_what_the_user_asks_for_rules_and_the_summary_says_what_was_possible(tmp_path: Path, run: Run) -> None:
    model = low_bit_model(tmp_path / "model", "ternary")
    code, out, _ = run("compress", model, tmp_path / "store", "--groups", 2)
    assert code == 0
    assert "lossless      " not in out
    assert "method lossless would give every weight exactly" in out
    asked: tuple[dict[str, Any], ...] = ({"method": "xnor"}, {"block": 64})
    for options in asked:
        planned = api.plan(model, **options, headers_only=False)
        assert not any(tensor.settings.method == "lossless" for tensor in planned.plan.tensors)
        assert "method lossless would give every weight exactly" in planned.remarks()[0]
    found = api.plan(model, embeddings="8bit", headers_only=False).plan
    methods = {tensor.source.name: tensor.settings.method for tensor in found.tensors if tensor.packed}
    assert methods["lm_head.weight"] == methods["model.embed_tokens.weight"] == "uniform"
    assert sorted(set(methods.values())) == ["lossless", "uniform"]
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[[tensor]]\npattern = '*.0.mlp.*'\ngroups = 4\n")
    found = api.plan(model, recipe=recipe, keep=["lm_head.*"], headers_only=False).plan
    methods = {tensor.source.name: tensor.settings.method for tensor in found.tensors if tensor.packed}
    assert methods["model.layers.0.mlp.up_proj.weight"] == "wgm"
    assert "lm_head.weight" not in methods
    assert methods["model.layers.1.mlp.up_proj.weight"] == "lossless"


def test_one_weight_that_the_sample_missed_makes_a_lossy_tensor_and_a_loud_summary(tmp_path: Path, run: Run) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def spoil(tensors: dict[str, Any]) -> None:
        tensors[name][2, 3:6] = (0.011, 0.012, 0.013)  # of 320 rows 64 are sampled, not the third

    model = low_bit_model(tmp_path / "model", "ternary", spoil=spoil)
    code, out, _ = run("compress", model, tmp_path / "store")
    assert code == 0
    assert "NOT LOSSLESS   1 tensors have more levels than their sampled rows showed" in out
    assert "lossless       15 of 16 packed tensors; the others are not" in out
    assert "every weight has" not in out
    report = open_store(str(tmp_path / "store")).report(name)
    assert report["method"] == "wgm"
    assert "lossless" not in report
    assert report["not_lossless"] == "row 2, columns 0 to 31 hold more than 4 different values"
    assert run("verify", tmp_path / "store")[0] == 0
    assert api.compress(model, tmp_path / "store").done == 0
    # Asked for by name there is no other method to take: the tensor fails, and the others do not.
    code, out, _ = run("compress", model, tmp_path / "strict", "--method", "lossless")
    assert code == 1
    assert f"failed: {name}: row 2, " in out
    assert "hold more than 4 different values" in out


def test_an_embedding_is_told_from_all_of_its_rows(tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Any]) -> None:
        tensors["model.embed_tokens.weight"][2, 3:6] = (0.011, 0.012, 0.013)

    model = low_bit_model(tmp_path / "model", "one bit", spoil=spoil)
    found = api.plan(model, headers_only=False).plan
    kinds = {tensor.source.name: tensor.settings.method for tensor in found.tensors}
    assert (kinds["model.embed_tokens.weight"], kinds["lm_head.weight"]) == ("keep", "lossless")


def test_asking_for_it_where_it_cannot_be_is_refused_before_the_work(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="method lossless is for matrices of at most four values a block"):
        api.compress(tiny_model, tmp_path / "store", method="lossless")
    with pytest.raises(RecipeError, match=r"lm_head\.weight: method lossless is for matrices"):
        api.compress(tiny_model, tmp_path / "store", embeddings="lossless")
    with pytest.raises(RecipeError, match="method lossless finds the blocks itself; leave --block 64 out"):
        api.compress(tiny_model, tmp_path / "store", method="lossless", block=64)
    assert not (tmp_path / "store").exists()


def test_a_tied_embedding_is_packed_once_and_used_twice(tmp_path: Path, run: Run) -> None:
    def tie(tensors: dict[str, Any]) -> None:
        del tensors["lm_head.weight"]

    tensors = low_bit_model(tmp_path / "untied", "ternary", spoil=tie)
    config = tiny_config(hidden=128, inner=320) | {"tie_word_embeddings": True}
    model = write_model(tmp_path / "model", safetensors.numpy.load_file(tensors / "model.safetensors"), config)
    assert "lossless       every weight" in run("compress", model, tmp_path / "store")[1]
    ids = np.arange(20)
    exact = load_checkpoint(model)
    decoder = load_decoder(str(tmp_path / "store"), 1, ActivationSettings(16)).decoder
    expected, found = (each.logits(ids, each.new_cache(20)) for each in (exact, decoder))
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
