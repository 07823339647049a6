"""Property lists in the old format, Xcode's of projects: values, and where they stand."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

# `objects`, an object, its requirement: Xcode's own files are not ten deep.
MAX_DEPTH = 50

_TOKEN = re.compile(
    r"""(?P<skipped>\s+|//[^\n]*|/\*.*?\*/)
    |"(?P<quoted>(?:[^"\\]|\\.)*)"
    |(?P<word>[\w$./:-]+)
    |(?P<mark>[{}()=;,])""",
    re.DOTALL | re.VERBOSE | re.ASCII,
)
_Token = tuple[str, str, tuple[int, int]]


@dataclass
class Node:
    """A value of a property list: its text, or its entries; where it stands."""

    span: tuple[int, int]
    text: str | None
    entries: dict[str, Node]

    def text_of(self, key: str) -> str:
        """Return the text of an entry; raises ValueError if it is missing or no text."""
        found = self.entries.get(key)
        if found is None or found.text is None:
            raise ValueError(f"{key} is missing at character {self.span[0]}")
        return found.text


def parse(text: str) -> Node:
    """Parse a property list; raises ValueError if it is none."""
    tokens = _tokens(text)
    found = _value(next(tokens), tokens, 0)
    kind, more, (place, _) = next(tokens)
    if kind != "end":
        raise ValueError(f"{more} at character {place}, expected its end")
    return found


def _tokens(text: str) -> Iterator[_Token]:
    """Kind, text and place of each; at last an endless end."""
    place = 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise ValueError(f"{text[place]!r} at character {place}")
        place = match.end()
        kind = match.lastgroup or ""
        if kind != "skipped":
            yield kind, match.group(kind), match.span()
    while True:
        yield "end", "", (place, place)


def _value(token: _Token, tokens: Iterator[_Token], depth: int) -> Node:
    kind, text, span = token
    if kind in ("quoted", "word"):
        return Node(span, re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL), {})
    closing = {"{": "}", "(": ")"}.get(text)
    if closing is None or depth > MAX_DEPTH:
        raise ValueError(f"{text or 'its end'} at character {span[0]}")
    entries: dict[str, Node] = {}
    token = next(tokens)
    while token[:2] != ("mark", closing):
        key = str(len(entries))
        if text == "{":
            key = _value(token, tokens, depth + 1).text or ""
            _expect("=", next(tokens))
            token = next(tokens)
        entries[key] = _value(token, tokens, depth + 1)
        token = next(tokens)
        if text == "{":
            _expect(";", token)
            token = next(tokens)
        elif token[1] == ",":
            token = next(tokens)
    return Node((span[0], token[2][1]), None, entries)


def _expect(mark: str, token: _Token) -> None:
    if token[:2] != ("mark", mark):
        raise ValueError(f"{token[1] or 'its end'} at character {token[2][0]}, expected {mark}")
