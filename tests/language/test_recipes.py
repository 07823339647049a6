"""Which matrix is stored how: the choices, what each layout can hold, and bundles made of them."""

import json

import mlx.core as mx
import pytest

import fastvlm_mlx
from fastvlm_mlx.bundle.bundle import Bundle
from fastvlm_mlx.bundle.quantization import Format, Quantization
from fastvlm_mlx.errors import OptionError
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.gates import verify
from model_export.language import recipes
from model_export.options import RECIPES, ExportOptions, LLMOptions
from model_export.pipeline import export
from model_export.presets import PRESETS

LAYER = "language_model.model.layers."
QUESTION = "Describe the image."


@pytest.fixture(scope="module")
def checkpoint(demo_checkpoint):
    return Checkpoint(demo_checkpoint)


def scheme(checkpoint, **options):
    asked = ExportOptions.of(**options)
    return recipes.scheme(
        checkpoint.llm_specs, checkpoint.config, asked.llm, asked.destination.layout
    )


def test_parts_have_their_own_bits(checkpoint):
    chosen = scheme(checkpoint, llm_bits=4, embed_bits=8, projector_bits=6, layout="mlx")
    assert chosen[recipes.EMBEDDING] == Format(8, 64)
    assert {chosen[path] for path in chosen if path.startswith(recipes.PROJECTOR)} == {
        Format(6, 64)
    }
    assert {chosen[path] for path in chosen if LAYER in path} == {Format(4, 64)}
    assert scheme(checkpoint, llm_bits=4, embed_bits=16)[recipes.EMBEDDING] is None
    chosen = scheme(checkpoint, llm_mode="nvfp4", embed_bits=5, layout="mlx")
    assert chosen[LAYER + "0.mlp.up_proj"] == Format(4, 16, "nvfp4")
    assert chosen[recipes.EMBEDDING] == Format(5, 64)


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        ({"llm_bits": 16}, 16),
        ({"llm_bits": 8}, 8),
        ({"llm_mode": "mxfp8"}, 8),
        # Three of 128 × 256 at 8 bits; at 4 two of 128 × 128 and two of 64 × 128.
        ({"llm_bits": 4, "recipe": "mlp"}, 6),
    ],
)
def test_the_layers_bits_are_their_mean(checkpoint, tmp_path, options, bits):
    """Of the embedding and the projector nothing counts."""
    if "recipe" in options:
        options["recipe"] = str(tmp_path / "recipe.json")
        (tmp_path / "recipe.json").write_text('{"*.mlp.*": 8, "*.embed_tokens": 2}')
    chosen = scheme(checkpoint, **options, layout="mlx")
    assert recipes.layer_bits(chosen, checkpoint.llm_specs) == bits


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_by_name_are_mlx_lm_s(checkpoint, name):
    """Held to what mlx-lm's convert does to the same language model."""
    import mlx.nn as nn
    from mlx_lm.convert import mixed_quant_predicate_builder

    from fastvlm_mlx.language.model import Model

    model = Model(checkpoint.config).language_model
    predicate = mixed_quant_predicate_builder(name, model, 32)
    nn.quantize(
        model,
        32,
        4,
        class_predicate=lambda p, m: predicate(p, m) if hasattr(m, "to_quantized") else False,
    )
    chosen = scheme(checkpoint, recipe=name, group_size=32, layout="mlx")
    found = {
        recipes.PREFIX + path: Format(module.bits, module.group_size)
        for path, module in model.named_modules()
        if hasattr(module, "bits")
    }
    assert found == {path: form for path, form in chosen.items() if "projector" not in path}
    assert len(set(found.values())) == 2


