"""`ttr-gpu preprocess`: every input and option as they are typed, what is said, and what the data set then holds."""

import json
from itertools import count

import numpy as np
import pytest
from raw_files import EXPECTED, ROWS, WHOLE, csv_of, documents, packed, sequences

from ttr_gpu.data.dataset import open_dataset, verify

# --- events


@pytest.mark.parametrize(
    ("name", "content", "options", "said"),
    [
        ("log.csv", csv_of(ROWS), (), "events, CSV with header: sequence,time,type"),
        ("log.csv.gz", packed(csv_of(ROWS).encode()), (), "events, CSV with header"),
        ("without ending", csv_of(ROWS), (), "events, CSV with header"),
        ("log.csv", b"\xef\xbb\xbf" + csv_of(ROWS, end="\r\n").encode(), (), "events, CSV with header"),
        ("log.csv", csv_of(ROWS, delimiter=";"), (), "CSV with header, divided by semicolons: sequence,time,type"),
        ("log.csv", csv_of(ROWS, delimiter="|"), (), "divided by bars"),
        ("log.csv", csv_of(ROWS, delimiter="\t"), (), "divided by tabs"),
        ("log.tsv", csv_of(ROWS, delimiter="\t"), (), "divided by tabs"),
        ("log.csv", csv_of(ROWS, "SEQUENCE, Time, Type"), (), "events, CSV with header: SEQUENCE,Time,Type"),
        ("log.csv", csv_of([[f'"{f}"' for f in row] for row in ROWS]), (), "events, CSV with header"),
        ("log.csv", csv_of(ROWS, "who,when,what"),
         ("--sequence-column", "who", "--time-column", "when", "--type-column", "what"), "header: who,when,what"),
        ("log.csv", csv_of(ROWS, "who,when,what"),
         ("--sequence-column", "1", "--time-column", "2", "--type-column", "3"), "header: who,when,what"),
        ("log.csv", csv_of(ROWS, None),
         ("--sequence-column", "1", "--time-column", "2", "--type-column", "3"), "CSV without header"),
        ("log.csv", csv_of(ROWS, "1,2,3"),
         ("--header", "--sequence-column", "1", "--time-column", "2", "--type-column", "3"), "CSV with header: 1,2,3"),
        ("log.jsonl", "\n".join(json.dumps({"user": s, "t": t, "event": k}) for s, t, k in ROWS), (), "events, JSON"),
        ("log.json", json.dumps([{"user": s, "t": t, "event": k} for s, t, k in ROWS]), (), "events, JSON: user,t"),
        ("log.jsonl", "\n".join(
            json.dumps({"id": s, "times": [t for t, _ in e], "types": [k for _, k in e]}) for s, e in EXPECTED.items()
         ), (), "events, JSON: id,times,types"),
    ],
    ids=count(),
)  # fmt: skip
def test_events_in_every_format(preprocess, tmp_path, name, content, options, said):
    out = preprocess(name, content, *options, *WHOLE).ok(said, "3 event types", "wrote")
    assert "4 sequences" in out
    assert sorted(sequences(tmp_path / "data.zarr")) == sorted(EXPECTED.values())
    assert verify(tmp_path / "data.zarr") == []


def test_parquet(ttr, tmp_path):
    import pyarrow
    import pyarrow.parquet

    columns = dict(zip(("sequence", "time", "type"), map(list, zip(*ROWS, strict=True)), strict=True))
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "log.parquet")
    ttr("preprocess", tmp_path / "log.parquet", "-o", tmp_path / "data.zarr", *WHOLE).ok("events, Parquet: sequence")
    assert sorted(sequences(tmp_path / "data.zarr")) == sorted(EXPECTED.values())


def test_standard_input(ttr, tmp_path):
    ttr("preprocess", "-", "-o", tmp_path / "a.zarr", *WHOLE, stdin=csv_of(ROWS).encode()).ok("<stdin>: events, CSV")
    content = packed(csv_of(ROWS).encode())
    ttr("preprocess", "-", "-o", tmp_path / "b.zarr", *WHOLE, stdin=content).ok("<stdin>: events")
    for name in ("a.zarr", "b.zarr"):
        assert sorted(sequences(tmp_path / name)) == sorted(EXPECTED.values())
    ttr("preprocess", "-", "-o", tmp_path / "c.zarr", stdin=b"").error("<stdin>: the file is empty")


