"""`ttr-gpu predict`: histories in every form, what is answered, and what is refused in one line."""

import json
import re
from datetime import datetime

import pytest
from command_line import TINY

from ttr_cli.main import main

RECORD = {"id": "anna", "times": [1000.0, 1002.5, 1007.0], "types": ["b", "a", "b"]}
HORIZON = ("--horizon", "30s")


@pytest.fixture(scope="session")
def event_run(tmp_path_factory):
    """A finished run of three steps on events of three types, named a, b, c."""
    folder = tmp_path_factory.mktemp("predict")
    rows = "".join(f"{i // 20},{1000 + 3 * (i % 20) + i % 3},{'abc'[i % 3]}\n" for i in range(600))
    (folder / "log.csv").write_text("sequence,time,type\n" + rows)
    main(["preprocess", str(folder / "log.csv"), "-o", str(folder / "data.zarr")])
    main(["train", str(folder / "data.zarr"), *TINY, "--set", "train.steps=3", "--out", str(folder), "--name", "run"])
    return folder / "run"


@pytest.fixture
def predict(ttr, event_run, tmp_path):
    """Write a history and predict from it."""

    def run(content, *options, name="history.jsonl"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content) + "\n")
        return ttr("predict", event_run, path, *options)

    return run


def test_a_prediction_is_a_line_of_json(predict):
    (line,) = predict(RECORD, *HORIZON, "--samples", "7", "--seed", "3").ok().splitlines()
    answer = json.loads(line)
    assert answer["id"] == "anna"
    assert (answer["events"], answer["last_time"], answer["now"], answer["end"]) == (3, 1007.0, 1007.0, 1037.0)
    assert set(answer["next"]["types"]) == {"a", "b", "c"}
    assert list(answer["next"]["time"]) == ["0.05", "0.25", "0.5", "0.75", "0.95"]
    assert len(answer["futures"]) == 7
    for future in answer["futures"]:
        assert len(future["times"]) == len(future["types"])
        assert all(1007.0 <= time <= 1037.0 for time in future["times"])
    again = predict(RECORD, "--horizon", "0.5min", "--samples", "7", "--seed", "3").ok()
    assert again.splitlines() == [line]
    assert predict(RECORD, *HORIZON, "--samples", "7", "--seed", "4").ok().splitlines() != [line]


def test_histories_come_in_the_forms_of_preprocess(predict, ttr, event_run):
    from_json = json.loads(predict(RECORD, *HORIZON, "--samples", "2").ok())
    rows = "user,time,type\nanna,1000,b\nben,5,c\nanna,1002.5,a\nanna,1007,b\nben,6,c\n"
    lines = predict(rows, *HORIZON, "--samples", "2", name="log.csv").ok().splitlines()
    first, second = map(json.loads, lines)
    assert first == from_json
    assert (second["id"], second["events"]) == ("ben", 2)
    dates = "time,kind\n1970-01-01 00:16:40,b\n1970-01-01 00:16:42.5,a\n1970-01-01 00:16:47,b\n"
    options = ("--assume-utc", "--type-column", "kind")
    dated = json.loads(predict(dates, *HORIZON, "--samples", "2", *options, name="dates.csv").ok())
    assert {**dated, "id": "anna"} == from_json
    piped = ttr("predict", event_run, "-", *HORIZON, "--samples", "2", stdin=json.dumps(RECORD).encode()).ok()
    assert json.loads(piped) == from_json


def test_dates_are_told_where_times_are_dates(predict, ttr, run, tmp_path):
    history = {"times": ["2024-01-01T00:00:00Z", "2024-01-01T00:00:02.500Z"], "types": ["type-0", "type-1"]}
    (tmp_path / "dated.jsonl").write_text(json.dumps(history) + "\n")
    answer = json.loads(ttr("predict", run, tmp_path / "dated.jsonl", *HORIZON, "--samples", "2", "--now",
                            "2024-01-01T00:00:04Z").ok())  # fmt: skip
    dates = answer["dates"]
    assert dates["last_time"] == "2024-01-01T00:00:02.500Z"
    assert (dates["now"], dates["end"]) == ("2024-01-01T00:00:04.000Z", "2024-01-01T00:00:34.000Z")
    assert (answer["last_time"], answer["now"]) == (1704067202.5, 1704067204.0)
    for share, time in answer["next"]["time"].items():
        told = datetime.fromisoformat(dates["next"][share]).timestamp()
        assert told <= time < told + 0.001 + 1e-6


def test_times_that_begin_near_zero_are_no_dates(predict, ttr, event_run):
    assert "dates" not in json.loads(predict(RECORD, *HORIZON, "--samples", "2").ok())
    options = ("--prompt", "a", "--at", "123456.25", "--advance", "median", "--max-tokens", "1")
    assert re.fullmatch(r"1234\d\d(\.\d+)?  [abc]\n", ttr("generate", event_run, *options).ok())