def test_a_recipe_file(checkpoint, tmp_path):
    file = tmp_path / "recipe.json"
    file.write_text(
        json.dumps(
            {
                "*.mlp.*": 3,
                "model.layers.0.*": {"bits": 8, "group_size": 32},
                "*.v_proj": {"mode": "mxfp8"},
                "language_model.model.layers.1.mlp.down_proj": 16,
                "multi_modal_projector.linear_2": False,
            }
        )
    )
    chosen = scheme(checkpoint, llm_bits=4, recipe=str(file), layout="mlx")
    assert chosen[LAYER + "1.mlp.up_proj"] == Format(3, 64)
    assert chosen[LAYER + "0.mlp.up_proj"] == Format(8, 32)
    assert chosen[LAYER + "0.self_attn.v_proj"] == Format(8, 32, "mxfp8")
    assert chosen[LAYER + "1.mlp.down_proj"] is None
    assert chosen[LAYER + "1.self_attn.q_proj"] == Format(4, 64)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            {"model.layers.0.mlp.dawn_proj": 4},
            r"dawn_proj.*nearest.*model\.layers\.0\.mlp\.down_proj",
        ),
        ({"model.layers.99.*": 4}, r"layers\.99"),
        ({"lm_head": 4}, "lm_head, which no layer is called"),
        ({"*": 7}, r"\* is 7, expected one of affine"),
        ({"*": "4"}, "expected bits, or an object"),
        ({"*": {"bits": 4, "groups": 32}}, "expected bits, or an object"),
        ({"*": {"mode": "mxfp4", "bits": 8}}, "expected one of affine"),
        ({"*": True}, "expected"),
        ([1], "holds a list"),
    ],
)
def test_what_a_recipe_file_can_have_wrong(checkpoint, tmp_path, content, words):
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(content))
    with pytest.raises(OptionError, match=words):
        scheme(checkpoint, recipe=str(file), layout="mlx")


def test_a_recipe_that_is_not_there(checkpoint, tmp_path):
    with pytest.raises(OptionError, match=r"no file and no recipe by name.*mixed_4_6"):
        scheme(checkpoint, recipe="mixed_5_6", layout="mlx")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(OptionError, match="can't be read as JSON"):
        scheme(checkpoint, recipe=str(tmp_path / "bad.json"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"llm_bits": 4, "embed_bits": 8}, "layout app can't hold 4 bits .* and 8 bits"),
        ({"llm_mode": "mxfp4"}, "layout app can't hold mxfp4"),
        ({"head_bits": 8}, "head is its embedding: use --embed-bits"),
        ({"llm_mode": "mxfp4", "llm_bits": 8}, "--llm-bits is 8 with mxfp4: expected one of 4"),
        ({"llm_mode": "nvfp4", "group_size": 64}, "--group-size is 64 with nvfp4"),
        ({"llm_mode": "int4"}, "--llm-mode is int4: expected one of affine, mxfp4"),
        ({"llm_bits": 0}, "--llm-bits is 0"),
        ({"projector_bits": 7}, "--projector-bits is 7"),
        ({"embed_bits": 1}, "--embed-bits is 1"),
    ],
)
def test_choices_that_are_refused(checkpoint, options, words):
    with pytest.raises(OptionError, match=words):
        scheme(checkpoint, **options)


def test_a_width_that_the_group_size_does_not_divide_is_refused(checkpoint):
    from dataclasses import replace

    specs = [
        replace(spec, shape=(spec.shape[0], 96)) if "down_proj" in spec.name else spec
        for spec in checkpoint.llm_specs
    ]
    with pytest.raises(
        OptionError, match=r"0\.mlp\.down_proj is 96 wide.*size 64: use --group-size 32"
    ):
        recipes.scheme(specs, checkpoint.config, LLMOptions(), "app")
    recipes.scheme(specs, checkpoint.config, LLMOptions(bits=16), "app")


def test_what_config_json_says_is_read_back():
    said = Quantization(Format(4, 64), {"a": Format(8, 32), "b": None, "c": Format(4, 32, "mxfp4")})
    assert Quantization.from_dict(json.loads(json.dumps(said.to_dict()))) == said
    assert said.to_dict()["b"] is False


