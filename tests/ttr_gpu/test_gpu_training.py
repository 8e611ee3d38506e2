"""What training adds to a model, on a GPU's arrays and kernels against the CPU; without a device, on a stand-in."""

import numpy as np
import pytest
from model_batches import packed

from ttr_gpu.backend import to_host
from ttr_gpu.config import DropoutConfig, ModelConfig
from ttr_gpu.model import KEEP_ALL, TransformerModel
from ttr_gpu.nn import DropoutKey
from ttr_gpu.nn.recompute import Recompute
from ttr_gpu.train.averages import Averages
from ttr_gpu.train.config import TrainConfig
from ttr_gpu.train.optimizer import Optimizer


def trained(steps, backend=None, recompute=KEEP_ALL, scale=1.0, optimizer="adamw", **changes):
    """Losses of some steps, the values after them, and their averages."""
    shape = {"vocabulary_size": 11, "embed_dim": 16, "hidden_dim": 24, "num_layers": 2, "num_heads": 4}
    config = ModelConfig(**{**shape, "time_span": 500.0, "time_features_dim": 6, **changes})
    model = TransformerModel(config, seed=4, **({} if backend is None else {"backend": backend}))
    update, averages = Optimizer(model, TrainConfig(optimizer=optimizer)), Averages(model, 0.5)
    losses = []
    for step in range(1, steps + 1):
        model.zero_gradients()
        loss, saved = model.loss_forward(
            packed([20, 3, 17], 11, seed=1), DropoutKey(5, step), gradient_scale=scale, recompute=recompute
        )
        model.loss_backward(scale, saved)
        update.update(step, 3e-3, update.gradient_norm(), 1 / scale)
        averages.update(step)
        losses.append(float(loss))
    return losses, to_host(model.flat.values), to_host(averages.values)


def test_scaled_float16_muon_and_averages_agree_with_the_cpu(gpu):
    changes = {"precision": "float16", "scale": 1024.0, "optimizer": "muon"}
    got, expected = trained(2, gpu, **changes), trained(2, **changes)
    for mine, its in zip(got, expected, strict=True):
        np.testing.assert_allclose(mine, its, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("policy", ["block", "attention", "feed_forward"])
def test_recomputed_gradients_are_the_same_bits(gpu, policy):
    dropout = DropoutConfig(attention=0.2, feed_forward=0.1, residual=0.3)
    got, expected = trained(1, gpu, Recompute(policy), dropout=dropout), trained(1, gpu, dropout=dropout)
    np.testing.assert_array_equal(got[1], expected[1])
