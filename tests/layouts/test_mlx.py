"""The `mlx` layout: what is written, by whose rules it is checked, and that our runtime reads it.

That mlx-vlm itself loads it is test_mlx_vlm.py's, which needs an environment of its own.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from edits import edit_json, edit_weights
from jinja2 import Environment
from safetensors.torch import load_file
from tokenizers import Tokenizer

import fastvlm_mlx
from fastvlm_mlx.bundle.bundle import Bundle
from fastvlm_mlx.bundle.config import VisionConfig, fits_mlx_vlm
from fastvlm_mlx.components import placeholder_id
from fastvlm_mlx.errors import BundleError, OptionError
from fastvlm_mlx.inspection import inspect_bundle
from fastvlm_mlx.language.prompt.template import CHAT_TEMPLATE
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.encoder.references import reference_features
from model_export.gates import verify
from model_export.gates.encoder import gates_of_sizes, mlx_encoder_gates, snr_db
from model_export.layouts import mlx
from model_export.options import ExportOptions
from model_export.samples import images, scenes

QUESTION = "Describe the image."


@pytest.fixture
def copy(mlx_bundle, tmp_path):
    return Path(shutil.copytree(mlx_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def scene():
    return scenes.generate(3, held_out=True).draw(256)


def test_the_weights_have_mlx_vlm_s_names_and_mlx_s_shapes(mlx_bundle):
    shapes = {n: a.shape for n, a in mx.load(str(mlx_bundle / "model.safetensors")).items()}
    tower = "vision_tower.vision_model."
    expected = {
        "language_model.model.embed_tokens.weight": (448, 16),
        "language_model.model.layers.3.mlp.down_proj.scales": (128, 4),
        "mm_projector.0.weight": (128, 512),
        "mm_projector.2.bias": (128,),
        f"{tower}patch_embed.blocks.0.reparam_conv.weight": (16, 3, 3, 3),
        f"{tower}patch_embed.blocks.1.reparam_conv.weight": (16, 3, 3, 1),
        f"{tower}network.0.0.convffn.conv.bn.running_var": (16,),
        f"{tower}network.0.0.layer_scale": (1, 1, 16),
        f"{tower}network.1.proj.0.lkb_reparam.weight": (32, 7, 7, 1),
        f"{tower}conv_exp.se.expand.weight": (512, 1, 1, 32),
        f"{tower}head.proj": (512, 16),
    }
    assert {name: shapes.get(name) for name in expected} == expected
    assert not any("num_batches_tracked" in name for name in shapes)
    prefixes = {name.split(".")[0] for name in shapes}
    assert prefixes == {"language_model", "mm_projector", "vision_tower"}


def test_the_encoder_is_the_source_s_number_by_number(mlx_bundle, demo_checkpoint):
    """Both files as safetensors' own reader has them."""
    tower, apple = "vision_tower.vision_model.", "model.vision_tower.vision_tower.model."
    written = load_file(mlx_bundle / "model.safetensors")
    arrays = {n.removeprefix(tower): t.numpy() for n, t in written.items() if n.startswith(tower)}
    state = {
        name.removeprefix(apple).replace("patch_embed.", "patch_embed.blocks."): tensor
        for name, tensor in load_file(demo_checkpoint / "model.safetensors").items()
        if name.startswith(apple) and not name.endswith("num_batches_tracked")
    }
    state = {name: tensor.half().numpy() for name, tensor in state.items()}
    assert state["head.proj"].any()
    assert state.keys() == arrays.keys()
    for name, array in arrays.items():
        expected = np.moveaxis(state[name], 1, -1) if state[name].ndim == 4 else state[name]
        assert np.array_equal(array.ravel(), expected.ravel()), name


def test_the_manifest_and_inspect_say_what_it_is(mlx_bundle):
    manifest = json.loads((mlx_bundle / "manifest.json").read_text())
    assert manifest["layout"] == manifest["options"]["layout"] == "mlx"
    assert manifest["encoder"]["precision"] == "fp16"
    assert manifest["fits_unmodified_mlx_vlm"] is False
    assert manifest["gates_passed"]
    names = [gate["name"] for gate in manifest["gates"]]
    assert names[:3] == ["encoder SNR", "encoder largest magnitude", "KL divergence"]
    assert set(manifest["llm"]["left_unquantized"]) == {
        "mm_projector.0.weight",
        "mm_projector.2.weight",
    }
    facts = inspect_bundle(mlx_bundle)
    assert facts["misfit"] == manifest["misfit"]
    assert facts["layout"] == "mlx"
    assert facts["encoder"]["precision"] == "float16"
    assert facts["encoder"]["bytes"] == manifest["encoder"]["bytes"]
    assert facts["llm"]["parameters"] == manifest["llm"]["parameters"]
    assert facts["llm"]["bits_per_weight"] == manifest["llm"]["bits_per_weight"]


