"""What the emulator must share with a GPU: fragment layouts, shuffles, votes, barriers, asynchronous copies, bits.

Every expectation is written from the PTX ISA or the CUDA guide, with none of the emulator's code. With `-m gpu` the
same kernels run on a device: the first thing to run there, since all other kernels stand on these.
"""

from __future__ import annotations

from pathlib import Path

import emulator
import ml_dtypes
import numpy as np
import pytest
from cupy_at_hand import real_cupy

from ttr_kernels.common.cuda import launch

SOURCE = Path(__file__).parent / "kernels" / "semantics.cu"
LANES = np.arange(32)
GROUP, MEMBER = LANES // 4, LANES % 4  # "groupID" and "threadID_in_group" of the PTX ISA

needs_emulator = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))
PLACES = [pytest.param(place, marks=needs_emulator) for place in ("plain 0", "plain 1", "check 0", "check 1")]


@pytest.fixture(params=[*PLACES, pytest.param("gpu", marks=pytest.mark.gpu)])
def run(request):
    """run(name, grid, block, *arguments, shared_bytes=0): the arrays among the arguments, as the kernel leaves them."""

    def on_gpu(name, grid, block, *arguments, shared_bytes=0):
        cupy = real_cupy()
        held = [cupy.asarray(each) if isinstance(each, np.ndarray) else each for each in arguments]
        launch.Kernel(SOURCE, name, {}).launch(held[0], grid, block, held, shared_bytes)
        return [cupy.asnumpy(each) for each in held if isinstance(each, cupy.ndarray)]

    def on_host(name, grid, block, *arguments, shared_bytes=0):
        mode, seed = request.param.split()
        with launch.use_executor(emulator.EmulatorExecutor(mode, int(seed))):
            launch.Kernel(SOURCE, name, {}).launch(arguments[0], grid, block, arguments, shared_bytes)
        return [each for each in arguments if isinstance(each, np.ndarray)]

    return on_gpu if request.param == "gpu" else on_host


def integers(seed, *shape):
    return np.random.default_rng(seed).integers(-100, 100, shape, np.int32)


def pairs(low, high):
    """Registers of two 16-bit elements, the first in the lower half."""
    return low.view(np.uint16).astype(np.uint32) | high.view(np.uint16).astype(np.uint32) << 16


def check_product(run, name, a_registers, b_registers, a, b):
    c = integers(3, 16, 8).astype(np.float32)
    # Accumulators: c0, c1 in row groupID, c2, c3 in row groupID + 8; columns 2 * threadID_in_group and the next.
    rows = np.stack([GROUP, GROUP, GROUP + 8, GROUP + 8], 1)
    columns = np.stack([2 * MEMBER, 2 * MEMBER + 1] * 2, 1)
    out = np.full((32, 4), np.nan, np.float32)
    *_, out = run(name, (1,), (32,), a_registers.copy(), b_registers.copy(), c[rows, columns], out)
    product = c + a.astype(np.float64) @ b.astype(np.float64)
    np.testing.assert_array_equal(out, product[rows, columns])  # small integers: exact in any order


@pytest.mark.parametrize(
    ("name", "dtype"), [("multiply_bf16", np.dtype(ml_dtypes.bfloat16)), ("multiply_f16", np.dtype(np.float16))]
)
def test_fragments_of_16_bit_products(run, name, dtype):
    # PTX ISA, m16n8k16: a_i lies in row groupID for i in {0, 1, 4, 5}, else groupID + 8; in column
    # 2 * threadID_in_group + (i & 1), + 8 for i >= 4. b_i: row 2 * threadID_in_group + (i & 1), + 8 for i >= 2.
    a, b = integers(1, 16, 16).astype(dtype), integers(2, 16, 8).astype(dtype)
    a_elements = [
        a[GROUP + (0 if i in (0, 1, 4, 5) else 8), 2 * MEMBER + (i & 1) + (8 if i >= 4 else 0)] for i in range(8)
    ]
    b_elements = [b[2 * MEMBER + (i & 1) + (8 if i >= 2 else 0), GROUP] for i in range(4)]
    a_registers = np.stack([pairs(a_elements[i], a_elements[i + 1]) for i in (0, 2, 4, 6)], 1)
    b_registers = np.stack([pairs(b_elements[i], b_elements[i + 1]) for i in (0, 2)], 1)
    check_product(run, name, a_registers, b_registers, a, b)


def test_fragments_of_tf32_products(run):
    # PTX ISA, m16n8k8 with .tf32: a_i in row groupID for i in {0, 2}, else groupID + 8; column threadID_in_group for
    # i in {0, 1}, else threadID_in_group + 4. b_i: row threadID_in_group, + 4 for i = 1; column groupID.
    a, b = integers(1, 16, 8).astype(np.float32), integers(2, 8, 8).astype(np.float32)
    a_registers = np.stack(
        [a[GROUP + (0 if i in (0, 2) else 8), MEMBER + (0 if i in (0, 1) else 4)] for i in range(4)], 1
    ).view(np.uint32)
    b_registers = np.stack([b[MEMBER + 4 * i, GROUP] for i in range(2)], 1).view(np.uint32)
    # What lies in the last 13 bits does not count.
    check_product(run, "multiply_tf32", a_registers | 0x1FFF, b_registers | 0x0AAA, a, b)


