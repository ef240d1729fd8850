"""Packed products: every kernel against the NumPy twin (integers equal), quantization, layout, threads, refusals."""

import dataclasses
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llvmlite import binding, ir
from numpy.typing import NDArray

from cpu_kernels import lookup, reference_products, vector
from cpu_kernels.activations import SEGMENT, Activations, Per, quantize
from cpu_kernels.prepacking import Part, kernels, prepack, prepack_rows
from cpu_kernels.products import TokenProduct, multiply
from cpu_kernels.room import room
from cpu_kernels.workers import Workers

COLUMNS = [1, 4, 63, 64, 65, 127, 128, 129, 200, 256, 257, 400, 1100]
ROWS = [1, 2, 31, 32, 33, 63, 64, 65, 130]
BLOCKS = [64, 128, 256, 1 << 20]
# Each kernel is compiled for both numbers of bits, and for blocks of 64 columns with 8 bits: half a minute less.
BITS_AND_BLOCKS = [(bits, block) for block in BLOCKS for bits in (6, 8) if (bits, block) != (6, 64)]
KERNELS = kernels()


@dataclasses.dataclass
class Case:
    planes: NDArray[np.uint64]
    scale: NDArray[np.float32]
    offset: NDArray[np.float32] | None
    block: int
    cols: int

    def expected(self, activations: Activations, weights: tuple[float, ...] | None = None) -> NDArray[np.float64]:
        return reference_products.multiply(
            self.planes, self.scale, self.block, self.cols, activations, self.offset, weights
        )


