"""Raw files to data sets: formats, errors with their place, splits, terminators, nothing half-written."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from ttr_gpu.data.dataset import open_dataset, verify
from ttr_gpu.data.options import Columns, PreprocessOptions
from ttr_gpu.data.preprocess import preprocess
from ttr_gpu.data.splits import SplitOptions
from ttr_gpu.errors import UserError

EVENTS = "sequence,time,type\n" + "".join(f"s{i % 7},{1.7e9 + i * 0.125!r},{'abc'[i % 3]}\n" for i in range(70))


def run(tmp_path: Path, text: str | bytes, name: str = "in.csv", **options):
    source = tmp_path / name
    source.write_bytes(text.encode() if isinstance(text, str) else text)
    said: list[str] = []
    preprocess(PreprocessOptions([str(source)], tmp_path / "out.zarr", **options), said.append)
    return open_dataset(tmp_path / "out.zarr"), said


def sequences(dataset, name):
    """[(tokens, absolute times)] of a split."""
    split = dataset.split(name)
    tokens, times = split.read(0, split.token_count)
    return [
        (tokens[a:b], times[a:b] + dataset.origin) for a, b in zip(split.offsets[:-1], split.offsets[1:], strict=True)
    ]


def everything(dataset):
    return [pair for name in dataset.splits for pair in sequences(dataset, name)]


def decoded(dataset):
    return sorted(dataset.tokenizer().decode(tokens) for tokens, _ in everything(dataset))


def test_interleaved_rows_are_grouped_and_times_come_back_exactly(tmp_path):
    dataset, said = run(tmp_path, EVENTS)
    assert dataset.vocabulary == ["a", "b", "c"]
    got = {times[0]: (tokens, times) for tokens, times in everything(dataset)}
    assert len(got) == 7
    for i in range(7):
        tokens, times = got[1.7e9 + i * 0.125]
        np.testing.assert_array_equal(times, [1.7e9 + k * 0.125 for k in range(i, 70, 7)])
        np.testing.assert_array_equal(tokens, [k % 3 for k in range(i, 70, 7)])
    assert "events, CSV with header: sequence,time,type" in said[0]
    assert verify(dataset.path) == []


def test_split_is_the_permutation_of_sequences(tmp_path):
    rows = "sequence,time\n" + "".join(f"{i},{i}\n{i},{i + 0.5}\n" for i in range(4468))
    dataset, _ = run(tmp_path, rows, split=SplitOptions("0.6,0.2,0.2"))
    p = np.random.default_rng(0).permutation(4468)
    n = 4468
    for name, part in (
        ("train", p[: int(0.6 * n)]),
        ("validation", p[int(0.6 * n) : int(0.8 * n)]),
        ("test", p[int(0.8 * n) :]),
    ):
        np.testing.assert_array_equal([times[0] for _, times in sequences(dataset, name)], np.sort(part))


def test_split_in_time_cuts_each_sequence(tmp_path):
    rows = "sequence,time\n" + "".join(f"{s},{t}\n" for s in "xy" for t in range(10))
    dataset, _ = run(tmp_path, rows, split=SplitOptions(times="6,8"))
    assert [list(times) for _, times in sequences(dataset, "train")] == [list(range(6))] * 2
    assert [list(times) for _, times in sequences(dataset, "validation")] == [[6, 7]] * 2
    assert [list(times) for _, times in sequences(dataset, "test")] == [[8, 9]] * 2


def test_split_by_files_and_by_column(tmp_path):
    for name, first in (("v.csv", 100), ("t.csv", 200)):
        (tmp_path / name).write_text(f"time\n{first}\n{first + 1}\n")
    dataset, _ = run(
        tmp_path, "time\n1\n2\n", validation=[str(tmp_path / "v.csv")], test=[str(tmp_path / "t.csv")],
        split=SplitOptions(given=True), kind="events",
    )  # fmt: skip
    assert [list(sequences(dataset, n)[0][1]) for n in dataset.splits] == [[1, 2], [100, 101], [200, 201]]
    (tmp_path / "two").mkdir()
    rows = "sequence,time,part\na,1,train\nb,2,val\nc,3,test\n"
    dataset, _ = run(tmp_path / "two", rows, columns=Columns(split="part"), split=SplitOptions(given=True))
    assert [sequences(dataset, n)[0][1][0] for n in ("train", "validation", "test")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("sequence,time\na,1\na,nan\n", "in.csv:3", "finite"),
        ("sequence,time\na,1\na,inf\n", "in.csv:3", "finite"),
        ("sequence,time\na,1\na,soon\n", "in.csv:3", "number or an ISO 8601 date"),
        ("sequence,time\na,2024-01-01 00:00:00\n", "in.csv:2", "--assume-utc"),
        ("sequence,time\na,2\nb,1\na,1\n", "in.csv:4", "before 2.0"),
        ("sequence,time\na,1,7\n", "in.csv:2", "got 3 fields; expected 2"),
        ("sequence,time\na\n", "in.csv:2", "got 1 fields; expected 2"),
        ("sequence,time,type\na,1,\n", "in.csv:2", "type of an event"),
        ("sequence,time,type\n,1,x\n", "in.csv:2", "name of a sequence"),
        (b"sequence,time\na,1\n\xff,2\n", "in.csv:3", "invalid UTF-8 at byte 1"),
        ('sequence,time\na,"1\n', "in.csv:2", "malformed CSV"),
        ("sequence,time,time\na,1,2\n", "in.csv:1", "appears twice"),
        ("sequence,when\na,1\n", "in.csv", "--time-column"),
        ("sequence,time\n", "in.csv", "no events"),
        ("", "in.csv", "empty"),
        (b"\x00\x01\x02", "in.csv", "binary"),
    ],
)
def test_bad_events_are_named(tmp_path, text, where, what):
    with pytest.raises(UserError) as error:
        run(tmp_path, text, kind="events")
    assert f"{where}:" in str(error.value)
    assert what in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.csv"], "something was left behind"


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ('{"text": "a", "timestamp": 1}\n{"text": 5, "timestamp": 2}\n', "in.jsonl:2", "expected a string"),
        ('{"text": "a", "timestamp": 1}\n{"text": "b"}\n', "in.jsonl:2", "timestamp"),
        ('{"text": "a"}\n{"text": "b"\n', "in.jsonl:2", "malformed JSON"),
        ('{"text": "a"}\n[1]\n', "in.jsonl:2", "expected a record"),
        ('{"text": "a"}\n{"text": ""}\n', "in.jsonl:2", "empty text"),
        ('{"text": "a"}\n{"text": "</s>"}\n', "in.jsonl:2", "empty text"),
        ('["a", "b"', "in.jsonl:1", "does not end"),
        ('["a"\n "b"]', "in.jsonl:2", "expected ','"),
        ('["a",\n 5]', "in.jsonl:2", "expected a string or a record"),
        ('["a"] x', "in.jsonl:1", "after the end"),
        ('{"times": [1, 2], "types": [1]}\n', "in.jsonl:1", "got 1 for 2 times"),
        ('{"times": [], "types": []}\n', "in.jsonl:1", "empty sequence"),
        ('{"times": [2, 1], "types": [0, 0]}\n', "in.jsonl:1", "before 2.0"),
        ('{"times": [NaN], "types": [0]}\n', "in.jsonl:1", "malformed JSON"),
    ],
)
def test_bad_json_is_named(tmp_path, text, where, what):
    with pytest.raises(UserError) as error:
        run(tmp_path, text, "in.jsonl")
    assert f"{where}: " in str(error.value)
    assert what in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl"]


def test_skip_sets_rejects_aside(tmp_path):
    rows = "sequence,time\na,1\na,oops\na,3\nb,5\nb,4\nc,1\nd,2\n"
    dataset, _ = run(tmp_path, rows, skip_errors=True)
    assert sorted(list(times) for _, times in everything(dataset)) == [[1], [1, 3], [2]]
    rejects = [json.loads(line) for line in (tmp_path / "out.zarr.rejects.jsonl").read_text().splitlines()]
    assert [r["where"].rsplit(":", 1)[1] for r in rejects] == ["3", "6"]
    assert dataset.attributes["rejected"] == 2


def test_equal_times_are_allowed(tmp_path):
    dataset, _ = run(tmp_path, "sequence,time\na,1\na,1\nb,2\nc,2\n")
    assert sum(len(times) for _, times in everything(dataset)) == 4


def test_sequence_records_and_numeric_types(tmp_path):
    lines = [json.dumps({"id": f"q{i}", "times": [i, i + 0.5], "types": [10, 9]}) for i in range(5)]
    dataset, _ = run(tmp_path, "\n".join(lines), "in.jsonl")
    assert dataset.vocabulary == ["9", "10"], "numbers sort as numbers"
    assert all(list(tokens) == [1, 0] for tokens, _ in everything(dataset))


def test_dates_units_and_bins(tmp_path):
    rows = "id,time,magnitude\n" + "".join(
        f"{i},1990-01-0{i + 1} 09:03:12.880,{m}\n" for i, m in enumerate((2.7, 4.0, 9.1))
    )
    dataset, said = run(
        tmp_path, rows, assume_utc=True, time_unit="days", columns=Columns(type="magnitude"), type_bins=(4.0, 5.0),
        split=SplitOptions(times="34%,67%"),
    )  # fmt: skip
    assert dataset.vocabulary == ["<4", "[4,5)", ">=5"]
    assert [int(tokens[0]) for tokens, _ in everything(dataset)] == [0, 1, 2]
    first = everything(dataset)[0][1][0]
    assert first == pytest.approx(631184592.88 / 86400, rel=1e-15)
    assert any("one sequence" in line for line in said), "a column named id numbers rows"


def test_gzip_is_told_by_its_content_and_damage_is_an_error(tmp_path):
    packed = gzip.compress(EVENTS.encode())
    dataset, _ = run(tmp_path, packed, "in.data", kind="events")
    assert len(everything(dataset)) == 7
    (tmp_path / "cut").mkdir()
    with pytest.raises(UserError, match="damaged or cut short"):
        run(tmp_path / "cut", packed[:-20], "in.gz", kind="events")


def test_one_sequence_needs_a_cut_in_time(tmp_path):
    with pytest.raises(UserError, match="--split-time 80%,90%"):
        run(tmp_path, "time\n1\n2\n3\n", kind="events")


TEXTS = ["hello world", "naïve café ☕", "a </s> b", "line\nbreak", "hello again"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("array.json", json.dumps(TEXTS)),
        ("array of records.json", json.dumps([{"text": t} for t in TEXTS], indent=1)),
        ("records.jsonl", "\n".join(json.dumps({"text": t}) for t in TEXTS)),
        ("column.csv", "".join('"' + t.replace('"', '""') + '"\n' for t in TEXTS)),
        ("header.csv", "text,other\n" + "".join('"' + t + '",x\n' for t in TEXTS)),
    ],
)
def test_text_formats_come_back_exactly(tmp_path, name, content):
    dataset, _ = run(tmp_path, content, name, tokenizer="bytes")
    assert dataset.kind == "text"
    assert decoded(dataset) == sorted(TEXTS)
    assert dataset.attributes["terminators_appended"] == 5
    for tokens, times in everything(dataset):
        assert (tokens[0], tokens[-1]) == (1, 0), "each sequence starts with <s> and ends with </s>"
        assert not {0, 1} & set(tokens[1:-1]), "</s> inside a text is ordinary text"
        np.testing.assert_array_equal(times, np.arange(len(times)))


def test_lines_and_paragraphs(tmp_path):
    text = "one\ntwo\n\nthree\n"
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert decoded(run(tmp_path / "a", text, "in.txt", tokenizer="bytes")[0]) == ["one", "three", "two"]
    by_paragraph = run(tmp_path / "b", text, "in.txt", tokenizer="bytes", by="paragraph")[0]
    assert decoded(by_paragraph) == ["one\ntwo", "three"]


def test_a_terminator_that_is_there_is_recognised(tmp_path):
    dataset, _ = run(tmp_path, json.dumps(["a</s>", "b", "c</s>"]), "in.json", tokenizer="bytes")
    assert dataset.attributes["terminators_appended"] == 1
    assert decoded(dataset) == ["a", "b", "c"]
    assert sum(split["bytes"] for split in dataset.attributes["splits"].values()) == 6


def test_bpe_learns_from_the_training_split_alone(tmp_path):
    lines = [{"text": "banana " * 20, "timestamp": 1}] * 8 + [{"text": "zebra " * 20, "timestamp": 2}] * 8
    dataset, _ = run(
        tmp_path, "\n".join(map(json.dumps, lines)), "in.jsonl", vocabulary_size=300, split=SplitOptions(times="2,3")
    )
    tokenizer = dataset.tokenizer()
    assert len(tokenizer.encode_batch([" banana"])[0]) == 1
    assert len(tokenizer.encode_batch([" zebra"])[0]) > 3
    assert dataset.vocabulary_size <= 300


def test_segments_and_prefixes(tmp_path):
    record = {"text": "x" * 50, "timestamp": "2024-05-01T12:30:00Z"}
    dataset, _ = run(
        tmp_path, "\n".join([json.dumps(record)] * 4), "in.jsonl", tokenizer="bytes", segment=40, timestamp_prefix=True
    )
    prefix = "[2024-05-01T12:30Z] "
    tokenizer = dataset.tokenizer()
    texts = [tokenizer.decode(tokens) for tokens, _ in everything(dataset)]
    assert all(text.startswith(prefix) for text in texts)
    assert all(len(tokens) <= 40 for tokens, _ in everything(dataset))
    assert sum(text.count("x") for text in texts) == 200
    # 19 tokens of text (or </s>) fit beside <s> and the 20 of the prefix: 51 need three segments.
    assert len(texts) == 12
    assert sum(int(tokens[-1] == tokenizer.end) for tokens, _ in everything(dataset)) == 4


def test_segment_too_small_for_its_prefix(tmp_path):
    with pytest.raises(UserError, match="--segment: got 10, expected at least 22"):
        run(tmp_path, '{"text": "a", "timestamp": 1}\n' * 4, "in.jsonl", tokenizer="bytes", segment=10,
            timestamp_prefix=True)  # fmt: skip


def test_one_sequence_joins_documents(tmp_path):
    lines = "\n".join(json.dumps({"text": t, "timestamp": i}) for i, t in enumerate("abcdefghij"))
    dataset, _ = run(
        tmp_path, lines, "in.jsonl", tokenizer="bytes", one_sequence=True, split=SplitOptions(times="60%,80%")
    )
    ((tokens, times),) = sequences(dataset, "train")
    end = dataset.tokenizer().end
    assert list(tokens[2::2]) == [end] * 6
    np.testing.assert_array_equal(times, [0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5])
    assert [len(sequences(dataset, n)) for n in dataset.splits] == [1, 1, 1]


def test_joined_documents_must_be_in_order(tmp_path):
    lines = "\n".join(json.dumps({"text": "a", "timestamp": t}) for t in (1, 3, 2, 4))
    with pytest.raises(UserError, match=r"in.jsonl:3: time 2.0 is before 3.0"):
        run(tmp_path, lines, "in.jsonl", tokenizer="bytes", one_sequence=True, split=SplitOptions(times="9,9"))


def test_existing_output_is_kept_until_a_new_one_is_complete(tmp_path):
    dataset, _ = run(tmp_path, EVENTS)
    before = dataset.fingerprint
    with pytest.raises(UserError, match="--overwrite"):
        run(tmp_path, EVENTS)
    with pytest.raises(UserError, match="finite"):
        run(tmp_path, "sequence,time\na,nan\n", overwrite=True)
    assert open_dataset(tmp_path / "out.zarr").fingerprint == before
    after, _ = run(tmp_path, EVENTS.replace(",c", ",d"), overwrite=True)
    assert after.fingerprint != before
    assert not list(tmp_path.glob("*partial*"))


def test_fingerprint_is_of_the_content(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    first, _ = run(tmp_path / "a", EVENTS)
    second, _ = run(tmp_path / "b", gzip.compress(EVENTS.encode()), "other.csv.gz")
    assert first.fingerprint == second.fingerprint


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = {
        "sequence": [f"s{i % 4}" for i in range(20)],
        "time": [float(i) for i in range(20)],
        "type": ["a", "b"] * 10,
    }
    path = tmp_path / "in.parquet"
    pyarrow.parquet.write_table(pyarrow.table(rows), path)
    preprocess(PreprocessOptions([str(path)], tmp_path / "out.zarr"), lambda line: None)
    assert sorted(list(times) for _, times in everything(open_dataset(tmp_path / "out.zarr"))) == [
        list(range(i, 20, 4)) for i in range(4)
    ]


@pytest.mark.parametrize("size", [3, 200])
def test_long_json_arrays_are_read_piece_by_piece(tmp_path, size):
    texts = [f"{i} " + "y" * 2000 for i in range(size)]
    dataset, _ = run(tmp_path, json.dumps(texts), "in.json", tokenizer="bytes")
    assert decoded(dataset) == sorted(texts)
