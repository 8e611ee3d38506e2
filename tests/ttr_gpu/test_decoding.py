"""Decoding with a cache beside the forward over whole sequences: windows, wrapping, years, chunks, bad input."""

import contextlib

import numpy as np
import pytest

from ttr_gpu.config import ModelConfig
from ttr_gpu.model import TransformerModel
from ttr_gpu.nn import Sequences, TransformerBlock
from ttr_kernels.common.parallel import get_threads, set_threads

YEAR = 365.25 * 86400
VOCABULARY = 11


def make_model(precision=None, **changes):
    fields = {
        "vocabulary_size": VOCABULARY, "embed_dim": 16, "hidden_dim": 24, "num_layers": 2, "num_heads": 4,
        "time_scale": 3.0, "time_span": 500.0, "time_features_dim": 6,
    }  # fmt: skip
    model = TransformerModel(ModelConfig(**{**fields, **changes}), seed=1, precision_name=precision)
    # Initial weights are small: larger ones tell what is attended to.
    model.flat.values[...] *= 2.0
    return model


@contextlib.contextmanager
def number_of_threads(count):
    before = get_threads()
    set_threads(count)
    try:
        yield
    finally:
        set_threads(before)


class Packed:
    def __init__(self, lengths, seed=0):
        rng = np.random.default_rng(seed)
        total = sum(lengths)
        self.tokens = rng.integers(0, VOCABULARY, total).astype(np.int32)
        self.times = np.cumsum(np.exp(rng.uniform(-2, 4, total)))
        self.cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        self.targets = np.full(total, -1, np.int32)
        self.target_times = self.times

    @property
    def lengths(self):
        return np.diff(self.cu_seqlens)

    def rows(self, position):
        """Sequences that have this position, and its rows in the pack."""
        rings = np.flatnonzero(self.lengths > position)
        return rings, self.cu_seqlens[rings] + position


VARIANTS = {
    "rope by time": {"window": 7, "rope": "time"},
    "window, log bias": {"window": 7},
    "window, linear bias": {"window": 7, "time_bias": "linear"},
    "window, no bias, grouped heads": {"window": 5, "time_bias": "none", "num_kv_heads": 2},
    "window of one": {"window": 1},
    "no window": {},
    "performer": {"attention": "performer", "attention_features": 12, "time_bias": "linear", "num_kv_heads": 2},
    "performer without time": {"attention": "performer", "attention_features": 12, "time_bias": "none"},
    "no time at all": {"time_bias": "none", "time_features": "none", "window": 6, "tied_head": True},
}


@pytest.fixture(params=["fused", "one by one"])
def path(request, monkeypatch):
    """Steps of a few sequences take the fused kernel, where there is one, or the layers one by one."""
    if request.param == "one by one":
        monkeypatch.setattr("ttr_gpu.decoding.fused_decoding", lambda *arguments: None)
    return request.param


