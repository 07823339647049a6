"""Several input sizes in one encoder, and encoders that take images."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import fastvlm_mlx
from benchmarks.synthetic import encoder_state_dict
from fastvlm_mlx.bundle.bundle import Bundle
from fastvlm_mlx.bundle.config import VisionConfig
from fastvlm_mlx.errors import BundleError, ConfigError, DestinationError, EncoderError, OptionError
from fastvlm_mlx.image.preprocess import ImageProcessor
from fastvlm_mlx.inspection import inspect_bundle
from fastvlm_mlx.vision.interface import to_bytes
from fastvlm_mlx.vision.package import (
    PackageInfo,
    app_misfit,
    describe,
    model_path,
    operations,
    read_spec,
)
from fastvlm_mlx.vision.program.mlprogram import MLProgramEncoder
from model_export.encoder import reference
from model_export.encoder.compression import Compression, uniform
from model_export.encoder.coreml import EncoderMetadata, Form
from model_export.encoder.fastvithd import fold
from model_export.encoder.multifunction import export_sizes
from model_export.gates import verify
from model_export.gates.encoder import snr_db
from model_export.layouts import app, install
from model_export.options import EncoderOptions, ExportOptions, parse_sizes
from model_export.pipeline import export
from model_export.samples import scenes

SMALL = VisionConfig(image_size=192, layers=(1, 1, 1, 1, 1), embed_dims=(32, 32, 64, 64, 64))
SIZES = (192, 128)
QUESTIONS = ("Describe the image.", "What number is written?")


@pytest.fixture(scope="module")
def bundle(sizes_bundle: Path) -> Path:
    return sizes_bundle


def written(
    path: Path, weights: str = "fp16", sizes: tuple[int, ...] = SIZES, **options: Any
) -> PackageInfo:
    """The small encoder at both of its sizes."""
    module = fold(encoder_state_dict(SMALL), SMALL)
    options = {"target": "iOS18", **options}
    compression = Compression() if weights == "fp16" else uniform(module, weights)
    return export_sizes(
        module,
        [replace(SMALL, image_size=size) for size in sizes],
        path,
        Form("fp16", EncoderMetadata("random", "none"), compression, **options),
    )


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("package") / "both.mlpackage"
    written(path)
    return path


@pytest.fixture(scope="module")
def images_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, for images."""
    path = tmp_path_factory.mktemp("images") / "both.mlpackage"
    written(path, image_input=True)
    return path


def pixels(size: int) -> np.ndarray:
    """On the grid of 8 bits."""
    levels = np.random.default_rng(size).integers(0, 256, (1, 3, size, size))
    return (levels / 255).astype(np.float32)


def expected(size: int) -> np.ndarray:
    """The published module, unfolded, at any size."""
    module = reference.FastViTHD(SMALL).eval()
    module.load_state_dict(encoder_state_dict(SMALL))
    with torch.inference_mode():
        return module(torch.from_numpy(pixels(size))).numpy()


def weights_file(package: Path) -> Path:
    return model_path(package).parent / "weights" / "weight.bin"


def digests(package: Path) -> dict[str, str]:
    return {
        path.relative_to(package).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(package.rglob("*"))
        if path.is_file()
    }


