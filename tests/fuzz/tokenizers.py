"""tokenizer.json in a bundle without a manifest: structure, ids, patterns, sizes."""

from __future__ import annotations

import json
import random
import shutil
from typing import Any

from tests.fuzz.case import Case
from tests.fuzz.mutate import damage, edit_json, text
from tests.fuzz.stock import LAYOUTS, PROMPT, Stock, expected, scene_image

PROMPTS = (PROMPT, "a" * 300, "<image>", "\0", "é😀" * 20, "aaaa " * 50 + "!", "\n\n   \n")


def warm(stock: Stock) -> None:
    expected(stock)


def prepare(case: Case) -> None:
    rng = case.rng
    layout = rng.choice(LAYOUTS)
    shutil.copytree(case.stock / layout, case.source)
    (case.source / "manifest.json").unlink()
    file = case.source / "tokenizer.json"
    how = rng.choice((_edited, _edited, _ids, _ids, _pattern, _parts, _size, _damaged, _configs))
    case.facts = {"mutator": how.__name__.strip("_"), "layout": layout}
    if how in (_edited, _damaged, _configs):
        case.facts["note"] = how(case, rng)
        return
    data = json.loads(file.read_text(encoding="utf-8"))
    case.facts["note"] = how(data, rng)
    try:
        content = json.dumps(data)
    except RecursionError:
        # What was put in is too deep for Python, and so it stands alone.
        content = '{"model": ' + "[" * 100_000
    file.write_bytes(content.encode("utf-8", "surrogatepass"))


def run(case: Case) -> None:
    import fastvlm_mlx

    prompt = case.rng.choice(PROMPTS)
    model = case.step("load", lambda: fastvlm_mlx.load(case.source))
    if model is None:
        return
    case.step("answer", lambda: model.generate(scene_image(), prompt, max_tokens=6).tokens)
    case.step("without an image", lambda: model.generate(None, prompt, max_tokens=2).tokens)


def _edited(case: Case, rng: random.Random) -> str:
    return edit_json(rng, case.source / "tokenizer.json", ("added_tokens", "model", "truncation"))


def _damaged(case: Case, rng: random.Random) -> str:
    return damage(rng, case.source / "tokenizer.json")


def _configs(case: Case, rng: random.Random) -> str:
    """Ids that other files give: ends of an answer, the placeholder, rows of the embedding."""
    file = case.source / rng.choice(("config.json", "generation_config.json"))
    data = json.loads(file.read_text())
    key = rng.choice(("eos_token_id", "image_token_index", "vocab_size", "pad_token_id"))
    data[key] = rng.choice((-1, 0, 10**6, 2**31, 2**31 + 5, 2**63, [1, 2**40], [], "1", None, 1.5))
    file.write_text(json.dumps(data))
    return f"{file.name} {key} {data[key]}"


def _ids(data: Any, rng: random.Random) -> str:
    vocab, added = data["model"]["vocab"], data["added_tokens"]
    shift = rng.choice((2**31, 2**32 - 600, 600, 100_000, 2**31 - 1, 2**33, -1))
    how = rng.choice(("one", "all", "added", "duplicate", "swap", "image"))
    token = rng.choice(sorted(vocab))
    if how == "one":
        vocab[token] += shift
    elif how == "all":
        data["model"]["vocab"] = {name: number + shift for name, number in vocab.items()}
    elif how == "added":
        rng.choice(added)["id"] += shift
    elif how == "duplicate":
        vocab[token] = vocab[rng.choice(sorted(vocab))]
    elif how == "image":
        for entry in added:
            if entry["content"] == "<image>":
                entry["id"] += rng.choice((1, 1000, 2**31))
    else:
        other = rng.choice(sorted(vocab))
        vocab[token], vocab[other] = vocab[other], vocab[token]
    return f"ids: {how} {shift}"


_PATTERNS = (
    "(a+)+$",
    "(a|a)*b",
    "((a*)*)*!",
    "(?:a?){40}a{40}",
    "(",
    "",
    "(?=x)*",
    "\\p{Foo}",
    "[" * 5000,
    "(" * 3000 + ")" * 3000,
    "a{1,100000}{1,100000}",
    "(?<n>a)\\k<n>+",
    ".*.*.*.*.*.*.*.*=.*",
    "^",
    "(?!)",
)


def _pattern(data: Any, rng: random.Random) -> str:
    """A regular expression that takes for ever, matches nothing, or is none."""
    pattern = rng.choice(_PATTERNS)
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": rng.choice(("Isolated", "Removed", "MergedWithNext", "Contiguous")),
        "invert": rng.random() < 0.3,
    }
    place = rng.choice(("pre_tokenizer", "normalizer", "decoder"))
    if place != "pre_tokenizer":
        split = {"type": "Replace", "pattern": {"Regex": pattern}, "content": rng.choice(("", "a"))}
    kept = data.get(place)
    steps = [split] + ([kept] if kept else [])
    key = {"pre_tokenizer": "pretokenizers", "normalizer": "normalizers", "decoder": "decoders"}
    data[place] = {"type": "Sequence", key[place]: steps}
    return f"{place} {pattern[:40]}"


