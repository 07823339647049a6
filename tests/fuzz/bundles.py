"""Bundles of both layouts: damaged, mixed, added to, and with manifests that say otherwise.

What is right: a bundle whose manifest lists other bytes than a file has is an error that names the
file. What the manifest does not protect (it was corrected to match, or there is none) may answer
otherwise, or be refused. Everything else answers as the undamaged bundle, or is refused.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from unittest import mock

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
from tests.fuzz.stock import LAYOUTS, PROMPT, Stock, as_in_the_hub, expected, rehash, scene_image

BIG = 4_000_000
KEYS = (
    *("quantization", "image_token_index", "vocab_size", "num_hidden_layers", "hidden_size"),
    *("vision_config", "eos_token_id", "mm_hidden_size", "max_position_embeddings", "rope_theta"),
    *(
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "rope_scaling",
        "model_type",
    ),
    *(
        "image_aspect_ratio",
        "torch_dtype",
        "tie_word_embeddings",
        "size",
        "crop_size",
        "image_mean",
    ),
)


def warm(stock: Stock) -> None:
    expected(stock)
    _verify(stock / "app")
    _inspect(stock / "app")


def prepare(case: Case) -> None:
    rng = case.rng
    layout = rng.choice(LAYOUTS)
    shutil.copytree(case.stock / layout, case.source)
    how = rng.choices(
        (
            *(_changed, _corrected, _without, _removed, _added, _swapped, _manifest, _linked),
            *(_ignored, _untouched),
        ),
        (14, 18, 18, 5, 12, 8, 18, 10, 3, 3),
    )[0]
    case.facts = {"mutator": how.__name__.strip("_"), "layout": layout, "expect": "same"}
    case.facts["note"] = how(case, rng)


def run(case: Case) -> None:
    # Of any case in turn: not every step is tried each time, or an error in the first hides others.
    expect, path = case.facts["expect"], case.source / case.facts.get("inside", "")
    whole, must_fail, names = expect == "whole", expect == "error", case.facts.get("names")
    case.step(
        "answer",
        lambda: _answer(path),
        must_fail=must_fail,
        must_answer=whole,
        names=names,
        among=(expected(case.stock)[case.facts["layout"]],) if expect in ("same", "whole") else (),
    )
    case.step("inspect", lambda: _inspect(path), must_answer=whole)
    case.step("verify", lambda: _verify(path), must_fail=must_fail, must_answer=whole, names=names)
    if case.facts["layout"] == "app":
        case.step(
            "install",
            lambda: _install(path, case.out / "app"),
            must_fail=must_fail,
            must_answer=whole,
        )
    # A README.md of the bundle's own is the card; it is whatever the manifest does not say.
    case.step("card", lambda: _card(path))


def _install(path: Path, app: Path) -> None:
    """Into a directory that looks like the demo app's; the demo's sizes are not the app's."""
    from model_export.layouts import install

    (app / "FastVLM").mkdir(parents=True)
    (app / "FastVLM" / "FastVLM.swift").touch()
    with mock.patch.object(install, "app_misfit", return_value=None):
        install.install(install.plan(path, app))


def _card(path: Path) -> str:
    from model_export.publish import push

    return push.plan(path, "me/bundle").card


def _answer(path: Path) -> tuple[int, ...]:
    import fastvlm_mlx

    found = fastvlm_mlx.load(path).generate(scene_image(), PROMPT, max_tokens=6)
    return found.tokens


def _inspect(path: Path) -> None:
    from fastvlm_mlx.cli import show
    from fastvlm_mlx.inspection import inspect_bundle

    show.print_facts(inspect_bundle(path))


def _verify(path: Path) -> None:
    from model_export.gates.verify import verify

    verify(path, None, {}, lambda stage, done: None)


def _files(path: Path) -> list[Path]:
    """The bundle's files but the manifest; small ones that are parsed more often than weights."""
    files = sorted(f for f in path.rglob("*") if f.is_file() and f.name != "manifest.json")
    return [*files, *(f for f in files if f.suffix == ".json")]


def _mutated(rng: random.Random, file: Path) -> str:
    """Damage by what the file is, or as plain bytes."""
    if file.suffix == ".json" and rng.random() < 0.8:
        return f"{file.name}: {edit_json(rng, file, KEYS if file.name == 'config.json' else ())}"
    if file.suffix == ".safetensors" and rng.random() < 0.7:
        return f"{file.name}: {edit_safetensors(rng, file)}"
    return f"{file.name}: {damage(rng, file)}"


def _changed(case: Case, rng: random.Random) -> str:
    """A listed file changed: an error that names it."""
    file = rng.choice(_files(case.source))
    before = file.read_bytes()
    note = damage(rng, file) if rng.random() < 0.5 else _mutated(rng, file)
    if file.read_bytes() != before:
        case.facts |= {"expect": "error", "names": file.name}
    return f"{file.name}: {note}"


def _corrected(case: Case, rng: random.Random) -> str:
    """As an attacker would: the manifest lists the changed bytes."""
    case.facts["expect"] = "any"
    notes = [_mutated(rng, rng.choice(_files(case.source))) for _ in range(rng.choice((1, 1, 2)))]
    rehash(case.source)
    return "; ".join(notes)


def _without(case: Case, rng: random.Random) -> str:
    case.facts["expect"] = "any"
    (case.source / "manifest.json").unlink()
    return _mutated(rng, rng.choice(_files(case.source)))


def _removed(case: Case, rng: random.Random) -> str:
    """Without a manifest what is optional may be missing: licence, generation's configuration."""
    file = rng.choice(_files(case.source))
    file.unlink()
    if rng.random() < 0.4:
        (case.source / "manifest.json").unlink()
        case.facts["expect"] = "any"
    else:
        case.facts |= {"expect": "error", "names": file.name}
    return file.relative_to(case.source).as_posix()