@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_uneven_sequences_equals_the_forward(variant, precision, path):
    """Position by position, in one batch of sequences that end at different times; with a window the ring wraps."""
    model, batch = make_model(precision, **VARIANTS[variant]), Packed([40, 3, 17, 1])
    whole = model.logits(batch).astype(np.float64)
    expected, tolerance = whole, {"float64": 1e-12, "float32": 2e-5}.get(precision)
    if tolerance is None:
        # 16-bit results are about as far from the truth as those of the forward, not the same.
        expected = make_model("float64", **VARIANTS[variant]).logits(batch)
        tolerance = 2 * np.abs(whole - expected).max() / np.abs(expected).max()
    cache = model.new_cache(4)
    for position in range(40):
        rings, rows = batch.rows(position)
        logits = model.decode_step(batch.tokens[rows], batch.times[rows], cache, rings)
        np.testing.assert_allclose(logits.astype(np.float64), expected[rows], atol=tolerance * np.abs(expected).max())
        assert logits.dtype == model.precision.compute
    assert cache.lengths.tolist() == batch.lengths.tolist()
    fused = path == "fused" and precision != "float64" and "performer" not in variant and variant != "rope by time"
    assert (cache.fused is not None) == fused


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_fused_step_does_not_depend_on_its_company_or_on_threads(precision):
    """To the bit: alone, among 31 others, and on one to three threads."""
    model = TransformerModel(
        ModelConfig(
            vocabulary_size=300, embed_dim=96, hidden_dim=200, num_layers=2, num_heads=6, num_kv_heads=2, window=150,
            time_scale=3.0, time_span=500.0, precision=precision,
        ), seed=2,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    tokens, gaps = rng.integers(0, 300, (200, 32)).astype(np.int32), rng.exponential(3.0, (200, 32))
    times = np.cumsum(gaps, axis=0)

    def decode(columns, threads):
        with number_of_threads(threads):
            cache = model.new_cache(len(columns))
            steps = [model.decode_step(tokens[i, columns], times[i, columns], cache) for i in range(200)]
        return np.stack(steps)

    together = decode(np.arange(32), 2)
    for threads in (1, 3):
        np.testing.assert_array_equal(decode(np.arange(32), threads), together)
    for columns in ([5], [9, 2], [31, 0, 7, 8, 11]):
        np.testing.assert_array_equal(decode(np.array(columns), 2), together[:, columns])


def test_fused_steps_follow_weights_that_change():
    for precision in ("float32", "bfloat16"):
        model, other = make_model(precision, window=7), make_model(precision, window=7)
        cache = model.new_cache()
        model.decode_step(np.array([1]), np.array([1.0]), cache)
        for each in (model, other):
            each.flat.values[...] *= 1.5
            each.values_changed()
        cache.clear()
        step = np.array([3]), np.array([2.0])
        np.testing.assert_array_equal(
            model.decode_step(*step, cache), other.decode_step(*step, other.new_cache()), err_msg=precision
        )


def test_after_many_turns_of_the_ring_and_years_apart(path):
    model, batch = make_model(window=8), Packed([1200])
    batch.times[500:] += 30 * YEAR
    batch.times[1100:] += 200 * YEAR
    whole = model.logits(batch)
    cache = model.new_cache()
    for position in range(1200):
        logits = model.decode_step(batch.tokens[position : position + 1], batch.times[position : position + 1], cache)
        if position in (499, 500, 501, 507, 508, 1099, 1100, 1199):
            np.testing.assert_allclose(logits[0], whole[position], atol=2e-5 * np.abs(whole).max())
    assert cache.layers[0].capacity == 8


@pytest.mark.parametrize("rows", [1, 2, 7, 13, 64, 1000])
@pytest.mark.parametrize(
    "changes",
    [
        {"window": 7}, {"window": 7, "time_bias": "linear", "num_kv_heads": 1}, {},
        {"attention": "performer", "attention_features": 12, "time_bias": "linear"},
    ],
)  # fmt: skip
def test_prefill_in_chunks_of_any_size_equals_the_forward(changes, rows):
    model, batch = make_model(**changes), Packed([40, 1, 25, 9])
    ends = batch.cu_seqlens[1:] - 1
    whole = model.logits(batch)
    cache = model.new_cache(6)
    rings = np.array([4, 0, 5, 2])
    logits = model.prefill(batch.tokens, batch.times, batch.cu_seqlens, cache, rings, rows=rows)
    np.testing.assert_allclose(logits, whole[ends], atol=2e-5 * np.abs(whole).max())
    assert cache.lengths.tolist() == [1, 0, 9, 0, 40, 25]


@pytest.mark.parametrize("changes", [{"window": 7}, {}])
def test_prefill_then_steps_then_prefill_again(changes):
    model, batch = make_model(**changes), Packed([60])
    whole = model.logits(batch)
    tolerance = 2e-5 * np.abs(whole).max()
    cache = model.new_cache()

    def read(begin, end):
        starts = np.array([0, end - begin], np.int32)
        return model.prefill(batch.tokens[begin:end], batch.times[begin:end], starts, cache, rows=6)[0]

    np.testing.assert_allclose(read(0, 20), whole[19], atol=tolerance)
    for position in range(20, 30):
        logits = model.decode_step(batch.tokens[position : position + 1], batch.times[position : position + 1], cache)
        np.testing.assert_allclose(logits[0], whole[position], atol=tolerance)
    np.testing.assert_allclose(read(30, 60), whole[59], atol=tolerance)


def test_the_gap_to_come_is_that_of_the_forward(path):
    model, batch = make_model(time_components=4, time_given_type=True), Packed([9, 4])
    expected = model.next_gap(model.outputs(batch))
    cache = model.new_cache(2, 9)
    first = np.array([0, 1, 2, 9, 10, 11])
    outputs = model.prefill_outputs(
        batch.tokens[first], batch.times[first], np.array([0, 3, 6], np.int32), cache
    )  # fmt: skip
    for position in range(2, 9):
        rings, rows = batch.rows(position)
        if position > 2:
            outputs = model.decode_outputs(batch.tokens[rows], batch.times[rows], cache, rings)
        got = model.next_gap(outputs)
        for probability in (0.1, 0.5, 0.9):
            np.testing.assert_allclose(got.quantile(probability), expected[rows].quantile(probability), rtol=1e-3)
        np.testing.assert_allclose(
            model.next_logits(outputs), model.logits(batch, rows), rtol=1e-3, atol=1e-4
        )  # fmt: skip


def test_a_copied_ring_goes_on_by_itself():
    model, batch = make_model(window=5), Packed([12])
    cache = model.new_cache(3)
    model.prefill(batch.tokens, batch.times, batch.cu_seqlens, cache, np.array([1]))
    cache.copy(1, np.array([0, 2]))
    later = batch.times[-1] + np.array([1.0, 1.0, 50.0])
    logits = model.decode_step(np.array([3, 3, 4]), later, cache)
    np.testing.assert_array_equal(logits[0], logits[1])
    assert not np.array_equal(logits[0], logits[2])
    assert cache.lengths.tolist() == [13, 13, 13]
    again = model.decode_step(np.array([2]), later[:1] + 1, cache, np.array([0]))
    np.testing.assert_allclose(again, model.decode_step(np.array([2]), later[:1] + 1, cache, np.array([1])), rtol=1e-6)


def test_memory_does_not_grow():
    model = make_model(window=4)
    cache = model.new_cache(2)
    before = cache.bytes
    buffers = [layer.keys for layer in cache.layers]
    for position in range(50):
        model.decode_step(np.array([1, 2]), np.full(2, float(position)), cache)
    assert cache.bytes == before == 2 * 2 * (2 * 4 * 4 * 4 * 4 + 4 * 8)
    assert all(layer.keys is buffer for layer, buffer in zip(cache.layers, buffers, strict=True))


def test_without_a_window_overflow_says_what_to_set():
    model, batch = make_model(), Packed([9])
    cache = model.new_cache(capacity=8)
    with pytest.raises(
        ValueError, match=r"position: got 8, .*capacity of 8 .*no window.*larger capacity.*model\.window"
    ):
        model.prefill(batch.tokens, batch.times, batch.cu_seqlens, cache)
    assert cache.lengths[0] == 0
    model.prefill(batch.tokens[:8], batch.times[:8], np.array([0, 8], np.int32), cache)
    with pytest.raises(ValueError, match="position: got 8"):
        model.decode_step(batch.tokens[8:], batch.times[8:], cache)
    assert cache.lengths[0] == 8
    # A ring that is shorter than the window would forget what the window shows.
    narrow = make_model(window=9).new_cache(capacity=4)
    with pytest.raises(ValueError, match="below the window of 9"):
        make_model(window=9).prefill(batch.tokens, batch.times, batch.cu_seqlens, narrow)


def test_what_fails_leaves_the_cache_as_it_was(monkeypatch, path):
    model, batch = make_model(window=5), Packed([30])
    cache, other = model.new_cache(), model.new_cache()
    for each in (cache, other):
        model.prefill(batch.tokens[:20], batch.times[:20], np.array([0, 20], np.int32), each)

    def fail(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if path == "fused":
            whole = cache.fused.step
            patch.setattr(cache.fused, "step", lambda *arguments, **options: fail(whole(*arguments, **options)))
        else:
            patch.setattr(model.blocks[1].attention, "extend", fail)
        with pytest.raises(KeyboardInterrupt):
            model.decode_step(np.array([7]), batch.times[20:21] + 5.0, cache)
    for position in range(20, 30):
        step = batch.tokens[position : position + 1], batch.times[position : position + 1]
        np.testing.assert_array_equal(model.decode_step(*step, cache), model.decode_step(*step, other))


@pytest.mark.parametrize(
    ("tokens", "times", "rings", "message"),
    [
        ([11], [9.0], [0], r"tokens: got 11, expected 0 \.\. 10"),
        ([-1], [9.0], [0], "tokens: got -1"),
        ([1], [np.nan], [0], "times: got nan, expected a finite time"),
        ([1], [np.inf], [1], "times: got inf, expected a finite time"),
        ([1], [4.0], [0], r"times: got 4\.0, expected a finite time, not before 5\.0"),
        ([1, 2], [9.0, 9.0], [0, 0], "rings: got one of them twice"),
        ([1], [9.0], [2], r"rings: got 2 \.\. 2, expected 0 \.\. 1"),
        ([1, 2], [9.0], [0, 1], r"tokens, times: got shapes \(2,\) and \(1,\)"),
    ],
)
def test_bad_steps_are_refused(tokens, times, rings, message, path):
    model = make_model(window=4)
    cache = model.new_cache(2)
    model.decode_step(np.array([1]), np.array([5.0]), cache, np.array([0]))
    with pytest.raises(ValueError, match=message):
        model.decode_step(np.array(tokens), np.array(times), cache, np.array(rings))
    assert cache.lengths.tolist() == [1, 0]


# One block, as in the README.


@pytest.mark.parametrize("window", [None, 6])
def test_a_block_decodes_what_its_forward_gives(window):
    block = TransformerBlock(32, 64, 4, num_kv_heads=2, window=window, time_scale=60.0)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 25, 32)).astype(np.float32)
    times = 1.7e9 + np.cumsum(rng.exponential(60.0, (3, 25)), axis=1)
    whole, _ = block.forward(x, Sequences.batch(times))
    for _ in range(2):
        block.attention.clear_cache(3)
        for position in range(25):
            y = block.decode(x[:, position], timestamp=times[:, position], position=position)
            np.testing.assert_allclose(y, whole[:, position], atol=1e-5)


