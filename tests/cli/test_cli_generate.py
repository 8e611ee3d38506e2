"""`ttr-gpu generate`: texts and events, several samples, JSON, and what is refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
from command_line import TINY, finish, start

from ttr_cli.main import main

AT = ("--at", "2024-05-01T12:00Z")


@pytest.fixture(scope="session")
def text_run(tmp_path_factory):
    """A finished run of three steps on texts with timestamps, and its data set."""
    folder = tmp_path_factory.mktemp("text-run")
    lines = [json.dumps({"text": f"note {i} for {i % 5}", "timestamp": 1.7e9 + 60 * i}) for i in range(60)]
    (folder / "notes.jsonl").write_text("\n".join(lines) + "\n")
    main(["preprocess", str(folder / "notes.jsonl"), "-o", str(folder / "data.zarr"), "--tokenizer", "bytes"])
    main(["train", str(folder / "data.zarr"), *TINY, "--set", "train.steps=3", "--out", str(folder), "--name", "run"])
    return folder / "run", folder / "data.zarr"


@pytest.fixture(scope="session")
def positional_run(texts, tmp_path_factory):
    """A finished run on texts without timestamps."""
    out = tmp_path_factory.mktemp("positional")
    main(["train", str(texts), *TINY, "--set", "train.steps=2", "--out", str(out), "--name", "run"])
    return out / "run"


def test_text_is_printed_as_json_and_as_it_is(ttr, text_run):
    run, _ = text_run
    options = ("--prompt", "note ", *AT, "--max-tokens", "20", "--seed", "3")
    plain = ttr("generate", run, *options).ok()
    (line,) = ttr("generate", run, *options, "--json").ok().splitlines()
    described = json.loads(line)
    assert described["sample"] == 0
    assert described["tokens"] <= 20
    assert described["finish"] in ("end", "length")
    assert plain == described["text"] + ("" if described["text"].endswith("\n") else "\n")
    assert plain != ttr("generate", run, *options[:-1], "4").ok()


def test_a_prompt_longer_than_training_has_shown_is_noted_once(ttr, text_run):
    said = ttr("generate", text_run[0], "--prompt", 16 * "n", *AT, "--max-tokens", "2", "--samples", "2")
    assert said.code == 0
    (line,) = said.err.splitlines()
    assert line.startswith(
        "note: tokens of --prompt: got 17, but this model, which has no window, was trained on 16 at a time: "
    )
    assert "shorten the prompt; to use more, train with a larger train.max_length or with" in line
    ttr("generate", text_run[0], "--prompt", 15 * "n", *AT, "--max-tokens", "2").ok()


def test_samples_are_printed_one_after_the_other(ttr, text_run):
    run, _ = text_run
    options = ("--prompt", "n", *AT, "--max-tokens", "9", "--samples", "3")
    out = ttr("generate", run, *options).ok()
    heads = [line for line in out.splitlines() if line.startswith("--- sample")]
    assert heads == ["--- sample 1 of 3", "--- sample 2 of 3", "--- sample 3 of 3"]
    described = [json.loads(line) for line in ttr("generate", run, *options, "--json").ok().splitlines()]
    for one in described:
        assert one["text"] in out
    assert sorted(one["sample"] for one in described) == [0, 1, 2]


def test_time_and_options_change_what_is_drawn(ttr, text_run):
    run, _ = text_run
    base = ("--prompt", "note", "--max-tokens", "60", "--seed", "1")
    results = [
        ttr("generate", run, *base, *more).ok()
        for more in (
            AT, (*AT, "--gap", "1e7"), (*AT, "--temperature", "3"),
            (*AT, "--top-k", "2"), (*AT, "--top-p", "0.2"), (*AT, "--min-p", "0.9"),
            (*AT, "--repetition-penalty", "5", "--temperature", "0.3"),
        )
    ]  # fmt: skip
    assert len(set(results)) == len(results)
    greedy = [ttr("generate", run, *base[:-1], seed, *AT, "--temperature", "0").ok() for seed in ("1", "2")]
    assert greedy[0] == greedy[1]


def test_events_are_types_in_and_types_out(ttr, run):
    out = ttr("generate", run, "--prompt", "type-0, type-1", *AT, "--gap", "2", "--max-tokens", "7").ok()
    assert len(out.splitlines()) == 7
    assert set(out.splitlines()) <= {f"type-{i}" for i in range(5)}
    assert ttr("generate", run, "--prompt", '["type-0", "type-1"]', *AT, "--gap", "2", "--max-tokens", "7").ok() == out


def test_the_model_says_when_each_event_comes(ttr, run, text_run):
    options = ("--prompt", "type-0, type-1", *AT, "--advance", "sample", "--max-tokens", "5", "--seed", "2")
    lines = ttr("generate", run, *options).ok().splitlines()
    assert len(lines) == 5
    assert all(re.fullmatch(r"2024-05-01 1\d:\d\d:\d\d\.\d{3}  type-\d", line) for line in lines), lines
    (described,) = map(json.loads, ttr("generate", run, *options, "--json").ok().splitlines())
    assert len(described["times"]) == 5
    assert sorted(described["times"]) == described["times"]
    assert described["times"][0] > 1714564800.0
    ttr("generate", text_run[0], *AT, "--advance", "median").error("--advance: got median", "does not say when")
    ttr("generate", run, *AT, "--advance", "mean").error("--advance")


def test_positions_need_no_time(ttr, positional_run):
    ttr("generate", positional_run, "--prompt", "line ", "--max-tokens", "5").ok()
    ttr("generate", positional_run, *AT).error("--at: got '2024-05-01T12:00Z'", "positions", "leave --at out")
    ttr("generate", positional_run, "--gap", "1").error("--gap: got 1", "positions")


def test_it_streams(run):
    # Events have no end of their own: it would go on for minutes.
    process = start("generate", run, "--prompt", "type-0", *AT, "--max-tokens", "100000")
    assert process.stdout.readline().startswith("type-")
    assert process.poll() is None
    process.terminate()
    assert finish(process).code == 143


def test_what_is_missing_or_wrong_is_said(ttr, run, text_run, tmp_path):
    ttr("generate", run, "--prompt", "type-0").error("--at: not given", "--at 2024-05-01T12:00Z")
    ttr("generate", run, "--prompt", "type-0", "--at", "soon").error(
        "--at: got 'soon'; expected a number or an ISO 8601 date"
    )
    ttr("generate", run, "--prompt", "type-0", "--at", "2024-05-01T12:00").error("--at: got", "without a zone")
    ttr("generate", run, "--prompt", "typ-0", *AT).error("no event type 'typ-0'; did you mean 'type-0'?")
    ttr("generate", run, *AT).error("prompt: got no event", "such as 'type-0'")
    ttr("generate", tmp_path / "absent", *AT).error("no such folder")
    ttr("generate", run, *AT, "--top-p", "0").error("--top-p")
    ttr("generate", run, *AT, "--data", text_run[1]).error("got kind text, expected events")


def test_a_data_set_that_has_moved_can_be_given(ttr, text_run, tmp_path):
    moved = Path(shutil.copytree(text_run[0], tmp_path / "run"))
    for path in moved.glob("checkpoints/step-*"):
        described = json.loads((path / "config.json").read_text())
        described["data"]["path"] = str(tmp_path / "gone.zarr")
        (path / "config.json").write_text(json.dumps(described))
        from ttr_gpu.data.shards import sha256

        sums = json.loads((path / "DONE").read_text())
        (path / "DONE").write_text(json.dumps({**sums, "config.json": sha256(path / "config.json")}))
    ttr("generate", moved, *AT).error(
        "holds no vocabulary", "gone.zarr: is not there, seen from ", "--data .../gone.zarr"
    )
    assert ttr("generate", moved, *AT, "--data", text_run[1], "--max-tokens", "4").ok()
