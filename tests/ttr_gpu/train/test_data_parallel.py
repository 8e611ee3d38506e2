"""Training on several ranks is training on one: the same losses to rounding, and from run to run the same bits."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ranks import command, environ, mpirun
from safetensors.numpy import load_file
from small_runs import SMALL, resume, run, weights

from ttr_gpu.config import DropoutConfig, ModelConfig
from ttr_gpu.data.batches import Share, TrainingBatches, Windows, balanced, evaluation_batches
from ttr_gpu.errors import UserError
from ttr_gpu.model import TransformerModel
from ttr_gpu.nn.dropout import DropoutKey
from ttr_gpu.nn.recompute import Recompute
from ttr_gpu.train.checkpoint import find_checkpoint
from ttr_gpu.train.config import TrainConfig
from ttr_gpu.train.metrics import read_metrics
from ttr_gpu.train.optimizer import Optimizer

DROPOUT = "model.dropout={attention=0.1, feed_forward=0.1, residual=0.2}"
FOUR = ("train.accumulate=4", "train.evaluate_every=7", "train.patience=0")


def arguments(data, out, *assignments, name="run"):
    options = ["-m", "ttr_cli.main", "train", str(data), "--preset", "nano", "--out", str(out), "--name", name]
    for assignment in (*SMALL, *assignments):
        options += ["--set", assignment]
    return options


def train_on(ranks, data, out, *assignments):
    """Losses, norms, tokens of each step and validation of a run on so many ranks; its output."""
    code, said, err = mpirun(*arguments(data, out, *assignments), ranks=ranks)
    assert code == 0, err
    return steps(out / "run"), said


def steps(folder):
    found = [r for r in read_metrics(folder) if r["kind"] in ("step", "validation")]
    return [[r["step"], r["loss"], r.get("gradient_norm", 0), r.get("tokens", 0)] for r in found]


def test_one_two_and_four_ranks_train_the_same_model(data, tmp_path):
    run(data, tmp_path / "1", *FOUR, DROPOUT, "train.ema=0.9")
    expected, end = steps(tmp_path / "1" / "run"), weights(tmp_path / "1" / "run")
    for ranks in (2, 4):
        got, said = train_on(ranks, data, tmp_path / str(ranks), *FOUR, DROPOUT, "train.ema=0.9")
        np.testing.assert_allclose(got, expected, rtol=2e-5)
        np.testing.assert_allclose(weights(tmp_path / str(ranks) / "run"), end, rtol=1e-3, atol=1e-5)
        assert f"processes  {ranks} through MPI" in said
        # One process writes and prints.
        lines = said.splitlines()
        assert [line.split("/")[0].split()[1] for line in lines if line.startswith("step ")] == [
            str(n) for n in range(1, 21)
        ]
        assert sum("test " in line for line in lines) == 1
    # Again, to the bit: and it makes no difference if each rank has but its part of the moments.
    again, _ = train_on(2, data, tmp_path / "again", *FOUR, DROPOUT, "train.ema=0.9", "train.shard_optimizer=true")
    assert again == steps(tmp_path / "2" / "run")
    for file in ("model", "optimizer", "averages"):
        one, other = (
            load_file(find_checkpoint(tmp_path / name / "run") / f"{file}.safetensors") for name in ("again", "2")
        )
        assert one.keys() == other.keys()
        for name, array in one.items():
            np.testing.assert_array_equal(array, other[name], err_msg=name)


def test_a_sharded_optimizer_keeps_a_part_of_the_moments():
    model = TransformerModel(ModelConfig(vocabulary_size=50, embed_dim=16, hidden_dim=32, num_heads=2, num_layers=2))
    count = len(model.flat.values)
    ranks = [SimpleNamespace(rank=rank, size=3) for rank in range(3)]
    found = [Optimizer(model, TrainConfig(shard_optimizer=True), ranks[rank]) for rank in range(3)]
    assert sum(len(each.first) for each in found) == sum(len(each.second) for each in found) == count
    assert max(len(each.first) for each in found) <= count // 3 + 1
    assert len(Optimizer(model, TrainConfig(shard_optimizer=True)).first) == count
    with pytest.raises(UserError, match="shard_optimizer: got true with"):
        Optimizer(model, TrainConfig(shard_optimizer=True, optimizer="muon"))


def test_parts_of_the_moments_make_the_updates_of_the_whole():
    config = ModelConfig(vocabulary_size=50, embed_dim=16, hidden_dim=32, num_heads=2, num_layers=2)
    whole = Optimizer(TransformerModel(config), TrainConfig())
    # What is broadcast is copied below.
    ranks = [SimpleNamespace(rank=rank, size=3, broadcast=lambda array, root: None) for rank in range(3)]
    parts = [Optimizer(TransformerModel(config), TrainConfig(shard_optimizer=True), rank) for rank in ranks]
    rng = np.random.default_rng(0)
    for step in range(1, 4):
        gradients = rng.standard_normal(len(whole.model.flat.gradients)).astype(np.float32)
        for each in (whole, *parts):
            each.model.flat.gradients[...] = gradients
            each.update(step, 0.01, each.gradient_norm())
        values = np.concatenate([each.model.flat.values[each.own] for each in parts])
        np.testing.assert_array_equal(values, whole.model.flat.values)
        for each in parts:
            each.model.flat.values[...] = values
            np.testing.assert_array_equal(each.first, whole.first[each.own])
            np.testing.assert_array_equal(each.second, whole.second[each.own])


@pytest.mark.parametrize(("precision", "several"), [("float32", (2, 3, 4)), ("float16", (3,))])
def test_ranks_share_the_windows_of_one_batch(data, tmp_path, precision, several):
    # As `mpirun -n 2 ttr-gpu train data.zarr` does. Each row has the mask that it has in the whole batch.
    options = (f"model.precision={precision}", DROPOUT)
    run(data, tmp_path / "1", *options)
    expected = np.array(steps(tmp_path / "1" / "run"))
    for ranks in several:
        got, said = train_on(ranks, data, tmp_path / str(ranks), *options)
        if precision == "float16":
            # Where a batch is a spike its gradient's norm is rounding: 2.4, 3.3, and 2.8 in float32, beside losses that
            # agree to 5e-4. The first step's norm is compared, and all losses.
            np.testing.assert_allclose(np.array(got)[0], expected[0], rtol=2e-3)
            np.testing.assert_allclose(np.array(got)[:, [0, 1, 3]], expected[:, [0, 1, 3]], rtol=2e-3)
        else:
            np.testing.assert_allclose(got, expected, rtol=1e-4)
        assert f"a part, 1 of {ranks}, of one of 1" in said


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_parts_of_a_batch_have_the_masks_of_the_whole(recompute):
    drop = DropoutConfig(attention=0.3, feed_forward=0.3, residual=0.3)
    # Widths of which no row begins with a call of Philox.
    config = ModelConfig(
        vocabulary_size=1500, embed_dim=18, hidden_dim=31, num_heads=3, num_layers=2, dropout=drop
    )  # fmt: skip
    split = split_of(np.random.default_rng(0).integers(2, 40, 60).tolist())
    losses, gradients = [], []
    for size in (1, 2, 5):
        model = TransformerModel(config, seed=1)
        model.zero_gradients()
        loss = 0.0
        for rank in range(size):
            with TrainingBatches(
                split, fingerprint="f", tokens_per_batch=50, max_length=8, share=Share(rank, size, 1)
            ) as found:  # fmt: skip
                batch = next(found)
            part, saved = model.loss_forward(batch, DropoutKey(3, 1, batch.first_row), recompute=Recompute(recompute))
            share = (
                np.count_nonzero(batch.targets >= 0) / 50
            )  # of tokens_per_batch, which is as good as the number of targets
            model.loss_backward(share, saved)
            loss += share * float(part)
        losses.append(loss)
        gradients.append(model.flat.gradients.copy())
    np.testing.assert_allclose(losses[1:], losses[0], rtol=1e-5)
    for got in gradients[1:]:
        np.testing.assert_allclose(got, gradients[0], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_goes_on_on_other_numbers_of_ranks(data, tmp_path, optimizer):
    # On one process, on two with moments divided (which Muon's cannot be), on one again.
    options = (
        *FOUR, DROPOUT, f"train.optimizer={optimizer}", "train.ema=0.9", "train.schedule=constant",
        "train.warmup_steps=1",
    )  # fmt: skip
    run(data, tmp_path / "through", *options)
    run(data, tmp_path / "parts", *options, "train.steps=7")
    folder = tmp_path / "parts" / "run"
    shard = f"train.shard_optimizer={'true' if optimizer == 'adamw' else 'false'}"
    code, said, err = mpirun(
        "-m", "ttr_cli.main", "train", data, "--resume", folder, "--set", "train.steps=14", "--set", shard
    )
    assert code == 0, err
    assert "after step 7" in said
    resume(data, folder, "train.steps=20", "train.shard_optimizer=false")
    np.testing.assert_allclose(by_step(folder), by_step(tmp_path / "through" / "run"), rtol=1e-4)
    np.testing.assert_allclose(weights(folder), weights(tmp_path / "through" / "run"), rtol=1e-3, atol=1e-5)
    averages = [load_file(find_checkpoint(f) / "averages.safetensors") for f in (folder, tmp_path / "through" / "run")]
    for name, array in averages[0].items():
        np.testing.assert_allclose(array, averages[1][name], rtol=1e-3, atol=1e-5, err_msg=name)


def by_step(folder):
    return [each for each in steps(folder) if each[3]]


def begun(data, out, ranks=2):
    """A long run on ranks that has passed its first steps, and the process numbers of the ranks."""
    process = subprocess.Popen(
        command(ranks, *arguments(data, out, "train.steps=100000", "train.checkpoint_every=50", *FOUR[:1])),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ(),
    )  # fmt: skip
    seen = ""
    for line in process.stdout:
        seen += line
        if line.startswith("step ") and int(line.split("/")[0].split()[1]) > 60:
            return process, children(process.pid)
    raise AssertionError(seen + process.stderr.read())


def children(pid):
    """Process numbers of Python below a process, in the order of ranks."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environment = (path / "environ").read_bytes().split(b"\0")
            parents = set(re.findall(r"PPid:\t(\d+)", (path / "status").read_text()))
            grandparents = re.findall(r"PPid:\t(\d+)", Path(f"/proc/{next(iter(parents))}/status").read_text())
            name = (path / "comm").read_text()
        except (OSError, StopIteration):
            continue
        if str(pid) in {*parents, *grandparents} and name.startswith("python"):
            found.update({int(e.split(b"=")[1]): int(path.name) for e in environment if e.startswith(b"PMI_RANK=")})
    return [found[rank] for rank in sorted(found)]


