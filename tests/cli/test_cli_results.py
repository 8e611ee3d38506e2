"""What train, eval, inspect, info and bench print when all is well, and when training diverges."""

import json
import math
import re

import pytest
from command_line import TINY

from ttr_gpu.data.dataset import open_dataset
from ttr_gpu.train.config import config_keys


def test_train_prints_its_plan_steps_summary_and_places(ttr, events, tmp_path):
    steps = ("--set", "train.steps=4", "--set", "train.evaluate_every=2", "--threads", "1")
    out = ttr("train", events, *TINY, *steps, "--out", tmp_path, "--name", "r").ok(
        "run         ", "plot        ", "best        ", f"again       ttr-gpu eval {tmp_path / 'r'} {events}",
        "device     CPU", "; 1 threads", "n-gram of order 2",
    )  # fmt: skip
    lines = out.splitlines()
    plan = [line.split()[0] for line in lines[:6]]
    assert plan == ["data", "model", "training", "memory", "device", "time"]
    step = re.compile(
        r"step +\d+/4  loss +\d+\.\d{4} \(type \d\.\d{4}, time -?\d+\.\d{4}\)  lr \d\.\d\de-\d\d  "
        r"norm +\d+\.\d{3} +[\d,]+ tok/s +\d+ % peak  \d+\.\d\d GiB  wait +\d+ %  ETA \d+:\d\d"
    )
    assert sum(step.fullmatch(line) is not None for line in lines) == 4
    assert sum(line.startswith("---- step") for line in lines) == 2
    quiet = ttr("train", events, *TINY, *steps, "--out", tmp_path, "--name", "q", "--log-every", "100").ok()
    assert sum(line.startswith("step") for line in quiet.splitlines()) == 2, "the first and the last"


def test_plan_is_shown_and_nothing_trained(ttr, events, tmp_path):
    wanted = ("--precision", "bfloat16", "--memory-limit", "4GiB", "--out", tmp_path / "runs")
    out = ttr("train", events, *TINY, *wanted, "--plan").ok(
        "device     CPU", ", bfloat16 ", "extra compute", "s/step", "<- this run"
    )
    rows = [line.split()[0] for line in out.splitlines()[-4:]]
    assert (rows[0], rows[-1], set(rows[1:3])) == ("none", "block", {"attention", "feed_forward"}), "cheapest first"
    assert not (tmp_path / "runs").exists()


def test_train_reads_a_config_file(ttr, events, tmp_path):
    (tmp_path / "run.toml").write_text("[train]\nsteps = 2\nlr = 0.125\n")
    ttr("train", events, *TINY, "--config", tmp_path / "run.toml", "--out", tmp_path, "--name", "r").ok("lr 1.25e-01")


def test_divergence_ends_with_what_to_try(ttr, events, tmp_path):
    extreme = ("--set", "train.lr=1e30", "--set", "train.clip_norm=1e30", "--set", "train.steps=20")
    result = ttr("train", events, *TINY, *extreme, "--out", tmp_path)
    assert result.code == 1
    (line,) = [line for line in result.err.splitlines() if line]
    for fragment in ("error: step ", "it first appears in ", "train.lr (it is 1e+30)", "train.clip_norm", "inspect"):
        assert fragment in line


