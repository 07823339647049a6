"""Whole exports of damaged checkpoints, and to places where something is; gates are left out.

What appears is a bundle that its own manifest describes, or nothing; beside it nothing is left, the
checkpoint is as it was, and nothing from outside of it is in the bundle.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any
from unittest import mock

from tests.fuzz.case import Case
from tests.fuzz.mutate import edit_json, link, text
from tests.fuzz.stock import DEMO, Stock


def warm(stock: Stock) -> None:
    import model_export.pipeline  # noqa: F401


def prepare(case: Case) -> None:
    rng = case.rng
    shutil.copytree(DEMO, case.source)
    how = rng.choice((_links, _links, _files, _config, _place, _two, _meanwhile))
    case.facts = {"mutator": how.__name__.strip("_"), "overwrite": rng.random() < 0.5}
    case.facts["note"] = how(case, rng)


def run(case: Case) -> None:
    out = case.out / "bundle"
    place = case.facts.get("place")
    if place == "two":
        _two_at_once(case, out)
    else:
        case.step("export", lambda: _export(case, out, place))
    left = sorted(path.name for path in case.out.iterdir())
    if left not in ([], ["bundle"]):
        case.bad("left beside a destination", str(left))
    if place in ("mine", "meanwhile") and (not case.facts["overwrite"] or place == "meanwhile"):
        mine = out / "thesis.txt"
        if not mine.is_file() or mine.read_text() != "precious":
            case.bad("a file of the user's is gone", str(left))
    if (out / "config.json").exists():
        case.step("load what was exported", lambda: _check(out))


def _check(out: Path) -> None:
    from fastvlm_mlx.bundle.bundle import Bundle

    bundle = Bundle.open(out)
    if bundle.manifest is None:
        raise RuntimeError("an export without a manifest")
    bundle.check_files()


def _export(case: Case, out: Path, place: str | None = None) -> None:
    from model_export.options import ExportOptions
    from model_export.pipeline import export

    def look(stage: str, done: float | None) -> None:
        if place == "meanwhile" and stage == "manifest" and not out.exists():
            out.mkdir()
            (out / "thesis.txt").write_text("precious")

    options = ExportOptions.of(llm_bits=4, overwrite=case.facts["overwrite"])
    with _quick(case.stock / "app"):
        export(case.source, out, options, look)


def _two_at_once(case: Case, out: Path) -> None:
    """Of two exports to one new place, one wins; without `overwrite` the other says so."""
    case.facts["overwrite"] = False
    ends: list[bool] = []

    def one() -> None:
        # Both may fail; that both succeed is what is wrong.
        before = len(case.outcomes)
        case.step("export", lambda: _export_now(case, out))
        ends.append(case.outcomes[before:][:1] == ["answer"])

    with _quick(case.stock / "app"):
        threads = [Thread(target=one) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if case.outcomes.count("answer") > 1:
        case.bad("two exports to one place both succeeded", str(case.outcomes))


def _export_now(case: Case, out: Path) -> None:
    from model_export.options import ExportOptions
    from model_export.pipeline import export

    export(case.source, out, ExportOptions.of(llm_bits=4))


@contextmanager
def _quick(bundle: Path) -> Iterator[None]:
    """The encoder copied and the gates left out: for what surrounds them."""
    from fastvlm_mlx.vision.package import describe
    from model_export import build

    def export_package(spec: Any, package: Path, progress: Any) -> Any:
        shutil.copytree(bundle / package.name, package)
        return describe(package)

    def source_features(spec: Any, progress: Any) -> Any:
        return {spec.checkpoint.config.vision.image_size: []}

    with (
        mock.patch.object(build, "export_package", export_package),
        mock.patch.object(build, "source_features", source_features),
        mock.patch("model_export.gates.encoder.encoder_gates", return_value=([], [])),
        mock.patch.object(build, "answer_gates", return_value=[]),
    ):
        yield


def _links(case: Case, rng: random.Random) -> str:
    """Names that an export copies or reads."""
    names = ["LICENSE", "LICENSE_x", "LICENSE-MODEL", "generation_config.json", "tokenizer.json"]
    names += [file.name for file in sorted(case.source.iterdir())]
    name = rng.choice((*names, "LICENSE_x", "LICENSE_x"))
    outside = case.stock.outside
    return f"{name} → {link(rng, case.source / name, outside, outside / 'apple' / name)}"


def _files(case: Case, rng: random.Random) -> str:
    how = rng.choice(("large licence", "many licences", "licence is a directory", "odd name"))
    if how == "large licence":
        with (case.source / "LICENSE_x").open("wb") as file:
            file.truncate(300_000_000)
    elif how == "many licences":
        for number in range(3000):
            (case.source / f"LICENSE_{number}").write_text("x")
    elif how == "licence is a directory":
        (case.source / "LICENSE_x").mkdir()
    else:
        name = "LICENSE" + text(rng).replace("/", "").replace("\0", "").replace("\ud800", "")[:80]
        (case.source / name).write_text("x")
    return how


def _config(case: Case, rng: random.Random) -> str:
    names = ("config.json", "generation_config.json", "tokenizer_config.json")
    file = case.source / rng.choice(names)
    return f"{file.name}: {edit_json(rng, file)}"


def _place(case: Case, rng: random.Random) -> str:
    """Something is where the bundle is to be."""
    out = case.out / "bundle"
    how = rng.choice(("mine", "mine", "file", "link", "bundle"))
    if how == "mine":
        out.mkdir()
        (out / "thesis.txt").write_text("precious")
        # What is no bundle is never replaced, whatever is asked for.
        case.facts |= {"place": "mine", "overwrite": False}
    elif how == "file":
        out.write_text("precious")
    elif how == "link":
        out.symlink_to(case.stock.outside)
    else:
        shutil.copytree(case.stock / "app", out)
    return how


def _two(case: Case, rng: random.Random) -> str:
    case.facts["place"] = "two"
    return "two at once"


def _meanwhile(case: Case, rng: random.Random) -> str:
    """The destination comes to exist while the bundle is being made."""
    case.facts["place"] = "meanwhile"
    return "meanwhile"
