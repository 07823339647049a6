"""What a bundle may look like, and what is said when it does not."""

import json
import shutil

import pytest

import fastvlm_mlx
from fastvlm_mlx.bundle import Bundle
from fastvlm_mlx.errors import BundleError, FastVLMError
from fastvlm_mlx.vision.package import describe
from model_export import layouts


def edit(path, name, **changes):
    data = json.loads((path / name).read_text())
    for key, value in changes.items():
        data.pop(key, None) if value is None else data.__setitem__(key, value)
    (path / name).write_text(json.dumps(data))


def test_a_bundle_without_a_manifest_is_taken_as_apple_s_are(bundle_copy):
    (bundle_copy / "manifest.json").unlink()
    bundle = Bundle.open(bundle_copy)
    assert bundle.manifest is None
    bundle.check_files()
    assert fastvlm_mlx.load(bundle_copy).generate(None, "Hello", max_tokens=1).generation_tokens


class TestChanged:
    @pytest.mark.parametrize(
        "name", ["config.json", "model.safetensors", "fastvithd.mlpackage/Manifest.json"]
    )
    def test_a_byte_in_any_file_is_named_by_hash(self, bundle_copy, name):
        data = bytearray((bundle_copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        (bundle_copy / name).write_bytes(data)
        with pytest.raises(FastVLMError, match=f"{name}.*(SHA-256|JSON|safetensors)"):
            Bundle.open(bundle_copy).check_files()

    def test_a_file_of_another_size(self, bundle_copy):
        with (bundle_copy / "tokenizer.json").open("a") as stream:
            stream.write("\n")
        with pytest.raises(BundleError, match=r"tokenizer\.json has .* bytes where the manifest"):
            fastvlm_mlx.load(bundle_copy)

    def test_a_missing_file(self, bundle_copy):
        (bundle_copy / "processor_config.json").unlink()
        with pytest.raises(BundleError, match=r"processor_config\.json is missing"):
            fastvlm_mlx.load(bundle_copy)


class TestIncomplete:
    def test_no_encoder(self, bundle_copy):
        shutil.rmtree(bundle_copy / "fastvithd.mlpackage")
        with pytest.raises(BundleError, match=r"holds 0 encoders \(none\): expected one"):
            fastvlm_mlx.load(bundle_copy)

    def test_two_encoders(self, bundle_copy):
        shutil.copytree(bundle_copy / "fastvithd.mlpackage", bundle_copy / "b.mlpackage")
        with pytest.raises(BundleError, match=r"holds 2 encoders \(b\.mlpackage, fastvithd"):
            fastvlm_mlx.load(bundle_copy)

    def test_no_weights(self, bundle_copy):
        (bundle_copy / "model.safetensors").unlink()
        (bundle_copy / "manifest.json").unlink()
        with pytest.raises(BundleError, match=r"holds no \.safetensors"):
            fastvlm_mlx.load(bundle_copy)

    def test_truncated_weights(self, bundle_copy):
        file = bundle_copy / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        (bundle_copy / "manifest.json").unlink()
        with pytest.raises(BundleError, match="is not a whole safetensors file"):
            fastvlm_mlx.load(bundle_copy)

    @pytest.mark.parametrize("change", ["missing", "extra", "shape"])
    def test_weights_that_config_json_does_not_describe(self, bundle_copy, change):
        import mlx.core as mx

        name = "language_model.model.norm.weight"
        file = bundle_copy / "model.safetensors"
        tensors = dict(mx.load(str(file)))
        if change == "missing":
            del tensors[name]
        elif change == "extra":
            name = "language_model.lm_head.weight"
            tensors[name] = mx.zeros((4, 4))
        else:
            tensors[name] = mx.zeros((7,))
        mx.save_safetensors(str(file), tensors)
        (bundle_copy / "manifest.json").unlink()
        with pytest.raises(BundleError, match=name.replace(".", r"\.")):
            fastvlm_mlx.load(bundle_copy)

    def test_another_manifest_schema(self, bundle_copy):
        edit(bundle_copy, "manifest.json", schema_version=99)
        with pytest.raises(BundleError, match="schema version 99, expected 1"):
            Bundle.open(bundle_copy)

    def test_a_path_that_is_not_there(self, tmp_path):
        with pytest.raises(BundleError, match="does not exist: expected a bundle"):
            fastvlm_mlx.load(tmp_path / "nothing")

    def test_a_checkpoint_in_a_bundle_s_place(self, demo_checkpoint):
        with pytest.raises(BundleError, match="is a checkpoint, not a bundle: run `fastvlm export"):
            fastvlm_mlx.load(demo_checkpoint)

    def test_an_image_token_that_is_not_the_tokenizer_s(self, bundle_copy):
        edit(bundle_copy, "config.json", image_token_index=3)
        (bundle_copy / "manifest.json").unlink()
        with pytest.raises(
            BundleError, match=r"gives <image> the id \d+ where config\.json says 3"
        ):
            fastvlm_mlx.load(bundle_copy)


class TestManifest:
    @pytest.mark.parametrize("files", [None, [1], {"config.json": 1}, {"config.json": {}}])
    def test_one_that_is_not_whole(self, bundle_copy, files):
        edit(bundle_copy, "manifest.json", files=files)
        with pytest.raises(BundleError, match="is not a whole manifest"):
            Bundle.open(bundle_copy)

    def test_a_damaged_weight_file_is_named_before_anything_is_computed(self, bundle_copy):
        (bundle_copy / "more.safetensors").write_bytes(b"x" * 40)
        (bundle_copy / "manifest.json").unlink()
        with pytest.raises(BundleError, match=r"more\.safetensors is not a whole safetensors"):
            Bundle.open(bundle_copy)


def test_a_quantized_projector_is_loaded_and_passes_the_app_s_rules(bundle_copy):
    """mlx-vlm's stock recipe, which Apple's quantized bundles were made with, leaves none out."""
    import mlx.core as mx
    import numpy as np

    file = bundle_copy / "model.safetensors"
    tensors = dict(mx.load(str(file)))
    features = mx.random.normal((1, 16, 512), key=mx.random.key(1))
    expected = np.array(fastvlm_mlx.load(bundle_copy).model.project(features))
    for layer in ("linear_0", "linear_2"):
        stem = f"multi_modal_projector.{layer}"
        quantized = mx.quantize(tensors[f"{stem}.weight"], group_size=64, bits=4)
        for part, array in zip(("weight", "scales", "biases"), quantized, strict=True):
            tensors[f"{stem}.{part}"] = array
    mx.save_safetensors(str(file), tensors, {"format": "mlx"})
    (bundle_copy / "manifest.json").unlink()
    found = np.array(fastvlm_mlx.load(bundle_copy).model.project(features))
    noise = np.square(found - expected).mean() / np.square(expected).mean()
    assert noise < 0.05
    TestAppRules().check(bundle_copy)


class TestAppRules:
    """Every rule of the demo app's loader, broken one at a time."""

    def check(self, path):
        bundle = Bundle.open(path)
        layouts.check_app(bundle, describe(bundle.package))

    def test_the_exported_bundle_keeps_them(self, demo_bundle):
        self.check(demo_bundle)

    @pytest.mark.parametrize(
        ("name", "changes", "words"),
        [
            ("config.json", {"mm_hidden_size": None}, "mm_hidden_size is None, expected int"),
            ("config.json", {"image_token_index": -200}, "image_token_index is -200"),
            ("config.json", {"num_key_value_heads": None}, "num_key_value_heads is None"),
            ("config.json", {"tie_word_embeddings": False}, "lm_head.weight is missing"),
            ("config.json", {"quantization": {"group_size": 64, "bits": 8}}, "expected"),
            (
                "config.json",
                {"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}},
                "group_size and bits alone",
            ),
            ("preprocessor_config.json", {"processor_class": "X"}, "processor_class is 'X'"),
            ("preprocessor_config.json", {"crop_size": None}, "crop_size is None"),
            (
                "preprocessor_config.json",
                {"size": {"shortest_edge": 3}},
                "{'shortest_edge': 3}, expected {'shortest_edge': 256}",
            ),
            ("preprocessor_config.json", {"image_std": [1.0]}, "image_std"),
            ("tokenizer_config.json", {"tokenizer_class": "TokenizersBackend"}, "Qwen2Tokenizer"),
        ],
    )
    def test_a_broken_rule_is_named(self, bundle_copy, name, changes, words):
        edit(bundle_copy, name, **changes)
        with pytest.raises(BundleError, match=words) as caught:
            self.check(bundle_copy)
        assert "can't be loaded by the demo app" in str(caught.value)
        assert name.split(".")[0] in str(caught.value) or "safetensors" in str(caught.value)

    @pytest.mark.parametrize("content", [None, "{", "{}"])
    def test_the_tokenizer_is_read(self, bundle_copy, content):
        (bundle_copy / "tokenizer.json").unlink()
        if content is not None:
            (bundle_copy / "tokenizer.json").write_text(content)
        with pytest.raises(BundleError, match=r"tokenizer\.json"):
            self.check(bundle_copy)

    def test_a_weight_file_too_many(self, bundle_copy):
        import mlx.core as mx

        mx.save_safetensors(str(bundle_copy / "more.safetensors"), {"x": mx.zeros((1,))})
        with pytest.raises(BundleError, match=r"x is F32 \[1\], expected no such weight"):
            self.check(bundle_copy)

    def test_another_package_name(self, bundle_copy):
        (bundle_copy / "fastvithd.mlpackage").rename(bundle_copy / "encoder.mlpackage")
        with pytest.raises(BundleError, match=r"expected fastvithd\.mlpackage"):
            self.check(bundle_copy)
