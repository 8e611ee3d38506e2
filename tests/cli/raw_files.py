"""Raw files as tests of `ttr-gpu preprocess` write them, and what the data set made of one holds."""

import gzip

from ttr_gpu.data.dataset import open_dataset

ROWS = [("a", 1.5, "x"), ("b", 1.0, "y"), ("a", 2.5, "z"), ("b", 4.0, "x"), ("c", 3.0, "y"), ("d", 3.0, "x")]
# One split, in the order of each sequence's first event: what was read can be compared whole.
WHOLE = ("--split", "1,0,0")
EXPECTED = {"a": [(1.5, "x"), (2.5, "z")], "b": [(1.0, "y"), (4.0, "x")], "c": [(3.0, "y")], "d": [(3.0, "x")]}


def sequences(path, split="train"):
    """[[(time, type or token as text)]] of a split."""
    dataset = open_dataset(path)
    part = dataset.split(split)
    tokens, times = part.read(0, part.token_count)
    names = dataset.vocabulary or [dataset.tokenizer().token(i) for i in range(dataset.vocabulary_size)]
    pairs = [(float(t + dataset.origin), names[k]) for k, t in zip(tokens, times, strict=True)]
    return [pairs[a:b] for a, b in zip(part.offsets[:-1], part.offsets[1:], strict=True)]


def documents(path, split="train"):
    """Text of each sequence of a split."""
    dataset = open_dataset(path)
    part = dataset.split(split)
    tokens, _ = part.read(0, part.token_count)
    return [dataset.tokenizer().decode(tokens[a:b]) for a, b in zip(part.offsets[:-1], part.offsets[1:], strict=True)]


def csv_of(rows, header="sequence,time,type", delimiter=",", end="\n"):
    lines = [header.replace(",", delimiter)] if header else []
    return end.join([*lines, *(delimiter.join(map(str, row)) for row in rows)]) + end


def packed(content):
    return gzip.compress(content, mtime=0)
