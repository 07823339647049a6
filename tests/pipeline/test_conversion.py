"""`fastvlm convert`: an `mlx` bundle becomes the `app` bundle that its checkpoint would have."""

import json
import shutil
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from edits import edit_json, edit_weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastvlm_mlx
from fastvlm_mlx.bundle.bundle import Bundle, model_name
from fastvlm_mlx.cli import main
from fastvlm_mlx.errors import (
    BundleError,
    DestinationError,
    GateError,
    OptionError,
)
from fastvlm_mlx.inspection import inspect_bundle
from fastvlm_mlx.vision.package import describe
from model_export import build, space
from model_export.bundle_source import as_checkpoint, bundle_tensors
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.conversion import changed_tensors, convert, formats_for_app
from model_export.gates import verify
from model_export.gates.gate import Gate
from model_export.language import llm
from model_export.language.weights import BundleWeights
from model_export.layouts import app
from model_export.options import BITS, GROUP_SIZES, ExportOptions
from model_export.pipeline import export
from model_export.samples import images, scenes

QUESTION = "Describe the image."
TOWER = "vision_tower.vision_model."
DOWN = "language_model.model.layers.0.mlp.down_proj"
EMBEDDING = "language_model.model.embed_tokens.weight"


@pytest.fixture(scope="module")
def converted(mlx_bundle, tmp_path_factory):
    """The demo's `mlx` bundle as an `app` bundle, its gates passed. Not to be written to."""
    out = tmp_path_factory.mktemp("convert") / "bundle"
    convert(mlx_bundle, out, "app")
    return out


@pytest.fixture
def copy(mlx_bundle, tmp_path):
    """A bundle of layout `mlx` without manifest, to be changed into what others write."""
    path = Path(shutil.copytree(mlx_bundle, tmp_path / "source"))
    (path / "manifest.json").unlink()
    return path


@pytest.fixture
def few_samples(monkeypatch):
    """The gates look at one image, not at nine."""
    every = images.gate_samples
    monkeypatch.setattr(images, "gate_samples", lambda vision: every(vision)[:1])


@pytest.fixture
def no_gates(monkeypatch):
    monkeypatch.setattr(build, "gates_of_sizes", lambda *arguments: ([], []))
    monkeypatch.setattr(build, "answer_gates", lambda *arguments, **options: [])


@pytest.fixture
def quick(monkeypatch, converted, no_gates):
    """Conversions whose encoder is copied and whose gates are skipped: for what surrounds them."""

    def export_package(spec, package, progress):
        shutil.copytree(converted / package.name, package)
        return describe(package)

    monkeypatch.setattr(build, "export_package", export_package)
    monkeypatch.setattr(build, "source_features", lambda spec, progress: {256: []})


@pytest.fixture(scope="module")
def scene():
    return scenes.generate(3, held_out=True).draw(256)


def silent(stage, done):
    pass


def quantize(arrays, module, bits=4, group_size=64):
    packed = mx.quantize(arrays[f"{module}.weight"], group_size=group_size, bits=bits)
    names = [f"{module}.{part}" for part in ("weight", "scales", "biases")]
    arrays |= dict(zip(names, packed, strict=True))


def requantize(arrays, module, bits, group_size):
    parts = [arrays[f"{module}.{part}"] for part in ("weight", "scales", "biases")]
    arrays[f"{module}.weight"] = mx.dequantize(*parts, group_size=64, bits=4)
    quantize(arrays, module, bits, group_size)


def stored(path):
    """Every tensor of the projector and the language model by its model's name, as bytes."""
    return {
        model_name(name): (str(array.dtype), array.shape, np.asarray(array).tobytes())
        for name, array in mx.load(str(path / "model.safetensors")).items()
        if not name.startswith(TOWER)
    }


