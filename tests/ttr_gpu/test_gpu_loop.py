"""The training loop on a GPU's arrays: the losses of the CPU, batches that are there before they are needed, and no
wait for the device but for what is said."""

import cupy_stand_in
import numpy as np
import pytest
from model_batches import packed

from ttr_gpu.backend import CENSORED, CPU, to_host
from ttr_gpu.data.dataset import open_dataset
from ttr_gpu.data.options import PreprocessOptions
from ttr_gpu.data.preprocess import preprocess
from ttr_gpu.errors import TrainingDiverged
from ttr_gpu.train.metrics import read_metrics
from ttr_gpu.train.run import RunOptions, describe, new_config
from ttr_gpu.train.trainer import Trainer
from ttr_gpu.train.uploads import Uploads

SMALL = (
    "model.embed_dim=16", "model.hidden_dim=16", "model.num_heads=2", "model.num_layers=1", "model.time_components=2",
    "model.time_features_dim=2", "train.max_length=8", "train.tokens_per_batch=16", "train.steps=6",
    "train.evaluate_every=1000", "train.checkpoint_every=1000",
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = [f"{s},{t + s / 7},{'abc'[(s + t) % 3]}" for s in range(20) for t in range(12)]
    (folder / "in.csv").write_text("sequence,time,type\n" + "\n".join(rows))
    preprocess(PreprocessOptions([str(folder / "in.csv")], folder / "data.zarr"), lambda line: None)
    return folder / "data.zarr"


def trainer_of(data, folder, backend, *assignments, log_every=3):
    dataset = open_dataset(data)
    config = new_config(RunOptions(data, "nano", assignments=(*SMALL, *assignments)), dataset)
    folder.mkdir()
    return Trainer(
        config, dataset, folder, describe(dataset), backend=backend, echo=lambda _: None, log_every=log_every
    )


def step_by_step(trainer):
    """Waits for the device in each step."""
    waits = []
    with trainer.batches:
        for _ in range(trainer.plan.total_steps):
            before = cupy_stand_in.waits
            assert trainer._reason_to_stop() is None
            trainer._step()
            waits.append(cupy_stand_in.waits - before)
    trainer.log.close()
    return waits


def figures(folder, *names):
    return np.array([[r[name] for name in names] for r in read_metrics(folder) if r["kind"] == "step"])


@pytest.mark.parametrize(
    ("assignments", "expected"),
    [
        # Steps 1, 3 and 6 are printed.
        ((), [1, 0, 1, 0, 0, 1]),
        (("train.accumulate=2", "train.ema=0.5", "model.precision=bfloat16"), [1, 0, 1, 0, 0, 1]),
        # Whether a step has overflowed decides the next one's scale.
        (("model.precision=float16",), [1] * 6),
    ],
    ids=["float32", "bfloat16, accumulated, averaged", "float16"],
)
def test_the_loop_waits_once_for_a_printed_line(gpu, data, tmp_path, assignments, expected):
    waits = step_by_step(trainer_of(data, tmp_path / "gpu", gpu, *assignments))
    if gpu.xp.__name__ == "cupy" and hasattr(cupy_stand_in, "waits"):
        assert waits == expected
    step_by_step(trainer_of(data, tmp_path / "cpu", CPU, *assignments))
    names = ("step", "loss", "type_loss", "time_loss", "gradient_norm", "lr", "tokens")
    low = "precision" in str(assignments)
    np.testing.assert_allclose(
        figures(tmp_path / "gpu", *names), figures(tmp_path / "cpu", *names), rtol=5e-2 if low else 2e-5
    )


def test_what_diverges_between_two_lines_is_named_and_changes_no_weight(gpu, data, tmp_path):
    # A captured step would not come by what is broken here.
    trainer = trainer_of(data, tmp_path / "run", gpu, "train.steps=9", "train.cuda_graph=off")
    backward, weights = trainer.model.loss_backward, []

    def broken(dloss, saved, ready=None, **options):
        backward(dloss, saved, ready, **options)
        if trainer.progress.step + 1 >= 4:
            trainer.model.flat.gradients[:1] = np.nan
            weights.append(to_host(trainer.model.flat.values))

    trainer.model.loss_backward = broken
    with trainer.batches:
        for _ in range(5):
            trainer._step()
        with pytest.raises(TrainingDiverged, match="step 4: the gradient's norm is nan"):
            trainer._step()
    assert trainer.progress.step == 6
    assert len(weights) == 3
    np.testing.assert_array_equal(weights[0], to_host(trainer.model.flat.values))
    assert np.isfinite(weights[0]).all()


def test_batches_are_copied_ahead_from_pinned_memory(gpu):
    """In order, each whole when it is taken, however far the host is ahead; and nothing is waited for."""
    batches = [packed(lengths, 11, seed=seed) for seed, lengths in enumerate([[5, 3], [8], [1, 1], [4, 4], [2, 5]])]
    batches[1].targets[5] = CENSORED
    uploads = Uploads(gpu, 8)
    before = cupy_stand_in.waits
    sums = []
    for number, batch in enumerate(batches):
        placed = uploads.take(batch)
        for later in batches[number + 1 : number + 2]:
            uploads.start(later)
        assert placed.cu_seqlens is batch.cu_seqlens
        # Found on the host, where nothing is to be waited for.
        assert placed.censored is None if number != 1 else placed.censored.tolist() == [5]
        # Copies on the device, as a step's kernels would read them.
        sums.append([placed.tokens.copy(), placed.times.copy(), placed.targets.copy(), placed.target_times.copy()])
    assert cupy_stand_in.waits == before
    for batch, found in zip(batches, sums, strict=True):
        for array, name in zip(found, ("tokens", "times", "targets", "target_times"), strict=True):
            np.testing.assert_array_equal(to_host(array), getattr(batch, name))
    # Another batch than the one that was begun.
    uploads.start(batches[0])
    np.testing.assert_array_equal(to_host(uploads.take(batches[3]).tokens), batches[3].tokens)
