"""What stands between a prompt as a person writes it and tokens: for texts a tokenizer, for events names of types."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ttr_kernels.common.arrays import Array

from ..data.tokenizer import TextTokenizer
from ..data.wording import shown
from ..errors import UserError

# Names that a message lists.
_TOLD = 8


class Detokenizer(Protocol):
    """Turns the tokens of one sample into text as they come."""

    def add(self, token: int) -> str:
        """The text that is certain now."""

    def finish(self) -> str:
        """What was held back."""


class Prompts(Protocol):
    """Prompts of one kind of model.

    Attributes:
        size: number of tokens that have a meaning.
        end: the token that ends a sample, or None.
    """

    size: int
    end: int | None

    def encode(self, prompt: str) -> Array:
        """(P,) int32 tokens, at least one. UserError for what is none."""

    def detokenizer(self, prompt: Array) -> Detokenizer:
        """For one sample that continues these tokens."""


class TextPrompts:
    """A text after `<s>`; its continuation ends with `</s>`."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self.size = tokenizer.vocabulary_size
        self.end: int | None = tokenizer.end

    def encode(self, prompt: str) -> Array:
        """`<s>` and the tokens of the text, which may be empty."""
        return np.concatenate(([self._tokenizer.start], *self._tokenizer.encode_batch([prompt]))).astype(np.int32)

    def detokenizer(self, prompt: Array) -> Detokenizer:
        """For one sample that continues these tokens."""
        return _TextDetokenizer(self._tokenizer, prompt)


class _TextDetokenizer:
    """Text is told by its difference to the text before: what a token looks like may depend on its neighbours, and a
    character may take several tokens."""

    def __init__(self, tokenizer: TextTokenizer, prompt: Array) -> None:
        self._tokenizer = tokenizer
        # A few tokens of the past are context enough.
        self._tokens = [int(token) for token in prompt[-8:]]
        self._told = tokenizer.decode(self._tokens)

    def add(self, token: int) -> str:
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        if text.endswith("\ufffd") and len(self._tokens) < 64:
            # Probably half of a character.
            return ""
        new = text[len(self._told) :]
        self._tokens = self._tokens[-8:]
        self._told = self._tokenizer.decode(self._tokens)
        return new

    def finish(self) -> str:
        return self._tokenizer.decode(self._tokens)[len(self._told) :]


class EventPrompts:
    """Names of event types, separated by commas, or as a JSON array where names contain commas.

    Attributes:
        numerals: whether there are types that are called by a number, such as "17".
    """

    end: int | None = None

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self._index = {name: index for index, name in enumerate(self._names)}
        self.size = len(self._names)
        self.numerals = any(name.isdecimal() for name in self._names)

    def encode(self, prompt: str) -> Array:
        """Tokens of the types; UserError naming one that is unknown."""
        names: list[object]
        try:
            parsed = json.loads(prompt) if prompt.lstrip().startswith("[") else None
        except ValueError:
            parsed = None
        names = parsed if isinstance(parsed, list) else [part.strip() for part in prompt.split(",") if part.strip()]
        if not names:
            raise UserError(f"prompt: got no event, expected at least one type, such as {shown(self._names[0])}")
        return np.array([self.token(name) for name in names], np.int32)

    def token(self, name: object) -> int:
        """The token of a type; UserError with the nearest name if there is none. A number is a name of numerals."""
        known = isinstance(name, str) or (isinstance(name, int) and not isinstance(name, bool))
        index = self._index.get(str(name)) if known else None
        if index is None:
            near = difflib.get_close_matches(str(name), self._names, 1)
            some = ", ".join(map(shown, self._names[:_TOLD]))
            hint = f"there are {some}" + (f" and {self.size - _TOLD} more" if self.size > _TOLD else "")
            raise UserError(f"no event type {shown(name)}; {f'did you mean {shown(near[0])}?' if near else hint}")
        return index

    def detokenizer(self, prompt: Array) -> Detokenizer:
        """For one sample: a name and a line break for each event."""
        return _EventDetokenizer(self._names)


class _EventDetokenizer:
    def __init__(self, names: list[str]) -> None:
        self._names = names

    def add(self, token: int) -> str:
        return f"{self._names[token]}\n"

    def finish(self) -> str:
        return ""
