"""Do nominal bits follow the grouping paper's formula for every method alike?"""

from typing import Any

import numpy as np
import pytest

from bincompress.methods import METHODS, Inputs, Settings, make_settings, method_named
from tests.conftest import EVERY_METHOD, as_weight

ROWS, COLS = 64, 256
WEIGHTS = ROWS * COLS
CALIBRATED = [
    *(make_settings("xnor", compensate=True, planes=planes) for planes in (1, 2, 3, 4)),
    make_settings("xnor", compensate=True, planes=2, scale_bits=8, block=64),
    *(make_settings("wgm", compensate=True, groups=groups, refine=1) for groups in (1, 2, 4, 16)),
    make_settings("wgm", compensate=True, groups=1, scale_bits=8, block="row"),
    make_settings("billm"),
    make_settings("billm", block=64, refine=1),
    make_settings("dbellquant", planes=1),
    make_settings("dbellquant", scale_bits=8),
    make_settings("dbllm", compensate=True),
]


def binarized(settings: Settings) -> Any:
    random = np.random.default_rng(0)
    weight = as_weight(random.standard_normal((ROWS, COLS)) * 0.05, "BF16")
    seen = random.standard_normal((2 * COLS, COLS)).astype(np.float32)
    hessian = (seen.T @ seen / len(seen)).astype(np.float32)
    inputs = Inputs("layer", hessian, np.abs(seen).max(axis=0)) if settings.calibrated else None
    return method_named(settings.method).binarize(weight, settings, inputs)


@pytest.mark.parametrize(
    "settings", EVERY_METHOD + CALIBRATED, ids=lambda one: "-".join(map(str, one.record().values()))
)
def test_nominal_bits_are_a_sign_and_the_scales(settings: Any) -> None:
    found = binarized(settings)
    units = 1 if settings.block == "matrix" else ROWS * -(-COLS // settings.block_columns(COLS))
    # Here no row-block has fewer groups than another; every other method has as many scales as it stores.
    scales = units * (found.groups if settings.method == "wgm" else len(found.tensor.numbers))
    bits = getattr(settings, "scale_bits", 16)
    assert found.nominal_bits == 1 + bits * scales / WEIGHTS
    # They leave bytes out, so they are no more than what is stored.
    assert found.nominal_bits <= 8 * sum(values.nbytes for values in found.tensor.arrays().values()) / WEIGHTS


def test_every_method_is_among_the_cases() -> None:
    tried = {settings.method for settings in EVERY_METHOD + CALIBRATED} | {"lossless", "lowrank"}
    assert tried == {method.name for method in METHODS}


def test_what_is_lossless_counts_like_the_others() -> None:
    """Two planes with scales of rows; it is for matrices of few levels alone."""
    scales = np.linspace(0.5, 2, ROWS, dtype=np.float32)[:, None]
    weight = as_weight(np.random.default_rng(0).integers(-1, 2, (ROWS, COLS)) * scales, "F32")
    found = method_named("lossless").binarize(weight, make_settings("lossless"), None)
    assert found.nominal_bits == 1 + 16 * found.tensor.numbers.size / WEIGHTS
    assert len(found.tensor.planes) == 2


def test_the_same_two_planes_count_the_same_by_any_method() -> None:
    two_planes = [
        make_settings("wgm", groups=2),
        make_settings("wgm", groups=2, compensate=True),
        make_settings("xnor", planes=2, compensate=True),
        make_settings("dbellquant", planes=2),
        make_settings("dbllm", block=128),
    ]
    assert {binarized(settings).nominal_bits for settings in two_planes} == {1.25}
