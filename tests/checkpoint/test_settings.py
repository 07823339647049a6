"""config.json of a checkpoint: what is said there is done, or refused by name."""

import json

import pytest

from fastvlm_mlx.errors import ConfigError
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.checkpoint.settings import check_settings

# The keys that LLaVA's training writes beside Qwen2's numbers, with FastVLM's values.
TRAINED = {
    "_name_or_path": "checkpoint",
    "architectures": ["LlavaQwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "freeze_mm_mlp_adapter": False,
    "hidden_act": "silu",
    "image_aspect_ratio": "pad",
    "image_grid_pinpoints": None,
    "initializer_range": 0.02,
    "max_window_layers": 24,
    "mm_hidden_size": 3072,
    "mm_patch_merge_type": "flat",
    "mm_projector_lr": None,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "mobileclip_l_1024",
    "sliding_window": 32768,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.39.3",
    "tune_mm_mlp_adapter": False,
    "unfreeze_mm_vision_tower": True,
    "use_cache": True,
    "use_mm_proj": True,
    "use_sliding_window": False,
}


def test_what_llava_s_training_writes_is_known():
    check_settings(TRAINED, "config.json")


def test_what_transformers_writes_of_a_qwen2_is_known():
    """Whatever the installed release writes, its defaults included."""
    from transformers import Qwen2Config

    written = Qwen2Config(num_hidden_layers=2).to_dict()
    check_settings({k: v for k, v in written.items() if k != "model_type"}, "config.json")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("hidden_act", "gelu", "expected 'silu'"),
        ("use_sliding_window", True, "expected False"),
        ("mm_use_im_start_end", True, "expected False"),
        ("mm_projector_type", "mlp3x_gelu", "expected 'mlp2x_gelu'"),
        ("mm_projector_type", ["linear"], "expected 'mlp2x_gelu'"),
        ("quantization_config", {"bits": 4}, "expected None"),
        ("attention_bias", False, "expected True"),
        ("layer_types", ["full_attention", "sliding_attention"], "other than full_attention"),
        ("layer_types", 3, "other than full_attention"),
        ("head_dim", 48, "expected hidden_size over num_attention_heads"),
        ("hiden_act", "gelu", "no setting .* nearest known one is hidden_act"),
        ("logit_softcap", 30.0, "no setting of FastVLM that is known"),
    ],
)
def test_what_would_be_another_model(edit_checkpoint, key, value, words):
    path = edit_checkpoint(config=lambda data: data.update({key: value}))
    with pytest.raises(ConfigError, match=rf"config\.json.*{key}.*{words}"):
        Checkpoint(path)


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({"rope_theta": 5e5}, 5e5),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5),
        ({"rope_parameters": {"rope_type": "default"}}, 10_000),
        ({}, 10_000),
    ],
)
def test_rope_s_base_is_transformers_where_none_is_stated(edit_checkpoint, stated, expected):
    from transformers import Qwen2Config

    def change(data):
        data.pop("rope_theta", None)
        data.update(stated)

    path = edit_checkpoint(config=change)
    assert Checkpoint(path).config.text.rope_theta == expected
    ours = json.loads((path / "config.json").read_text())
    theirs = Qwen2Config(**{k: ours[k] for k in ("rope_theta", "rope_parameters") if k in ours})
    assert theirs.rope_parameters["rope_theta"] == expected
