"""The name mapping: every source tensor used, every parameter filled, anything else named."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlm_mlx.config import FastVLMConfig, TextConfig, VisionConfig
from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.model import Model
from model_export import weights
from model_export.reference import FastViTHD

QWEN2_05B = TextConfig(
    hidden_size=896,
    num_hidden_layers=24,
    intermediate_size=4864,
    num_attention_heads=14,
    num_key_value_heads=2,
    vocab_size=151_936,
    tie_word_embeddings=True,
)


def fastvlm(text: TextConfig) -> FastVLMConfig:
    return FastVLMConfig(text, VisionConfig(), "pad", 151_646, "float16", None)


def source_names(text: TextConfig, tied: bool) -> dict[str, tuple[int, ...]]:
    specs = weights.encoder_specs(VisionConfig()) + weights.llm_specs(fastvlm(text), tied=tied)
    return {spec.source: spec.shape for spec in specs}


def test_all_629_encoder_tensors_have_a_parameter():
    specs = weights.encoder_specs(VisionConfig())
    assert len(specs) == 629
    assert sum(spec.name.endswith("num_batches_tracked") for spec in specs) == 44
    used = [spec for spec in specs if not weights.is_unused(spec.name)]
    assert len(used) == 629 - 44 - 1
    assert FastViTHD.__name__ == "FastViTHD"
    assert specs[0].source == (
        "model.vision_tower.vision_tower.model.patch_embed.0.reparam_conv.weight"
    )


@pytest.mark.parametrize("tied", [True, False])
def test_the_llm_specs_fill_the_mlx_model_exactly(tied):
    from dataclasses import replace

    from mlx.utils import tree_flatten

    small = replace(
        QWEN2_05B,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_hidden_layers=3,
        vocab_size=100,
        tie_word_embeddings=tied,
    )
    expected = {n: tuple(a.shape) for n, a in tree_flatten(Model(fastvlm(small)).parameters())}
    specs = weights.llm_specs(fastvlm(small), tied=tied)
    assert {spec.name: spec.shape for spec in specs} == expected


def test_names_that_fit_pass():
    found = source_names(QWEN2_05B, tied=True)
    specs = weights.encoder_specs(VisionConfig()) + weights.llm_specs(fastvlm(QWEN2_05B), tied=True)
    weights.check_names(found, specs)
    weights.check_names({**found, "model.layers.0.self_attn.rotary_emb.inv_freq": (32,)}, specs)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_tensor_missing_extra_or_misshapen_is_named(data):
    found = source_names(QWEN2_05B, tied=False)
    specs = weights.encoder_specs(VisionConfig()) + weights.llm_specs(
        fastvlm(QWEN2_05B), tied=False
    )
    name = data.draw(st.sampled_from(sorted(found)))
    damage = data.draw(st.sampled_from(["missing", "extra", "shape"]))
    if damage == "missing":
        del found[name]
        if name == "lm_head.weight":
            # Its absence is told by the caller, which then asks for the tied table.
            found[name] = (1, 1)
    elif damage == "extra":
        name += "_extra"
        found[name] = (1,)
    else:
        found[name] = (*found[name], 7)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        weights.check_names(found, specs)


def test_an_extra_tensor_comes_with_the_nearest_known_name():
    found = source_names(QWEN2_05B, tied=True) | {"model.mm_projector.0.weights": (896, 3072)}
    specs = weights.encoder_specs(VisionConfig()) + weights.llm_specs(fastvlm(QWEN2_05B), tied=True)
    with pytest.raises(
        CheckpointError, match=r"nearest known name: model\.mm_projector\.0\.weight"
    ):
        weights.check_names(found, specs)