def test_all_but_the_manifest_is_as_the_checkpoint_s_own_export(converted, demo_bundle):
    files = {p.relative_to(demo_bundle) for p in demo_bundle.rglob("*") if p.is_file()}
    assert files == {p.relative_to(converted) for p in converted.rglob("*") if p.is_file()}
    for file in files - {Path("manifest.json")}:
        found, expected = (converted / file).read_bytes(), (demo_bundle / file).read_bytes()
        if file.name == "weight.bin":
            # Folded from weights that were float16 before: a few round to a neighbour.
            assert len(found) == len(expected)
            assert sum(a != b for a, b in zip(found, expected, strict=True)) < 100
        else:
            assert found == expected, file


def test_it_gives_the_same_text(converted, mlx_bundle, scene):
    models = [fastvlm_mlx.load(path) for path in (converted, mlx_bundle)]
    assert [model.encoder.backend for model in models][1] == "MLX"
    answers = [model.generate(scene, QUESTION, max_tokens=24).text for model in models]
    assert answers[0] == answers[1]
    assert len(answers[0]) > 20


def test_the_manifest_keeps_the_source_and_tells_the_conversion(converted, mlx_bundle):
    manifest, before = (
        json.loads((path / "manifest.json").read_text()) for path in (converted, mlx_bundle)
    )
    assert manifest["layout"] == manifest["options"]["layout"] == "app"
    assert manifest["source"] == before["source"]
    origin = manifest["converted_from"]
    assert (origin["layout"], origin["directory"]) == ("mlx", mlx_bundle.name)
    assert (origin["files"], origin["gates"]) == (before["files"], before["gates"])
    assert manifest["options"] == before["options"] | {
        "layout": "app",
        "deployment_target": "iOS15",
    }
    left = {model_name(name): why for name, why in before["llm"]["left_unquantized"].items()}
    assert manifest["llm"] == before["llm"] | {"left_unquantized": left}
    assert len(left) == 2
    assert [gate["name"] for gate in manifest["gates"]] == [
        "encoder SNR",
        "encoder conversion SNR",
        "encoder largest magnitude",
        "KL divergence",
        "greedy agreement",
        "LLM largest magnitude",
        "settings changed",
        "LLM tensors changed",
    ]
    limits = {gate["name"]: gate["limit"] for gate in manifest["gates"]}
    assert limits["KL divergence"] < 1e-4, "judged as what changes nothing but the encoder"
    assert manifest["gates_passed"]
    about = describe(converted / "fastvithd.mlpackage")
    assert about.license == before["source"]["license"]
    facts = inspect_bundle(converted)
    assert facts["source"] == "fastvlm-demo"
    assert facts["converted_from"] == {"directory": mlx_bundle.name, "layout": "mlx"}


def test_verify_with_and_without_the_checkpoint(converted, demo_checkpoint, demo_bundle):
    _, gates = verify.verify(converted, None, {}, silent)
    assert [gate.name for gate in gates] == ["encoder largest magnitude"]
    _, gates = verify.verify(converted, demo_checkpoint, {}, silent)
    assert all(gate.passed for gate in gates)
    direct = json.loads((demo_bundle / "manifest.json").read_text())["gates"]
    assert [gate.name for gate in gates] == [gate["name"] for gate in direct]
    for gate, expected in zip(gates, direct, strict=True):
        assert gate.limit == expected["limit"]
        assert gate.value == pytest.approx(expected["value"], rel=0.02)


def test_the_bundle_as_a_checkpoint_is_its_own(mlx_bundle, demo_checkpoint):
    bundle, expected = Bundle.open(mlx_bundle), Checkpoint(demo_checkpoint)
    found = as_checkpoint(bundle, bundle_tensors(bundle))
    assert found.config.vision == expected.config.vision
    assert (found.name, found.license, found.tied) == (
        expected.name,
        expected.license,
        expected.tied,
    )
    state = expected.encoder_state()
    for name, tensor in found.encoder_state().items():
        if not name.endswith("num_batches_tracked"):
            assert tensor.is_contiguous()
            assert (tensor == state[name].half().float()).all(), name
    unpack = BundleWeights(bundle)
    for spec in expected.llm_specs:
        tensor = found.tensors[spec.source]
        whole = tensor.read()
        assert tensor.shape == whole.shape == spec.shape
        assert mx.array_equal(tensor.read(slice(1, 3)), whole[1:3])
        unpacked = unpack.matrix(spec.name).float().numpy()
        assert np.allclose(np.array(whole), unpacked, rtol=0, atol=2e-3 * np.abs(unpacked).max())


