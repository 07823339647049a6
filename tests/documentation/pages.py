"""The documentation as its tests see it: pages, blocks, commands, links."""

import re
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Relative to the root, in the order in which one reads them.
NAMES = ("README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
NAMES += ("CONTRIBUTING.md",)

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Example:
    """A command with the output shown below it, if any is; or Python code.

    Attributes:
        page: the name of the page that it stands on.
        output: None where the page shows none.
    """

    page: str
    text: str
    output: str | None = None
    python: bool = False

    @property
    def ours(self) -> bool:
        """Whether it is run here: not what installs, clones, opens, tests or measures."""
        return self.python or self.command.startswith("fastvlm ")

    @property
    def served(self) -> bool:
        """Whether it asks the server that another example starts."""
        return self.python and "http://127.0.0.1:8080/v1" in self.text

    @property
    def command(self) -> str:
        """The command without the text that is piped into it."""
        return self.text.rpartition(" | ")[2] if self.text.startswith("printf ") else self.text

    @property
    def piped(self) -> str:
        """The text that is piped into the command."""
        printf = self.text.removesuffix(self.command).rpartition(" | ")[0]
        return shlex.split(printf)[1].replace("\\n", "\n") if printf else ""

    @property
    def words(self) -> list[str]:
        """The words that may name files: arguments without the verb, or quoted texts."""
        if self.python:
            return re.findall(r'"([^"]*)"', self.text)
        return [*shlex.split(self.command)[2:], *self.piped.split()]

    @property
    def made(self) -> str | None:
        """The directory that the command makes."""
        if not self.text.startswith("fastvlm "):
            return None
        verb = shlex.split(self.text)[1]
        if verb == "sweep":
            return self.words[self.words.index("--out") + 1]
        return {"demo": "fastvlm-demo"}.get(verb) or (
            self.words[1] if verb in ("export", "convert") else None
        )


@dataclass(frozen=True)
class Page:
    name: str

    @cached_property
    def text(self) -> str:
        return (ROOT / self.name).read_text(encoding="utf-8")

    @property
    def blocks(self) -> list[tuple[str, str]]:
        return BLOCK.findall(self.text)

    @property
    def prose(self) -> str:
        return BLOCK.sub("", self.text)

    @property
    def examples(self) -> list[Example]:
        found = []
        for language, body in self.blocks:
            if language == "python":
                found.append(Example(self.name, body, python=True))
            elif language == "sh":
                found += [Example(self.name, line) for line in body.splitlines()]
            elif language == "console":
                for part in re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]:
                    command, _, output = part.partition("\n")
                    found.append(Example(self.name, command.rpartition("&& ")[2], output))
        return found

    @property
    def links(self) -> list[str]:
        """Targets that are no addresses elsewhere."""
        return [link for link in LINK.findall(self.prose) if "://" not in link]

    @property
    def anchors(self) -> set[str]:
        """What a code host makes of the headings."""
        titles = (re.sub(r"[^\w\- ]", "", title.lower()) for title in HEADING.findall(self.prose))
        return {title.replace(" ", "-") for title in titles}


PAGES = tuple(Page(name) for name in NAMES)
EXAMPLES = [example for page in PAGES for example in page.examples]
