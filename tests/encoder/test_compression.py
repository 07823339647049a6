"""Encoders in fewer bits: what is written, what it costs, and what is refused."""

import hashlib
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.cluster import KMeans

from fastvlm_mlx.bundle.bundle import Bundle
from fastvlm_mlx.errors import EncoderError, OptionError
from fastvlm_mlx.vision.package import describe, quiet_coremltools
from fastvlm_mlx.vision.program.mlprogram import MLProgramEncoder
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.encoder import compression as compress
from model_export.encoder import coreml, fastvithd
from model_export.encoder.compression import (
    Compression,
    Histogram,
    convolutions,
    rounded,
    stored_parameters,
)
from model_export.encoder.references import reference_features
from model_export.gates import verify
from model_export.gates.encoder import encoder_gates, mean_cosine, snr_db
from model_export.options import EncoderOptions, ExportOptions
from model_export.pipeline import export
from model_export.quantization.bits.encoder_sensitivity import calibration_pixels, sensitivities
from model_export.quantization.bits.mixed import mixed
from model_export.samples import images
from model_export.samples.calibration import load_calibration

METADATA = coreml.EncoderMetadata(source="test", license="MIT")


@pytest.fixture(scope="module")
def checkpoint(demo_checkpoint):
    return Checkpoint(demo_checkpoint)


@pytest.fixture
def module(checkpoint):
    return fastvithd.fold(checkpoint.encoder_state(), checkpoint.config.vision)


@pytest.fixture(scope="module")
def pixels(checkpoint):
    config = checkpoint.config
    calibration = load_calibration(None, config.vision)
    return calibration_pixels(calibration, config.vision, config.image_aspect_ratio)


@pytest.fixture(scope="module")
def references(checkpoint):
    seen = images.gate_samples(checkpoint.config.vision)[-2:]
    return reference_features(checkpoint.encoder_state(), checkpoint, seen)


def write(module, checkpoint, path, compression, target="iOS16"):
    return coreml.export_encoder(
        module,
        checkpoint.config.vision,
        path,
        coreml.Form("fp16", METADATA, compression, target),
    )


def bits_per_weight(module, compression):
    """Codes and palettes, over all weights."""
    bits = weights = 0
    for name, convolution in convolutions(module).items():
        count, palette = convolution.weight.numel(), compression.palettes.get(name)
        weights += count
        bits += 16 * count if palette is None else np.log2(len(palette)) * count + 16 * len(palette)
    return bits / weights


