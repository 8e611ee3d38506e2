"""plot and checkpoint: what is made of runs that are there."""

import json
import shutil

import numpy as np
import pytest
from command_line import TINY
from safetensors import safe_open
from safetensors.numpy import load_file

from ttr_gpu.train.checkpoint import list_checkpoints


def test_plot(ttr, run, tmp_path):
    ttr("plot", run, "-o", tmp_path / "one").ok("training.png", "decay.png", "periods.png")
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"training.png", "decay.png", "periods.png"}
    shutil.copytree(run, tmp_path / "other")
    ttr("plot", run, tmp_path / "other", "-o", tmp_path / "two").ok("decay-other.png")
    assert {path.name for path in (tmp_path / "two").iterdir()} == {
        "training.png", "decay-run.png", "decay-other.png", "periods-run.png", "periods-other.png",
    }  # fmt: skip
    ttr("plot", tmp_path / "other").ok(str(tmp_path / "other" / "plots" / "training.png"))
    ttr("plot", tmp_path / "nothing").error("nothing: no such folder")
    ttr("plot", list_checkpoints(run)[0]).error("has no metrics.jsonl, expected the folder of a run")


def test_checkpoint_show(ttr, run, tmp_path):
    out = ttr("checkpoint", "show", run).ok(
        "every checksum right", "step 3", "optimizer.safetensors", "the best so far"
    )
    assert sum(" MiB  whole" in line for line in out.splitlines()) == len(list_checkpoints(run))
    newest = list_checkpoints(run)[-1]
    out = ttr("checkpoint", "show", newest, "--parameters").ok("blocks.0.attention.qkv.weight", "48 x 16")
    assert "whole" not in out
    broken = tmp_path / "run"
    shutil.copytree(run, broken)
    first = list_checkpoints(broken)[0] / "model.safetensors"
    first.write_bytes(first.read_bytes()[:-4])
    ttr("checkpoint", "show", broken).ok("damaged: ", "is missing or damaged", "every checksum right")


def test_checkpoint_average(ttr, run, events, tmp_path):
    paths = list_checkpoints(run)
    assert len(paths) >= 2
    out = tmp_path / "averaged"
    ttr("checkpoint", "average", run, "-o", out).ok(*(f"averaged    {path}" for path in paths), f"written     {out}")
    expected = [load_file(path / "model.safetensors") for path in paths]
    for name, array in load_file(out / "model.safetensors").items():
        np.testing.assert_allclose(array, np.mean([arrays[name] for arrays in expected], axis=0), rtol=1e-6, atol=1e-9)
    ttr("eval", out, events).ok("nats per event")
    ttr("checkpoint", "show", out).ok("average of  ")
    ttr("train", events, "--resume", out).error("holds weights alone, from which a run cannot be resumed")
    ttr("checkpoint", "average", run, "-o", out).error("exists already")
    ttr("checkpoint", "average", paths[0], "-o", tmp_path / "new").error("got 1 checkpoint, expected at least two")
    wider = ("--set", "model.hidden_dim=48", "--set", "train.steps=1", "--out", tmp_path, "--name", "wide")
    ttr("train", events, *TINY, *wider).ok()
    ttr("checkpoint", "average", run, tmp_path / "wide", "-o", tmp_path / "new").error(
        "model.hidden_dim is 48, expected 32", "only checkpoints of one model"
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_checkpoint_export(ttr, run, tmp_path, dtype):
    out = tmp_path / "weights.safetensors"
    ttr("checkpoint", "export", run, "-o", out, "--dtype", dtype, "--last").ok(f"written     {out}", dtype)
    newest = list_checkpoints(run)[-1]
    weights = load_file(newest / "model.safetensors")
    with safe_open(out, "np") as file:
        metadata = file.metadata()
    assert metadata["format"] == "ttr-gpu-weights"
    assert json.loads(metadata["model"])["embed_dim"] == 16
    assert metadata["step"] == "3"
    exported = load_file(out)
    assert set(exported) == set(weights)
    for name, array in exported.items():
        assert str(array.dtype) == dtype
        np.testing.assert_allclose(array.astype(np.float32), weights[name], rtol=1e-2, atol=1e-6)
    ttr("checkpoint", "export", run, "-o", out).error("exists already")
    ttr("checkpoint", "export", run, "-o", tmp_path / "no" / "w.safetensors").error("not written", "No such file")