@pytest.fixture(scope="module")
def scene(demo_checkpoint):
    from model_export.samples import scenes

    return scenes.generate(18, held_out=True).draw(256)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"llm_mode": "mxfp4"}, marks=pytest.mark.slow),
        pytest.param({"llm_mode": "mxfp8", "projector_bits": 8}, marks=pytest.mark.slow),
        pytest.param({"llm_mode": "nvfp4", "embed_bits": 6}, marks=pytest.mark.slow),
        {"recipe": "mixed_4_6", "projector_bits": 8},
    ],
    ids=str,
)
def test_mixed_bundles_answer(demo_checkpoint, demo_bundle, tmp_path, scene, options):
    """Exported with every gate, loaded by our runtime and by mlx-lm's rules, same text."""
    out = tmp_path / "bundle"
    made = export(demo_checkpoint, out, ExportOptions.of(layout="mlx", **options))
    bundle = Bundle.open(out)
    assert recipes.scheme_of(bundle) == {
        path: form and Format(**form) for path, form in made.manifest["llm"]["formats"].items()
    }
    expected = fastvlm_mlx.load(demo_bundle).generate(scene, QUESTION, max_tokens=48).text
    assert fastvlm_mlx.load(out).generate(scene, QUESTION, max_tokens=48).text == expected
    _, gates = verify.verify(out, demo_checkpoint, {}, lambda stage, done: None)
    assert [g.value for g in gates] == [pytest.approx(g.value) for g in made.gates]


def test_an_app_bundle_with_a_whole_embedding(demo_checkpoint, tmp_path, scene):
    out = tmp_path / "bundle"
    export(demo_checkpoint, out, ExportOptions.of(llm_bits=4, embed_bits=16))
    names = mx.load(str(out / "model.safetensors"))
    assert recipes.EMBEDDING + ".scales" not in names
    assert json.loads((out / "config.json").read_text())["quantization"] == {
        "group_size": 64,
        "bits": 4,
    }
    assert fastvlm_mlx.load(out).generate(scene, QUESTION, max_tokens=8).text


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_options_with_names(name):
    made = ExportOptions.of(preset=name)
    assert made.preset == name
    assert {key: made.flat()[key] for key in PRESETS[name]} == PRESETS[name]
    ExportOptions.of(preset=name, layout="mlx")


def test_what_is_given_beside_a_preset_counts():
    made = ExportOptions.of(preset="phone", encoder_precision="int8", llm_bits=6)
    assert (made.encoder.precision, made.llm.bits, made.llm.method) == ("int8", 6, "gptq")
    made = ExportOptions.of(preset="phone", llm_mode="mxfp4", layout="mlx")
    assert (made.llm.mode, made.llm.resolved_bits, made.llm.method) == ("mxfp4", 4, "rtn")
    with pytest.raises(OptionError, match="--preset is tiny: expected one of phone"):
        ExportOptions.of(preset="tiny")


@pytest.mark.parametrize("name", ["phone", pytest.param("balanced", marks=pytest.mark.slow)])
def test_presets_pass_their_own_limits(demo_checkpoint, demo_bundle, tmp_path, scene, name):
    out = tmp_path / "bundle"
    made = export(demo_checkpoint, out, ExportOptions.of(preset=name))
    assert made.manifest["options"]["preset"] == name
    assert made.manifest["gates_passed"]
    limits = {gate["name"]: gate["limit"] for gate in made.manifest["gates"]}
    assert limits["KL divergence"] == PRESETS[name]["max_kl_nats"]
    llm = made.manifest["llm"]
    if "calibration" in llm:
        # What the method made, if the bundle has it, is recorded by hash.
        assert bool(llm["tensors"]) == (llm["calibration"]["method"] == "gptq")
    expected = fastvlm_mlx.load(demo_bundle).generate(scene, QUESTION, max_tokens=48).text
    assert fastvlm_mlx.load(out).generate(scene, QUESTION, max_tokens=48).text == expected
