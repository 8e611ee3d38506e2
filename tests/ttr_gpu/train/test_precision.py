"""Training in 16-bit floats: the loss follows float32's, float16 scales it, and resuming is exact there too."""

import math
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from small_runs import records, resume, run, weights

from ttr_gpu.nn import Parameter
from ttr_gpu.train.loss_scale import LossScale
from ttr_kernels.matmul import onednn
from ttr_kernels.matmul.onednn import why_not_bfloat16


@pytest.fixture(scope="module")
def curves(stackoverflow, tmp_path_factory):
    """Losses of the first 200 steps on the shipped events, as means of 20, in the three precisions."""
    found = {}
    for precision in ("float32", "bfloat16", "float16"):
        out = tmp_path_factory.mktemp(precision)
        run(
            stackoverflow, out, "model.embed_dim=32", "model.hidden_dim=64", "model.num_layers=2",
            "train.tokens_per_batch=256", "train.max_length=64", "train.steps=200", "train.evaluate_every=200",
            "train.evaluate_tokens=1000", f"model.precision={precision}",
        )  # fmt: skip
        losses = np.array([record["loss"] for record in records(out / "run")])
        found[precision] = losses.reshape(10, 20).mean(axis=1)
    return found


# Rounding errors of single steps average out: of 20 steps together, the loss is that of float32 to about this share.
@pytest.mark.parametrize(("precision", "band"), [("bfloat16", 0.003), ("float16", 0.001)])
def test_the_loss_curve_follows_that_of_float32(curves, precision, band):
    assert curves["float32"][-1] < curves["float32"][0] - 1, "it has learned something, in nats"
    np.testing.assert_allclose(curves[precision], curves["float32"], rtol=band)
    assert not np.array_equal(curves[precision], curves["float32"])


OVERFLOWING = ("model.precision=float16", "train.loss_scale=16777216", "train.loss_scale_growth=3")


def test_overflowing_steps_are_skipped_counted_and_shown(data, tmp_path):
    outcome, said = run(data, tmp_path, *OVERFLOWING)
    steps = records(tmp_path / "run")
    skipped = [record["gradient_norm"] is None for record in steps]
    assert skipped[0]
    assert not skipped[-1] or not skipped[-2]
    assert steps[-1]["skipped"] == sum(skipped) == outcome.progress.loss_scale.skipped
    for before, after in pairwise(steps):
        if before["gradient_norm"] is None:
            assert after["loss_scale"] == before["loss_scale"] / 2
    assert any(after["loss_scale"] == 2 * before["loss_scale"] for before, after in pairwise(steps))
    lines = [line for line in said if line.startswith("step")]
    assert "norm   skip" in lines[0]
    assert "scale 1.67772e+07 (1 skipped)" in lines[0]
    assert f"({sum(skipped)} skipped)" in lines[-1]
    assert math.isfinite(steps[-1]["loss"])


def test_resuming_in_float16_is_exact(data, tmp_path):
    options = (*OVERFLOWING, "train.checkpoint_every=1", "train.keep_last=99")
    run(data, tmp_path / "whole", *options)
    run(data, tmp_path / "half", *options, "train.steps=20")
    half = tmp_path / "half" / "run"
    for step in (4, 9):
        resume(data, half / "checkpoints" / f"step-{step:08d}")
        np.testing.assert_array_equal(weights(half), weights(tmp_path / "whole" / "run"))
        repeated = records(half)[-(20 - step) :]
        assert repeated == records(tmp_path / "whole" / "run")[step:]


def test_other_precisions_have_no_scale(data, tmp_path):
    _, said = run(data, tmp_path, "model.precision=bfloat16")
    assert not any("scale" in line for line in said if line.startswith("step"))
    assert records(tmp_path / "run")[0]["loss_scale"] is None
    reason = why_not_bfloat16()
    product = "bfloat16 matrix product" if reason is None else f"bfloat16 storage, float32 matrix product ({reason})"
    assert any(product in line for line in said), "says what is computed how"


def test_without_onednn_the_plan_says_why_bfloat16_is_multiplied_in_float32(data, tmp_path, monkeypatch):
    monkeypatch.setattr(onednn, "_loaded", lambda: "no oneDNN here")
    _, said = run(data, tmp_path, "model.precision=bfloat16")
    assert any("bfloat16 storage, float32 matrix product (no oneDNN here)" in line for line in said)


def test_scale_grows_backs_off_and_gives_up():
    scale = LossScale(8.0, growth_steps=2)
    scale.succeeded()
    assert (scale.value, scale.good_steps) == (8.0, 1)
    assert scale.overflowed()
    assert (scale.value, scale.good_steps, scale.skipped) == (4.0, 0, 1)
    scale.succeeded()
    scale.succeeded()
    assert (scale.value, scale.good_steps) == (8.0, 0)
    for _ in range(3):
        assert scale.overflowed()
    assert not scale.overflowed(), "at 1 the scale is not to blame"
    fixed = LossScale()
    fixed.succeeded()
    assert not fixed.overflowed()
    assert fixed == LossScale()


def test_a_parameter_is_cast_once_until_it_changes():
    parameter = Parameter("p", np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4))
    assert parameter.cast(np.dtype(np.float32)) is parameter.value
    for dtype in (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)):
        cast = parameter.cast(dtype)
        np.testing.assert_array_equal(cast, parameter.value.astype(dtype))
        assert parameter.cast(dtype) is cast
        parameter.value *= np.float32(1.5)
        assert parameter.cast(dtype)[0, 0] != dtype.type(parameter.value[0, 0]), "not told of the change"
        parameter.changed()
        np.testing.assert_array_equal(parameter.cast(dtype), parameter.value.astype(dtype))