def test_a_rank_that_is_killed_ends_the_run_at_once(data, tmp_path):
    process, ranks = begun(data, tmp_path)
    os.kill(ranks[1], signal.SIGKILL)
    process.communicate(timeout=120)  # in about a second, on a machine with nothing else to do
    assert process.returncode != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    # What was saved before is whole, and one process goes on from it.
    assert find_checkpoint(tmp_path / "run")
    last = int(find_checkpoint(tmp_path / "run").name.split("-")[1])
    outcome, _ = resume(data, tmp_path / "run", f"train.steps={last + 3}")
    assert outcome.progress.step == last + 3


def test_a_signal_to_one_rank_stops_all_after_the_same_step(data, tmp_path):
    process, ranks = begun(data, tmp_path)
    os.kill(ranks[1], signal.SIGUSR1)
    out, err = process.communicate(timeout=60)
    assert "SIGUSR1: stopped after step" in out, err
    stopped = int(re.search(r"stopped after step (\d+)", out)[1])
    assert find_checkpoint(tmp_path / "run").name == f"step-{stopped:08d}"
    assert steps(tmp_path / "run")[-1][0] == stopped


def two_programs(first, second):
    """mpirun with a program of its own for each of two ranks."""
    one = command(1, *first)
    line = [*one, ":", *command(1, *second)[1:]]
    done = subprocess.run(line, capture_output=True, text=True, env=environ(), timeout=60)
    errors = [text for text in done.stderr.splitlines() if text.startswith("error:")]
    return done.returncode, errors, done.stdout


