"""Rotary embedding: a rotation by the position, of which only differences show in a product."""

import numpy as np
import pytest

from ttr_kernels.common.arrays import BFLOAT16
from ttr_kernels.rope import RopeTable, rope_backward, rope_cos_sin, rope_forward

BOTH_PAIRINGS = pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def rotated(x, positions, **options):
    return rope_forward(x, rope_cos_sin(positions, x.shape[-1]), **options)[0]


@BOTH_PAIRINGS
@pytest.mark.parametrize("shift", [1, 1000, 100_000])
def test_products_depend_on_the_difference_of_positions(shift, interleaved):
    q, k = (np.broadcast_to(normal(1, 1, 32, seed=s), (60, 1, 32)).copy() for s in (1, 2))
    positions = np.arange(60)

    def products(offset):
        a = rotated(q, positions + offset, interleaved=interleaved)[:, 0].astype(np.float64)
        b = rotated(k, positions + offset, interleaved=interleaved)[:, 0].astype(np.float64)
        return a @ b.T

    here, there = products(0), products(shift)
    np.testing.assert_allclose(there, here, atol=1e-5)
    # Along a diagonal, where i - j is the same, all products are.
    for difference in (-30, 0, 1, 17):
        assert np.ptp(np.diagonal(here, difference)) < 1e-5
    assert np.ptp(here) > 1, "products that depend on nothing would pass too"


@BOTH_PAIRINGS
def test_norms_are_kept_and_the_backward_turns_back(interleaved):
    x = normal(50, 2, 24)
    y, saved = rope_forward(x, rope_cos_sin(np.arange(50) * 977, 24), interleaved=interleaved)
    np.testing.assert_allclose(np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-6)
    assert np.abs(y - x)[1:].max() > 0.1
    np.testing.assert_allclose(rope_backward(y, saved), x, atol=1e-6)


@BOTH_PAIRINGS
@pytest.mark.parametrize("base", [100.0, 10000.0, 500000.0])
def test_is_a_product_of_complex_numbers(base, interleaved):
    x, positions = normal(40, 3, 16), np.random.default_rng(0).integers(0, 5000, 40)
    table = rope_cos_sin(positions, 16, base=base)
    y = rope_forward(x, table, interleaved=interleaved)[0]

    def as_complex(a):
        wide = a.astype(np.float64)
        return wide[..., ::2] + 1j * wide[..., 1::2] if interleaved else wide[..., :8] + 1j * wide[..., 8:]

    turn = np.exp(1j * positions[:, None] * base ** (-np.arange(8) / 8))[:, None]
    np.testing.assert_allclose(as_complex(y), as_complex(x) * turn, atol=1e-6)


def test_position_zero_changes_nothing():
    x = normal(5, 2, 8)
    np.testing.assert_array_equal(rotated(x, np.zeros(5, int)), x)


def test_far_positions_keep_their_angle():
    positions = np.array([0, 1, 999_999, 1_000_000, 123_456_789])
    table = rope_cos_sin(positions, 64)
    frequencies = np.longdouble(10000.0) ** (-np.arange(32, dtype=np.longdouble) / 32)
    angles = positions.astype(np.longdouble)[:, None] * frequencies
    # An angle of 1e8 in float64 is good to 1e-8; formed in float32 it would be off by several radians.
    np.testing.assert_allclose(table.cos, np.cos(angles).astype(np.float64), atol=1e-7)
    np.testing.assert_allclose(table.sin, np.sin(angles).astype(np.float64), atol=1e-7)


@BOTH_PAIRINGS
def test_in_place(interleaved):
    x = normal(30, 2, 16)
    table = rope_cos_sin(np.arange(30), 16)
    want, saved = rope_forward(x, table, interleaved=interleaved)
    own = x.copy()
    assert rope_forward(own, table, interleaved=interleaved, out=own)[0] is own
    np.testing.assert_array_equal(own, want)
    back = rope_backward(want, saved)
    assert rope_backward(own, saved, dx=own) is own
    np.testing.assert_array_equal(own, back)


def test_the_queries_of_a_fused_array_in_place():
    fused = normal(20, 6, 16)
    before, table = fused.copy(), rope_cos_sin(np.arange(20), 16)
    queries = fused[:, :2]
    rope_forward(queries, table, out=queries)
    np.testing.assert_array_equal(fused[:, 2:], before[:, 2:])
    np.testing.assert_array_equal(queries, rope_forward(np.ascontiguousarray(before[:, :2]), table)[0])


@BOTH_PAIRINGS
def test_features_beyond_the_table_are_copied(interleaved):
    x = normal(10, 2, 20)
    y = rope_forward(x, rope_cos_sin(np.arange(10), 8), interleaved=interleaved)[0]
    np.testing.assert_array_equal(y[..., 8:], x[..., 8:])
    np.testing.assert_array_equal(
        y[..., :8], rotated(np.ascontiguousarray(x[..., :8]), range(10), interleaved=interleaved)
    )


def test_one_table_for_all_sequences_of_a_batch():
    x = normal(3, 20, 2, 8)
    shared = rope_forward(x, rope_cos_sin(np.arange(20), 8))[0]
    np.testing.assert_array_equal(shared, rope_forward(x, rope_cos_sin(np.tile(np.arange(20), 3), 8))[0])


def test_the_gradient_is_the_transpose():
    x, dy = normal(12, 2, 8), normal(12, 2, 8, seed=1)
    y, saved = rope_forward(x, rope_cos_sin(np.arange(12), 8))
    assert np.vdot(y, dy) == pytest.approx(np.vdot(x, rope_backward(dy, saved)), rel=1e-5)


def test_bad_input_is_named():
    x, table = normal(4, 2, 8), rope_cos_sin(np.arange(4), 8)
    for arguments, message in (
        ((np.zeros((2, 2)), 8), r"positions: got shape \(2, 2\), expected \(rows,\)"),
        (([1], 7), "dim: got 7, expected an even number"),
        (([1], 0), "dim: got 0, expected an even number"),
    ):
        with pytest.raises(ValueError, match=message):
            rope_cos_sin(*arguments)
    with pytest.raises(ValueError, match="base: got 0, expected a positive number"):
        rope_cos_sin([1], 8, base=0)
    with pytest.raises(ValueError, match="table: got 3 rows, expected 4 like x"):
        rope_forward(x, rope_cos_sin(np.arange(3), 8))
    with pytest.raises(ValueError, match="x: got 8 features, expected at least the table's 16"):
        rope_forward(x, rope_cos_sin(np.arange(4), 16))
    with pytest.raises(ValueError, match=r"x: got shape \(2, 8\), expected \(rows, H, D\) or \(B, T, H, D\)"):
        rope_forward(x[0], table)
    with pytest.raises(TypeError, match=r"table.cos: got dtype bfloat16, expected float32 or float64"):
        rope_forward(x, RopeTable(table.cos.astype(BFLOAT16), table.sin))
    with pytest.raises(TypeError, match=r"table.sin: got dtype float64, expected float32 like table.cos"):
        rope_forward(x, RopeTable(table.cos, table.sin.astype(np.float64)))
    with pytest.raises(ValueError, match=r"table.sin: got shape"):
        rope_forward(x, RopeTable(table.cos, table.sin[:3]))
