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

from fastvlm_mlx.bundle import PACKAGE, Bundle
from fastvlm_mlx.config import IMAGE_TOKEN, MODEL_TYPE, FastVLMConfig
from fastvlm_mlx.errors import BundleError
from fastvlm_mlx.vision.package import IMAGE, INPUT_NAME, OUTPUT_NAME, Feature, PackageInfo
from model_export import llm, recipes, weights
from model_export.checkpoint import Checkpoint
from model_export.options import ExportOptions
from model_export.recipes import Scheme

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
    checkpoint: Checkpoint, chosen: Scheme, options: ExportOptions, image_token_id: int
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
        "torch_dtype": options.dtype,
    }
    if (quantization := recipes.quantization(chosen, options.layout)) is not None:
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


def write_app_configs(checkpoint: Checkpoint, config: dict[str, Any], directory: Path) -> None:
    """The JSON files beside the weights: config, preprocessor, processor, generation.

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
        "generation_config.json": checkpoint.generation_config
        or {
            key: checkpoint.raw_config[key]
            for key in ("bos_token_id", "eos_token_id")
            if key in checkpoint.raw_config
        },
    }
    for name, data in files.items():
        (directory / name).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def check_app(bundle: Bundle, info: PackageInfo) -> None:
    """Decode a bundle by the rules of the demo app's loader.

    What its Swift code asserts of the encoder is `fastvlm_mlx.vision.package.app_misfit`'s.

    Args:
        info: of the package's default function, the one that the app calls.

    Raises:
        BundleError: naming the file, the rule and what was found.
    """
    raw, config = bundle.raw_config, bundle.config
    for key, kind in APP_CONFIG.items():
        if type(raw.get(key)) is not kind:
            raise _broken(bundle, "config.json", f"{key} is {raw.get(key)!r}", kind.__name__)
    if not 0 < config.image_token_index < config.text.vocab_size:
        raise _broken(
            bundle,
            "config.json",
            f"image_token_index is {config.image_token_index}",
            f"a positive id below vocab_size {config.text.vocab_size}",
        )
    _check_weights(bundle, config)
    _check_processors(bundle)
    if bundle.package.name != PACKAGE:
        raise _broken(bundle, bundle.package.name, "another name", f"{PACKAGE}, the Swift class's")
    size, tokens = config.vision.image_size, config.vision.num_tokens
    # A picture is for apps that hand over pixel buffers, which the unmodified one does not.
    takes = IMAGE if [f.dtype for f in info.inputs] == [IMAGE] else "float32"
    _check_feature(bundle, info.inputs, INPUT_NAME, takes, (1, 3, size, size))
    features = (1, tokens, config.vision.hidden_size)
    _check_feature(bundle, info.outputs, OUTPUT_NAME, "float32", features)


def _check_weights(bundle: Bundle, config: FastVLMConfig) -> None:
    quantization = config.quantization
    if quantization is not None and (quantization.layers or quantization.default.mode != "affine"):
        raise _broken(
            bundle,
            "config.json",
            f"quantization is {bundle.raw_config['quantization']}",
            "group_size and bits alone",
        )
    shapes = {name: array.shape for name, array in bundle.tensors().items()}
    specs = weights.llm_specs(config, tied=config.text.tie_word_embeddings)
    # The loader quantizes what has scales.
    chosen = recipes.scheme_of(bundle)
    expected = {
        entry.name: entry.shape for spec in specs for entry in llm.stored(spec, chosen, "float16")
    }
    for name in sorted(expected.keys() | shapes.keys()):
        if shapes.get(name) != expected.get(name):
            raise _broken(
                bundle,
                "the .safetensors files",
                f"{name} is {list(shapes[name]) if name in shapes else 'missing'}",
                f"{list(expected[name])}" if name in expected else "no such weight",
            )


def _check_processors(bundle: Bundle) -> None:
    size = bundle.config.vision.image_size
    preprocessor, tokenizer = "preprocessor_config.json", "tokenizer_config.json"
    exact: tuple[tuple[str, str, Any], ...] = (
        (preprocessor, "processor_class", "LlavaProcessor"),
        (preprocessor, "size", {"shortest_edge": size}),
        (preprocessor, "crop_size", {"height": size, "width": size}),
        # The class that Swift's tokenizers know, unlike transformers 5's own.
        (tokenizer, "tokenizer_class", "Qwen2Tokenizer"),
    )
    for name, key, expected in exact:
        value = bundle.read_json(name).get(key)
        if value != expected:
            raise _broken(bundle, name, f"{key} is {value!r}", repr(expected))
    for key in ("image_mean", "image_std"):
        value = bundle.preprocessor_config.get(key)
        if not isinstance(value, list) or [type(v) in (int, float) for v in value] != [True] * 3:
            raise _broken(bundle, preprocessor, f"{key} is {value!r}", "three numbers")
    bundle.tokenizer()


def _check_feature(
    bundle: Bundle, features: tuple[Feature, ...], name: str, dtype: str, shape: tuple[int, ...]
) -> None:
    found = [(f.name, f.dtype, f.shape) for f in features]
    if found != [(name, dtype, shape)]:
        raise _broken(
            bundle, bundle.package.name, f"it declares {found}", f"{name}, {dtype} {list(shape)}"
        )


def _broken(bundle: Bundle, file: str, found: str, expected: str) -> BundleError:
    return BundleError(
        f"{bundle.path} can't be loaded by the demo app: in {file}, {found}, expected {expected}"
    )
