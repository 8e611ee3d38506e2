"""The padded peer of `benchmarks events` computes what our packed model does: loss and gradients."""

import numpy as np
import pytest

from benchmarks.event_training import Packed, Sequences, pack
from ttr_gpu.config import ModelConfig
from ttr_gpu.model import TransformerModel

pytest.importorskip("torch.nn.functional", reason="PyTorch is not installed: pip install torch==2.13.0")

from benchmarks.peers.torch_events import TorchEventModel, padded
from benchmarks.peers.torch_model import load_weights


@pytest.fixture
def data():
    """Five sequences of uneven length."""
    rng = np.random.default_rng(0)
    lengths = (9, 2, 17, 5, 12)
    config = ModelConfig(
        vocabulary_size=7, embed_dim=16, hidden_dim=24, num_layers=2, num_heads=2, time_features_dim=6,
        time_components=3, time_log_mean=0.4, time_log_std=1.3, time_scale=2.0, time_span=60.0,
    )  # fmt: skip
    tokens = [rng.integers(0, 7, n).astype(np.int32) for n in lengths]
    return Sequences(tokens, [1e9 + np.cumsum(rng.exponential(2.0, n)) for n in lengths], config)


def test_padding_changes_neither_loss_nor_gradients(data):
    ours = TransformerModel(data.model, seed=3)
    peer = TorchEventModel(data.model)
    load_weights(peer, ours)
    chosen = np.array([2, 0, 1, 4])
    batch = pack(data, chosen)
    loss, saved = ours.loss_forward(batch)
    ours.loss_backward(1.0, saved)
    other = peer(padded([data.tokens[i] for i in chosen], [data.times[i] for i in chosen]))
    other.backward()
    assert float(loss) == pytest.approx(other.item(), rel=1e-5)
    named = dict(peer.named_parameters())
    for p in ours.parameters:
        expected = named[p.name].grad.numpy()
        np.testing.assert_allclose(
            p.gradient, expected, rtol=0, atol=2e-5 + 2e-4 * np.abs(expected).max(), err_msg=p.name
        )


def test_batches_hold_whole_sequences_and_padding_is_counted(data):
    batch = pack(data, np.array([1, 3]))
    assert isinstance(batch, Packed)
    assert batch.cu_seqlens.tolist() == [0, 1, 5]
    given = padded([data.tokens[1], data.tokens[3]], [data.times[1], data.times[3]])
    assert given.batch.tokens.shape == (2, 4)
    assert int((given.batch.targets >= 0).sum()) == 5
    first, last = data.times[1].tolist()
    assert given.batch.times[0].tolist() == [first, last, last, last]
    assert data.padding([np.array([1, 3])]) == pytest.approx(3 / 8)
    order = np.concatenate(data.batches(2, False))
    assert len(set(order.tolist())) == 4
    lengths = np.array([len(each) for each in data.tokens])
    assert sorted(sorted(lengths[batch].tolist()) for batch in data.batches(2, True)) == [[2, 5], [9, 12]]
