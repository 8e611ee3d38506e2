"""`ttr-gpu serve` as a process: its answers, its end and its state, tokens, and what it refuses to begin with."""

import contextlib
import itertools
import json
import re
import signal
import socket
import threading
import time
import urllib.request

import pytest
from served import Served

for needed in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(needed)


def push(served, stream, kind, when, **more):
    return served.call("/push", {"stream": stream, "type": kind, "time": when, **more})


def test_streams_outlive_the_service(run, tmp_path):
    state = tmp_path / "state"
    with Served(run, "--state", state, "--streams", "20") as served:
        assert "(up to 20 streams; Ctrl-C ends it)" in served.said
        for number in range(12):
            status, told = push(served, f"user {number % 3}", f"type-{number % 5}", 1.7e9 + number, predict=True)
            assert (status, told["events"]) == (200, number // 3 + 1)
        _, before = served.call("/predict", {"stream": "user 2"})
        assert before["next"]["time"]["quantiles"]["0.5"] > before["last_time"]
        code, out, err = served.end()
        assert (code, err) == (0, "")
        assert out == f"3 streams saved in {state}\n"
    with Served(run, "--state", state, "--streams", "20") as served:
        assert ", 3 loaded;" in served.said
        assert served.call("/predict", {"stream": "user 2"}) == (200, before)
        assert push(served, "user 2", "type-0", 1.6e9)[0] == 409
        assert push(served, "user 2", "type-0", 1.7e9 + 50)[1]["events"] == 5
        assert served.call("/streams/user%200", method="DELETE")[0] == 204
        assert served.end(signal.SIGINT)[:2] == (0, f"2 streams saved in {state}\n")
    assert len(list(state.iterdir())) == 2


@contextlib.contextmanager
def pushing(served, count):
    """So many clients that push until they are cut off, each to a stream of its own and at its fifth event by now; the
    events that each was told of. Left when the service has ended."""
    acknowledged = {}

    def client(name):
        for number in itertools.count():
            try:
                status, told = push(served, name, f"type-{number % 5}", 1.7e9 + number)
            except (OSError, ValueError):
                return
            if status != 200:
                return
            acknowledged[name] = told["events"]

    clients = [threading.Thread(target=client, args=(f"client {i}",), daemon=True) for i in range(count)]
    for each in clients:
        each.start()
    while len(acknowledged) < count or min(acknowledged.values()) < 5:
        assert served.process.poll() is None
        time.sleep(0.01)
    yield acknowledged
    for each in clients:
        each.join(30)


def test_what_was_answered_before_the_end_is_in_the_state(run, tmp_path):
    """Each event that was acknowledged is found again."""
    state = tmp_path / "state"
    with Served(run, "--state", state) as served, pushing(served, 6) as acknowledged:
        assert served.end()[0] == 0
    with Served(run, "--state", state) as served:
        found = {each["stream"]: each["events"] for each in served.call("/streams")[1]["streams"]}
    assert set(found) == set(acknowledged)
    for name, count in found.items():
        # One more may have been taken whose answer did not arrive.
        assert count - acknowledged[name] in (0, 1)


def test_a_service_that_is_killed_has_saved_what_came_before(run, tmp_path):
    """SIGKILL while clients push: each stream is found as it was after some request, and not longer ago than said."""
    state = tmp_path / "state"
    with Served(run, "--state", state, "--save-every", "1") as served, pushing(served, 4) as acknowledged:
        # What is acknowledged now, and twice written since, cannot be lost.
        last_kept = dict(acknowledged)
        for _ in range(2):
            before = saves(served)
            while saves(served) == before:
                time.sleep(0.02)
        served.process.kill()
        served.process.communicate()
    (state / f".{'0' * 32}.stream.partial-1").write_bytes(b"half")
    with Served(run, "--state", state) as served:
        assert ", 4 loaded;" in served.said
        found = {each["stream"]: each["events"] for each in served.call("/streams")[1]["streams"]}
        assert push(served, "client 1", "type-0", 1.8e9)[1]["events"] == found["client 1"] + 1
        assert served.end()[0] == 0
    for name, count in found.items():
        assert last_kept[name] <= count <= acknowledged[name] + 1
    assert len(list(state.iterdir())) == 4, "what was half-written is gone"


def saves(served):
    """How often the service has written its streams."""
    return int(float(re.search(r"ttr_save_seconds_count (\S+)", served.call("/metrics")[1])[1]))


def test_a_state_that_cannot_be_written_at_the_end_is_said(run, tmp_path):
    state = tmp_path / "state"
    with Served(run, "--state", state, "--save-every", "0") as served:
        push(served, "a", "type-1", 1.7e9)
        state.rmdir()
        code, out, err = served.end()
    assert (code, out) == (2, "")
    assert err.startswith(f"error: --state {state}: streams not saved: No such file")
    assert err.count("\n") == 1


def test_a_live_connection_does_not_hold_up_the_end(run):
    with Served(run) as served:
        push(served, "a", "type-1", 1.7e9)
        with urllib.request.urlopen(served.url + "/live?stream=a", timeout=30) as live:
            first = json.loads(live.readline().removeprefix(b"data: "))
            assert first["next"]["types"]
            push(served, "a", "type-2", 1.7e9 + 1)
            lines = [live.readline(), live.readline()]
            assert json.loads(lines[1].removeprefix(b"data: "))["types"] == ["type-2"]
            code, _, err = served.end()
            assert (code, err) == (0, "")
            assert b"data" not in live.read()


def test_bad_requests_are_answered_with_the_reason(run):
    with Served(run, "--max-request-bytes", "100") as served:
        assert push(served, "a", "type-9", 1.0)[0] == 422
        for value, status in (
            ({"stream": "a", "type": "nothing at all", "time": 1.0}, 422), ({"stream": "a" * 100}, 413), ([], 400),
        ):  # fmt: skip
            answer = served.call("/push", value)
            assert (answer[0], list(answer[1])) == (status, ["error"])
        assert served.call("/health")[1]["status"] == "ok"
        assert "ttr_requests_total" in served.call("/metrics")[1]


def test_other_addresses_need_a_token(ttr, run):
    ttr("serve", run, "--host", "0.0.0.0").error("--host: got 0.0.0.0", "--token or TTR_SERVE_TOKEN")
    ttr("serve", run, "--host", "0.0.0.0", "--token", "short").error("--token: expected at least 8")
    with Served(run, "--host", "0.0.0.0", "--token", "correct-horse") as served:
        assert push(served, "a", "type-0", 1.0)[0] == 401
        served.token = "correct-horse"
        assert push(served, "a", "type-0", 1.0)[0] == 200
        assert served.call("/streams", token="wrong")[0] == 401


def test_what_cannot_begin_is_said(ttr, run, tmp_path, texts, tmp_path_factory):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ttr("serve", run, "--port", port).error(f"--port {port}: cannot be listened on", "in use")
    ttr("serve", tmp_path / "absent").error("no such folder")
    (tmp_path / "file").write_text("")
    ttr("serve", run, "--state", tmp_path / "file").error("--state", "cannot be written")
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "x.stream").write_text("half")
    ttr("serve", run, "--state", tmp_path / "state").error("x.stream: cannot be read")


def test_without_the_extra_it_says_what_to_install(ttr, run, monkeypatch):
    import sys

    for name in [name for name in sys.modules if name.startswith("ttr_gpu.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    ttr("serve", run).error("uvicorn is not installed", "pip install 'ttr-gpu[serve]'")
