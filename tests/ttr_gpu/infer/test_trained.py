"""What a trained model may be given: as many positions as training has shown it, with a window any number."""

from types import SimpleNamespace

import pytest

from ttr_gpu.config import ModelConfig
from ttr_gpu.infer.trained import Trained
from ttr_gpu.train.config import RunConfig, TrainConfig


@pytest.mark.parametrize(("window", "noted"), [(None, [False, True]), (8, [False, False])])
def test_only_a_model_without_a_window_has_a_limit(window, noted):
    config = RunConfig(model=ModelConfig(vocabulary_size=3, window=window), train=TrainConfig(max_length=100))
    trained = Trained(SimpleNamespace(config=config), None, ["a", "b", "c"], 1.0, 0.0)
    assert [trained.beyond_context("events", length, "so what") is not None for length in (100, 101)] == noted
