"""The encoder through Core ML: what surrounds `predict` everywhere, `predict` itself on a Mac."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from core_ml import CoreML

from benchmarks.synthetic import encoder_state_dict
from fastvlm_mlx.bundle.config import VisionConfig
from fastvlm_mlx.errors import EncoderError
from fastvlm_mlx.vision import compiled, load_encoder, units
from fastvlm_mlx.vision.coreml import CoreMLEncoder, choose_units, measure_units
from fastvlm_mlx.vision.program.mlprogram import MLProgramEncoder
from model_export.encoder.coreml import EncoderMetadata, Form, export_encoder
from model_export.encoder.fastvithd import fold
from model_export.encoder.multifunction import export_sizes

CONFIG = VisionConfig(image_size=64, layers=(1, 1, 1, 1, 1), embed_dims=(16, 16, 32, 64, 64))
METADATA = EncoderMetadata("tiny-random", "research only")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("package") / "fastvithd.mlpackage"
    module = fold(encoder_state_dict(CONFIG), CONFIG)
    export_encoder(module, CONFIG, path, Form("fp16", METADATA))
    return path


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).random((1, 3, 64, 64), np.float32)


@pytest.fixture
def core_ml(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CoreML:
    return CoreML(monkeypatch, tmp_path)


def records(core_ml: CoreML) -> list[Path]:
    return sorted(core_ml.cache.glob("*/units-*.json"))


class TestUnits:
    def test_each_is_asked_for_by_name(self, package, images, core_ml):
        names = {"all": "ALL", "cpu": "CPU_ONLY", "gpu": "CPU_AND_GPU", "ne": "CPU_AND_NE"}
        for name in names:
            encoder = load_encoder(package, name)
            assert encoder.backend == f"Core ML ({name})"
            assert (encoder.image_size, encoder.num_tokens, encoder.hidden_size) == (64, 1, 128)
            assert encoder(images).shape == (1, 1, 128)
        assert [opened[1:] for opened in core_ml.opened] == [(n, None) for n in names.values()]
        assert len({path for path, *_ in core_ml.opened}) == len(core_ml.compiled) == 1
        assert records(core_ml) == []
        with pytest.raises(EncoderError, match=r"expected \[1, 3, 64, 64\]"):
            encoder(images[:, :, :32, :32])

    def test_the_fastest_that_holds_is_chosen_once(self, package, images, core_ml, capfd):
        """The Neural Engine is the fastest, 14 dB off the arithmetic's 35 as on somebody's M4."""
        core_ml.noise = {"ALL": 0.09, "CPU_AND_NE": 0.09, "CPU_AND_GPU": 0.001}
        core_ml.delay_s = {"CPU_ONLY": 0.2, "CPU_AND_GPU": 0.05}
        encoder = load_encoder(package)
        assert encoder.backend == "Core ML (gpu)"
        assert encoder(images).shape == (1, 1, 128)
        told = capfd.readouterr().err
        assert told.count("\n") == 2
        assert "preparing the encoder for Core ML" in told
        assert "measuring which compute units" in told
        [record] = records(core_ml)
        content = json.loads(record.read_text())
        assert content["chosen"] == "gpu"
        assert content["reference"] == "the package evaluated op by op"
        found = {each["units"]: each for each in content["measured"]}
        assert set(found) == {"all", "cpu", "gpu", "ne"}
        assert 19 < found["ne"]["snr_db"] < 23
        assert 58 < found["gpu"]["snr_db"] < 62
        assert found["cpu"]["seconds"] > 0.2 > found["ne"]["seconds"]
        core_ml.opened.clear()
        assert load_encoder(package).backend == "Core ML (gpu)"
        assert [units for _, units, _ in core_ml.opened] == ["CPU_AND_GPU"]
        assert capfd.readouterr().err == ""
        # Who says otherwise gets it.
        assert load_encoder(package, "ne").backend == "Core ML (ne)"

    def test_where_none_holds_the_nearest_is_used_and_told(self, package, core_ml, capfd):
        core_ml.noise = {"ALL": 0.3, "CPU_AND_NE": 0.3, "CPU_AND_GPU": 0.2, "CPU_ONLY": 0.05}
        assert load_encoder(package).backend == "Core ML (cpu)"
        assert "no compute units come within 35 dB" in capfd.readouterr().err

    def test_one_that_refuses_is_left_out(self, package, core_ml):
        core_ml.refuses = {"CPU_AND_NE", "ALL"}
        measured = {m.units: m for m in choose_units(package).measured}
        assert "unsupported on CPU_AND_NE" in measured["ne"].error
        assert not measured["ne"].holds(35)
        assert measured["cpu"].holds(35)
        core_ml.refuses = {"CPU_AND_NE", "ALL", "CPU_ONLY", "CPU_AND_GPU"}
        with pytest.raises(EncoderError, match="no compute units run the encoder") as caught:
            choose_units(package)
        assert "\n" not in str(caught.value)

    def test_a_virtual_mac_has_no_neural_engine(self, package, images, core_ml):
        core_ml.devices.remove("MLNeuralEngineComputeDevice")
        features = MLProgramEncoder(package)(images)
        measured = measure_units(package, [images], [features])
        assert [m.units for m in measured] == ["all", "cpu", "gpu"]

    def test_before_macos_14_all_are_tried(self, core_ml, monkeypatch):
        from coremltools.models.compute_device import MLComputeDevice

        def absent():
            raise AttributeError("get_all_compute_devices")

        monkeypatch.setattr(MLComputeDevice, "get_all_compute_devices", absent)
        assert units.available() == ("all", "cpu", "gpu", "ne")

    def test_without_torch_the_cpu_is_what_others_are_compared_with(
        self, package, core_ml, monkeypatch
    ):
        monkeypatch.setattr("fastvlm_mlx.vision.coreml.find_spec", lambda name: None)
        core_ml.noise = {"CPU_AND_NE": 0.1}
        choice = choose_units(package)
        assert choice.reference == "Core ML on the CPU"
        by_name = {m.units: m for m in choice.measured}
        assert by_name["cpu"].snr_db == float("inf")
        assert not by_name["ne"].holds(35)
        [record] = records(core_ml)
        assert "Infinity" not in record.read_text()

    @pytest.mark.parametrize("content", ["", "[]", '{"chosen": "tpu"}', '{"chosen": ["cpu"]}'])
    def test_a_damaged_record_is_measured_again(self, content, package, core_ml):
        load_encoder(package)
        [record] = records(core_ml)
        record.write_text(content)
        load_encoder(package)
        assert json.loads(record.read_text())["chosen"] in units.NAMES

    def test_the_best_of_what_was_measured(self):
        near = units.Measured("cpu", 50.0, 0.3)
        fast = units.Measured("ne", 36.0, 0.1)
        off = units.Measured("gpu", 20.0, 0.01)
        failed = units.Measured("all", error="refused")
        assert units.best([near, fast, off, failed], 35) is fast
        assert units.best([near, fast, off, failed], 60) is near
        assert units.snr_db(np.ones(3), np.array([1, np.nan, 1])) == -float("inf")

    def test_the_probe_has_structure_at_every_scale(self):
        image = units.probe(64)
        assert (image.shape, image.dtype) == ((1, 3, 64, 64), np.float32)
        assert (image.min(), image.max()) == (0, 1)
        np.testing.assert_array_equal(image, units.probe(64))
        for step in (1, 8, 32):
            assert np.abs(image[..., step:] - image[..., :-step]).mean() > 0.01


def test_core_ml_is_asked_for_a_function_and_given_an_image(core_ml, tmp_path):
    package = tmp_path / "images.mlpackage"
    module = fold(encoder_state_dict(CONFIG), CONFIG)
    sizes = [replace(CONFIG, image_size=128), CONFIG]
    form = Form("fp32", METADATA, target="iOS18", image_input=True)
    export_sizes(module, sizes, package, form)
    found = {}
    for size in (None, 128, 64):
        encoder = CoreMLEncoder(package, "all", size)
        pixels = np.random.default_rng(1).random((1, 3, size or 128, size or 128), np.float32)
        found[size] = encoder(pixels)
        np.testing.assert_array_equal(found[size], MLProgramEncoder(package, size)(pixels))
    assert [function for *_, function in core_ml.opened] == ["size_128", "size_128", "size_64"]
    assert len({path for path, *_ in core_ml.opened}) == 1
    np.testing.assert_array_equal(found[None], found[128])
    assert found[64].shape == (1, 1, 128)
    # Each size by itself.
    CoreMLEncoder(package, image_size=64)
    assert [record.name for record in records(core_ml)] == ["units-size_64.json"]


def test_pixels_that_can_t_be_written_to(package, images, core_ml, recwarn):
    locked = images.copy()
    locked.flags.writeable = False
    np.testing.assert_array_equal(
        CoreMLEncoder(package, "cpu")(locked), MLProgramEncoder(package)(locked)
    )
    assert not [w for w in recwarn if "writable" in str(w.message)]


class TestCache:
    def test_it_is_by_content_system_and_chip(self, package, core_ml, tmp_path, monkeypatch):
        key = compiled.cache_key(package)
        copy = Path(shutil.copytree(package, tmp_path / "other.mlpackage"))
        (copy / "._Manifest.json").write_bytes(b"left by a USB stick")
        assert compiled.cache_key(copy) == key
        (copy / "Data" / "more").write_bytes(b"")
        assert compiled.cache_key(copy) != key
        monkeypatch.setattr(compiled, "chip", lambda: "Apple M4")
        assert compiled.cache_key(package) != key

    def test_the_last_few_are_kept(self, package, core_ml, monkeypatch):
        for number in range(6):
            monkeypatch.setattr(compiled, "cache_key", lambda package, n=number: f"key{n}")
            CoreMLEncoder(package, "cpu")
            os.utime(core_ml.cache / f"key{number}", (number, number))
        names = sorted(path.name for path in core_ml.cache.iterdir())
        assert names == ["key2", "key3", "key4", "key5"]

    @pytest.mark.parametrize("layout", ["snapshot", "left behind"])
    def test_what_the_compiler_can_t_read_is_copied_first(
        self, layout, package, images, core_ml, tmp_path
    ):
        """Links as in the hub's cache; files as a system leaves them."""
        if layout == "snapshot":
            hub = tmp_path / "models--owner--name"
            shutil.copytree(package, hub / "blobs")
            given = hub / "snapshots" / "0123" / package.name
            for file in [p for p in package.rglob("*") if p.is_file()]:
                link = given / file.relative_to(package)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(hub / "blobs" / file.relative_to(package))
        else:
            given = Path(shutil.copytree(package, tmp_path / package.name))
            (given / "Data" / ".DS_Store").write_bytes(b"1")
        assert CoreMLEncoder(given, "cpu")(images).shape == (1, 1, 128)
        assert core_ml.compiled[0] != given
        names = {p.name for p in core_ml.cache.rglob("*") if p.is_file()}
        assert names == {p.name for p in package.rglob("*") if p.is_file()}
        CoreMLEncoder(package, "cpu")
        assert len(core_ml.compiled) == 1

    def test_it_is_not_needed(self, package, images, core_ml, capfd):
        """A file stands where the cache would be, which even root can't write into."""
        core_ml.cache.write_text("in the way")
        compiled._tell_once.cache_clear()
        for _ in range(2):
            encoder = load_encoder(package)
            assert encoder(images).shape == (1, 1, 128)
            # To measure in every process would take longer than to answer.
            assert encoder.backend == "Core ML (all)"
        assert len(core_ml.compiled) == 1
        told = capfd.readouterr().err
        assert told.count("can't be written to") == 1
        assert not encoder.compiled.path.is_relative_to(core_ml.cache)

    def test_what_is_temporary_is_removed_at_the_end(self):
        code = "from fastvlm_mlx.vision import compiled; print(compiled._scratch())"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert not Path(done.stdout.strip()).exists()

    def test_no_room_anywhere_is_one_sentence(self, package, core_ml, monkeypatch):
        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("tempfile.TemporaryDirectory", full)
        monkeypatch.setattr(compiled, "_scratch", lambda: core_ml.cache.parent / "scratch")
        with pytest.raises(EncoderError, match=r"can't be compiled \(No space left on device\)"):
            CoreMLEncoder(package, "cpu")

    def test_a_damaged_one_costs_one_more_compilation(self, package, images, core_ml):
        first = CoreMLEncoder(package, "cpu")
        assert first.compiled.compile_s > 0
        shutil.rmtree(first.compiled.path / "copy.mlpackage")
        again = CoreMLEncoder(package, "cpu")
        assert again(images).shape == (1, 1, 128)
        assert len(core_ml.compiled) == 2
        assert CoreMLEncoder(package, "cpu").compiled.compile_s == 0

    def test_a_refusal_is_one_sentence(self, package, core_ml):
        core_ml.refuses = {"CPU_ONLY"}
        for compilations in (1, 2):
            with pytest.raises(EncoderError, match=r"Core ML refuses .* unsupported") as caught:
                CoreMLEncoder(package, "cpu")
            assert "\n" not in str(caught.value)
            assert len(core_ml.compiled) == compilations


@pytest.mark.macos
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_core_ml_computes_the_same(precision, images, monkeypatch, tmp_path):
    """On one of the compute units at least: which of them do, `fastvlm doctor` tells."""
    monkeypatch.setattr(compiled, "CACHE", tmp_path / "cache")
    package = tmp_path / "fastvithd.mlpackage"
    export_encoder(
        fold(encoder_state_dict(CONFIG), CONFIG), CONFIG, package, Form(precision, METADATA)
    )
    features = MLProgramEncoder(package)(images)
    measured = measure_units(package, [images], [features])
    assert {"all", "cpu"} <= {each.units for each in measured}
    assert any(each.holds(units.floor_db(precision)) for each in measured), measured
    encoder = load_encoder(package)
    assert units.snr_db(features, encoder(images)) >= units.floor_db(precision)
