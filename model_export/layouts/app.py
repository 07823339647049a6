"""The directory layouts that other programs read: what we write, and their rules to check it by.

`app` is what Apple's demo app loads. The rules are those of `app/FastVLM/FastVLM.swift` of
apple/ml-fastvlm (Codable structs, module keys, preconditions) and of mlx-swift-examples'
`loadWeights`, which reads every `.safetensors` below the directory and takes no key it has no
module for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastvlm_mlx.bundle.bundle import PACKAGE, Bundle
from fastvlm_mlx.bundle.config import IMAGE_TOKEN, MODEL_TYPE
from fastvlm_mlx.vision.package import IMAGE, INPUT_NAME, OUTPUT_NAME, Feature, PackageInfo
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.checkpoint.tokenizer import ExportedTokenizer
from model_export.language import recipes
from model_export.language.recipes import Scheme
from model_export.layouts import rules
from model_export.layouts.rules import Entry, RuleError
from model_export.options.loaders import LOADERS

QWEN2_KEYS = (
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "rms_norm_eps",
    "rope_theta",
    "max_position_embeddings",
)
KEPT_KEYS = (
    "architectures",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "hidden_act",
    "image_aspect_ratio",
    "mm_patch_merge_type",
    "mm_vision_tower",
    "tokenizer_model_max_length",
    "tokenizer_padding_side",
    "vision_config",
)
# FastVLMConfiguration: keys without a default, and their types.
APP_CONFIG: dict[str, type] = {
    "model_type": str,
    "hidden_size": int,
    "num_hidden_layers": int,
    "intermediate_size": int,
    "num_attention_heads": int,
    "num_key_value_heads": int,
    "vocab_size": int,
    "image_token_index": int,
    "mm_hidden_size": int,
}


def app_config(
    checkpoint: Checkpoint, chosen: Scheme, layout: str, dtype: str, image_token_id: int
) -> dict[str, Any]:
    """`config.json` of an `app` bundle, and what is in both layouts' of the other."""
    config, raw = checkpoint.config, checkpoint.raw_config
    data: dict[str, Any] = {key: raw[key] for key in KEPT_KEYS if key in raw}
    data |= {key: getattr(config.text, key) for key in QWEN2_KEYS}
    data |= {
        "model_type": MODEL_TYPE,
        "image_token_index": image_token_id,
        "mm_hidden_size": config.vision.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "tie_word_embeddings": checkpoint.tied,
        "torch_dtype": dtype,
    }
    if (quantization := recipes.quantization(chosen, layout)) is not None:
        data["quantization"] = quantization.to_dict()
    return dict(sorted(data.items()))


def preprocessor_config(size: int, processor_class: str) -> dict[str, Any]:
    """`preprocessor_config.json` of either layout: FastVLM's pixels are raw, from 0 to 1."""
    return {
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.0, 0.0, 0.0],
        "image_processor_type": "CLIPImageProcessor",
        "image_std": [1.0, 1.0, 1.0],
        "processor_class": processor_class,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size},
    }


def write_app_configs(
    checkpoint: Checkpoint, tokenizer: ExportedTokenizer, config: dict[str, Any], directory: Path
) -> None:
    """Write the JSON files beside the weights: config, preprocessor, processor, generation.

    Args:
        config: from `app_config`.
    """
    size = checkpoint.config.vision.image_size
    files: dict[str, dict[str, Any]] = {
        "config.json": config,
        "preprocessor_config.json": preprocessor_config(size, "LlavaProcessor"),
        "processor_config.json": {
            "image_token": IMAGE_TOKEN,
            "num_additional_image_tokens": 0,
            "patch_size": checkpoint.config.vision.patch_size,
            "processor_class": "LlavaProcessor",
        },
        "generation_config.json": generation_config(checkpoint, tokenizer),
    }
    for name, data in files.items():
        (directory / name).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def generation_config(checkpoint: Checkpoint, tokenizer: ExportedTokenizer) -> dict[str, Any]:
    """The checkpoint's `generation_config.json`, the end of a turn among what ends an answer."""
    data = dict(checkpoint.generation_config)
    if not data:
        kept = ("bos_token_id", "eos_token_id")
        data = {key: checkpoint.raw_config[key] for key in kept if key in checkpoint.raw_config}
    found = data.get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if tokenizer.turn_end_id not in ids:
        ids = [tokenizer.turn_end_id, *ids]
        data["eos_token_id"] = ids if len(ids) > 1 else ids[0]
    return data


