"""The rules of each destination: what they accept, and that they follow from that program alone."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from edits import edit_json, edit_weights

from fastvlm_mlx.bundle.bundle import Bundle, model_name, stored_name
from fastvlm_mlx.errors import BundleError, OptionError
from fastvlm_mlx.vision.package import describe
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.checkpoint.tokenizer import export_tokenizer
from model_export.language import recipes
from model_export.layouts import app, mlx
from model_export.options import ExportOptions, LLMOptions
from model_export.options.loaders import LOADERS

DOWN = "language_model.model.layers.0.mlp.down_proj"
EIGHT = {"bits": 8, "group_size": 64}
ADDED = {"__type": "AddedToken"}


@pytest.fixture
def mlx_copy(mlx_bundle, tmp_path):
    return Path(shutil.copytree(mlx_bundle, tmp_path / "mlx"))


def quantize(path, module, **form):
    """Store a module's weight, whole until now, in a form."""

    def edit(arrays):
        parts = mx.quantize(arrays[f"{module}.weight"], **form)
        names = [f"{module}.{part}" for part in ("weight", "scales", "biases")]
        arrays |= dict(zip(names, parts, strict=False))

    edit_weights(path, edit)


def check_mlx(path):
    mlx.check_mlx(Bundle.open(path))


def check_app(path):
    bundle = Bundle.open(path)
    app.check_app(bundle, describe(bundle.package))


@pytest.mark.parametrize(
    ("of_model", "in_mlx"),
    [
        ("multi_modal_projector.linear_0", "mm_projector.0"),
        ("multi_modal_projector.linear_2.weight", "mm_projector.2.weight"),
        ("multi_modal_projector.linear_20", "multi_modal_projector.linear_20"),
        ("language_model.lm_head", "language_model.lm_head"),
    ],
)
def test_modules_and_tensors_have_the_same_names(of_model, in_mlx):
    assert stored_name(of_model, "mlx") == in_mlx
    assert model_name(in_mlx) == of_model
    assert stored_name(of_model, "app") == of_model


class TestFormsOfModules:
    """How mlx-vlm and mlx-swift-lm read `quantization`, by paths of their own models."""

    def test_the_projector_by_its_path_there(self, mlx_copy):
        quantize(mlx_copy, "mm_projector.0", **EIGHT)
        edit_json(
            mlx_copy,
            "config.json",
            lambda data: data["quantization"].update({"mm_projector.0": EIGHT}),
        )
        check_mlx(mlx_copy)

    def test_the_projector_by_another_s_path(self, mlx_copy):
        quantize(mlx_copy, "mm_projector.0", **EIGHT)
        path = "multi_modal_projector.linear_0"
        edit_json(mlx_copy, "config.json", lambda data: data["quantization"].update({path: EIGHT}))
        with pytest.raises(BundleError, match=rf"gives {path} a form, expected a module's path"):
            check_mlx(mlx_copy)

    def test_the_projector_by_no_path(self, mlx_copy):
        quantize(mlx_copy, "mm_projector.0", **EIGHT)
        with pytest.raises(BundleError, match=r"mm_projector\.0\.weight is U32 .*128\], expected"):
            check_mlx(mlx_copy)

    @pytest.mark.parametrize(
        ("said", "words"),
        [
            # mlx-vlm quantizes a module that has a form, scales or not.
            ({"mm_projector.0": EIGHT}, r"mlx-vlm makes 8 bits .* and mlx-swift-lm none"),
            # It alone leaves the model's name out.
            ({DOWN.removeprefix("language_model."): EIGHT}, "expected a module's path"),
            ({DOWN: False}, rf"{DOWN}\.biases is F16"),
            ({DOWN: {"bits": 4}}, rf"gives {DOWN} the form .* expected bits and group_size"),
            ({DOWN: {"bits": 7, "group_size": 64}}, r"expected affine with 2, 3, 4, 5, 6 or 8"),
            ({DOWN: {"bits": 4, "group_size": 96}}, "in groups of 32, 64 or 128"),
            ({DOWN: {"bits": 4, "group_size": 32}}, rf"{DOWN}\.biases is F16 \[128, 4\], expected"),
            (
                {DOWN: {"bits": 4, "group_size": 32, "mode": "mxfp4"}},
                rf"{DOWN}\.biases is F16 .* expected no such weight",
            ),
        ],
        ids=str,
    )
    def test_what_they_can_t_build(self, mlx_copy, said, words):
        edit_json(mlx_copy, "config.json", lambda data: data["quantization"].update(said))
        # Our own reader refuses some of these before.
        with pytest.raises(Exception, match=words) as caught:
            mlx._check_weights(
                mlx.rules.read_headers(mlx_copy),
                json.loads((mlx_copy / "config.json").read_text()),
            )
        assert isinstance(caught.value, BundleError)

    @pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
    def test_scales_of_a_byte(self, mlx_copy, mode):
        (bits,), (group_size,) = LOADERS["mlx"].forms[mode]
        form = {"bits": bits, "group_size": group_size, "mode": mode}
        quantize(mlx_copy, "mm_projector.2", **form)
        edit_json(
            mlx_copy,
            "config.json",
            lambda data: data["quantization"].update({"mm_projector.2": form}),
        )
        check_mlx(mlx_copy)
        edit_weights(
            mlx_copy,
            lambda a: a.update(
                {"mm_projector.2.scales": a["mm_projector.2.scales"].astype(mx.float16)}
            ),
        )
        with pytest.raises(BundleError, match=r"scales is F16 .*, expected U8"):
            check_mlx(mlx_copy)


