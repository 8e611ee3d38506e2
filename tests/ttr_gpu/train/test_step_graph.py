"""Training steps as CUDA graphs, on the stand-in for CuPy (`-m gpu`: on a GPU): what is replayed is what would have
been launched, to the bit, with another batch, learning rate, dropout mask and scale of the loss in every step."""

import contextlib

import numpy as np
import pytest

from ttr_gpu.backend import to_host
from ttr_gpu.data.dataset import open_dataset
from ttr_gpu.data.options import PreprocessOptions
from ttr_gpu.data.preprocess import preprocess
from ttr_gpu.errors import TrainingDiverged
from ttr_gpu.train import step_graph
from ttr_gpu.train.config import RunConfig
from ttr_gpu.train.metrics import read_metrics
from ttr_gpu.train.run import RunOptions, describe, new_config
from ttr_gpu.train.trainer import Trainer

SMALL = (
    "model.embed_dim=16", "model.hidden_dim=16", "model.num_heads=2", "model.num_layers=1", "model.time_features_dim=2",
    "model.time_pace=2.0", "model.dropout={attention=0.2, feed_forward=0.2, residual=0.2}", "train.max_length=24",
    "train.tokens_per_batch=64", "train.steps=6", "train.warmup_steps=2", "train.lr=0.02", "train.evaluate_every=1000",
    "train.checkpoint_every=1000", "train.spike_threshold=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Sequences of 3 to 20 events, so that batches are of many shapes."""
    folder = tmp_path_factory.mktemp("data")
    rows = [f"{s},{t * (1 + s % 3) + s / 7},{'abc'[(s + t) % 3]}" for s in range(40) for t in range(3 + 7 * s % 18)]
    (folder / "in.csv").write_text("sequence,time,type\n" + "\n".join(rows))
    preprocess(PreprocessOptions([str(folder / "in.csv")], folder / "data.zarr"), lambda line: None)
    return folder / "data.zarr"


class Run:
    """A few steps: their figures, the weights after each, and the steps that were replayed."""

    def __init__(self, data, folder, gpu, *assignments, before=lambda trainer: None, steps=6):
        folder.mkdir()
        dataset = open_dataset(data)
        config = new_config(RunOptions(data, "nano", assignments=(*SMALL, *assignments)), dataset)
        self.said: list[str] = []
        self.trainer = trainer = Trainer(
            config, dataset, folder, describe(dataset), backend=gpu, echo=self.said.append, log_every=3
        )
        before(trainer)
        self.weights = []
        with trainer.batches:
            for _ in range(steps):
                with trainer.model.arena.step():
                    trainer._step()
                self.weights.append(to_host(trainer.model.flat.values))
            trainer._read()
        trainer.log.close()
        names = ("step", "loss", "gradient_norm", "lr", "tokens")
        self.figures = np.array(
            [[r[name] or 0.0 for name in names] for r in read_metrics(folder) if r["kind"] == "step"]
        )
        self.replayed = 0 if trainer._graphs is None else trainer._graphs.replayed


def never_captured(trainer):
    trainer._graphs._captures = False


KINDS = {
    "float32": (),
    "bfloat16, two batches a step, averaged": ("train.accumulate=2", "model.precision=bfloat16", "train.ema=0.5"),
    "gaps, recomputed": ("model.time_components=2", "train.recompute=block", "model.time_pace=0.0"),
    "muP, linear bias, window": ("model.mup_base_width=8", "model.time_bias=linear", "model.window=5"),
    # It overflows, is halved, and doubles again.
    "float16": ("model.precision=float16", "train.loss_scale=16777216", "train.loss_scale_growth=1"),
}


@pytest.mark.parametrize("assignments", KINDS.values(), ids=KINDS)
def test_a_replay_is_what_would_have_been_launched(data, tmp_path, gpu, assignments):
    replayed = Run(data, tmp_path / "graph", gpu, *assignments)
    launched = Run(data, tmp_path / "plain", gpu, *assignments, before=never_captured)
    # Some of the shapes come but once or twice.
    assert replayed.replayed >= 3
    assert launched.replayed == 0
    np.testing.assert_array_equal(replayed.figures, launched.figures)
    np.testing.assert_array_equal(replayed.weights, launched.weights)
    assert len(np.unique(replayed.figures[:, 3])) == 6  # learning rates
    if "float16" in str(assignments).replace("bfloat16", ""):
        assert replayed.trainer.progress.loss_scale == launched.trainer.progress.loss_scale
        assert replayed.trainer.progress.loss_scale.skipped
    assert len(np.unique(replayed.figures[:, 4])) >= 3  # tokens
    # Rows that are added to fill a batch up change nothing but the order of sums.
    off = Run(data, tmp_path / "off", gpu, *assignments, "train.cuda_graph=off")
    assert off.trainer._graphs is None
    np.testing.assert_allclose(replayed.figures, off.figures, rtol=5e-2 if "float16" in str(assignments) else 2e-4)


def frozen(name):
    """What the device is told under a name in the first step, it is told no more."""

    def before(trainer):
        graphs = trainer._graphs
        copy, kept = graphs._copy, getattr(graphs, name)
        told = []

        def copied(pairs):
            copy([(target, source) for target, source in pairs if target is not kept or not told])
            told.extend(target for target, _ in pairs if target is kept)

        graphs._copy = copied

    return before


@pytest.mark.parametrize("name", ["_numbers", "_schedules", "_weights"])
def test_a_number_that_stays_what_it_was_would_show(data, tmp_path, gpu, name):
    options = ("train.accumulate=2",)
    right = Run(data, tmp_path / "right", gpu, *options)
    wrong = Run(data, tmp_path / "wrong", gpu, *options, before=frozen(name))
    np.testing.assert_array_equal(wrong.weights[0], right.weights[0])
    assert (wrong.weights[-1] != right.weights[-1]).any()


def test_sequences_that_stay_where_they_were_would_show(data, tmp_path, gpu, monkeypatch):
    right = Run(data, tmp_path / "right", gpu)
    monkeypatch.setattr(step_graph.PackedInputs, "write", lambda *_: None)
    # Rows that are in no sequence hold what was there before, which may be no numbers.
    with contextlib.suppress(TrainingDiverged):
        wrong = Run(data, tmp_path / "wrong", gpu)
        np.testing.assert_array_equal(wrong.weights[0], right.weights[0])
        assert (wrong.weights[-1] != right.weights[-1]).any()


def test_a_step_that_cannot_be_captured_is_launched_and_said_once(data, tmp_path, gpu, monkeypatch):
    """Here one that waits for the GPU in the middle."""

    def waiting(trainer):
        backward = trainer.model.loss_backward

        def loss_backward(dloss, saved, **options):
            backward(dloss, saved, **options)
            float(saved.type_loss)

        trainer.model.loss_backward = loss_backward

    run = Run(data, tmp_path / "waiting", gpu, before=waiting)
    assert run.replayed == 0
    said = [line for line in run.said if line.startswith("cuda graph off: capturing a step failed (")]
    assert len(said) == 1
    np.testing.assert_array_equal(run.weights, Run(data, tmp_path / "right", gpu).weights)


def test_what_still_lives_is_not_written_over(data, tmp_path, gpu):
    kept = []

    def keeping(trainer):
        forward = trainer.model.loss_forward

        def loss_forward(*args, **kwargs):
            loss, saved = forward(*args, **kwargs)
            if not kept:
                kept.append(saved.head.losses)
            return loss, saved

        trainer.model.loss_forward = loss_forward

    run = Run(data, tmp_path / "keeping", gpu, before=keeping)
    assert run.replayed == 0
    assert sum("bytes of an earlier step are still in use" in line for line in run.said) == 1
    np.testing.assert_array_equal(run.weights, Run(data, tmp_path / "right", gpu).weights)


def test_graphs_are_no_more_than_are_allowed(data, tmp_path, gpu, monkeypatch):
    monkeypatch.setattr(step_graph, "_MOST", 1)
    monkeypatch.setattr(step_graph, "_ROWS", 8)
    run = Run(data, tmp_path / "one", gpu)
    assert len(run.trainer._graphs._shapes) == 1
    assert run.trainer._graphs.plain > 2  # new again each time


@pytest.mark.parametrize(
    ("changes", "processes", "profile", "expected"),
    [
        ({}, 1, False, None),
        ({"cuda_graph": "off"}, 1, False, ""),
        ({}, 2, False, "several processes sum their gradients in the middle of a step"),
        ({}, 1, True, "--profile times kernels one by one"),
        ({"optimizer": "muon"}, 1, False, "train.optimizer=muon reads the gradient's norm on the host"),
        ({"survival": True}, 1, False, "how many positions are censored differs"),
    ],
)
def test_why_a_run_is_not_captured(changes, processes, profile, expected):
    config = RunConfig.model_validate({"model": {"vocabulary_size": 4}, "train": changes})
    why = step_graph.why_not(config, "gpu", processes, profile)
    assert why == expected or (expected and expected in why)
    assert step_graph.why_not(config, "cpu", processes, profile) == ""
