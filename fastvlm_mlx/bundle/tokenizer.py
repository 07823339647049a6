"""`tokenizer.json` of somebody else's: read within limits, and safe to tokenize with.

FastVLM's tokenizer is Qwen2's, trained further or not. The library that reads it runs whatever
regular expressions the file holds, some of which take years over a line of text, and panics at
some damaged files.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tokenizers import Tokenizer

from fastvlm_mlx.bundle.schema import parse
from fastvlm_mlx.errors import FastVLMError

# transformers/models/qwen2/tokenization_qwen2.py; the same in Qwen2's own tokenizer.json.
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What a tokenizer.json of Qwen2's may do to text before the merges. None of it can run for long.
STEPS = frozenset({"NFC", "ByteLevel", "Split", "Sequence"})
# Settings of BPE that change the ids of a text, by chance in one case.
NOT_QWEN2S = (
    "dropout",
    "unk_token",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "fuse_unk",
    "byte_fallback",
)
# Longer than any word of a vocabulary.
MAX_TOKEN_CHARACTERS = 1_000


def read_tokenizer(
    data: bytes, source: str, error: type[FastVLMError], *, remedy: str, rows: int | None = None
) -> Tokenizer:
    """The tokenizer in `data`, the content of the file `source`.

    Args:
        rows: of the embedding that its ids are looked up in.

    Raises:
        error: it is no tokenizer, or not one of Qwen2's kind, or has an id without a row.
    """
    found = parse(data, source, error, remedy=remedy)
    model = found.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else model
        raise error(f"{source} holds a model of type {kind!r}, expected Qwen2's BPE: {remedy}")
    for key in NOT_QWEN2S:
        if model.get(key):
            raise error(f"{source}: model.{key} is {model[key]!r}, Qwen2's has none: {remedy}")
    for step in ("normalizer", "pre_tokenizer"):
        _check_step(found.get(step), f"{source}: {step}", error, remedy)
    with no_panic(f"{source} can't be read as a tokenizer", error, remedy):
        tokenizer = Tokenizer.from_str(data.decode())
        # A tokenizer.json may ask for either; a prompt is neither cut nor filled up.
        tokenizer.no_truncation()
        tokenizer.no_padding()
    vocabulary = _vocabulary(tokenizer, model.get("vocab"))
    long = [t for t in vocabulary if len(t) > MAX_TOKEN_CHARACTERS]
    if long:
        raise error(
            f"{source} holds a token of {len(long[0]):,} characters ({long[0][:20]!r}…), expected "
            f"at most {MAX_TOKEN_CHARACTERS:,}: {remedy}"
        )
    largest = max(vocabulary.values(), default=-1)
    if rows is not None and largest >= rows:
        token = next(t for t, number in vocabulary.items() if number == largest)
        raise error(
            f"{source} gives {token!r} the id {largest:,} and the embedding has {rows:,} rows: "
            f"expected the tokenizer of this model, {remedy}"
        )
    return tokenizer


def _vocabulary(tokenizer: Tokenizer, stored: Any) -> dict[str, int]:
    """Every token's id, from the file's own vocabulary: the library takes 0.2 s to copy its."""
    if not isinstance(stored, dict):
        return dict(tokenizer.get_vocab())
    added = tokenizer.get_added_tokens_decoder()
    return stored | {token.content: number for number, token in added.items()}


@contextmanager
def no_panic(what: str, error: type[FastVLMError], remedy: str) -> Iterator[None]:
    """Turn whatever the tokenizers library raises into one sentence that begins with `what`.

    Raises:
        error: the library raised, or panicked.
    """
    try:
        yield
    except FastVLMError:
        raise
    # Its errors are plain Exceptions, and its panics are no Exception at all.
    except BaseException as cause:
        if not isinstance(cause, Exception) and type(cause).__name__ != "PanicException":
            raise
        raise error(f"{what} ({cause}): {remedy}") from cause


def _check_step(step: Any, where: str, error: type[FastVLMError], remedy: str) -> None:
    """Refuse what Qwen2's tokenizer does not do to text."""
    if step is None:
        return
    kind = step.get("type") if isinstance(step, dict) else step
    if not isinstance(kind, str) or kind not in STEPS:
        raise error(f"{where} is {kind!r}, expected Qwen2's {', '.join(sorted(STEPS))}: {remedy}")
    if kind == "Split":
        pattern = step.get("pattern")
        found = pattern.get("Regex") if isinstance(pattern, dict) else None
        if found != QWEN2_PATTERN:
            raise error(f"{where} splits text by {pattern!r}, expected Qwen2's pattern: {remedy}")
    for key in ("normalizers", "pretokenizers"):
        inner = step.get(key)
        for part in inner if isinstance(inner, list) else []:
            _check_step(part, where, error, remedy)
