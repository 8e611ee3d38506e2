"""Requests that are computed together: order, isolation, fairness, patience, and an end that loses nothing."""

import asyncio
import errno
import os
import threading
import time

import numpy as np
import pytest
from service_at_hand import NAMES, events, make_model, warm_up

from ttr_gpu.infer.event_stream import EventStream, EventStreams, SavedStream
from ttr_gpu.serving.engine import SLICE, StreamEngine
from ttr_gpu.serving.refusal import Refusal
from ttr_gpu.serving.state import Keeper, load_streams


def serving(streams, test, **options):
    """Run `await test(engine)` beside the engine, and then close it."""

    warm_up()

    async def run():
        engine = StreamEngine(streams, **options)
        running = asyncio.create_task(engine.run())
        try:
            return await test(engine)
        finally:
            engine.close()
            await running

    return asyncio.run(asyncio.wait_for(run(), 60))


def make_streams(count, **changes):
    return EventStreams(make_model(**changes), count, names=NAMES, origin=1.7e9)


def test_no_stream_is_mixed_up_with_another():
    """Sixty clients at once, each with events of its own: every answer is that of a stream alone."""
    own = [events(int(15 + seed % 7), seed) for seed in range(60)]
    rounds = []

    async def client(engine, name, types, times):
        told = []
        for kind, when in zip(types, times, strict=True):
            told.append(await engine.push(name, [kind], [when], predict=True))
            await asyncio.sleep(0)
        return told

    async def test(engine):
        return await asyncio.gather(*(client(engine, f"stream {i}", *one) for i, one in enumerate(own)))

    answers = serving(make_streams(60), test, batch_done=lambda *one: rounds.append(one))
    for number, (types, times) in enumerate(own):
        alone = EventStream(make_model(), names=NAMES, origin=1.7e9)
        for kind, when, answer in zip(types, times, answers[number], strict=True):
            alone.push(kind, when)
            assert answer.stream == f"stream {number}"
            assert answer.last_time == when
            np.testing.assert_allclose(answer.next.types, alone.next().types, rtol=1e-5)
            np.testing.assert_allclose(
                answer.next.quantiles([0.5]) - when, alone.next().quantiles([0.5]) - when, rtol=1e-4
            )
        assert answers[number][-1].events == len(types)
    # They were computed together.
    assert max(requests for requests, _, _ in rounds) > 20


def test_requests_of_one_stream_keep_their_order():
    async def test(engine):
        waiting = [engine.push("a", [number % 4], [1.7e9 + number]) for number in range(30)]
        waiting.insert(10, engine.predict("a"))
        return await asyncio.gather(*waiting)

    answers = serving(make_streams(1), test)
    events_then = [answer.events for answer in answers]
    assert events_then == [*range(1, 11), 10, *range(11, 31)]


def test_a_long_request_holds_nobody_up():
    types, times = events(20 * SLICE)
    done = []

    async def long(engine):
        await engine.push("long", types, times)
        done.append("long")

    async def short(engine):
        await engine.push("short", ["login"], [1.7e9])
        done.append("short")

    async def test(engine):
        await asyncio.gather(long(engine), short(engine))
        return engine.describe("long").events

    assert serving(make_streams(2), test) == 20 * SLICE
    assert done == ["short", "long"]


def test_one_bad_request_does_not_harm_its_neighbours():
    async def test(engine):
        return await asyncio.gather(
            engine.push("a", ["login"], [1.7e9]), engine.push("b", ["nothing"], [1.7e9]),
            engine.push("c", ["login"], [float("nan")]), engine.predict("d"), engine.push("e", ["buy"], [1.7e9]),
            return_exceptions=True,
        )  # fmt: skip

    a, b, c, d, e = serving(make_streams(3), test)
    assert (a.events, e.events) == (1, 1)
    assert [each.status for each in (b, c, d)] == [422, 422, 404]
    # "b" and "c" have taken no places: there were three.


