"""The name mapping: every source tensor used, every parameter filled, anything else named."""

from functools import cache
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlm_mlx.bundle.config import FastVLMConfig, TextConfig, VisionConfig
from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.language.model import Model
from model_export.checkpoint.names import (
    ENCODER_PREFIX,
    TIMM,
    TRANSFORMERS,
    TensorSpec,
    check_names,
    encoder_specs,
    from_transformers,
    is_unused,
    llm_specs,
)
from model_export.encoder import fastvithd, reference
from model_export.encoder.package_size import _convolutions

QWEN2_05B = TextConfig(
    hidden_size=896,
    num_hidden_layers=24,
    intermediate_size=4864,
    num_attention_heads=14,
    num_key_value_heads=2,
    vocab_size=151_936,
    tie_word_embeddings=True,
)
# Other sizes in every part, other kernels, two stages of attention in other places.
OTHER = VisionConfig(
    image_size=128,
    layers=(1, 2, 1, 2, 1),
    embed_dims=(16, 32, 32, 64, 128),
    mlp_ratios=(4, 3, 2, 4, 3),
    token_mixers=("repmixer", "repmixer", "attention", "repmixer", "attention"),
    pos_embs_shapes=(None, 5, None, 7, None),
    repmixer_kernel_size=5,
)


def fastvlm(text: TextConfig) -> FastVLMConfig:
    return FastVLMConfig(text, VisionConfig(), "pad", 151_646, "float16", None)


@cache
def source_names(text: TextConfig, tied: bool) -> dict[str, tuple[int, ...]]:
    specs = encoder_specs(VisionConfig()) + llm_specs(fastvlm(text), tied=tied)
    return {spec.source: spec.shape for spec in specs}


def encoder(name: str) -> str:
    return name.removeprefix(ENCODER_PREFIX)


def test_all_629_encoder_tensors_have_a_parameter():
    specs = encoder_specs(VisionConfig())
    assert len(specs) == 629
    assert sum(spec.name.endswith("num_batches_tracked") for spec in specs) == 44
    used = [spec for spec in specs if not is_unused(spec.name)]
    assert len(used) == 629 - 44 - 1
    assert specs[0].source == (
        "model.vision_tower.vision_tower.model.patch_embed.0.reparam_conv.weight"
    )


@pytest.mark.parametrize("vision", [VisionConfig(), OTHER], ids=["released", "other"])
def test_the_encoder_is_listed_as_torch_s_modules_are(vision):
    with torch.device("meta"):
        state, folded = reference.FastViTHD(vision).state_dict(), fastvithd.FastViTHD(vision)
    listed = [(spec.name, spec.shape) for spec in encoder_specs(vision)]
    assert listed == [(name, tuple(tensor.shape)) for name, tensor in state.items()]
    counted = sum(prod(shape) + shape[0] for shape in _convolutions(vision))
    assert counted == sum(p.numel() for p in folded.parameters())


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
    specs = llm_specs(fastvlm(small), tied=tied)
    assert {spec.name: spec.shape for spec in specs} == expected


def test_names_that_fit_pass():
    found = source_names(QWEN2_05B, tied=True)
    specs = encoder_specs(VisionConfig()) + llm_specs(fastvlm(QWEN2_05B), tied=True)
    check_names(found, specs)
    check_names({**found, "model.layers.0.self_attn.rotary_emb.inv_freq": (32,)}, specs)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_tensor_missing_extra_or_misshapen_is_named(data):
    found = dict(source_names(QWEN2_05B, tied=False))
    specs = [TensorSpec(n, encoder(n), shape) for n, shape in found.items()]
    damage = data.draw(st.sampled_from(["missing", "extra", "shape"]))
    # What no computation uses may be missing: transformers' layout has no classification head.
    names = [n for n in sorted(found) if damage != "missing" or not is_unused(encoder(n))]
    name = data.draw(st.sampled_from(names))
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
        check_names(found, specs)


def test_every_name_of_transformers_is_a_different_one_of_apple_s():
    """The table, over the names that timm's fastvit_mci3 and transformers' Qwen2 have."""
    vision = VisionConfig()
    targets = {s.source: s for s in encoder_specs(vision)}
    found = set()
    for stage, blocks in enumerate(vision.layers):
        attention = vision.token_mixers[stage] == "attention"
        names = [f"downsample.proj.{p}" for p in ("0.reparam_conv", "1.reparam_conv")] * (stage > 0)
        names += ["pos_emb.reparam_conv"] * attention
        for block in range(blocks):
            parts = ["mlp.conv.bn", "mlp.fc1", "mlp.fc2"]
            parts += ["norm", "token_mixer.proj"] if attention else ["token_mixer.reparam_conv"]
            names += [f"blocks.{block}.{part}" for part in parts]
            scales = ("layer_scale_1", "layer_scale_2") if attention else ("layer_scale",)
            gammas = [f"blocks.{block}.{scale}.gamma" for scale in scales]
            found |= {from_transformers(f"{TIMM}stages.{stage}.{g}", vision) for g in gammas}
        for name in names:
            for part in ("weight", "bias"):
                apple = from_transformers(f"{TIMM}stages.{stage}.{name}.{part}", vision)
                assert apple in targets, (stage, name)
                found.add(apple)
    for name in ("stem.0.reparam_conv", "final_conv.reparam_conv", "final_conv.se.fc2"):
        found.add(from_transformers(f"{TIMM}{name}.weight", vision))
    assert found <= set(targets)
    blocks = sum(vision.layers)
    attention = sum(vision.layers[3:])
    assert len(found) == 2 * (8 + 2) + blocks * 6 + (blocks - attention) * 3 + attention * 6 + 3


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=20), st.sampled_from(["", TIMM, TIMM + "stages."]))
def test_any_other_name_has_none(name, prefix):
    known = tuple(source for source, _ in TRANSFORMERS)
    found = from_transformers(prefix + name, VisionConfig())
    assert found is None or (prefix + name).startswith(known) or "." in name


def test_an_extra_tensor_comes_with_the_nearest_known_name():
    found = source_names(QWEN2_05B, tied=True) | {"model.mm_projector.0.weights": (896, 3072)}
    specs = encoder_specs(VisionConfig()) + llm_specs(fastvlm(QWEN2_05B), tied=True)
    with pytest.raises(
        CheckpointError, match=r"nearest known name: model\.mm_projector\.0\.weight"
    ):
        check_names(found, specs)
