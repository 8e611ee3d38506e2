"""A piece of the gradients is sent off when it is complete, no sooner; all pieces together are all gradients."""

import numpy as np
import pytest

from ttr_gpu.config import ModelConfig
from ttr_gpu.data.batches import Batch
from ttr_gpu.distributed.communicator import LocalCommunicator
from ttr_gpu.distributed.gradients import GradientSum, pieces
from ttr_gpu.model import TransformerModel


class Recorder(LocalCommunicator):
    """Keeps a copy of what each sum begins with."""

    def __init__(self):
        self.begun = []

    def start_all_reduce(self, array):
        self.begun.append(array.copy())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [4, 3, 2, 1, 0, -1]),
        ({"tied_head": True}, [3, 2, 1, 0, -1]),
        ({"vocabulary_size": 20}, [3, 2, 1, 0, -1]),
        ({"time_components": 400, "time_given_type": True, "tied_head": True}, [4, 2, 0, -1]),
    ],
    ids=str,
)
def test_pieces_are_complete_when_they_are_sent(changes, expected):
    fields = {"vocabulary_size": 2000, "embed_dim": 256, "hidden_dim": 256, "num_layers": 4, "num_heads": 4}
    model, recorder = TransformerModel(ModelConfig(**{**fields, **changes})), Recorder()
    found = pieces(model)
    assert [low for low, _ in found] == expected
    covered = np.concatenate([np.arange(part.start, part.stop) for _, part in found])
    np.testing.assert_array_equal(np.sort(covered), np.arange(len(model.flat.gradients)))

    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, 20, (2, 30)).astype(np.int32)
    times, ends = np.arange(30.0), np.array([0, 30], np.int32)
    batch = Batch(tokens, times, ends, targets, times + 1, ends[:-1], ends[:-1], 0, 0)
    sums = GradientSum(model, recorder)
    model.zero_gradients()
    _, saved = model.loss_forward(batch)
    model.loss_backward(1.0, saved, sums.block_done)
    assert len(recorder.begun) == len(found) - 1
    sums.finish()
    for (low, part), begun in zip(found, recorder.begun, strict=True):
        np.testing.assert_array_equal(begun, model.flat.gradients[part], err_msg=f"{low}")
        assert np.abs(begun).max() > 0
