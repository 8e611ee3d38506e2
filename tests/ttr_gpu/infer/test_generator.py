"""Generation beside the full forward pass, samples in a batch, texts in pieces, times, and prompts of events."""

import numpy as np
import pytest

from ttr_gpu.config import ModelConfig
from ttr_gpu.data.tokenizer import byte_tokenizer, train_bpe
from ttr_gpu.errors import UserError
from ttr_gpu.infer.generator import Generator
from ttr_gpu.infer.prompts import EventPrompts, TextPrompts
from ttr_gpu.infer.sampling import Sampling
from ttr_gpu.model import TransformerModel

GREEDY = Sampling(temperature=0)
NAMES = ["login", "click", "buy, now", "logout"]


def make_model(vocabulary, seed=3, **changes):
    fields = {
        "embed_dim": 16, "hidden_dim": 24, "num_layers": 2, "num_heads": 2, "time_features_dim": 6, "time_scale": 3.0,
        "time_span": 500.0,
    }  # fmt: skip
    model = TransformerModel(ModelConfig(vocabulary_size=vocabulary, **{**fields, **changes}), seed=seed)
    # Initial weights are small: larger ones make up their mind.
    model.flat.values[...] *= 3.0
    return model


class Sequence:
    def __init__(self, tokens, times):
        self.tokens, self.times = np.array(tokens, np.int32), np.array(times, np.float64)
        self.cu_seqlens, self.targets = np.array([0, len(tokens)], np.int32), np.full(len(tokens), -1, np.int32)


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"window": 6}, {"at": 1.7e9 + 50.0}),
        ({"window": 6, "time_bias": "linear"}, {"at": 1.7e9 + 50.0, "gap": 2.5}),
        ({}, {"at": 1.7e9 + 50.0, "gap": 1e5}),
        ({"num_kv_heads": 1}, {}),
    ],
)
def test_greedy_is_the_argmax_of_the_full_forward(changes, options):
    model, tokenizer = make_model(258, **changes), byte_tokenizer()
    generator = Generator(model, tokenizer, origin=1.7e9)
    prompt = "Hello, world"
    pieces = list(generator.stream(prompt, max_tokens=40, sampling=GREEDY, **options))
    tokens = TextPrompts(tokenizer).encode(prompt).tolist()
    at, gap = options.get("at"), options.get("gap", 0.0)
    count = len(tokens)
    for piece in pieces:
        steps = np.arange(len(tokens))
        times = steps if at is None else at - 1.7e9 + gap * (steps - (count - 1))
        logits = model.logits(Sequence(tokens, times), rows=np.array([len(tokens) - 1]))[0]
        assert piece.token == logits.argmax()
        tokens.append(piece.token)
    assert len({piece.token for piece in pieces}) > 3


def test_samples_share_the_prompt_and_go_their_own_ways():
    generator = Generator(make_model(258, window=8), byte_tokenizer())
    sampling = Sampling(seed=5)

    def tokens(samples):
        found = [[] for _ in range(samples)]
        for piece in generator.stream("some text", at=3.0, max_tokens=12, samples=samples, sampling=sampling):
            found[piece.sample].append(piece.token)
        return found

    four = tokens(4)
    assert four == tokens(4)
    assert four[:1] == tokens(1)
    assert len({tuple(sample) for sample in four}) == 4


def test_samples_end_by_themselves():
    model, tokenizer = make_model(258, window=8), byte_tokenizer()
    # The end becomes likely.
    model.head.weight.value[tokenizer.end] *= 4
    pieces = list(Generator(model, tokenizer).stream("x", at=0.0, max_tokens=40, samples=6, sampling=Sampling(seed=2)))
    for sample in range(6):
        own = [piece for piece in pieces if piece.sample == sample]
        assert [piece.finish for piece in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].finish == ("end" if own[-1].token == tokenizer.end else "length")
        assert tokenizer.end not in [piece.token for piece in own[:-1]]
        assert own[-1].finish == "end" or len(own) == 40
    assert "end" in {piece.finish for piece in pieces}


def test_times_stand_still_or_advance():
    generator = Generator(make_model(258, window=8), byte_tokenizer(), origin=1000.0)

    def times(**options):
        return [piece.time for piece in generator.stream("ab", max_tokens=3, sampling=GREEDY, **options)]

    assert times(at=1500.0) == [1500.0, 1500.0, 1500.0]
    assert times(at=1500.0, gap=2.0) == [1502.0, 1504.0, 1506.0]
    # <s>, a and b are positions 0, 1 and 2.
    assert times() == [3.0, 4.0, 5.0]


