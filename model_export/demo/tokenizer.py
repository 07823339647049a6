"""The demo checkpoint's tokenizer: Qwen2's byte-level BPE with a small vocabulary of its own.

256 bytes and the merges that its questions and answers need; Qwen2's pre-tokenizer (digits one
by one), NFC, and its special tokens after the vocabulary. Written in the slow form that LLaVA
training saves: `vocab.json` and `merges.txt`, no `tokenizer.json`.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from model_export.samples.scenes import generate

# transformers/models/qwen2/tokenization_qwen2.py
PRE_TOKENIZER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SYSTEM_PROMPT = "You are a helpful assistant."
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\n" + SYSTEM_PROMPT + "<|im_end|>\\n' }}"
    "{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# The prompt around the image and around the question, as the reference builds it.
BEFORE_IMAGE = f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n"
AFTER_IMAGE = "\n{}<|im_end|>\n<|im_start|>assistant\n"

_MAX_VOCABULARY = 448
_MAX_LENGTH = 2048


def _assemble(model: BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train() -> Tokenizer:
    """Learn the merges from generated questions and answers; the same ones at every call."""
    texts = ["system", "user", "assistant", SYSTEM_PROMPT] * 100
    for seed in range(2000):
        for question in generate(seed, held_out=False).questions(seed):
            texts += (question.prompt, question.answer)
    tokenizer = _assemble(BPE())
    tokenizer.train_from_iterator(
        texts,
        BpeTrainer(
            vocab_size=_MAX_VOCABULARY,
            min_frequency=20,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    _add_special_tokens(tokenizer)
    return tokenizer


def load(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder, from its slow form."""
    tokenizer = _assemble(BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    _add_special_tokens(tokenizer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the five files that LLaVA training leaves next to its weights."""
    special = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    model = json.loads(tokenizer.to_str())["model"]
    pad, _, end = SPECIAL_TOKENS
    extra = list(SPECIAL_TOKENS[1:])
    _write(folder / "vocab.json", model["vocab"], indent=None)
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    _write(folder / "added_tokens.json", special)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    _write(
        folder / "special_tokens_map.json",
        {
            "additional_special_tokens": extra,
            "eos_token": {"content": end, **flags},
            "pad_token": {"content": pad, **flags},
        },
    )
    _write(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(index): {"content": token, **flags, "special": True}
                for token, index in special.items()
            },
            "additional_special_tokens": extra,
            "bos_token": None,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": end,
            "errors": "replace",
            "model_max_length": _MAX_LENGTH,
            "pad_token": pad,
            "padding_side": "right",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )


def _add_special_tokens(tokenizer: Tokenizer) -> None:
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )


def _write(path: Path, value: object, indent: int | None = 2) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")