def test_a_defect_is_told_and_the_service_lives_on(monkeypatch):
    streams = make_streams(1)

    async def test(engine):
        with monkeypatch.context() as patch:
            patch.setattr(streams, "push", lambda *arguments: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                await engine.push("a", ["login"], [1.7e9])
        # Its place is free again.
        return await engine.push("b", ["login"], [1.7e9])

    assert serving(streams, test).events == 1


def test_who_waits_too_long_is_refused_and_nothing_is_taken(monkeypatch):
    streams, whole = make_streams(2), EventStreams.push

    def slow(self, *arguments):
        time.sleep(0.3)
        return whole(self, *arguments)

    monkeypatch.setattr(EventStreams, "push", slow)

    async def test(engine):
        first = engine.push("a", ["login"], [1.7e9])
        second = engine.push("a", ["login"], [1.7e9 + 1])
        return await asyncio.gather(first, second, return_exceptions=True), engine.describe("a").events

    (first, second), count = serving(streams, test, patience=0.1)
    assert first.events == count == 1
    assert isinstance(second, Refusal)
    assert (second.status, "nothing was taken" in second.reason) == (503, True)


def test_no_more_wait_than_may():
    async def test(engine):
        waiting = [engine.push("a", ["login"], [1.7e9 + number]) for number in range(5)]
        return await asyncio.gather(*waiting, return_exceptions=True)

    answers = serving(make_streams(1), test, most_waiting=3)
    assert [isinstance(answer, Refusal) for answer in answers] == [False] * 3 + [True] * 2


def test_who_has_gone_away_is_not_served():
    streams = make_streams(1)

    async def test(engine):
        gone = asyncio.ensure_future(engine.push("a", ["login"], [1.7e9]))
        await asyncio.sleep(0)
        gone.cancel()
        return await engine.push("a", ["login"], [1.6e9])

    assert serving(streams, test).last_time == 1.6e9


def test_closing_answers_what_waits_and_takes_no_more():
    async def run():
        engine = StreamEngine(make_streams(1))
        running = asyncio.create_task(engine.run())
        waiting = [asyncio.ensure_future(engine.push("a", ["login"], [1.7e9 + n])) for n in range(20)]
        await asyncio.sleep(0)
        engine.close()
        with pytest.raises(Refusal, match="shutting down"):
            await engine.push("a", ["login"], [1.8e9])
        answers = await asyncio.gather(*waiting)
        await running
        return answers[-1].events

    assert asyncio.run(asyncio.wait_for(run(), 60)) == 20


def test_watchers_hear_of_their_stream_alone_and_lose_the_oldest_first():
    async def test(engine):
        heard = engine.watch("a")
        for number in range(300):
            await engine.push("a", [number % 4], [1.7e9 + number])
        await engine.push("b", ["login"], [1.7e9])
        engine.unwatch("a", heard)
        await engine.push("a", ["login"], [1.8e9])
        return [heard.get_nowait() for _ in range(heard.qsize())]

    heard = serving(make_streams(2), test)
    assert heard[-1].times == [1.7e9 + 299]
    assert len(heard) == 256
    assert {seen.stream for seen in heard} == {"a"}


def test_the_loop_stays_free_while_the_model_computes(monkeypatch):
    streams, whole, threads = make_streams(1), EventStreams.push, set()

    def watched(self, *arguments):
        threads.add(threading.current_thread())
        return whole(self, *arguments)

    monkeypatch.setattr(EventStreams, "push", watched)

    async def test(engine):
        await engine.push("a", ["login"], [1.7e9])

    serving(streams, test)
    assert threading.main_thread() not in threads


def saved(folder, streams, rings):
    """All these streams, in a folder."""
    engine = StreamEngine(streams, names=rings)
    engine.changed = set(rings)
    keeper = Keeper(folder, engine, 0, print)
    asyncio.run(keeper.save())
    assert keeper.failure is None


def test_all_streams_are_saved_and_come_back(tmp_path):
    streams = make_streams(4)
    own = {name: events(5 + seed, seed) for seed, name in enumerate(("a", "b/../c", "long " * 30))}

    async def fill(engine):
        keeper = Keeper(tmp_path, engine, 0, print)
        for name, (types, times) in own.items():
            await engine.push(name, types, times)
        await engine.push("gone", ["login"], [1.7e9])
        await keeper.save()
        assert len(list(tmp_path.iterdir())) == 4
        engine.forget("gone")
        await keeper.save()
        assert keeper.count == 3
        return dict(engine.rings)

    rings = serving(streams, fill)
    assert len(list(tmp_path.iterdir())) == 3
    again = make_streams(3)
    names = load_streams(tmp_path, again)
    assert set(names) == set(own)

    async def ask(engine):
        return {name: await engine.predict(name) for name in own}

    answers = serving(again, ask, names=names)
    for name, (types, times) in own.items():
        assert (answers[name].events, answers[name].last_time) == (len(types), times[-1])
        np.testing.assert_array_equal(answers[name].next.types, streams.next([rings[name]])[0])


def test_only_what_has_changed_is_written_and_never_the_middle_of_a_request(tmp_path, monkeypatch):
    """Saved again and again while a long request is under way: its stream's file has none of it, and then all of it."""
    monkeypatch.setattr("ttr_gpu.serving.state._COPIED", 1)
    streams, long = make_streams(3), events(30 * SLICE)
    written = []
    write = SavedStream.write
    monkeypatch.setattr(SavedStream, "write", lambda copy, path: (written.append(copy), write(copy, path)))

    async def test(engine):
        keeper = Keeper(tmp_path, engine, 0.002, print)
        keeping = asyncio.create_task(keeper.run())
        await engine.push("a", ["login"], [1.7e9])
        await engine.push("b", *long)
        for number in range(5):
            await engine.push("c", ["login"], [1.7e9 + number])
        keeper.end()
        await keeping
        assert keeper.failure is None

    serving(streams, test)
    lengths = [(copy.metadata["name"], int(copy.metadata["length"])) for copy in written]
    assert {length for name, length in lengths if name == "b"} == {len(long[0])}
    assert lengths.count(("a", 1)) == 1, "it has not changed since"
    assert [length for name, length in lengths if name == "c"][-1] == 5
    again = make_streams(3)
    found = {name: again.length(ring) for name, ring in load_streams(tmp_path, again).items()}
    assert found == {"a": 1, "b": len(long[0]), "c": 5}


def test_a_folder_that_cannot_be_written_is_said_once_and_tried_again(tmp_path, monkeypatch):
    said, full, write = [], [True], SavedStream.write

    def writing(copy, path):
        if full[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(copy, path)

    monkeypatch.setattr(SavedStream, "write", writing)

    async def test(engine):
        keeper = Keeper(tmp_path, engine, 0.01, said.append)
        keeping = asyncio.create_task(keeper.run())
        await engine.push("a", ["login"], [1.7e9])
        while keeper.failure is None:
            await asyncio.sleep(0.001)
        await engine.push("a", ["click"], [1.7e9 + 1])  # the service goes on
        assert list(tmp_path.iterdir()) == []
        full[0] = False
        while not list(tmp_path.glob("*.stream")):
            await asyncio.sleep(0.001)
        keeper.end()
        await keeping
        return keeper.failure

    assert serving(make_streams(1), test) is None
    failures = [line for line in said if "No space left" in line]
    assert len(failures) == 1
    assert failures[0].startswith(f"--state {tmp_path}: streams not saved: ")
    again = make_streams(1)
    assert again.length(load_streams(tmp_path, again)["a"]) == 2


def test_states_that_do_not_fit_are_refused(tmp_path):
    from ttr_gpu.errors import UserError

    streams = make_streams(2)
    streams.push([0, 1], [1, 1], [1.7e9, 1.7e9])
    saved(tmp_path, streams, {"a": 0, "b": 1})
    with pytest.raises(UserError, match="holds 2 streams, more than the limit of 1; set --streams 2"):
        load_streams(tmp_path, make_streams(1))
    with pytest.raises(UserError, match="of another model"):
        load_streams(tmp_path, EventStreams(make_model(seed=9), 2, names=NAMES))
    next(tmp_path.iterdir()).write_bytes(b"half")
    with pytest.raises(UserError, match="cannot be read"):
        load_streams(tmp_path, make_streams(2))


def test_who_has_gone_away_takes_no_place():
    async def test(engine):
        gone = asyncio.ensure_future(engine.push("a", ["login"], [1.7e9]))
        await asyncio.sleep(0)
        gone.cancel()
        return await engine.push("b", ["login"], [1.7e9])

    assert serving(make_streams(1), test).events == 1
