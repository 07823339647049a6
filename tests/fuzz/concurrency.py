"""Loads and answers while the bundle is replaced, damaged, or used by several threads.

An answer is one bundle's or there is an error; what was loaded before a change is what answers.
"""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.fuzz.case import Case
from tests.fuzz.stock import LAYOUTS, PROMPT, Stock, expected, scene_image

# Of loads and answers in one case.
ROUNDS = 6


def warm(stock: Stock) -> None:
    expected(stock)


def prepare(case: Case) -> None:
    how = case.rng.choice((_after_load, _after_load, _directories, _files, _truncated, _threads))
    layout = case.rng.choice(LAYOUTS)
    shutil.copytree(case.stock / layout, case.source)
    case.facts = {"mutator": how.__name__.strip("_"), "layout": layout, "changes": True}
    if case.rng.random() < 0.3:
        (case.source / "manifest.json").unlink()
        case.facts["manifest"] = False


def run(case: Case) -> None:
    functions = (_after_load, _directories, _files, _truncated, _threads)
    names = {function.__name__.strip("_"): function for function in functions}
    answers = expected(case.stock)
    layout = case.facts["layout"]
    right = answers[layout], answers[f"other-{layout}"]
    names[case.facts["mutator"]](case, case.rng, right)


def _other(case: Case) -> Path:
    return case.stock / f"other-{case.facts['layout']}"


def _ask(path: Path) -> tuple[int, ...]:
    import fastvlm_mlx

    found = fastvlm_mlx.load(path).generate(scene_image(), PROMPT, max_tokens=6)
    return found.tokens


def _after_load(case: Case, rng: random.Random, right: tuple[Any, ...]) -> None:
    """Loaded, then changed under it: the first bundle's answer, or an error."""
    import fastvlm_mlx

    model = case.step("load", lambda: fastvlm_mlx.load(case.source))
    if model is None:
        return
    if rng.random() < 0.3:
        case.step("encode", lambda: model.encode(scene_image()) and None)
    how = rng.choice(("directory", "file", "truncate", "delete", "in place"))
    case.facts["note"] = how
    if how == "directory":
        _exchange(case.source, _fresh(case, 0), case.directory / "aside")
    elif how == "delete":
        shutil.rmtree(case.source)
    else:
        files = [f for f in sorted(case.source.rglob("*")) if f.is_file() and f.suffix != ".json"]
        large = [f for f in files if f.stat().st_size > 50_000]
        file = rng.choice(large)
        other = _other(case) / file.relative_to(case.source)
        if how == "file":
            shutil.copyfile(other, case.directory / "new")
            os.replace(case.directory / "new", file)
        elif how == "in place":
            with file.open("r+b") as stream:
                stream.write(other.read_bytes())
        else:
            os.truncate(file, rng.choice((0, 100, file.stat().st_size // 2)))
    case.step(
        f"answer after {how}",
        lambda: model.generate(scene_image(), PROMPT, max_tokens=6).tokens,
        among=right[:1],
    )


def _fresh(case: Case, number: int) -> Path:
    """A copy of the bundle, or of the other one, to be put in its place."""
    origin = _other(case) if number % 2 == 0 else case.stock / case.facts["layout"]
    path = case.directory / f"next-{number}"
    shutil.copytree(origin, path)
    if case.facts.get("manifest") is False:
        (path / "manifest.json").unlink()
    return path


def _exchange(path: Path, new: Path, aside: Path) -> None:
    os.rename(path, aside)
    os.rename(new, path)
    shutil.rmtree(aside)


@contextmanager
def _meanwhile(change: Callable[[int], None]) -> Iterator[None]:
    """`change` with 0, 1, 2 … in another thread, until the block ends."""
    over = threading.Event()

    def work() -> None:
        number = 0
        while not over.wait(0.005):
            change(number)
            number += 1

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _directories(case: Case, rng: random.Random, right: tuple[Any, ...]) -> None:
    """The directory is exchanged for another again and again."""

    def change(number: int) -> None:
        _exchange(case.source, _fresh(case, number), case.directory / "aside")

    with _meanwhile(change):
        for _ in range(ROUNDS):
            case.step("answer", lambda: _ask(case.source), among=right)


def _files(case: Case, rng: random.Random, right: tuple[Any, ...]) -> None:
    """Its files are replaced one by one: between, it is neither bundle, which only hashes tell."""
    names = [f.relative_to(case.source) for f in sorted(case.source.rglob("*")) if f.is_file()]
    rng.shuffle(names)

    def change(number: int) -> None:
        origin = case.stock / case.facts["layout"] if number // len(names) % 2 else _other(case)
        name = names[number % len(names)]
        if name.name == "manifest.json" or (case.source / name).exists():
            shutil.copyfile(origin / name, case.directory / "new")
            os.replace(case.directory / "new", case.source / name)

    among = right if case.facts.get("manifest", True) else ()
    with _meanwhile(change):
        for _ in range(ROUNDS):
            case.step("answer", lambda: _ask(case.source), among=among)


def _truncated(case: Case, rng: random.Random, right: tuple[Any, ...]) -> None:
    """A file loses its end, and gets it back."""
    files = [f for f in sorted(case.source.rglob("*")) if f.is_file()]
    large = [f for f in files if f.stat().st_size > 50_000]
    file = rng.choice((*files, *large, *large))
    data = file.read_bytes()

    def change(number: int) -> None:
        if number % 2:
            file.write_bytes(data)
        else:
            os.truncate(file, rng.randrange(len(data)))

    with _meanwhile(change):
        for _ in range(ROUNDS):
            case.step("answer", lambda: _ask(case.source), among=right[:1])


def _threads(case: Case, rng: random.Random, right: tuple[Any, ...]) -> None:
    """One model in several threads, loaded in one of them or in none; or a model for each."""
    import fastvlm_mlx

    shared = case.step("load", lambda: fastvlm_mlx.load(case.source))
    if shared is None:
        return
    how = rng.choice(("shared", "shared", "each", "features"))
    case.facts["note"] = how
    features = shared.encode(scene_image()) if how == "features" else scene_image()

    def work() -> None:
        model = fastvlm_mlx.load(case.source) if how == "each" else shared
        tokens = model.generate(features, PROMPT, max_tokens=6).tokens
        if tokens != right[0]:
            case.bad("wrong answer in a thread", f"{tokens}, expected {right[0]}")

    threads = [threading.Thread(target=case.step, args=(how, work)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
