"""Batches: every target once, no padding, an order that is a function of the step, errors that arrive."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttr_gpu.data.batches import TrainingBatches, evaluation_batches, pack
from ttr_gpu.data.dataset import Split
from ttr_gpu.errors import UserError


def split_of(lengths, name="train"):
    """A split in memory: token i is i, time i is i / 2."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    total = int(offsets[-1])
    arrays = {"tokens": np.arange(total, dtype=np.uint32), "times": np.arange(total) / 2}
    return Split(name, "memory", offsets, 0, 0, arrays)


def first_batches(split, count, **options):
    options = {"fingerprint": "f", "tokens_per_batch": 20, "max_length": 8, **options}
    with TrainingBatches(split, **options) as batches:
        return [next(batches) for _ in range(count)], batches.steps_per_epoch


def check_batch(batch, budget, longest):
    lengths = np.diff(batch.cu_seqlens)
    assert len(batch.tokens) == batch.cu_seqlens[-1] <= budget
    assert lengths.min() >= 1
    assert lengths.max() <= longest
    scored = batch.targets >= 0
    np.testing.assert_array_equal(batch.targets[scored], batch.tokens[scored] + 1)
    np.testing.assert_array_equal(batch.times, batch.tokens / 2)
    np.testing.assert_array_equal(batch.target_times[scored], (batch.tokens[scored] + 1) / 2)
    for n in range(len(lengths)):
        window = batch.tokens[batch.cu_seqlens[n] : batch.cu_seqlens[n + 1]]
        np.testing.assert_array_equal(window, batch.starts[n] + np.arange(len(window)))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=3, max_size=30), st.integers(1, 12), st.integers(0, 3))
def test_an_epoch_has_every_target_once(lengths, longest, seed):
    split = split_of([40, *lengths])
    expected = sorted(set(range(split.token_count)) - set(split.offsets[:-1].tolist()))
    _, steps = first_batches(split, 1, max_length=longest, seed=seed)
    batches, _ = first_batches(split, steps + 1, max_length=longest, seed=seed)
    for batch in batches:
        check_batch(batch, 20, longest)
    assert sorted(np.concatenate([b.targets for b in batches[:-1]]).tolist()) == expected
    assert [b.step for b in batches] == list(range(steps + 1))
    assert [b.epoch for b in batches] == [0] * steps + [1]


def test_order_differs_by_epoch_and_seed_and_repeats_by_step():
    split = split_of([30] * 20)
    batches, steps = first_batches(split, 3 * 40)
    per_epoch = [np.concatenate([b.tokens for b in batches if b.epoch == e]).tolist() for e in (0, 1)]
    assert per_epoch[0] != per_epoch[1]
    assert batches[0].tokens.tolist() != first_batches(split, 1, seed=1)[0][0].tokens.tolist()
    for start in (1, 7, steps, steps + 3):
        resumed, _ = first_batches(split, 5, start_step=start)
        for got, want in zip(resumed, batches[start:], strict=False):
            assert (got.step, got.epoch) == (want.step, want.epoch)
            np.testing.assert_array_equal(got.tokens, want.tokens)


def test_a_long_sequence_is_cut_elsewhere_in_each_epoch():
    split = split_of([300, 8, 3])
    batches, _ = first_batches(split, 90, max_length=20)
    starts = [{int(s) for b in batches if b.epoch == e for s in b.starts} for e in range(4)]
    assert all({0, 300, 308} <= there for there in starts), "a short sequence stays whole"
    assert len({frozenset(there) for there in starts[:3]}) == 3


@pytest.mark.parametrize("length", [25, 24, 23, 17])
def test_pools_smaller_than_the_data(length):
    # The last segments end at, just before and just after the data do.
    split = split_of([25] * 59 + [length])
    options = {"pool_tokens": 300, "segment_tokens": 99}
    _, steps = first_batches(split, 1, **options)
    batches, _ = first_batches(split, steps, **options)
    targets = np.concatenate([b.targets for b in batches])
    for batch in batches:
        check_batch(batch, 20, 8)
    assert len(targets) == len(set(targets.tolist())) == 59 * 24 + length - 1
    resumed, _ = first_batches(split, 3, start_step=steps - 2, **options)
    np.testing.assert_array_equal(resumed[0].tokens, batches[steps - 2].tokens)


@pytest.mark.parametrize("stride", [None, 1, 3, 8])
def test_evaluation_scores_every_target_once_in_order(stride):
    split = split_of([1, 30, 2, 17, 9])
    batches = list(evaluation_batches(split, tokens_per_batch=20, max_length=8, stride=stride))
    for batch in batches:
        check_batch(batch, 20, 8)
    scored = np.concatenate([b.targets for b in batches])
    scored = scored[scored >= 0].tolist()
    assert scored == sorted(set(range(split.token_count)) - set(split.offsets[:-1].tolist()))


def test_stride_gives_context():
    split = split_of([40])
    for batch in list(evaluation_batches(split, tokens_per_batch=20, max_length=8, stride=3))[1:]:
        for n in range(len(batch.starts)):
            targets = batch.targets[batch.cu_seqlens[n] : batch.cu_seqlens[n + 1]]
            assert (targets[:5] == -1).all()
            assert (targets[5:] >= 0).all()


def test_packing_is_next_fit():
    assert pack(np.array([5, 5, 5, 10, 1]), 10) == [0, 2, 3, 4, 5]


def test_sizes_that_cannot_work():
    with pytest.raises(UserError, match="max_length"):
        first_batches(split_of([30]), 1, max_length=21)
    with pytest.raises(UserError, match="larger than the data"):
        first_batches(split_of([10, 5]), 1)
    with pytest.raises(UserError, match="nothing can be predicted"):
        first_batches(split_of([1, 1]), 1)


def test_an_error_in_the_reader_reaches_the_consumer():
    split = split_of([30] * 4)
    split._arrays["tokens"] = None
    with TrainingBatches(split, fingerprint="f", tokens_per_batch=20, max_length=8) as batches:
        with pytest.raises(UserError, match="shard cannot be read"):
            next(batches)
        with pytest.raises(RuntimeError, match="has stopped"):
            next(batches)
