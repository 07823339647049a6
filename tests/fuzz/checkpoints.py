"""Checkpoints of every kind: headers, tensors, configs, pickles, indices, adapters, links.

Opened, described, their tokenizer converted, and some tensors read. Any answer is right that is no
foreign exception; what is not followed and not executed shows by itself.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from tests.fuzz.case import Case
from tests.fuzz.mutate import (
    damage,
    edit_json,
    edit_safetensors,
    fragment,
    link,
    split_safetensors,
    text,
    write_safetensors,
)
from tests.fuzz.stock import Stock, as_in_the_hub

KINDS = ("apple", "transformers", "pickled", "shards", "lora", "trained", "projector")
# A pickle of each, where there is one.
PICKLES = {
    "pickled": "pytorch_model.bin",
    "trained": "adapter_model.bin",
    "projector": "mm_projector.bin",
}
KEYS = (
    *("num_hidden_layers", "hidden_size", "vocab_size", "mm_hidden_size", "vision_config"),
    *(
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "model_type",
        "torch_dtype",
    ),
    *("mm_vision_tower", "image_aspect_ratio", "rope_theta", "rope_scaling", "rms_norm_eps"),
    *("max_position_embeddings", "architectures", "text_config", "eos_token_id", "hidden_act"),
    *(
        "tie_word_embeddings",
        "mm_projector_type",
        "use_sliding_window",
        "quantization",
        "image_size",
    ),
    *("layers", "embed_dims", "mlp_ratios", "down_sample", "repmixer_kernel_size", "cls_ratio"),
)
LORA_KEYS = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "base_model_name_or_path", "use_dora"),
    *("target_modules", "modules_to_save", "peft_type", "bias", "fan_in_fan_out", "use_rslora"),
)


def warm(stock: Stock) -> None:
    for kind in KINDS:
        _describe(stock / kind, lambda name, function: function())


def prepare(case: Case) -> None:
    rng = case.rng
    kind = rng.choice(KINDS)
    shutil.copytree(case.stock / kind, case.source)
    ways = [_config, _config, _config, _header, _header, _bytes, _link, _tokenizer, _values, _files]
    if kind == "shards":
        ways += [_index] * 5
    if kind in ("lora", "trained"):
        ways = [_adapter, _adapter, _header, _bytes, _link, _config, _values]
    if kind == "projector":
        ways = [_config, _bytes, _link, _files]
    if kind in PICKLES:
        ways += [_pickle] * 6
    how = _untouched if rng.random() < 0.03 else rng.choice(ways)
    case.facts = {"mutator": how.__name__.strip("_"), "checkpoint": kind}
    case.facts["pickle"] = PICKLES.get(kind, "")
    case.facts["note"] = how(case, rng)


def run(case: Case) -> None:
    whole = case.facts["mutator"] == "untouched"
    path = case.source / case.facts.get("inside", "")
    _describe(path, partial(case.step, must_answer=True) if whole else case.step)
    canary = case.directory / "canary"
    if canary.exists():
        case.bad("code executed", str(canary))


def _describe(path: Path, step: Any) -> None:
    from fastvlm_mlx.cli import show
    from model_export.checkpoint.checkpoint import Checkpoint
    from model_export.checkpoint.tokenizer import export_tokenizer
    from model_export.cli.facts import checkpoint_facts

    checkpoint = step("open", lambda: Checkpoint(path))
    step("inspect", lambda: show.print_facts(checkpoint_facts(path)))
    if checkpoint is None:
        return
    step("tokenizer", lambda: export_tokenizer(checkpoint))
    step("source", checkpoint.source)
    step("tied", lambda: checkpoint.tied)
    step("license", lambda: checkpoint.license)
    names = sorted(checkpoint.tensors)
    for name in names[:: max(1, len(names) // 4)]:
        step("read", lambda name=name: checkpoint.tensor(name).shape)


def _weights(case: Case, rng: random.Random) -> Path | None:
    found = sorted(case.source.glob("*.safetensors"))
    return rng.choice(found) if found else None


def _config(case: Case, rng: random.Random) -> str:
    files = [f for f in case.source.glob("*config.json") if f.name != "adapter_config.json"]
    if not files:
        file = case.source / "config.json"
        file.write_text((case.stock / "apple" / "config.json").read_text())
        files = [file]
    # The one that describes the model, most of the time.
    main = case.source / "config.json"
    file = main if main in files and rng.random() < 0.8 else rng.choice(sorted(files))
    keys = KEYS if file == main else ()
    return f"{file.name}: {edit_json(rng, file, keys)}"


def _header(case: Case, rng: random.Random) -> str:
    file = _weights(case, rng)
    return _bytes(case, rng) if file is None else f"{file.name}: {edit_safetensors(rng, file)}"


def _bytes(case: Case, rng: random.Random) -> str:
    file = rng.choice(sorted(f for f in case.source.iterdir() if f.is_file()))
    return f"{file.name}: {damage(rng, file)}"


def _link(case: Case, rng: random.Random) -> str:
    """A name that is read or copied, pointing out of the checkpoint."""
    names = [f.name for f in sorted(case.source.iterdir())]
    names += ["LICENSE", "LICENSE_x", "LICENSE.md", "generation_config.json", "tokenizer.json"]
    name = rng.choice(names)
    outside = case.stock.outside
    return f"{name} → {link(rng, case.source / name, outside, outside / 'apple' / name)}"


def _tokenizer(case: Case, rng: random.Random) -> str:
    names = ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json")
    names += ("special_tokens_map.json", "tokenizer.json")
    present = [case.source / name for name in names if (case.source / name).is_file()]
    file = rng.choice(present)
    how = rng.choice(("edit", "edit", "damage", "remove", "ids", "lines"))
    if how == "remove":
        file.unlink()
    elif how == "ids" and file.name in ("vocab.json", "added_tokens.json"):
        data = json.loads(file.read_text())
        token = rng.choice(sorted(data))
        data[token] = rng.choice((-1, 2**31, 2**32, 2**63, 10**6, 0, 1.5, "1", None, [1]))
        file.write_text(json.dumps(data))
    elif how == "lines" and file.suffix == ".txt":
        lines = file.read_text().splitlines()
        lines.insert(rng.randrange(len(lines)), rng.choice(("a", "a b c", "", "\0 b", "x" * 10**6)))
        file.write_text("\n".join(lines))
    elif how == "edit" and file.suffix == ".json":
        return f"{file.name}: {edit_json(rng, file)}"
    else:
        return f"{file.name}: {damage(rng, file)}"
    return f"{file.name}: {how}"


def _values(case: Case, rng: random.Random) -> str:
    """Whole files of numbers that are none, or too large for what they are cast to."""
    file = _weights(case, rng)
    if file is None:
        return _bytes(case, rng)
    header, body = split_safetensors(file)
    name = rng.choice([key for key in header if key != "__metadata__"])
    start, end = header[name]["data_offsets"]
    fill = rng.choice(
        (b"\xff\xff\xff\xff", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f", b"\0\0\0\x80")
    )
    body = body[:start] + (fill * (end - start))[: end - start] + body[end:]
    write_safetensors(file, json.dumps(header), body)
    return f"{name} is all {fill!r}"


def _files(case: Case, rng: random.Random) -> str:
    """Files too many, too few, or under another name."""
    files = sorted(case.source.iterdir())
    file = rng.choice(files)
    how = rng.choice(("remove", "twice", "other", "directory", "adapter", "hidden"))
    if how == "remove":
        file.unlink()
    elif how == "twice":
        shutil.copyfile(file, case.source / f"model-00009-of-00009{file.suffix}")
    elif how == "other":
        shutil.copyfile(
            case.stock / "lora" / "adapter_model.safetensors", case.source / "z.safetensors"
        )
    elif how == "directory":
        file.unlink()
        file.mkdir()
    elif how == "adapter":
        (case.source / "adapter_config.json").write_text("{}")
    else:
        (case.source / f"._{file.name}").write_bytes(b"\0\x05\x16\x07")
    return f"{how} {file.name}"


def _untouched(case: Case, rng: random.Random) -> str:
    """Nothing is wrong with it, nor with links where the hub's cache has them."""
    if rng.random() < 0.5:
        return "as it is"
    aside = case.directory / "aside"
    case.source.rename(aside)
    case.source.mkdir()
    case.facts["inside"] = as_in_the_hub(aside, case.source).relative_to(case.source).as_posix()
    shutil.rmtree(aside)
    return "hub"


