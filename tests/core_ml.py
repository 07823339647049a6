"""What stands where Core ML would: a compiler that notes whose model it compiled, and a compiled
model that evaluates that package, with as much noise as the compute units are given."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvlm_mlx.vision import compiled
from fastvlm_mlx.vision.package import describe
from fastvlm_mlx.vision.program.mlprogram import MLProgramEncoder

__all__ = ["CoreML", "Device"]


class Device:
    """Only the class's name says what a device is."""


class CoreML:
    """Core ML on a Mac with all three devices.

    Attributes:
        noise: by the compute units' name in coremltools, of each value relative to their RMS.
        refuses: compute units that a model can't be loaded on.
        delay_s: how much longer a prediction takes there.
        opened: compiled model, compute units, function of every model loaded.
        compiled: the package of every compilation; whether anything in it was a link.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, directory: Path):
        import coremltools as ct
        from coremltools.models.compute_device import MLComputeDevice

        self.noise: dict[str, float] = {}
        self.refuses: set[str] = set()
        self.delay_s: dict[str, float] = {}
        self.opened: list[tuple[str, str, str | None]] = []
        self.compiled: list[Path] = []
        self.devices = ["MLCPUComputeDevice", "MLGPUComputeDevice", "MLNeuralEngineComputeDevice"]
        self.cache = directory / "cache"
        monkeypatch.setattr("sys.platform", "darwin")
        monkeypatch.setattr(compiled, "CACHE", self.cache)
        monkeypatch.setattr(compiled, "chip", lambda: "Apple M1 Max")
        monkeypatch.setattr(ct.utils, "compile_model", self._compile)
        monkeypatch.setattr(ct.models, "CompiledMLModel", self._open)
        monkeypatch.setattr(MLComputeDevice, "get_all_compute_devices", self._devices)

    def _devices(self) -> list[Any]:
        return [type(name, (Device,), {})() for name in self.devices]

    def _compile(self, model: str, destination_path: str) -> str:
        if any(path.is_symlink() for path in Path(model).rglob("*")):
            raise RuntimeError("Error compiling model: links")
        self.compiled.append(Path(model))
        Path(destination_path).mkdir()
        shutil.copytree(model, Path(destination_path) / "copy.mlpackage")
        return destination_path

    def _open(self, path: str, compute_units: Any, function_name: str | None) -> _Model:
        self.opened.append((path, compute_units.name, function_name))
        if compute_units.name in self.refuses:
            raise RuntimeError(f"Error loading model:\n  unsupported on {compute_units.name}")
        package = Path(path) / "copy.mlpackage"
        if not package.is_dir():
            raise RuntimeError("Error loading model: damaged")
        return _Model(self, package, compute_units.name, function_name)


class _Model:
    def __init__(self, core_ml: CoreML, package: Path, units: str, function: str | None):
        self._core_ml, self._units = core_ml, units
        self._encoder = MLProgramEncoder(package, describe(package).functions[function or "main"])

    def predict(self, data: dict[str, Any]) -> dict[str, np.ndarray]:
        [(name, images)] = data.items()
        assert name == "images"
        if self._encoder.info.inputs[0].dtype == "image":
            assert (images.mode, images.size) == ("RGB", (self._encoder.image_size,) * 2)
            images = np.asarray(images, np.float32).transpose(2, 0, 1)[None] / 255
        assert images.flags.writeable
        features = self._encoder(images)
        time.sleep(self._core_ml.delay_s.get(self._units, 0))
        spread = self._core_ml.noise.get(self._units, 0) * np.sqrt(np.square(features).mean())
        noise = np.random.default_rng(0).standard_normal(features.shape)
        return {"image_features": (features + spread * noise).astype(np.float32)}
