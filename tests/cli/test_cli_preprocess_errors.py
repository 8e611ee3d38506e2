"""`ttr-gpu preprocess`: what cannot be done is refused with its place, what was got, and what to do."""

import json
from itertools import count

import pytest
from raw_files import ROWS, WHOLE, csv_of, packed, sequences

# --- options that do not fit


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--time-column", "tmie"], ["--time-column: no column 'tmie'", "did you mean 'time'?"]),
        (["--time-column", "9"], ["columns are numbered from 1 to 3"]),
        (["--time-unit", "fortnights"], ["--time-unit: got 'fortnights'", "seconds", "a number of seconds"]),
        (["--type-bins", "3,x"], ["--type-bins: got '3,x', expected numbers"]),
        (["--type-bins", "5,3"], ["--type-bins: got 5,3, expected ascending"]),
        (["--type-bins", "3,nan"], ["--type-bins: got 3,nan, expected ascending"]),
        (["--type-bins", "3,5"], ["log.csv:2: type: got 'x'; expected a number", "--type-bins"]),
        (["--segment", "20"], ["--segment: is for text", "log.csv is read as events"]),
        (["--timestamp-prefix"], ["--timestamp-prefix: is for text"]),
        (["--tokenizer", "bytes"], ["--tokenizer: is for text"]),
        (["--one-sequence"], ["--one-sequence: is for text"]),
        (["--kind", "text"], ["found no column named text", "with --text-column"]),
        (["--kind", "text", "--text-column", "type", "--type-bins", "1"], ["--type-bins: is for events"]),
        (["--kind", "log"], ["'log' is not one of 'events', 'text'"]),
    ],
)  # fmt: skip
def test_options_that_do_not_fit(preprocess, tmp_path, options, fragments):
    preprocess("log.csv", csv_of(ROWS), *options).error(*fragments)
    assert [p.name for p in tmp_path.iterdir()] == ["log.csv"]


def test_columns_of_a_file_without_header(preprocess):
    preprocess("log.csv", csv_of(ROWS, None)).error("its columns have no names", "--time-column NUMBER", "--header")
    preprocess("log.csv", csv_of(ROWS, None), "--time-column", "4").error("no column 4; it has 3")
    preprocess("log.csv", "1,2\n3,4\n", "--time-column", "t").error("no column 't'", "give a number from 1")
    preprocess("log.csv", csv_of(ROWS, "who,when,what")).error("found no column", "who, when, what", "--time-column")
    preprocess("log.csv", csv_of(ROWS, "who,Tiem,what")).error("with --time-column, such as --time-column Tiem")
    preprocess("log.csv", "sequence,time\na,1\n", "--type-bins", "1").error("no type column", "--type-column")


