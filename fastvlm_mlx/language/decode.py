"""Prefill and decode: from prompts to token ids, one after the other, alone or many together.

The models and the KV caches have mlx-lm's interface, and what is computed is what its
`generate_step` and `BatchGenerator` compute. Those live beside mlx-lm's tokenizers and downloads,
whose imports (transformers, huggingface_hub, and torch where it is installed) take longer than a
short answer; and `BatchGenerator` copies the caches of every prompt that waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from fastvlm_mlx.imports import part
from fastvlm_mlx.language.kept import Kept, Prompt, keep, take
from fastvlm_mlx.language.logprobs import Scores

if TYPE_CHECKING:
    from fastvlm_mlx.language.structured.constraint import Constraint

cache = part("mlx_lm.models.cache")

# MLX keeps the buffers that it frees, and a longer context needs other sizes.
_TOKENS_BETWEEN_CLEARING = 256

Process = Callable[[mx.array, mx.array], mx.array]


class Continuation:
    """A prompt and the ids that follow it, so far.

    Attributes:
        caches: of each layer, once it has begun.
        token: the latest id, [1].
        cached_tokens: places of the prompt that were computed for an earlier one.
        constraint: what the ids must lead to, or None.
        scores: of each id that was chosen and not yet read, where they are wanted.
    """

    def __init__(
        self,
        prompt: Prompt,
        *,
        max_tokens: int,
        sampler: Callable[[mx.array], mx.array],
        processors: Sequence[Process] = (),
        constraint: Constraint | None = None,
        logprobs: int | None = None,
    ):
        """
        Args:
            max_tokens: how many ids are made, 1 or more.
            sampler: logits [1, V] → a token [1].
            processors: change logits [1, V] by the tokens [n] before them.
            constraint: at its beginning; it comes after the processors.
            logprobs: how many of the likeliest ids the scores tell, or None for no scores.
        """
        self.prompt, self.max_tokens, self.constraint = prompt, max_tokens, constraint
        self.caches: list[Any] = []
        self.token: mx.array
        self.cached_tokens = 0
        self.scores: deque[Scores] = deque()
        self._logprobs = logprobs
        self._sampler, self._processors = sampler, processors
        self._history = prompt.ids
        self._count = 0

    def begin(self, model: Any, kept: Kept) -> None:
        """Compute what is not kept of the prompt, and the first id."""
        self.caches = cache.make_prompt_cache(model)
        taken = take(kept, self.prompt, self.caches)
        ends = (0, *self.prompt.ends)
        self.cached_tokens = ends[taken]
        ids, embeddings = self.prompt.ids, self.prompt.embeddings
        for index in range(taken, len(ends) - 1):
            places = slice(ends[index], ends[index + 1])
            logits = model(
                ids[places][None], cache=self.caches, input_embeddings=embeddings[places][None]
            )
            if places.stop < len(ids):
                # MLX never computes its logits: nothing is evaluated that needs them.
                mx.eval([each.state for each in self.caches])
                if kept.limit:
                    keep(kept, self.prompt.keys[index], self.caches, places.start, places.stop)
                mx.clear_cache()
        # A piece is of no use without those before it, which therefore are to go after it.
        for key in reversed(self.prompt.keys):
            kept.get(key)
        self.choose(logits[:, -1, :])

    def choose(self, logits: mx.array) -> None:
        """The next id, from logits [1, V]; it may be computed later."""
        for process in self._processors:
            logits = process(self._history, logits)
        if self.constraint is not None:
            # They are computed while the id before them is read and the mask is made.
            mx.async_eval(logits)
            if self._count:
                self.constraint.add(self._count - 1, self.token.item())  # type: ignore[arg-type]
            logits = self.constraint.mask(logits)
        self.token = self._sampler(logits)
        self._count += 1
        if self._logprobs is None:
            mx.async_eval(self.token)
        else:
            self.scores.append(Scores.of(logits, self.token, self._logprobs))
            mx.async_eval(self.token, *self.scores[-1].arrays)
        if self._processors:
            self._history = mx.concatenate([self._history, self.token])


def decode(
    model: Any, continued: Continuation, kept: Kept, *, ahead: bool = True
) -> Generator[int]:
    """The ids that follow a prompt.

    Args:
        model: called as `model(ids, cache=, input_embeddings=) → logits`, as mlx-lm does.
        ahead: compute an id while the one before it is used. That is for a model that computes
            lazily; with any other each id would wait for the next one.
    """
    continued.begin(model, kept)
    for count in range(1, continued.max_tokens + 1):
        made = continued.token
        if not ahead:
            yield made.item()  # type: ignore[misc]
        if count < continued.max_tokens:
            continued.choose(model(made[None], cache=continued.caches)[:, -1, :])
        if ahead:
            yield made.item()  # type: ignore[misc]
        if count % _TOKENS_BETWEEN_CLEARING == 0:
            mx.clear_cache()


class Batch:
    """Prompts that are continued together. They join and leave between one id and the next."""

    def __init__(self, model: Any, *, ahead: bool = True):
        self._model, self._ahead = model, ahead
        self.sequences: list[Continuation] = []
        self._caches: list[Any] = []
        self._read = False  # whether the latest ids were handed out
        self._count = 0

    def join(self, begun: Continuation) -> None:
        """Take in a prompt that has begun. Its caches are the batch's from now on."""
        if self._read:
            self._compute()
        merged = [each.merge([each]) for each in begun.caches]
        if self.sequences:
            for held, new in zip(self._caches, merged, strict=True):
                held.extend(new)
        else:
            self._caches = merged
        begun.caches = []
        self.sequences.append(begun)

    def advance(self) -> list[int]:
        """The next id of each sequence."""
        if self._read:
            self._compute()
        made = [each.token for each in self.sequences]
        self._read = True
        if self._ahead:
            self._compute()
        self._count += 1
        if self._count % _TOKENS_BETWEEN_CLEARING == 0:
            mx.clear_cache()
        return [token.item() for token in made]  # type: ignore[misc]

    def _compute(self) -> None:
        self._read = False
        ids = mx.concatenate([each.token for each in self.sequences])
        logits = self._model(ids[:, None], cache=self._caches)[:, -1, :]
        for index, each in enumerate(self.sequences):
            each.choose(logits[index : index + 1])

    def leave(self, ended: Sequence[int]) -> None:
        """Let go of sequences, by their places among `sequences`."""
        if not ended:
            return
        left = [index for index in range(len(self.sequences)) if index not in set(ended)]
        self.sequences = [self.sequences[index] for index in left]
        if left:
            for each in self._caches:
                each.filter(left)
        else:
            self._caches, self._read = [], False
