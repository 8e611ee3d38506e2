"""The service called through ASGI: what it answers, and what it refuses with which status and reason."""

import asyncio
import functools
import json
import re

import numpy as np
import pytest
from service_at_hand import NAMES, Service, events, make_model, warm_up

from ttr_gpu.infer.event_stream import EventStream

pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")
httpx2 = pytest.importorskip("httpx2")


def run(test):
    """Run a test that is a coroutine, with a limit on its time."""

    @functools.wraps(test)
    def in_a_loop(*arguments, **options):
        warm_up()
        asyncio.run(asyncio.wait_for(test(*arguments, **options), 60))

    return in_a_loop


@run
async def test_it_takes_events_and_says_what_comes_next():
    types, times = events(20)
    alone = EventStream(make_model(), names=NAMES, origin=1.7e9)
    async with Service() as service:
        for number, (kind, time) in enumerate(zip(types, times, strict=True), 1):
            answer = await service.push("user 7", kind, time, predict=True, top=4)
            alone.push(kind, time)
            expected = alone.next()
            assert answer.status_code == 200
            told = answer.json()
            assert (told["stream"], told["events"], told["last_time"]) == ("user 7", number, time)
            found = {each["type"]: each["probability"] for each in told["next"]["types"]}
            np.testing.assert_allclose([found[name] for name in NAMES], expected.types, rtol=1e-5)
            assert [each["probability"] for each in told["next"]["types"]] == sorted(found.values(), reverse=True)
            assert told["next"]["time"]["quantiles"]["0.5"] == expected.quantiles([0.5])[0]
        assert (await service.post("/predict", {"stream": "user 7", "top": 4})).json() == told
        later = (await service.post("/predict", {"stream": "user 7", "at": times[-1] + 5.0, "top": 1})).json()["next"]
        assert later["at"] == times[-1] + 5.0
        assert later["time"]["quantiles"]["0.9"] == alone.next(times[-1] + 5.0).quantiles([0.9])[0]
        assert len(later["types"]) == 1


@run
async def test_many_events_at_once_dates_numbers_and_names():
    async with Service() as service:
        body = {
            "stream": "a",
            "events": [{"type": "login", "time": "2024-05-01T12:00:00Z"}, {"type": 1, "time": 1714564801.5}],
        }
        told = (await service.post("/push", body)).json()
        assert told == {"stream": "a", "events": 2, "last_time": 1714564801.5}
        types, times = events(700)
        many = {"stream": "b", "events": [{"type": k, "time": t} for k, t in zip(types, times, strict=True)]}
        assert (await service.post("/push", many)).json()["events"] == 700
        told = (await service.client.get("/streams")).json()
        assert [(each["stream"], each["events"]) for each in told["streams"]] == [("a", 2), ("b", 700)]
        assert (await service.client.delete("/streams/a")).status_code == 204
        assert (await service.client.delete("/streams/a")).status_code == 404
        # It begins anew, with any time.
        assert (await service.push("a", "buy", 5.0)).json()["events"] == 1


