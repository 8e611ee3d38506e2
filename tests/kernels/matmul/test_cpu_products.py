"""What multiplies on a CPU: direct calls into OpenBLAS, oneDNN for bfloat16, and what is done without either."""

import ctypes
import itertools
import os
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import numpy as np
import pytest

from ttr_kernels.common import parallel
from ttr_kernels.common.arrays import BFLOAT16, FLOAT16, FLOAT32
from ttr_kernels.matmul import blas, cpu, matmul, onednn, sgemm, split_sgemm

needs_onednn = pytest.mark.skipif(
    onednn.why_not_bfloat16() is not None, reason=f"bfloat16 products: {onednn.why_not_bfloat16()}"
)
needs_blocks = pytest.mark.skipif(not sgemm.is_possible(), reason="own products: vectors of fewer than 8 floats")
needs_tiles = pytest.mark.skipif(not split_sgemm.is_possible(), reason="products of split float32: no AMX here")
OWN = [pytest.param("own", marks=needs_blocks), pytest.param("split", marks=needs_tiles)]
# (M, N, K): split by rows, split by columns, one of each, more than one vector.
SIZES = [(300, 40, 70), (5, 600, 64), (1, 9, 17), (33, 1, 5), (1, 1, 1), (64, 64, 256)]
LAYOUTS = ["plain", "transposed", "gap between rows", "every other column", "rows backwards"]


# Of own float32 products: whole blocks, ragged ones, and more than one block of rows, columns, and what is summed over;
# of matrix tiles, also those that are too small for them.
BLOCKS = [
    (28, 64, 32), (45, 77, 300), (600, 33, 20), (17, 1100, 16), (700, 800, 17), (64, 96, 64), (300, 70, 600),
    (70, 600, 515), (33, 257, 290), (290, 257, 33),
]  # fmt: skip


def laid_out(values, layout):
    """A view of this layout with these values."""
    rows, columns = values.shape
    if layout == "transposed":
        return np.ascontiguousarray(values.T).T
    if layout == "gap between rows":
        wide = np.zeros((rows, columns + 3), values.dtype)
        wide[:, :columns] = values
        return wide[:, :columns]
    if layout == "every other column":
        wide = np.zeros((rows, 2 * columns), values.dtype)
        wide[:, ::2] = values
        return wide[:, ::2]
    if layout == "rows backwards":
        return np.ascontiguousarray(values[::-1])[::-1]
    return values


def check_product(dtype, out_dtype, size, a_layout, b_layout, out_layout, accumulate):
    m, n, k = size
    rng = np.random.default_rng(3)
    a = laid_out(rng.standard_normal((m, k)).astype(dtype), a_layout)
    b = laid_out(rng.standard_normal((k, n)).astype(dtype), b_layout)
    out = laid_out(np.full((m, n), 2.0 if accumulate else np.nan).astype(out_dtype), out_layout)
    want = a.astype(np.float64) @ b.astype(np.float64) + (2.0 if accumulate else 0.0)
    assert matmul(a, b, out=out, accumulate=accumulate) is out
    rounding = 2.0**-8 if out_dtype == BFLOAT16 else 1e-6
    np.testing.assert_allclose(out.astype(np.float64), want, rtol=rounding, atol=1e-6 * k)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("dtype", "out_dtype"), [(FLOAT32, FLOAT32), (BFLOAT16, BFLOAT16), (BFLOAT16, FLOAT32)])
def test_any_layout(dtype, out_dtype, size, layout, accumulate):
    check_product(dtype, out_dtype, size, layout, "transposed", "plain", accumulate)
    check_product(dtype, out_dtype, size, "plain", layout, "gap between rows", accumulate)
    check_product(dtype, out_dtype, size, "plain", "plain", layout, accumulate)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", BLOCKS)
