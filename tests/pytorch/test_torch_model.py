"""Ten steps of training beside the same model in PyTorch: losses, gradients and weights must agree."""

import pytest
from agreement import assert_close
from model_batches import packed

pytest.importorskip("torch.nn.functional", reason="PyTorch is not installed: pip install torch==2.13.0")
from benchmarks.peers import torch_model
from ttr_gpu.config import ModelConfig
from ttr_gpu.model import TransformerModel
from ttr_gpu.train.config import TrainConfig
from ttr_gpu.train.optimizer import Optimizer

VARIANTS = {
    "log bias, all features": {},
    "linear bias, absolute features": {"time_bias": "linear", "time_features": "absolute"},
    "grouped heads, window, tied head": {"num_kv_heads": 2, "window": 5, "tied_head": True, "time_features": "gap"},
    "no time": {"time_bias": "none", "time_features": "none"},
}
LENGTHS = {"packed": [20, 3, 17, 1], "rows": [12, 12, 12]}
LR = 1e-3


def pair(variant):
    config = ModelConfig(
        **{
            "vocabulary_size": 19, "embed_dim": 32, "hidden_dim": 48, "num_layers": 2, "num_heads": 4,
            "time_scale": 3.0, "time_span": 500.0, "time_features_dim": 6,
        }
        | VARIANTS[variant]
    )  # fmt: skip
    ours = TransformerModel(config, seed=4)
    twin = torch_model.TorchModel(config)
    torch_model.load_weights(twin, ours)
    return ours, twin


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients(variant, lengths):
    ours, twin = pair(variant)
    batch = packed(LENGTHS[lengths], 19)
    loss, saved = ours.loss_forward(batch, label_smoothing=0.1)
    ours.loss_backward(1.0, saved)
    expected = twin(torch_model.to_torch(batch), label_smoothing=0.1)
    expected.backward()
    assert_close("loss", loss, expected, 1e-6)
    gradients = {name: p.grad for name, p in twin.named_parameters()}
    for p in ours.parameters:
        assert_close(p.name, p.gradient, gradients[p.name], 1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_ten_steps(variant):
    ours, twin = pair(variant)
    train = TrainConfig()
    optimizer = Optimizer(ours, train)
    peer = torch_model.make_optimizer(
        twin, lr=LR, betas=(train.beta1, train.beta2), eps=train.eps, weight_decay=train.weight_decay
    )
    clipped = 0
    for step in range(1, 11):
        batch = packed(LENGTHS["packed"], 19, seed=step)
        expected = torch_model.training_step(twin, peer, torch_model.to_torch(batch), train.clip_norm)
        ours.zero_gradients()
        loss, saved = ours.loss_forward(batch)
        ours.loss_backward(1.0, saved)
        norm = optimizer.gradient_norm()
        optimizer.update(step, LR, norm)
        clipped += norm > train.clip_norm
        assert loss == pytest.approx(expected, rel=1e-5), f"loss of step {step}"
    assert clipped, "no gradient was long enough to be clipped"
    weights = dict(twin.named_parameters())
    for p in ours.parameters:
        assert_close(p.name, p.value, weights[p.name], 1e-5)
