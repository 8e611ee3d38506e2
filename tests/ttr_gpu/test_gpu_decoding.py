"""A model that decodes on a GPU's arrays and kernels against the CPU; with `-m gpu` on a device, else on a stand-in."""

import cupy_stand_in
import numpy as np
import pytest

from ttr_gpu.config import ModelConfig
from ttr_gpu.infer.event_stream import EventStreams
from ttr_gpu.model import TransformerModel
from ttr_gpu.nn import TransformerBlock
from ttr_gpu.nn.parameter import flatten

VOCABULARY = 11
VARIANTS = {
    "window, log bias": {"window": 7},
    "window, linear bias, grouped heads": {"window": 7, "time_bias": "linear", "num_kv_heads": 2},
    "no window, no bias": {"time_bias": "none"},
    "performer": {"attention": "performer", "attention_features": 12, "time_bias": "linear", "num_kv_heads": 2},
    "performer without time": {"attention": "performer", "attention_features": 12, "time_bias": "none"},
}
LENGTHS = np.array([20, 3, 9])


def models(gpu, **changes):
    """The same model on the GPU and on the CPU."""
    fields = {
        "vocabulary_size": VOCABULARY, "embed_dim": 16, "hidden_dim": 24, "num_layers": 2, "num_heads": 4,
        "time_scale": 3.0, "time_span": 500.0, "time_features_dim": 6,
    }  # fmt: skip
    made = [TransformerModel(ModelConfig(**{**fields, **changes}), seed=1, **more) for more in ({"backend": gpu}, {})]
    for model in made:
        # Initial weights are small: larger ones tell what is attended to.
        model.flat.values[...] *= 2.0
    return made


def events(seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCABULARY, LENGTHS.sum()).astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(LENGTHS)]).astype(np.int32)
    return tokens, 1.7e9 + np.cumsum(np.exp(rng.uniform(-2, 4, len(tokens)))), starts


@pytest.mark.parametrize("variant", VARIANTS)
def test_prefill_and_steps_give_the_logits_of_the_cpu(gpu, variant):
    """A prompt in pieces, so that some go on where the cache stands; then steps until the ring has wrapped."""
    tokens, times, starts = events()
    rings = np.array([2, 0, 3])
    results = []
    for model in models(gpu, **VARIANTS[variant]):
        cache = model.new_cache(4)
        logits = [model.prefill(tokens, times, starts, cache, rings, rows=8)]
        last = times.max() + np.arange(12.0)
        for step in range(12):
            # The shortest sequence is left out at times: they stand at different positions.
            some = rings if step % 3 else rings[:2]
            drawn = (np.arange(len(some)) + step) % VOCABULARY
            logits.append(model.decode_step(drawn, np.full(len(some), last[step]), cache, some))
        results.append([each if isinstance(each, np.ndarray) else each.get() for each in logits])
        assert cache.lengths.tolist() == [15, 0, 32, 17]
    for got, expected in zip(*results, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["window, log bias", "performer"])
def test_a_step_does_not_wait(gpu, variant):
    model = models(gpu, **VARIANTS[variant])[0]
    tokens, times, starts = events()
    cache = model.new_cache(3)
    model.prefill(tokens, times, starts, cache)
    before = cupy_stand_in.waits
    model.decode_step(np.array([1, 2, 3]), np.full(3, times.max() + 1), cache)
    assert cupy_stand_in.waits == before


@pytest.mark.parametrize("variant", ["window, log bias", "performer"])
def test_copied_and_saved_sequences_go_on_alike(gpu, variant, tmp_path):
    model = models(gpu, **VARIANTS[variant])[0]
    tokens, times, _ = events()
    streams = EventStreams(model, 3)
    streams.push(np.zeros(20, int), tokens[:20], times[:20])
    streams.save(tmp_path / "stream", 0)
    streams.load(tmp_path / "stream", 2)
    streams.cache.copy(0, np.array([1]))
    streams.push([0, 1, 2], [4, 4, 4], np.full(3, times[20]))
    first, second, third = streams.next()
    np.testing.assert_allclose(second, first, rtol=1e-6)
    np.testing.assert_allclose(third, first, rtol=1e-6)


def test_a_block_decodes_on_the_gpu(gpu):
    rng = np.random.default_rng(3)
    x, times = rng.standard_normal((9, 2, 16)).astype(np.float32), 1.7e9 + np.cumsum(rng.random((9, 2)), axis=0)
    on_gpu, on_cpu = (TransformerBlock(16, 24, 4, num_kv_heads=2, window=5, time_scale=2.0) for _ in range(2))
    flatten(on_gpu.parameters, gpu.xp)
    for block in (on_gpu, on_cpu):
        block.attention.clear_cache(2)
    for position in range(9):
        expected = on_cpu.decode(x[position], times[position], position)
        got = on_gpu.decode(gpu.put(x[position]), gpu.put(times[position]), position)
        np.testing.assert_allclose(got.get(), expected, rtol=1e-4, atol=1e-5)