def test_several_files_are_one_data_set(ttr, tmp_path):
    for name, part in (("one.csv", ROWS[:3]), ("two.csv", ROWS[3:])):
        (tmp_path / name).write_text(csv_of(part))
    ttr("preprocess", tmp_path / "one.csv", tmp_path / "two.csv", "-o", tmp_path / "data.zarr", *WHOLE).ok()
    assert sorted(sequences(tmp_path / "data.zarr")) == sorted(EXPECTED.values())


@pytest.mark.parametrize(
    ("times", "options", "seconds"),
    [
        (["0", "250"], ("--time-unit", "milliseconds"), 1e-3),
        (["0", "250"], ("--time-unit", "ms"), 1e-3),
        (["0", "250"], ("--time-unit", "0.04"), 0.04),
        (["0", "250"], ("--time-unit", "day"), 86400.0),
    ],
)
def test_units_of_numbers(preprocess, ttr, tmp_path, times, options, seconds):
    preprocess("log.csv", csv_of([("a", t, "x") for t in times]), *options, *WHOLE, "--split-time", "100%,100%").ok()
    assert open_dataset(tmp_path / "data.zarr").time_unit_seconds == seconds
    assert [t for t, _ in sequences(tmp_path / "data.zarr")[0]] == [0, 250]
    ttr("inspect", tmp_path / "data.zarr").ok("milliseconds" if seconds == 1e-3 else "gaps")


@pytest.mark.parametrize(
    ("dates", "options"),
    [
        (["2024-05-01T12:00:00Z", "2024-05-01T12:00:01.250Z"], ()),
        (["2024-05-01 12:00:00Z", "2024-05-01 12:00:01.250+00:00"], ()),
        (["2024-05-01T14:00:00+02:00", "2024-05-01T07:00:01.250-05:00"], ()),
        (["2024-05-01 12:00:00", "2024-05-01T12:00:01.250"], ("--assume-utc",)),
    ],
)
def test_dates(preprocess, tmp_path, dates, options):
    preprocess("log.csv", csv_of([("a", d, "x") for d in dates]), *options, "--split-time", "100%,100%").ok()
    assert [t for t, _ in sequences(tmp_path / "data.zarr")[0]] == [1714564800.0, 1714564801.25]


def test_a_date_without_a_zone_is_an_error_that_names_the_option(preprocess, tmp_path):
    rows = csv_of([("a", "2024-05-01T12:00:00", "x")])
    preprocess("log.csv", rows).error("log.csv:2:", "without a zone", "--assume-utc")
    assert [p.name for p in tmp_path.iterdir()] == ["log.csv"]


def test_type_bins(preprocess, tmp_path):
    rows = csv_of([("a", i, m) for i, m in enumerate((2.9, 3.0, 4.5, 9))], "sequence,time,size")
    options = ("--type-column", "size", "--type-bins", "3,4.5", "--split-time", "100%,100%")
    preprocess("log.csv", rows, *options).ok("3 event types")
    assert [k for _, k in sequences(tmp_path / "data.zarr")[0]] == ["<3", "[3,4.5)", ">=4.5", ">=4.5"]


def test_what_is_missing_is_said(preprocess):
    preprocess("log.csv", "time\n1\n2\n3\n4\n", "--split-time", "50%,75%").ok(
        "no type column; every event is of the one type 'event'", "no sequence column; the whole file is one sequence",
        "1 event type\n",
    )  # fmt: skip


# --- text

LINES = ["one two", "naïve ☕", "three, four", "a </s> b"]