def test_the_model_says_when():
    model = make_model(4, window=8, time_components=3)
    generator = Generator(model, NAMES, origin=1000.0)

    def draw(advance, samples=1, **options):
        pieces = list(generator.stream(
            "login,click", at=1500.0, gap=2.0, max_tokens=6, samples=samples, advance=advance,
            sampling=Sampling(temperature=0, seed=3), **options,
        ))  # fmt: skip
        return [[piece for piece in pieces if piece.sample == sample] for sample in range(samples)]

    (middle,) = draw("median")
    # Each time is what the full forward pass over all before it expects.
    tokens, times = [0, 1], [498.0, 500.0]
    for piece in middle:
        outputs = model.outputs(Sequence(tokens, times))[-1:]
        assert piece.token == model.next_logits(outputs)[0].argmax()
        np.testing.assert_allclose(piece.time - 1000.0 - times[-1], model.next_gap(outputs).quantile(0.5)[0], rtol=1e-3)
        tokens.append(piece.token)
        times.append(piece.time - 1000.0)
    one, three = draw("sample"), draw("sample", samples=3)
    assert [piece.time for piece in one[0]] == pytest.approx([piece.time for piece in three[0]], rel=1e-9)
    assert len({tuple(piece.time for piece in sample) for sample in three}) == 3
    for sample in three:
        assert (np.diff([1500.0, *(piece.time for piece in sample)]) > 0).all()


BPE = train_bpe(iter(["größer als 𝒳 – naïve 日本語 text " * 20]), 280)


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), BPE], ids=["bytes", "bpe"])
def test_text_in_pieces_is_the_text(tokenizer):
    text = "größer als 𝒳 – naïve, 日本語\n  two  spaces"
    prompts = TextPrompts(tokenizer)
    tokens = prompts.encode(text)
    assert tokens[0] == tokenizer.start
    for cut in range(1, len(tokens)):
        detokenizer = prompts.detokenizer(tokens[:cut])
        pieces = [detokenizer.add(int(token)) for token in tokens[cut:]] + [detokenizer.finish()]
        whole = tokenizer.decode(tokens)
        if not tokenizer.decode(tokens[:cut]).endswith("\ufffd"):
            assert "".join(pieces) == whole[len(tokenizer.decode(tokens[:cut])) :]
            assert "\ufffd" not in "".join(pieces)


def test_bytes_that_are_no_text_come_out_in_the_end():
    tokenizer = byte_tokenizer()
    prompts = TextPrompts(tokenizer)
    start = prompts.encode("é")[1]
    detokenizer = prompts.detokenizer(np.array([tokenizer.start], np.int32))
    told = [detokenizer.add(int(start)) for _ in range(3)]
    assert told == ["", "", ""]
    assert detokenizer.finish() == "\ufffd" * 3


def test_tokens_beyond_the_tokenizer_are_never_drawn():
    model = make_model(300, window=8)
    model.head.weight.value[258:] *= 50
    pieces = Generator(model, byte_tokenizer()).stream("abc", at=0.0, max_tokens=30, sampling=Sampling(temperature=5.0))
    assert max(piece.token for piece in pieces) < 258


def test_events_by_their_names():
    model = make_model(4, window=8)
    pieces = list(
        Generator(model, NAMES).stream('["login", "buy, now"]', at=5.0, gap=1.0, max_tokens=5, sampling=GREEDY)
    )
    assert [piece.text for piece in pieces] == [f"{NAMES[piece.token]}\n" for piece in pieces]
    assert [piece.finish for piece in pieces] == [None] * 4 + ["length"]
    assert EventPrompts(NAMES).encode("login,click , logout").tolist() == [0, 1, 3]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt: got no event, expected at least one type, such as 'login'"),
        ("login, clik", "no event type 'clik'; did you mean 'click'"),
        ("[3]", "no event type 3; there are 'login', "),
    ],
)
def test_prompts_of_unknown_events_are_refused(prompt, message):
    with pytest.raises(UserError, match=message):
        list(Generator(make_model(4), NAMES).stream(prompt, at=0.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens: got 0, expected at least 1"), ({"samples": 0}, "samples: got 0"),
        ({"gap": -1.0}, "gap: got -1.0"),
        ({"advance": "mean"}, "advance: got 'mean'"),
        ({"advance": "sample", "at": 0.0}, "this model does not say when"),
        ({"at": float("nan")}, "at: got nan, expected a finite time"),
    ],
)  # fmt: skip
def test_bad_options_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        Generator(make_model(4), NAMES).stream("login", **options)
