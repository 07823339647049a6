"""Detokenization: whole characters only, and nothing that may begin a stop string."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from fastvlm_mlx.bundle.manifest import EXPORT_AGAIN
from fastvlm_mlx.bundle.tokenizer import no_panic
from fastvlm_mlx.errors import BundleError


class Text:
    """The text of an answer as its tokens come.

    It is cut where the first stop string is complete, whatever the tokens that it came in.

    Attributes:
        shown: what can be shown, so far.
        decoded: characters that have come, shown or not.
        stopped: whether a stop string has come.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]):
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._stop = _StopStrings(stop)
        self._pending = ""
        self.shown = ""
        self.decoded = 0
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that can be shown now.

        Raises:
            BundleError: the tokenizer fails.
        """
        with no_panic("the tokenizer can't decode the answer", BundleError, EXPORT_AGAIN):
            came = self._decoder.step(self._tokenizer, token) or ""
        self.decoded += len(came)
        for character in came:
            self._pending += character
            if found := self._stop.add(character):
                self.stopped = True
                return self._show(len(self._pending) - found, drop=True)
        return self._show(len(self._pending) - self._stop.begun)

    def flush(self) -> str:
        """What was held back for a stop string that did not come."""
        return "" if self.stopped else self._show(len(self._pending))

    def _show(self, length: int, *, drop: bool = False) -> str:
        piece, rest = self._pending[:length], self._pending[length:]
        self._pending = "" if drop else rest
        self.shown += piece
        return piece


class _StopStrings:
    """Aho and Corasick's automaton: finds any of many strings, in the same time as one.

    A state is the longest end of the text that begins a stop string; state 0 is none.

    Attributes:
        begun: length of that end.
    """

    def __init__(self, stop: Sequence[str]):
        self._next: list[dict[str, int]] = [{}]
        self._length = [0]  # of what a state is the end of
        self._found = [0]  # length of the longest stop string that ends there
        self._shorter = [0]  # the next longest end that begins one
        self._state = 0
        for text in stop:
            state = 0
            for character in text:
                state = self._next[state].get(character) or self._extend(state, character)
            self._found[state] = len(text)
        states = deque(self._next[0].values())
        while states:
            state = states.popleft()
            for character, longer in self._next[state].items():
                shorter = self._step(self._shorter[state], character)
                self._shorter[longer] = shorter
                self._found[longer] = self._found[longer] or self._found[shorter]
                states.append(longer)

    def _extend(self, state: int, character: str) -> int:
        longer = self._next[state][character] = len(self._next)
        self._next.append({})
        self._length.append(self._length[state] + 1)
        self._found.append(0)
        self._shorter.append(0)
        return longer

    def _step(self, state: int, character: str) -> int:
        while state and character not in self._next[state]:
            state = self._shorter[state]
        return self._next[state].get(character, 0)

    @property
    def begun(self) -> int:
        return self._length[self._state]

    def add(self, character: str) -> int:
        """Length of the longest stop string that `character` completes, 0 where none."""
        self._state = self._step(self._state, character)
        return self._found[self._state]
