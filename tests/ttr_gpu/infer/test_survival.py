"""The window of observation: the survival term by hand, the first event scored, and windows that cannot be."""

import json
import math

import numpy as np
import pytest

from ttr_gpu.config import ModelConfig
from ttr_gpu.data.batches import Batch
from ttr_gpu.data.dataset import open_dataset
from ttr_gpu.data.options import PreprocessOptions
from ttr_gpu.data.preprocess import preprocess
from ttr_gpu.data.splits import SplitOptions
from ttr_gpu.errors import UserError
from ttr_gpu.infer.evaluation import evaluate_in_detail
from ttr_gpu.infer.floors import event_floors, gap_floors
from ttr_gpu.model import TransformerModel

START, END = 100.0, 200.0


def rows(sequences=40):
    rng = np.random.default_rng(0)
    lines = ["sequence,time,type"]
    for s in range(sequences):
        times = START + np.cumsum(rng.exponential(6.0, 40))
        lines += [f"{s},{time!r},{rng.integers(3)}" for time in times[times < END].tolist()]
    return "\n".join(lines)


def make(folder, content=None, **options):
    (folder / "in.csv").write_text(content or rows())
    preprocess(
        PreprocessOptions([str(folder / "in.csv")], folder / "data.zarr", **options), lambda line: None
    )  # fmt: skip
    return open_dataset(folder / "data.zarr")


def model_for(dataset, **changes):
    config = ModelConfig(
        vocabulary_size=dataset.vocabulary_size, embed_dim=16, hidden_dim=16, num_layers=1, num_heads=2,
        time_components=3, time_log_mean=1.5, **changes,
    )  # fmt: skip
    model = TransformerModel(config, seed=1)
    model.time_head.weight.value *= 20
    return model


@pytest.mark.parametrize("given_type", [False, True])
@pytest.mark.parametrize("max_length", [256, 7])
def test_the_survival_term_is_that_of_each_sequence(tmp_path, max_length, given_type):
    dataset = make(tmp_path, observation=f"{START},{END}")
    split, model = dataset.split("test"), model_for(dataset, time_given_type=given_type)
    assert split.observed_until == pytest.approx(END - dataset.origin)
    options = {"tokens_per_batch": 64, "max_length": max_length}
    plain, with_term = (evaluate_in_detail(model, split, **options, survival=each) for each in (False, True))
    nats = 0.0
    for begin, end in zip(split.offsets[:-1], split.offsets[1:], strict=True):
        tokens, times = split.read(max(begin, end - max_length), end)
        count = len(tokens)
        none = np.full(count, -1, np.int32)
        alone = Batch(tokens, times, np.array([0, count], np.int32), none, times, none[:1], none[:1], 0, 0)
        last = model.next_gap(model.outputs(alone)[-1:])
        nats -= math.log(1 - float(last.cdf(np.array([END - dataset.origin - times[-1]]))[0]))
    assert with_term.survival == pytest.approx(nats / with_term.tokens, rel=1e-4)
    assert plain.survival is None
    assert with_term.nll == pytest.approx(plain.nll + with_term.survival, rel=1e-9)
    assert "no survival term" in plain.protocol
    assert "with the survival term up to the end of observation" in with_term.protocol


def test_survival_of_the_floors(tmp_path):
    dataset = make(tmp_path, observation=f",{END}")
    split = dataset.split("test")
    times = split.read(0, split.token_count)[1]
    ages = END - dataset.origin - times[split.offsets[1:] - 1]
    train = dataset.split("train")
    gaps = np.delete(np.diff(train.read(0, train.token_count)[1]), train.offsets[1:-1] - 1)
    log_normal, exponential = gap_floors(train, split, 0.5)
    scored = split.token_count - split.sequences
    assert exponential.survival == pytest.approx(ages.sum() / gaps.mean() / scored, rel=1e-9)
    z = (np.log(ages) - np.log(gaps).mean()) / np.log(gaps).std()
    expected = -sum(math.log(0.5 * math.erfc(each / math.sqrt(2))) for each in z) / scored
    assert log_normal.survival == pytest.approx(expected, rel=1e-9)


