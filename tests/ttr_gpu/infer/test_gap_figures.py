"""Evaluation in detail: the likelihood of training, calibration that is found and found missing, ranks, a picture."""

import math

import numpy as np
import pytest
from test_batches import split_of
from test_evaluation import random_split

from ttr_gpu.config import ModelConfig
from ttr_gpu.data.dataset import Split
from ttr_gpu.errors import UserError
from ttr_gpu.infer.evaluation import evaluate_in_detail, evaluate_split
from ttr_gpu.infer.evaluation_plot import plot_evaluation
from ttr_gpu.infer.floors import event_floors, gap_floors
from ttr_gpu.infer.gap_figures import INTERVALS, GapScorer
from ttr_gpu.infer.ranks import TOP, ranks, top_shares
from ttr_gpu.model import TransformerModel
from ttr_gpu.nn.gap_distribution import GapDistribution


def mixtures(rows, seed=0, components=3):
    rng = np.random.default_rng(seed)
    return GapDistribution(
        rng.standard_normal((rows, components)), 2 * rng.standard_normal((rows, components)),
        np.log(rng.uniform(0.2, 1.0, (rows, components))),
    )  # fmt: skip


def figures(distribution, gaps, step=None, parts=1):
    scorer = GapScorer(step)
    for rows in np.array_split(np.arange(len(gaps)), parts):
        scorer.add(distribution[rows], gaps[rows])
    return scorer.figures()


def test_samples_of_the_distribution_are_calibrated():
    distribution = mixtures(20_000)
    gaps = distribution.sample(seed=1)
    found = figures(distribution, gaps, parts=7)
    assert found.ks < found.ks_critical
    assert found.ks_critical == pytest.approx(1.358 / math.sqrt(20_000), rel=1e-3)
    np.testing.assert_allclose(found.pit, 0.05, atol=0.006)
    assert len(found.pit) == 20
    assert sum(found.pit) == pytest.approx(1.0)
    for share in INTERVALS:
        assert found.coverage[share] == pytest.approx(share, abs=0.012)


@pytest.mark.parametrize(("change", "wide"), [(1.0, True), (-1.0, False)])
def test_wrong_widths_are_found(change, wide):
    distribution = mixtures(5_000, components=1)
    gaps = distribution.sample(seed=1)
    wrong = GapDistribution(distribution.weight_logits, distribution.means, distribution.log_scales + change)
    found, right = figures(wrong, gaps), figures(distribution, gaps)
    assert found.ks > 5 * found.ks_critical
    assert (found.coverage[0.5] > 0.7) if wide else (found.coverage[0.5] < 0.3)
    assert found.nll > right.nll + 0.1
    # The median is the same: only its certainty is wrong.
    assert found.mae == pytest.approx(right.mae)


def test_figures_are_those_of_their_definitions():
    distribution, step = mixtures(300), 0.1
    gaps = np.maximum(np.round(distribution.sample(seed=3) / step), 1) * step
    found = figures(distribution, gaps, step=step, parts=4)
    errors = distribution.quantile(0.5) - gaps
    below = np.sort(distribution.cdf(gaps))
    steps = np.arange(301) / 300
    assert found.nll == pytest.approx(distribution.nll(gaps).mean(), rel=1e-12)
    assert found.dequantised_nll == pytest.approx(distribution.cell_nll(gaps, step).mean(), rel=1e-12)
    assert found.mae == pytest.approx(np.abs(errors).mean(), rel=1e-12)
    assert found.rmse == pytest.approx(np.sqrt((errors**2).mean()), rel=1e-12)
    assert found.ks == pytest.approx(max((steps[1:] - below).max(), (below - steps[:-1]).max()), abs=2e-4)


def test_the_plain_likelihood_of_a_grid_is_driven_up_and_the_dequantised_is_not():
    gaps = np.ones(100)
    narrow, wider = (
        GapDistribution(np.zeros((100, 1)), np.zeros((100, 1)), np.full((100, 1), math.log(sigma)))
        for sigma in (1e-6, 0.1)
    )
    assert figures(narrow, gaps).nll < figures(wider, gaps).nll - 10
    assert figures(narrow, gaps, step=1.0).dequantised_nll == pytest.approx(0.0, abs=1e-9)
    assert figures(wider, gaps, step=1.0).dequantised_nll == pytest.approx(0.0, abs=1e-3)


def test_no_gap_is_an_error():
    with pytest.raises(ValueError, match="gaps: got none"):
        GapScorer(None).figures()


def test_ranks_are_places_in_the_sorted_scores():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 4, (50, 7)).astype(float)  # with ties
    targets = rng.integers(0, 7, 50)
    order = np.argsort(-scores, axis=1, kind="stable")
    expected = (order == targets[:, None]).argmax(axis=1)
    np.testing.assert_array_equal(ranks(scores, targets), expected)
    np.testing.assert_array_equal(ranks(scores, targets) == 0, scores.argmax(axis=1) == targets)
    shares = top_shares(np.bincount(expected, minlength=7))
    assert shares == pytest.approx({k: float((expected < k).mean()) for k in TOP})


