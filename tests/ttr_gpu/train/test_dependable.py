"""Nothing is lost: killed, interrupted, out of disk, resumed from what is left, a run ends with the same bits."""

import errno
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from safetensors.numpy import load_file
from small_runs import SMALL, records, resume, run, weights

from ttr_gpu.errors import UserError
from ttr_gpu.train import checkpoint
from ttr_gpu.train.checkpoint import find_checkpoint, list_checkpoints, open_checkpoint
from ttr_gpu.train.run import RunOptions, train
from ttr_gpu.train.safetensors_file import Abandoned, checksum, read_arrays, write_arrays
from ttr_gpu.train.trainer import Trainer
from ttr_kernels.common.parallel import get_threads, set_threads

KILLS = int(os.environ.get("TTR_KILLS", "5"))


def assert_same_end(got, expected):
    """Weights, averages, optimizer state and metrics, all to the bit."""
    mine, its = find_checkpoint(got), find_checkpoint(expected)
    assert mine.name == its.name
    files = sorted(path.name for path in its.glob("*.safetensors"))
    assert files == sorted(path.name for path in mine.glob("*.safetensors"))
    for file in files:
        arrays = load_file(its / file)
        for name, array in load_file(mine / file).items():
            np.testing.assert_array_equal(array, arrays[name], err_msg=f"{file}: {name}")
    for kind in ("step", "validation", "spike"):
        assert records(got, kind) == records(expected, kind)
    states = [dict(open_checkpoint(path).state, seconds=None, computed_on=None) for path in (mine, its)]
    assert states[0] == states[1]