def test_eval(ttr, run, events, tmp_path):
    out = ttr("eval", run, events).ok("test ", "nats per event", "n-gram of order 0", "the best floor", "log-normal ")
    assert out.startswith(str(run))
    described = json.loads(ttr("eval", run, events, "--split", "validation", "--json").ok())
    assert described["split"] == "validation"
    assert 0 < described["cross_entropy"] < 3
    assert described["tokens"] == sum(
        open_dataset(events).attributes["splits"]["validation"][k] * s for k, s in (("tokens", 1), ("sequences", -1))
    )
    assert {floor["name"] for floor in described["floors"]} >= {"n-gram of order 0", "n-gram of order 2", "log-normal"}
    assert described["nll"] == pytest.approx(described["cross_entropy"] + described["time_nll"], rel=1e-9)
    assert described["protocol"] == "first event of a sequence not scored, no survival term"
    gaps, marginal = described["gaps"], next(floor["gaps"] for floor in described["floors"] if floor["gaps"])
    assert set(gaps) == set(marginal) >= {"nll", "dequantised_nll", "mae", "rmse", "coverage", "pit", "ks"}
    assert gaps["nll"] == described["time_nll"]
    assert gaps["dequantised_nll"] == pytest.approx(gaps["nll"], abs=0.05), "a grid of 1 ms is a fine one"
    assert described["top_k"]["1"] == described["accuracy"]
    longer = json.loads(ttr("eval", run, events, "--max-length", "19", "--stride", "1", "--json").ok())
    assert longer["split"] == "test"
    assert math.isfinite(longer["cross_entropy"])
    picture = tmp_path / "eval.png"
    ttr("eval", run, events, "--plot", picture).ok(
        "coverage    of 50/80/95 % intervals: ", "dequantised ", "median gap "
    )
    assert picture.read_bytes()[:4] == b"\x89PNG"
    # A checkpoint stands for its run.
    checkpoint = max(run.glob("checkpoints/step-*"))
    ttr("eval", checkpoint, events, "--last").ok(str(checkpoint))


def test_inspect_of_events(ttr, events):
    out = ttr("inspect", events, "--samples", "2").ok(
        "events, times in seconds, 2023-11-14 22:13:", "32 sequences", "640 tokens", "vocabulary of 5", "'type-0'",
        "gaps between neighbours of a sequence, in seconds (760):", "█",
    )  # fmt: skip
    assert out.count("\nsequence ") == 2
    # Events that follow each other within seconds are told apart.
    assert re.search(r"2023-11-14 22:13:\d\d\.\d{3}  'type-\d'", out)
    ttr("inspect", events, "--verify", "--samples", "0").ok("every file has its checksum")


def test_inspect_of_texts(ttr, texts):
    ttr("inspect", texts).ok(
        "text, times in positions, 0 to", "48 documents", "60 terminators appended", "'</s>'", "'<s>'"
    )


def test_inspect_as_json(ttr, events):
    described = json.loads(ttr("inspect", events, "--json", "--samples", "1").ok())
    assert described["summary"]["kind"] == "events"
    assert described["summary"]["splits"]["train"]["tokens"] == 640
    assert sum(count for _, _, count in described["gaps"]) + described["zero_gaps"] == 760
    assert sum(share for _, share in described["common"]) == pytest.approx(1)
    assert len(described["samples"][0]["positions"]) == 12


def test_info(ttr):
    out = ttr("info").ok()
    names = [line.split()[0] for line in out.splitlines()]
    for name in ("ttr-gpu", "numpy", "numba", "zarr", "tokenizers", "python", "processor", "threads", "blas", "float32",
                 "device"):  # fmt: skip
        assert name in names
    assert re.search(r"^threads +\d+ for kernels and matrix products", out, re.M)
    keys = ttr("info", "--keys").ok().splitlines()
    assert [line.split()[0] for line in keys] == config_keys()


def test_bench(ttr, tmp_path):
    arguments = ("bench", "kernels", "--only", "rope", "--only", "adamw", "--repeats", "2", "--threads", "1")
    result = ttr(*arguments, "--output", tmp_path / "timings.json")
    assert result.code == 0
    first, *lines, last = result.out.splitlines()
    assert "of limit" in first
    assert [line.split()[0] for line in lines] == ["rope"] * 4 + ["adamw"]
    assert last == f"written: {tmp_path / 'timings.json'}, {tmp_path / 'timings.png'}"
    described = json.loads((tmp_path / "timings.json").read_text())
    assert described["threads"] == 1
    assert [timing["part"] for timing in described["timings"]] == ["forward", "backward"] * 2 + ["update"]
    assert all(timing["seconds"] > 0 for timing in described["timings"])
    # 2048 rows of 16 heads of 32, read and written once: three operations an element.
    assert (described["timings"][0]["bytes"], described["timings"][0]["flops"]) == (2 * 4 * 2048 * 512, 3 * 2048 * 512)
    assert (tmp_path / "timings.png").read_bytes().startswith(b"\x89PNG")
    earlier = ttr(*arguments, "--compare", tmp_path / "timings.json").out.splitlines()
    assert earlier[0].endswith("over earlier")
    assert all(float(line.split()[-1]) > 0 for line in earlier[1:])