def test_a_source_that_the_bundle_s_type_rounds(edit_checkpoint, tmp_path, few_samples):
    """What the first export rounded is told apart from what the conversion changed."""
    generator = np.random.default_rng(0)

    def blur(tensors):
        for name, tensor in tensors.items():
            if "vision_tower" in name and tensor.is_floating_point():
                noise = generator.uniform(1 - 2e-3, 1 + 2e-3, tensor.shape)
                tensor.mul_(type(tensor)(noise.astype(np.float32)))

    checkpoint = edit_checkpoint(tensors=blur)
    options = ExportOptions.of(llm_bits=16, dtype="bfloat16", layout="mlx")
    export(checkpoint, tmp_path / "mlx", options)
    result = convert(tmp_path / "mlx", tmp_path / "app", "app")
    assert result.manifest["options"]["min_snr_db"] == 20
    assert result.gates[0].limit == 35
    _, gates = verify.verify(tmp_path / "app", checkpoint, {}, silent)
    assert all(gate.passed for gate in gates)
    by_name = {gate.name: gate.value for gate in gates}
    assert by_name["encoder SNR"] < 60 < 80 < by_name["encoder conversion SNR"]


def test_a_float32_bundle_stays_exact(copy, tmp_path, quick, monkeypatch):
    def widen(arrays):
        arrays |= {n: a.astype(mx.float32) for n, a in arrays.items() if a.dtype == mx.float16}

    asked = []
    export_package = build.export_package
    monkeypatch.setattr(
        build,
        "export_package",
        lambda *given: (asked.append(given[0].options), export_package(*given))[1],
    )
    edit_weights(copy, widen)
    result = convert(copy, tmp_path / "out", "app")
    assert [options.encoder.precision for options in asked] == ["fp32"]
    assert result.manifest["options"]["dtype"] == "float32"
    assert result.manifest["options"]["min_snr_db"] == 80
    assert json.loads((result.path / "config.json").read_text())["torch_dtype"] == "float32"


def test_bits_of_single_parts_stay_recorded(demo_checkpoint, tmp_path, quick, no_gates):
    options = ExportOptions.of(llm_bits=4, embed_bits=16, projector_bits=4, layout="mlx")
    before = export(demo_checkpoint, tmp_path / "mlx", options).manifest
    assert before["llm"]["left_unquantized"].keys() == {EMBEDDING}
    for told in (True, False):
        if not told:
            (tmp_path / "mlx" / "manifest.json").unlink()
        manifest = convert(tmp_path / "mlx", tmp_path / f"app-{told}", "app").manifest
        for key in ("llm_bits", "group_size", "embed_bits", "projector_bits", "max_kl_nats"):
            assert manifest["options"][key] == before["options"][key], key
        assert manifest["llm"]["formats"] == before["llm"]["formats"]
        assert manifest["llm"]["left_unquantized"].keys() == {EMBEDDING}
        assert (
            verify.recorded_options(Bundle.open(tmp_path / f"app-{told}")).llm.projector_bits == 4
        )