@pytest.mark.parametrize(
    ("name", "content", "options", "said"),
    [
        ("a.json", json.dumps(LINES), (), "text, JSON"),
        ("a.json", json.dumps([{"text": line} for line in LINES], indent=2), (), "text, JSON: text"),
        ("a.jsonl", "\n".join(json.dumps({"text": line}) for line in LINES), (), "text, JSON: text"),
        ("a.jsonl", "\n".join(json.dumps(line) for line in LINES), (), "text, JSON"),
        ("a.jsonl", "\n".join(json.dumps({"Body": line}) for line in LINES), (), "text, JSON: Body"),
        ("a.jsonl", "\n".join(json.dumps({"say": line}) for line in LINES),
         ("--kind", "text", "--text-column", "say"), "text, JSON: say"),
        ("a.csv", "\n".join(f'"{line}"' for line in LINES), (), "text, CSV without header"),
        ("a.csv", "text,n\n" + "\n".join(f'"{line}",1' for line in LINES), (), "text, CSV with header: text,n"),
        ("a.txt", "\n".join(LINES), (), "text, plain text"),
        ("a.txt.gz", packed("\n".join(LINES).encode()), (), "text, plain text"),
        ("a.txt", "\n\n".join(LINES), ("--by", "paragraph"), "text, plain text"),
        ("a.txt", "\r\n".join(LINES), (), "text, plain text"),
    ],
    ids=count(),
)  # fmt: skip
def test_text_in_every_format(preprocess, tmp_path, name, content, options, said):
    preprocess(name, content, "--tokenizer", "bytes", *options, *WHOLE).ok(
        said, "no timestamps; the time of a token is its position", "258 tokens in the vocabulary",
        "4 documents had no </s> at their end; it was appended",
    )  # fmt: skip
    assert documents(tmp_path / "data.zarr") == LINES


@pytest.mark.parametrize("first", ["[2024-05-01 12:00] started", "[INFO] started", "{braces} first", "[1, 2] listed"])
def test_a_log_that_begins_with_a_bracket_is_no_json(preprocess, tmp_path, first):
    preprocess("app.log", f"{first}\nstopped\n", "--tokenizer", "bytes", *WHOLE).ok("text, plain text")
    assert documents(tmp_path / "data.zarr") == [first, "stopped"]


def test_documents_with_times_and_terminators(preprocess, tmp_path):
    records = [
        {"text": "a</s>", "timestamp": "2024-05-01T12:00:00Z"},
        {"text": "b", "timestamp": 1714564801},
        {"text": "c</s>", "timestamp": "2024-05-01T14:00:02+02:00"},
    ]
    result = preprocess("a.jsonl", "\n".join(map(json.dumps, records)), "--tokenizer", "bytes", *WHOLE)
    result.ok("\n1 document had no </s> at its end; it was appended")
    first = 1714564800.0
    assert sequences(tmp_path / "data.zarr") == [
        [(first + i, "<s>"), (first + i, letter), (first + i, "</s>")] for i, letter in enumerate("abc")
    ]


def test_tokenizers(preprocess, ttr, tmp_path):
    text = "\n".join(["the cat sat on the mat"] * 30)
    preprocess("a.txt", text, "--vocab-size", "280", *WHOLE).ok("tokens in the vocabulary")
    trained = open_dataset(tmp_path / "data.zarr")
    assert 258 < trained.vocabulary_size <= 280
    tokenizer = trained.path / "tokenizer.json"
    ttr("preprocess", tmp_path / "a.txt", "-o", tmp_path / "b.zarr", "--tokenizer", tokenizer, *WHOLE).ok()
    assert documents(tmp_path / "b.zarr") == ["the cat sat on the mat"] * 30
    assert open_dataset(tmp_path / "b.zarr").fingerprint == trained.fingerprint
    # What is wrong with an option is said before anything is read.
    for options, fragments in (
        (["--tokenizer", "gpt2"], ["--tokenizer: got gpt2", "'bpe', 'bytes' or an existing tokenizer.json"]),
        (["--tokenizer", tmp_path / "a.txt"], ["a.txt: no valid tokenizer.json"]),
        (["--vocab-size", "100"], ["--vocab-size: got 100", "at least 258"]),
    ):
        result = ttr("preprocess", tmp_path / "a.txt", "-o", tmp_path / "c.zarr", *options)
        result.error(*fragments)
        assert result.out == ""


def test_a_word_of_megabytes_takes_seconds(preprocess):
    preprocess("a.txt", "x" * 2_000_000 + "\nhello\n", "--vocab-size", "300", *WHOLE).ok("2 sequences")


