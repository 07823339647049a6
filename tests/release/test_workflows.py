"""The workflows: the Pythons that are promised, and a release that the tag and the tests decide."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def jobs(name):
    text = (ROOT / ".github" / "workflows" / f"{name}.yml").read_text(encoding="utf-8")
    return yaml.safe_load(text)["jobs"]


@pytest.mark.parametrize("system", ["linux", "macos"])
def test_every_promised_python_is_tested(system):
    promised = SpecifierSet(PROJECT["requires-python"])
    minors = [f"3.{minor}" for minor in range(8, 30) if f"3.{minor}" in promised]
    assert jobs("ci")[system]["strategy"]["matrix"]["python"] == minors


def test_nothing_is_published_before_all_of_it_has_run():
    release = jobs("release")
    assert set(release["publish"]["needs"]) == {"test", "wheel"}
    assert {release[name]["needs"] for name in ("test", "wheel")} == {"build"}
    assert release["test"]["uses"] == "./.github/workflows/ci.yml"
    systems = release["wheel"]["strategy"]["matrix"]["os"]
    assert any(name.startswith("ubuntu") for name in systems)
    assert any(name.startswith("macos") for name in systems)


def test_only_the_last_job_may_publish_and_holds_no_secret():
    release = jobs("release")
    asking = {name for name, job in release.items() if "id-token" in job.get("permissions", {})}
    assert asking == {"publish"}
    assert release["publish"]["environment"] == "pypi"
    assert "secrets." not in (ROOT / ".github" / "workflows" / "release.yml").read_text()


def test_what_builds_the_release_is_what_the_tests_build_with():
    (install,) = [
        step["run"]
        for step in jobs("release")["build"]["steps"]
        if "pip install" in step.get("run", "")
    ]
    (build,) = [r for r in PROJECT["optional-dependencies"]["dev"] if r.startswith("build")]
    assert f'"{build}"' in install


@pytest.mark.parametrize(
    ("tag", "published"),
    [("v1.2.3", True), ("v1.2.4", False), ("1.2.3", False), ("v1.2.3rc1", False)],
)
def test_a_tag_of_another_version_is_refused(tmp_path, tag, published):
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / "fastvlm_mlx-1.2.3-py3-none-any.whl").touch()
    (tmp_path / "dist" / "fastvlm_mlx-1.2.3.tar.gz").touch()
    (step,) = [
        step
        for step in jobs("release")["build"]["steps"]
        if step.get("name") == "the tag names the version"
    ]
    done = subprocess.run(
        # As the runner does.
        ["bash", "-e", "-c", step["run"]],
        cwd=tmp_path,
        env=os.environ | {"GITHUB_REF_NAME": tag},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode == 0) == published
    if not published:
        said = re.sub(r"^::error::", "", done.stdout.strip())
        assert said.startswith(
            f"the tag is {tag} and the version is 1.2.3: expected the tag v1.2.3"
        )


def test_ci_runs_the_readme_s_two_commands():
    script = (ROOT / ".ci" / "run").read_text()
    assert "README.md" in script
    (step,) = [s for s in jobs("ci")["linux"]["steps"] if ".ci/run" in s.get("run", "")]
    assert step["run"] == "bash .ci/run"