def test_a_conversion_of_mlx_vlm_s(copy, scene, tmp_path, few_samples):
    """As mlx-vlm writes them: no manifest, no `<image>`, one file for processors, the projector
    and the encoder's matrices quantized too."""
    processor = {
        "image_processor": json.loads((copy / "preprocessor_config.json").read_text()),
        "processor_class": "FastVLMProcessor",
    }
    (copy / "preprocessor_config.json").unlink()
    (copy / "processor_config.json").write_text(json.dumps(processor))
    (copy / "README.md").write_text("---\nlicense: apple-amlr\n---\n")

    def config(data):
        del data["image_token_index"]
        data["quantization"] = {"group_size": 64, "bits": 4, "mode": "affine"}
        data["quantization_config"] = data["quantization"]

    def tokens(data):
        data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] != "<image>"]

    def weights(arrays):
        for module in ("mm_projector.0", "mm_projector.2"):
            quantize(arrays, module)
        for name in [n for n in arrays if n.startswith(TOWER) and "qkv.weight" in n]:
            quantize(arrays, name.removesuffix(".weight"))

    edit_json(copy, "config.json", config)
    edit_json(copy, "tokenizer.json", tokens)
    edit_weights(copy, weights)
    result = convert(copy, tmp_path / "out", "app")
    assert stored(result.path) == stored(copy)
    assert result.manifest["source"]["kind"] == "mlx bundle"
    assert result.manifest["source"]["license"] == "apple-amlr"
    assert result.manifest["source"]["files"].keys() == {"config.json", "model.safetensors"}
    assert "README.md" in result.manifest["converted_from"]["files"]
    assert result.manifest["options"]["llm_bits"] == 4
    assert result.manifest["options"]["projector_bits"] == 4
    assert json.loads((result.path / "config.json").read_text())["quantization"] == {
        "group_size": 64,
        "bits": 4,
    }
    models = [fastvlm_mlx.load(path) for path in (copy, result.path)]
    answers = [model.generate(scene, QUESTION, max_tokens=12).text for model in models]
    assert answers[0] == answers[1]
    _, gates = verify.verify(result.path, None, {}, silent)
    assert gates[0].passed


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    bits=st.sampled_from([bits for bits in BITS if bits != 16]),
    group_size=st.sampled_from(GROUP_SIZES),
    told=st.booleans(),
)
def test_one_choice_of_quantization_for_all(mlx_bundle, tmp_path_factory, bits, group_size, told):
    """A layer quantized in its own way, whether or not config.json tells, is refused."""
    path = tmp_path_factory.mktemp("mixed")
    shutil.copyfile(mlx_bundle / "config.json", path / "config.json")
    shutil.copyfile(mlx_bundle / "model.safetensors", path / "model.safetensors")
    edit_weights(path, lambda arrays: requantize(arrays, DOWN, bits, group_size))
    own = {"bits": bits, "group_size": group_size}
    if told:
        edit_json(path, "config.json", lambda data: data["quantization"].update({DOWN: own}))
    bundle = Bundle.open(path)
    if own == {"bits": 4, "group_size": 64}:
        assert bundle_tensors(bundle)
        assert formats_for_app(bundle)
    elif told:
        assert bundle_tensors(bundle)
        with pytest.raises(BundleError, match=r"app can't hold .*: the demo app"):
            formats_for_app(bundle)
    else:
        with pytest.raises(BundleError, match=rf"stores {DOWN}\.\w+ as .* config\.json implies"):
            bundle_tensors(bundle)


def drop_scales(arrays):
    del arrays[f"{DOWN}.scales"]


def drop_a_weight(arrays):
    del arrays["mm_projector.0.bias"]


def drop_the_unused_head(arrays):
    del arrays[f"{TOWER}head.proj"]


def add_one(arrays):
    arrays["mm_projector.4.weight"] = mx.zeros(2)


def of_integers(arrays):
    arrays["mm_projector.0.bias"] = arrays["mm_projector.0.bias"].astype(mx.int32)


def in_fp4(arrays):
    parts = [arrays.pop(f"{DOWN}.{part}") for part in ("weight", "scales", "biases")]
    weight = mx.dequantize(*parts, group_size=64, bits=4)
    packed, scales = mx.quantize(weight, group_size=32, bits=4, mode="mxfp4")
    arrays |= {f"{DOWN}.weight": packed, f"{DOWN}.scales": scales}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop_scales, rf"stores {DOWN}\.weight as U32 .* implies F16 or BF16 or F32 \["),
        (drop_a_weight, r"lacks mm_projector\.0\.bias: expected it for the model"),
        (add_one, r"holds mm_projector\.4\.weight, which is no tensor of the model"),
        (of_integers, r"stores mm_projector\.0\.bias as I32 .* implies F16 or BF16 or F32 \["),
        (in_fp4, rf"stores {DOWN}\.scales as U8 .* implies F16 or BF16 or F32 \["),
    ],
)
def test_weights_that_are_not_whole_or_not_affine(copy, tmp_path, change, words):
    edit_weights(copy, change)
    with pytest.raises(BundleError, match=words):
        convert(copy, tmp_path / "out", "app")
    assert not (tmp_path / "out").exists()


