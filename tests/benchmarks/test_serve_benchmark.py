"""`python -m benchmarks serve` runs, and notices an answer that belongs to another stream."""

import itertools
import json

import pytest
from click.testing import CliRunner

for needed in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(needed)


def test_it_runs_and_a_mix_up_ends_it(tmp_path, monkeypatch):
    from benchmarks import serve

    monkeypatch.setattr(serve, "CLIENTS", (1, 3))
    output = tmp_path / "serve.json"
    arguments = ["--seconds", "0.3", "--output", str(output)]
    done = CliRunner().invoke(serve.serve, arguments)
    assert done.exit_code == 0, done.output
    described = json.loads(output.read_text())
    assert [row["clients"] for row in described["rows"]] == [1, 3]
    assert all(0 < row["p50_ms"] <= row["p99_ms"] for row in described["rows"])
    assert described["difference"] <= 1e-4

    whole = serve.check_streams

    def exchanged(clients):
        for one, other in itertools.pairwise(clients):
            one.last, other.last = other.last, one.last
        return whole(clients)

    monkeypatch.setattr(serve, "check_streams", exchanged)
    done = CliRunner().invoke(serve.serve, arguments)
    assert done.exit_code == 1
    assert "from that of the same events in a stream alone" in done.output