def test_segments_and_timestamp_prefix(preprocess, ttr, tmp_path):
    record = json.dumps({"text": "x" * 30, "timestamp": "2024-05-01T12:30:00Z"})
    options = ("--tokenizer", "bytes", "--segment", "20", "--timestamp-prefix", "--timestamp-format", "%d %H:%M> ")
    preprocess("a.jsonl", record + "\n" + record, *options, *WHOLE).ok("8 sequences")
    # <s> and ten tokens of prefix leave nine: 30 letters and </s> need four segments.
    assert documents(tmp_path / "data.zarr") == [f"01 12:30> {'x' * n}" for n in (9, 9, 9, 3)] * 2
    for options, fragments in (
        (["--segment", "1"], ["--segment: got 1, expected at least 2"]),
        (["--timestamp-format", "%Y"], ["does nothing without --timestamp-prefix"]),
        (["--timestamp-prefix", "--segment", "9"], ["--segment: got 9, expected at least"]),
    ):
        ttr("preprocess", tmp_path / "a.jsonl", "-o", tmp_path / "b.zarr", "--tokenizer", "bytes", *options).error(
            *fragments
        )
    (tmp_path / "b.txt").write_text("no times\n")
    ttr("preprocess", tmp_path / "b.txt", "-o", tmp_path / "b.zarr", "--timestamp-prefix").error(
        "--timestamp-prefix", "b.txt has no timestamps"
    )


# --- splits


def test_split_by_seed(preprocess, ttr, tmp_path):
    rows = csv_of([(i, i, "x") for i in range(50)])
    preprocess("log.csv", rows, "--split", "0.6,0.2,0.2", "--split-seed", "3").ok("30 sequences", "10 sequences")
    order = np.random.default_rng(3).permutation(50)
    got = [events[0][0] for events in sequences(tmp_path / "data.zarr", "test")]
    assert got == sorted(order[40:])


def test_split_by_time_column_and_files(preprocess, ttr, tmp_path):
    rows = csv_of([("a", f"2024-01-0{d}T00:00:00Z", "x") for d in range(1, 7)])
    preprocess("log.csv", rows, "--split-time", "2024-01-04T00:00:00Z,2024-01-06T00:00:00Z").ok()
    counts = [open_dataset(tmp_path / "data.zarr").split(name).token_count for name in ("train", "validation", "test")]
    assert counts == [3, 2, 1]
    (tmp_path / "log.csv").write_text(csv_of([("a", 1, "train"), ("b", 2, "valid"), ("c", 3, "TEST")]))
    ttr("preprocess", tmp_path / "log.csv", "-o", tmp_path / "b.zarr", "--split-column", "type").ok()
    assert [sequences(tmp_path / "b.zarr", name)[0][0][0] for name in ("train", "validation", "test")] == [1, 2, 3]
    for name in ("v.csv", "t.csv"):
        (tmp_path / name).write_text(csv_of([("a", 7 if name == "v.csv" else 8, "train")]))
    files = ("--validation", tmp_path / "v.csv", "--test", tmp_path / "t.csv")
    ttr("preprocess", tmp_path / "log.csv", "-o", tmp_path / "c.zarr", *files).ok()
    assert [len(sequences(tmp_path / "c.zarr", name)) for name in ("train", "validation", "test")] == [3, 1, 1]


def test_an_earthquake_catalogue_goes_in_as_it_is(preprocess, ttr, tmp_path):
    # The columns and the partition of EarthquakeNPP's catalogues: what is before 1992 is auxiliary.
    years = [1990, 1991, 1992, 2006, 2007, 2010, 2011, 2019, 2020]
    row = "{},{}-01-01 00:00:00.000,140.5,36.4,{},204.1,90.8\n"
    rows = "".join(row.format(number, year, 4.5 + number % 2) for number, year in enumerate(years))
    options = (
        "--assume-utc", "--type-column", "magnitude", "--type-bins", "5,6",
        "--split-time", "1992-01-01,2007-01-01,2011-01-01,2020-01-01",
    )  # fmt: skip
    preprocess("quakes.csv", "id,time,longitude,latitude,magnitude,x,y\n" + rows, *options).ok(
        "no sequence column; the whole file is one sequence", "3 event types",
        "3 events outside the times of --split-time are left out",
    )  # fmt: skip
    parts = {name: sequences(tmp_path / "data.zarr", name) for name in ("train", "validation", "test")}
    assert [[kind for _, kind in part[0]] for part in parts.values()] == [["<5", "[5,6)"]] * 2 + [["<5", "[5,6)"]]
    assert parts["train"][0][0][0] == 694_224_000.0  # 1992-01-01
    assert parts["test"][0][1][0] == 1_546_300_800.0  # 2019-01-01