def test_ranks_of_different_runs_are_refused_with_one_line(data, tmp_path):
    code, errors, out = two_programs(arguments(data, tmp_path), arguments(data, tmp_path, "train.lr=0.5"))
    assert code == 2
    assert errors == [
        "error: the run: differs between ranks: train.lr is None and 0.5 on rank 0 and on rank 1; start all of them "
        "with one command, on the same data and release"
    ]
    assert out == ""
    assert not (tmp_path / "run").exists()
    code, errors, _ = two_programs(arguments(data, tmp_path), arguments(tmp_path / "no.zarr", tmp_path))
    assert code == 2
    assert len(errors) == 1
    assert errors[0].startswith(f"error: rank 1: {tmp_path / 'no.zarr'}: no such data set")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["train.accumulate=3"], "train.accumulate: got 3 batches per step for 2 processes"),
        (["train.optimizer=muon", "train.shard_optimizer=true"], "train.shard_optimizer: got true with"),
        (["train.tokens_per_batch=8"], "train.tokens_per_batch: got 8, expected at least train.max_length"),
    ],
)
def test_what_no_rank_can_do_is_said_as_one(data, tmp_path, options, message):
    code, out, err = mpirun(*arguments(data, tmp_path, *options))
    assert (code, out) == (2, "")
    (line,) = [text for text in err.splitlines() if not text.startswith("compiling kernels")]
    assert line.startswith(f"error: {message}")
    assert not (tmp_path / "run").exists()