BAD = [
    (400, b"{", "body: is no JSON"),
    (400, b"\xff", "no UTF-8"),
    (400, b"[1]", r"expected an object"),
    (400, b"[" * 100_000, "nested too deeply"),
    (400, b'{"stream": "a", "type": "buy", "time": NaN}', "got NaN, which is no JSON"),
    (400, b'{"stream": "a", "type": "buy", "time": -Infinity}', "got -Infinity"),
    (422, b'{"stream": "a", "type": "buy", "time": 1e999}', "time: got inf; expected a finite number"),
    (422, b'{"stream": "a", "type": "buy", "time": "NaN"}', "expected a finite number"),
    (422, b'{"stream": "a", "type": "buy", "time": true}', "time: got True"),
    (422, b'{"stream": "a", "type": "buy", "time": "2024-05-01T12:00"}', "without a zone"),
    (422, b'{"stream": "a", "type": "buy", "time": null}', "time: got None"),
    (422, b'{"stream": "a", "type": "buy"}', "time: not given"),
    (422, b'{"stream": "a", "time": 1}', "type: not given"),
    (422, b'{"type": "buy", "time": 1}', "stream: got None"),
    (422, b'{"stream": "", "type": "buy", "time": 1}', "1 to 200 printable"),
    (422, b'{"stream": "a\\n", "type": "buy", "time": 1}', "printable"),
    (422, b'{"stream": "a", "type": "bui", "time": 1.8e9}', "no event type 'bui'; did you mean 'buy'"),
    (422, b'{"stream": "a", "type": 4, "time": 1.8e9}', r"types: got 4, expected 0 .. 3"),
    (422, b'{"stream": "a", "type": -1, "time": 1.8e9}', "types: got -1"),
    (422, b'{"stream": "a", "type": [], "time": 1}', r"type: got \[\]"),
    (422, b'{"stream": "a", "events": []}', "events: got"),
    (422, b'{"stream": "a", "events": [1]}', r"events\[0\]: got 1"),
    (422, b'{"stream": "a", "events": [{"type": "buy", "time": 1, "x": 2}]}', r"events\[0\].x: is no field"),
    (422, b'{"stream": "a", "event": {}}', "event: is no field; there are"),
    (422, b'{"stream": "a", "type": "buy", "time": 1, "top": -1}', "top: got -1"),
    (422, b'{"stream": "a", "type": "buy", "time": 1, "predict": 1}', "predict: got 1"),
    (409, b'{"stream": "a", "type": "buy", "time": 1.7e9}', "got 1700000000.0, .*, not before 1700000010.0"),
    (409, b'{"stream": "a", "events": [{"type": 1, "time": 3e9}, {"type": 1, "time": 2e9}]}', "before 3000000000"),
]  # fmt: skip