class TestThePackage:
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("round_fp16", [False, True])
    def test_every_function_is_the_source_at_its_size(
        self, package: Path, size: int, round_fp16: bool
    ) -> None:
        encoder = MLProgramEncoder(package, size)
        assert (encoder.image_size, encoder.num_tokens) == (size, (size // 64) ** 2)
        found = encoder.evaluate(pixels(size), round_fp16=round_fp16)
        assert snr_db(expected(size), found) > (45 if round_fp16 else 60)

    def test_what_it_declares(self, package: Path) -> None:
        info = describe(package)
        assert info.function == "size_192"
        assert info.functions == {"size_192": 192, "size_128": 128}
        assert (info.inputs[0].shape, info.outputs[0].shape) == ((1, 3, 192, 192), (1, 9, 128))
        assert info.deployment_target == "iOS18/macOS15"
        assert "at 192×192" in info.short_description
        assert info.short_description.endswith("other functions with the same weights: 128×128")
        assert info.metadata["image_sizes"] == "192,128"
        assert info.metadata["source"] == "random"
        other = describe(package, 128)
        assert other.function == "size_128"
        assert (other.inputs[0].shape, other.outputs[0].shape) == ((1, 3, 128, 128), (1, 4, 128))
        assert "4 tokens" in other.outputs[0].description
        assert other.ops == info.ops
        assert describe(package, 192) == info

    @pytest.mark.parametrize(
        "weights",
        ["fp16", *(pytest.param(w, marks=pytest.mark.slow) for w in ("int8", "palette6"))],
    )
    def test_the_weights_are_stored_once(self, weights: str, package: Path, tmp_path: Path) -> None:
        one, both = tmp_path / "one.mlpackage", tmp_path / "both.mlpackage"
        written(one, weights, sizes=(128,))
        if weights == "fp16":
            both = package
        else:
            written(both, weights)
        assert describe(both).precision == describe(both, 128).precision == weights
        assert digests(one).keys() == digests(both).keys()
        assert weights_file(one).read_bytes() == weights_file(both).read_bytes()
        small, large = MLProgramEncoder(one)(pixels(128)), MLProgramEncoder(both, 128)(pixels(128))
        np.testing.assert_array_equal(small, large)

    def test_the_same_bytes_again_and_nothing_beside_them(
        self, package: Path, tmp_path: Path
    ) -> None:
        written(tmp_path / "again.mlpackage")
        assert digests(tmp_path / "again.mlpackage") == digests(package)
        assert [p.name for p in tmp_path.iterdir()] == ["again.mlpackage"]

    def test_only_the_function_that_is_used_is_held(self, bundle: Path, demo_bundle: Path) -> None:
        def peak(package: Path) -> int:
            tracemalloc.start()
            MLProgramEncoder(package, 256)
            found = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            return found

        alone = peak(demo_bundle / "fastvithd.mlpackage")
        assert peak(bundle / "fastvithd.mlpackage") < 1.1 * alone

    def test_a_size_that_it_does_not_take(self, package: Path) -> None:
        with pytest.raises(OptionError, match=r"image size 64 .* takes 128 or 192: choose"):
            MLProgramEncoder(package, 64)

    def test_a_default_function_that_is_not_there(self, package: Path, tmp_path: Path) -> None:
        damaged = Path(shutil.copytree(package, tmp_path / "damaged.mlpackage"))
        spec = read_spec(damaged)
        spec.description.defaultFunctionName = "size_64"
        model_path(damaged).write_bytes(spec.SerializeToString())
        with pytest.raises(EncoderError, match="has no function 'size_64'"):
            describe(damaged)

    def test_a_full_disk_leaves_nothing(self, tmp_path: Path) -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        try:
            with pytest.raises(DestinationError, match="expected room for it"):
                written(tmp_path / "both.mlpackage")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert list(tmp_path.iterdir()) == []


class TestTheBundle:
    def test_it_costs_one_set_of_weights(self, bundle: Path, demo_bundle: Path) -> None:
        alone = describe(demo_bundle / "fastvithd.mlpackage").bytes
        assert describe(bundle / "fastvithd.mlpackage").bytes < 1.05 * alone

    def test_every_size_is_gated_and_told(self, bundle: Path) -> None:
        manifest = json.loads((bundle / "manifest.json").read_text())
        values = {gate["name"]: gate["value"] for gate in manifest["gates"]}
        for name in ("encoder SNR", "encoder conversion SNR", "encoder largest magnitude"):
            assert values[name] != values[f"{name} at 128"]
        assert not any("at 256" in name for name in values)
        assert manifest["options"]["image_sizes"] == [128, 256]
        assert manifest["options"]["deployment_target"] == "iOS18"
        assert manifest["encoder"]["image_sizes"] == [128, 256]
        facts = inspect_bundle(bundle)
        assert facts["encoder"]["image_sizes"] == [128, 256]
        assert facts["encoder"]["image_size"] == 256
        assert facts["encoder"]["tokens_per_image"] == 16
        config = json.loads((bundle / "config.json").read_text())
        assert config["vision_config"]["image_size"] == 256

    def test_both_sizes_answer_as_mlx_does(
        self, bundle: Path, demo_checkpoint: Path, tmp_path: Path
    ) -> None:
        """Another encoder, which takes any size, and the same language model."""
        out = tmp_path / "mlx"
        options = ExportOptions.of(llm_bits=4, layout="mlx", image_sizes=(128, 256))
        made = export(demo_checkpoint, out, options)
        assert "encoder SNR at 128" in [gate.name for gate in made.gates]
        assert inspect_bundle(out)["encoder"]["image_sizes"] == [128, 256]
        names = [g.name for g in verify.verify(out, None, {}, lambda stage, done: None)[1]]
        assert names == ["encoder largest magnitude", "encoder largest magnitude at 128"]
        scene = scenes.generate(3, held_out=True).draw(256)
        texts = {}
        for size, tokens in ((128, 4), (256, 16)):
            model = fastvlm_mlx.load(bundle, image_size=size)
            peer = fastvlm_mlx.load(out, image_size=size)
            assert model.num_tokens == peer.num_tokens == model.config.vision.num_tokens == tokens
            assert model.image_processor.size == peer.image_processor.size == size
            answers = [model.generate(scene, question) for question in QUESTIONS]
            assert [answer.image_tokens for answer in answers] == [tokens] * 2
            texts[size] = [answer.text for answer in answers]
            assert texts[size] == [peer.generate(scene, q).text for q in QUESTIONS]
        assert texts[128] != texts[256]
        model = fastvlm_mlx.load(bundle)
        assert [model.generate(scene, question).text for question in QUESTIONS] == texts[256]
        assert fastvlm_mlx.load(out, image_size=192).num_tokens == 9
        with pytest.raises(ConfigError, match="100 is not a positive multiple of 64"):
            fastvlm_mlx.load(out, image_size=100)

    def test_a_size_that_it_does_not_take(self, bundle: Path, demo_bundle: Path) -> None:
        with pytest.raises(OptionError, match=r"image size 512 .* takes 128 or 256"):
            fastvlm_mlx.load(bundle, image_size=512)
        with pytest.raises(OptionError, match=r"takes 256: choose .* --image-sizes"):
            fastvlm_mlx.load(demo_bundle, image_size=128)

    def test_the_command_takes_a_size(
        self,
        bundle: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        from fastvlm_mlx.cli import main

        scenes.generate(3, held_out=True).draw(256).save(tmp_path / "scene.png")
        asked = ["--image", str(tmp_path / "scene.png"), "--prompt", "What is it?", "--json"]
        arguments = ["fastvlm", "generate", str(bundle), *asked, "--image-size", "128"]
        monkeypatch.setattr("sys.argv", arguments)
        with pytest.raises(SystemExit) as leaving:
            main.main()
        assert not leaving.value.code
        assert json.loads(capsys.readouterr().out)["answers"][0]["image_tokens"] == 4

    def test_verify_sees_damage_at_one_size(
        self, bundle: Path, demo_checkpoint: Path, tmp_path: Path
    ) -> None:
        damaged = Path(shutil.copytree(bundle, tmp_path / "damaged"))
        package = damaged / "fastvithd.mlpackage"
        spec = read_spec(package)
        for op in operations(spec, "size_128"):
            if op.type == "const":
                strings = op.attributes["val"].immediateValue.tensor.strings
                if list(strings.values) == ["EXACT"]:
                    strings.values[:] = ["TANH_APPROXIMATION"]
        model_path(package).write_bytes(spec.SerializeToString())
        manifest = json.loads((damaged / "manifest.json").read_text())
        file = model_path(package)
        manifest["files"][file.relative_to(damaged).as_posix()] = {
            "bytes": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        (damaged / "manifest.json").write_text(json.dumps(manifest))
        _, gates = verify.verify(damaged, demo_checkpoint, {}, lambda stage, done: None)
        assert [g.name for g in gates if not g.passed] == ["encoder conversion SNR at 128"]
        recorded = {gate["name"] for gate in manifest["gates"]}
        assert {gate.name for gate in gates} == recorded

    @pytest.mark.slow
    def test_a_mixed_encoder_is_rounded_once(self, demo_checkpoint: Path, tmp_path: Path) -> None:
        options = ExportOptions.of(llm_bits=4, encoder_precision="mixed", image_sizes=(128, 256))
        made = export(demo_checkpoint, tmp_path / "mixed", options)
        values = {gate.name: gate.value for gate in made.gates}
        assert values["encoder weights SNR"] == values["encoder weights SNR at 128"]
        assert made.manifest["encoder"]["precision"] == "mixed"


class TestImages:
    @pytest.mark.parametrize("size", SIZES)
    def test_an_image_gives_what_its_pixels_do(
        self, package: Path, images_package: Path, size: int
    ) -> None:
        arrays, images = (MLProgramEncoder(p, size) for p in (package, images_package))
        assert images.info.inputs[0].dtype == "image"
        assert images.info.inputs[0].shape == (1, 3, size, size)
        assert "8 bits" in images.info.inputs[0].description
        assert "images in" in images.info.short_description
        assert images.info.outputs[0].dtype == "float32"
        found = images(pixels(size))
        assert snr_db(arrays(pixels(size)), found) > 100
        between = pixels(size) + np.float32(0.4 / 255)
        np.testing.assert_array_equal(images(between), found)
        assert snr_db(arrays(between), found) < 100

    @settings(max_examples=30, deadline=None)
    @given(
        st.integers(1, 90),
        st.integers(1, 90),
        st.sampled_from(["pad", "square"]),
        st.integers(0, 2**16),
    )
    def test_what_the_processor_makes_is_8_bit(
        self, width: int, height: int, aspect_ratio: str, seed: int
    ) -> None:
        levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
        made = ImageProcessor(64, aspect_ratio)(Image.fromarray(levels))
        np.testing.assert_array_equal((to_bytes(made) / 255).astype(np.float32), made)

    def test_the_bundle_answers_and_the_app_is_told(
        self, demo_checkpoint: Path, demo_bundle: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "images"
        made = export(demo_checkpoint, out, ExportOptions.of(llm_bits=4, image_input=True))
        assert made.manifest["options"]["image_input"]
        assert made.manifest["fits_unmodified_app"] is False
        assert inspect_bundle(out)["encoder"]["image_input"]
        app.check_app(Bundle.open(out), describe(out / "fastvithd.mlpackage"))
        scene = scenes.generate(3, held_out=True).draw(300)
        for question in QUESTIONS:
            found = fastvlm_mlx.load(out).generate(scene, question).text
            assert found == fastvlm_mlx.load(demo_bundle).generate(scene, question).text

    def test_why_the_unmodified_app_does_not_take_it(self, images_package: Path) -> None:
        info = describe(images_package)
        assert app_misfit(info) == (
            "it makes 9 tokens of 128 channels and the app asserts 256 of 3072"
        )
        released = replace(info, outputs=(replace(info.outputs[0], shape=(1, 256, 3072)),))
        assert "it takes images (--image-input)" in str(app_misfit(released))
        array = replace(released, inputs=(replace(info.inputs[0], dtype="float32"),))
        assert app_misfit(array) is None

    def test_install_refuses_images(
        self, demo_checkpoint: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reason = "it takes images (--image-input) and the app hands over an MLMultiArray"
        monkeypatch.setattr(install, "app_misfit", lambda info: reason)
        with pytest.raises(BundleError, match=r"it takes images .* without --image-input"):
            install.plan(bundle, tmp_path)


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"image_size": 512, "image_sizes": (512,)}, "are both given: expected one of them"),
            ({"image_sizes": (512, 100)}, "--image-sizes is 100: expected 64 pixels or a "),
            ({"image_sizes": (512, 0)}, "--image-sizes is 0"),
            ({"image_sizes": [512, "1024"]}, "--image-sizes is 1024: expected 64 pixels"),
            ({"image_sizes": 512}, r"--image-sizes is 512: expected a list of pixels"),
            ({"image_sizes": (512, 512)}, "512,512: expected each size once"),
            ({"image_sizes": (64, 128), "deployment_target": "iOS17"}, "expected iOS18, or"),
            ({"image_input": True, "layout": "mlx"}, "an mlx bundle has none"),
        ],
    )
    def test_what_cannot_be(self, options: dict[str, Any], words: str) -> None:
        with pytest.raises(OptionError, match=words):
            ExportOptions.of(**options)

    def test_which_is_the_default(self) -> None:
        several = EncoderOptions(image_sizes=(2048, 512, 1024))
        assert (several.default_size, several.other_sizes) == (1024, (512, 2048))
        assert several.target == "iOS18"
        smaller = EncoderOptions(image_sizes=(128, 512, 256))
        assert (smaller.default_size, smaller.other_sizes) == (512, (128, 256))
        one = EncoderOptions(image_sizes=(512,))
        assert (one.default_size, one.other_sizes, one.target) == (512, (), "iOS15")
        assert EncoderOptions(image_size=512).default_size == 512
        assert EncoderOptions().default_size is None

    def test_sizes_as_text(self) -> None:
        assert parse_sizes("512,1024") == (512, 1024)
        assert parse_sizes("512, 1024") == (512, 1024)
        for text in ("", "512,", "512;1024", "large"):
            with pytest.raises(OptionError, match="expected pixels with commas between"):
                parse_sizes(text)
