"""What a bundle may look like, and what is said when it does not."""

import json
import shutil

import pytest
from edits import edit_json

import fastvlm_mlx
from fastvlm_mlx.bundle.bundle import Bundle
from fastvlm_mlx.errors import BundleError, FastVLMError
from fastvlm_mlx.vision.package import describe
from model_export.layouts import app


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
        (bundle_copy / "manifest.json").unlink()
        with pytest.raises(BundleError, match=r"holds 0 encoders \(none\): expected one"):
            fastvlm_mlx.load(bundle_copy)

    def test_two_encoders(self, bundle_copy):
        shutil.copytree(bundle_copy / "fastvithd.mlpackage", bundle_copy / "b.mlpackage")
        (bundle_copy / "manifest.json").unlink()
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
        edit_json(bundle_copy, "manifest.json", schema_version=99)
        with pytest.raises(BundleError, match="schema version 99, expected 1"):
            Bundle.open(bundle_copy)

    def test_a_path_that_is_not_there(self, tmp_path):
        with pytest.raises(BundleError, match="does not exist: expected a bundle"):
            fastvlm_mlx.load(tmp_path / "nothing")

    def test_a_checkpoint_in_a_bundle_s_place(self, demo_checkpoint):
        with pytest.raises(BundleError, match="is a checkpoint, not a bundle: run `fastvlm export"):
            fastvlm_mlx.load(demo_checkpoint)

    def test_an_image_token_that_is_not_the_tokenizer_s(self, bundle_copy):
        edit_json(bundle_copy, "config.json", image_token_index=3)
        (bundle_copy / "manifest.json").unlink()
        with pytest.raises(
            BundleError, match=r"gives <image> the id \d+ where config\.json says 3"
        ):
            fastvlm_mlx.load(bundle_copy)


class TestManifest:
    @pytest.mark.parametrize("files", [None, [1], {"config.json": 1}, {"config.json": {}}])
    def test_one_that_is_not_whole(self, bundle_copy, files):
        edit_json(bundle_copy, "manifest.json", files=files)
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
        app.check_app(bundle, describe(bundle.package))

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
        edit_json(bundle_copy, name, **changes)
        (bundle_copy / "manifest.json").unlink()
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
        (bundle_copy / "manifest.json").unlink()
        with pytest.raises(BundleError, match=r"x is F32 \[1\], expected no such weight"):
            self.check(bundle_copy)

    def test_another_package_name(self, bundle_copy):
        (bundle_copy / "fastvithd.mlpackage").rename(bundle_copy / "encoder.mlpackage")
        (bundle_copy / "manifest.json").unlink()
        with pytest.raises(BundleError, match=r"expected fastvithd\.mlpackage"):
            self.check(bundle_copy)