# --- bad rows: `file:line: what; expected what`


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("log.csv", "sequence,time\na,2\na,1\n", "log.csv:3: time 1.0 is before 2.0"),
        ("log.csv", "sequence,time\na,1\na,nan\n", "log.csv:3: time: got 'nan'; expected a finite number"),
        ("log.csv", "sequence,time\na,1\na,-inf\n", "log.csv:3: time: got '-inf'; expected a finite number"),
        ("log.csv", "sequence,time\na,1\na,\n", "log.csv:3: time: got ''; expected a number or an ISO 8601 date"),
        ("log.csv", "sequence,time\na,1\nb\n", "log.csv:3: got 1 fields; expected 2 (sequence,time)"),
        ("log.csv", 'sequence,time\n"a\nb",1\nc,x\n', "log.csv:4: time: got 'x'"),
        ("log.csv", b"sequence,time\na,1\n\xe9,2\n", "log.csv:3: invalid UTF-8 at byte 1; expected UTF-8"),
        ("log.csv", "sequence,time\ra,1\r", "log.csv:1: malformed CSV: a carriage return within a line; expected"),
        ("log.csv", "sequence,time,time\na,1,2\n", "log.csv:1: column 'time' appears twice; expected distinct names"),
        ("log.jsonl", '{"times": [1], "types": ["a"]}\n{"times": [], "types": []}\n',
         "log.jsonl:2: got an empty sequence; expected at least one event"),
        ("log.jsonl", '{"times": [1], "types": ["a"]}\n{"times": [1, 2], "types": ["a"]}\n',
         "log.jsonl:2: types: got 1 for 2 times; expected as many"),
        ("log.jsonl", '{"times": [1], "types": ["a"]}\n{"times": "1", "types": ["a"]}\n',
         "log.jsonl:2: times: got '1'; expected a list of times"),
        ("log.jsonl", '{"times": [true], "types": ["a"]}\n', "log.jsonl:1: time: got True; expected a number"),
        ("log.jsonl", '{"times": [1], "types": [{}]}\n', "log.jsonl:1: types: got {}; expected the type of an event"),
        ("log.jsonl", '{"times": [1], "types": ["a"]}\n{"times": [1], "ty\n',
         "log.jsonl:2: malformed JSON: Unterminated string starting at (column 16); expected one record a line"),
        ("log.jsonl", '{"times": [1], "types": ["a"]}\n{"times": ' + "[" * 100_000 + "\n",
         "log.jsonl:2: malformed JSON: nested too deeply"),
        ("log.json", "[" * 100_000, "log.json: malformed JSON: nested too deeply"),
        ("log.json", "[1, 2]", "log.json:1: got 1; expected JSON strings or records"),
        ("log.json", "[]", "log.json: the JSON array is empty; expected events or text"),
        ("log.json", '["a",\n"b"\n', "log.json:3: the JSON array does not end"),
        ("log.json", b'["a",\n"\xff"]', "log.json:2: invalid UTF-8; expected UTF-8"),
        ("log.jsonl", "hello\n", "log.jsonl: malformed JSON: Expecting value"),
        ("a.jsonl", '{"text": "a"}\n{"text": ""}\n', "a.jsonl:2: got an empty text; expected at least one character"),
        ("a.jsonl", '{"text": "a"}\n{"text": 5}\n', "a.jsonl:2: text: got int; expected a string"),
        ("a.jsonl", '{"text": "a", "timestamp": 1}\n{"text": "b"}\n', "a.jsonl:2: timestamp: got nothing; expected"),
        ("a.bin", bytes(range(256)) * 9, "a.bin: binary data; expected CSV, JSON, JSONL, Parquet or text"),
        ("a.csv", "sequence,time\na,1\n".encode("utf-16"), "a.csv: is UTF-16; expected UTF-8: convert it with iconv"),
        ("a.csv", "", "a.csv: the file is empty; expected events or text"),
        ("a.csv", "\ufeff\n\n", "a.csv: the file is empty; expected events or text"),
        ("a.csv", "sequence,time\n", "a.csv: no events; expected at least one sequence"),
        ("a.csv.gz", packed(b"sequence,time\na,1\n" * 99)[:-9], "the gzip data are damaged or cut short"),
        ("a.parquet", b"PAR1" + b"x" * 99, "a.parquet: no valid Parquet file"),
    ],
    ids=count(),
)  # fmt: skip
def test_bad_input_is_named_with_its_place(preprocess, tmp_path, name, content, message):
    preprocess(name, content).error(message)
    assert [p.name for p in tmp_path.iterdir()] == [name], "something was left behind"


def test_inputs_that_are_not_there(ttr, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "log.csv").write_text(csv_of(ROWS))
    ttr("preprocess", "lgo.csv", "-o", "d.zarr").error("lgo.csv: no such file; did you mean log.csv?")
    ttr("preprocess", "zzz", "-o", "d.zarr").error("zzz: no such file")
    ttr("preprocess", ".", "-o", "d.zarr").error(".: is a folder; expected a file")
    ttr("preprocess", "log.csv", "log.csv", "-o", "d.zarr", "--validation", "no.csv").error("no.csv: no such file")
    (tmp_path / "a.txt").write_text("hello\n")
    ttr("preprocess", "log.csv", "a.txt", "-o", "d.zarr").error("log.csv events", "a.txt text", "--kind")


def test_skip_sets_rejects_aside_and_counts_them(preprocess, ttr, tmp_path):
    rows = "sequence,time,type\na,1,x\na,oops,x\nb,2,y\nb,1,y\nc,3\nc,4,z\nd,5,x\n"
    rejects = tmp_path / "data.zarr.rejects.jsonl"
    preprocess("log.csv", rows, "--on-error", "skip", *WHOLE).ok(f"3 rejected, with reasons: {rejects}")
    assert sequences(tmp_path / "data.zarr") == [[(1.0, "x")], [(4.0, "z")], [(5.0, "x")]]
    told = [json.loads(line) for line in rejects.read_text().splitlines()]
    assert [(r["where"].rsplit(":", 1)[1], r["reason"].split(";")[0]) for r in told] == [
        ("3", "time: got 'oops'"), ("6", "got 2 fields"), ("5", "time 1.0 is before 2.0, that of the event before it"
         " in its sequence"),
    ]  # fmt: skip
    ttr("inspect", tmp_path / "data.zarr").ok("3 rejected")
    (tmp_path / "log.csv").write_text("sequence,time,type\na,oops,x\n")
    ttr("preprocess", tmp_path / "log.csv", "-o", tmp_path / "b.zarr", "--on-error", "skip").error(
        "no events (1 rejected, with reasons:"
    )
