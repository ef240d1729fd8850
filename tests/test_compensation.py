"""Is rounding under a Hessian what GPTQ and the closed forms say, never worse than without, and safe on bad ones?"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bincompress.errors import TensorError
from bincompress.methods import Inputs, Settings, billm, dbellquant, make_settings, method_named
from bincompress.methods.rounding.codebook import Codebook, Rounding, levels_of, sum_of_planes, values_of
from bincompress.methods.rounding.compensation import compensate
from bincompress.methods.rounding.curvature import curvature
from bincompress.methods.rounding.initial_scales import of_planes
from bincompress.tensors.dequantize import dequantize
from bincompress.tensors.float8 import as_float16, from_float8, to_float8
from cpu_kernels.quantize import compensation
from cpu_kernels.reference import compensation as reference_compensation
from cpu_kernels.reference.planes import expand
from tests.conftest import as_weight

FORMS = [sum_of_planes(1), sum_of_planes(2), sum_of_planes(3), Codebook(3, (1, 3, 5, 7)), billm.CODEBOOK]
CALIBRATED = [
    make_settings("xnor", compensate=True),
    make_settings("xnor", compensate=True, planes=3, block=64, scale_bits=8, refine=2),
    make_settings("xnor", compensate=True, block="row", refine=1),
    make_settings("wgm", compensate=True, refine=3),
    make_settings("wgm", compensate=True, groups=4, refine=1),
    make_settings("wgm", compensate=True, groups=1, scale_bits=8),
    make_settings("billm"),
    make_settings("billm", refine=2, block=64),
    make_settings("dbellquant", refine=2),
    make_settings("dbellquant", planes=1, scale_bits=8),
    make_settings("dbllm", block=64, compensate=True, refine=1),
]


def hessian_of(cols: int, seed: int = 0, tokens: int = 400) -> np.ndarray:
    """Return the Hessian of inputs whose channels differ in size and go together."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((tokens, cols)) @ (np.eye(cols) + 0.3 * random.standard_normal((cols, cols)) / cols**0.5)
    x *= np.exp(0.7 * random.standard_normal(cols))
    hessian: np.ndarray = (x.T @ x / tokens).astype(np.float32)
    return hessian


def inputs_of(cols: int, seed: int = 0) -> Inputs:
    hessian = hessian_of(cols, seed)
    return Inputs("layer", hessian, np.sqrt(np.diag(hessian)) * 4)


def case(rows: int, cols: int, form: Codebook, seed: int) -> tuple[np.ndarray, ...]:
    random = np.random.default_rng(seed)
    weights = random.standard_normal((rows, cols)).astype(np.float32)
    levels = random.standard_normal((rows, len(form.features))).astype(np.float32)
    classes = random.integers(0, 1 << form.column_planes, cols).astype(np.uint8)
    return weights, levels, classes