def test_documents_outside_four_times_are_left_out(preprocess, tmp_path):
    lines = "\n".join(json.dumps({"text": "abc", "timestamp": time}) for time in range(10))
    cut = ("--tokenizer", "bytes", "--split-time", "1,6,8,9")
    preprocess("a.jsonl", lines, *cut).ok("2 documents outside the times of --split-time are left out")
    dataset = open_dataset(tmp_path / "data.zarr")
    assert [dataset.split(name).documents for name in ("train", "validation", "test")] == [5, 2, 1]


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--split", "0.5,0.5"], ["--split: got '0.5,0.5'", "such as 0.8,0.1,0.1"]),
        (["--split", "0,0.5,0.5"], ["--split: got"]),
        (["--split", "0.1,0.5,0.4"], ["of 4 sequences none is left for train", "--split 1,0,0"]),
        (["--split-time", "3"], ["--split-time: got '3'", "such as 80%,90%"]),
        (["--split-time", "3,2"], ["--split-time: got '3,2'", "ascending"]),
        (["--split-time", "1,2,3"], ["--split-time: got '1,2,3'", "or four"]),
        (["--split-time", "1,2,3,2.5"], ["--split-time: got '1,2,3,2.5'", "ascending"]),
        (["--split-time", "soon,later"], ["--split-time: got 'soon,later'", "ISO 8601"]),
        (["--split-time", "0.5,0.7"], ["nothing is before the first cut"]),
        (["--split-column", "tpye"], ["--split-column: no column 'tpye'", "did you mean 'type'?"]),
        (["--split-column", "type"], ["log.csv:2: type: got 'x'; expected train, validation or test"]),
        (["--split-time", "1,2", "--test", "log.csv"], ["--split-time: cannot be combined with"]),
    ],
)
def test_splits_that_cannot_be(preprocess, tmp_path, options, fragments):
    preprocess("log.csv", csv_of(ROWS), *options).error(*fragments)
    assert [p.name for p in tmp_path.iterdir()] == ["log.csv"]


# --- where things are written


def test_existing_output(preprocess, ttr, tmp_path):
    preprocess("log.csv", csv_of(ROWS), *WHOLE).ok()
    preprocess("log.csv", csv_of(ROWS), *WHOLE).error("exists already", "choose another -o, or add --overwrite")
    preprocess("log.csv", csv_of(ROWS[:3]), *WHOLE, "--overwrite").ok("2 sequences")
    assert len(sequences(tmp_path / "data.zarr")) == 2


def test_overwrite_replaces_data_sets_only(preprocess, ttr, tmp_path):
    source = tmp_path / "log.csv"
    source.write_text(csv_of(ROWS))
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("of years")
    for target in (source, tmp_path / "precious", tmp_path):
        ttr("preprocess", source, "-o", target, "--overwrite").error("is no data set", "replaces data sets only")
    assert source.read_text() == csv_of(ROWS)
    assert (tmp_path / "precious" / "file").read_text() == "of years"


def test_output_that_cannot_be_created(preprocess, ttr, tmp_path):
    source = tmp_path / "log.csv"
    source.write_text(csv_of(ROWS))
    ttr("preprocess", source, "-o", source / "data.zarr").error("data.zarr: cannot be created")


def test_names_with_spaces_and_relative_paths(ttr, tmp_path, monkeypatch):
    folder = tmp_path / "my data"
    folder.mkdir()
    (folder / "the log.csv").write_text(csv_of(ROWS))
    monkeypatch.chdir(folder)
    out = ttr("preprocess", "the log.csv", "-o", "new folder/the log.zarr", *WHOLE).ok()
    assert out.splitlines()[-1] == (
        "wrote new folder/the log.zarr; next: ttr-gpu train 'new folder/the log.zarr'"
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    ttr("inspect", "my data/new folder/the log.zarr").ok("4 sequences")
    ttr("preprocess", "my data/the log.csv", "-o", "./x/../y.zarr", *WHOLE).ok()
    assert (tmp_path / "y.zarr" / "zarr.json").is_file()


def test_equal_times_and_large_and_negative_ones_come_back_exactly(preprocess, tmp_path):
    times = [-1e12, -0.1, 0.0, 0.0, 1e-9, 1.7e9 + 1 / 3]
    preprocess("log.csv", csv_of([("a", repr(t), "x") for t in times]), "--split-time", "100%,100%").ok()
    got = [t for t, _ in sequences(tmp_path / "data.zarr")[0]]
    # Relative to the first: what is left of the others is what a float64 of that size holds.
    np.testing.assert_allclose(got, times, rtol=0, atol=1e12 * 2**-52)
    assert got[2] == got[3]
