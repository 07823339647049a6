"""What a Mac has after a plain `pip install`: no torch, and nothing of the `export` extra."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from distributions import closure, link
from packaging.requirements import Requirement
from PIL import Image

from fastvlm_mlx.cli.common import EXTRAS
from fastvlm_mlx.cli.main import Fastvlm

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Run `fastvlm` where only those distributions are: a directory of links to them."""
    packages = tmp_path_factory.mktemp("base")
    # Torch is a base dependency on Linux alone.
    required = map(Requirement, PROJECT["dependencies"])
    link(closure(r for r in required if r.name != "torch"), packages)
    environment = {
        "PYTHONPATH": f"{packages}{os.pathsep}{ROOT}",
        "HF_HUB_OFFLINE": "1",
    }

    def run(*arguments, code=None):
        # Without `site` nothing is importable but the standard library and PYTHONPATH.
        command = ["-c", code] if code else ["-m", "fastvlm_mlx", *map(str, arguments)]
        return subprocess.run(
            [sys.executable, "-S", *command],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
        )

    return run


@pytest.fixture
def pickled(demo_checkpoint, tmp_path):
    """The demo checkpoint as `torch.save` writes one."""
    import torch
    from safetensors.torch import load_file

    path = tmp_path / "pickled"
    shutil.copytree(demo_checkpoint, path, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(demo_checkpoint / "model.safetensors"), path / "pytorch_model.bin")
    return path


def sentence(result):
    assert result.returncode == 2, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in result.stderr
    return line


def test_the_environment_really_lacks_the_extra(base):
    tried = "\n".join(
        f"try:\n import {name}\nexcept ModuleNotFoundError: print({name!r})"
        for name in EXTRAS["export"]
    )
    # mlx-lm needs transformers itself, in every install.
    assert set(base(code=tried).stdout.split()) == set(EXTRAS["export"]) - {"transformers"}


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_is_the_one_of_pyproject(extra):
    optional = PROJECT["optional-dependencies"]
    assert set(EXTRAS[extra].values()) == {Requirement(r).name for r in optional[extra]}
    # Ray is large, and a slow test alone needs it.
    assert extra == "ray" or f"fastvlm-mlx[{extra}]" in optional["dev"]


@pytest.mark.parametrize("arguments", [["inspect"], ["plan", "--device", "m4"]])
def test_headers_need_no_torch(base, demo_checkpoint, arguments):
    verb, *options = arguments
    result = base(verb, demo_checkpoint, *options, "--json")
    assert result.returncode == 0, result.stderr
    assert '"device' in result.stdout or '"kind": "checkpoint"' in result.stdout


def test_a_bundle_needs_no_torch_to_be_looked_at(base, demo_bundle, tmp_path):
    assert base("inspect", demo_bundle).returncode == 0
    assert base("plan", demo_bundle).returncode == 0
    # Refused for its size, so that all before was done.
    app = tmp_path / "app" / "FastVLM"
    app.mkdir(parents=True)
    (app / "FastVLM.swift").touch()
    assert "the app asserts 256" in sentence(base("install", demo_bundle, tmp_path / "app"))
    assert base("push", demo_bundle, "me/model", "--dry-run").returncode == 0


def test_only_the_plot_of_a_measurement_needs_the_extra(base, demo_bundle, tmp_path):
    said = sentence(base("bench", demo_bundle, "--plot", tmp_path / "bench.png"))
    assert "matplotlib" in said
    assert 'pip install "fastvlm-mlx[export]"' in said
    # What comes next is checked without it.
    assert "takes 256" in sentence(base("bench", demo_bundle, "--image-sizes", "300"))


def test_an_answer_by_a_schema_needs_an_extra_of_its_own(base, tmp_path):
    (tmp_path / "shapes.json").write_text('{"type": "boolean"}')
    words = ["--image", "a.png", "--prompt", "Hm?", "--json-schema", tmp_path / "shapes.json"]
    said = sentence(base("generate", tmp_path, *words))
    assert "this needs llguidance of the `json` extra, which is not installed" in said
    assert 'pip install "fastvlm-mlx[json]"' in said


