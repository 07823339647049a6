"""Core ML's compute units as a gate, with a stand-in for what only a Mac has."""

from core_ml import CoreML

from fastvlm_mlx.vision.program.mlprogram import MLProgramEncoder
from fastvlm_mlx.vision.units import probe
from model_export.gates.core_ml import core_ml_gates
from model_export.gates.verify import verify


def test_one_that_holds_is_enough(demo_bundle, demo_checkpoint, monkeypatch, tmp_path):
    core_ml = CoreML(monkeypatch, tmp_path)
    core_ml.noise = {"ALL": 0.1, "CPU_AND_NE": 0.1, "CPU_AND_GPU": 0.001}
    core_ml.refuses = {"CPU_ONLY"}
    _, gates = verify(demo_bundle, demo_checkpoint, {}, lambda stage, done: None)
    found = {gate.name: gate for gate in gates if "Core ML" in gate.name}
    units = {name: found.pop(f"encoder SNR, Core ML on {name}") for name in ("all", "gpu", "ne")}
    assert 18 < units["ne"].value < 22 < 58 < units["gpu"].value
    assert "s an image" in units["gpu"].detail
    # What is not judged fails nothing, and is recorded all the same.
    assert all(gate.passed and gate.left_out for gate in units.values())
    assert units["ne"].to_dict()["value"] == units["ne"].value
    refused = found.pop("encoder SNR, Core ML on cpu")
    assert refused.passed
    assert "unsupported" in refused.detail
    assert refused.to_dict()["value"] == "-inf"
    gate = found.pop("encoder SNR through Core ML")
    assert (gate.value, gate.limit) == (units["gpu"].value, 35)
    assert gate.passed
    assert not gate.left_out
    assert not found


def test_none_that_holds_is_a_failure(demo_bundle, monkeypatch, tmp_path):
    core_ml = CoreML(monkeypatch, tmp_path)
    core_ml.noise = dict.fromkeys(("ALL", "CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE"), 0.1)
    package = demo_bundle / "fastvithd.mlpackage"
    encoder = MLProgramEncoder(package)
    pixels = probe(encoder.image_size)
    gates = core_ml_gates(package, pixels, encoder(pixels), None)
    assert [gate.passed for gate in gates] == [True] * 4 + [False]
    assert "encoder SNR through Core ML is" in gates[-1].sentence()
    assert "ne 2" in gates[-1].sentence()
    assert core_ml_gates(package, pixels, encoder(pixels), 15.0)[-1].passed
    core_ml.refuses = set(core_ml.noise)
    assert not core_ml_gates(package, pixels, encoder(pixels), None)[-1].passed