@pytest.mark.parametrize("form", FORMS)
@given(rows=st.integers(1, 5), cols=st.integers(1, 70), seed=st.integers(0, 99))
def test_kernels_equal_their_twins(form: Codebook, rows: int, cols: int, seed: int) -> None:
    weights, levels, classes = case(rows, cols, form, seed)
    known = curvature(hessian_of(cols, seed))
    codes, errors = np.empty(weights.shape, np.uint8), np.empty_like(weights)
    compensation.round_block(weights.copy(), known.factor, levels, classes, form.planes, codes, errors)
    expected, expected_errors = reference_compensation.round_block(weights, known.factor, levels, classes, form.planes)
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_allclose(errors, expected_errors, rtol=1e-4, atol=1e-5)
    chosen = np.empty_like(weights)
    for rows_of_levels in (levels[:1], levels):
        compensation.look_up(codes, rows_of_levels, 0, cols, chosen)
        np.testing.assert_array_equal(chosen, reference_compensation.look_up(codes, rows_of_levels))
    signs = np.empty((rows, form.coefs, cols - cols // 2), np.float32)
    compensation.spread(codes, form.features, cols // 2, cols, signs)
    np.testing.assert_array_equal(signs, reference_compensation.spread(codes[:, cols // 2 :], form.features))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("more", [True, False])
@given(rows=st.integers(1, 4), cols=st.integers(1, 70), seed=st.integers(0, 99), block=st.sampled_from([16, 40, 128]))
def test_moves_and_what_follows_from_them(
    form: Codebook, more: bool, rows: int, cols: int, seed: int, block: int
) -> None:
    weights, _, classes = case(rows, cols, form, seed)
    random = np.random.default_rng(1000 + seed)  # not the weights' own numbers: they would lie between levels
    hessian = curvature(hessian_of(cols, seed)).hessian
    coef = random.standard_normal((rows, -(-cols // block), form.coefs)).astype(np.float32)
    levels = np.stack([levels_of(form, c) for c in coef.transpose(1, 0, 2)], axis=1)
    codes = (random.integers(0, 1 << form.planes, weights.shape) | classes << form.planes).astype(np.uint8)
    pulled = weights @ hessian
    products = reference_compensation.products(codes, form.features, hessian, block)

    def check_equations(normal: np.ndarray, wanted: np.ndarray, codes: np.ndarray) -> None:
        expected = reference_compensation.normal_equations(pulled, hessian, codes, form.features, block)
        np.testing.assert_allclose(normal, expected[0], rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(wanted, expected[1], rtol=1e-4, atol=1e-3)

    equations = np.zeros((rows, coef[0].size, coef[0].size)), np.zeros((rows, coef[0].size))
    compensation.normal_equations(products, pulled, codes, form.features, block, *equations)
    check_equations(*equations, codes)
    after, before = codes.copy(), products.copy()
    step = min(32, block)
    gain = compensation.move_weights(
        products, pulled, hessian, coef, levels, form.features, classes, form.planes, block, step, 3, more, after,
        *equations,
    )  # fmt: skip
    expected, expected_gain = reference_compensation.move_weights(
        pulled, hessian, levels, classes, form.planes, block, step, 3, codes
    )
    np.testing.assert_array_equal(after, expected)
    assert gain == pytest.approx(expected_gain, rel=1e-3, abs=1e-4)
    old, new = (cost_of(weights, values_of(form, c, coef, block), hessian) for c in (codes, after))
    assert old - new == pytest.approx(gain, rel=1e-3, abs=1e-3)
    if more:
        before = reference_compensation.products(after, form.features, hessian, block)
        check_equations(*equations, after)
    np.testing.assert_allclose(products, before, rtol=1e-4, atol=1e-4)


@given(cols=st.integers(1, 150), rows=st.integers(1, 3), seed=st.integers(0, 99))
def test_starts_equal_their_twins(cols: int, rows: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    weights = random.standard_normal((rows, cols)).astype(np.float32)
    importance = np.exp(random.standard_normal(cols))
    means = np.empty((rows, 2))
    compensation.split_two(weights, importance, means)
    np.testing.assert_allclose(means, reference_compensation.split_two(weights, importance), rtol=1e-6)
    coef = np.tile([1.0, 0.5, 0.25], (rows, 1))
    features = sum_of_planes(3).features
    steps = 2 if cols >= 40 else 0  # fewer weights than levels leave scales open, and the last bit decides
    expected = reference_compensation.fit_scales(weights, importance, features, steps, coef)
    compensation.fit_scales(weights, importance, features, steps, coef)
    np.testing.assert_allclose(coef, expected, rtol=1e-4, atol=1e-5)


@given(count=st.integers(1, 4), size=st.integers(1, 60), seed=st.integers(0, 99))
def test_small_systems_are_solved(count: int, size: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    factors = random.standard_normal((count, size, 2 * size + 4))
    matrices, vectors = factors @ factors.transpose(0, 2, 1), random.standard_normal((count, size))
    solutions = np.empty_like(vectors)
    compensation.solve_each(matrices, vectors, solutions)
    np.testing.assert_allclose(solutions, np.linalg.solve(matrices, vectors[:, :, None])[:, :, 0], rtol=1e-6, atol=1e-9)


def test_two_groups_of_a_long_row() -> None:
    """Rows longer than what is counted are sorted."""
    weights = np.random.default_rng(5).standard_normal((2, 600)).astype(np.float32)
    weights[1] = np.round(weights[1], 1)  # many are the same
    means = np.empty((2, 2))
    compensation.split_two(weights, np.ones(600), means)
    np.testing.assert_allclose(means, reference_compensation.split_two(weights, np.ones(600)), rtol=1e-6)


@given(st.lists(st.floats(0, 2), min_size=1, max_size=50))
def test_8_bit_floats_are_the_nearest(values: list[float]) -> None:
    every = from_float8(np.arange(256, dtype=np.uint8), 0).astype(np.float64)
    assert np.all(np.diff(every) > 0)
    np.testing.assert_array_equal(to_float8(every), np.arange(256))
    array = np.array(values)
    distance = np.abs(from_float8(to_float8(array), 0) - array)
    np.testing.assert_allclose(distance, np.abs(every - array[:, None]).min(axis=1), atol=1e-12)


def test_8_bit_floats_are_what_they_were() -> None:
    """Golden: what codes stand for is a part of the store's format."""
    codes = np.array([0, 1, 15, 16, 17, 128, 240, 255], np.uint8)
    expected = np.array([0, 1, 15, 16, 17, 16 * 2**7, 16 * 2**14, 31 * 2**14]) * 2.0**-18
    np.testing.assert_array_equal(from_float8(codes, 0), expected.astype(np.float32))
    np.testing.assert_array_equal(from_float8(codes, -3), (expected / 8).astype(np.float32))
    np.testing.assert_array_equal(as_float16(codes).astype(np.float64), expected)  # float16 has them all


def cost_of(weights: np.ndarray, values: np.ndarray, hessian: np.ndarray) -> float:
    error = (weights - values).astype(np.float64)
    return float(np.einsum("rc,cd,rd->", error, hessian.astype(np.float64), error))


@pytest.mark.parametrize("planes", [1, 2, 3])
@pytest.mark.parametrize("bits", [8, 16])
def test_compensation_and_refinement_lower_the_cost(planes: int, bits: int) -> None:
    weights = np.random.default_rng(1).standard_normal((40, 200)).astype(np.float32)
    known, form, rounding = curvature(hessian_of(200)), sum_of_planes(planes), Rounding(bits, float(abs(weights).max()))
    flat = curvature(np.eye(200, dtype=np.float32))
    costs = []
    for inputs, refine in ((flat, 0), (known, 0), (known, 1), (known, 6)):
        found = compensate(weights, inputs, form, 64, of_planes(planes), rounding, refine)
        costs.append(cost_of(weights, values_of(form, found.codes, found.coef, 64), known.hessian))
        if inputs is known:
            size = cost_of(weights, np.zeros_like(weights), known.hessian)
            assert found.cost == pytest.approx(costs[-1] / size, rel=1e-3)
    # Rounding to the nearest level; GPTQ; one round; until nothing improves.
    assert costs[0] > 1.1 * costs[1] > 1.1 * costs[2] > costs[3]


def test_without_correlation_the_nearest_level_is_best() -> None:
    weights = np.random.default_rng(2).standard_normal((5, 128)).astype(np.float32)
    known, form = curvature(np.eye(128, dtype=np.float32)), sum_of_planes(2)
    found = compensate(weights, known, form, 128, of_planes(2), Rounding(16, 4.0), 0)
    levels = levels_of(form, found.coef[:, 0])
    nearest = np.abs(weights[:, :, None] - levels[:, None]).argmin(axis=2)
    np.testing.assert_array_equal(found.codes, nearest)


def test_the_factor_is_that_of_the_inverse() -> None:
    hessian = hessian_of(60)
    known = curvature(hessian)
    damped = hessian.astype(np.float64) + known.damping * np.trace(hessian) / 60 * np.eye(60)
    np.testing.assert_allclose(known.factor.T @ known.factor @ damped, np.eye(60), atol=1e-3)
    scale = np.exp(np.random.default_rng(0).standard_normal(60)).astype(np.float32)
    scaled = known.scaled(scale)
    np.testing.assert_allclose(scaled.hessian, hessian / np.outer(scale, scale), rtol=1e-6)
    np.testing.assert_allclose(
        scaled.factor.T @ scaled.factor @ (damped / np.outer(scale, scale)), np.eye(60), atol=1e-3
    )


def test_the_factor_of_a_large_hessian() -> None:
    """One that is factorised in several steps, the last one ragged."""
    hessian = hessian_of(300, tokens=1000)
    known = curvature(hessian)
    damped = hessian.astype(np.float64) + known.damping * np.trace(hessian) / 300 * np.eye(300)
    np.testing.assert_allclose(known.factor, np.linalg.cholesky(np.linalg.inv(damped)).T, rtol=1e-3, atol=1e-4)


def test_damping_is_raised_where_the_factorisation_fails() -> None:
    hessian = np.ones((8, 8), np.float32)
    hessian[0, 1] = hessian[1, 0] = 3.0  # no Gram matrix: an eigenvalue is -2
    assert curvature(hessian).damping > 1
    assert curvature(np.zeros((4, 4), np.float32)).damping == 0.01
    for bad in (np.full((3, 3), np.nan, np.float32), -np.eye(3, dtype=np.float32)):
        with pytest.raises(TensorError, match=r"layer: its Hessian .* calibrate again"):
            curvature(bad, "layer")


@pytest.mark.parametrize("settings", CALIBRATED)
@pytest.mark.parametrize(
    ("rows", "cols", "dtype"), [(1, 1, "BF16"), (3, 70, "F16"), (33, 128, "F32"), (9, 300, "BF16")]
)
def test_what_is_stored_is_what_was_chosen(settings: Any, rows: int, cols: int, dtype: str) -> None:
    weight = as_weight(np.random.default_rng(cols).standard_normal((rows, cols)) * 0.05, dtype)
    found = method_named(settings.method).binarize(weight, settings, inputs_of(cols))
    coef = found.tensor.numbers
    values = (
        from_float8(coef, found.tensor.exponent)
        if coef.dtype == np.uint8
        else np.ldexp(coef.astype(np.float32), found.tensor.exponent)
    )
    if found.tensor.mix is not None:
        values = np.einsum("ti,irb->trb", np.array(found.tensor.mix, np.float32), values)
    planes = found.tensor.planes
    if found.tensor.column_planes.size:
        shared = np.broadcast_to(
            found.tensor.column_planes[:, None], (len(found.tensor.column_planes), *planes.shape[1:])
        )
        planes = np.concatenate([planes, shared])
    stands_for = expand(planes, values, found.tensor.terms, found.tensor.block, cols)
    if found.tensor.in_scale is not None:
        stands_for *= found.tensor.in_scale
    exact = weight.float32().astype(np.float64)
    error = float(np.sum((exact - stands_for) ** 2))
    assert error == pytest.approx(found.squared_error, rel=2e-3, abs=1e-9)
    assert found.squared_norm == pytest.approx(float(np.sum(exact**2)))
    expected = {8: np.uint8, 16: np.float16}[settings.scale_bits]
    assert coef.dtype == expected
    if cols % 64:
        assert not np.any(found.tensor.planes[:, :, -1] >> np.uint64(cols % 64))


def test_a_weight_of_zeros_stays_zero() -> None:
    weight = as_weight(np.zeros((4, 128)), "BF16")
    for settings in CALIBRATED:
        found = method_named(settings.method).binarize(weight, settings, inputs_of(128))
        assert found.squared_error == 0
        assert not np.any(found.tensor.numbers)


def paper_descent(weights: np.ndarray, scale: np.ndarray, rate: float, most: int = 300) -> np.ndarray:
    """Return the scale of the paper's descent: gradient steps on its loss until the mean distance grows."""
    distance = np.inf
    for _ in range(most):
        transformed = weights * scale
        aim = dbellquant.targets(transformed)
        now = float(np.abs(transformed - aim).mean())
        if now > distance:
            break
        distance = now
        scale = scale - rate * np.mean(2 * (transformed - aim) / aim**2 * weights, axis=0)
    return scale


def nearest_error(weights: np.ndarray) -> float:
    """Return the relative squared error of each weight's nearer target."""
    return float(np.sum((weights - dbellquant.targets(weights)) ** 2) / np.sum(weights**2))


@pytest.mark.parametrize("name", ["self_attn.q_proj", "mlp.gate_proj"])
def test_the_dual_bell_search_is_as_good_as_the_papers_descent(name: str) -> None:
    from bincompress.sources.checkpoint import open_checkpoint, read_weight

    model = open_checkpoint(Path(dbellquant.__file__).parents[1] / "demo_model")
    weights = read_weight(model.tensors[f"model.layers.1.{name}.weight"]).float32().astype(np.float64)
    absmax = np.exp(np.random.default_rng(0).standard_normal(weights.shape[1])).astype(np.float32)
    begin = dbellquant.formula(weights, absmax, 0.85)
    ours = weights * list(dbellquant.descend(weights, begin))[-1]
    for rate in (0.001, 0.01, 0.1):
        theirs = weights * paper_descent(weights, begin, rate)
        assert dbellquant.bell_loss(ours) < dbellquant.bell_loss(theirs)
        assert nearest_error(ours) < nearest_error(theirs)
    assert dbellquant.bell_loss(weights * paper_descent(weights, begin, 0.01)) < dbellquant.bell_loss(weights * begin)


def test_one_scale_for_all_members_and_never_worse_on_what_it_saw() -> None:
    inputs = inputs_of(128)
    members = tuple(as_weight(np.random.default_rng(i).standard_normal((96, 128)) * 0.05, "BF16") for i in range(3))
    settings = make_settings("dbellquant", planes=1)
    scale = dbellquant.channel_scale(members, inputs, settings)
    assert scale.shape == (128,)
    assert np.all(scale > 0)
    assert not np.any(scale.view(np.uint32) & 0xFFFF)
    together = replace(inputs, channel_scale=scale)
    with_it = sum(method_named("dbellquant").binarize(m, settings, together).notes["output_error"] for m in members)
    without = sum(
        method_named("xnor").binarize(m, make_settings("xnor", compensate=True), inputs).notes["output_error"]
        for m in members
    )
    assert with_it < without


def test_an_input_scale_is_kept_only_where_it_pays() -> None:
    random = np.random.default_rng(3)
    plain = random.standard_normal((256, 128)) * 0.05
    inputs = inputs_of(128)
    kept = method_named("dbellquant").binarize(as_weight(plain, "BF16"), make_settings("dbellquant", planes=1), inputs)
    assert kept.tensor.in_scale is None
    assert "would not pay" in kept.notes["transformation"]
    uneven = plain * np.exp(1.5 * random.standard_normal(128))
    even_inputs = Inputs("layer", np.eye(128, dtype=np.float32), np.ones(128, np.float32))
    scaled = method_named("dbellquant").binarize(
        as_weight(uneven, "BF16"), make_settings("dbellquant", planes=1), even_inputs
    )
    assert scaled.tensor.in_scale is not None
    assert scaled.notes["transformation"] == "in_scale"


def test_methods_that_need_inputs_say_so() -> None:
    weight: Any = as_weight(np.ones((2, 64)), "BF16")
    for method in ("billm", "dbellquant"):
        with pytest.raises(TensorError, match=f"{method} needs statistics"):
            method_named(method).binarize(weight, make_settings(method))


@pytest.mark.parametrize("settings", CALIBRATED, ids=lambda s: "-".join(map(str, s.record().values())))
def test_columns_without_inputs_keep_their_nearest_levels(settings: Settings) -> None:
    """Inputs that were always zero in calibration may come later: here 3 of 256 columns."""
    random = np.random.default_rng(0)
    dead, cols = [3, 100, 255], 256
    x = random.standard_normal((1024, cols)).astype(np.float32)
    x[:, dead] = 0
    inputs = Inputs("layer", x.T @ x / np.float32(len(x)), np.abs(x).max(axis=0))
    weight = as_weight(random.standard_normal((64, cols)) * 0.05, "BF16")
    found = method_named(settings.method).binarize(weight, settings, inputs)
    exact, stored = weight.float32(), dequantize(found.tensor)
    errors = ((exact - stored) ** 2).sum(axis=0) / (exact**2).sum(axis=0)
    alive = np.setdiff1d(np.arange(cols), dead)
    # Columns are compensated for each other's errors, so one that stands alone is off by no more than they are.
    assert errors[dead].mean() < 1.2 * errors[alive].mean()


def test_few_tokens_are_not_refined_on() -> None:
    """Refinement on 128 tokens for 512 columns fits them better, and other inputs of the same kind worse."""
    random = np.random.default_rng(1)
    cols = 512
    mix = np.eye(cols) + 0.3 * random.standard_normal((cols, cols)) / cols**0.5
    seen, other = ((random.standard_normal((n, cols)) @ mix).astype(np.float32) for n in (128, 4096))
    weight = as_weight(random.standard_normal((96, cols)) * 0.05, "BF16")
    exact = weight.float32()

    def errors(tokens: int | None) -> tuple[float, float, dict[str, Any]]:
        inputs = Inputs("layer", seen.T @ seen / np.float32(len(seen)), np.abs(seen).max(axis=0), tokens=tokens)
        settings = make_settings("xnor", planes=2, compensate=True, refine=4)
        found = method_named("xnor").binarize(weight, settings, inputs)
        off = (exact - dequantize(found.tensor)).T
        relative = [float(np.sum((x @ off) ** 2) / np.sum((x @ exact.T) ** 2)) for x in (seen, other)]
        return relative[0], relative[1], found.notes

    refined, left = errors(None), errors(len(seen))
    assert refined[0] < left[0]
    assert left[1] < refined[1]
    assert (refined[2]["refinement_rounds"], left[2]["refinement_rounds"]) == (4, 0)
    assert left[2]["refinement"] == "left out: 128 tokens of calibration for 512 columns; expected at least 256"
    assert errors(256)[2] == refined[2]
