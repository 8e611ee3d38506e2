"""Streams of events: what they predict beside the full forward, many at once, saved and loaded, and bad events."""

import numpy as np
import pytest

from ttr_gpu.config import ModelConfig
from ttr_gpu.errors import UserError
from ttr_gpu.infer.event_stream import EventStream, EventStreams
from ttr_gpu.model import TransformerModel

NAMES = ["a", "b", "c", "d", "e"]


def make_model(seed=0, **changes):
    fields = {
        "vocabulary_size": 5, "embed_dim": 16, "hidden_dim": 24, "num_layers": 2, "num_heads": 2, "window": 6,
        "time_features_dim": 6, "time_scale": 3.0, "time_span": 500.0,
    }  # fmt: skip
    model = TransformerModel(ModelConfig(**{**fields, **changes}), seed=seed)
    model.flat.values[...] *= 3.0
    return model


def events(count, seed=0, origin=0.0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 5, count).astype(np.int32), origin + np.cumsum(rng.exponential(3.0, count))


class Sequence:
    def __init__(self, tokens, times):
        self.tokens, self.times = tokens, times
        self.cu_seqlens, self.targets = np.array([0, len(tokens)], np.int32), np.full(len(tokens), -1, np.int32)


def full_forward(model, types, times):
    logits = model.logits(Sequence(types, times)).astype(np.float64)
    return np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))


def test_it_predicts_what_the_full_forward_predicts():
    model, (types, times) = make_model(), events(40)
    expected = full_forward(model, types, times)
    stream = EventStream(model, names=NAMES, origin=1.7e9)
    for kind, time, probabilities in zip(types, times, expected, strict=True):
        stream.push(NAMES[kind] if kind % 2 else int(kind), 1.7e9 + time)
        np.testing.assert_allclose(stream.next().types, probabilities, atol=1e-5)
        np.testing.assert_array_equal(stream.next().types, stream.next().types)


def test_streams_are_not_mixed_up():
    """Events of 30 streams in a random order of arrival, in pushes of random sizes."""
    model, rng = make_model(), np.random.default_rng(1)
    own = [events(int(rng.integers(1, 25)), seed) for seed in range(30)]
    order = rng.permutation(np.repeat(np.arange(30), [len(types) for types, _ in own]))
    number = np.array([np.count_nonzero(order[:i] == stream) for i, stream in enumerate(order)])
    types = np.array([own[s][0][n] for s, n in zip(order, number, strict=True)])
    times = np.array([own[s][1][n] for s, n in zip(order, number, strict=True)])
    streams = EventStreams(model, 30)
    before = streams.cache.bytes
    begin = 0
    while begin < len(order):
        end = begin + int(rng.integers(1, 60))
        streams.push(order[begin:end], types[begin:end], times[begin:end])
        begin = end
    assert streams.cache.bytes == before
    expected = [full_forward(model, *one)[-1] for one in own]
    np.testing.assert_allclose(streams.next(), expected, atol=1e-5)
    np.testing.assert_allclose(streams.next([7, 3]), [expected[7], expected[3]], atol=1e-5)


def test_thousands_of_streams_at_once():
    streams = EventStreams(make_model(), 3000)
    everyone = np.arange(3000)
    for step in range(3):
        streams.push(everyone, everyone % 5, np.full(3000, float(step)))
    answers = streams.next()
    assert answers.shape == (3000, 5)
    # The same event each time in every fifth stream: the same answer.
    np.testing.assert_allclose(answers[5:], answers[:-5], atol=1e-6)


@pytest.mark.parametrize("pushed", [1, 4, 6, 23])
def test_a_saved_stream_goes_on_to_the_bit(tmp_path, pushed):
    model, (types, times) = make_model(), events(40)
    first, second = EventStream(model), EventStreams(model, 3)
    for kind, time in zip(types[:pushed], times, strict=False):
        first.push(kind, time)
    first.save(tmp_path / "stream")
    # Where it is loaded another stream was before.
    second.push([2] * 9, [0] * 9, np.arange(9.0) + 1e6)
    second.load(tmp_path / "stream", 2)
    np.testing.assert_array_equal(second.next([2])[0], first.next().types)
    for kind, time in zip(types[pushed:], times[pushed:], strict=True):
        first.push(kind, time)
        second.push([2], [kind], [time])
        np.testing.assert_array_equal(second.next([2])[0], first.next().types)
    assert [path.name for path in tmp_path.iterdir()] == ["stream"]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_streams_of_low_precision_are_saved_too(tmp_path, precision):
    model = make_model(precision=precision)
    first, second = EventStream(model), EventStream(model)
    first.push(3, 1.0)
    first.save(tmp_path / "stream")
    second.load(tmp_path / "stream")
    np.testing.assert_array_equal(second.next().types, first.next().types)


@pytest.mark.parametrize("sizes", [(9, 3, 28), (40,), (1, 39)])
def test_many_events_at_once_are_read_as_a_prompt_is(sizes):
    model, (types, times) = make_model(), events(40)
    expected = full_forward(model, types, times)
    streams, begin = EventStreams(model, 3), 0
    for size in sizes:
        end = begin + size
        # Beside another stream with few, which comes out as if it were alone.
        streams.push([2] * size + [0], [*types[begin:end], 1], [*times[begin:end], float(begin)])
        np.testing.assert_allclose(streams.next([2])[0], expected[end - 1], atol=1e-5)
        begin = end
    alone, begin = EventStream(model), 0
    for size in sizes:
        alone.push(1, float(begin))
        begin += size
    np.testing.assert_array_equal(streams.next([0])[0], alone.next().types)