def test_a_bundle_without_the_head_that_nothing_computes(copy, tmp_path, quick):
    edit_weights(copy, drop_the_unused_head)
    assert convert(copy, tmp_path / "out", "app").path.is_dir()


def test_weights_of_another_shape(copy, tmp_path):
    edit_json(copy, "config.json", lambda data: data.update(intermediate_size=320))
    with pytest.raises(BundleError, match=r"gate_proj\.weight as U32 .* where config.json implies"):
        convert(copy, tmp_path / "out", "app")


def test_other_pixels_are_refused(copy, tmp_path):
    edit_json(copy, "preprocessor_config.json", lambda data: data.update(image_mean=[0.5] * 3))
    with pytest.raises(BundleError, match=r"normalizes images \(mean \(0\.5.* from 0 to 1"):
        convert(copy, tmp_path / "out", "app")


def test_an_embedding_without_a_row_for_the_image(copy, tmp_path):
    rows = json.loads((copy / "config.json").read_text())["vocab_size"]

    def fill(data):
        tokens = data["added_tokens"]
        (image,) = [token for token in tokens if token["content"] == "<image>"]
        data["added_tokens"] = [token for token in tokens if token is not image] + [
            {**image, "id": number, "content": f"<filled {number}>"}
            for number in range(image["id"], rows)
        ]

    edit_json(copy, "tokenizer.json", fill)
    with pytest.raises(BundleError, match=rf"leaves none of the embedding's {rows} rows for <ima"):
        convert(copy, tmp_path / "out", "app")


class TestRefused:
    def test_a_package_cannot_be_unfolded(self, demo_bundle, tmp_path):
        with pytest.raises(BundleError, match=r"folded into a Core ML package.*--layout mlx`$"):
            convert(demo_bundle, tmp_path / "out", "mlx")

    @pytest.mark.parametrize("layout", ["app", "mlx"])
    def test_the_same_layout(self, demo_bundle, mlx_bundle, tmp_path, layout):
        source = demo_bundle if layout == "app" else mlx_bundle
        with pytest.raises(BundleError, match=f"is of layout {layout} already"):
            convert(source, tmp_path / "out", layout)

    def test_a_layout_that_is_none(self, mlx_bundle, tmp_path):
        with pytest.raises(OptionError, match="--layout is gguf: expected one of app, mlx"):
            convert(mlx_bundle, tmp_path / "out", "gguf")

    def test_a_checkpoint(self, demo_checkpoint, tmp_path):
        with pytest.raises(BundleError, match="is a checkpoint, not a bundle: run `fastvlm exp"):
            convert(demo_checkpoint, tmp_path / "out", "app")

    def test_a_bundle_that_failed_its_own_gates(self, mlx_bundle, tmp_path):
        source = Path(shutil.copytree(mlx_bundle, tmp_path / "source"))
        edit_json(source, "manifest.json", lambda data: data["gates"][2].update(passed=False))
        with pytest.raises(BundleError, match=r"failed a gate of its own export \(KL divergence\)"):
            convert(source, tmp_path / "out", "app")

    def test_a_bundle_that_changed(self, mlx_bundle, tmp_path):
        source = Path(shutil.copytree(mlx_bundle, tmp_path / "source"))
        with (source / "model.safetensors").open("ab") as stream:
            stream.write(b"\0")
        with pytest.raises(BundleError, match="it changed since export"):
            convert(source, tmp_path / "out", "app")


