"""Who may import whom: the contracts of pyproject's [tool.importlinter] hold."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("fastvlm_mlx", "model_export")
LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"


def lint_imports(directory: Path) -> subprocess.CompletedProcess[str]:
    """Run `lint-imports` on the packages and the pyproject.toml in `directory`."""
    # By its module, as the command may lie in another environment's bin than this Python does.
    return subprocess.run(
        [sys.executable, "-c", LINT, "--no-cache", "--no-logo"],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": str(directory), "COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=False,
    )


def broken(done: subprocess.CompletedProcess[str]) -> str:
    """What the linter says of the contracts that are broken; its whole output if it says none."""
    _, title, found = done.stdout.partition("Broken contracts\n")
    return title + found or done.stdout + done.stderr


def test_every_import_goes_down():
    done = lint_imports(ROOT)
    if done.returncode != 0:
        pytest.fail(f"a contract on who may import whom is broken\n{broken(done)}", pytrace=False)


@pytest.fixture
def copy(tmp_path):
    """Both packages' modules and their contracts, to change."""
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            copy = tmp_path / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    shutil.copyfile(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    return tmp_path


def test_an_import_that_goes_up_is_found(copy):
    with (copy / "fastvlm_mlx" / "errors.py").open("a") as file:
        file.write("\n\ndef planted():\n    from model_export import options\n")
    done = lint_imports(copy)
    assert done.returncode == 1
    assert "fastvlm_mlx.errors -> model_export.options" in broken(done)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_module_without_a_place_is_found(copy, package):
    (copy / package / "planted.py").touch()
    done = lint_imports(copy)
    assert done.returncode == 1
    assert "planted" in broken(done)