@pytest.mark.parametrize("trans", [0, 1])
def test_ldmatrix(run, trans):
    # PTX ISA, ldmatrix: lanes 8m to 8m + 7 give the rows of matrix m; a lane holds row lane / 4, columns
    # 2 * (lane % 4) and the next, of each matrix; of its transpose with .trans.
    tile = np.random.default_rng(1).integers(0, 2**16, (32, 8), np.uint16)
    rows = np.random.default_rng(2).permutation(32).astype(np.int32)
    *_, out = run("load_matrices", (1,), (32,), tile, rows, np.zeros((32, 4), np.uint32), trans)
    for m in range(4):
        matrix = tile[rows[8 * m : 8 * m + 8]]
        matrix = np.ascontiguousarray(matrix.T) if trans else matrix
        np.testing.assert_array_equal(out[:, m], pairs(matrix[GROUP, 2 * MEMBER], matrix[GROUP, 2 * MEMBER + 1]))


def test_asynchronous_copies(run):
    source = integers(1, 3, 64, 4)
    inside = (integers(2, 3, 64) > -50).astype(np.int32)
    *_, out = run("copy_async", (1,), (64,), source, inside, np.full_like(source, -1), shared_bytes=source.nbytes)
    np.testing.assert_array_equal(out, source * inside[..., None])


def test_shuffles(run):
    value, source = integers(1, 32), np.random.default_rng(2).integers(0, 32, 32, np.int32)
    *_, out = run("shuffle", (1,), (32,), value, source, np.zeros((32, 9), np.int32))
    segment = LANES // 8 * 8
    expected = [
        value[source],
        value[LANES ^ 5],
        value[np.where(LANES >= 3, LANES - 3, LANES)],
        value[np.where(LANES + 3 < 32, LANES + 3, LANES)],
        value[segment + source % 8],
        value[np.where(segment + 8 > (LANES ^ 9), LANES ^ 9, LANES)],  # a lane of an earlier segment may be read
        value[np.where(LANES % 8 >= 3, LANES - 3, LANES)],
        value[np.where(LANES % 8 + 3 < 8, LANES + 3, LANES)],
        value[31 - LANES],
    ]
    np.testing.assert_array_equal(out, np.stack(expected, 1))


def test_votes_and_reductions(run):
    value = integers(4, 32)
    _, out = run("vote", (1,), (32,), value, np.zeros((32, 4), np.uint32))
    odd = LANES % 2 == 1
    bits = np.uint64(1) << LANES.astype(np.uint64)
    np.testing.assert_array_equal(out[odd, 0], bits[odd & (value > 0)].sum())
    np.testing.assert_array_equal(out[~odd, 0], bits[~odd & (value < 0)].sum())
    np.testing.assert_array_equal(out[odd, 1], (value[odd] > 90).any())
    np.testing.assert_array_equal(out[~odd, 1], (value[~odd] > -101).all())
    np.testing.assert_array_equal(out[:, 2].view(np.int32), value.sum())
    np.testing.assert_array_equal(out[:, 3].view(np.int32), value.min())


def test_barriers(run):
    value = integers(1, 96)
    _, out = run("barriers", (1,), (96,), value, np.zeros((2, 96), np.int32), 7)
    expected = value
    for _ in range(7):
        expected = expected + np.roll(expected, 1)
    np.testing.assert_array_equal(out[0], expected)
    np.testing.assert_array_equal(out[1], 32 + 1000)


def test_indices(run):
    grid, block = (2, 3, 2), (3, 2, 4)
    (out,) = run("indices", grid, block, np.full(288, -1, np.int32))
    number = np.arange(288)
    thread, block_number = number % 24, number // 24
    expected = thread % 3 + 10 * (thread // 3 % 2) + 100 * (thread // 6)
    expected += 1000 * (block_number % 2) + 10000 * (block_number // 2 % 3) + 100000 * (block_number // 6)
    np.testing.assert_array_equal(out, expected)


def test_atomics(run):
    out, wide = run("atomics", (3,), (40,), np.zeros(5, np.int32), np.zeros(1, np.uint64))
    assert out[:4].tolist() == [119 * 120 // 2, 119, -119, 2**31 - 1]
    assert 1 <= out[4] <= 120
    assert wide[0] == 120 << 40


def test_arithmetic(run):
    rng = np.random.default_rng(1)
    x = np.r_[rng.standard_normal(28), 0.0, 1e-7, -300.0, 2.5].astype(np.float32)
    u = rng.integers(0, 2**32, 32, np.uint32)
    *_, out = run("arithmetic", (1,), (32,), x, u, np.zeros((32, 12)))
    wide = x.astype(np.float64)
    exact = {
        0: u.astype(np.uint64) * np.uint64(0xD2511F53) >> np.uint64(32),
        1: x.view(np.uint32),
        2: (wide * wide - 1).astype(np.float32),
        3: x.astype(ml_dtypes.bfloat16),
        4: x.astype(np.float16),
        5: x.astype(ml_dtypes.bfloat16).astype(np.float32) - x.astype(np.float16).astype(np.float32),
        8: np.rint(x),
        9: np.maximum(x, np.float32(0.5)) + np.minimum(u, 7).astype(np.float32),
        10: [bin(each).count("1") + 100 * (32 - int(each).bit_length()) for each in u],
        11: wide * wide,
    }
    for column, expected in exact.items():
        np.testing.assert_array_equal(out[:, column], np.asarray(expected).astype(np.float64), err_msg=str(column))
    np.testing.assert_allclose(out[:, 6], 1 / np.sqrt(np.abs(wide) + 1), rtol=3e-7)
    np.testing.assert_allclose(out[:, 7], np.exp2(wide), rtol=3e-7, atol=1e-40)