class TestDestination:
    def test_overwrite(self, mlx_bundle, tmp_path, quick):
        convert(mlx_bundle, tmp_path / "out", "app")
        with pytest.raises(DestinationError, match="exists"):
            convert(mlx_bundle, tmp_path / "out", "app")
        convert(mlx_bundle, tmp_path / "out", "app", overwrite=True)
        assert [p.name for p in tmp_path.iterdir()] == ["out"]

    def test_over_the_source_itself(self, mlx_bundle):
        before = {p: p.stat().st_mtime_ns for p in mlx_bundle.rglob("*")}
        with pytest.raises(DestinationError, match=r"overlaps its source .* never written to"):
            convert(mlx_bundle, mlx_bundle, "app", overwrite=True)
        assert {p: p.stat().st_mtime_ns for p in mlx_bundle.rglob("*")} == before

    def test_too_little_room(self, mlx_bundle, tmp_path, monkeypatch):
        usage = shutil._ntuple_diskusage(9, 9, 1_000_000)
        monkeypatch.setattr(space.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(DestinationError, match="has 1 MB free and the bundle needs 6 MB"):
            convert(mlx_bundle, tmp_path / "out", "app")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("stage", ["language model", "check answers", "manifest"])
    def test_an_interruption_leaves_nothing(self, mlx_bundle, tmp_path, quick, stage):
        def press(name, done):
            if name == stage:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            convert(mlx_bundle, tmp_path / "out", "app", press)
        assert list(tmp_path.iterdir()) == []


class TestGates:
    def test_a_failed_one_is_kept_beside_the_destination(
        self, mlx_bundle, tmp_path, quick, monkeypatch
    ):
        gate = Gate("encoder SNR", 12.3, "dB", 35.0, True)
        monkeypatch.setattr(build, "gates_of_sizes", lambda *arguments: ([gate], []))
        with pytest.raises(GateError, match=r"floor of 35 dB\) .*, or export the checkpoint"):
            convert(mlx_bundle, tmp_path / "out", "app")
        assert [path.name for path in tmp_path.iterdir()] == ["out.failed-gates"]

    def test_one_byte_of_the_language_model_is_seen(self, mlx_bundle, converted, tmp_path):
        tensors = bundle_tensors(Bundle.open(mlx_bundle)).values()
        copied = [tensor for tensor in tensors if not tensor.spec.name.startswith(TOWER)]
        damaged = Path(shutil.copytree(converted, tmp_path / "damaged"))
        data = bytearray((damaged / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (damaged / "model.safetensors").write_bytes(data)
        for path, changed in ((converted, 0), (damaged, 1)):
            gate = changed_tensors(copied, Bundle.open(path))
            assert (gate.value, gate.passed) == (changed, not changed)


def test_several_files(mlx_bundle, tmp_path, quick, monkeypatch):
    monkeypatch.setattr(llm, "SHARD_BYTES", 100_000)
    result = convert(mlx_bundle, tmp_path / "out", "app")
    bundle = Bundle.open(result.path)
    assert len(bundle.weight_files) > 2
    index = json.loads((result.path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == bundle.tensors().keys()
    app.check_app(bundle, describe(bundle.package))


def test_the_command(mlx_bundle, tmp_path, quick, monkeypatch, capsys):
    def fastvlm(*arguments):
        monkeypatch.setattr(sys, "argv", ["fastvlm", "convert", *map(str, arguments)])
        with pytest.raises(SystemExit) as leaving:
            main.main()
        return leaving.value.code or 0, *capsys.readouterr()

    status, out, err = fastvlm(mlx_bundle, tmp_path / "out", "--layout", "app", "--json")
    assert status == 0
    assert "language model" in err
    assert json.loads(out)["converted_from"]["layout"] == "mlx"
    status, out, _ = fastvlm(mlx_bundle, tmp_path / "out", "--layout", "app", "--overwrite")
    assert status == 0
    assert "converted from layout" in out
    status, _, err = fastvlm(tmp_path / "out", tmp_path / "again", "--layout", "mlx")
    assert status == 2
    assert "fastvlm export … --layout mlx" in err.splitlines()[-1]
