"""Laying out: scales of every kind, several matrices in one, the stream, its memory, the choice of kernel."""

import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cpu_kernels.jit import cpu_features
from cpu_kernels.matmul import aligned_memory
from cpu_kernels.matmul.activations import quantize
from cpu_kernels.matmul.aligned_memory import allocate
from cpu_kernels.matmul.prepacking import Part, prepack, prepack_rows
from cpu_kernels.matmul.products import multiply
from tests.product_cases import COLUMNS, EACH_KERNEL, KERNELS, assert_near, make, tokens


@pytest.mark.parametrize("kernel", EACH_KERNEL)
def test_plane_weights_share_one_scale(kernel: str) -> None:
    weights = (8.0, 4.0, 2.0, 1.0)
    case = make(5, 70, 300, 4, 128, True, shared=True)
    activations = quantize(tokens(6, 6, 300), 8, "segment")
    matrix = prepack(case.planes, case.scale, 128, 300, case.offset, plane_weights=weights, kernel=kernel)
    assert_near(multiply(matrix, activations), case.expected(activations, weights))


@pytest.mark.slow
def test_scales_that_are_no_float16_stay_float32() -> None:
    case = make(9, 40, 300, 2, 128, True)
    case.scale[1, 7, 2] = np.float32(1 / 3)
    matrix = prepack(case.planes, case.scale, 128, 300, case.offset)
    assert not matrix.half
    activations = quantize(tokens(10, 5, 300), 8)
    assert_near(multiply(matrix, activations), case.expected(activations))


@pytest.mark.parametrize("power", [-30, 0, 12, 40])
def test_float16_scales_times_a_power_of_two_stay_exact(power: int) -> None:
    # Every finite float16, including subnormal ones, beside the largest of its row.
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)].astype(np.float32)
    scale = np.ldexp(np.pad(halves, (0, -len(halves) % 31)).reshape(1, -1, 31), power).astype(np.float32)
    rows, cols = scale.shape[1], 31 * 64
    planes = np.full((1, rows, 31), 1, np.uint64)
    matrix = prepack(planes, scale, 64, cols)
    assert matrix.half
    for block in (0, 17, 30):  # an activation of one block alone shows that block's scale
        x = np.zeros((1, cols), np.float32)
        x[0, 64 * block] = 127
        np.testing.assert_array_equal(multiply(matrix, quantize(x)), scale[:, :, block] * 127)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    heights=st.lists(st.integers(1, 70), min_size=1, max_size=4), kernel=st.sampled_from(KERNELS), offset=st.booleans()
)
def test_matrices_below_each_other_equal_their_separate_products(heights: list[int], kernel: str, offset: bool) -> None:
    cases = [make(k, height, 200, 2, 64, offset) for k, height in enumerate(heights)]
    for k, case in enumerate(cases):
        case.scale *= np.float32(2.0 ** (-12 * k))
        if case.offset is not None:
            case.offset *= np.float32(2.0 ** (-12 * k))
    activations = quantize(tokens(12, 2, 200), 8)
    joined = prepack_rows([Part(c.planes, c.scale, c.offset) for c in cases], 64, 200, kernel=kernel)
    assert joined.half
    alone = [multiply(prepack(c.planes, c.scale, 64, 200, c.offset, kernel=kernel), activations) for c in cases]
    np.testing.assert_array_equal(multiply(joined, activations), np.concatenate(alone, axis=1))


def any_float16(rng: np.random.Generator, *shape: int) -> NDArray[np.float16]:
    """Numbers of every size, subnormal ones and zeros of both signs among them; no infinity."""
    sign = rng.integers(0, 2, shape, np.uint16) << np.uint16(15)
    patterns: NDArray[np.uint16] = rng.integers(0, 0x7C00, shape, np.uint16) | sign
    return patterns.view(np.float16)


def widened(part: Part) -> Part:
    scale, offset = (
        None if numbers is None else np.ldexp(numbers.astype(np.float32), part.exponent)
        for numbers in (part.scale, part.offset)
    )
    return Part(part.planes, scale, offset)  # type: ignore[arg-type]