def test_the_first_event_is_scored_from_the_start_of_observation(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    plain, first = make(tmp_path / "a"), make(tmp_path / "b", observation=f"{START},", score_first=True)
    assert first.vocabulary == [*plain.vocabulary, "<s>"]
    assert (plain.event_types, first.event_types) == (3, 3)
    before, after = plain.split("test"), first.split("test")
    results = [evaluate_in_detail(model_for(d), s, tokens_per_batch=64, max_length=64) for d, s in
               ((plain, before), (first, after))]  # fmt: skip
    assert results[0].tokens == before.token_count - before.sequences
    assert results[1].tokens == before.token_count, "every event"
    assert "first event of a sequence not scored" in results[0].protocol
    assert "first event of a sequence scored from the start of observation" in results[1].protocol
    tokens, times = after.read(0, after.token_count)
    np.testing.assert_array_equal(tokens[after.offsets[:-1]], 3)
    assert (np.delete(tokens, after.offsets[:-1]) < 3).all()
    # The gap of a first event is the time since the start.
    own = before.read(0, before.token_count)[1][before.offsets[:-1]] + plain.origin - START
    np.testing.assert_allclose(times[after.offsets[:-1] + 1] - times[after.offsets[:-1]], own, rtol=1e-12)
    floors = event_floors(first.split("train"), after, first.vocabulary_size)
    assert 0.9 < floors[0].value < 1.3, "three types, about equally likely"


def test_a_data_set_without_a_window_has_the_fingerprint_it_had(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    plain, windowed = make(tmp_path / "a"), make(tmp_path / "b", observation=f"{START},{END}")
    assert "observation" not in plain.attributes
    assert plain.split("test").observed_until is None
    assert plain.fingerprint != windowed.fingerprint
    assert json.loads(json.dumps(windowed.attributes["observation"])) == pytest.approx(
        [START - windowed.origin, END - windowed.origin]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"observation": "100"}, r"--observation: got '100'; expected START,END"),
        ({"observation": ","}, r"--observation: got ','; expected START,END"),
        ({"observation": "200,100"}, r"expected START,END in ascending order"),
        ({"observation": "soon,100"}, r"--observation: got 'soon,100'"),
        ({"score_first": True}, r"--score-first: needs the start of observation"),
        ({"observation": ",200", "score_first": True}, r"--score-first: needs the start of observation"),
        (
            {"observation": "100,200", "split": SplitOptions(times="120,150")},
            "--observation: cannot be combined with --split-time",
        ),
        ({"observation": "100,150"}, r"in\.csv:\d+: time [\d.]+ is outside the window of observation"),
        ({"observation": "103,"}, r"in\.csv:\d+: time [\d.]+ is outside the window of observation"),
    ],
)
def test_windows_that_cannot_be(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        make(tmp_path, **options)


def test_a_type_of_the_name_of_the_start(tmp_path):
    with pytest.raises(UserError, match=r"--score-first: an event type is called '<s>'"):
        make(tmp_path, "sequence,time,type\n" + "a,1,<s>\na,2,x\nb,1,x\n", observation="0,", score_first=True)


def test_survival_needs_an_end_and_a_time_head(tmp_path):
    dataset = make(tmp_path)
    with pytest.raises(UserError, match=r"--survival: .* does not say when observation ended; preprocess it with"):
        evaluate_in_detail(model_for(dataset), dataset.split("test"), tokens_per_batch=64, max_length=64, survival=True)
    (tmp_path / "b").mkdir()
    windowed = make(tmp_path / "b", observation=f",{END}")
    untimed = TransformerModel(ModelConfig(vocabulary_size=3, embed_dim=16, hidden_dim=16, num_layers=1, num_heads=2))
    with pytest.raises(UserError, match=r"--survival: this model does not model time"):
        evaluate_in_detail(untimed, windowed.split("test"), tokens_per_batch=64, max_length=64, survival=True)