def digests(package):
    return {
        str(p.relative_to(package)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(package.rglob("*"))
        if p.is_file()
    }


class TestPalettes:
    @pytest.mark.parametrize("bits", [4, 6])
    def test_no_worse_than_k_means_by_scikit_learn(self, bits):
        generator = torch.Generator().manual_seed(3)
        weight = torch.randn(6000, generator=generator) ** 3
        values = weight.half().double().numpy()[:, None]
        peer = KMeans(2**bits, n_init=1, max_iter=300, random_state=0).fit(values)
        assert Histogram.of(weight).palette(bits)[1] <= 1.02 * peer.inertia_

    @settings(max_examples=60, deadline=None)
    @given(
        arrays.arrays(
            np.float16,
            st.integers(1, 300),
            elements=st.floats(-65504, 65504, width=16),
        ),
        st.sampled_from([4, 6, 8]),
    )
    def test_any_weight_gets_an_ascending_palette_and_its_true_error(self, values, bits):
        weight = torch.from_numpy(values.astype(np.float32))
        palette, error = Histogram.of(weight).palette(bits)
        assert palette.shape == (2**bits,)
        assert palette.dtype == np.float16
        assert (np.diff(palette.astype(np.float64)) >= 0).all()
        nearest = np.abs(values.astype(np.float64)[:, None] - palette.astype(np.float64)).min(1)
        assert error == pytest.approx(np.square(nearest).sum(), rel=1e-9, abs=1e-12)
        if len(np.unique(values)) <= 2**bits:
            assert error == 0

    def test_minus_zero_takes_no_level_of_its_own(self):
        values = torch.tensor([0.0, -0.0, *range(1, 16)])
        assert Histogram.of(values).palette(4)[1] == 0

    def test_what_counts_more_is_met_more_closely(self):
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(4000, generator=generator)
        importance = torch.where(weight > 1, 100.0, 1.0)

        def error_above_one(palette):
            above = weight[weight > 1]
            return float((rounded(above, torch.from_numpy(palette).float()) - above).square().sum())

        plain, _ = Histogram.of(weight).palette(4)
        weighted, _ = Histogram.of(weight, importance).palette(4)
        assert error_above_one(weighted) < error_above_one(plain) / 2

    def test_a_weight_beyond_fp16_is_one_sentence(self):
        with pytest.raises(EncoderError, match="beyond fp16"):
            Histogram.of(torch.tensor([1.0, 1e6]))


class TestWhatIsWritten:
    @pytest.mark.parametrize(
        ("precision", "target"),
        [
            ("int8", "iOS16"),
            ("palette6", "iOS16"),
            pytest.param("palette4", "iOS17", marks=pytest.mark.slow),
            pytest.param("palette6", "iOS18", marks=pytest.mark.slow),
        ],
    )
    def test_is_what_coremltools_decompresses(
        self, module, checkpoint, precision, target, tmp_path
    ):
        import coremltools as ct
        import coremltools.optimize.coreml as cto

        package, plain = tmp_path / "small.mlpackage", tmp_path / "large.mlpackage"
        compression = compress.uniform(module, precision)
        info = write(module, checkpoint, package, compression, target)
        assert info.precision == precision
        assert info.deployment_target.startswith(target)
        assert set(json.loads(info.metadata["weight_formats"]).values()) == {precision}
        assert precision in info.short_description
        with quiet_coremltools():
            small = ct.models.MLModel(str(package), skip_model_load=True)
            cto.decompress_weights(small).save(str(plain))
        ours = MLProgramEncoder(package).constants
        theirs = list(MLProgramEncoder(plain).constants.values())
        changed = 0
        for name, parameter, stored in stored_parameters(module, ours):
            assert any(
                t.shape == stored.shape and torch.equal(t.float(), stored) for t in theirs
            ), name
            source = parameter.detach()
            if torch.equal(stored, source.half().float()):
                continue
            changed += 1
            convolution = name.removesuffix(".weight")
            assert convolution in compression.formats
            if precision == "int8":
                step = source.flatten(1).abs().amax(1) / 127
                error = (stored - source).flatten(1).abs().amax(1)
                # Half a step, and what fp16 makes of scale and product: 127 steps of 2^-11 each.
                assert (error <= 0.63 * step).all(), name
            else:
                palette = torch.from_numpy(compression.palettes[convolution]).float()
                assert set(stored.unique().tolist()) <= set(palette.tolist())
                assert torch.equal(stored, rounded(source.half().float(), palette))
        assert changed == len(compression.formats)

    def test_depthwise_weights_stay_fp16(self, module):
        left = set(convolutions(module)) - set(compress.uniform(module, "palette6").formats)
        grouped = {n for n, c in convolutions(module).items() if c.groups > 1}
        assert left == grouped | {"patch_embed.0.reparam_conv"}

    @pytest.mark.slow
    def test_the_same_bytes_again_of_the_size_asked_for(self, checkpoint, pixels, tmp_path):
        for name in ("one", "two"):
            fresh = fastvithd.fold(checkpoint.encoder_state(), checkpoint.config.vision)
            chosen = mixed(fresh, pixels[:8], 5.5)
            write(fresh, checkpoint, tmp_path / f"{name}.mlpackage", chosen)
            assert 5.4 < bits_per_weight(fresh, chosen) <= 5.5
        assert digests(tmp_path / "one.mlpackage") == digests(tmp_path / "two.mlpackage")

    def test_formats_name_the_precision(self):
        four, six = np.zeros(16, np.float16), np.zeros(64, np.float16)
        assert Compression().precision == "fp16"
        assert Compression({"a": six}).precision == "palette6"
        assert Compression({"a": six, "b": four}).precision == "mixed"
        assert Compression({"a": six}, frozenset({"b"})).precision == "mixed"


class TestGates:
    @pytest.fixture(scope="class")
    def palette6(self, checkpoint, tmp_path_factory):
        fresh = fastvithd.fold(checkpoint.encoder_state(), checkpoint.config.vision)
        package = tmp_path_factory.mktemp("gates") / "fastvithd.mlpackage"
        write(fresh, checkpoint, package, compress.uniform(fresh, "palette6"))
        return package

    def test_a_compressed_encoder_passes(self, palette6, module, references):
        options = ExportOptions.of(encoder_precision="palette6")
        gates, _ = encoder_gates(palette6, lambda: module, references, options)
        assert [gate.name for gate in gates] == [
            "encoder SNR",
            "encoder cosine",
            "encoder weights SNR",
            "encoder conversion SNR",
            "encoder largest magnitude",
        ]
        assert all(gate.passed for gate in gates)
        assert gates[0].limit == 0
        assert 15 < gates[0].value < 35, "six bits are seen"

    @pytest.mark.parametrize("damage", ["one weight", "two channels"])
    def test_another_weight_is_seen(self, palette6, checkpoint, references, damage):
        state = checkpoint.encoder_state()
        if damage == "one weight":
            state["network.2.0.convffn.fc1.weight"].flatten()[7] += 2
        else:
            weight = state["network.2.0.token_mixer.reparam_conv.weight"]
            weight[[0, 1]] = weight[[1, 0]].clone()
        other = fastvithd.fold(state, checkpoint.config.vision)
        options = ExportOptions.of(encoder_precision="palette6")
        gates, _ = encoder_gates(palette6, lambda: other, references, options)
        assert "encoder weights SNR" in [gate.name for gate in gates if not gate.passed]

    @pytest.mark.parametrize("shape", [None, (3, 3), "two"])
    def test_another_encoder_s_package_is_named(self, palette6, module, shape):
        constants = dict(MLProgramEncoder(palette6).constants)
        (name,) = [n for n in constants if n.startswith("p_conv_exp_se_reduce_weight_to_fp16")]
        if shape is None:
            del constants[name]
        elif shape == "two":
            for suffix in compress._SUFFIXES:
                constants["p_conv_exp_se_reduce_weight_to_fp16" + suffix] = constants[name]
        else:
            constants[name] = torch.zeros(shape)
        with pytest.raises(EncoderError, match=r"has no weight of conv_exp\.se\.reduce: expected"):
            list(stored_parameters(module, constants))

    def test_cosine_is_of_each_token(self):
        a = np.array([[[1.0, 0.0], [0.0, 2.0]]])
        assert mean_cosine(a, 3 * a) == pytest.approx(1)
        assert mean_cosine(a, a[:, :, ::-1]) == pytest.approx(0)
        assert mean_cosine(a, np.zeros_like(a)) == 0


class TestMixed:
    @pytest.fixture(scope="class")
    def bundle(self, demo_checkpoint, tmp_path_factory):
        out = tmp_path_factory.mktemp("mixed") / "bundle"
        export(demo_checkpoint, out, ExportOptions.of(llm_bits=4, encoder_precision="mixed"))
        return out

    def test_six_decibels_above_uniform_and_no_larger(
        self, bundle, module, checkpoint, references, tmp_path
    ):
        uniform = tmp_path / "uniform.mlpackage"
        written = write(module, checkpoint, uniform, compress.uniform(module, "palette6"))
        assert describe(bundle / "fastvithd.mlpackage").bytes <= written.bytes

        def snr(package):
            encoder = MLProgramEncoder(package)
            made = [encoder.evaluate(r.pixels, round_fp16=True) for r in references]
            return min(snr_db(r.features, m) for r, m in zip(references, made, strict=True))

        assert snr(bundle / "fastvithd.mlpackage") >= snr(uniform) + 6

    def test_the_manifest_says_how_each_weight_is_stored(self, bundle, checkpoint):
        manifest = json.loads((bundle / "manifest.json").read_text())
        assert manifest["encoder"]["precision"] == "mixed"
        assert manifest["encoder"]["deployment_target"] == "iOS16/macOS13"
        assert manifest["options"]["encoder_bpw"] == 6
        assert manifest["options"]["deployment_target"] == "iOS16"
        formats = manifest["encoder"]["weight_formats"]
        info = describe(bundle / "fastvithd.mlpackage")
        assert json.loads(info.metadata["weight_formats"]) == formats
        assert len(set(formats.values())) > 1
        calibration = load_calibration(None, checkpoint.config.vision)
        record = {"sha256": calibration.digest, "skipped": []}
        assert manifest["encoder"]["calibration"] == record
        bits = {"palette4": 4, "palette6": 6, "palette8": 8}
        fresh = fastvithd.fold(checkpoint.encoder_state(), checkpoint.config.vision)
        sizes = {n: c.weight.numel() for n, c in convolutions(fresh).items()}
        stored = sum(s * bits.get(formats.get(n), 16) for n, s in sizes.items())
        assert 5.5 < stored / sum(sizes.values()) <= 6

    def test_verify_repeats_its_gates(self, bundle, demo_checkpoint):
        found, gates = verify.verify(bundle, demo_checkpoint, {}, lambda stage, done: None)
        recorded = {gate["name"]: gate["value"] for gate in found.manifest["gates"]}
        assert {gate.name for gate in gates} == set(recorded)
        assert all(gate.passed for gate in gates)
        for gate in gates:
            assert gate.value == pytest.approx(recorded[gate.name], rel=1e-3, abs=1e-6)

    def test_without_a_manifest_the_package_says_what_it_is(self, bundle, tmp_path):
        bare = replace(Bundle.open(bundle), manifest=None)
        assert verify.recorded_options(bare).encoder.precision == "mixed"

    def test_a_size_too_small_says_the_least(self, module, pixels):
        with pytest.raises(OptionError, match="the smallest choices take"):
            mixed(module, pixels[:2], 4.0)

    def test_predicted_noise_is_what_is_measured(self, module, pixels):
        """Each weight's palette noise by its importance, added up, is the noise of all together."""
        batch = pixels[:8]
        costs = sensitivities(module, batch)
        before = features(module, batch)
        predicted = 0.0
        for name, convolution in convolutions(module).items():
            palette, error = Histogram.of(convolution.weight, costs[name].importance).palette(6)
            predicted += error
            convolution.weight.data = rounded(
                convolution.weight.data, torch.from_numpy(palette).float()
            )
        measured = float((features(module, batch) - before).square().mean())
        assert abs(10 * np.log10(predicted / measured)) < 2


def features(module, pixels):
    with torch.inference_mode():
        return torch.cat([module(torch.from_numpy(p)) for p in pixels])


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"encoder_precision": "int3"}, "--encoder-precision is int3: expected one of fp16"),
            (
                {"encoder_precision": "int8", "deployment_target": "iOS15"},
                "does not load int8 weights: expected iOS16 or later",
            ),
            ({"deployment_target": "iOS14"}, "--deployment-target is iOS14: expected one of iOS15"),
            ({"encoder_bpw": 5.0}, "add --encoder-precision mixed"),
            ({"encoder_precision": "mixed", "encoder_bpw": 3.0}, "expected 4 bits or more"),
            (
                {"encoder_precision": "mixed", "encoder_bpw": float("nan")},
                "expected a finite number",
            ),
            (
                {"layout": "mlx", "encoder_precision": "mixed"},
                "has the type of --dtype: leave it out",
            ),
            ({"calibration": "images"}, "a --method, or --encoder-precision mixed"),
            ({"layout": "mlx", "deployment_target": "iOS18"}, "leave it out"),
        ],
    )
    def test_what_cannot_be(self, options, message):
        with pytest.raises(OptionError, match=message):
            ExportOptions.of(**options)

    def test_the_target_follows_from_the_precision(self):
        assert EncoderOptions().target == "iOS15"
        # Apple's own, which is fp32.
        assert EncoderOptions(precision="fp32").target == "iOS16"
        assert EncoderOptions(precision="fp32", deployment_target="iOS15").target == "iOS15"
        assert EncoderOptions(precision="palette4").target == "iOS16"
        assert EncoderOptions(deployment_target="iOS18").target == "iOS18"

    def test_the_command_refuses_in_one_sentence(self, demo_checkpoint, tmp_path):
        command = [sys.executable, "-m", "fastvlm_mlx", "export", demo_checkpoint, tmp_path / "out"]
        options = ["--encoder-precision", "palette6", "--deployment-target", "iOS15"]
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "expected iOS16 or later" in done.stderr
