"""Prediction: sampled futures follow the model's own distributions, whatever is drawn beside them."""

import math

import numpy as np
import pytest
from model_batches import Packed

from ttr_gpu.config import ModelConfig
from ttr_gpu.errors import UserError
from ttr_gpu.infer import prediction
from ttr_gpu.infer.fan_chart import draw_fan_chart
from ttr_gpu.infer.histories import History
from ttr_gpu.infer.prediction import Predictor, parse_quantiles
from ttr_gpu.model import TransformerModel

NAMES = ["a", "b", "c"]
ORIGIN = 1_700_000_000.0


def make_model(spread=0.3, **changes):
    """A model of random weights, whose gaps and types depend on the history."""
    config = {
        "embed_dim": 16, "hidden_dim": 32, "num_layers": 2, "num_heads": 2, "time_components": 3, "time_log_mean": 1.0,
        "time_log_std": 0.8, "time_scale": 3.0, "time_span": 100.0,
    }  # fmt: skip
    model = TransformerModel(ModelConfig(vocabulary_size=len(NAMES), **{**config, **changes}), seed=3)
    rng = np.random.default_rng(5)
    for p in (model.time_head.weight, model.head.weight):
        p.value[...] = rng.normal(0, spread, p.value.shape)
    model.values_changed()
    return model


def history(events=6):
    times = ORIGIN + np.cumsum(np.random.default_rng(1).exponential(3.0, events))
    return History("x", np.array([0, 2, 1, 0, 1, 2] * events, np.int32)[:events], times)


def uniform_enough(values):
    """Kolmogorov and Smirnov's statistic of values in [0, 1], at a level of about 1e-4."""
    ordered = np.sort(values)
    n = len(ordered)
    distance = np.maximum(np.arange(1, n + 1) / n - ordered, ordered - np.arange(n) / n).max()
    return distance < 2.2 / math.sqrt(n)


def test_futures_follow_the_distributions_of_a_forward_over_the_whole_sequence():
    model, past = make_model(), history()
    futures = Predictor(model, 3, origin=ORIGIN).predict(past, horizon=60.0, samples=80, seed=7).futures
    ranks, surprises = [], []
    for future in futures:
        assert (np.diff(np.concatenate((past.times[-1:], future.times))) >= 0).all()
        tokens = np.concatenate((past.types, future.types))
        times = np.concatenate((past.times, future.times)) - ORIGIN
        starts = np.array([0, len(tokens)], np.int32)
        outputs = model.outputs(Packed(tokens, times, starts, tokens, times))[len(past.times) - 1 : -1]
        if not len(outputs):
            continue
        ranks.append(model.next_gap(outputs).cdf(np.diff(times)[len(past.times) - 1 :]))
        logits = model.next_logits(outputs).astype(np.float64)
        chances = np.exp(logits - logits.max(axis=1, keepdims=True))
        chances /= chances.sum(axis=1, keepdims=True)
        drawn = np.eye(3)[future.types]
        surprises.append(drawn - chances)
    # What is beyond the horizon is not drawn, so short gaps outweigh late ones: only of what comes early.
    early = np.concatenate([rank[:4] for rank in ranks])
    assert len(early) > 250
    assert uniform_enough(early)
    total = np.concatenate(surprises)
    assert (np.abs(total.sum(axis=0)) < 4 * np.sqrt((total**2).sum(axis=0))).all()


def test_the_next_event_is_what_futures_begin_with():
    predictor = Predictor(make_model(), 3, origin=ORIGIN)
    result = predictor.predict(history(), horizon=1e4, samples=1500, max_events=1, quantiles=(0.1, 0.5, 0.9))
    first = np.array([future.times[0] for future in result.futures])
    for share, moment in result.time_quantiles.items():
        assert abs((first <= moment).mean() - share) < 4 * math.sqrt(share * (1 - share) / 1500)
    kinds = np.bincount([future.types[0] for future in result.futures], minlength=3) / 1500
    np.testing.assert_allclose(kinds, result.type_probabilities, atol=0.06)
    assert all(future.cut for future in result.futures)


def test_a_wait_conditions_the_first_gap():
    model, past = make_model(), history()
    wait = 4.0
    now = float(past.times[-1]) + wait
    result = Predictor(model, 3, origin=ORIGIN).predict(past, horizon=1e4, samples=800, now=now, max_events=1)
    first = np.array([future.times[0] for future in result.futures])
    assert (first >= now).all()
    starts = np.array([0, len(past.times)], np.int32)
    outputs = model.outputs(Packed(past.types, past.times - ORIGIN, starts, past.types, past.times - ORIGIN))[-1:]
    gap = model.next_gap(outputs)
    survival = 1 - float(gap.cdf(np.array([wait]))[0])
    assert result.survival == pytest.approx(survival, rel=1e-6)
    below = gap[np.zeros(800, np.int64)].cdf(first - past.times[-1])
    assert uniform_enough((below - (1 - survival)) / survival)
    for share, moment in result.time_quantiles.items():
        at = float(gap.cdf(np.array([moment - past.times[-1]]))[0])
        assert (at - (1 - survival)) / survival == pytest.approx(share, abs=1e-6)