def test_other_data_are_told_by_their_fingerprint(data, tmp_path):
    from ttr_gpu.data.options import PreprocessOptions
    from ttr_gpu.data.preprocess import preprocess

    rows = "".join(f"s{n % 40},{n},{'abc'[n % 3]}\n" for n in range(4000))
    for name, text in (("one", rows), ("two", rows.replace("s0,0,a", "s0,0,b"))):
        (tmp_path / f"{name}.csv").write_text("sequence,time,type\n" + text)
        preprocess(PreprocessOptions((str(tmp_path / f"{name}.csv"),), tmp_path / f"{name}.zarr"), lambda *_: None)
    code, errors, _ = two_programs(
        arguments(tmp_path / "one.zarr", tmp_path), arguments(tmp_path / "two.zarr", tmp_path)
    )
    assert code == 2
    assert len(errors) == 1
    assert "data.fingerprint is " in errors[0]


def test_all_ranks_stop_where_training_diverges(data, tmp_path):
    code, out, err = mpirun(*arguments(data, tmp_path, "train.lr=1e30", "train.clip_norm=1e30", *FOUR))
    assert code == 1, (out, err)
    (line,) = [text for text in err.splitlines() if text.startswith("error:")]
    assert re.match(r"error: rank [01] of 2 \(.*\): step \d+: the (loss|gradient's norm) is ", line)
    assert "Traceback" not in err


def test_the_trace_shows_sums_while_the_backward_runs(data, tmp_path):
    # Large enough that there are several pieces.
    code, _, err = mpirun(
        *arguments(data, tmp_path, "model.embed_dim=128", "model.hidden_dim=512", "model.num_layers=4",
                   "train.steps=8", "train.tokens_per_batch=512", "train.accumulate=2"), "--profile",
    )  # fmt: skip
    assert code == 0, err
    events = json.loads((tmp_path / "run" / "profile" / "trace.json").read_text())["traceEvents"]
    sums = [e for e in events if e["name"] == "all_reduce"]
    assert {e["tid"] for e in sums} == {1}
    assert len(sums) >= 5 * 3
    ends = [e for e in events if e["name"] == "embedding_backward"]
    early = [e for e in sums if any(0 < end["ts"] - e["ts"] < 1e6 for end in ends)]
    assert len(early) >= 5 * 2, "no sum began before the backward's last operation"


