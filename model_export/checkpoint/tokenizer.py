"""The checkpoint's tokenizer as `tokenizer.json`, with a placeholder for the image in it.

LLaVA's training saves the slow form (`vocab.json`, `merges.txt`, `added_tokens.json`), which
Swift does not read, and has no token for the image: the reference uses the id -200.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta
from tokenizers import AddedToken, Tokenizer

from fastvlm_mlx.bundle.config import IMAGE_TOKEN
from fastvlm_mlx.bundle.files import read_bytes
from fastvlm_mlx.bundle.schema import check
from fastvlm_mlx.bundle.tokenizer import no_panic, read_tokenizer
from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.language.prompt.template import CHAT_TEMPLATE, TURN_END, TURN_START
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.checkpoint.weights.weight_files import read_json

# Writing a tokenizer takes as long as its largest id, and Qwen2's is 151,645.
VocabularyId = Annotated[int, Meta(ge=0, le=2**22)]
ADDED_TOKEN = frozenset(
    {"__type", "content", "lstrip", "normalized", "rstrip", "single_word", "special"}
)
COPY = "copy the files of the model it was trained from"
REQUIRED = (TURN_START, TURN_END)
# Rows of an embedding that has to grow, as Qwen2's own vocabularies are padded.
ROWS_MULTIPLE = 64


@dataclass(frozen=True)
class ExportedTokenizer:
    """A tokenizer with `<image>`, its `tokenizer_config.json`, and what the user should be told."""

    tokenizer: Tokenizer
    config: dict[str, Any]
    image_token_id: int
    notes: tuple[str, ...] = ()

    @property
    def turn_end_id(self) -> int:
        """Return the id of `<|im_end|>`, which ends an answer."""
        return int(self.tokenizer.get_vocab()[TURN_END])

    def save(self, directory: Path) -> None:
        self.tokenizer.save(str(directory / "tokenizer.json"))
        text = json.dumps(self.config, indent=2, ensure_ascii=False)
        (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
        (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def export_tokenizer(checkpoint: Checkpoint) -> ExportedTokenizer:
    """Read the checkpoint's tokenizer and give `<image>` the first free id.

    Raises:
        CheckpointError: no tokenizer, one that can't be read, one without Qwen2's control
            tokens, or one that has tokens without a row in the embedding.
    """
    names = {file.name for file in checkpoint.tokenizer_files}
    directory = checkpoint.tokenizer_files[0].parent
    tokenizer = _read(directory, names)
    if missing := [token for token in REQUIRED if tokenizer.token_to_id(token) is None]:
        raise CheckpointError(
            f"the tokenizer of {directory} lacks {missing[0]}: expected Qwen2's tokenizer, "
            "copy the files of the model it was trained from"
        )
    tokenizer.add_special_tokens([AddedToken(IMAGE_TOKEN, normalized=False, special=True)])
    image_token_id = tokenizer.get_vocab()[IMAGE_TOKEN]
    rows = checkpoint.config.text.vocab_size
    ids = {token: number for token, number in tokenizer.get_vocab().items() if token != IMAGE_TOKEN}
    token, largest = max(ids.items(), key=lambda item: item[1])
    # A row for the placeholder can be added, one for a token that was trained can't.
    if image_token_id >= rows + ROWS_MULTIPLE:
        token, largest = IMAGE_TOKEN, image_token_id
    if largest >= rows:
        raise CheckpointError(
            f"the tokenizer of {directory} has {token!r} as id {largest:,} and the embedding has "
            f"{rows:,} rows: expected the tokenizer that the checkpoint was trained with"
        )
    file = directory / "tokenizer_config.json"
    source = read_json(file) if file.is_file() else {}
    return ExportedTokenizer(
        tokenizer, _config(source, tokenizer), image_token_id, _notes(source, directory)
    )


def _notes(source: Mapping[str, Any], directory: Path) -> tuple[str, ...]:
    said = source.get("eos_token")
    found = said.get("content") if isinstance(said, dict) else said
    if found in (None, TURN_END):
        return ()
    return (
        f"the tokenizer of {directory} has eos_token {found}, which ends no answer of a chat: the "
        f"bundle says {TURN_END}, the end of a turn",
    )


def extended(checkpoint: Checkpoint, tokenizer: Tokenizer, rows: int) -> Checkpoint:
    """Extend a checkpoint's vocabulary to `rows` rows or more, in multiples of 64 where it grows.

    Raises:
        CheckpointError: it has to grow, and the tokenizer lacks `<|im_start|>`.
    """
    if rows <= checkpoint.config.text.vocab_size:
        return checkpoint
    # It begins a turn, and so is in no answer.
    copied = tokenizer.token_to_id(TURN_START)
    if copied is None:
        raise CheckpointError(f"the tokenizer lacks {TURN_START}: expected Qwen2's tokenizer")
    return checkpoint.with_vocabulary(-(-rows // ROWS_MULTIPLE) * ROWS_MULTIPLE, copied)


def _read(path: Path, names: set[str]) -> Tokenizer:
    if "tokenizer.json" in names:
        file = path / "tokenizer.json"
        data = read_bytes(path, file, CheckpointError)
        return read_tokenizer(data, str(file), CheckpointError, remedy=COPY)
    for name in sorted(names - {"merges.txt"}):
        _check_slow(path / name, read_json(path / name))
    with no_panic(f"the tokenizer of {path} can't be read", CheckpointError, COPY):
        from transformers import Qwen2Tokenizer

        read = Qwen2Tokenizer.from_pretrained(str(path), local_files_only=True)
        # Once more by the rules for a tokenizer.json.
        data = read.backend_tokenizer.to_str().encode()
    return read_tokenizer(data, f"the tokenizer of {path}", CheckpointError, remedy=COPY)


def _check_slow(file: Path, data: dict[str, Any]) -> None:
    """Refuse what transformers would take hours over, or print as it is.

    Raises:
        CheckpointError: ids that no vocabulary reaches, or a token with unknown properties.
    """
    if file.name in ("vocab.json", "added_tokens.json"):
        check(data, dict[str, VocabularyId], str(file), CheckpointError, remedy=COPY)
        return
    tokens = data.get("added_tokens_decoder")
    for token in (*data.values(), *(tokens.values() if isinstance(tokens, dict) else ())):
        if isinstance(token, dict) and "content" in token and not token.keys() <= ADDED_TOKEN:
            unknown = min(map(str, token.keys() - ADDED_TOKEN))
            raise CheckpointError(
                f"{file} gives a token the property {unknown!r}, expected "
                f"{', '.join(sorted(ADDED_TOKEN))}: {COPY}"
            )


def _config(source: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """`tokenizer_config.json` in the form that Swift's tokenizers and transformers both read.

    The class is named because transformers 5 would write `TokenizersBackend`, which the versions
    of swift-transformers that the demo app pins do not know.
    """
    added = {
        str(token_id): {
            "content": token.content,
            "lstrip": token.lstrip,
            "normalized": token.normalized,
            "rstrip": token.rstrip,
            "single_word": token.single_word,
            "special": token.special,
        }
        for token_id, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }
    kept = ("model_max_length", "padding_side", "bos_token", "pad_token", "unk_token", "errors")
    return {
        **{key: source[key] for key in kept if key in source},
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": [TURN_START, TURN_END, IMAGE_TOKEN],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        # What the demo app stops at: with the end of a text there, answers go on to their limit.
        "eos_token": TURN_END,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
    }
