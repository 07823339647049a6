"""What is released: the files of the wheel, and the demo run from it outside the repository."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from distributions import closure, link
from packaging.requirements import Requirement

from fastvlm_mlx import __version__
from fastvlm_mlx.vision.package import describe
from model_export.publish.card import model_card

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PACKAGES = ("fastvlm_mlx", "model_export")
# One that no release has, so that whatever says it has it from the one place.
VERSION = "98.7.6"
DEMO = "model_export/demo/checkpoint"
# What an environment of this machine must not bring into a new one.
FOREIGN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")


def files_of_packages() -> set[str]:
    """The files of the source tree that belong to a release."""
    return {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """A directory with the sdist and the wheel, built from a copy so that nothing is left here."""
    work = tmp_path_factory.mktemp("release")
    source = work / "source"
    source.mkdir()
    for path in ROOT.iterdir():
        if path.suffix in (".toml", ".md", ".in") or path.name.startswith("LICENSE"):
            shutil.copyfile(path, source / path.name)
    for name in (*PACKAGES, "tests", "benchmarks", "docs"):
        ignored = shutil.ignore_patterns("__pycache__", "golden*")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    init = source / "fastvlm_mlx" / "__init__.py"
    text, count = re.subn(
        r'^__version__ = ".*"$', f'__version__ = "{VERSION}"', init.read_text(), flags=re.MULTILINE
    )
    assert count == 1
    init.write_text(text)
    # The wheel is built from the sdist, as for a release; isolation would download the backend.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(work / "dist")]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return work / "dist"


@pytest.fixture(scope="module")
def wheel(dist):
    (wheel,) = dist.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """A new environment: the wheel and what it requires with the `export` extra, nothing else."""
    directory = tmp_path_factory.mktemp("environment") / "env"
    venv.create(directory, symlinks=True)
    python = directory / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    command += ["--disable-pip-version-check", "--no-index", "--no-deps", "--no-compile"]
    done = subprocess.run([*command, str(wheel)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (packages,) = directory.glob("lib/python3*/site-packages")
    required = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["export"]]
    link(closure(map(Requirement, required)), packages)
    return directory


@pytest.fixture(scope="module")
def run(environment, tmp_path_factory):
    """Run a program of that environment in an empty directory of its own, offline."""
    here = tmp_path_factory.mktemp("elsewhere")
    variables = {key: value for key, value in os.environ.items() if key not in FOREIGN}
    variables |= {"HF_HUB_OFFLINE": "1", "COLUMNS": "80"}

    def program(name, *arguments):
        done = subprocess.run(
            [str(environment / "bin" / name), *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=here,
            env=variables,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    program.directory = here
    return program


def test_the_wheel_holds_the_two_packages_and_nothing_else(wheel):
    assert wheel.name == f"fastvlm_mlx-{VERSION}-py3-none-any.whl"
    info = f"fastvlm_mlx-{VERSION}.dist-info"
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    assert {name for name in names if not name.startswith(info)} == files_of_packages()
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert {f"{DEMO}/{name}" for name in ("model.safetensors", "config.json", "LICENSE")} <= names
    assert {name.removeprefix(f"{info}/") for name in names if name.startswith(info)} == {
        "METADATA",
        "RECORD",
        "WHEEL",
        "entry_points.txt",
        "licenses/LICENSE",
        "top_level.txt",
    }
    # The demo checkpoint is most of it; a file of another size is there by mistake.
    assert wheel.stat().st_size < 6e6


def test_the_sdist_holds_what_the_wheel_is_made_of(dist):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        paths = [Path(member.name) for member in archive.getmembers() if member.isfile()]
    names = {path.relative_to(f"fastvlm_mlx-{VERSION}").as_posix() for path in paths}
    made = {name for name in names if name.startswith("fastvlm_mlx.egg-info/")}
    assert names - made == files_of_packages() | {
        "CHANGELOG.md",
        "LICENSE",
        "MANIFEST.in",
        "PKG-INFO",
        "README.md",
        "pyproject.toml",
        "setup.cfg",
    }


def test_the_metadata_is_pyproject_s(wheel):
    archive = zipfile.ZipFile(wheel)
    metadata = archive.read(f"fastvlm_mlx-{VERSION}.dist-info/METADATA").decode()
    head, _, description = metadata.partition("\n\n")
    assert f"Version: {VERSION}" in head.splitlines()
    for line in (
        "License-Expression: MIT",
        "License-File: LICENSE",
        "Requires-Python: <3.14,>=3.11",
    ):
        assert line in head.splitlines()
    assert "Description-Content-Type: text/markdown" in head.splitlines()
    assert description.strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()


def test_the_changelog_s_first_entry_is_of_this_version():
    entries = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert entries[0] == __version__


def test_the_demo_runs_from_the_wheel(run, environment):
    said = run("python", "-c", "import fastvlm_mlx, model_export; print(model_export.__file__)")
    assert Path(said.strip()).is_relative_to(environment)
    assert "5 of 5 answers right." in run("fastvlm", "demo")
    bundle = run.directory / "fastvlm-demo" / "bundle"
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["gates_passed"]
    # Every place that names the version has it from fastvlm_mlx/__init__.py.
    assert manifest["versions"]["fastvlm-mlx"] == VERSION
    assert run("fastvlm", "--version") == f"fastvlm-mlx {VERSION}\n"
    asked = "from importlib.metadata import version; print(version('fastvlm-mlx'))"
    assert run("python", "-c", asked) == f"{VERSION}\n"
    assert describe(bundle / "fastvithd.mlpackage").metadata["fastvlm_mlx"] == VERSION
    assert f"by fastvlm-mlx {VERSION} and compared with" in model_card(manifest, "owner/name")
