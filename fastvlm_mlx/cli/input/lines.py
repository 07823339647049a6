"""Where the lines of a chat come from, and the images that are named in them."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable
from difflib import get_close_matches
from importlib.util import find_spec
from io import TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from fastvlm_mlx.bundle.files import is_url
from fastvlm_mlx.errors import ImageError, escaped
from fastvlm_mlx.image.suffixes import SUFFIXES

PROMPT = "> "
# A word as a shell reads it: quoted, with escaped spaces, or both, as terminals write the path of a
# file that is dropped onto them.
_SHELL_WORD = re.compile(r"""(?:'[^']*'|"(?:\\.|[^"\\])*"|\\.|[^\s'"\\])+(?!\S)""")
_WORD = re.compile(r"\S+")
# Characters of a path, each of its bytes written as three; no system opens a longer one.
_LONGEST_PATH = 3 * 4096
# Characters after the word that each was begun with that all readings of a line may take. Where
# every word may begin one that goes on to the line's end, their sum is the square of its length.
_MOST_READ = 100_000
# How a path begins that is none of a sentence's words.
_BEGINNINGS = ("/", "~/", "./", "../")
# Names of a directory that are compared with one that is not there.
_MOST_NAMES = 10_000


def split_images(line: str) -> tuple[list[str], str]:
    """The paths of images in a line, and the rest of it.

    A word is an image if it is the path of a file and either ends as images do or has a slash in
    it; or if it can't be meant as anything else, as an absolute path that ends so. There may be no
    file of that name, which `check` finds out.
    """
    line = line.strip()
    if _is_path_with_blanks(line):
        return [line], ""
    paths: list[str] = []
    rest, place, left = "", 0, _MOST_READ
    while word := _WORD.search(line, place):
        rest += line[place : word.start()]
        given = _SHELL_WORD.match(line, word.start(), len(line) if left > 0 else word.end())
        end = len(line) if given is None else given.end()
        left -= end - word.end()
        short = given is not None and end - word.start() <= _LONGEST_PATH
        path = unquoted(given.group()) if given is not None and short else None
        # Where people put a path, or written as a terminal writes one that is dropped onto it.
        apart = path is not None and (
            rest.isspace()
            or not rest
            or end == len(line)
            or word.group() != path[: len(word.group())]
        )
        if given is not None and path is not None and _is_image(path, apart):
            paths.append(path)
            place = given.end()
        else:
            rest += word.group()
            place = word.end()
    left_over = rest.split()
    # Names of images and nothing else: a sentence has another word.
    if all(_ends_so(name) and len(name) <= _LONGEST_PATH for name in left_over):
        return paths + left_over, ""
    return paths, rest.strip()


def check(path: str) -> None:
    """Raises ImageError: there is no such file; with the nearest name that there is beside it."""
    if is_url(path):
        return
    try:
        file = Path(path).expanduser()
        file.stat()
    except (FileNotFoundError, NotADirectoryError):
        near = _nearest(file)
        hint = "check the path"
        if near is not None:
            hint = f"use {shlex.quote(os.path.join(os.path.dirname(path), near))}"
        raise ImageError(escaped(f"there is no file {path}: {hint}")) from None
    except (OSError, ValueError, RuntimeError):
        # Whoever opens it says what is wrong with it.
        return


def _nearest(file: Path) -> str | None:
    """The name of an image that is most like this one's, in the same directory."""
    try:
        with os.scandir(file.parent) as entries:
            names = [entry.name for entry in islice(entries, _MOST_NAMES)]
    except OSError:
        return None
    images = {name.lower(): name for name in names if _ends_so(name) and name != file.name}
    near = get_close_matches(file.name.lower(), images, 1)
    return images[near[0]] if near else None


def unquoted(text: str) -> str | None:
    """A path without its quotes, escapes or `file://`; None where that leaves none."""
    try:
        words = shlex.split(text)
    except ValueError:
        return None
    if len(words) != 1 or not words[0]:
        return None
    path = words[0]
    if path.lower().startswith("file://"):
        try:
            url = urlsplit(path)
        except ValueError:
            return None
        if url.netloc not in ("", "localhost"):
            return None
        path = unquote(url.path, errors="surrogateescape")
    return path


def one_path(text: str) -> str:
    """The path that a command was given: as a shell would read it, or all of it as it stands."""
    path = unquoted(text)
    return text if path is None else path


def _is_image(path: str, apart: bool) -> bool:
    """
    Args:
        apart: it stands where a sentence would not mention a path.
    """
    if "/" not in path:
        return _ends_so(path) and _is_file(path)
    if _ends_so(path) and path.startswith(_BEGINNINGS):
        return True
    # With the question's own mark, which no name of an image ends with.
    return (apart and _ends_so(path.rstrip("?!.,;:"))) or _is_file(path)


def _is_path_with_blanks(line: str) -> bool:
    """Whether the whole line is the path of an image, typed without quotes."""
    if " " not in line or not _ends_so(line) or len(line) > _LONGEST_PATH:
        return False
    if _is_file(line):
        return True
    words = line.split()
    return line.startswith(_BEGINNINGS) and not any(_ends_so(word) for word in words[:-1])


def _ends_so(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _is_file(path: str) -> bool:
    try:
        return Path(path).expanduser().is_file()
    except (OSError, ValueError, RuntimeError):
        # What can't be a path.
        return False


def is_interactive() -> bool:
    """Whether somebody types, and sees what is written."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))


def reader(commands: dict[str, bool]) -> Callable[[], str | None]:
    """What returns the next line, or None after the last.

    Args:
        commands: those to complete, and whether each is followed by a path.
    """
    if isinstance(sys.stdin, TextIOWrapper):
        # Names of files are bytes; in a question such bytes are refused by a sentence.
        sys.stdin.reconfigure(errors="surrogateescape")
    if not is_interactive():
        return _next_line
    if find_spec("prompt_toolkit") is None:
        return _typed
    return _edited(commands)


def _next_line() -> str | None:
    line = "" if sys.stdin is None else sys.stdin.readline()
    return line or None


def _typed() -> str | None:
    try:
        return input(PROMPT)
    except EOFError:
        print()
        return None


def _edited(commands: dict[str, bool]) -> Callable[[], str | None]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import NestedCompleter, PathCompleter
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    paths = PathCompleter(expanduser=True)
    choices: dict[str, Any] = {name: paths if path else None for name, path in commands.items()}
    file = _history_file()
    session: PromptSession[str] = PromptSession(
        history=InMemoryHistory() if file is None else FileHistory(str(file)),
        completer=NestedCompleter.from_nested_dict(choices),
        complete_while_typing=False,
    )

    def read() -> str | None:
        try:
            return session.prompt(PROMPT)
        except EOFError:
            return None

    return read


def _history_file() -> Path | None:
    """What was typed in earlier chats, for its owner alone; None where there is no place for it."""
    if sys.platform == "darwin":
        state = Path("~/Library/Application Support")
    else:
        state = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state")
    try:
        file = state.expanduser() / "fastvlm-mlx" / "chat-history"
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        file.touch(mode=0o600)
    except (OSError, RuntimeError):
        return None
    return file
