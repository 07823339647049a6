"""What the README shows is run, in its order, and its answers are the ones shown."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONSOLE = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
FLOAT = re.compile(r"\d+(\.\d+)?(e[-+]\d+)?")


def examples() -> list[tuple[str, str]]:
    """Every `fastvlm` command with the output shown below it; the installs are CI's to run."""
    found = []
    for block in CONSOLE:
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            found.append((command.rpartition("&& ")[2], output))
    return [(command, output) for command, output in found if command.startswith("fastvlm")]


def words(text: str) -> list[str]:
    """Lines without what differs from machine to machine: numbers and widths of columns."""
    return [" ".join(FLOAT.sub("0", line).split()) for line in text.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory that looks like a clone to the README's commands."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "model_export").symlink_to(ROOT / "model_export")
    return folder


def run(arguments: list[str], folder: Path) -> str:
    # The environment's `fastvlm` is this module; outputs are as wide as the README's.
    command = [sys.executable, "-m", "fastvlm_mlx", *arguments]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_commands_print_what_the_readme_shows(folder):
    shown = examples()
    verbs = [
        "demo",
        "export",
        "verify",
        "sweep",
        "export",
        "plan",
        "generate",
        "export",
        "convert",
        "push",
    ]
    assert [command.split()[1] for command, _ in shown] == verbs
    for command, output in shown:
        found = words(run(shlex.split(command)[1:], folder))
        # A line of … stands for lines that are left out.
        head, gap, tail = output.partition("…\n")
        first, last = words(head), words(tail)
        if gap:
            assert len(found) > len(first + last)
            found = found[: len(first)] + found[len(found) - len(last) :]
        assert found == first + last, command


def test_the_python_runs(folder):
    if not (folder / "my-bundle").exists():
        run(["demo"], folder)
        run(["export", "model_export/demo/checkpoint", "my-bundle", "--llm-bits", "4"], folder)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True
    )
    assert done.stdout.count("ms to the first token") == 2


def test_every_file_of_the_tree_is_there_and_named():
    (tree,) = re.findall(r"## The tree\n\n```\n(.*?)```", README, re.DOTALL)
    folder = ROOT
    for line in tree.splitlines():
        names = line.strip().partition("  ")[0].split(", ")
        if not line.startswith(" "):
            folder = ROOT / names[0]
            assert folder.is_dir()
            continue
        for name in names:
            assert (folder / name).exists(), name
    for package in ("fastvlm_mlx", "model_export"):
        for path in (ROOT / package).glob("*.py"):
            if not path.name.startswith("__"):
                assert path.name in tree


def test_the_options_are_the_command_s():
    from model_export.options import BITS, DTYPES, GROUP_SIZES, METHODS, PRECISIONS, LLMOptions

    table = dict(re.findall(r"^\| `(--[a-z-]+)` \| ([^|]*) \|", README, re.MULTILINE))
    assert all(str(bits) in table["--llm-bits"] for bits in BITS)
    assert all(str(size) in table["--group-size"] for size in GROUP_SIZES)
    assert all(dtype in table["--dtype"] for dtype in DTYPES)
    assert all(method in table["--method"] for method in METHODS)
    assert all(precision in table["--encoder-precision"] for precision in PRECISIONS)
    assert f"| {LLMOptions().resolved_bits} |" in README