class TestBitsThatTheAppLacks:
    """MLX has 5 bits since 0.26, and the app builds with mlx-swift 0.21."""

    @pytest.mark.parametrize("option", ["llm_bits", "embed_bits", "head_bits", "projector_bits"])
    def test_as_an_option(self, option):
        name = f"--{option.replace('_', '-')}"
        words = (
            rf"app can't hold 5 bits .*\({name}\): the demo app \(mlx-swift 0\.21.* --layout mlx"
        )
        with pytest.raises(OptionError, match=words):
            ExportOptions.of(**{option: 5})
        assert ExportOptions.of(layout="mlx", **{option: 5}).flat()[option] == 5

    def test_as_a_mode(self):
        with pytest.raises(OptionError, match=r"can't hold mxfp4 .*\(--llm-mode\).* --layout mlx"):
            ExportOptions.of(llm_mode="mxfp4")

    def test_in_a_recipe(self, demo_checkpoint, tmp_path):
        recipe = tmp_path / "recipe.json"
        recipe.write_text(json.dumps({"*": 5}))
        checkpoint = Checkpoint(demo_checkpoint)
        with pytest.raises(OptionError, match="layout app can't hold 5 bits"):
            recipes.scheme(
                checkpoint.llm_specs, checkpoint.config, LLMOptions(recipe=str(recipe)), "app"
            )

    def test_in_a_bundle(self, bundle_copy):
        (bundle_copy / "manifest.json").unlink()
        edit_json(bundle_copy, "config.json", lambda data: data["quantization"].update(bits=5))
        with pytest.raises(BundleError, match=r"mlx-swift 0\.21\.2 .* reads affine with 2, 3, 4"):
            check_app(bundle_copy)


class TestEndOfTurn:
    """What ends an answer is the end of a turn; the app asks the tokenizer's `eos_token` alone."""

    @pytest.mark.parametrize("said", ["<|endoftext|>", ADDED | {"content": "<|endoftext|>"}])
    def test_another_is_replaced_and_told(self, edit_checkpoint, said):
        path = edit_checkpoint()
        edit_json(path, "tokenizer_config.json", lambda data: data.update(eos_token=said))
        made = export_tokenizer(Checkpoint(path))
        assert made.config["eos_token"] == "<|im_end|>"
        assert made.turn_end_id == 430
        (note,) = made.notes
        assert "has eos_token <|endoftext|>" in note
        assert "the bundle says <|im_end|>" in note

    @pytest.mark.parametrize("said", [None, "<|im_end|>", ADDED | {"content": "<|im_end|>"}])
    def test_the_right_one_is_nothing_to_tell(self, edit_checkpoint, said):
        path = edit_checkpoint()
        edit_json(path, "tokenizer_config.json", lambda data: data.update(eos_token=said))
        made = export_tokenizer(Checkpoint(path))
        assert (made.config["eos_token"], made.notes) == ("<|im_end|>", ())

    @pytest.mark.parametrize(
        ("said", "written"), [(428, [430, 428]), ([428, 430], [428, 430]), (None, 430)]
    )
    def test_generation_config_has_it(self, edit_checkpoint, said, written):
        path = edit_checkpoint()
        edit_json(path, "generation_config.json", lambda data: data.update(eos_token_id=said))
        checkpoint = Checkpoint(path)
        found = app.generation_config(checkpoint, export_tokenizer(checkpoint))
        assert found["eos_token_id"] == written

    def test_the_rules_refuse_another(self, bundle_copy, mlx_copy):
        for path, check in ((bundle_copy, check_app), (mlx_copy, check_mlx)):
            check(path)
            edit_json(
                path, "tokenizer_config.json", lambda data: data.update(eos_token="<|endoftext|>")
            )
            with pytest.raises(BundleError, match=r"has eos_token '<\|endoftext\|>', expected"):
                check(path)

    def test_the_rules_refuse_another_id(self, mlx_copy):
        edit_json(mlx_copy, "config.json", lambda data: data.update(eos_token_id=428))
        with pytest.raises(BundleError, match="eos_token_id is 428, expected 430"):
            check_mlx(mlx_copy)


class TestTheEncoderThatTheAppCalls:
    """Its generated class has `images` and `image_features`, in these types and shapes."""

    @pytest.mark.parametrize(
        ("side", "change", "words"),
        [
            ("inputs", {"name": "image"}, r"'image', .* expected images, float32 \[1, 3, 256, 256"),
            ("inputs", {"dtype": "float16"}, "float16.* expected images, float32"),
            ("inputs", {"shape": (1, 3, 512, 512)}, r"512.* expected images, float32"),
            ("outputs", {"name": "features"}, "'features', .* expected image_features, float32"),
            ("outputs", {"dtype": "float16"}, "float16.* expected image_features, float32"),
            ("outputs", {"shape": (1, 64, 768)}, r"64.* expected image_features, float32 \[1, 16"),
        ],
        ids=str,
    )
    def test_another_one_is_refused(self, demo_bundle, side, change, words):
        bundle = Bundle.open(demo_bundle)
        info = describe(bundle.package)
        app.check_app(bundle, info)
        (declared,) = getattr(info, side)
        other = replace(info, **{side: (replace(declared, **change),)})
        with pytest.raises(BundleError, match=rf"the encoder declares \[\(.*{words}"):
            app.check_app(bundle, other)
        with pytest.raises(BundleError, match=r"declares \[\(.*\), \(.*\)\], expected"):
            app.check_app(bundle, replace(info, **{side: (declared, declared)}))