@pytest.mark.parametrize("who", OWN)
def test_own_blocks_in_any_layout(who, size, layout, accumulate, monkeypatch):
    monkeypatch.setattr(cpu, "float32_products", lambda: who)
    check_product(FLOAT32, FLOAT32, size, layout, "transposed", "plain", accumulate)
    check_product(FLOAT32, FLOAT32, size, "plain", layout, "gap between rows", accumulate)
    check_product(FLOAT32, FLOAT32, size, "transposed", "plain", layout, accumulate)


ROUNDING = {FLOAT32: 1e-6, BFLOAT16: 2.0**-8, FLOAT16: 2.0**-11}
KINDS = list(itertools.product(ROUNDING, repeat=3))[1:]


@needs_blocks
@pytest.mark.parametrize("size", [*BLOCKS, (1060, 40, 300)])
@pytest.mark.parametrize("kinds", KINDS, ids=lambda kinds: "-".join(map(str, kinds)))
def test_own_blocks_read_and_write_16_bit_floats_as_they_lie(kinds, size, monkeypatch):
    monkeypatch.setattr(cpu, "float32_products", lambda: "own")
    monkeypatch.setattr(cpu, "in_float32", None)  # no operand is copied
    monkeypatch.setattr(cpu, "onednn", SimpleNamespace(takes=lambda *arrays: False))
    (m, n, k), (a_kind, b_kind, out_kind) = size, kinds
    rng = np.random.default_rng(6)
    for a_layout, b_layout in itertools.product(LAYOUTS[:3], repeat=2):
        a = laid_out(rng.standard_normal((m, k)).astype(a_kind), a_layout)
        b = laid_out(rng.standard_normal((k, n)).astype(b_kind), b_layout)
        out = laid_out(np.full((m, n), np.nan).astype(out_kind), "gap between rows")
        if m > sgemm._ROUNDED:
            monkeypatch.setattr(cpu, "_MULTIPLICATIONS", 1 << 40)  # all rows on one thread
        cpu.product(a, b, out, False)
        want = a.astype(np.float64) @ b.astype(np.float64)
        np.testing.assert_allclose(out.astype(np.float64), want, rtol=ROUNDING[out_kind], atol=1e-6 * k)
        assert (out.base[:, n:] == 0).all()  # nothing beyond a row's end


@needs_blocks
@pytest.mark.parametrize("kind", [BFLOAT16, FLOAT16])
def test_own_blocks_round_to_nearest_even(kind, monkeypatch):
    """A product of numbers by one gives each number, rounded as NumPy does: halves, infinities, NaN, denormal ones."""
    monkeypatch.setattr(cpu, "float32_products", lambda: "own")
    monkeypatch.setattr(cpu, "onednn", SimpleNamespace(takes=lambda *arrays: False))
    bits = np.random.default_rng(7).integers(0, 2**32, (64, 33), dtype=np.uint32)
    halves = 0x8000 if kind == BFLOAT16 else 0x1000
    bits[::2] = bits[::2] & np.uint32(2**32 - 2 * halves) | np.uint32(halves)
    x = bits.view(np.float32)
    x[0, :4] = np.inf, -np.inf, np.nan, np.finfo(np.float32).max
    for column in range(33):
        a = np.zeros((64, 16), np.float32)
        a[:, 0] = x[:, column]
        b = np.zeros((16, 33), np.float32)
        b[0] = 1
        out = np.empty((64, 33), kind)
        with np.errstate(over="ignore", invalid="ignore"):
            cpu.product(a, b, out, False)
            want = np.broadcast_to(x[:, column, None], out.shape).astype(kind)
        np.testing.assert_array_equal(out.astype(np.float32), want.astype(np.float32))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", BLOCKS)