class TestListed:
    """Nothing is loaded that the manifest does not list, nor parsed before it is compared."""

    @pytest.mark.parametrize("name", ["more.safetensors", "folder/more.safetensors"])
    def test_weights_that_are_not_listed(self, bundle_copy, name):
        import mlx.core as mx

        (bundle_copy / name).parent.mkdir(exist_ok=True)
        overriding = {"language_model.model.norm.weight": mx.zeros((128,))}
        mx.save_safetensors(str(bundle_copy / name), overriding)
        for open_it in (fastvlm_mlx.load, Bundle.open):
            with pytest.raises(BundleError, match=f"{name} is not listed in manifest"):
                open_it(bundle_copy)

    @pytest.mark.parametrize(
        "name", ["special_tokens_map.json", "merges.txt", "fastvithd.mlpackage/Data/x", "a.jinja"]
    )
    def test_other_files_that_programs_load(self, bundle_copy, name):
        (bundle_copy / name).write_text("{}")
        with pytest.raises(BundleError, match="is not listed"):
            Bundle.open(bundle_copy)

    @pytest.mark.parametrize(
        "name", ["._model.safetensors", ".DS_Store", "fastvithd.mlpackage/._Manifest.json"]
    )
    def test_what_a_usb_stick_leaves_changes_nothing(self, bundle_copy, name, demo_bundle):
        (bundle_copy / name).write_bytes(b"\0\5\x16\7 left behind")
        bundle = Bundle.open(bundle_copy)
        bundle.check_files()
        assert bundle.files == Bundle.open(demo_bundle).files
        (bundle_copy / "manifest.json").unlink()
        assert Bundle.open(bundle_copy).layout == "app"
        answer = fastvlm_mlx.load(bundle_copy).generate(None, "Hello", max_tokens=2).tokens
        assert answer == fastvlm_mlx.load(demo_bundle).generate(None, "Hello", max_tokens=2).tokens

    def test_notes_of_the_user_s_are_nobody_s_business(self, bundle_copy):
        (bundle_copy / "thesis.txt").write_text("precious")
        Bundle.open(bundle_copy).check_files()

    @pytest.mark.parametrize("files", [{}, {"README.md": {"bytes": 1, "sha256": "0" * 64}}])
    def test_a_manifest_that_lists_nothing(self, bundle_copy, files):
        edit_json(bundle_copy, "manifest.json", files=files)
        with pytest.raises(BundleError, match=r"manifest\.json|is missing"):
            Bundle.open(bundle_copy)

    @pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
    def test_a_small_file_is_compared_before_it_is_parsed(self, bundle_copy, name):
        size = (bundle_copy / name).stat().st_size
        (bundle_copy / name).write_bytes(b"{" * size)
        with pytest.raises(BundleError, match=f"{name} has SHA-256"):
            fastvlm_mlx.load(bundle_copy)

    @pytest.mark.parametrize(
        "name", ["model.safetensors", "fastvithd.mlpackage/Data/com.apple.CoreML/model.mlmodel"]
    )
    def test_and_so_is_a_large_one(self, bundle_copy, name):
        data = (bundle_copy / name).read_bytes()
        (bundle_copy / name).write_bytes(b"\xff" * 30 + data[30:])
        with pytest.raises(BundleError, match=f"{name} has SHA-256"):
            fastvlm_mlx.load(bundle_copy)

    def test_a_tensor_that_is_in_two_files(self, bundle_copy):
        shutil.copy(bundle_copy / "model.safetensors", bundle_copy / "z.safetensors")
        (bundle_copy / "manifest.json").unlink()
        with pytest.raises(BundleError, match=r"is in both .*model\.safetensors and .*z\."):
            fastvlm_mlx.load(bundle_copy)

    def test_a_file_that_is_a_link_elsewhere(self, bundle_copy, tmp_path):
        (bundle_copy / "config.json").rename(tmp_path / "elsewhere.json")
        (bundle_copy / "config.json").symlink_to(tmp_path / "elsewhere.json")
        with pytest.raises(BundleError, match="is a link that leads out of"):
            Bundle.open(bundle_copy)


class TestChangedWhileOpen:
    def test_files_are_the_ones_that_were_there(self, bundle_copy):
        bundle = Bundle.open(bundle_copy)
        data = (bundle_copy / "model.safetensors").read_bytes()
        (bundle_copy / "model.safetensors").unlink()
        with pytest.raises(BundleError, match=r"model\.safetensors is gone since the bundle was"):
            bundle.check_unchanged()
        (bundle_copy / "model.safetensors").write_bytes(data)
        with pytest.raises(BundleError, match=r"model\.safetensors changed since the bundle was"):
            bundle.check_unchanged()

    def test_two_bundles_are_not_mixed(self, demo_bundle, tmp_path):
        """The weights were read from the first, and the encoder would be from the second."""
        path = tmp_path / "bundle"
        shutil.copytree(demo_bundle, path)
        model = fastvlm_mlx.load(path)
        shutil.copytree(demo_bundle, tmp_path / "other")
        path.rename(tmp_path / "aside")
        (tmp_path / "other").rename(path)
        with pytest.raises(BundleError, match="changed since the bundle was opened, and"):
            _ = model.encoder