def check_app(bundle: Bundle, info: PackageInfo) -> None:
    """Check a bundle by the rules of the demo app's loader.

    What its Swift code asserts of the encoder is `fastvlm_mlx.vision.package.app_misfit`'s.

    Args:
        info: of the package's default function, the one that the app calls.

    Raises:
        BundleError: naming the file, the rule and what was found.
    """
    try:
        _check_app(bundle, info)
    except RuleError as broken:
        raise rules.refuse(bundle.path, LOADERS["app"].program, broken) from broken


def _check_app(bundle: Bundle, info: PackageInfo) -> None:
    config = rules.read_object(bundle.path, "config.json")
    for key, kind in APP_CONFIG.items():
        if type(config.get(key)) is not kind:
            raise RuleError(
                f"in config.json, {key} is {config.get(key)!r}, expected {kind.__name__}"
            )
    if not 0 < config["image_token_index"] < config["vocab_size"]:
        raise RuleError(
            f"in config.json, image_token_index is {config['image_token_index']}, expected a "
            f"positive id below vocab_size {config['vocab_size']}"
        )
    _check_weights(bundle.path, config)
    size = bundle.config.vision.image_size
    _check_processors(bundle.path, size)
    rules.check_end_of_turn(bundle.path)
    bundle.tokenizer()
    if bundle.package.name != PACKAGE:
        raise RuleError(
            f"the encoder is {bundle.package.name}, expected {PACKAGE}, the Swift class's"
        )
    # An image is for apps that hand over pixel buffers, which the unmodified one does not.
    takes = IMAGE if [f.dtype for f in info.inputs] == [IMAGE] else "float32"
    _check_feature(info.inputs, INPUT_NAME, takes, (1, 3, size, size))
    features = (1, bundle.config.vision.num_tokens, config["mm_hidden_size"])
    _check_feature(info.outputs, OUTPUT_NAME, "float32", features)


def _check_weights(directory: Path, config: dict[str, Any]) -> None:
    """One format for all that has scales, and every module filled."""
    found = rules.read_headers(directory)
    said, form = config.get("quantization"), None
    if said is not None:
        form = rules.quantized_form(said, "quantization")
        # What else stands there, the app does not read.
        if not said.keys() <= {"group_size", "bits", "mode"} or not LOADERS["app"].knows(form):
            raise RuleError(
                f"in config.json, quantization is {said}, expected group_size and bits alone: "
                f"{LOADERS['app'].versions} reads {LOADERS['app'].known()}"
            )
    shapes, matrices = rules.decoder_shapes(config)
    stem = "multi_modal_projector.linear_"
    of_projector = rules.projector_shapes(config, f"{stem}0", f"{stem}2")
    expected = {name: Entry("float", shape) for name, shape in (shapes | of_projector[0]).items()}
    for path in matrices | of_projector[1]:
        if form is not None and f"{path}.scales" in found:
            expected |= rules.parts(path, expected[f"{path}.weight"].shape, form)
    rules.check_entries(found, expected)


def _check_processors(directory: Path, size: int) -> None:
    preprocessor, tokenizer = "preprocessor_config.json", "tokenizer_config.json"
    exact: tuple[tuple[str, str, Any], ...] = (
        (preprocessor, "processor_class", "LlavaProcessor"),
        (preprocessor, "size", {"shortest_edge": size}),
        (preprocessor, "crop_size", {"height": size, "width": size}),
        # The class that Swift's tokenizers know, unlike transformers 5's own.
        (tokenizer, "tokenizer_class", "Qwen2Tokenizer"),
    )
    for name, key, expected in exact:
        value = rules.read_object(directory, name).get(key)
        if value != expected:
            raise RuleError(f"in {name}, {key} is {value!r}, expected {expected!r}")
    for key in ("image_mean", "image_std"):
        value = rules.read_object(directory, preprocessor).get(key)
        if not isinstance(value, list) or [type(v) in (int, float) for v in value] != [True] * 3:
            raise RuleError(f"in {preprocessor}, {key} is {value!r}, expected three numbers")


def _check_feature(
    features: tuple[Feature, ...], name: str, dtype: str, shape: tuple[int, ...]
) -> None:
    found = [(f.name, f.dtype, f.shape) for f in features]
    if found != [(name, dtype, shape)]:
        raise RuleError(f"the encoder declares {found}, expected {name}, {dtype} {list(shape)}")