def _parts(data: Any, rng: random.Random) -> str:
    """Other parts of the library than Qwen2's."""
    place, value = rng.choice(
        (
            (
                "truncation",
                {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 5},
            ),
            (
                "truncation",
                {"direction": "Left", "max_length": 2, "strategy": "OnlySecond", "stride": 0},
            ),
            (
                "padding",
                {
                    "strategy": {"Fixed": 10**9},
                    "direction": "Right",
                    "pad_to_multiple_of": 0,
                    "pad_id": 2**31,
                    "pad_type_id": 0,
                    "pad_token": "x",
                },
            ),
            (
                "post_processor",
                {
                    "type": "TemplateProcessing",
                    "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}],
                    "pair": [],
                    "special_tokens": {},
                },
            ),
            ("post_processor", {"type": "BertProcessing", "sep": ["x", 2**31], "cls": ["y", 9]}),
            (
                "post_processor",
                {
                    "type": "TemplateProcessing",
                    "single": [
                        {"SpecialToken": {"id": "X", "type_id": 0}},
                        {"Sequence": {"id": "A", "type_id": 0}},
                    ],
                    "pair": [
                        {"Sequence": {"id": "A", "type_id": 0}},
                        {"Sequence": {"id": "B", "type_id": 0}},
                    ],
                    "special_tokens": {"X": {"id": "X", "ids": [2**31], "tokens": ["X"]}},
                },
            ),
            ("decoder", {"type": "WordPiece", "prefix": "", "cleanup": True}),
            (
                "decoder",
                {"type": "CTC", "pad_token": "a", "word_delimiter_token": "", "cleanup": True},
            ),
            ("decoder", {"type": "Strip", "content": "a", "start": 10**9, "stop": 10**9}),
            ("decoder", {"type": "ByteFallback"}),
            ("decoder", None),
            ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
            ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "////AAAA" * 9}),
            ("normalizer", {"type": "Prepend", "prepend": "x" * 10_000}),
            (
                "normalizer",
                {
                    "type": "BertNormalizer",
                    "clean_text": True,
                    "handle_chinese_chars": True,
                    "strip_accents": None,
                    "lowercase": True,
                },
            ),
            (
                "pre_tokenizer",
                {
                    "type": "Metaspace",
                    "replacement": "ab",
                    "prepend_scheme": "always",
                    "split": True,
                },
            ),
            ("pre_tokenizer", {"type": "Digits", "individual_digits": True}),
            ("pre_tokenizer", None),
            (
                "model",
                {"type": "Unigram", "unk_id": 99, "vocab": [["a", 0.0], ["<|im_end|>", -1.0]]},
            ),
            ("model", {"type": "Unigram", "unk_id": None, "vocab": []}),
            ("model", {"type": "WordLevel", "vocab": {"a": 5}, "unk_token": "zz"}),
            (
                "model",
                {
                    "type": "WordPiece",
                    "vocab": {},
                    "unk_token": "[UNK]",
                    "continuing_subword_prefix": "",
                    "max_input_chars_per_word": 0,
                },
            ),
            ("model", {"type": "BPE", "vocab": {}, "merges": []}),
            ("model", {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}),
            ("model", {**data["model"], "dropout": 1.0}),
            ("model", {**data["model"], "dropout": -3}),
            ("model", {**data["model"], "unk_token": "zzz", "fuse_unk": True}),
            (
                "model",
                {**data["model"], "byte_fallback": True, "continuing_subword_prefix": "é" * 9},
            ),
        )
    )
    data[place] = value
    return f"{place} {str(value)[:60]}"


def _size(data: Any, rng: random.Random) -> str:
    """Far more, far longer, far deeper, or nothing."""
    how = rng.choice(("long token", "many tokens", "deep", "no vocab", "long content", "special"))
    added = data["added_tokens"]
    if how == "long token":
        data["model"]["vocab"]["a" * 1_000_000] = len(data["model"]["vocab"]) + 50
    elif how == "many tokens":
        start = 1000 if rng.random() < 0.5 else 0
        pattern = {"special": False, "single_word": False, "lstrip": True, "rstrip": True}
        for number in range(20_000):
            added.append(
                {"id": start + number, "content": f"w{number}", "normalized": True, **pattern}
            )
    elif how == "deep":
        nested = data["pre_tokenizer"]
        for _ in range(rng.choice((20, 200, 900))):
            nested = {"type": "Sequence", "pretokenizers": [nested]}
        data["pre_tokenizer"] = nested
    elif how == "no vocab":
        data["model"]["vocab"] = {}
    elif how == "long content":
        rng.choice(added)["content"] = rng.choice((text(rng), "x" * 1_000_000, ""))
    else:
        entry = rng.choice(added)
        entry[rng.choice(("special", "lstrip", "normalized", "single_word"))] = rng.random() < 0.5
    return how
