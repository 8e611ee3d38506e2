"""Which sequences keep to a pace: those whose sums of gaps vary less than those of independent gaps."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from ttr_gpu.data import pace
from ttr_gpu.data.dataset import open_dataset
from ttr_gpu.data.options import PreprocessOptions
from ttr_gpu.data.preprocess import preprocess
from ttr_gpu.data.splits import SplitOptions
from ttr_gpu.train.run import RunOptions, new_config


def late(rng, events):
    """Events at every whole number, each with a delay of its own."""
    return np.sort(np.arange(events) + rng.uniform(0, 1.5, events))


def independent(rng, events):
    return np.cumsum(rng.lognormal(0.0, 1.0, events))


def bursts(rng, events):
    return np.cumsum(np.repeat(rng.lognormal(0.0, 1.0, events // 20 + 1), 20)[:events])


def split_of(sequences):
    offsets = np.concatenate([[0], np.cumsum([len(times) for times in sequences])])
    times = np.concatenate(sequences)

    def read(begin, end):
        return np.zeros(end - begin, np.int32), times[begin:end]

    return SimpleNamespace(offsets=offsets, token_count=len(times), read=read)


def sequences_of(process, count=20, events=200):
    rng = np.random.default_rng(0)
    return [process(rng, events) for _ in range(count)]


@pytest.mark.parametrize("unit", [1.0, 3600.0])
def test_only_sequences_that_make_up_for_delays_have_one(unit):
    found = pace.steady_pace(split_of([unit * times for times in sequences_of(late)]))
    assert found == pytest.approx(unit, rel=0.02)
    for process in (independent, bursts):
        assert pace.steady_pace(split_of(sequences_of(process))) is None


def test_too_few_events_do_not_tell():
    assert pace.steady_pace(split_of(sequences_of(late, 4, 200))) is None, "48 sums"
    assert pace.steady_pace(split_of(sequences_of(late, 500, 10))) is None, "no sequence of 16 gaps"
    assert pace.steady_pace(split_of([np.arange(5000.0)])) is None, "gaps that do not vary"


@pytest.mark.parametrize("sequences", [sequences_of(late, 1, 20_000), sequences_of(late, 100, 200)])
def test_large_data_are_judged_by_their_beginning(sequences, monkeypatch):
    split, ends = split_of(sequences), []
    read = split.read
    split.read = lambda begin, end: ends.append(end) or read(begin, end)
    monkeypatch.setattr(pace, "_TOKENS", 5000)
    assert pace.steady_pace(split) == pytest.approx(1.0, rel=0.02)
    assert ends == [5000]


@pytest.mark.parametrize(("process", "keeps"), [(late, True), (bursts, False)])
def test_a_run_without_a_preset_embeds_it_where_there_is_one(tmp_path, process, keeps):
    with (tmp_path / "train.jsonl").open("w") as file:
        for times in sequences_of(process):
            file.write(json.dumps({"times": times.tolist()}) + "\n")
    preprocess(
        PreprocessOptions([str(tmp_path / "train.jsonl")], tmp_path / "data.zarr", split=SplitOptions("0.8,0.1,0.1")),
        lambda line: None,
    )  # fmt: skip
    dataset = open_dataset(tmp_path / "data.zarr")
    chosen = new_config(RunOptions(tmp_path / "data.zarr"), dataset).model.time_pace
    assert (chosen > 0) == keeps
    assert new_config(RunOptions(tmp_path / "data.zarr", preset="pico"), dataset).model.time_pace == 0