def test_a_run_killed_at_any_moment_ends_as_if_it_had_not_been(data, tmp_path):
    options = (
        f"train.steps={60 * KILLS}", "train.checkpoint_every=3", "train.evaluate_every=25", "train.patience=0",
        "train.ema=0.9", "model.precision=float16", "train.loss_scale=16777216", "train.loss_scale_growth=20",
        "train.spike_threshold=2",
    )  # fmt: skip
    run(data, tmp_path / "whole", *options)
    rng, killed, while_writing = random.Random(5), 0, 0
    folder = tmp_path / "runs" / "run"
    command = [sys.executable, "-m", "ttr_cli.main", "train", str(data), "--out", str(tmp_path / "runs")]
    fresh = ["--preset", "nano", "--name", "run"]
    for assignment in (*SMALL, *options):
        fresh += ["--set", assignment]
    while True:
        begun = bool(list_checkpoints(folder))
        if not begun:
            shutil.rmtree(folder, ignore_errors=True)
        process = subprocess.Popen(
            [*command, *(["--resume", "auto"] if begun else fresh)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        if killed == KILLS:
            break
        assert any(line.startswith("step") for line in process.stdout), process.stderr.read()
        if killed % 2:
            while process.poll() is None and not list(folder.glob("checkpoints/.step-*.partial-*")):
                pass
            time.sleep(rng.uniform(0, 0.005))
        else:
            time.sleep(rng.uniform(0, 0.2))
        process.kill()
        process.communicate()
        assert process.returncode == -9, "the job is too small: it ended before it was killed"
        killed += 1
        while_writing += bool(list(folder.glob("checkpoints/.step-*")))
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert_same_end(folder, tmp_path / "whole" / "run")
    assert while_writing, "no kill fell into the writing of a checkpoint"
    assert not list(folder.glob("checkpoints/.*")), "what they left behind is cleared away"


def damage(path):
    file = path / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def test_resume_auto_names_and_skips_damaged_checkpoints(data, tmp_path):
    options = ("train.checkpoint_every=5", "train.keep_last=99")
    run(data, tmp_path / "whole", *options)
    run(data, tmp_path / "runs", *options)
    folder = tmp_path / "runs" / "run"
    *_, good, bad, worse = list_checkpoints(folder)
    damage(bad)
    damage(worse)
    said = []
    train(RunOptions(data, out=tmp_path / "runs", resume="auto"), said.append)
    skipped = [line for line in said if "skipped a damaged checkpoint" in line]
    assert [str(worse) in skipped[0], str(bad) in skipped[1], len(skipped)] == [True, True, 2]
    assert "optimizer.safetensors" in skipped[0]
    assert any(f"after step {int(good.name[5:])}" in line for line in said)
    assert_same_end(folder, tmp_path / "whole" / "run")
    open_checkpoint(worse)  # written anew
    for path in list_checkpoints(folder):
        damage(path)
    with pytest.raises(UserError, match="holds no checkpoint that is whole"):
        train(RunOptions(data, out=tmp_path / "runs", resume="auto"), said.append)
    with pytest.raises(UserError, match="wrong checksum"):
        resume(data, folder)


def test_a_full_disk_leaves_the_last_good_checkpoint(data, tmp_path, monkeypatch):
    options = ("train.checkpoint_every=5", "train.evaluate_every=5")
    run(data, tmp_path / "whole", *options)
    saved = []
    original = checkpoint.write_arrays

    def write_arrays(path, arrays, abandoned):
        saved.append(path)
        if len(saved) == 6:
            # As a disk that fills up in the middle of a file.
            path.write_bytes(b"\0" * 1000)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(path, arrays, abandoned)

    monkeypatch.setattr(checkpoint, "write_arrays", write_arrays)
    with pytest.raises(UserError, match=r"step-00000015: checkpoint not saved, .*No space left on device"):
        run(data, tmp_path / "full", *options)
    folder = tmp_path / "full" / "run"
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000005", "step-00000010"]
    assert open_checkpoint(find_checkpoint(folder)).state["step"] == 10
    resume(data, folder)
    assert_same_end(folder, tmp_path / "whole" / "run")


def test_an_evaluation_cut_short_is_made_up_for(data, tmp_path, monkeypatch):
    options = ("train.evaluate_every=5", "train.patience=2", "train.lr=0.05", "train.steps=200")
    run(data, tmp_path / "whole", *options)
    evaluate, calls = Trainer.evaluate, []

    def interrupted(trainer, *arguments):
        calls.append(arguments)
        if len(calls) == 3:
            trainer._received.append(15)
        return evaluate(trainer, *arguments)

    monkeypatch.setattr(Trainer, "evaluate", interrupted)
    outcome, _ = run(data, tmp_path / "cut", *options)
    assert (outcome.reason, outcome.progress.step, outcome.progress.evaluated_step) == ("SIGTERM", 15, 10)
    folder = tmp_path / "cut" / "run"
    outcome, _ = resume(data, folder)
    assert outcome.reason == "early"
    assert_same_end(folder, tmp_path / "whole" / "run")
    # What has stopped early stays stopped.
    outcome, said = resume(data, folder)
    assert outcome.reason == "early"
    assert not any(line.startswith("step") for line in said)


@pytest.mark.parametrize(
    ("assignment", "why"),
    [
        ("train.tokens_per_batch=128", "cannot change train.tokens_per_batch from 64 to 128, since the order"),
        ("train.accumulate=2", "cannot change train.accumulate from 1 to 2, since the order"),
        ("train.seed=1", "cannot change train.seed from 0 to 1"),
        ("train.optimizer=muon", "cannot change train.optimizer from adamw to muon, since what it remembers"),
        ("train.ema=0.9", "cannot change train.ema from None to 0.9, since the average began"),
    ],
)
def test_what_cannot_change_is_refused_with_the_reason(data, tmp_path, assignment, why):
    run(data, tmp_path, "train.steps=2")
    with pytest.raises(UserError, match=why):
        resume(data, tmp_path / "run", assignment)


def test_the_same_command_begins_a_run_and_goes_on_with_it(data, tmp_path):
    """What a batch script says that may be started again: `--name run --continue`, with all options each time."""
    options = ("model.num_layers=2", "train.checkpoint_every=5", "train.keep_last=99")
    run(data, tmp_path / "whole", *options)
    folder = tmp_path / "runs" / "run"
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text("stopped before anything was saved")
    _, said = run(data, tmp_path / "runs", *options, go_on=True)
    assert not any(line.startswith("resuming") for line in said)
    assert (tmp_path / "runs" / "run.stopped-0" / "log.txt").exists()
    for path in list_checkpoints(folder):
        if path.name > "step-00000010":
            shutil.rmtree(path)
    _, said = run(data, tmp_path / "runs", *options, go_on=True, watch=4)
    assert f"resuming {folder} after step 10" in said
    assert [record["step"] for record in records(folder, "watch")] == [12, 16, 20], "options of the command hold"
    assert_same_end(folder, tmp_path / "whole" / "run")
    for changed, message in (
        ("model.num_layers=1", r"--continue: got model.num_layers 1, expected 2, with which .*run was begun"),
        ("train.seed=1", "--continue: cannot change train.seed from 0 to 1"),
    ):
        with pytest.raises(UserError, match=message):
            run(data, tmp_path / "runs", *options, changed, go_on=True)


def test_other_threads_are_said_when_a_run_goes_on(data, tmp_path):
    run(data, tmp_path, "train.checkpoint_every=5", "train.keep_last=99")
    first = checkpoint_at(tmp_path / "run", 5)
    before = get_threads()
    _, said = resume(data, first)
    assert not any(line.startswith("note") for line in said)
    try:
        set_threads(before + 1)
        _, said = resume(data, first)
    finally:
        set_threads(before)
    (note,) = [line for line in said if line.startswith("note")]
    assert f"threads: {before + 1}, {before} before" in note
    assert f"--threads {before} keeps" in note
    assert open_checkpoint(find_checkpoint(tmp_path / "run")).state["computed_on"]["threads"] == before + 1


def test_records_after_the_resumed_step_are_replaced(data, tmp_path):
    options = ("train.checkpoint_every=5", "train.keep_last=99", "train.steps=12")
    run(data, tmp_path, *options)
    before = records(tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')
    resume(data, tmp_path / "run" / "checkpoints" / "step-00000005")
    assert records(tmp_path / "run") == before
    assert [record["step"] for record in before] == list(range(1, 13))
    assert len(weights(tmp_path / "run"))


def test_resuming_an_earlier_checkpoint_forgets_the_later_ones(data, tmp_path):
    """Or the run would go on from the old ones, which another learning rate had made."""
    run(data, tmp_path, "train.checkpoint_every=5", "train.evaluate_every=20", "train.keep_last=2", "train.steps=20")
    folder = tmp_path / "run"
    first = checkpoint_at(folder, 15)
    resume(data, first, "train.lr=0.003", "train.steps=16")
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000015", "step-00000016"]


def checkpoint_at(folder, step):
    (path,) = [path for path in list_checkpoints(folder) if path.name == f"step-{step:08d}"]
    return path


# --- checkpoints that are written while training goes on


def test_training_does_not_wait_for_the_writing(data, tmp_path, monkeypatch):
    """A checkpoint that takes longer than several steps: they are taken meanwhile, and it holds none of them."""
    run(data, tmp_path / "whole", "train.checkpoint_every=5", "train.evaluate_every=20")
    original, step, taken, ahead = checkpoint.write_arrays, Trainer._step, [0], []

    def slow(path, arrays, abandoned):
        saved = int(path.parent.name.split("-")[1].partition(".")[0])
        deadline = time.monotonic() + 60
        while taken[-1] < min(saved + 3, 20) and time.monotonic() < deadline:
            time.sleep(0.001)
        ahead.append(taken[-1] - saved)
        return original(path, arrays, abandoned)

    def counted(trainer):
        step(trainer)
        taken.append(trainer.progress.step)

    monkeypatch.setattr(checkpoint, "write_arrays", slow)
    monkeypatch.setattr(Trainer, "_step", counted)
    run(data, tmp_path / "slow", "train.checkpoint_every=5", "train.evaluate_every=20", "train.keep_last=99")
    assert min(ahead[:6]) >= 3, "of both files of three checkpoints"
    assert_same_end(tmp_path / "slow" / "run", tmp_path / "whole" / "run")
    written = checkpoint_at(tmp_path / "slow" / "run", 5)
    assert open_checkpoint(written).state["step"] == 5
    monkeypatch.undo()
    resume(data, written)
    assert_same_end(tmp_path / "slow" / "run", tmp_path / "whole" / "run")


def test_a_second_interrupt_gives_up_what_is_being_written(data, tmp_path, monkeypatch):
    """Nothing is left of it, and nothing is waited for."""
    begun = threading.Event()

    def endless(path, arrays, abandoned):
        begun.set()
        deadline = time.monotonic() + 60
        while not abandoned() and time.monotonic() < deadline:
            time.sleep(0.001)
        raise Abandoned

    def interrupted(trainer):
        if trainer.progress.step == 5:
            assert begun.wait(60)
            raise KeyboardInterrupt
        step(trainer)

    step = Trainer._step
    monkeypatch.setattr(checkpoint, "write_arrays", endless)
    monkeypatch.setattr(Trainer, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path, "train.checkpoint_every=5", "train.evaluate_every=20")
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint"]


def crc32c(content):
    """Bit by bit, as the polynomial says (RFC 3720, appendix B.4)."""
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    crc = 0xFFFFFFFF
    for byte in content:
        crc = crc >> 8 ^ table[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF


def test_checkpoints_with_sha256_are_still_read(data, tmp_path):
    run(data, tmp_path)
    path = find_checkpoint(tmp_path / "run")
    names = json.loads((path / "DONE").read_text())
    digests = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in names}
    (path / "DONE").write_text(json.dumps(digests))
    assert open_checkpoint(path).state["step"] == 20
    damage(path)
    with pytest.raises(UserError, match="wrong checksum"):
        open_checkpoint(path)


def test_the_file_is_what_safetensors_reads(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.standard_normal((3, 100_001)).astype(np.float32), "b.c": np.float32(2.5).reshape(()),
        "empty": np.zeros((0, 4), np.float32), "wide": rng.standard_normal(5),
    }  # fmt: skip
    written = write_arrays(tmp_path / "x.safetensors", arrays)
    content = (tmp_path / "x.safetensors").read_bytes()
    assert written == checksum(tmp_path / "x.safetensors") == f"crc32c:{crc32c(content):08x}:{len(content)}"
    got = load_file(tmp_path / "x.safetensors")
    assert set(got) == set(arrays)
    for name, array in arrays.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_array_equal(got[name], array)
    targets = {name: np.full(array.shape, 9.0, array.dtype) for name, array in arrays.items()}
    targets["wide"] = np.full(5, 9.0, np.float32)
    read_arrays(tmp_path / "x.safetensors", targets)
    for name, array in arrays.items():
        np.testing.assert_array_equal(targets[name], array.astype(targets[name].dtype))
    for change, message in (
        ({"more": targets["a"]}, "'more' is only in the model"),
        ({"a": targets["wide"]}, "a has shape"),
    ):
        with pytest.raises(UserError, match=message):
            read_arrays(tmp_path / "x.safetensors", {**targets, **change})
    for damaged in (content[:-1], content[:50], content[:4], b"\xff" * 64, content[:8] + b"[" + content[9:]):
        (tmp_path / "z.safetensors").write_bytes(damaged)
        with pytest.raises(UserError, match="cannot be read"):
            read_arrays(tmp_path / "z.safetensors", targets)
    with pytest.raises(ValueError, match="C-contiguous"):
        write_arrays(tmp_path / "y.safetensors", {"a": arrays["a"].T})