@pytest.mark.parametrize(("status", "body", "reason"), BAD)
@run
async def test_bad_events_are_refused_with_the_reason_and_change_nothing(status, body, reason):
    async with Service() as service:
        await service.push("a", "login", 1.7e9 + 10)
        before = (await service.post("/predict", {"stream": "a"})).json()
        answer = await service.client.post("/push", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == status, answer.text
        assert re.search(reason, answer.json()["error"]), answer.text
        assert (await service.post("/predict", {"stream": "a"})).json() == before
        assert len((await service.client.get("/streams")).json()["streams"]) == 1


@run
async def test_questions_that_have_no_answer():
    async with Service() as service:
        answer = await service.post("/predict", {"stream": "x"})
        assert (answer.status_code, answer.json()["error"]) == (404, "stream: there is no 'x'; push an event first")
        await service.push("a", "login", 1.7e9)
        answer = await service.post("/predict", {"stream": "a", "at": 1.6e9})
        assert answer.status_code == 409
        assert "not before 1700000000.0" in answer.json()["error"]
        assert (await service.client.get("/nothing")).json() == {
            "error": "GET /nothing: not found; expected /push, /predict, /streams, /live, /health, /metrics or /"
        }
        answer = await service.client.get("/push")
        assert (answer.status_code, answer.json()["error"]) == (405, "GET /push: method not allowed; expected POST")
        assert (await service.client.get("/live")).status_code == 422


@run
async def test_limits_of_size_type_and_number_of_streams():
    from ttr_gpu.serving.app import Limits

    async with Service(streams=2, limits=Limits(body_bytes=200)) as service:
        big = await service.push("a" * 190, "login", 1.0)
        assert big.status_code == 413
        assert "expected at most 200" in big.json()["error"]

        async def pieces():
            for _ in range(30):
                yield b" " * 10

        endless = await service.client.post("/push", content=pieces(), headers={"content-type": "application/json"})
        assert (endless.status_code, endless.json()["error"]) == (413, "body: got more than 200 bytes")
        form = await service.client.post("/push", content=b"{}", headers={"content-type": "text/plain"})
        assert form.status_code == 415
        assert (await service.push("a", "login", 1.0)).status_code == 200
        assert (await service.push("b", "login", 1.0)).status_code == 200
        full = await service.push("c", "login", 1.0)
        assert full.status_code == 429
        assert "there are 2 already" in full.json()["error"]
        await service.client.delete("/streams/a")
        assert (await service.push("c", "login", 1.0)).status_code == 200


@run
async def test_a_body_that_does_not_come_is_not_waited_for():
    from ttr_gpu.serving.app import Limits

    async with Service(limits=Limits(body_seconds=0.05)) as service:

        async def slow():
            yield b"{"
            await asyncio.sleep(30)

        answer = await service.client.post("/push", content=slow(), headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["error"]) == (408, "body: has not arrived within 0.05 s")


@run
async def test_a_token_is_needed_where_one_is_set():
    async with Service(token="correct horse") as service:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic correct horse"}):
            for path in ("/streams", "/metrics", "/live?stream=a"):
                answer = await service.client.get(path, headers=headers)
                assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert (await service.post("/push", {}, headers=headers)).status_code == 401
        right = {"authorization": "Bearer correct horse", "host": "example.org"}
        assert (await service.client.get("/streams", headers=right)).status_code == 200
        assert (await service.client.get("/health")).status_code == 200
        assert "<title>" in (await service.client.get("/")).text


@run
async def test_without_a_token_other_hosts_names_are_refused():
    """A page of another site could call a service on this machine under a name that it gave it (DNS rebinding)."""
    async with Service() as service:
        for host, status in (
            ("evil.example:8000", 421),
            ("127.0.0.1:8000", 200),
            ("[::1]:8000", 200),
            ("localhost", 200),
        ):
            assert (await service.client.get("/health", headers={"host": host})).status_code == status


@run
async def test_metrics_are_prometheus_text():
    from prometheus_client.parser import text_string_to_metric_families

    async with Service() as service:
        await service.push("a", "login", 1.0)
        await service.push("a", "login", 0.5)
        text = (await service.client.get("/metrics")).text
        samples = {
            (s.name, *sorted(s.labels.items())): s.value
            for family in text_string_to_metric_families(text) for s in family.samples
        }  # fmt: skip
        assert samples[("ttr_events_total",)] == 1
        assert samples[("ttr_streams",)] == 1
        assert samples[("ttr_requests_total", ("path", "/push"), ("status", "200"))] == 1
        assert samples[("ttr_requests_total", ("path", "/push"), ("status", "409"))] == 1
        assert samples[("ttr_request_seconds_count", ("path", "/push"))] == 2


@run
async def test_live_tells_of_events_as_they_come_and_ends_with_the_service():
    """Through the generator itself: an ASGI client without a network would wait for the end of the answer."""
    from starlette.requests import Request

    async with Service() as service:
        await service.push("a", "login", 1.7e9)
        from ttr_gpu.serving.app import Limits, Model, _Service
        from ttr_gpu.serving.metrics import Metrics

        inner = _Service(
            service.engine, Model("m", NAMES, 1.0), Metrics(), None, Limits(watchers=1), service.closing
        )  # fmt: skip
        asked = Request({"type": "http", "query_string": b"stream=a", "headers": [], "method": "GET", "path": "/live"})
        told = (await inner.live(asked)).body_iterator
        first = json.loads((await anext(told)).removeprefix("data: "))
        assert first["types"] == []
        await service.push("a", 1, 1.7e9 + 2.0)
        await service.push("b", 2, 1.7e9 + 2.0)
        second = json.loads((await anext(told)).removeprefix("data: "))
        assert (second["types"], second["times"]) == (["click"], [1.7e9 + 2.0])
        assert len(second["next"]["time"]["density"]["times"]) == len(second["next"]["time"]["density"]["values"]) > 50
        answer = await inner.guarded("/live", inner.live, True)(
            Request({**asked.scope, "headers": [(b"host", b"localhost")]})
        )
        assert answer.status_code == 503
        service.closing.set()
        assert [line async for line in told] in ([], [": still here\n\n"])
        assert inner.watchers == 0
        assert service.engine._watchers == {}


@run
async def test_a_model_that_does_not_say_when():
    async with Service(model=make_model(time_components=0)) as service:
        told = (await service.push("a", "login", 1.0, predict=True)).json()
        assert told["next"]["time"] is None
        assert len(told["next"]["types"]) == 4
