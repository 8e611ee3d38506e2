"""The whole model on a GPU's arrays and kernels against the CPU; with `-m gpu` on a device, else on a stand-in."""

import json
from pathlib import Path

import cupy_stand_in
import numpy as np
import pytest
from model_batches import packed
from test_model import config

from ttr_gpu.backend import choose_backend
from ttr_gpu.config import DropoutConfig
from ttr_gpu.errors import UserError
from ttr_gpu.model import TransformerModel
from ttr_gpu.nn import DropoutKey
from ttr_gpu.train.config import TrainConfig
from ttr_gpu.train.optimizer import Optimizer

GOLDEN = Path(__file__).with_name("golden_losses.json")


def losses(steps, backend=None, **changes):
    model = TransformerModel(config(**changes), seed=4, **({} if backend is None else {"backend": backend}))
    optimizer = Optimizer(model, TrainConfig(weight_decay=0.01, clip_norm=1e9))
    found = []
    model.flat.gradients.fill(np.nan)
    for step in range(1, steps + 1):
        loss, saved = model.loss_forward(packed([20, 3, 17], 11, seed=1), DropoutKey(5, step))
        model.loss_backward(1.0, saved, accumulate=False)
        optimizer.update(step, 3e-3, optimizer.gradient_norm())
        found.append(float(loss))
    return found


def test_ten_golden_losses(gpu):
    np.testing.assert_allclose(losses(10, gpu), losses(10), rtol=5e-6)
    assert json.loads(GOLDEN.read_text())[0] == pytest.approx(losses(1, gpu)[0], rel=5e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"dropout": DropoutConfig(attention=0.2, feed_forward=0.1, residual=0.3)},
        {"num_kv_heads": 2, "window": 5, "tied_head": True},
        {"time_bias": "linear", "time_features": "absolute"},
        {"time_bias": "none", "time_features": "none"},
        {"time_components": 5, "time_log_mean": 1.5, "rope": "time"},
        {"time_components": 3, "time_given_type": True},
    ],
    ids=[
        "the same dropout masks",
        "grouped heads, window, tied head",
        "linear bias, absolute time",
        "no time",
        "gaps, rope by time",
        "gaps given the type",
    ],
)
def test_variants_train_the_losses_of_the_cpu(gpu, changes):
    np.testing.assert_allclose(losses(3, gpu, **changes), losses(3, **changes), rtol=5e-6)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_low_precision(gpu, precision):
    np.testing.assert_allclose(losses(3, gpu, precision=precision), losses(3), rtol=2e-2)


def test_a_step_waits_only_for_the_norm(gpu):
    model = TransformerModel(config(time_components=4, time_given_type=True), seed=4, backend=gpu)
    optimizer = Optimizer(model, TrainConfig())
    batch = packed([20, 3, 17], 11, seed=1)
    before = cupy_stand_in.waits
    model.zero_gradients()
    loss, saved = model.loss_forward(batch, DropoutKey(5, 1))
    model.loss_backward(1.0, saved)
    assert cupy_stand_in.waits == before
    optimizer.update(1, 1e-3, optimizer.gradient_norm())
    assert cupy_stand_in.waits == before + 1
    assert np.isfinite(float(loss))


def test_inference_agrees(gpu):
    on_gpu, on_cpu = (
        TransformerModel(config(time_components=3, time_given_type=True), seed=2, **kwargs)
        for kwargs in ({"backend": gpu}, {})
    )
    batch = packed([12, 5], 11, ignored=0.0)
    for types in (None, batch.targets):
        gaps = [model.next_gap(model.outputs(batch), types).quantile(0.5) for model in (on_gpu, on_cpu)]
        np.testing.assert_allclose(*gaps, rtol=1e-4)
    times = [model.evaluate_batch(batch).time_losses for model in (on_gpu, on_cpu)]
    np.testing.assert_allclose(*times, rtol=1e-4)
    np.testing.assert_allclose(on_gpu.evaluate_batch(batch)[0], on_cpu.evaluate_batch(batch)[0], rtol=1e-5)
    rows = np.array([3, 16])
    np.testing.assert_allclose(on_gpu.logits(batch, rows).get(), on_cpu.logits(batch, rows), rtol=1e-4, atol=1e-6)
    assert on_gpu.find_nonfinite(batch) is None
    on_gpu.embedding.table.value.fill(np.nan)
    assert on_gpu.find_nonfinite(batch) == "parameter embedding.token.weight"


def test_gpu_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delitem(__import__("sys").modules, "cupy", raising=False)
    monkeypatch.delenv("TTR_BACKEND", raising=False)
    with pytest.raises(UserError, match=r"--device: got gpu, but CuPy is not installed: pip install 'ttr-gpu\[gpu\]'"):
        choose_backend("gpu")
    assert choose_backend("auto").device == "CPU (CuPy is not installed)"
    assert choose_backend("cpu").name == "cpu"
    monkeypatch.setenv("TTR_BACKEND", "tpu")
    with pytest.raises(UserError, match="TTR_BACKEND: got 'tpu'"):
        choose_backend()