def test_only_the_encoder_of_mobileclip_l_fits_mlx_vlm(demo_checkpoint):
    config = Checkpoint(demo_checkpoint).config
    fits = fits_mlx_vlm(config.vision)
    assert fits.pop("misfit").startswith("its encoder has layers [")
    assert fits == {"fits_unmodified_mlx_vlm": False}
    assert fits_mlx_vlm(VisionConfig(image_size=512)) == {"fits_unmodified_mlx_vlm": True}


def test_it_answers_as_the_app_bundle_does(mlx_bundle, demo_bundle, scene):
    found, expected = fastvlm_mlx.load(mlx_bundle), fastvlm_mlx.load(demo_bundle)
    assert found.encoder.backend == "MLX"
    features = [np.array(model.encode(scene).features) for model in (found, expected)]
    assert snr_db(features[1], features[0]) > 35
    answers = [model.generate(scene, QUESTION, max_tokens=48).text for model in (found, expected)]
    assert answers[0] == answers[1]
    assert found.generate(None, "Hello?", max_tokens=4).image_tokens == 0


def test_a_conversion_that_is_not_ours_loads(copy, mlx_bundle, scene):
    """As mlx-vlm's: no manifest, no `<image>`, one file for processors, a quantized projector."""
    expected = fastvlm_mlx.load(mlx_bundle).generate(scene, QUESTION, max_tokens=48).text
    (copy / "manifest.json").unlink()
    processor = {
        "image_processor": json.loads((copy / "preprocessor_config.json").read_text()),
        "processor_class": "FastVLMProcessor",
    }
    (copy / "preprocessor_config.json").unlink()
    (copy / "processor_config.json").write_text(json.dumps(processor))
    edit_json(copy, "config.json", quantization__mode="affine", image_token_index=None)
    data = json.loads((copy / "tokenizer.json").read_text())
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] != "<image>"]
    (copy / "tokenizer.json").write_text(json.dumps(data))

    def quantize_projector(arrays):
        for stem in ("mm_projector.0", "mm_projector.2"):
            packed = mx.quantize(arrays[f"{stem}.weight"], group_size=64, bits=4)
            names = [f"{stem}.{part}" for part in ("weight", "scales", "biases")]
            arrays |= dict(zip(names, packed, strict=True))

    edit_weights(copy, quantize_projector)
    model = fastvlm_mlx.load(copy)
    assert Bundle.open(copy).layout == "mlx"
    assert model.tokenizer.token_to_id("<image>") is None
    assert model.generate(scene, QUESTION, max_tokens=16).text[:8] == expected[:8]
    assert inspect_bundle(copy)["layout"] == "mlx"


def test_verify_repeats_the_gates(mlx_bundle, demo_checkpoint):
    def silent(stage, done):
        pass

    _, gates = verify.verify(mlx_bundle, None, {}, silent)
    assert [gate.name for gate in gates] == ["encoder largest magnitude"]
    assert gates[0].passed
    recorded = json.loads((mlx_bundle / "manifest.json").read_text())["gates"]
    _, gates = verify.verify(mlx_bundle, demo_checkpoint, {}, silent)
    assert [gate.to_dict()["name"] for gate in gates] == [gate["name"] for gate in recorded]
    assert all(gate.passed for gate in gates)


def test_the_written_side_has_pixels_of_its_own_settings(copy, demo_checkpoint):
    """A photograph that is not square, once padded and once cropped."""
    checkpoint = Checkpoint(demo_checkpoint)
    seen = images.gate_samples(checkpoint.config.vision)[-1:]
    references = reference_features(checkpoint.encoder_state(), checkpoint, seen)
    edit_json(copy, "config.json", image_aspect_ratio="square")
    gates, _ = gates_of_sizes(
        Bundle.open(copy), None, {256: references}, ExportOptions.of(layout="mlx")
    )
    assert [gate.name for gate in gates if not gate.passed] == ["encoder SNR"]


def test_an_answer_ends_with_the_turn_whatever_the_files_say(copy, scene):
    edit_json(copy, "config.json", eos_token_id=428)
    edit_json(copy, "generation_config.json", eos_token_id=428)
    edit_json(copy, "tokenizer_config.json", eos_token="<|endoftext|>")
    (copy / "manifest.json").unlink()
    result = fastvlm_mlx.load(copy).generate(scene, "How many shapes are there?", max_tokens=40)
    assert (result.finish_reason, "<|im_end|>" in result.text) == ("stop", False)