class _Evil:
    def __init__(self, canary: Path):
        self.canary = str(canary)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


def _pickle(case: Case, rng: random.Random) -> str:
    """What a pickle can hold besides tensors; a canary shows whether any of it ran."""
    import torch

    file = case.source / case.facts["pickle"]
    if case.facts["checkpoint"] == "trained" and rng.random() < 0.5:
        file = case.source / "non_lora_trainables.bin"
    state: dict[Any, Any] = torch.load(file, weights_only=True)
    name = rng.choice(sorted(state))
    evil = _Evil(case.directory / "canary")
    how = rng.choice(
        (
            *("evil", "evil inside", "plain evil", "damaged", "list", "numbers", "keys", "nested"),
            *("sparse", "strided", "meta", "dtype", "module", "old", "empty", "archive", "names"),
        )
    )
    value: Any = state
    if how == "plain evil":
        file.write_bytes(pickle.dumps(evil))
        return how
    if how in ("damaged", "archive"):
        data = file.read_bytes()
        end = len(data) if how == "damaged" else 3000
        kept = file.with_suffix(".part")
        kept.write_bytes(data[:end])
        note = damage(rng, kept)
        file.write_bytes(kept.read_bytes() + data[end:])
        kept.unlink()
        return f"{how}: {note}"
    if how == "evil":
        value = evil
    elif how == "evil inside":
        state[name] = evil
    elif how == "list":
        value = list(state.values())
    elif how == "numbers":
        state[name] = rng.choice((3, None, "text", [1.0], {}, 10**30))
    elif how == "keys":
        state[rng.choice((3, None, (1, 2), text(rng).replace("\ud800", "")))] = torch.zeros(2)
    elif how == "nested":
        value = rng.choice(({"state_dict": state}, {"a": {"b": state}}, [state], (state,)))
    elif how == "sparse":
        state[name] = torch.eye(3).to_sparse()
    elif how == "strided":
        state[name] = torch.zeros(1).expand(10**6, 10**6)
    elif how == "meta":
        state[name] = torch.empty(10**6, 10**6, device="meta")
    elif how == "dtype":
        kinds = (torch.complex64, torch.bool, torch.int8, torch.float64, torch.float8_e4m3fn)
        state[name] = torch.zeros(state[name].shape, dtype=rng.choice(kinds))
    elif how == "module":
        value = torch.nn.Linear(2, 2)
    elif how == "empty":
        value = {}
    elif how == "names":
        state[text(rng).replace("\ud800", "")] = state.pop(name)
    torch.save(value, file, _use_new_zipfile_serialization=how != "old")
    return f"{how} {name}"


