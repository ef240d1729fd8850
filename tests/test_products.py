"""Packed products: every kernel against the NumPy twin (integers equal), quantization, threads, refusals."""

import dataclasses
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llvmlite import binding, ir

from cpu_kernels.jit import cpu_features, llvm
from cpu_kernels.matmul import lookup
from cpu_kernels.matmul.activations import SEGMENT, Per, quantize
from cpu_kernels.matmul.prepacking import prepack
from cpu_kernels.matmul.products import TokenProduct, multiply
from cpu_kernels.parallel.workers import Workers
from cpu_kernels.reference import products as reference_products
from tests.product_cases import BITS_AND_BLOCKS, COLUMNS, EACH_KERNEL, ROWS, assert_near, make, tokens


@pytest.mark.parametrize("kernel", EACH_KERNEL)
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
    kernel: str,
    seed: int,
    rows: int,
    cols: int,
    count: int,
    bits_and_block: tuple[int, int],
    offset: bool,
    per: Per,
    n: int,
) -> None:
    bits, block = bits_and_block
    case = make(seed, rows, cols, count, block, offset, ones=True)
    # With scales of 1 the float32 sums are those of the integers, which stay below 2 ** 24.
    made = quantize(tokens(seed, n, cols), bits, per)
    activations = dataclasses.replace(made, scale=np.ones_like(made.scale), prepared={})
    exact = reference_products.integer_sums(case.planes, activations).sum(axis=(0, 3))
    if offset:
        exact = exact + activations.sums.sum(axis=1)[:, None]
    matrix = prepack(case.planes, case.scale, block, cols, case.offset, kernel=kernel)
    assert matrix.half
    np.testing.assert_array_equal(multiply(matrix, activations), exact, err_msg=kernel)


@pytest.mark.parametrize("kernel", EACH_KERNEL)
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
    kernel: str,
    seed: int,
    rows: int,
    cols: int,
    count: int,
    bits_and_block: tuple[int, int],
    offset: bool,
    per: Per,
    n: int,
) -> None:
    bits, block = bits_and_block
    case = make(seed, rows, cols, count, block, offset)
    activations = quantize(tokens(seed, n, cols), bits, per)
    matrix = prepack(case.planes, case.scale, block, cols, case.offset, kernel=kernel)
    found = multiply(matrix, activations)
    for t in range(n):
        assert_near(found[t : t + 1], case.expected(activations)[t : t + 1])


@pytest.mark.parametrize("bits", [6, 8])
@pytest.mark.parametrize("kernel", EACH_KERNEL)
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
@pytest.mark.parametrize("kernel", EACH_KERNEL)
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


@pytest.mark.parametrize("n", [1, 33])
@pytest.mark.parametrize("bits", [6, 8])
def test_many_tokens_in_blocks(n: int, bits: int) -> None:
    case = make(7, 130, 900, 2, 128, True)
    activations = quantize(tokens(8, n + 40, 900), bits)
    matrix = prepack(case.planes, case.scale, 128, 900, case.offset)
    assert_near(multiply(matrix, activations), case.expected(activations))


def test_zero_scales_and_zero_activations_give_zero() -> None:
    case = make(11, 33, 130, 2, 128, False)
    zero = np.zeros_like(case.scale)
    assert not multiply(prepack(case.planes, zero, 128, 130), quantize(tokens(1, 2, 130))).any()
    assert not multiply(prepack(case.planes, case.scale, 128, 130), quantize(np.zeros((2, 130), np.float32))).any()


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


@pytest.mark.parametrize("kernel", EACH_KERNEL)
@pytest.mark.parametrize(("bits", "per"), [(8, "segment"), pytest.param(6, "token", marks=pytest.mark.slow)])
@pytest.mark.parametrize("cols", [1, 129, 1100])
def test_a_token_quantized_on_the_way_gives_the_same_products(kernel: str, bits: int, per: Per, cols: int) -> None:
    block = 64 if bits == 8 else 128  # as BITS_AND_BLOCKS has them
    case = make(23, 300, cols, 2, block, True)
    matrix = prepack(case.planes, case.scale, block, cols, case.offset, kernel=kernel)
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
    byte = llvm.I8.as_pointer()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [byte, byte, byte]), "sums")
    builder = ir.IRBuilder(function.append_basic_block())
    packed, table, to = function.args
    even, odd = lookup.emit_sums(builder, cpu_features.NEON, 8, 16, 4, packed, [table], [])[0]
    llvm.store(builder, llvm.join(builder, even, odd), to, 2)
    builder.ret_void()
    text = str(module).replace('target triple = "unknown-unknown-unknown"', "")
    machine = target.create_target_machine(cpu="generic", opt=2)
    parsed = binding.parse_assembly(text)
    parsed.verify()
    assembly = machine.emit_assembly(parsed)
    # 16 vectors of two groups, low and high parts, 32 rows in registers of 16 bytes.
    assert assembly.count("tbl\t") == 16 * 2 * 2 * 2
    assert "\tbl\t" not in assembly  # no calls
