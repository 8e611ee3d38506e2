"""Drawing tokens: each way of cutting off the tail against its definition, penalties, seeds, and what is refused."""

import numpy as np
import pytest

from ttr_gpu.infer.sampling import Sampler, Sampling, probabilities

LOGITS = np.log(np.array([[0.4, 0.1, 0.3, 0.15, 0.05]]))


def kept(sampling, logits=LOGITS, seen=None):
    return [np.flatnonzero(row).tolist() for row in probabilities(logits, sampling, seen)]


def test_without_options_it_is_the_models_distribution():
    np.testing.assert_allclose(probabilities(LOGITS, Sampling()), np.exp(LOGITS), rtol=1e-12)
    np.testing.assert_allclose(probabilities(LOGITS + 700, Sampling()), np.exp(LOGITS), rtol=1e-12)


def test_temperature():
    expected = np.exp(LOGITS / 0.5) / np.exp(LOGITS / 0.5).sum()
    np.testing.assert_allclose(probabilities(LOGITS, Sampling(temperature=0.5)), expected, rtol=1e-12)
    assert kept(Sampling(temperature=0)) == [[0]]
    assert probabilities(LOGITS, Sampling(temperature=1e-300)).tolist() == [[1, 0, 0, 0, 0]]
    # Of equals the first, as argmax has it.
    assert kept(Sampling(temperature=0), np.array([[1.0, 3.0, 3.0]])) == [[1]]


@pytest.mark.parametrize(("k", "expected"), [(1, [0]), (2, [0, 2]), (4, [0, 1, 2, 3]), (5, [0, 1, 2, 3, 4]), (9, None)])
def test_top_k(k, expected):
    assert kept(Sampling(top_k=k)) == [expected or [0, 1, 2, 3, 4]]
    assert kept(Sampling(top_k=2), np.zeros((1, 5))) == [[0, 1]]


@pytest.mark.parametrize(
    ("p", "expected"),
    [(1e-9, [0]), (0.39, [0]), (0.41, [0, 2]), (0.69, [0, 2]), (0.71, [0, 2, 3]), (1.0, [0, 1, 2, 3, 4])],
)
def test_top_p_keeps_the_fewest_that_reach_p(p, expected):
    assert kept(Sampling(top_p=p)) == [expected]


@pytest.mark.parametrize(("p", "expected"), [(0.0, [0, 1, 2, 3, 4]), (0.2, [0, 1, 2, 3]), (0.5, [0, 2]), (1.0, [0])])
def test_min_p_is_relative_to_the_likeliest(p, expected):
    assert kept(Sampling(min_p=p)) == [expected]


def test_what_remains_sums_to_one():
    rng = np.random.default_rng(0)
    sampling = Sampling(temperature=0.7, top_k=9, top_p=0.8, min_p=0.05, repetition_penalty=1.3)
    chances = probabilities(rng.standard_normal((20, 50)), sampling, rng.random((20, 50)) < 0.2)
    np.testing.assert_allclose(chances.sum(axis=1), 1.0, rtol=1e-12)
    assert ((chances > 0).sum(axis=1) <= 9).all()


def test_repetition_penalty_lowers_both_signs():
    seen = np.array([[True, True, False, False]])
    penalised = np.log(probabilities(np.array([[2.0, -2.0, 2.0, -2.0]]), Sampling(repetition_penalty=2.0), seen))[0]
    np.testing.assert_allclose(penalised - penalised[2], [-1.0, -6.0, 0.0, -4.0], atol=1e-12)


def test_draws_follow_the_distribution():
    sampler = Sampler(Sampling(seed=1), 1, 5, [])
    drawn = np.array([sampler.draw(LOGITS, np.array([0]))[0] for _ in range(20_000)])
    shares = np.bincount(drawn, minlength=5) / len(drawn)
    assert np.abs(shares - np.exp(LOGITS[0])).max() < 4 * np.sqrt(0.25 / len(drawn))


def test_a_sample_is_the_same_however_many_there_are():
    def draws(samples):
        sampler = Sampler(Sampling(seed=7), samples, 5, [])
        return [sampler.draw(LOGITS.repeat(samples, 0), np.arange(samples)).tolist() for _ in range(30)]

    assert [row[:2] for row in draws(4)] == draws(2)
    assert draws(2) != [row[::-1] for row in draws(2)]


def test_what_was_drawn_counts_as_seen():
    sampler = Sampler(Sampling(temperature=0, repetition_penalty=100.0), 2, 3, [2])
    logits = np.array([[1.0, 2.0, 9.0], [2.0, 1.0, 9.0]])
    assert sampler.draw(logits, np.array([0, 1])).tolist() == [1, 0]
    assert sampler.draw(logits, np.array([0, 1])).tolist() == [0, 1]


def test_excluded_tokens_are_never_drawn():
    logits = np.array([[-np.inf, 0.0, -np.inf]])
    assert kept(Sampling(), logits) == [[1]]
    assert kept(Sampling(repetition_penalty=2.0), logits, np.array([[True, True, False]])) == [[1]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature: got -1"), ({"temperature": float("nan")}, "temperature: got nan"),
        ({"top_k": 0}, "top_k: got 0, expected at least 1"), ({"top_p": 0}, "top_p: got 0, expected above 0"),
        ({"top_p": 1.5}, "top_p: got 1.5"), ({"min_p": -0.1}, "min_p: got -0.1, expected 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty: got 0"), ({"seed": -1}, "seed: got -1"),
    ],
)  # fmt: skip
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="logits: got NaN or infinity"):
        probabilities(np.array([[0.0, bad]]), Sampling())