class TestBounds:
    """What config.json and the tokenizer say is compared with the weights before it is used."""

    def without_manifest(self, path, **changes):
        edit_json(path, "config.json", **changes)
        (path / "manifest.json").unlink()

    def test_layers(self, bundle_copy):
        self.without_manifest(bundle_copy, num_hidden_layers=900)
        with pytest.raises(BundleError, match=r"holds 4 layers where .* num_hidden_layers 900"):
            fastvlm_mlx.load(bundle_copy)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("num_hidden_layers", 10**9),
            ("hidden_size", 10**9),
            ("vocab_size", -1),
            ("intermediate_size", [[256]]),
            ("num_attention_heads", True),
            ("rope_theta", "1e6"),
            ("quantization", {"bits": 10**400, "group_size": 64}),
            ("vision_config", {"layers": [10**6]}),
            ("vision_config", {"image_size": 10**7}),
            ("vision_config", {"embed_dims": [[[16]]] * 5}),
            ("mm_hidden_size", "\x1b[2J"),
        ],
    )
    def test_numbers_that_no_model_has(self, bundle_copy, key, value):
        self.without_manifest(bundle_copy, **{key: value})
        with pytest.raises(FastVLMError, match=r"config.*|vision_config.*") as caught:
            fastvlm_mlx.load(bundle_copy)
        assert str(caught.value).isprintable()

    @pytest.mark.parametrize("extra", [0, 2**31])
    def test_a_token_without_a_row(self, bundle_copy, extra):
        data = json.loads((bundle_copy / "tokenizer.json").read_text())
        rows = json.loads((bundle_copy / "config.json").read_text())["vocab_size"]
        data["model"]["vocab"]["a"] = rows + extra
        (bundle_copy / "tokenizer.json").write_text(json.dumps(data))
        (bundle_copy / "manifest.json").unlink()
        with pytest.raises(BundleError, match=f"'a' the id .* and the embedding has {rows} rows"):
            fastvlm_mlx.load(bundle_copy)

    @pytest.mark.parametrize("found", [-1, 2**40, 10**6, "x", [1, None]])
    def test_an_end_token_without_a_row(self, bundle_copy, found):
        edit_json(bundle_copy, "generation_config.json", eos_token_id=found)
        (bundle_copy / "manifest.json").unlink()
        with pytest.raises(BundleError, match="eos_token_id of"):
            fastvlm_mlx.load(bundle_copy)

    @pytest.mark.parametrize(
        ("key", "value", "words"),
        [
            ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "(a+)+b"}}, "splits text by"),
            (
                "pre_tokenizer",
                {"type": "Sequence", "pretokenizers": [{"type": "Digits"}]},
                "Digits",
            ),
            ("normalizer", {"type": "Replace", "pattern": {"Regex": "(a+)+b"}}, "Replace"),
            ("normalizer", 7, "7"),
            ("model", {"type": "Unigram", "vocab": []}, "Unigram"),
            ("model", {}, "can't be read as a tokenizer"),
            ("added_tokens", 3, "can't be read as a tokenizer"),
        ],
    )
    def test_a_tokenizer_that_is_not_qwen2_s(self, bundle_copy, key, value, words):
        edit_json(bundle_copy, "tokenizer.json", **{key: value})
        (bundle_copy / "manifest.json").unlink()
        with pytest.raises(BundleError, match=words) as caught:
            fastvlm_mlx.load(bundle_copy)
        assert "tokenizer.json" in str(caught.value)


class TestPackage:
    def test_weights_outside_of_it(self, bundle_copy, tmp_path):
        weights = bundle_copy / "fastvithd.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
        weights.rename(tmp_path / "weight.bin")
        weights.symlink_to(tmp_path / "weight.bin")
        with pytest.raises(FastVLMError, match="is a link that leads out of"):
            describe(bundle_copy / "fastvithd.mlpackage")

    def test_a_specification_outside_of_it(self, bundle_copy, tmp_path):
        package = bundle_copy / "fastvithd.mlpackage"
        manifest = json.loads((package / "Manifest.json").read_text())
        (tmp_path / "model.mlmodel").write_bytes(b"")
        entry = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]
        entry["path"] = "../../../model.mlmodel"
        (package / "Manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(FastVLMError, match="leads out of"):
            describe(package)

    def test_one_that_is_a_link_as_a_whole(self, bundle_copy, demo_bundle):
        package = bundle_copy / "fastvithd.mlpackage"
        shutil.rmtree(package)
        package.symlink_to(demo_bundle / package.name)
        for look in (lambda: describe(package), lambda: Bundle.open(bundle_copy)):
            with pytest.raises(FastVLMError, match="is a link"):
                look()