def test_a_sample_does_not_depend_on_those_beside_it(monkeypatch):
    predictor, past = Predictor(make_model(), 3, origin=ORIGIN), history()
    many = predictor.predict(past, horizon=40.0, samples=30, seed=2).futures
    few = predictor.predict(past, horizon=40.0, samples=4, seed=2).futures
    # Room for few of them at once: drawn in several groups.
    monkeypatch.setattr(prediction, "_CACHE_BYTES", 3 * predictor.model.new_cache(1, 6 + 256).bytes)
    grouped = predictor.predict(past, horizon=40.0, samples=30, seed=2).futures
    for a, b in [*zip(many, few, strict=False), *zip(many, grouped, strict=True)]:
        np.testing.assert_allclose(a.times, b.times, rtol=0, atol=1e-3)
        np.testing.assert_array_equal(a.types, b.types)
    other = predictor.predict(past, horizon=40.0, samples=4, seed=3).futures
    assert not np.array_equal(other[0].times, few[0].times)


def test_counts_of_a_renewal_process():
    # Weights of zero: every gap has the same distribution, whatever happened before.
    model = make_model(spread=0.0)
    result = Predictor(model, 3, origin=ORIGIN).predict(history(), horizon=50.0, samples=400, seed=1)
    gap = model.next_gap(np.zeros((400 * 64, 16), np.float32))
    gaps = gap.sample(seed=11).reshape(400, 64)
    expected = (np.cumsum(gaps, axis=1) <= 50.0).sum(axis=1)
    drawn = result.counts(np.array([result.end]))[:, 0]
    deviation = math.sqrt((expected.var() + drawn.var()) / 400)
    assert abs(drawn.mean() - expected.mean()) < 4 * deviation
    np.testing.assert_allclose(result.expected_counts().sum(), drawn.mean())
    assert (np.diff(result.counts(np.linspace(result.now, result.end, 20)), axis=1) >= 0).all()


def test_a_long_history_is_read_from_where_the_context_begins():
    model, past = make_model(), history(30)
    short = History("x", past.types[-8:], past.times[-8:])
    a = Predictor(model, 3, origin=ORIGIN, context=8).predict(past, horizon=20.0, samples=3)
    b = Predictor(model, 3, origin=ORIGIN).predict(short, horizon=20.0, samples=3)
    assert a.time_quantiles == b.time_quantiles
    windowed = make_model(window=5)
    long = Predictor(windowed, 3, origin=ORIGIN).predict(past, horizon=300.0, samples=3)
    assert max(len(future.times) for future in long.futures) > 5


def test_a_record_says_what_is_in_it(tmp_path):
    result = Predictor(make_model(), 3, origin=ORIGIN).predict(history(), horizon=40.0, samples=20)
    record = result.record(NAMES, (0.5, 0.9))
    assert record["id"] == "x"
    assert record["events"] == 6
    assert record["now"] == record["last_time"] == history().times[-1]
    assert record["end"] == record["now"] + 40.0
    assert list(record["next"]["time"].values()) == sorted(record["next"]["time"].values())
    assert sum(record["next"]["types"].values()) == pytest.approx(1.0)
    assert list(record["next"]["types"].values()) == sorted(record["next"]["types"].values(), reverse=True)
    assert len(record["futures"]) == 20
    sizes = sorted(len(future["times"]) for future in record["futures"])
    assert record["count"]["mean"] == pytest.approx(np.mean(sizes))
    assert record["count"]["0.5"] == sizes[9]
    assert sum(record["count"]["types"].values()) == pytest.approx(np.mean(sizes))
    picture = draw_fan_chart(tmp_path / "fan.png", result, NAMES, 1.0)
    assert picture.stat().st_size > 10_000
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"horizon": 0.0}, ValueError, "horizon"),
        ({"samples": 0}, ValueError, "samples"),
        ({"now": ORIGIN}, UserError, "now: .* not before that of the last event"),
        ({"now": 1e80}, UserError, "no probability"),
    ],
)
def test_what_cannot_be_predicted(given, error, message):
    with pytest.raises(error, match=message):
        Predictor(make_model(), 3, origin=ORIGIN).predict(history(), **{"horizon": 5.0, **given})


def test_a_model_without_a_time_head_is_refused():
    model = TransformerModel(ModelConfig(vocabulary_size=3, embed_dim=16, hidden_dim=32, num_layers=1, num_heads=2))
    with pytest.raises(UserError, match="does not know when"):
        Predictor(model, 3)


@pytest.mark.parametrize("text", ["", "0.5,x", "0,0.5", "0.5,1"])
def test_quantiles_that_are_none(text):
    with pytest.raises(UserError, match="--quantiles"):
        parse_quantiles(text)