def timed_split(seed, vocabulary=6):
    """Types as in test_evaluation, with gaps, some of them zero."""
    split = random_split(seed, vocabulary)
    rng = np.random.default_rng(seed)
    gaps = np.exp(rng.standard_normal(split.token_count))
    gaps[rng.random(split.token_count) < 0.05] = 0.0
    split._arrays["times"] = np.cumsum(gaps)
    return split


@pytest.fixture(scope="module")
def model():
    return TransformerModel(
        ModelConfig(
            vocabulary_size=6, embed_dim=16, hidden_dim=16, num_layers=1, num_heads=2, time_components=4,
            time_zero_gap=0.01,
        ),
        seed=1,
    )  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"stride": 5}, {"tokens_per_batch": 40}])
def test_details_have_the_likelihood_that_training_has(model, options):
    split = timed_split(0)
    options = {"tokens_per_batch": 128, "max_length": 16, **options}
    quick, full = evaluate_split(model, split, **options), evaluate_in_detail(model, split, **options, step=0.5)
    assert full.tokens == quick.tokens == split.token_count - split.sequences
    assert full.cross_entropy == pytest.approx(quick.cross_entropy, rel=1e-5)
    assert full.time_nll == pytest.approx(quick.time_nll, rel=1e-5)
    assert full.accuracy == pytest.approx(quick.accuracy)
    assert full.top_k[1] == full.accuracy
    assert full.top_k[10] == 1.0
    assert full.gaps.nll == full.time_nll
    assert full.gaps.dequantised_nll is not None


def test_averages_are_over_events_not_over_sequences(model):
    """One long sequence and many short ones of another kind: each event counts once."""
    lengths = np.array([200, *([3] * 20)])
    split = split_of(lengths)
    split._arrays["tokens"] = np.concatenate([np.zeros(200), np.full(60, 5)]).astype(np.uint16)
    split._arrays["times"] = np.concatenate([np.arange(200.0), 1e3 * np.arange(60.0) + 1e3])
    options = {"tokens_per_batch": 256, "max_length": 256}
    whole = evaluate_in_detail(model, split, **options)
    parts = []
    for begin, end in ((0, 1), (1, 21)):
        arrays = {name: split._arrays[name][split.offsets[begin] : split.offsets[end]] for name in ("tokens", "times")}
        offsets = split.offsets[begin : end + 1] - split.offsets[begin]
        parts.append(evaluate_in_detail(model, Split("part", "memory", offsets, 0, 0, arrays), **options))
    assert [part.tokens for part in parts] == [199, 40]
    expected = (199 * parts[0].time_nll + 40 * parts[1].time_nll) / 239
    assert whole.time_nll == pytest.approx(expected, rel=1e-5)
    assert abs(whole.time_nll - (parts[0].time_nll + 20 * parts[1].time_nll) / 21) > 0.5, "the two differ here"


def test_floors_of_gaps():
    train, test = timed_split(0), timed_split(1)
    log_normal, exponential = gap_floors(train, test, 0.01, step=0.5)

    def gaps_of(split):
        parts = np.split(split._arrays["times"], split.offsets[1:-1])
        gaps = np.concatenate([np.diff(part) for part in parts])
        return np.where(gaps > 0, gaps, 0.01)

    fitted, scored = gaps_of(train), gaps_of(test)
    mean, deviation = np.log(fitted).mean(), np.log(fitted).std()
    z = (np.log(scored) - mean) / deviation
    density = np.exp(-0.5 * z * z) / (scored * deviation * math.sqrt(2 * math.pi))
    assert log_normal.value == pytest.approx(-np.log(density).mean(), rel=1e-9)
    assert exponential.value == pytest.approx((scored / fitted.mean() + math.log(fitted.mean())).mean(), rel=1e-9)
    assert log_normal.gaps.mae == pytest.approx(np.abs(scored - math.exp(mean)).mean(), rel=1e-9)


def test_top_k_of_n_grams():
    for floor in event_floors(random_split(0, 6), random_split(1, 6), 6):
        assert floor.top_k[1] == pytest.approx(floor.accuracy)
        assert floor.top_k[1] < floor.top_k[3] < floor.top_k[5] < floor.top_k[10] == 1.0


def test_a_picture(model, tmp_path):
    split = timed_split(0)
    result = evaluate_in_detail(model, split, tokens_per_batch=128, max_length=16)
    beside = [*event_floors(split, split, 6), *gap_floors(split, split, 0.01)]
    path = plot_evaluation(result, beside, tmp_path / "sub" / "eval.png")
    assert path.read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(UserError, match=r"--plot: got .*expected a file name that ends in \.png"):
        plot_evaluation(result, beside, tmp_path / "eval.pdf")
