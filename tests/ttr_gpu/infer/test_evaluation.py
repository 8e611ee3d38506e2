"""Evaluation beside its floors: n-grams against a plain implementation, bits per byte against a sum by hand."""

import bz2
import json
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from test_batches import split_of

from ttr_gpu.config import ModelConfig
from ttr_gpu.data.dataset import open_dataset
from ttr_gpu.data.options import PreprocessOptions
from ttr_gpu.data.preprocess import preprocess
from ttr_gpu.infer.evaluation import evaluate_split
from ttr_gpu.infer.floors import event_floors, text_floors
from ttr_gpu.model import TransformerModel


def random_split(seed, vocabulary, sequences=40):
    rng = np.random.default_rng(seed)
    split = split_of(rng.integers(1, 30, sequences))
    tokens = np.zeros(split.token_count, np.uint16)
    for i in range(1, len(tokens)):
        tokens[i] = (tokens[i - 1] + 1) % vocabulary if rng.random() < 0.7 else rng.integers(vocabulary)
    split._arrays["tokens"] = tokens
    return split


def plain_witten_bell(train, test, vocabulary, order):
    """One probability at a time, as the definition reads."""
    follow = defaultdict(Counter)

    def sequences(split):
        tokens = split._arrays["tokens"].tolist()
        return [tokens[a:b] for a, b in zip(split.offsets[:-1], split.offsets[1:], strict=True)]

    for s in sequences(train):
        for i, w in enumerate(s):
            for k in range(min(i, order) + 1):
                follow[tuple(s[i - k : i])][w] += 1

    def probability(h, w):
        lower = probability(h[1:], w) if h else 1 / vocabulary
        seen = follow.get(h)
        return lower if not seen else (seen[w] + len(seen) * lower) / (sum(seen.values()) + len(seen))

    nats, right, count = 0.0, 0, 0
    for s in sequences(test):
        for i in range(1, len(s)):
            h = tuple(s[max(0, i - order) : i])
            p = [probability(h, w) for w in range(vocabulary)]
            nats -= math.log(p[s[i]])
            right += int(np.argmax(p)) == s[i]
            count += 1
    return nats / count, right / count


def test_n_gram_floors_agree_with_the_definition():
    train, test = random_split(0, 6), random_split(1, 6)
    for order, floor in enumerate(event_floors(train, test, 6)):
        loss, accuracy = plain_witten_bell(train, test, 6, order)
        assert floor.value == pytest.approx(loss, rel=1e-12)
        assert floor.accuracy == pytest.approx(accuracy)


def test_a_type_that_training_never_saw():
    train, test = random_split(0, 5), random_split(1, 6)
    for order, floor in enumerate(event_floors(train, test, 6)):
        assert floor.value == pytest.approx(plain_witten_bell(train, test, 6, order)[0], rel=1e-12)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    lines = [f"commit number {i} fixes the naïve thing ☕ {i * i}" for i in range(300)]
    (folder / "in.json").write_text(json.dumps(lines))
    preprocess(PreprocessOptions([str(folder / "in.json")], folder / "d.zarr", vocabulary_size=300), lambda line: None)
    return open_dataset(folder / "d.zarr"), lines


def test_bzip2_sees_the_documents_as_they_were(texts):
    dataset, lines = texts
    size = len("".join(line + "\n" for line in lines).encode())
    assert sum(entry["bytes"] for entry in dataset.attributes["splits"].values()) == size
    # The splits stand one after the other, so the order of the documents differs; their bytes do not.
    order = [i for n in range(3) for i in range(300) if split_number(i) == n]
    expected = 8 * len(bz2.compress("".join(lines[i] + "\n" for i in order).encode(), 9)) / size
    assert text_floors(dataset)[0].value == pytest.approx(expected, rel=1e-12)


def split_number(i):
    from ttr_gpu.data.splits import SplitOptions, by_sequence

    return by_sequence(300, SplitOptions())[i]


def test_bits_per_byte(texts):
    dataset, _ = texts
    model = TransformerModel(
        ModelConfig(vocabulary_size=dataset.vocabulary_size, embed_dim=16, hidden_dim=16, num_layers=1, num_heads=2)
    )
    # A head of zeros predicts uniformly: every token costs log2 V bits.
    model.head.weight.value.fill(0)
    split = dataset.split("test")
    result = evaluate_split(model, split, tokens_per_batch=256, max_length=64)
    scored = split.token_count - split.sequences
    assert result.tokens == scored
    assert result.cross_entropy == pytest.approx(math.log(dataset.vocabulary_size), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(scored * math.log2(dataset.vocabulary_size) / split.bytes, rel=1e-5)
    part = evaluate_split(model, split, tokens_per_batch=256, max_length=64, limit_tokens=10)
    assert part.bits_per_byte is None
    assert part.tokens < scored
