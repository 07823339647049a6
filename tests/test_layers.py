"""Who may import whom: the contracts of pyproject's [tool.importlinter] hold."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
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
    assert done.returncode == 0, "\n" + broken(done)


def test_an_import_that_goes_up_is_found(tmp_path):
    for path in ROOT.glob("*/**/*.py"):
        if path.parts[len(ROOT.parts)] in ("fastvlm_mlx", "model_export"):
            copy = tmp_path / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    with (tmp_path / "fastvlm_mlx" / "errors.py").open("a") as file:
        file.write("\n\ndef planted():\n    from model_export import options\n")
    (tmp_path / "fastvlm_mlx" / "unplaced.py").touch()
    done = lint_imports(tmp_path)
    assert done.returncode == 1
    assert "fastvlm_mlx.errors -> model_export.options" in broken(done)
