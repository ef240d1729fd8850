"""Does DBellQuant know what rounding activations costs, and are its channel scales such that it costs less?"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bincompress.methods import Inputs, dbellquant, make_settings
from bincompress.methods.rounding.activation_error import Magnitudes, peak
from bincompress.tensors.dequantize import dequantize
from bincompress.tensors.weight import Weight
from cpu_kernels.matmul.activations import quantize
from tests.conftest import as_weight

Array = np.ndarray
ROWS, COLS, TOKENS = 192, 256, 4096
OUTLIERS = [3, 70, 131, 200]


def inputs_of(x: Array) -> Inputs:
    hessian = (x.T @ x / np.float32(len(x))).astype(np.float32)
    return Inputs("layer", hessian, np.abs(x).max(axis=0), tokens=len(x))


def rounded(x: Array, bits: int) -> Array:
    """Return activations (tokens, cols) as the engine rounds them, one scale per token and 128 columns."""
    found = quantize(x, bits, "segment")
    steps = np.repeat(found.scale, 128, axis=1)
    values: Array = (found.q * steps)[:, : x.shape[1]]
    return values


def outlier_inputs(seed: int) -> Array:
    """Return normal inputs, four of whose channels are 25 times as large as the others."""
    sizes = np.ones(COLS)
    sizes[OUTLIERS] = 25
    return (np.random.default_rng(seed).standard_normal((TOKENS, COLS)) * sizes).astype(np.float32)


def uneven_inputs(seed: int) -> Array:
    """Return inputs whose channels differ in size and go together."""
    fixed = np.random.default_rng(5)
    sizes, mix = np.exp(fixed.standard_normal(COLS)), np.eye(COLS) + fixed.standard_normal((COLS, COLS)) / COLS**0.5
    x: Array = (np.random.default_rng(seed).standard_normal((TOKENS, COLS)) @ mix * sizes).astype(np.float32)
    return x


def weight_for(x: Array, power: float) -> Weight:
    """Return weights; power 0: of one size, 1: the smaller the larger the inputs, as all channels matter alike."""
    sizes = np.sqrt(np.mean(x.astype(np.float64) ** 2, axis=0))
    return as_weight(np.random.default_rng(7).standard_normal((ROWS, COLS)) * 0.05 / sizes**power, "BF16")


def folded(weight: Weight, inputs: Inputs, **options: object) -> tuple[Array, Array, dict[str, object]]:
    """Return a norm's channel scale, the stored weights (of x / scale) and the report."""
    settings = make_settings("dbellquant", **options)
    scale = dbellquant.channel_scale([weight], inputs, settings)
    found = dbellquant.binarize(weight, settings, replace(inputs, channel_scale=scale))
    return scale, dequantize(found.tensor), found.notes


def output_error(weight: Weight, scale: Array, stored: Array, x: Array, bits: int) -> float:
    """Return the share of the outputs W x that Q round(x / scale) is off by, a mean over tokens; 16: not rounded."""
    exact = x @ weight.float32().T
    scaled = x / scale
    made = (scaled if bits == 16 else rounded(scaled, bits)) @ stored.T
    return float(np.sum((exact - made) ** 2) / np.sum(exact**2))


@pytest.mark.parametrize("bits", [6, 8])
@pytest.mark.parametrize("cols", [100, 256, 300])
@pytest.mark.parametrize("kind", ["normal", "exponential"])
def test_what_the_statistics_tell_is_what_rounding_costs(kind: str, cols: int, bits: int) -> None:
    random = np.random.default_rng(cols)
    drawn = random.standard_normal((TOKENS, cols)) if kind == "normal" else random.laplace(size=(TOKENS, cols))
    x = (drawn * np.exp(0.7 * random.standard_normal(cols))).astype(np.float32)
    x[:, 5] = 0  # a channel that is always zero
    weights = random.standard_normal((64, cols)).astype(np.float32)
    size = float(np.mean(np.sum((x @ weights.T) ** 2, axis=1)))
    for scale in (np.ones(cols), np.exp(0.7 * random.standard_normal(cols))):
        scaled = (x / scale).astype(np.float32)
        off = (rounded(scaled, bits) - scaled) @ (weights * scale).T
        measured = float(np.mean(np.sum(off**2, axis=1))) / size
        told = Magnitudes.of(inputs_of(x)).moved(weights * scale, scale, bits, size)
        assert told == pytest.approx(measured, rel=0.25)


