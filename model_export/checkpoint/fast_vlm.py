"""Translate transformers' `fast_vlm` configuration to `llava_qwen2`: it is the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastvlm_mlx.bundle.config import MODEL_TYPE, VisionConfig
from fastvlm_mlx.errors import CheckpointError, ConfigError
from model_export.checkpoint.settings import ROPE_THETA, check_settings
from model_export.checkpoint.weights.weight_files import read_json

ARCHITECTURE = "fastvit_mci3"
# What timm's fastvit_mci3 may be built with, under the names of VisionConfig.
SHAPE_ARGUMENTS = (
    "layers",
    "embed_dims",
    "mlp_ratios",
    "token_mixers",
    "repmixer_kernel_size",
    "down_patch_size",
    "down_stride",
    "cls_ratio",
)
# Arguments that change no tensor of the encoder and nothing that it computes at inference.
IGNORED_ARGUMENTS = (
    "inference_mode",
    "num_classes",
    "global_pool",
    "drop_rate",
    "proj_drop_rate",
    "drop_path_rate",
    "layer_scale_init_value",
)
# Qwen2Config's own: transformers leaves values out of config.json that equal them.
QWEN2_DEFAULTS: dict[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 22_016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "rope_theta": ROPE_THETA,
}
# What must be as FastVLM has it, where it is stated.
FIXED: dict[str, tuple[Any, ...]] = {
    "projector_hidden_act": ("gelu",),
    "multimodal_projector_bias": (True,),
    "vision_feature_layer": (-1,),
    "vision_feature_select_strategy": ("full",),
}


def apple_config(raw: dict[str, Any], directory: Path) -> dict[str, Any]:
    """`config.json` of a `fast_vlm` checkpoint as the one of a `llava_qwen2` checkpoint.

    `image_aspect_ratio` is set to FastVLM's own "pad": transformers' configuration has no word for
    it, and the weights were trained with it.

    Raises:
        ConfigError: another encoder, language model or projector than FastVLM's.
    """
    for key, allowed in FIXED.items():
        if raw.get(key, allowed[0]) not in allowed:
            raise ConfigError(
                f"config.json: {key} is {raw[key]!r}, expected {allowed[0]!r}, FastVLM's"
            )
    text = _section(raw, "text_config")
    if text.get("model_type", "qwen2") != "qwen2":
        raise ConfigError(
            f"config.json: text_config.model_type is {text['model_type']!r}: expected qwen2, "
            "FastVLM's"
        )
    check_settings({k: v for k, v in text.items() if k != "model_type"}, "config.json: text_config")
    vision = _vision(_section(raw, "vision_config"), _image_size(directory))
    stated = {k: v for k, v in text.items() if k != "model_type" and v is not None}
    if isinstance(stated.get("rope_parameters"), dict):
        stated.setdefault("rope_theta", stated["rope_parameters"].get("rope_theta", ROPE_THETA))
    ids = {k: raw[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if raw.get(k)}
    if "eos_token_id" not in {**stated, **ids} and (end := _end_of_turn(directory)) is not None:
        ids["eos_token_id"] = end
    return {
        **QWEN2_DEFAULTS,
        **stated,
        **ids,
        "model_type": MODEL_TYPE,
        "architectures": ["LlavaQwen2ForCausalLM"],
        "torch_dtype": raw.get("dtype") or raw.get("torch_dtype"),
        "image_aspect_ratio": raw.get("image_aspect_ratio", "pad"),
        "mm_hidden_size": vision.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": f"mobileclip_l_{vision.image_size}",
        "vision_config": vision.to_dict(),
    }


def _end_of_turn(directory: Path) -> int | None:
    """The id that ends an answer by the tokenizer, which programs look for in config.json."""
    files = [directory / name for name in ("tokenizer_config.json", "tokenizer.json")]
    if not all(file.is_file() for file in files):
        return None
    config, tokenizer = (read_json(file) for file in files)
    end = config.get("eos_token")
    content = end.get("content") if isinstance(end, dict) else end
    added = tokenizer.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and token.get("content") == content:
            found = token.get("id")
            return found if type(found) is int else None
    return None


def _section(raw: dict[str, Any], key: str) -> dict[str, Any]:
    section = raw.get(key)
    if not isinstance(section, dict):
        raise ConfigError(f"config.json: {key} is {section!r}, expected a JSON object: correct it")
    return section


def _vision(raw: dict[str, Any], image_size: int) -> VisionConfig:
    architecture = str(raw.get("architecture", ARCHITECTURE))
    if architecture.partition(".")[0] != ARCHITECTURE:
        raise ConfigError(
            f"config.json: vision_config.architecture is {architecture!r}: expected "
            f"{ARCHITECTURE}, timm's name "
            "of FastVLM's encoder"
        )
    arguments = raw.get("model_args") or {}
    if not isinstance(arguments, dict):
        raise ConfigError(
            f"config.json: vision_config.model_args is {arguments!r}: expected a JSON object"
        )
    if unknown := sorted(set(arguments) - {*SHAPE_ARGUMENTS, *IGNORED_ARGUMENTS}):
        raise ConfigError(
            f"config.json: vision_config.model_args holds {unknown[0]}, which FastVLM's "
            "encoder does not have: "
            f"expected {', '.join(SHAPE_ARGUMENTS)} at most"
        )
    if not arguments.get("inference_mode", True):
        raise ConfigError(
            "vision_config.model_args.inference_mode is false: expected an encoder with its "
            "branches merged, call timm's reparameterize_model and save again"
        )
    shape = {key: arguments[key] for key in SHAPE_ARGUMENTS if key in arguments}
    return VisionConfig.from_dict({**shape, "image_size": image_size})


def _image_size(directory: Path) -> int:
    """The input size that the checkpoint's processor makes; 1024 where there is none.

    `image_seq_length` of config.json is not asked: its default, 576, is another model's.
    """
    for name in ("preprocessor_config.json", "processor_config.json"):
        file = directory / name
        data = read_json(file) if file.is_file() else {}
        data = data.get("image_processor", data)
        for key in ("crop_size", "size"):
            size = data.get(key) if isinstance(data, dict) else None
            if isinstance(size, dict):
                size = size.get("shortest_edge", size.get("height"))
            if size is None:
                continue
            if type(size) is not int or size <= 0:
                raise CheckpointError(
                    f"{file}: {key} is {data[key]!r}, expected a size in pixels: correct it"
                )
            return size
    return 1024