def _added(case: Case, rng: random.Random) -> str:
    """A file that the manifest does not list, or a tensor that is there twice."""
    folder = case.source / rng.choice(("", "extra", "a/b", "fastvithd.mlpackage/Data"))
    folder.mkdir(parents=True, exist_ok=True)
    name = rng.choice(("zzz", "aaa", "model-00002-of-00002", ".hidden", "model.safetensors"))
    if rng.random() < 0.75:
        file = folder / f"{name}.safetensors"
        weights = case.source / "model.safetensors"
        if rng.random() < 0.3:
            # Tensors of the same names, all zero.
            header, body = split_safetensors(weights)
            write_safetensors(file, json.dumps(header), bytes(len(body)))
        else:
            shutil.copyfile(_other(case) / "model.safetensors", file)
    else:
        file = folder / rng.choice(("extra.json", "tokenizer.json", "vocab.json", "x.bin", "a.py"))
        if not file.exists():
            file.write_text(rng.choice((fragment(rng), "{}", "import os")))
    if rng.random() < 0.4:
        (case.source / "manifest.json").unlink()
    return file.relative_to(case.source).as_posix()


def _other(case: Case) -> Path:
    return case.stock / f"other-{case.facts['layout']}"


def _swapped(case: Case, rng: random.Random) -> str:
    """Files of another bundle, which is whole in itself."""
    other = _other(case)
    names = [f.relative_to(case.source).as_posix() for f in _files(case.source)]
    differ = [n for n in names if (other / n).read_bytes() != (case.source / n).read_bytes()]
    name = rng.choice(differ)
    shutil.copyfile(other / name, case.source / name)
    manifest = rng.choice(("kept", "kept", "other", "none"))
    if manifest == "other":
        shutil.copyfile(other / "manifest.json", case.source / "manifest.json")
        case.facts["expect"] = "error" if len(differ) > 1 else "any"
    elif manifest == "none":
        (case.source / "manifest.json").unlink()
        case.facts["expect"] = "any"
    else:
        case.facts |= {"expect": "error", "names": Path(name).name}
    return f"{name}, manifest {manifest}"


def _manifest(case: Case, rng: random.Random) -> str:
    """What the manifest says of files that are whole; of what it does not list, nothing is read."""
    file = case.source / "manifest.json"
    how = rng.choice(("edit", "edit", "edit", "names", "files", "whole", "entry"))
    if how == "edit":
        return edit_json(rng, file, ("files", "layout", "options", "encoder", "llm", "gates"))
    if how == "whole":
        file.write_text(rng.choice(("{}", "[]", "null", "", "3", '{"schema_version": 1}')))
        return how
    manifest = json.loads(file.read_text())
    name = rng.choice(sorted(manifest["files"]))
    note = how
    if how == "names":
        bad = rng.choice((text(rng), "x" * 5000, "/etc/passwd", "../outside/secret.txt", "a/../b"))
        manifest["files"][bad] = {"bytes": 3, "sha256": "0" * 64}
        note += f" {bad[:40]!r}"
    elif how == "files":
        manifest["files"] = rng.choice(({}, [], None, {name: manifest["files"][name]}, {"": {}}))
    else:
        key = rng.choice(("bytes", "sha256"))
        manifest["files"][name][key] = "@@place@@"
    raw = json.dumps(manifest).replace('"@@place@@"', fragment(rng), 1)
    file.write_bytes(raw.encode("utf-8", "surrogatepass"))
    return note


def _linked(case: Case, rng: random.Random) -> str:
    """Links that lead out of the bundle are not followed, whatever the manifest says of them."""
    names = [f.relative_to(case.source).as_posix() for f in sorted(case.source.rglob("*"))]
    name = rng.choice((*names, "README.md", "extra"))
    absent = not (case.source / name).exists()
    outside = case.stock.outside
    how = link(rng, case.source / name, outside, outside / case.facts["layout"] / name)
    if rng.random() < 0.4:
        (case.source / "manifest.json").unlink(missing_ok=True)
        # Nothing then asks for a licence or a template: it may be left unread.
        optional = (
            "LICENSE",
            "README.md",
            "extra",
            "chat_template.jinja",
            "manifest.json",
            "tokenizer_config.json",
        )
        case.facts["expect"] = "same" if name in optional else "any"
        if how == "like" and name in ("model.safetensors", "tokenizer.json", "config.json"):
            case.facts["expect"] = "error"
    elif not absent:
        case.facts["expect"] = "error"
    return f"{name} → {how}"


def _ignored(case: Case, rng: random.Random) -> str:
    """What a Mac leaves in a directory belongs to nobody."""
    case.facts["expect"] = "whole"
    names = ("._model.safetensors", ".DS_Store", "._config.json", "._fastvithd.mlpackage")
    name = rng.choice(names)
    (case.source / name).write_bytes(b"\0\x05\x16\x07\0\x02\0\0Mac OS X")
    return name


def _untouched(case: Case, rng: random.Random) -> str:
    """Nothing is wrong with it, nor with links where the hub's cache has them."""
    case.facts["expect"] = "whole"
    how = rng.choice(("as it is", "no manifest", "hub", "hub", "no manifest in the hub"))
    if "no manifest" in how:
        (case.source / "manifest.json").unlink()
    if "hub" in how:
        aside = case.directory / "aside"
        case.source.rename(aside)
        case.source.mkdir()
        inside = as_in_the_hub(aside, case.source).relative_to(case.source)
        shutil.rmtree(aside)
        case.facts["inside"] = inside.as_posix()
    return how