@pytest.mark.parametrize("who", OWN)
def test_own_blocks_give_the_same_bits_on_any_number_of_threads(who, size, transposed, monkeypatch):
    monkeypatch.setattr(cpu, "float32_products", lambda: who)
    monkeypatch.setattr(cpu, "_MULTIPLICATIONS", 1)  # no block is too small for a thread of its own
    m, n, k = size
    rng = np.random.default_rng(4)
    a, b = rng.standard_normal((m, k)).astype(np.float32), rng.standard_normal((k, n)).astype(np.float32)
    a = laid_out(a, "transposed") if transposed else a
    before, results = parallel.get_threads(), []
    try:
        for threads in (1, 2, 3):
            parallel.set_threads(threads)
            results.append(matmul(a, b))
    finally:
        parallel.set_threads(before)
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])
    # A row does not depend on what other rows it is multiplied with, as long as they are as many as a block has.
    least = 16 if who == "own" else 32
    if not transposed and m >= least:
        np.testing.assert_array_equal(results[0][:least], matmul(a[:least], b))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("who", OWN)
def test_own_blocks_keep_infinities_in_their_rows(who, transposed, monkeypatch):
    monkeypatch.setattr(cpu, "float32_products", lambda: who)
    a, b = np.ones((45, 40), np.float32), np.ones((40, 77), np.float32)
    a[3, 1], a[44, 0] = np.inf, np.nan
    # A NaN of all ones, as poisoned memory has: adding to its bits would make a number of it.
    a[43, 39] = np.uint32(0xFFFFFFFF).view(np.float32)
    a[5] = np.finfo(np.float32).max / 64  # finite, and so is a sum of 40
    out = matmul(laid_out(a, "transposed"), b) if transposed else matmul(a, b)
    assert np.isposinf(out[3]).all()
    assert np.isnan(out[43:]).all()
    np.testing.assert_allclose(out[5], 40 * float(a[5, 0]), rtol=1e-6)
    assert (np.delete(out, [3, 5, 43, 44], axis=0) == 40).all()
    b[0, 76], b[1, 0] = -np.inf, np.finfo(np.float32).max
    out = matmul(a[6:43], b)
    assert np.isneginf(out[:, 76]).all()
    assert (out[:, 0] == np.finfo(np.float32).max).all()
    assert (out[:, 1:76] == 40).all()


@needs_tiles
@pytest.mark.parametrize("size", [(64, 64, 64), (160, 96, 256), (70, 256, 2048)])
@pytest.mark.parametrize("spread", [0.0, 5.0])
def test_split_products_are_as_exact_as_float32(size, spread, monkeypatch):
    """Errors against float64, of elements that are about as large or differ by orders of magnitude, are not above those
    of the kernel that multiplies float32 as it is."""
    m, n, k = size
    rng = np.random.default_rng(5)
    a, b = (
        (rng.standard_normal(shape) * np.exp(spread * rng.standard_normal(shape))).astype(np.float32)
        for shape in ((m, k), (k, n))
    )
    want = a.astype(np.float64) @ b.astype(np.float64)
    size_of_terms = np.abs(a).astype(np.float64) @ np.abs(b).astype(np.float64)
    errors = {}
    for who in ("own", "split"):
        monkeypatch.setattr(cpu, "float32_products", lambda who=who: who)
        errors[who] = np.abs(matmul(a, b) - want) / size_of_terms
    assert errors["split"].max() <= errors["own"].max()
    assert (errors["split"] ** 2).mean() <= (errors["own"] ** 2).mean()


@needs_tiles
def test_split_products_use_all_parts(monkeypatch):
    """1 + 2⁻⁹ + 2⁻¹⁸ is one in each part: a product with it shows a part that is left out."""
    monkeypatch.setattr(cpu, "float32_products", lambda: "split")
    number = np.float32(1 + 2.0**-9 + 2.0**-18)
    for a, b in ((number, 1.0), (1.0, number)):
        left, right = np.zeros((32, 32), np.float32), np.zeros((32, 32), np.float32)
        left[:, 7], right[7] = a, b
        assert (matmul(left, right) == number).all()


