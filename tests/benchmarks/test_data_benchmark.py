"""`benchmarks data`: every side reads as much as it says."""

import csv
import gzip
import json

import numpy as np
from click.testing import CliRunner

from benchmarks import data
from benchmarks.__main__ import main


def test_every_side_reads_as_much(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    with gzip.open(tmp_path / "events.csv.gz", "wt", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["sequence_id", "time", "type"])
        for sequence in range(60):
            rows.writerows([sequence, t, "abc"[sequence % 3]] for t in np.sort(rng.uniform(0, 99, 100)).tolist())
    with gzip.open(tmp_path / "texts.jsonl.gz", "wt") as file:
        for number in range(300):
            file.write(json.dumps({"timestamp": number, "text": f"record {number} of some, and more words"}) + "\n")
    monkeypatch.setattr(data, "EVENTS", tmp_path / "events.csv.gz")
    monkeypatch.setattr(data, "TEXTS", tmp_path / "texts.jsonl.gz")
    monkeypatch.setattr(data, "find_packages", list)
    run = CliRunner().invoke(main, ["data", "--turns", "1", "--output", str(tmp_path / "data.json")])
    assert run.exit_code == 0, run.output
    sides = json.loads((tmp_path / "data.json").read_text())["sides"]
    counts = {name: side["count"] for name, side in sides.items()}
    assert counts["events, ttr-gpu"] == counts["events, csv module alone"] == 6000
    assert counts["text, ttr-gpu"] == counts["text, json and tokenizers alone"] > 300
    # Batches are filled with whole windows of 99 inputs; windows of a memory-mapped file fill them exactly.
    assert counts["batches, memory-mapped windows"] == 200 * 2048
    assert 0.7 * 200 * 2048 < counts["batches, ttr-gpu"] <= 200 * 2048
    assert sides["batches, memory-mapped windows"]["over_ours"]["median"] > 0