def test_a_server_needs_an_extra_of_its_own(base, tmp_path):
    said = sentence(base("serve", tmp_path))
    assert "of the `serve` extra, which is not installed" in said
    assert 'pip install "fastvlm-mlx[serve]"' in said


@pytest.mark.parametrize("verb", ["inspect", "plan"])
def test_pickled_weights_need_torch_and_say_so(base, pickled, verb):
    said = sentence(base(verb, pickled))
    assert "pytorch_model.bin is a pickle" in said
    assert 'pip install "fastvlm-mlx[export]"' in said


@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "CHECKPOINT", "OUT"],
        ["verify", "BUNDLE", "--checkpoint", "CHECKPOINT"],
        ["compare", "BUNDLE", "CHECKPOINT"],
        ["sweep", "CHECKPOINT", "--out", "OUT"],
        ["convert", "BUNDLE", "OUT", "--layout", "app"],
        ["demo", "OUT"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_every_other_verb_names_the_extra(base, demo_bundle, demo_checkpoint, tmp_path, arguments):
    paths = {"BUNDLE": demo_bundle, "CHECKPOINT": demo_checkpoint, "OUT": tmp_path / "out"}
    said = sentence(base(*(paths.get(word, word) for word in arguments)))
    assert "of the `export` extra, which is not installed" in said
    assert 'pip install "fastvlm-mlx[export]"' in said
    assert not (tmp_path / "out").exists()


def test_every_verb_is_listed_and_what_needs_the_extra_says_so(base):
    listed = base().stdout
    assert all(f"\n  {name} " in listed for name in Fastvlm.table)
    words = " ".join(listed.split())
    needing = {verb.name for verb in Fastvlm.table.values() if verb.needs_export}
    assert needing == {"export", "verify", "compare", "sweep", "convert", "demo"}
    assert words.count("Needs [export].") == len(needing)
    assert 'pip install "fastvlm-mlx[export]"' in words
    assert base("export", "-h").stdout.startswith("Usage: fastvlm export ")


@pytest.mark.parametrize("verb", ["generate", "bench"])
def test_a_checkpoint_in_place_of_a_bundle_names_the_extra(
    base, demo_checkpoint, tmp_path, monkeypatch, verb
):
    monkeypatch.setitem(os.environ, "FASTVLM_CACHE", str(tmp_path / "cache"))
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    words = ["--image", tmp_path / "a.png"] + ["--prompt", "Hm?"] * (verb == "generate")
    said = sentence(base(verb, demo_checkpoint, *words))
    assert "is a checkpoint, and exporting it needs" in said
    assert said.endswith('run pip install "fastvlm-mlx[export]", or give a bundle')


@pytest.mark.skipif(sys.platform == "darwin", reason="Core ML runs the encoder there")
def test_an_answer_on_linux_misses_torch_in_the_middle_of_work(base, demo_bundle, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    words = ["--image", tmp_path / "a.png", "--prompt", "Hm?"]
    assert "torch is not installed" in sentence(base("generate", demo_bundle, *words))


def test_an_mlx_bundle_answers(base, mlx_bundle, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    words = ["--image", tmp_path / "a.png", "--prompt", "Describe the image.", "--max-tokens", 2]
    result = base("generate", mlx_bundle, *words)
    assert result.returncode == 0, result.stderr


LATE = """
import sys
from fastvlm_mlx.cli import inspect, main
def facts_of(*arguments):
    import MODULE
inspect.facts_of = facts_of
sys.argv = ["fastvlm", "inspect", "."]
main.main()
"""


def test_a_package_that_is_missed_late(base):
    said = sentence(base(code=LATE.replace("MODULE", "sklearn.cluster")))
    assert "this needs scikit-learn of the `export` extra" in said


def test_any_other_missing_module_is_our_bug(base):
    result = base(code=LATE.replace("MODULE", "no_such_module"))
    assert "Traceback" in result.stderr
    assert "no_such_module" in result.stderr
    assert "pip install" not in result.stderr