def make(
    seed: int, rows: int, cols: int, count: int, block: int, offset: bool, ones: bool = False, shared: bool = False
) -> Case:
    rng = np.random.default_rng(seed)
    words = -(-cols // 64)
    planes = rng.integers(0, 1 << 64, (count, rows, words), dtype=np.uint64)
    if cols % 64:
        planes[..., -1] &= np.uint64((1 << cols % 64) - 1)
    blocks = 1 if block >= cols else -(-cols // block)

    def scales(*shape: int) -> NDArray[np.float32]:
        if ones:
            return np.ones(shape, np.float32)
        values = rng.normal(size=shape).astype(np.float16).astype(np.float32)
        return np.ldexp(values, -9)

    scale = scales(rows, blocks) if shared else scales(count, rows, blocks)
    return Case(planes, scale, scales(rows, blocks) if offset else None, block, cols)


def tokens(seed: int, count: int, cols: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    sizes: NDArray[np.float64] = rng.choice([1e-3, 1.0, 50.0], size=(count, 1))
    return (rng.normal(size=(count, cols)) * sizes).astype(np.float32)


def assert_near(found: NDArray[np.float32], expected: NDArray[np.float64]) -> None:
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 2e-6 * max(np.abs(expected).max(), 1e-30)


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    rows=st.sampled_from(ROWS),
    cols=st.sampled_from(COLUMNS),
    count=st.integers(1, 4),
    bits_and_block=st.sampled_from(BITS_AND_BLOCKS),
    offset=st.booleans(),
    per=st.sampled_from(["token", "segment"]),
    n=st.sampled_from([1, 2, 4, 5, 9]),
)
def test_integer_sums_equal_the_reference_with_every_kernel(
    seed: int, rows: int, cols: int, count: int, bits_and_block: tuple[int, int], offset: bool, per: Per, n: int
) -> None:
    bits, block = bits_and_block
    case = make(seed, rows, cols, count, block, offset, ones=True)
    # With scales of 1 the float32 sums are those of the integers, which stay below 2 ** 24.
    made = quantize(tokens(seed, n, cols), bits, per)
    activations = dataclasses.replace(made, scale=np.ones_like(made.scale), prepared={})
    exact = reference_products.integer_sums(case.planes, activations).sum(axis=(0, 3))
    if offset:
        exact = exact + activations.sums.sum(axis=1)[:, None]
    for kernel in KERNELS:
        matrix = prepack(case.planes, case.scale, block, cols, case.offset, kernel=kernel)
        assert matrix.half
        np.testing.assert_array_equal(multiply(matrix, activations), exact, err_msg=kernel)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    rows=st.sampled_from(ROWS),
    cols=st.sampled_from(COLUMNS),
    count=st.integers(1, 4),
    bits_and_block=st.sampled_from(BITS_AND_BLOCKS),
    offset=st.booleans(),
    per=st.sampled_from(["token", "segment"]),
    n=st.sampled_from([1, 4, 7]),
)
def test_scaled_products_are_near_the_reference(
    seed: int, rows: int, cols: int, count: int, bits_and_block: tuple[int, int], offset: bool, per: Per, n: int
) -> None:
    bits, block = bits_and_block
    case = make(seed, rows, cols, count, block, offset)
    activations = quantize(tokens(seed, n, cols), bits, per)
    for kernel in KERNELS:
        matrix = prepack(case.planes, case.scale, block, cols, case.offset, kernel=kernel)
        found = multiply(matrix, activations)
        for t in range(n):
            assert_near(found[t : t + 1], case.expected(activations)[t : t + 1])


@pytest.mark.parametrize("bits", [6, 8])
@pytest.mark.parametrize("kernel", KERNELS)
def test_extreme_activations_do_not_overflow(kernel: str, bits: int) -> None:
    case = make(3, 65, 1024, 2, 128, False, ones=True)
    case.planes[:, :32] = ~np.uint64(0)
    x = np.ones((3, 1024), np.float32)
    x[1] = -1
    x[2, ::2] = -1
    activations = quantize(x * {6: 31, 8: 127}[bits], bits)
    assert (activations.scale == 1).all()
    assert (np.abs(activations.q) == {6: 31, 8: 127}[bits]).all()
    np.testing.assert_array_equal(
        multiply(prepack(case.planes, case.scale, 128, 1024, kernel=kernel), activations), case.expected(activations)
    )


@pytest.mark.parametrize("beyond", [0, 1])
@pytest.mark.parametrize(("bits", "width"), [(6, 16), (6, 32), (8, 64)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_sums_that_just_fit_a_byte_and_that_do_not(kernel: str, bits: int, width: int, beyond: int) -> None:
    case = make(4, 65, 256, 2, 128, False, ones=True)
    case.planes[:, :32] = ~np.uint64(0)
    most = {6: 31, 8: 127}[bits]
    full, rest = divmod(lookup.CAPACITY[bits] + beyond, most)
    x = np.zeros((5, 256), np.float32)  # four tokens together and one alone
    for t, start in enumerate((0, 256 - width, width, 0, 128)):
        x[t, start : start + full + 1] = [most] * full + [rest]
    activations = quantize(x, bits)
    assert (activations.scale == 1).all()
    matrix = prepack(case.planes, case.scale, 128, 256, kernel=kernel)
    np.testing.assert_array_equal(multiply(matrix, activations), case.expected(activations))
    for t in range(5):
        alone = quantize(x[t], bits)
        np.testing.assert_array_equal(multiply(matrix, alone), case.expected(alone))


@pytest.mark.parametrize("kernel", KERNELS)
def test_plane_weights_share_one_scale(kernel: str) -> None:
    weights = (8.0, 4.0, 2.0, 1.0)
    case = make(5, 70, 300, 4, 128, True, shared=True)
    activations = quantize(tokens(6, 6, 300), 8, "segment")
    matrix = prepack(case.planes, case.scale, 128, 300, case.offset, plane_weights=weights, kernel=kernel)
    assert_near(multiply(matrix, activations), case.expected(activations, weights))


@pytest.mark.parametrize("n", [1, 33])
@pytest.mark.parametrize("bits", [6, 8])
def test_many_tokens_in_blocks(n: int, bits: int) -> None:
    case = make(7, 130, 900, 2, 128, True)
    activations = quantize(tokens(8, n + 40, 900), bits)
    matrix = prepack(case.planes, case.scale, 128, 900, case.offset)
    assert_near(multiply(matrix, activations), case.expected(activations))


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


def test_zero_scales_and_zero_activations_give_zero() -> None:
    case = make(11, 33, 130, 2, 128, False)
    zero = np.zeros_like(case.scale)
    assert not multiply(prepack(case.planes, zero, 128, 130), quantize(tokens(1, 2, 130))).any()
    assert not multiply(prepack(case.planes, case.scale, 128, 130), quantize(np.zeros((2, 130), np.float32))).any()


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
    return (rng.integers(0, 0x7C00, shape, np.uint16) | sign).view(np.float16)


def widened(part: Part) -> Part:
    scale, offset = (
        None if numbers is None else np.ldexp(numbers.astype(np.float32), part.exponent)
        for numbers in (part.scale, part.offset)
    )
    return Part(part.planes, scale, offset)  # type: ignore[arg-type]


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    parts=st.lists(
        st.tuples(st.integers(1, 140), st.sampled_from([-70, -64, -9, 0, 64]), st.booleans()), min_size=1, max_size=3
    ),
    cols=st.sampled_from([*COLUMNS, 1600]),
    block=st.sampled_from([128, 256, 1 << 20]),
    offset=st.booleans(),
    shared=st.booleans(),
    kernel=st.sampled_from([KERNELS[0], "popcount"]),
)
def test_scales_laid_out_as_they_are_stored_give_the_products_of_float32_scales(
    seed: int, parts: list[tuple[int, int, bool]], cols: int, block: int, offset: bool, shared: bool, kernel: str
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
        arrays = list(pool.map(room, sizes * 2))
    for number, (array, size) in enumerate(zip(arrays, sizes * 2, strict=True)):
        assert array.size == size
        assert array.ctypes.data % 64 == 0
        assert not array.any()
        array[:] = number + 1
    assert [set(array[[0, -1]].tolist()) for array in arrays] == [{number + 1} for number in range(len(arrays))]


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    n=st.integers(1, 4),
    cols=st.sampled_from(COLUMNS),
    bits=st.sampled_from([6, 8]),
    per=st.sampled_from(["token", "segment"]),
    odd=st.sampled_from([None, 0.0, np.nan, np.inf, -np.inf, 1e-38, 1e-45, 3e38]),
    everywhere=st.booleans(),
)
def test_quantization_equals_the_reference(
    seed: int, n: int, cols: int, bits: int, per: Per, odd: float | None, everywhere: bool
) -> None:
    x = tokens(seed, n, cols)
    if odd is not None:
        x[0, slice(None) if everywhere else cols // 2] = odd
    found, expected = quantize(x, bits, per), reference_products.quantize(x, bits, per)
    for field in ("q", "scale", "sums", "absolute"):
        np.testing.assert_array_equal(getattr(found, field), getattr(expected, field), err_msg=field)
    assert not found.q[:, cols:].any()
    finite = np.isfinite(found.scale).all(axis=1)
    back = (found.q * np.repeat(found.scale, SEGMENT, axis=1))[:, :cols]
    assert (np.abs(back - x)[finite] <= 0.5001 * found.scale.max(axis=1, initial=0)[finite, None] + 1e-35).all()


def test_a_token_with_nan_has_nan_products_and_leaves_others_alone() -> None:
    case = make(13, 33, 256, 1, 128, False)
    x = tokens(14, 3, 256)
    x[1, 200] = np.nan
    found = multiply(prepack(case.planes, case.scale, 128, 256), quantize(x, per="segment"))
    assert np.isnan(found[1]).all()
    assert np.isfinite(found[[0, 2]]).all()


@pytest.mark.parametrize("kernel", [name for name in KERNELS if name.startswith("lookup")])
def test_layout_of_the_lookup_stream(kernel: str) -> None:
    code = {f"lookup-{name}": number for number, name in vector.NAMES.items()}[kernel]
    tile = vector.tile_rows(code)
    case = make(15, tile, 128, 2, 128, False, ones=True)
    stream = prepack(case.planes, case.scale, 128, 128, kernel=kernel).stream
    assert stream.ctypes.data % 64 == 0
    assert (stream[: 4 * tile].view(np.float16) == 2.0**15).all()
    packed = stream[4 * tile :].reshape(2, 16, tile)
    of_rows = case.planes.view(np.uint8)  # (planes, tile, 16)
    # (planes, vectors, pieces of 16 bytes, quarter of an even or odd byte, four rows, even or odd)
    quarters = packed.reshape(2, 16, tile // 16, 2, 4, 2).transpose(0, 5, 3, 2, 4, 1)
    np.testing.assert_array_equal(quarters.reshape(of_rows.shape), of_rows)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads_share_rows_and_change_nothing(threads: int) -> None:
    case = make(17, 300, 500, 2, 128, True)
    activations = quantize(tokens(18, 40, 500))
    matrix = prepack(case.planes, case.scale, 128, 500, case.offset)
    expected = multiply(matrix, activations)
    before = threading.active_count()
    with Workers(threads) as pool:
        assert threading.active_count() == before + threads - 1
        np.testing.assert_array_equal(multiply(matrix, activations, pool=pool), expected)
        again = prepack(case.planes, case.scale, 128, 500, case.offset, pool=pool)
        np.testing.assert_array_equal(again.stream, matrix.stream)
    with ThreadPoolExecutor(threads) as executor:
        np.testing.assert_array_equal(multiply(matrix, activations, pool=executor), expected)


def test_workers_pass_errors_on_and_go_on() -> None:
    def fail() -> None:
        raise RuntimeError("broken")

    done: list[int] = []
    with Workers(2) as pool:
        with pytest.raises(RuntimeError, match="broken"):
            pool.run([lambda: done.append(1), fail])
        pool.run([lambda: done.append(2), lambda: done.append(3)])
    assert sorted(done) == [1, 2, 3]


def test_out_and_prepared_tables_are_reused() -> None:
    case = make(19, 64, 256, 2, 128, False)
    matrix = prepack(case.planes, case.scale, 128, 256)
    activations = quantize(tokens(20, 1, 256)[0])
    out = np.empty((1, 64), np.float32)
    assert multiply(matrix, activations, out) is out
    assert len(activations.prepared) == 1
    first = out.copy()
    np.testing.assert_array_equal(multiply(matrix, activations), first)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("bits", "per"), [(8, "segment"), (6, "token")])
@pytest.mark.parametrize("cols", [1, 129, 1100])
def test_a_token_quantized_on_the_way_gives_the_same_products(kernel: str, bits: int, per: Per, cols: int) -> None:
    case = make(23, 300, cols, 2, 64, True)
    matrix = prepack(case.planes, case.scale, 64, cols, case.offset, kernel=kernel)
    for x in (*tokens(24, 3, cols)[:, None], np.full((1, cols), np.nan, np.float32)):
        expected = multiply(matrix, quantize(x, bits, per))
        for threads in (1, 3):
            with Workers(threads) as workers:
                product = TokenProduct(matrix, bits, per, workers)
                out = np.empty((1, 300), np.float32)
                assert product(x, out) is out
                np.testing.assert_array_equal(out, expected)
                np.testing.assert_array_equal(product(x), expected)


def test_workers_do_kernel_jobs_awake_asleep_and_between_python_tasks() -> None:
    case = make(25, 700, 256, 2, 128, False)
    matrix = prepack(case.planes, case.scale, 128, 256)
    inputs = tokens(26, 8, 256)[:, None]
    expected = [multiply(matrix, quantize(x)) for x in inputs]
    with Workers(3) as workers:
        product = TokenProduct(matrix, 8, "token", workers)
        for x, y in zip(inputs, expected, strict=True):
            for _ in range(50):  # without a pause: the workers wait in native code
                np.testing.assert_array_equal(product(x), y)
            time.sleep(0.02)  # they have returned to Python
            np.testing.assert_array_equal(product(x), y)
            done: list[int] = []
            workers.run([partial(done.append, number) for number in range(3)])
            assert sorted(done) == [0, 1, 2]
    assert workers.threads == 1
    np.testing.assert_array_equal(TokenProduct(matrix, 8, "token", workers)(inputs[0]), expected[0])


def test_unknown_kernels_and_wrong_shapes_are_refused() -> None:
    case = make(21, 33, 130, 2, 128, False)
    with pytest.raises(ValueError, match=r"available: .*popcount"):
        prepack(case.planes, case.scale, 128, 130, kernel="lookup-vax")
    with pytest.raises(ValueError, match="multiple of 64"):
        prepack(case.planes, case.scale, 100, 130)
    with pytest.raises(ValueError, match=r"scale: float32 \(2, 33, 2\); expected float32 \(2, 33, 3\)"):
        prepack(case.planes, case.scale, 64, 130)
    with pytest.raises(ValueError, match="130"):
        multiply(prepack(case.planes, case.scale, 128, 130), quantize(np.zeros((1, 131), np.float32)))
    with pytest.raises(ValueError, match=r"x: float32 \(1, 131\); expected float32 \(1, 130\)"):
        TokenProduct(prepack(case.planes, case.scale, 128, 130), 8, "token", Workers(1))(np.zeros((1, 131), np.float32))
    with pytest.raises(ValueError, match="expected 8 or 6"):
        quantize(np.zeros((1, 8), np.float32), 7)


def test_the_neon_form_compiles_to_table_instructions() -> None:
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    try:
        target = binding.Target.from_triple("aarch64-unknown-linux-gnu")
    except RuntimeError:
        pytest.skip("LLVM was built without this target")
    module = ir.Module()
    byte = vector.I8.as_pointer()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [byte, byte, byte]), "sums")
    builder = ir.IRBuilder(function.append_basic_block())
    packed, table, to = function.args
    even, odd = lookup.emit_sums(builder, vector.NEON, 8, 16, 4, packed, [table], [])[0]
    vector.store(builder, vector.join(builder, even, odd), to, 2)
    builder.ret_void()
    text = str(module).replace('target triple = "unknown-unknown-unknown"', "")
    machine = target.create_target_machine(cpu="generic", opt=2)
    parsed = binding.parse_assembly(text)
    parsed.verify()
    assembly = machine.emit_assembly(parsed)
    # 16 vectors of two groups, low and high parts, 32 rows in registers of 16 bytes.
    assert assembly.count("tbl\t") == 16 * 2 * 2 * 2
    assert "\tbl\t" not in assembly  # no calls


@pytest.mark.skipif("lookup-avx2" not in KERNELS, reason="needs AVX2")
@pytest.mark.parametrize(
    ("features", "expected"), [("+avx2,+avx,+ssse3", "lookup-avx2"), ("+ssse3", "lookup-ssse3"), ("", "popcount")]
)
def test_the_kernel_follows_what_the_process_compiles_for(features: str, expected: str) -> None:
    code = "from cpu_kernels.prepacking import kernels; print(kernels()[0])"
    environment: dict[str, Any] = {**os.environ, "NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": features}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == expected