def test_a_block_refuses_other_positions_and_times():
    block = TransformerBlock(16, 16, 2)
    x = np.zeros((1, 16), np.float32)
    block.decode(x, timestamp=10.0, position=0)
    with pytest.raises(ValueError, match=r"position: got 0, expected 1, the next in the cache; attention\.clear_cache"):
        block.decode(x, timestamp=10.0, position=0)
    with pytest.raises(ValueError, match=r"timestamp: got 9\.0, expected a finite time, not before 10\.0"):
        block.decode(x, timestamp=9.0, position=1)
    with pytest.raises(ValueError, match=r"timestamp: got nan"):
        block.decode(x, timestamp=float("nan"), position=1)
    with pytest.raises(ValueError, match=r"x: got shape \(2, 16\), expected \(1, 16\)"):
        block.decode(np.zeros((2, 16), np.float32), timestamp=10.0, position=1)
    block.attention.clear_cache(capacity=1)
    block.decode(x, timestamp=1.0, position=0)
    with pytest.raises(ValueError, match="position: got 1, expected below the capacity of 1"):
        block.decode(x, timestamp=1.0, position=1)


def test_caches_of_one_model_share_its_16_bit_copy():
    """Weights that change reach a cache that is not the newest, too."""
    model = make_model("bfloat16", window=8)
    older, newer = model.new_cache(1), model.new_cache(1)
    model.flat.values[...] *= 0.5
    model.values_changed()
    answers = [model.decode_step([1], [2.0], cache) for cache in (newer, older)]
    np.testing.assert_array_equal(*answers)
