"""Prefill and decode: from a prompt to token ids, one after the other.

The model and the KV cache are mlx-lm's, and what is computed is what its `generate_step` computes.
That function lives beside mlx-lm's tokenizers and downloads, whose imports (transformers,
huggingface_hub, and torch where it is installed) take longer than a short answer.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import mlx.core as mx

from fastvlm_mlx.imports import part

cache = part("mlx_lm.models.cache")

# Places of a prompt that are computed at once: more would need more memory than they save time.
PREFILL_PLACES = 2048
# MLX keeps the buffers that it frees, and a longer context needs other sizes.
_TOKENS_BETWEEN_CLEARING = 256

Process = Callable[[mx.array, mx.array], mx.array]


def decode(
    model: Any,
    ids: mx.array,
    embeddings: mx.array,
    *,
    max_tokens: int,
    sampler: Callable[[mx.array], mx.array],
    processors: Sequence[Process] = (),
    ahead: bool = True,
) -> Generator[int]:
    """The ids that follow a prompt.

    Args:
        model: called as `model(ids, cache=, input_embeddings=) → logits`, as mlx-lm does.
        ids: the prompt, [L].
        embeddings: the same with the image in it, [L, D].
        max_tokens: how many ids are made, 1 or more.
        sampler: log-probabilities [1, V] → a token [1].
        processors: change logits [1, V] by the tokens [n] before them.
        ahead: compute an id while the one before it is used. That is for a model that computes
            lazily; with any other each id would wait for the next one.
    """
    caches = cache.make_prompt_cache(model)
    _prefill(model, ids[:-1], embeddings[:-1], caches)
    history = ids

    def next_token(token: mx.array, embedding: mx.array | None = None) -> mx.array:
        inputs = {} if embedding is None else {"input_embeddings": embedding[None]}
        logits = model(token[None], cache=caches, **inputs)[:, -1, :]
        for process in processors:
            logits = process(history, logits)
        token = sampler(logits - mx.logsumexp(logits, keepdims=True))
        mx.async_eval(token)
        return token

    token = next_token(ids[-1:], embeddings[-1:])
    for count in range(1, max_tokens + 1):
        made = token
        if not ahead:
            yield made.item()  # type: ignore[misc]
        if count < max_tokens:
            if processors:
                history = mx.concatenate([history, made])
            token = next_token(made)
        if ahead:
            yield made.item()  # type: ignore[misc]
        if count % _TOKENS_BETWEEN_CLEARING == 0:
            mx.clear_cache()


def _prefill(model: Any, ids: mx.array, embeddings: mx.array, caches: list[Any]) -> None:
    """Fill the caches. Their logits are never computed: nothing is evaluated that needs them."""
    for start in range(0, len(ids), PREFILL_PLACES):
        places = slice(start, start + PREFILL_PLACES)
        model(ids[places][None], cache=caches, input_embeddings=embeddings[places][None])
        mx.eval([each.state for each in caches])
        mx.clear_cache()