def test_it_says_when_given_what_is_known():
    model, origin = make_model(time_components=3), 1.7e9
    types, times = events(12)
    stream = EventStream(model, origin=origin)
    for kind, time in zip(types, times, strict=True):
        stream.push(kind, origin + time)
    last = float(times[-1]) + origin
    gap = model.next_gap(model.outputs(Sequence(types, times))[-1:])
    following = stream.next()
    assert (following.last_time, following.at) == (last, last)
    # A float64 time of today steps by 2e-7 s.
    np.testing.assert_allclose(following.quantiles([0.1, 0.5]) - last, gap.quantile(np.array([0.1, 0.5])), rtol=1e-4)
    # Later, with nothing come: what was before is ruled out, and the rest is as likely as it was beside each other.
    later = stream.next(at=last + 4.0)
    rest = 1 - gap.cdf(np.array([4.0]))
    wanted = 1 - 0.5 * rest
    np.testing.assert_allclose(later.quantiles([0.5]) - last, gap.quantile(wanted), rtol=1e-4)
    grid = last + np.array([1.0, 4.0, 4.5, 9.0])
    density = later.density(grid)
    assert density[:2].tolist() == [0.0, 0.0]
    np.testing.assert_allclose(density[2:], gap.pdf(grid[2:] - last) / rest, rtol=1e-4)
    fine = last + 4.0 + np.geomspace(1e-4, 1e7, 20_000)
    np.testing.assert_allclose(np.trapezoid(later.density(fine), fine), 1.0, atol=0.01)
    with pytest.raises(ValueError, match=r"at: got .* not before"):
        stream.next(at=last - 1.0)
    silent = EventStream(make_model())
    silent.push(1, 0.0)
    assert silent.next().gap is None
    with pytest.raises(ValueError, match="does not say when"):
        silent.next().quantiles([0.5])


def test_files_that_are_no_stream_of_this_model_are_refused(tmp_path):
    stream = EventStream(make_model())
    stream.push(1, 1.0)
    stream.save(tmp_path / "stream")
    with pytest.raises(UserError, match="is a stream of another model"):
        EventStream(make_model(seed=1)).load(tmp_path / "stream")
    (tmp_path / "text").write_text("hello")
    for name in ("text", "absent"):
        with pytest.raises(UserError, match=f"{name}: cannot be read"):
            stream.load(tmp_path / name)
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(3)}, tmp_path / "other")
    with pytest.raises(UserError, match="is no saved stream"):
        stream.load(tmp_path / "other")


def test_a_cleared_stream_begins_anew():
    model, (types, times) = make_model(), events(5)
    used, fresh = EventStream(model), EventStream(model)
    used.push(2, 1e9)
    used.clear()
    with pytest.raises(ValueError, match="stream 0: has no event yet; push one first"):
        used.next()
    for kind, time in zip(types, times, strict=True):
        used.push(kind, time)
        fresh.push(kind, time)
        np.testing.assert_array_equal(used.next().types, fresh.next().types)


@pytest.mark.parametrize(
    ("streams", "types", "times", "error", "message"),
    [
        ([0], [5], [11.0], ValueError, r"types: got 5, expected 0 \.\. 4"),
        ([0], [1.5], [11.0], ValueError, r"types: got 1\.5"),
        ([0], ["f"], [11.0], UserError, "no event type 'f'"),
        ([0], [None], [11.0], ValueError, "types: got None, expected the name or the number of an event type"),
        ([2], [1], [11.0], ValueError, r"streams: got 2, expected 0 \.\. 1"),
        ([0], [1], [9.0], ValueError, r"times: got 9\.0 in stream 0, expected a finite time, not before 10\.0"),
        ([1, 1], [1, 1], [11.0, 10.5], ValueError, r"times: got 10\.5 in stream 1, .*not before 11\.0"),
        ([0], [1], [np.nan], ValueError, "times: got nan in stream 0, expected a finite time"),
        ([1], [1], [np.inf], ValueError, "times: got inf in stream 1, expected a finite time$"),
        ([0, 1], [1], [11.0], ValueError, "streams, types, times: got shapes"),
    ],
)
def test_bad_events_are_refused_and_change_nothing(streams, types, times, error, message):
    both = EventStreams(make_model(), 2, names=NAMES, origin=8.0)
    both.push([0], [1], [10.0])
    before = both.next([0])
    with pytest.raises(error, match=message):
        both.push([*streams, 0], [*types, 1], [*times, 1e6])
    assert both.cache.lengths.tolist() == [1, 0]
    np.testing.assert_array_equal(both.next([0]), before)


def test_without_a_window_a_full_stream_refuses_all_of_a_push():
    streams = EventStreams(make_model(window=None), 2, capacity=3)
    streams.push([0, 0], [1, 1], [1.0, 2.0])
    with pytest.raises(ValueError, match="capacity of 3"):
        streams.push([1, 0, 0], [1, 1, 1], [3.0, 3.0, 4.0])
    assert streams.cache.lengths.tolist() == [2, 0]
    streams.push([0], [1], [3.0])


def test_a_number_is_a_name_where_types_are_called_by_numbers():
    streams = EventStreams(make_model(), 2, names=["10", "2", "1"])
    streams.push([0, 1], [2, "2"], [1.0, 1.0])
    np.testing.assert_array_equal(*streams.next())
    with pytest.raises(UserError, match=r"no event type 7; there are '10', '2', '1'$"):
        streams.push([0], [7], [2.0])


def test_a_model_with_room_for_more_types_tells_of_those_there_are():
    streams = EventStreams(make_model(), 1, names=["login", "click"])
    streams.push([0], ["click"], [1.0])
    (probabilities,) = streams.next()
    assert probabilities.shape == (2,)
    assert probabilities.sum() == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"types: got 2, expected 0 \.\. 1"):
        streams.push([0], [2], [2.0])
