"""One case: where it lies, what chance it has, and what was found wrong with it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from tests.fuzz import judge
from tests.fuzz.stock import SECRET, Stock

T = TypeVar("T")
# Each kind of input, and how many of a hundred cases are its.
SHARES = {
    "images": 28,
    "checkpoints": 19,
    "bundles": 19,
    "tokenizers": 9,
    "packages": 10,
    "options": 8,
    "api": 5,
    "server": 5,
    "exports": 1,
    "concurrency": 1,
}
_FOLDERS = ("[red]mark7[/red]", "[/]", "two\nlines", "\x1b[31mred", "right\u202eleft", "é" * 90)
# Of which kinds the directory's own name is hostile now and then.
FOLDERS = dict.fromkeys(("checkpoints", "bundles", "packages"), _FOLDERS)
# What a case is, beside its files.
RECORD = "case.json"


@dataclass
class Case:
    """A case of the campaign; `directory` is its own.

    Attributes:
        facts: what `prepare` tells `run`: JSON, kept beside the files.
        folder: where below `source` everything lies; now and then a name that is hard to print.
        findings: what was bad, most telling first.
        outcomes: how each step ended: "answer", or the class of the error.
    """

    kind: str
    seed: int
    number: int
    directory: Path
    stock: Stock
    facts: dict[str, Any] = field(default_factory=dict)
    folder: str = ""
    findings: list[judge.Finding] = field(default_factory=list)
    outcomes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.seed}-{self.number}"

    @property
    def source(self) -> Path:
        """What the product reads and must leave as it is."""
        return self.directory / "source" / self.folder

    @property
    def out(self) -> Path:
        """Where the product may write."""
        path = self.directory / "out"
        path.mkdir(exist_ok=True)
        return path

    @cached_property
    def rng(self) -> random.Random:
        """The same numbers for the same seed, kind and number, whatever ran before."""
        return random.Random(f"{self.seed} {self.kind} {self.number}")

    def module(self) -> ModuleType:
        from importlib import import_module

        return import_module(f"tests.fuzz.{self.kind}")

    def prepare(self) -> None:
        self.directory.mkdir(parents=True)
        chance = random.Random(f"{self.name} folder")
        if self.kind in FOLDERS and chance.random() < 0.06:
            self.folder = chance.choice(FOLDERS[self.kind])
        self.module().prepare(self)
        record: dict[str, Any] = {"kind": self.kind, "seed": self.seed, "number": self.number}
        record |= {"facts": self.facts, "folder": self.folder, "stock": str(self.stock.directory)}
        text = json.dumps(record, indent=1, default=repr)
        (self.directory / RECORD).write_text(text, encoding="utf-8", errors="backslashreplace")

    def run(self) -> None:
        # `run` draws the same numbers whether or not `prepare` ran before it.
        self.rng = random.Random(f"{self.seed} {self.kind} {self.number} run")
        self.module().run(self)

    def step(
        self,
        name: str,
        function: Callable[[], T],
        *,
        must_fail: bool = False,
        must_answer: bool = False,
        names: str | None = None,
        among: tuple[Any, ...] = (),
    ) -> T | None:
        """Run one thing the product does, and judge how it ends.

        Args:
            must_fail: only an error is right.
            must_answer: no error is right; nothing is wrong with the input.
            names: what the error's sentence has to contain, besides a file or an option.
            among: the answers that are right; empty where any is.
        """
        try:
            value = function()
        # What is judged is whatever comes out; panics of Rust are no `Exception`.
        except BaseException as error:  # noqa: BLE001
            self.outcomes.append(type(error).__name__)
            self.findings += judge.error(name, error, names)
            if must_answer:
                self.bad("refused", f"{name}: {judge.shown(error)}")
            return None
        self.outcomes.append("answer")
        if isinstance(value, str) and SECRET in value:
            self.bad("secret told", f"{name}: {judge.shown(value)}")
        if must_fail:
            self.bad("accepted", f"{name}: expected an error, got {judge.shown(value)}")
        elif among and value not in among:
            self.bad("wrong answer", f"{name}: {judge.shown(value)}, expected {among!r}"[:600])
        return value

    def bad(self, cause: str, detail: str) -> None:
        mutator = str(self.facts.get("mutator", ""))
        self.findings.append(judge.Finding(f"{cause} ({mutator})" if mutator else cause, detail))
