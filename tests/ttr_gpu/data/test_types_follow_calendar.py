"""Which types follow the calendar that all sequences share: those that its stretches predict in other sequences."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from ttr_gpu.data.calendar import types_follow_calendar
from ttr_gpu.data.dataset import open_dataset
from ttr_gpu.data.options import PreprocessOptions
from ttr_gpu.data.preprocess import preprocess
from ttr_gpu.train.run import RunOptions, new_config


def sequences_of(seed, count=60, events=50, begin=0.0, unit=1.0):
    """Times between begin and begin + 100, in units."""
    rng = np.random.default_rng(seed)
    return [np.sort(unit * (begin + 100 * rng.random(events))) for _ in range(count)]


def seasonal(rng, times):
    """Mostly type 0 in the first half of the time, mostly 1 in the second."""
    return (rng.random(len(times)) < np.where(times < np.median(times), 0.3, 0.7)).astype(np.int32)


def whatever(rng, times):
    return rng.integers(0, 2, len(times)).astype(np.int32)


def split_of(sequences, kinds):
    # Other types for other times.
    rng = np.random.default_rng(int(1e6 * sequences[0][0]))
    offsets = np.concatenate([[0], np.cumsum([len(times) for times in sequences])]).astype(np.int64)
    times = np.concatenate(sequences)
    tokens = kinds(rng, times)

    def read(begin, end):
        return tokens[begin:end], times[begin:end]

    return SimpleNamespace(offsets=offsets, token_count=len(times), read=read)


@pytest.mark.parametrize("unit", [1.0, 86_400.0])
def test_types_that_change_with_the_season_follow_it(unit):
    train, validation = (split_of(sequences_of(seed, unit=unit), seasonal) for seed in (0, 1))
    assert types_follow_calendar(train, validation, 2)


def test_types_that_do_not_change_follow_nothing():
    train, validation = (split_of(sequences_of(seed), whatever) for seed in (0, 1))
    assert not types_follow_calendar(train, validation, 2)


def test_chance_is_not_believed():
    """Of so few events stretches differ by much more than 0.01 nats, now and then on both sides alike."""
    believed = [
        types_follow_calendar(*(split_of(sequences_of(seed + k, 4, 20), whatever) for k in (0, 1)), 2)
        for seed in range(0, 100, 2)
    ]
    assert sum(believed) <= 3
    train, validation = (split_of(sequences_of(seed, 20, 20), seasonal) for seed in (0, 1))
    assert types_follow_calendar(train, validation, 2), "enough of them do tell"


def test_a_calendar_that_will_not_come_again_is_of_no_use():
    train = split_of(sequences_of(0), seasonal)
    assert not types_follow_calendar(train, split_of(sequences_of(1, begin=100.0), seasonal), 2)


def test_types_of_events_that_follow_none_do_not_count():
    train = split_of(sequences_of(0), seasonal)
    assert not types_follow_calendar(train, split_of(sequences_of(1, events=1), seasonal), 2)


@pytest.mark.parametrize(("kinds", "features"), [(seasonal, "both"), (whatever, "gap")])
def test_a_run_without_a_preset_embeds_absolute_time_where_they_do(tmp_path, kinds, features):
    rng = np.random.default_rng(2)
    for part in ("train", "validation"):
        with (tmp_path / f"{part}.jsonl").open("w") as file:
            for times in sequences_of(len(part)):
                # Each sequence has the same median, about.
                types = [f"type-{kind}" for kind in kinds(rng, times)]
                file.write(json.dumps({"times": times.tolist(), "types": types}) + "\n")
    preprocess(
        PreprocessOptions(
            [str(tmp_path / "train.jsonl")], tmp_path / "data.zarr", validation=[str(tmp_path / "validation.jsonl")]
        ),
        lambda line: None,
    )  # fmt: skip
    dataset = open_dataset(tmp_path / "data.zarr")
    assert new_config(RunOptions(tmp_path / "data.zarr"), dataset).model.time_features == features
    asked = RunOptions(tmp_path / "data.zarr", assignments=("model.time_features=absolute",))
    assert new_config(asked, dataset).model.time_features == "absolute"
