"""Event files of the point-process benchmark: splits, chunks and data sets; likelihoods of the true processes."""

import math

import click
import numpy as np
import pytest

from benchmarks.event_files import cut, read_events, write_dataset
from benchmarks.generating_processes import TRUTHS, log_normal_nll
from ttr_gpu.data.dataset import open_dataset


def write_events(path, count=10, length=7, seed=0):
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1.0, (count, length)), axis=1)
    marks = rng.integers(1, 4, count * length).astype(np.int32)
    np.savez(path, times=times.ravel(), offsets=length * np.arange(count + 1), marks=marks)
    return times


def hawkes_intensity(t, past):
    return 0.2 + 0.8 * np.exp(-(t - past)).sum()


def self_correcting_intensity(t, past):
    return math.exp(t - len(past))


@pytest.mark.parametrize(
    ("name", "intensity"),
    [
        ("hawkes1", hawkes_intensity),
        ("poisson", lambda t, past: 1.0),
        ("self_correcting", self_correcting_intensity),
    ],
)
def test_a_truth_is_the_integral_of_its_intensity(name, intensity):
    times = np.cumsum(np.random.default_rng(3).exponential(1.0, 12))
    got = TRUTHS[name](times)
    assert got.shape == (11,)
    for event in range(1, 12):
        past = times[:event]
        grid = np.linspace(times[event - 1], times[event], 4001)
        # From just after the event before: the intensity jumps there.
        values = np.array([intensity(t, past) for t in grid])
        integral = float(((values[1:] + values[:-1]) / 2 * np.diff(grid)).sum())
        assert got[event - 1] == pytest.approx(integral - math.log(intensity(times[event], past)), abs=1e-5)


def test_the_renewal_process_is_a_density_of_mean_1_and_deviation_6():
    gaps = np.geomspace(1e-8, 1e9, 400_001)
    times = np.concatenate(([0.0], np.cumsum(gaps)))
    density = np.exp(-TRUTHS["renewal"](times[:2]))  # of the one gap gaps[0]
    assert density == pytest.approx(np.exp(-log_normal_nll(gaps[:1], -math.log(37) / 2, math.sqrt(math.log(37)))))
    all_densities = np.exp(-log_normal_nll(gaps, -math.log(37) / 2, math.sqrt(math.log(37))))

    def integral(values):
        return float(((values[1:] + values[:-1]) / 2 * np.diff(gaps)).sum())

    assert integral(all_densities) == pytest.approx(1.0, abs=1e-4)
    mean = integral(gaps * all_densities)
    assert mean == pytest.approx(1.0, abs=1e-3)
    assert math.sqrt(integral(gaps**2 * all_densities) - mean**2) == pytest.approx(6.0, rel=1e-2)


def test_long_sequences_of_the_self_correcting_process_do_not_overflow():
    assert np.isfinite(TRUTHS["self_correcting"](np.arange(1.0, 3000.0))).all()


def test_splits_are_the_permutation_of_the_reference_figures(tmp_path):
    write_events(tmp_path / "toy.npz")
    events = read_events(tmp_path / "toy.npz")
    order = np.random.default_rng(3).permutation(10)
    parts = events.split(3)
    np.testing.assert_array_equal(np.concatenate(list(parts.values())), order)
    assert [len(part) for part in parts.values()] == [6, 2, 2]
    assert events.split(4)["test"].tolist() != parts["test"].tolist()


@pytest.mark.parametrize("events", [1, 2, 128, 129, 130, 257, 258, 1024])
def test_chunks_keep_every_gap_once(events):
    sequence = np.cumsum(np.random.default_rng(0).exponential(1.0, events))
    chunks = cut(sequence, 128)
    np.testing.assert_array_equal(np.concatenate([np.diff(chunk) for chunk in chunks] or [[]]), np.diff(sequence))
    assert all(2 <= len(chunk) <= 129 for chunk in chunks)


def test_a_data_set_holds_the_split(tmp_path):
    times = write_events(tmp_path / "toy.npz")
    events = read_events(tmp_path / "toy.npz")
    parts = events.split(0)
    dataset = open_dataset(write_dataset(tmp_path / "chunks", events, parts, chunk=4))
    train, test = dataset.split("train"), dataset.split("test")
    # 6 gaps make chunks of 4 and 2; validation and test stay whole.
    assert np.diff(train.offsets).tolist() == [5, 3] * 6
    assert np.diff(test.offsets).tolist() == [7, 7]
    np.testing.assert_allclose(test.read(0, 7)[1] + dataset.origin, times[parts["test"][0]], rtol=0, atol=1e-12)
    assert dataset.vocabulary_size == 1
    typed = open_dataset(write_dataset(tmp_path / "typed", events, parts, typed=True))
    assert typed.vocabulary_size == 3
    assert np.diff(typed.split("train").offsets).tolist() == [7] * 6


def test_a_file_that_is_none_is_named(tmp_path):
    (tmp_path / "bad.npz").write_bytes(b"not a zip")
    for name in ("bad.npz", "missing.npz"):
        with pytest.raises(click.ClickException, match=name):
            read_events(tmp_path / name)