def test_nothing_is_moved_where_nothing_is_rounded() -> None:
    x = outlier_inputs(0)
    weights, ones = np.ones((2, COLS)), np.ones(COLS)
    assert Magnitudes.of(inputs_of(x)).moved(weights, ones, 16, 1.0) == 0
    assert Magnitudes.of(inputs_of(np.zeros_like(x))).moved(weights, ones, 6, 1.0) == 0
    assert Magnitudes.of(inputs_of(x)).moved(weights, ones, 6, 0.0) == 0  # outputs that are all zero


def test_one_channel_that_is_greater_than_all_others() -> None:
    """It sets the step, and is exact itself; by hand, the others are off by a twelfth of (8 / 31) ** 2 at 6 bits."""
    x = np.random.default_rng(0).uniform(-1, 1, (TOKENS, 128)).astype(np.float32)
    x[:, 9] = np.where(np.arange(TOKENS) % 2, 8.0, -8.0)
    variances = Magnitudes.of(inputs_of(x)).variances(np.ones(128), 6)
    assert variances[9] < 1e-6
    # Magnitudes that are all one are taken as of the narrowest shape that is looked for.
    np.testing.assert_allclose(np.delete(variances, 9), (8 / 31) ** 2 / 12, rtol=0.05)


@pytest.mark.parametrize("planes", [1, 2])
def test_outlier_channels_are_smoothed(planes: int) -> None:
    """Four channels in 256 make the peak; with the scale six bits lose less than a tenth of what they do without."""
    x, fresh = outlier_inputs(0), outlier_inputs(1)
    weight, inputs = weight_for(x, 1.0), inputs_of(x)
    scale, stored, notes = folded(weight, inputs, planes=planes, activation_bits=6)
    before, after = peak(inputs.absmax, np.ones_like(scale)), peak(inputs.absmax, scale)
    assert before > 7
    assert after < 0.25 * before
    assert notes["activation_peak"] == [float(f"{value:.5g}") for value in (before, after)]
    exact, plain = output_error(weight, scale, stored, fresh, 16), stored / scale
    lost = output_error(weight, scale, stored, fresh, 6) - exact
    unscaled = output_error(weight, np.ones_like(scale), plain, fresh, 6) - exact
    assert lost < 0.1 * unscaled


def test_six_bits_cost_less_where_the_search_knows_of_them() -> None:
    x, fresh = uneven_inputs(0), uneven_inputs(1)
    weight, inputs = weight_for(x, 0.0), inputs_of(x)

    def errors(**options: object) -> tuple[list[float], dict[str, object]]:
        scale, stored, notes = folded(weight, inputs, **options)
        return [output_error(weight, scale, stored, fresh, bits) for bits in (16, 6)], notes

    heedless, without = errors(activation_bits=16)
    least, notes = errors(activation_bits=6, smoothing=1.0)  # what is sought is then the error itself
    smooth, _ = errors(activation_bits=6, smoothing=16.0)
    assert without["activation_error"] == 0
    assert least[1] < heedless[1]
    assert notes["activation_error"] == pytest.approx(least[1] - least[0], rel=0.3)
    assert smooth[1] - smooth[0] < 0.6 * (heedless[1] - heedless[0])


def test_fewer_bits_smooth_more() -> None:
    x = uneven_inputs(0)
    weight, inputs = weight_for(x, 0.0), inputs_of(x)

    def error(bits: int) -> float:
        scale = folded(weight, inputs, activation_bits=bits, smoothing=16.0)[0]
        return Magnitudes.of(inputs).moved(weight.float32() * scale, scale.astype(np.float64), 6, 1.0)

    costs = [error(bits) for bits in (6, 8, 16)]
    assert costs[0] < 0.7 * costs[2]
    assert costs[0] <= costs[1] <= costs[2]


def test_an_input_scale_pays_by_what_it_saves_activations() -> None:
    """Where no norm feeds the layer, the scale has to pay for its bits: here it does at 6 bits alone."""
    x = uneven_inputs(0)
    weight, inputs = weight_for(x, 0.0), inputs_of(x)

    def found(**options: object) -> Any:
        return dbellquant.binarize(weight, make_settings("dbellquant", **options), inputs)

    assert found(activation_bits=16).tensor.in_scale is None
    scaled, unscaled = found(activation_bits=6, smoothing=16.0), found(activation_bits=6, smoothing=0.0)
    assert scaled.tensor.in_scale is not None
    assert unscaled.tensor.in_scale is None
    assert scaled.notes["activation_error"] < 0.6 * unscaled.notes["activation_error"]


def test_the_same_scale_every_time() -> None:
    x = outlier_inputs(0)
    weight, inputs = weight_for(x, 0.5), inputs_of(x)
    first, second = (folded(weight, inputs, activation_bits=6)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)
