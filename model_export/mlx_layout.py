"""The `mlx` layout: what mlx-vlm and mlx-swift-lm load, and their rules to check it by.

The rules are those of mlx-vlm 0.7.10 (`models/fastvlm/`, `utils.py: load_model`) and of
mlx-swift-lm at 0c92cf070e48 (`Libraries/MLXVLM/Models/FastVLM.swift`, and `Qwen2VL.swift` for the
language model's keys). The first takes the encoder's shape from its own code and not from
`vision_config`; the second decodes every key of it, and its projector, like the first's, counts
the activation between the two products as a layer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastvlm_mlx.bundle import Bundle
from fastvlm_mlx.config import (
    IMAGE_TOKEN,
    MODEL_TYPE,
    REFERENCE_IMAGE_TOKEN_INDEX,
    VisionConfig,
)
from fastvlm_mlx.errors import BundleError, OptionError
from fastvlm_mlx.prompt import SYSTEM_PROMPT, TURN_END
from model_export import recipes, weights
from model_export.checkpoint import Checkpoint
from model_export.layouts import preprocessor_config
from model_export.options import ExportOptions
from model_export.tokenizer import ExportedTokenizer

HEAD_DIM = 32  # both loaders' MHSA
CONTEXT_LENGTH = 8192  # tokenizer_model_max_length where the checkpoint has none

# prompt.CHAT_TEMPLATE, for messages that come as lists of parts too: mlx-swift-lm's do.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\n" + SYSTEM_PROMPT + "<|im_end|>\\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '" + IMAGE_TOKEN + "\\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def vision_config(vision: VisionConfig) -> dict[str, Any]:
    """Every key of mlx-swift-lm's VisionConfiguration, in its types, and `head_dim`.

    Raises:
        OptionError: an encoder that neither loader can build.
    """
    fractional = [ratio for ratio in vision.mlp_ratios if ratio != int(ratio)]
    if fractional or vision.head_dim != HEAD_DIM:
        found = f"mlp_ratios {fractional[0]}" if fractional else f"head_dim {vision.head_dim}"
        raise OptionError(
            f"vision_config has {found}: mlx-vlm and mlx-swift-lm take whole mlp_ratios and a "
            f"head_dim of {HEAD_DIM}, use --layout app"
        )
    return {
        **vision.to_dict(),
        "downsamples": [True] * len(vision.layers),
        "intermediate_size": vision.hidden_size,
        "layer_scale_init_value": 1e-5,
        "mlp_ratios": [int(ratio) for ratio in vision.mlp_ratios],
        "model_type": MODEL_TYPE,
        "num_classes": 1000,
        "pos_embs_shapes": [k if k is None else [k, k] for k in vision.pos_embs_shapes],
    }


def write_mlx_configs(
    checkpoint: Checkpoint,
    options: ExportOptions,
    tokenizer: ExportedTokenizer,
    app_config: dict[str, Any],
    directory: Path,
) -> None:
    """The JSON files beside the weights, this layout's chat template in the tokenizer's.

    Args:
        app_config: what both layouts' `config.json` have in common.

    Raises:
        OptionError: as `vision_config`.
    """
    size = checkpoint.config.vision.image_size
    raw = checkpoint.raw_config
    config = app_config | {
        "eos_token_id": tokenizer.tokenizer.token_to_id(TURN_END),
        "image_token_index": REFERENCE_IMAGE_TOKEN_INDEX,
        "tokenizer_model_max_length": raw.get("tokenizer_model_max_length") or CONTEXT_LENGTH,
        "tokenizer_padding_side": raw.get("tokenizer_padding_side") or "right",
        "vision_config": vision_config(checkpoint.config.vision),
    }
    generation = checkpoint.generation_config or {"eos_token_id": config["eos_token_id"]}
    files: dict[str, dict[str, Any]] = {
        "config.json": dict(sorted(config.items())),
        "preprocessor_config.json": preprocessor_config(size, "FastVLMProcessor"),
        "generation_config.json": generation,
        "tokenizer_config.json": tokenizer.config | {"chat_template": CHAT_TEMPLATE},
    }
    for name, data in files.items():
        text = json.dumps(data, indent=2, ensure_ascii=False)
        (directory / name).write_text(text + "\n", encoding="utf-8")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _is(kind: type) -> Callable[[Any], bool]:
    return lambda value: type(value) is kind


def _list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _shape(value: Any) -> bool:
    return value is None or (isinstance(value, list) and [type(v) for v in value] == [int, int])


def _number(value: Any) -> bool:
    return type(value) in (int, float)


# Keys without a default in mlx-swift-lm's Codable structs, and what each must be.
CONFIG_RULES: dict[str, Callable[[Any], bool]] = {
    "model_type": lambda value: value == MODEL_TYPE,
    "hidden_size": _is(int),
    "num_hidden_layers": _is(int),
    "intermediate_size": _is(int),
    "num_attention_heads": _is(int),
    "num_key_value_heads": _is(int),
    "vocab_size": _is(int),
    "tie_word_embeddings": _is(bool),
    "eos_token_id": _is(int),
    "mm_projector_type": lambda value: value == "mlp2x_gelu",
    "mm_hidden_size": _is(int),
    "tokenizer_model_max_length": _is(int),
    "tokenizer_padding_side": lambda value: value in ("left", "right"),
    # Written into both processors; the tokens of the prompt's picture are compared with it.
    "image_token_index": lambda value: value == REFERENCE_IMAGE_TOKEN_INDEX,
}
VISION_RULES: dict[str, Callable[[Any], bool]] = {
    "cls_ratio": _number,
    "down_patch_size": _is(int),
    "down_stride": _is(int),
    "downsamples": _list_of(_is(bool)),
    "embed_dims": _list_of(_is(int)),
    "hidden_size": _is(int),
    "image_size": _is(int),
    "intermediate_size": _is(int),
    "layers": _list_of(_is(int)),
    "layer_scale_init_value": _number,
    "mlp_ratios": _list_of(_is(int)),
    "num_classes": _is(int),
    "patch_size": _is(int),
    "pos_embs_shapes": _list_of(_shape),
    "projection_dim": _is(int),
    "repmixer_kernel_size": _is(int),
    "token_mixers": _list_of(_is(str)),
}


def check_mlx(bundle: Bundle) -> None:
    """Decode a bundle by the rules of both loaders.

    Raises:
        BundleError: naming the file, the rule and what was found.
    """
    raw = bundle.raw_config
    for key, fits in CONFIG_RULES.items():
        if not fits(raw.get(key)):
            raise _broken(bundle, "config.json", f"{key} is {raw.get(key)!r}")
    vision = raw.get("vision_config") or {}
    for key, fits in VISION_RULES.items():
        if not fits(vision.get(key)):
            raise _broken(bundle, "config.json", f"vision_config.{key} is {vision.get(key)!r}")
    size = bundle.config.vision.image_size
    data = bundle.preprocessor_config
    rules = {
        "processor_class": lambda value: value == "FastVLMProcessor",
        "size": lambda value: value == {"shortest_edge": size},
        "crop_size": lambda value: value == {"height": size, "width": size},
        "image_mean": lambda value: _list_of(_number)(value) and len(value) == 3,
        "image_std": lambda value: _list_of(_number)(value) and len(value) == 3,
    }
    for key, fits in rules.items():
        if not fits(data.get(key)):
            raise _broken(bundle, "preprocessor_config.json", f"{key} is {data.get(key)!r}")
    _check_weights(bundle)


def _check_weights(bundle: Bundle) -> None:
    from model_export import llm

    config = bundle.config
    shapes = {name: array.shape for name, array in bundle.tensors().items()}
    chosen = recipes.scheme_of(bundle)
    specs = weights.bundle_specs(config, tied=config.text.tie_word_embeddings, layout="mlx")
    expected = {
        entry.name: entry.shape for spec in specs for entry in llm.stored(spec, chosen, "float16")
    }
    for name in sorted(expected.keys() | shapes.keys()):
        if shapes.get(name) != expected.get(name):
            found = list(shapes[name]) if name in shapes else "missing"
            wanted = list(expected[name]) if name in expected else "not there"
            raise _broken(bundle, "the .safetensors files", f"{name} is {found}, not {wanted}")


def _broken(bundle: Bundle, file: str, found: str) -> BundleError:
    return BundleError(
        f"{bundle.path} can't be loaded by mlx-vlm and mlx-swift-lm: in {file}, {found}; export "
        "the checkpoint again"
    )