def test_files_are_written_whole(predict, tmp_path):
    out, picture = tmp_path / "new" / "out.jsonl", tmp_path / "fan.png"
    said = predict(RECORD, *HORIZON, "--samples", "5", "-o", out, "--plot", picture).ok()
    assert said == f"written: {out} (1 history), {picture}\n"
    assert len(out.read_text().splitlines()) == 1
    assert picture.read_bytes()[:4] == b"\x89PNG"
    two = json.dumps(RECORD) + "\n" + json.dumps({**RECORD, "id": "ben", "times": [1, 2, 9999]}) + "\n"
    failed = tmp_path / "failed.jsonl"
    predict(two, *HORIZON, "--now", "1010", "-o", failed).error("history ben: --now: got 1010.0", "last event, 9999.0")
    assert not list(tmp_path.glob("*failed*"))


def test_now_and_max_events(predict):
    later = json.loads(predict(RECORD, *HORIZON, "--samples", "9", "--now", "1970-01-01T00:16:50Z").ok())
    assert (later["now"], later["end"]) == (1010.0, 1040.0)
    assert 0 < later["survival"] < 1
    assert all(time >= 1010.0 for future in later["futures"] for time in future["times"])
    cut = json.loads(predict(RECORD, "--horizon", "1000h", "--samples", "3", "--max-events", "4").ok())
    assert [len(future["times"]) for future in cut["futures"]] == [4] * 3
    assert all(future["cut"] for future in cut["futures"])


def test_a_history_longer_than_training_has_shown_is_noted_once(predict):
    long = {"times": list(range(20)), "types": ["a"] * 20}
    said = predict(f"{json.dumps(long)}\n{json.dumps({**long, 'id': 'x'})}\n", *HORIZON, "--samples", "1")
    assert (said.code, len(said.out.splitlines())) == (0, 2)
    (line,) = said.err.splitlines()
    assert "history.jsonl: events: got 20, but this model, which has no window, was trained on 16 at a time: " in line
    assert "only a history's last 16 are read; to use more, train with" in line
    shorter = {"times": list(range(16)), "types": ["a"] * 16}
    predict(shorter, *HORIZON, "--samples", "1").ok()


@pytest.mark.parametrize(
    ("content", "options", "fragments"),
    [
        (RECORD, (), ["--horizon"]),
        (RECORD, ("--horizon", "soon"), ["--horizon: got 'soon'", "such as 7d"]),
        (RECORD, ("--horizon", "-3s"), ["--horizon: got '-3s'"]),
        (RECORD, ("--horizon", "3 fortnights"), ["--horizon: got '3 fortnights'", "days (d)"]),
        (RECORD, (*HORIZON, "--quantiles", "0.5,2"), ["--quantiles: got '0.5,2'"]),
        (RECORD, (*HORIZON, "--samples", "0"), ["--samples"]),
        (RECORD, (*HORIZON, "--now", "999"), ["history anna: --now: got 999.0", "not before that of the last event"]),
        (RECORD, (*HORIZON, "--now", "later"), ["--now:", "ISO 8601"]),
        ({**RECORD, "types": ["b", "a", "x"]}, HORIZON, ["history.jsonl:1: no event type 'x'"]),
        ({"times": [1, 2]}, HORIZON, ["history.jsonl:1: no event type 'event'", "with --type-column (and --type-bins"]),
        (RECORD, (*HORIZON, "--type-bins", "5,3"), ["--type-bins: got 5,3, expected ascending"]),
        ({**RECORD, "types": ["b"]}, HORIZON, ["history.jsonl:1: types: got 1 for 3 times"]),
        ({**RECORD, "times": [3, 2, 1]}, HORIZON, ["history.jsonl:1: time 2.0 is before 3.0"]),
        ({**RECORD, "times": [1, 2, "x"]}, HORIZON, ["history.jsonl:1: time: got 'x'"]),
        ({"times": [], "types": []}, HORIZON, ["history.jsonl:1: got an empty sequence"]),
        ('{"times": [1, 2]', HORIZON, ["history.jsonl", "malformed JSON"]),
        ("", HORIZON, ["history.jsonl: the file is empty"]),
    ],
)
def test_what_is_refused(predict, content, options, fragments):
    result = predict(content, *options)
    result.error(*fragments)
    assert "--on-error" not in str(result)


def test_a_model_of_text_is_refused(ttr, texts, tmp_path):
    main(["train", str(texts), *TINY, "--set", "train.steps=2", "--out", str(tmp_path), "--name", "run"])
    (tmp_path / "history.jsonl").write_text(json.dumps(RECORD))
    ttr("predict", tmp_path / "run", tmp_path / "history.jsonl", *HORIZON).error("was trained on text")


def test_a_history_that_is_not_there(ttr, event_run):
    ttr("predict", event_run, "nowhere.jsonl", *HORIZON).error("nowhere.jsonl: no such file")
