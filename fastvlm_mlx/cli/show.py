"""How the command line shows progress, facts, gates and answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from fastvlm_mlx.bundle.files import shown_bytes
from fastvlm_mlx.bundle.manifest import gate_cells
from fastvlm_mlx.errors import printable

# rich takes a tenth of the time from the prompt to an answer, which is printed without it.
if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from fastvlm_mlx.language.generate import GenerationResult

# All but the line's end and the tab, as Python writes them.
_CONTROLS = {c: f"\\x{c:02x}" for c in (*range(32), *range(127, 160)) if c not in (9, 10)}
# The facts that are not called by their key with spaces.
LABELS = {"fits_unmodified_mlx_vlm": "fits unmodified mlx-vlm", "misfit": "why it does not fit"}
SEVERAL_IMAGES = (
    "FastVLM was trained with one image in a conversation, and answers about several may confuse "
    "them"
)
TILES = "FastVLM was trained without tiles, and may answer worse about an image that has them"
# In these huggingface_hub may draw bars of its own, with bytes and speed: none of ours meanwhile.
HUB_STAGES = ("checkpoint", "upload")
# Seconds between two lines of a count where there is no terminal.
COUNT_S = 30.0
# A rate that was measured for a shorter time says little.
RATE_S = 5.0


@cache
def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True)


@contextmanager
def stages() -> Iterator[Callable[[str, float | None], None]]:
    """Yield a progress callback for long work. It draws a bar on a terminal, and elsewhere prints a
    line for each stage."""
    if not _stderr().is_terminal:
        yield _lines()
        return
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=_stderr())
    current: tuple[str, Any] = ("", None)

    def show(stage: str, done: float | None) -> None:
        nonlocal current
        if stage != current[0]:
            finish()
            task = None
            if stage in HUB_STAGES:
                pause()
            else:
                progress.start()
                task = progress.add_task(stage, total=None if done is None else 1)
            current = (stage, task)
        if done is not None and current[1] is not None:
            progress.update(current[1], completed=done)

    def finish() -> None:
        if current[1] is not None:
            progress.update(current[1], total=1, completed=1)

    def pause() -> None:
        progress.stop()
        # What is above has been printed for good.
        for task in progress.task_ids:
            progress.remove_task(task)

    try:
        yield show
        finish()
    finally:
        progress.stop()


def _lines() -> Callable[[str, float | None], None]:
    last = ""
    started = time.perf_counter()

    def show(stage: str, done: float | None) -> None:
        nonlocal last
        if stage != last:
            last = stage
            note(f"{time.perf_counter() - started:6.1f} s  {stage}")

    return show


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a callback for how many of how many are done, which shows the rate and the time that is
    left: as a bar on a terminal, and elsewhere as a line now and then. It is called first before
    anything is done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

    columns = (SpinnerColumn(), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    progress = Progress(*columns, console=_stderr())
    calls, told = 0, time.perf_counter()
    first = (0, 0.0)
    task: Any = None

    def show(done: int, total: int) -> None:
        nonlocal calls, told, first, task
        calls, now = calls + 1, time.perf_counter()
        # With the first one all is loaded, and the clock begins.
        if calls <= 2:
            first = (done, now)
        text = f"{what}{_rate(done - first[0], now - first[1], total - done)}"
        if _stderr().is_terminal:
            if task is None:
                progress.start()
                task = progress.add_task(text, total=total)
            progress.update(task, completed=done, description=text)
        elif now - told >= COUNT_S:
            told = now
            note(f"{done:,} of {total:,} {text}")

    try:
        yield show
    finally:
        if task is not None:
            progress.stop()


def _rate(done: int, seconds: float, left: int) -> str:
    """How fast something goes, and how long what is left takes."""
    if not done or not left or seconds < RATE_S:
        return ""
    minutes = left * seconds / done / 60
    remaining = f"{minutes:,.0f} min" if minutes < 120 else f"{minutes / 60:,.1f} h"
    remaining = "less than a minute" if minutes < 1 else remaining
    return f", {60 * done / seconds:,.0f} a minute, {remaining} left"


def note(text: str) -> None:
    _stderr().print(printable(text), highlight=False, markup=False, soft_wrap=True)


def answer(text: str) -> str:
    """Make a model's answer safe to print: whoever made the model, its text can't give the terminal
    commands."""
    return text.translate(_CONTROLS)


def timing_line(result: GenerationResult, encoder: str | None = None) -> str:
    """Write counts, seconds of each stage, speed, memory and what computed in one line."""
    t = result.timings
    return (
        f"{result.image_tokens} image + {result.prompt_tokens - result.image_tokens} text tokens, "
        f"{result.cached_tokens} cached | "
        f"load {t.load_s:.2f} s | preprocess {t.preprocess_s:.3f} | encode {t.encode_s:.3f} | "
        f"project {t.project_s:.3f} | prefill {t.prefill_s:.3f} | TTFT {t.ttft_s:.3f} s | "
        f"{result.generation_tokens} tokens in {t.decode_s:.3f} s ({t.tokens_per_s:.1f}/s) | "
        f"peak {result.peak_memory_bytes / 1e9:.2f} GB | "
        f"{f'encoder {encoder} | ' if encoder else ''}language model {result.compute}"
    )


def print_facts(facts: dict[str, Any]) -> None:
    """Print the facts of `inspect` as a table; nested ones get their group's name in front."""
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for key, value in facts.items():
        if key == "gates":
            continue
        if isinstance(value, dict):
            for inner, entry in value.items():
                if isinstance(entry, dict):
                    entry = ", ".join(f"{k} {_shown('bytes', v)}" for k, v in entry.items())
                table.add_row(*_cells(f"{key} {inner}".replace("_", " "), _shown(inner, entry)))
        else:
            name = LABELS.get(key, key.replace("_", " "))
            table.add_row(*_cells(name, _shown(key, value)))
    print_table(table)
    if facts.get("gates"):
        print_gates(facts["gates"])


def print_gates(gates: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table("gate", "measured", "limit", "", box=None, pad_edge=False)
    for gate in gates:
        table.add_row(*_cells(*gate_cells(gate)))
    print_table(table)


def print_table(table: Table, width: int | None = None) -> None:
    """Print a table. Where the output is no terminal, its lines end without the spaces that fill
    them up."""
    from rich.console import Console

    console = Console(width=width, highlight=False) if width else Console()
    if console.is_terminal:
        console.print(table, soft_wrap=width is None)
        return
    with console.capture() as captured:
        console.print(table, soft_wrap=width is None)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def _cells(*texts: str) -> list[Text]:
    """Make cells of texts that may be somebody else's. Nothing in them is read as rich's markup or
    reaches the terminal as a command."""
    from rich.text import Text

    return [Text(printable(text)) for text in texts]


def _shown(key: str, value: Any) -> str:
    if value is None:
        return "not recorded"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if key.endswith("bytes"):
        return shown_bytes(value)
    return f"{value:,}" if isinstance(value, int) else str(value)