def split_of(lengths):
    from test_batches import split_of as make

    return make(lengths)


@pytest.mark.parametrize(("size", "batches"), [(1, 3), (2, 4), (4, 4), (4, 2), (6, 1), (3, 3)])
def test_shares_are_all_batches_once(size, batches):
    split = split_of(np.random.default_rng(0).integers(2, 40, 60).tolist())
    options = {"fingerprint": "f", "tokens_per_batch": 50, "max_length": 8, "seed": 3, "start_step": 2 * batches}

    def first(share, count):
        with TrainingBatches(split, **options, share=share) as found:
            return [next(found) for _ in range(count)]

    whole = first(Share(), 5 * batches)
    shared = [first(Share(rank, size, batches), 5 * max(1, batches // size)) for rank in range(size)]
    for batch in whole:
        parts = [b for found in shared for b in found if b.step == batch.step]
        assert len(parts) == max(1, size // batches)
        for name in ("tokens", "targets", "times", "starts"):
            both = np.concatenate([getattr(b, name) for b in parts])
            np.testing.assert_array_equal(both, getattr(batch, name))
        counts = np.array([len(b.tokens) for b in parts])
        assert [b.first_row for b in parts] == (np.cumsum(counts) - counts).tolist()
        assert np.abs(counts - counts.mean()).max() <= 8, "parts are as even as windows allow"
        for b in parts:
            assert b.cu_seqlens[-1] == len(b.tokens)
    # A step's batches are spread over the ranks step by step, not over time.
    for found in shared:
        assert [b.step // batches for b in found] == sorted(b.step // batches for b in found)
        assert found[0].step // batches == 2


def test_halves_and_quarters_of_a_batch_are_nearly_even():
    rng = np.random.default_rng(0)
    largest, unbalanced = [], []
    for _ in range(20):
        lengths = rng.lognormal(3.0, 1.0, 60).astype(np.int64) + 1
        windows, chosen = Windows(np.cumsum(lengths), lengths, np.arange(60)), rng.permutation(60)
        order = balanced(windows, chosen)
        assert sorted(order) == list(range(60))
        for found, laid in ((largest, lengths[order]), (unbalanced, lengths[chosen])):
            for parts in (2, 4):
                counts = [laid[Share(0, parts, 1).windows(laid, part)].sum() for part in range(parts)]
                assert sum(counts) == lengths.sum()
                found.append(max(counts) * parts / lengths.sum())
    assert max(largest) < 1.03
    assert np.mean(unbalanced) > 1.03


def test_a_rank_may_have_nothing_of_a_batch():
    split = split_of([9, 9, 9])
    with TrainingBatches(
        split, fingerprint="f", tokens_per_batch=8, max_length=8, share=Share(2, 3, 1)
    ) as found:  # fmt: skip
        batch = next(found)
    assert len(batch.tokens) == 0
    np.testing.assert_array_equal(batch.cu_seqlens, [0])


def test_evaluation_is_shared_batch_by_batch():
    split = split_of([30, 7, 19, 40, 3])
    options = {"tokens_per_batch": 16, "max_length": 8, "limit_tokens": 60}
    whole = list(evaluation_batches(split, **options))
    shared = [list(evaluation_batches(split, **options, share=Share(rank, 2, 2))) for rank in range(2)]
    assert [b.step for b in shared[0]] == [b.step for b in whole if b.step % 2 == 0]
    assert sorted(b.step for found in shared for b in found) == [b.step for b in whole]


def test_batches_that_cannot_be_shared_evenly_are_refused():
    with pytest.raises(UserError, match=r"train\.accumulate: got 3 batches per step for 2 processes"):
        Share(0, 2, 3)