def _index(case: Case, rng: random.Random) -> str:
    file = case.source / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    names = index["weight_map"]
    name = rng.choice(sorted(names))
    how = rng.choice(("edit", "outside", "huge", "many files", "wrong", "missing", "itself"))
    if how == "edit":
        return edit_json(rng, file)
    if how == "outside":
        names[name] = rng.choice(
            (
                "../../../etc/passwd",
                "/etc/passwd",
                text(rng),
                "a/b.safetensors",
                str(case.stock.outside),
            )
        )
    elif how == "huge":
        names |= {f"x{number}": names[name] for number in range(200_000)}
    elif how == "many files":
        names |= {f"x{number}": f"model-{number}.safetensors" for number in range(50_000)}
    elif how == "wrong":
        index["weight_map"] = dict(zip(names, reversed(list(names.values())), strict=True))
    elif how == "missing":
        del names[name]
    else:
        names[name] = rng.choice((file.name, "config.json"))
    file.write_bytes(json.dumps(index).encode("utf-8", "surrogatepass"))
    return f"{how} {name}"


def _adapter(case: Case, rng: random.Random) -> str:
    file = case.source / "adapter_config.json"
    if rng.random() < 0.7:
        return edit_json(rng, file, LORA_KEYS)
    data = json.loads(file.read_text())
    how = rng.choice(("base", "rank_pattern", "itself", "regex"))
    if how == "base":
        data["base_model_name_or_path"] = rng.choice(
            (text(rng), str(case.stock.outside), "..", "/")
        )
    elif how == "itself":
        data["base_model_name_or_path"] = str(case.source)
    elif how == "regex":
        data["rank_pattern"] = {rng.choice(("(a+)+$", "(", ".*" * 30, "^" * 5000)): 4}
        data["target_modules"] = rng.choice(("(.*)*x", "(", ".*" * 40 + "x", None, [3]))
    else:
        raw = json.dumps({**data, "rank_pattern": "@@place@@"})
        file.write_text(raw.replace('"@@place@@"', fragment(rng).replace("\ud800", ""), 1))
        return how
    file.write_bytes(json.dumps(data).encode("utf-8", "surrogatepass"))
    return how
