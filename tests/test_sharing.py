"""What processes share is made once, whole, by the first that asks."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sharing import Shared, convert_once

from fastvlm_mlx.bundle.config import VisionConfig
from model_export.encoder import multifunction
from model_export.encoder.compression import Compression
from model_export.encoder.coreml import EncoderMetadata, Form

MAKE = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
sys.path.insert(0, sys.argv[2])
from sharing import Shared
def make(out):
    time.sleep(0.3)
    out.mkdir()
    (out / "value").write_text("whole")
    print("made")
factory = SimpleNamespace(getbasetemp=lambda: Path(sys.argv[1]))
print((Shared(factory).get("thing", "bundle", make) / "value").read_text())
"""


def test_of_many_processes_one_makes_it_and_all_see_it_whole(tmp_path):
    command = [sys.executable, "-c", MAKE, str(tmp_path), str(Path(__file__).parent)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = sorted(process.communicate()[0].split() for process in started)
    assert said == [["made", "whole"], ["whole"], ["whole"]]


def test_what_failed_is_made_again(tmp_path_factory):
    shared = Shared(tmp_path_factory)

    def fails(out):
        out.mkdir()
        raise RuntimeError("half of it")

    with pytest.raises(RuntimeError, match="half of it"):
        shared.get("failing", "bundle", fails)
    made = shared.get("failing", "bundle", lambda out: out.mkdir())
    assert made.is_dir()
    assert shared.get("failing", "bundle", fails) == made


def test_another_encoder_is_not_the_one_that_was_converted(shared, tmp_path, monkeypatch):
    """The same one is copied; other weights, another size or another form are converted."""
    made = []

    def convert(module, configs, package, form, *rest):
        made.append(package.name)
        package.mkdir()
        (package / "number").write_text(str(len(made)))
        return described(package)

    def described(package):
        return (package / "number").read_text()

    monkeypatch.setattr(multifunction, "export_sizes", convert)
    monkeypatch.setattr(multifunction, "describe", described)
    convert_once(shared, monkeypatch)

    def number(weight, *forms, size=64):
        module = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(module.weight, weight)
        torch.nn.init.constant_(module.bias, 0)
        config = VisionConfig(image_size=size)
        form = replace(Form("fp16", EncoderMetadata("shared", "none")), **dict(forms))
        package = tmp_path / f"{len(list(tmp_path.iterdir()))}.mlpackage"
        return multifunction.export_sizes(module, [config], package, form)

    assert number(1) == number(1) == "1"
    assert number(2) == "2"
    assert number(1, size=128) == "3"
    assert number(1, ("precision", "fp32")) == "4"
    assert number(1, ("metadata", EncoderMetadata("other", "none"))) == "5"
    compressed = ("compression", Compression(int8=frozenset({"weight"})))
    assert [number(1, compressed), number(1, compressed)] == ["6", "7"]
    assert number(1) == "1"
