"""What breaks is named and ends the run, or is gone around, and never waited for: data, reader, disk, metrics."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from small_runs import SMALL, resume, run, weights

from ttr_gpu.data.batches import TrainingBatches
from ttr_gpu.data.dataset import Split
from ttr_gpu.errors import UserError
from ttr_gpu.train import metrics
from ttr_gpu.train.checkpoint import find_checkpoint, list_checkpoints, open_checkpoint
from ttr_gpu.train.checkpoint_writer import CheckpointWriter
from ttr_gpu.train.tensorboard import TensorBoardFile


@pytest.fixture(autouse=True)
def never_a_hang():
    """A wait without an end fails the test."""

    def expired(number, frame):
        raise AssertionError("still waiting after ten minutes")

    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(600)  # kernels may have to be compiled
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def copy(data, tmp_path):
    return Path(shutil.copytree(data, tmp_path / "data.zarr"))


def shard(data, array):
    return max((data / "train" / array / "c").iterdir(), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("array", ["tokens", "times"])
def test_a_bit_flipped_in_a_shard_is_named(copy, tmp_path, array):
    file = shard(copy, array)
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 4
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        run(copy, tmp_path / "runs")
    assert f"data.zarr/train/{array}: a shard cannot be read" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_lost_shard_is_named(copy, tmp_path):
    file = shard(copy, "tokens")
    file.unlink()
    with pytest.raises(UserError, match=r"train/tokens"):
        run(copy, tmp_path / "runs")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "config.json", "DONE"])
def test_a_truncated_checkpoint_is_named_and_auto_takes_the_one_before(data, tmp_path, name):
    run(data, tmp_path / "whole", "train.checkpoint_every=5")
    run(data, tmp_path / "runs", "train.checkpoint_every=5", "train.keep_last=9")
    folder = tmp_path / "runs" / "run"
    file = find_checkpoint(folder) / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match="use another checkpoint"):
        resume(data, folder)
    _, said = resume(data, "auto", out=tmp_path / "runs")
    assert any("skipped a damaged checkpoint" in line and str(file.parent) in line for line in said)
    np.testing.assert_array_equal(weights(folder), weights(tmp_path / "whole" / "run"))


def test_a_reader_that_raises_ends_the_run_with_its_error(data, tmp_path, monkeypatch):
    read, reads = Split.read, []

    def broken(split, begin, end):
        if split.name == "train" and threading.current_thread().name == "batches":
            reads.append(begin)
            raise UserError("data.zarr/train/tokens: the disk has gone")
        return read(split, begin, end)

    monkeypatch.setattr(Split, "read", broken)
    with pytest.raises(UserError, match="the disk has gone"):
        run(data, tmp_path)
    assert reads
    assert not [thread for thread in threading.enumerate() if thread.name == "batches"]


def test_a_reader_that_dies_without_a_word_is_noticed(data, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingBatches, "_work", lambda batches: None)
    with pytest.raises(RuntimeError, match="the reader of batches has stopped"):
        run(data, tmp_path)


def full(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("broken", ["metrics.jsonl", "log.txt", "tensorboard"])
def test_metrics_that_cannot_be_written_end_the_run_and_it_can_be_resumed(data, tmp_path, monkeypatch, broken):
    options = ("train.checkpoint_every=5", "train.evaluate_every=5")
    run(data, tmp_path / "whole", *options)
    record, line = metrics.RunLog.record, metrics.RunLog.line

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, text):
            # As a disk that takes a part of it.
            self.file.write(text[: len(text) // 2])
            self.file.flush()
            full()

        def close(self):
            full()

        flush = close

    def recorded(log, kind, *, step, **values):
        if step == 13 and broken == "metrics.jsonl":
            log._metrics = Full(log._metrics)
        if step == 13 and broken == "tensorboard":
            monkeypatch.setattr(TensorBoardFile, "scalars", full)
        record(log, kind, step=step, **values)

    def said(log, text):
        if text.startswith("step 13/") and broken == "log.txt":
            log._log = Full(log._log)
        line(log, text)

    monkeypatch.setattr(metrics.RunLog, "record", recorded)
    monkeypatch.setattr(metrics.RunLog, "line", said)
    with pytest.raises(UserError, match=r"metrics cannot be written: No space left on device .* --resume"):
        run(data, tmp_path / "full", *options)
    monkeypatch.undo()
    folder = tmp_path / "full" / "run"
    assert open_checkpoint(find_checkpoint(folder)).state["step"] == 10
    resume(data, folder)
    np.testing.assert_array_equal(weights(folder), weights(tmp_path / "whole" / "run"))
    found = [[record["step"] for record in metrics.read_metrics(path)] for path in (folder, tmp_path / "whole" / "run")]
    assert found[0] == found[1]


def test_a_writer_that_fails_in_any_way_stops_the_loop(data, tmp_path, monkeypatch):
    """At the step after, not only at the next checkpoint, and not as if it had been saved."""

    def broken(*arguments):
        raise MemoryError("no memory for the header")

    monkeypatch.setattr("ttr_gpu.train.checkpoint.write_arrays", broken)
    with pytest.raises(MemoryError, match="no memory for the header"):
        run(data, tmp_path, "train.checkpoint_every=5", "train.evaluate_every=20", "train.steps=100000")
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_the_last_checkpoint_is_waited_for(data, tmp_path, monkeypatch):
    """A disk that is full at the end: the run has not succeeded."""
    wait, waits = CheckpointWriter.wait, []
    monkeypatch.setattr(CheckpointWriter, "wait", lambda writer: (waits.append(writer.copied_step), wait(writer)))
    monkeypatch.setattr("ttr_gpu.train.checkpoint.write_arrays", full)
    with pytest.raises(UserError, match="step-00000020: checkpoint not saved"):
        run(data, tmp_path, "train.checkpoint_every=20", "train.evaluate_every=20")
    assert waits[-1] == 20


def command(data, out, *options):
    settings = [word for assignment in SMALL for word in ("--set", assignment)]
    return [
        sys.executable, "-m", "ttr_cli.main", "train", str(data), "--preset", "nano", *settings, "--out", str(out),
        "--name", "run", *options,
    ]  # fmt: skip


@pytest.mark.parametrize("size", ["60k", "300k"])
def test_a_real_disk_that_fills_up(data, tmp_path, size):
    """A small file system: the run ends with one line, what it has saved is whole, and it goes on elsewhere."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], check=False)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        more = ("--set", "train.steps=400", "--set", "train.checkpoint_every=5", "--set", "train.keep_last=99")
        done = subprocess.run(command(data, disk, *more), capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 2, done.stderr
        (line,) = [line for line in done.stderr.splitlines() if not line.startswith("compiling kernels")]
        assert line.startswith("error: ")
        assert "No space left on device" in line
        saved = list_checkpoints(disk / "run")
        for path in saved:
            open_checkpoint(path)
        if saved:
            shutil.copytree(disk, tmp_path / "roomy")
            resume(data, tmp_path / "roomy" / "run", f"train.steps={open_checkpoint(saved[-1]).state['step'] + 2}")
        assert bool(saved) == (size == "300k")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_limit_on_the_size_of_files_ends_training_with_one_line(data, tmp_path):
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = subprocess.run(
        command(data, tmp_path), capture_output=True, text=True, timeout=120, check=False, preexec_fn=limited
    )
    assert done.returncode == 2, done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