def test_a_damaged_encoder_fails_the_gate(copy, demo_checkpoint):
    checkpoint = Checkpoint(demo_checkpoint)
    seen = images.gate_samples(checkpoint.config.vision)[:1]
    references = reference_features(checkpoint.encoder_state(), checkpoint, seen)
    name = "vision_tower.vision_model.network.4.0.token_mixer.reparam_conv.weight"

    def swap_channels(arrays):
        weight = np.array(arrays[name])
        weight[[0, 1]] = weight[[1, 0]]
        arrays[name] = mx.array(weight)

    edit_weights(copy, swap_channels)
    options = ExportOptions.of(layout="mlx")
    gates, features = mlx_encoder_gates(Bundle.open(copy), references, options)
    assert features[0].shape == references[0].features.shape
    assert [gate.name for gate in gates if not gate.passed] == ["encoder SNR"]


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("config.json", {"eos_token_id": [430, 428]}, r"eos_token_id is \[430, 428\]"),
        ("config.json", {"image_token_index": 5}, "image_token_index is 5"),
        ("config.json", {"mm_projector_type": None}, "mm_projector_type is None"),
        ("config.json", {"tokenizer_model_max_length": None}, "tokenizer_model_max_length is None"),
        ("config.json", {"tokenizer_padding_side": "up"}, "tokenizer_padding_side is 'up'"),
        (
            "config.json",
            {"vision_config__num_classes": None},
            r"vision_config\.num_classes is None",
        ),
        (
            "config.json",
            {"vision_config__mlp_ratios": [2.0, 2, 4, 4, 4]},
            r"vision_config\.mlp_ratios is \[2\.0",
        ),
        (
            "config.json",
            {"vision_config__pos_embs_shapes": [7, 7, 7, 7, 7]},
            r"vision_config\.pos_embs_shapes is \[7",
        ),
        (
            "config.json",
            {"quantization__bits": 3},
            r"embed_tokens\.weight is U32 .*, expected U32 \[",
        ),
        (
            "config.json",
            {"tie_word_embeddings": False},
            r"language_model\.lm_head\.weight is missing",
        ),
        (
            "preprocessor_config.json",
            {"processor_class": "LlavaProcessor"},
            "processor_class is 'Lla",
        ),
        ("preprocessor_config.json", {"image_mean": [0, 0]}, r"image_mean is \[0, 0\]"),
        ("preprocessor_config.json", {"crop_size": {"height": 64, "width": 64}}, "crop_size is"),
    ],
)
def test_the_loaders_rules(copy, name, changes, words):
    edit_json(copy, name, **changes)
    with pytest.raises(
        BundleError, match=f"can't be loaded by mlx-vlm.* in {name}, {words}|{words}"
    ):
        mlx.check_mlx(Bundle.open(copy))


def test_the_loaders_rules_of_names(copy):
    edit_weights(copy, lambda arrays: arrays.pop("vision_tower.vision_model.head.proj"))
    with pytest.raises(BundleError, match=r"head\.proj is missing, expected float \[512, 16\]"):
        mlx.check_mlx(Bundle.open(copy))
    edit_weights(copy, lambda arrays: arrays.update({"mm_projector.1.weight": mx.zeros(2)}))
    with pytest.raises(
        BundleError, match=r"mm_projector\.1\.weight is F32 \[2\], expected no s|head"
    ):
        mlx.check_mlx(Bundle.open(copy))


class TestRefused:
    def test_an_encoder_precision_of_its_own(self):
        with pytest.raises(OptionError, match="use --dtype float32"):
            ExportOptions.of(layout="mlx", encoder_precision="fp32")
        assert ExportOptions.of(layout="mlx", dtype="float32").snr_floor_db == 80

    def test_another_layout(self):
        with pytest.raises(OptionError, match="--layout is gguf: expected one of app, mlx"):
            ExportOptions.of(layout="gguf")

    @pytest.mark.parametrize("change", [{"mlp_ratios": (4, 4, 4, 4, 3.5)}, {"head_dim": 64}])
    def test_an_encoder_that_the_loaders_cannot_build(self, change):
        with pytest.raises(OptionError, match="use --layout app"):
            mlx.vision_config(VisionConfig(**change))

    def test_core_ml_s_compute_units(self, mlx_bundle):
        with pytest.raises(OptionError, match="layout mlx and runs in MLX, leave the option out"):
            fastvlm_mlx.load(mlx_bundle, compute_units="ne")

    def test_a_tokenizer_that_leaves_no_row_for_the_placeholder(self, mlx_bundle):
        bundle = Bundle.open(mlx_bundle)
        tokenizer = Tokenizer.from_file(str(bundle.tokenizer_file))
        placeholder = tokenizer.token_to_id("<image>")
        assert placeholder_id(tokenizer, bundle) == placeholder
        text = replace(bundle.config.text, vocab_size=placeholder)
        full = replace(bundle, config=replace(bundle.config, text=text))
        with pytest.raises(BundleError, match=f"leaves none of the embedding's {placeholder} rows"):
            placeholder_id(tokenizer, full)


def test_both_templates_say_the_same_of_both_forms_of_a_message():
    """mlx-vlm hands over a string, mlx-swift-lm a list of parts."""
    text = {"role": "user", "content": "<image>\nWhat is it?"}
    parts = {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}],
    }
    ours, theirs = map(Environment().from_string, (CHAT_TEMPLATE, mlx.CHAT_TEMPLATE))
    expected = ours.render(messages=[text], add_generation_prompt=True)
    assert theirs.render(messages=[text], add_generation_prompt=True) == expected
    assert theirs.render(messages=[parts], add_generation_prompt=True) == expected
