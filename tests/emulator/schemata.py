"""All mutants of a file in one program: which of them is in force is chosen when it runs (Untch et al. 1993, *Mutation
Analysis Using Mutant Schemata*). Kernels are then compiled once, not once for each mutant.

The expression around a change becomes a choice: `x[i + 1]` with `+` and `-` exchanged by mutant 7 becomes
`x[(TTR_IS(7) ? (i - 1) : (i + 1))]`. What must be a constant when it is compiled, and declarations, cannot be chosen.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

# Stands in front of a header that every kernel includes. Number 0: none of them.
PRELUDE = """#include <cstdlib>
static const int ttr_mutant = std::getenv("TTR_MUTANT") ? std::atoi(std::getenv("TTR_MUTANT")) : 0;
#define TTR_IS(number) (ttr_mutant == (number))
"""
# A statement with one of these has parts that must be constants.
_CONSTANT = re.compile(
    r"\b(constexpr|template|static_assert|TTR_SHARED|TTR_DYN_SMEM|using|typedef|__launch_bounds__)\b"
)
# So does the length of an array where it is declared.
_DECLARATION = re.compile(
    r"\s*(?:const\s+)?(?!return\b|else\b)[A-Za-z_][\w:]*\s+(?:\w+(?:\[[^\]]*\])*\s*,\s*)*\w+(?:\[[^\]]*\])*\["
)
_CONTROL = re.compile(r"\b(if|for|while|switch)\s*$")
_ASSIGNMENT = re.compile(r"(?<![=!<>+\-*/%&|^])(?:[-+*/%&|^]|<<|>>)?=$")


@dataclass(frozen=True)
class Change:
    """Mutant `number` has `new` in place of text[begin:end]."""

    number: int
    begin: int
    end: int
    new: str


@dataclass
class _Segment:
    """An expression, and the changes of which it is the smallest that holds them."""

    begin: int
    end: int
    changes: list[Change] = field(default_factory=list)
    inner: list[_Segment] = field(default_factory=list)


def schema(text: str, changes: Iterable[Change]) -> tuple[str, list[Change]]:
    """(the text with a choice for every change, on the same lines; changes that cannot be chosen)."""
    code = _without_comments(text)
    segments: dict[tuple[int, int], _Segment] = {}
    left_out = []
    for change in changes:
        bounds = _expression(code, change.begin, change.end)
        if bounds is None:
            left_out.append(change)
        else:
            segments.setdefault(bounds, _Segment(*bounds)).changes.append(change)
    outermost: list[_Segment] = []
    # Outer ones before those inside them.
    for segment in sorted(segments.values(), key=lambda each: (each.begin, -each.end)):
        place, parent = outermost, None
        while place and place[-1].end > segment.begin:
            parent = place[-1]
            if parent.end < segment.end:
                raise ValueError(f"expressions overlap: {text[parent.begin : segment.end]!r}")
            place = parent.inner
        place.append(segment)
    return _rendered(text, 0, len(text), outermost), left_out


def _rendered(text: str, begin: int, end: int, segments: Sequence[_Segment]) -> str:
    parts, at = [], begin
    for segment in segments:
        parts += [text[at : segment.begin], _choice(text, segment)]
        at = segment.end
    return "".join([*parts, text[at:end]])


def _choice(text: str, segment: _Segment) -> str:
    plain = _rendered(text, segment.begin, segment.end, segment.inner)
    is_removed = [not _changed(text, segment, change).strip() for change in segment.changes]
    chosen = ""
    for change, removed in zip(segment.changes, is_removed, strict=True):
        # One line: what follows stays on the line where it was.
        other = "(void)0" if removed else _changed(text, segment, change).replace("\n", " ")
        other = f"(void)({other})" if any(is_removed) and not removed else f"({other})"
        chosen += f"TTR_IS({change.number}) ? {other} : "
    return f"({chosen}{'(void)' if any(is_removed) else ''}({plain}))"


def _changed(text: str, segment: _Segment, change: Change) -> str:
    return text[segment.begin : change.begin] + change.new + text[change.end : segment.end]


def _without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*", lambda match: " " * len(match.group()), text)


def _expression(code: str, begin: int, end: int) -> tuple[int, int] | None:
    """The smallest expression around a span; None where it may have to be a constant, or is none."""
    left, right = _left_end(code, begin), _right_end(code, end)
    if left is None or right is None:
        return None
    while left < begin and code[left].isspace():
        left += 1
    while right > end and code[right - 1].isspace():
        right -= 1
    inside = code[left:right]
    begin_of_statement = max(code.rfind(mark, 0, left) for mark in ";{}") + 1
    if _CONSTANT.search(code, begin_of_statement, right) or _DECLARATION.fullmatch(code, begin_of_statement, left):
        return None
    if "{" in inside or "#" in inside or not inside.strip():
        return None
    return left, right


def _left_end(code: str, at: int) -> int | None:
    depth = 0
    while at > 0:
        mark = code[at - 1]
        if mark in ")]":
            if mark == ")" and depth == 0:
                opening = _matching(code, at - 1)
                if _CONTROL.search(code[max(0, opening - 8) : opening]):
                    return at
            depth += 1
        elif mark in "([":
            if depth == 0:
                return at
            depth -= 1
        elif depth == 0:
            if mark in ",;{}":
                return at
            if mark == "=" and _ASSIGNMENT.search(code[max(0, at - 4) : at]) and code[at : at + 1] != "=":
                return at
            if re.search(r"\b(return|else|do)\s$", code[max(0, at - 8) : at]):
                return at
            if mark == "\n" and code[code.rfind("\n", 0, at - 1) + 1 : at].lstrip().startswith("#"):
                return at
        at -= 1
    return None


def _right_end(code: str, at: int) -> int | None:
    depth = 0
    while at < len(code):
        mark = code[at]
        if mark in "([":
            depth += 1
        elif mark in ")]":
            if depth == 0:
                return at
            depth -= 1
        elif depth == 0 and mark in ",;{}":
            return at
        at += 1
    return None


def _matching(code: str, closing: int) -> int:
    """Where the parenthesis that closes at `closing` opens."""
    depth = 0
    for at in range(closing, -1, -1):
        depth += {")": 1, "(": -1}.get(code[at], 0)
        if depth == 0:
            return at
    return 0