@needs_tiles
@pytest.mark.parametrize(("name", "value"), [("CPU_NAME", "generic"), ("CPU_FEATURES", "+avx2")])
def test_no_tiles_where_kernels_are_compiled_for_another_processor(name, value, monkeypatch):
    possible = split_sgemm.is_possible.__wrapped__
    assert possible()
    monkeypatch.setattr(split_sgemm.config, name, value)
    assert not possible()


def test_who_multiplies_float32(monkeypatch):
    choose = cpu.float32_products.__wrapped__
    monkeypatch.setattr(split_sgemm, "is_possible", lambda: False)
    monkeypatch.setattr(sgemm, "LANES", 16)
    monkeypatch.delenv("TTR_FLOAT32_GEMM", raising=False)
    # Not cached: the processor changes here.
    monkeypatch.setattr(sgemm, "is_ahead", sgemm.is_ahead.__wrapped__)
    monkeypatch.setattr(sgemm, "get_host_cpu_name", lambda: "sapphirerapids")
    assert choose() == "own"
    monkeypatch.setattr(sgemm, "get_host_cpu_name", lambda: "znver4")
    assert choose() == "blas"
    monkeypatch.setenv("TTR_FLOAT32_GEMM", "own")
    assert choose() == "own"
    monkeypatch.setattr(sgemm, "LANES", 4)
    assert choose() == "blas"
    monkeypatch.setattr(sgemm, "LANES", 8)
    monkeypatch.setattr(sgemm, "get_host_cpu_name", lambda: "haswell")
    assert choose() == "own"
    monkeypatch.setenv("TTR_FLOAT32_GEMM", "blas")
    assert choose() == "blas"
    monkeypatch.delenv("TTR_FLOAT32_GEMM")
    assert choose() == "blas"
    monkeypatch.setattr(split_sgemm, "is_possible", lambda: True)
    assert choose() == "split"
    for wish, found in (("split", "split"), ("own", "own"), ("blas", "blas")):
        monkeypatch.setenv("TTR_FLOAT32_GEMM", wish)
        assert choose() == found


@pytest.mark.parametrize(("who", "lanes", "read"), [
    ("own", 16, True), ("blas", 16, True), ("blas", 8, True), ("split", 16, False), ("blas", 4, False),
])  # fmt: skip
def test_who_reads_16_bit_floats_as_they_lie(who, lanes, read, monkeypatch):
    monkeypatch.setattr(cpu, "float32_products", lambda: who)
    monkeypatch.setattr(sgemm, "LANES", lanes)
    assert cpu.reads_16_bit_floats() is read
    a = np.ones((64, 64), BFLOAT16)
    found = cpu._direct(a, a, a, False)
    assert found[0] is sgemm.multiply if read else found is None


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_without_onednn_bfloat16_is_multiplied_in_float32(size, accumulate, monkeypatch):
    monkeypatch.setattr(onednn, "_loaded", lambda: "not here")
    assert onednn.why_not_bfloat16() == "not here"
    check_product(BFLOAT16, BFLOAT16, size, "plain", "transposed", "plain", accumulate)
    check_product(BFLOAT16, FLOAT32, size, "transposed", "plain", "plain", accumulate)


@pytest.mark.parametrize("accumulate", [False, True])
def test_without_openblas_numpy_multiplies(accumulate, monkeypatch):
    monkeypatch.setattr(blas, "_sgemm", lambda: None)
    monkeypatch.setattr(cpu, "float32_products", lambda: "blas")
    for size in SIZES:
        check_product(FLOAT32, FLOAT32, size, "plain", "transposed", "gap between rows", accumulate)


