"""Text to tokens: byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) trained here, a given one, or bytes.

Built on Hugging Face `tokenizers`; every kind is saved as one `tokenizer.json`.
"""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError

END, START = "</s>", "<s>"
# Characters of the longest word from which BPE learns.
_LONGEST_WORD = 4096
_LONG_WORD = re.compile(rf"\S{{{_LONGEST_WORD}}}|\s{{{_LONGEST_WORD}}}")


class TextTokenizer:
    """Encodes documents. `</s>` ends a document and `<s>` starts a sequence; inside a text both are ordinary text."""

    def __init__(self, tokenizer: Any) -> None:
        tokenizer.encode_special_tokens = True
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self.end: int = tokenizer.token_to_id(END)
        self.start: int = tokenizer.token_to_id(START)

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens, special ones included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode_batch(self, texts: list[str]) -> list[np.ndarray[Any, Any]]:
        """int32 tokens of each text, without special tokens."""
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(one.ids, np.int32) for one in encoded]

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of tokens, without special ones."""
        return str(self._tokenizer.decode([int(t) for t in tokens], skip_special_tokens=True))

    def token(self, index: int) -> str:
        """A token as readable text, e.g. ' the'."""
        if index in (self.end, self.start):
            return END if index == self.end else START
        return str(self._tokenizer.decode([index], skip_special_tokens=False))

    def save(self, path: Path) -> None:
        """Write tokenizer.json."""
        self._tokenizer.save(str(path))


def train_bpe(texts: Iterator[str], vocabulary_size: int) -> TextTokenizer:
    """Byte-level BPE: any UTF-8 text is encoded and comes back exactly.

    Raises UserError if the vocabulary is too small for the 256 bytes and 2 special tokens.
    """
    from tokenizers import trainers

    check_vocabulary_size(vocabulary_size)
    tokenizer = _byte_level({})
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size, special_tokens=[END, START], initial_alphabet=_alphabet(), show_progress=False
    )
    pieces = (piece for text in texts for piece in _cut_long_words(text))
    _interruptible(lambda taken: tokenizer.train_from_iterator(taken, trainer), pieces)
    return TextTokenizer(tokenizer)


def _interruptible(train: Callable[[Iterator[str]], None], texts: Iterator[str]) -> None:
    """`train(texts)` in a thread of its own: the library asks for no signals, and Ctrl-C would wait for its end."""
    stopped, done = threading.Event(), threading.Event()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            train(itertools.takewhile(lambda _: not stopped.is_set(), texts))
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    threading.Thread(target=work, name="tokenizer", daemon=True).start()
    try:
        # An event: a thread whose join was interrupted counts as ended (Python 3.11), and is waited for no more.
        done.wait()
    except BaseException:
        # The thread must not come back into Python while Python ends; if this is not enough, ttr_cli.main sees to it.
        stopped.set()
        done.wait(0.5)
        raise
    if errors:
        raise errors[0]


def check_vocabulary_size(size: int) -> None:
    """UserError if a vocabulary is too small for the 256 bytes and the special tokens."""
    if size < 258:
        raise UserError(f"--vocab-size: got {size}, expected at least 258 (256 bytes, {END} and {START})")


def _cut_long_words(text: str) -> list[str]:
    """A text whose words are short, as it is; else in pieces: training takes time with the square of a word's length
    (one of 3 MB took more than 100 s, in pieces 5 s)."""
    if _LONG_WORD.search(text) is None:
        return [text]
    return [text[i : i + _LONGEST_WORD] for i in range(0, len(text), _LONGEST_WORD)]


def byte_tokenizer() -> TextTokenizer:
    """The 256 bytes and the two special tokens."""
    vocabulary = {END: 0, START: 1} | {byte: index + 2 for index, byte in enumerate(_alphabet())}
    tokenizer = _byte_level(vocabulary)
    tokenizer.add_special_tokens([END, START])
    return TextTokenizer(tokenizer)


def load_tokenizer(path: Path) -> TextTokenizer:
    """An existing tokenizer.json; the two special tokens are added if it has none of that name."""
    from tokenizers import Tokenizer

    if not path.is_file():
        raise UserError(f"--tokenizer: got {path}, expected 'bpe', 'bytes' or an existing tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{path}: no valid tokenizer.json: {error}") from None
    tokenizer.add_special_tokens([token for token in (END, START) if tokenizer.token_to_id(token) is None])
    return TextTokenizer(tokenizer)


def _byte_level(vocabulary: dict[str, int]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]) if vocabulary else models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())