@pytest.mark.parametrize("kernel", [KERNELS[0], pytest.param("popcount", marks=pytest.mark.slow)])
@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    parts=st.lists(
        st.tuples(st.integers(1, 140), st.sampled_from([-70, -64, -9, 0, 64]), st.booleans()), min_size=1, max_size=3
    ),
    cols=st.sampled_from([*COLUMNS, 1600]),
    block=st.sampled_from([128, 256, 1 << 20]),
    offset=st.booleans(),
    shared=st.booleans(),
)
def test_scales_laid_out_as_they_are_stored_give_the_products_of_float32_scales(
    kernel: str, seed: int, parts: list[tuple[int, int, bool]], cols: int, block: int, offset: bool, shared: bool
) -> None:
    rng = np.random.default_rng(seed)
    blocks = 1 if block >= cols else -(-cols // block)
    stored = []
    for rows, exponent, wide in parts:
        planes = make(seed + rows, rows, cols, 2, block, False).planes
        scale = any_float16(rng, *(() if shared else (2,)), rows, blocks)
        part = Part(planes, scale, any_float16(rng, rows, blocks) if offset else None, exponent)
        stored.append(widened(part) if wide else part)
    activations = quantize(tokens(seed, 2, cols), 8, "segment")
    weights = (2.0, 1.0) if shared else None
    found, expected = (
        multiply(prepack_rows(given, block, cols, plane_weights=weights, kernel=kernel), activations)
        for given in (stored, [widened(part) for part in stored])
    )
    np.testing.assert_array_equal(found, expected)


def test_arrays_of_an_arena_are_zeros_of_their_own() -> None:
    sizes = [1, 63, 64, 65, 5 << 20, 40 << 20, 3, 30 << 20]
    with ThreadPoolExecutor(4) as pool:
        arrays = list(pool.map(allocate, sizes * 2))
    for number, (array, size) in enumerate(zip(arrays, sizes * 2, strict=True)):
        assert array.size == size
        assert array.ctypes.data % 64 == 0
        assert not array.any()
        array[:] = number + 1
    assert [set(array[[0, -1]].tolist()) for array in arrays] == [{number + 1} for number in range(len(arrays))]


def test_an_interrupt_while_an_arena_begins_gives_no_memory_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        @staticmethod
        def ref(found: object) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(aligned_memory, "_last", None)
    size = 60 << 20  # two fill an arena; no page of it is touched
    held = [allocate(size), allocate(size)]
    with monkeypatch.context() as patch:
        patch.setattr(aligned_memory, "weakref", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            allocate(size)
    held += [allocate(1), allocate(size), allocate(size)]
    spans = sorted((array.ctypes.data, array.size) for array in held)
    assert all(start + length <= following for (start, length), (following, _) in itertools.pairwise(spans))


@pytest.mark.parametrize("kernel", [name for name in KERNELS if name.startswith("lookup")])
def test_layout_of_the_lookup_stream(kernel: str) -> None:
    code = {f"lookup-{name}": number for number, name in cpu_features.NAMES.items()}[kernel]
    tile = cpu_features.tile_rows(code)
    case = make(15, tile, 128, 2, 128, False, ones=True)
    stream = prepack(case.planes, case.scale, 128, 128, kernel=kernel).stream
    assert stream.ctypes.data % 64 == 0
    assert (stream[: 4 * tile].view(np.float16) == 2.0**15).all()
    packed = stream[4 * tile :].reshape(2, 16, tile)
    of_rows = case.planes.view(np.uint8)  # (planes, tile, 16)
    # (planes, vectors, pieces of 16 bytes, quarter of an even or odd byte, four rows, even or odd)
    quarters = packed.reshape(2, 16, tile // 16, 2, 4, 2).transpose(0, 5, 3, 2, 4, 1)
    np.testing.assert_array_equal(quarters.reshape(of_rows.shape), of_rows)


@pytest.mark.skipif("lookup-avx2" not in KERNELS, reason="needs AVX2")
@pytest.mark.parametrize(
    ("features", "expected"), [("+avx2,+avx,+ssse3", "lookup-avx2"), ("+ssse3", "lookup-ssse3"), ("", "popcount")]
)
def test_the_kernel_follows_what_the_process_compiles_for(features: str, expected: str) -> None:
    code = "from cpu_kernels.matmul.prepacking import kernels; print(kernels()[0])"
    environment: dict[str, Any] = {**os.environ, "NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": features}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == expected