@ctypes.CFUNCTYPE(
    None, *(ctypes.c_int,) * 3, *(ctypes.c_int32,) * 3, ctypes.c_float, ctypes.c_void_p, ctypes.c_int32,
    ctypes.c_void_p, ctypes.c_int32, ctypes.c_float, ctypes.c_void_p, ctypes.c_int32,
)  # fmt: skip
def sgemm_of_32_bits(order, left, right, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc):
    """cblas_sgemm of a BLAS whose sizes have 32 bits."""

    def matrix(address, rows, columns, leading):
        count = (rows - 1) * leading + columns
        flat = np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_float)), (count,))
        return np.lib.stride_tricks.as_strided(flat, (rows, columns), (4 * leading, 4))

    assert (order, alpha) == (101, 1.0)
    a = matrix(a, m, k, lda) if left == 111 else matrix(a, k, m, lda).T
    b = matrix(b, k, n, ldb) if right == 111 else matrix(b, n, k, ldb).T
    out = matrix(c, m, n, ldc)
    out[...] = a @ b + (out if beta else 0)


@pytest.mark.parametrize("accumulate", [False, True])
def test_a_blas_whose_sizes_have_32_bits(accumulate, monkeypatch):
    monkeypatch.setattr(blas, "_sgemm", lambda: sgemm_of_32_bits)
    monkeypatch.setattr(blas, "_address", blas._address.__wrapped__)
    assert blas._address()[1] is False
    monkeypatch.setattr(cpu, "float32_products", lambda: "blas")
    for size in SIZES:
        check_product(FLOAT32, FLOAT32, size, "plain", "transposed", "gap between rows", accumulate)
        check_product(FLOAT32, FLOAT32, size, "transposed", "plain", "plain", accumulate)


def test_why_there_is_no_onednn(monkeypatch, tmp_path):
    load = onednn._loaded.__wrapped__
    monkeypatch.setenv("TTR_BFLOAT16_GEMM", "float32")
    assert load() == "TTR_BFLOAT16_GEMM=float32"
    monkeypatch.delenv("TTR_BFLOAT16_GEMM")

    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(onednn, "files", missing)
    assert load() == "oneDNN is not installed: pip install 'ttr-gpu[bfloat16]'"

    class Broken:
        name = "libdnnl.so.3"

        def locate(self):
            return tmp_path / "libdnnl.so.3"

    (tmp_path / "libdnnl.so.3").write_bytes(b"no library")
    monkeypatch.setattr(onednn, "files", lambda name: [Broken()])
    assert load().startswith("oneDNN cannot be loaded:")


@pytest.mark.parametrize(("sets", "name", "reason"), [
    (0x67, "icelake-server", "this processor has no bfloat16 instructions"),
    (0x1EF, "emeraldrapids", "this processor multiplies float32 faster"),
    (0xFEF, "emeraldrapids", None),
    (0xE7, "znver4", None),
])  # fmt: skip
def test_which_processors_multiply_bfloat16(sets, name, reason, monkeypatch):
    if "oneDNN" in (onednn.why_not_bfloat16() or ""):
        pytest.skip(onednn.why_not_bfloat16())
    monkeypatch.setattr(onednn._Library, "instruction_sets", lambda self: sets)
    monkeypatch.setattr(onednn, "get_host_cpu_name", lambda: name)
    found = onednn._loaded.__wrapped__()
    assert found.startswith(reason) if reason else isinstance(found, onednn._Library)


@needs_onednn
def test_onednn_starts_no_threads_and_keeps_a_bounded_number_of_products(monkeypatch):
    monkeypatch.setattr(onednn, "_KEPT", 3)
    monkeypatch.setattr(onednn, "_products", onednn._Products())
    threads = len(os.listdir("/proc/self/task"))
    for size in range(1, 9):
        a = np.ones((size, 64), BFLOAT16)
        for _ in range(2):
            out = np.empty((size, 64), BFLOAT16)
            onednn.multiply(a, np.ones((64, 64), BFLOAT16), out, False)
            assert (out == 64).all()
    assert len(onednn._products.kept) == 3
    assert len(os.listdir("/proc/self/task")) == threads
