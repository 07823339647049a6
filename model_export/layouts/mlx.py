"""The `mlx` layout: what mlx-vlm and mlx-swift-lm load, and their rules to check it by.

The rules are those of mlx-vlm 0.7.10 (`models/fastvlm/`, `utils.py: load_model`) and of
mlx-swift-lm at 0c92cf070e48 (`Libraries/MLXVLM/Models/FastVLM.swift`, and `Qwen2VL.swift` for the
language model's keys). The first takes the encoder's shape from its own code and not from
`vision_config`; the second decodes every key of it, and its projector, like the first's, counts
the activation between the two products as a layer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from fastvlm_mlx.bundle.bundle import Bundle
from fastvlm_mlx.bundle.config import (
    IMAGE_TOKEN,
    MODEL_TYPE,
    REFERENCE_IMAGE_TOKEN_INDEX,
    VisionConfig,
)
from fastvlm_mlx.bundle.quantization import Format
from fastvlm_mlx.errors import OptionError
from fastvlm_mlx.language.prompt.template import SYSTEM_PROMPT
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.checkpoint.tokenizer import ExportedTokenizer
from model_export.layouts import rules
from model_export.layouts.app import generation_config, preprocessor_config
from model_export.layouts.rules import Entry, RuleError
from model_export.options.loaders import LOADERS

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
    tokenizer: ExportedTokenizer,
    app_config: dict[str, Any],
    directory: Path,
) -> None:
    """Write the JSON files beside the weights, with this layout's chat template in the tokenizer's.

    Args:
        app_config: what both layouts' `config.json` have in common.

    Raises:
        OptionError: as `vision_config`.
    """
    size = checkpoint.config.vision.image_size
    raw = checkpoint.raw_config
    config = app_config | {
        "eos_token_id": tokenizer.turn_end_id,
        "image_token_index": REFERENCE_IMAGE_TOKEN_INDEX,
        "tokenizer_model_max_length": raw.get("tokenizer_model_max_length") or CONTEXT_LENGTH,
        "tokenizer_padding_side": raw.get("tokenizer_padding_side") or "right",
        "vision_config": vision_config(checkpoint.config.vision),
    }
    files: dict[str, dict[str, Any]] = {
        "config.json": dict(sorted(config.items())),
        "preprocessor_config.json": preprocessor_config(size, "FastVLMProcessor"),
        "generation_config.json": generation_config(checkpoint, tokenizer),
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
    # Written into both processors; the tokens of the prompt's image are compared with it.
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
    """Check a bundle by the rules of both loaders.

    Raises:
        BundleError: naming the file, the rule and what was found.
    """
    try:
        _check_mlx(bundle)
    except RuleError as broken:
        raise rules.refuse(bundle.path, LOADERS["mlx"].program, broken) from broken


def _check_mlx(bundle: Bundle) -> None:
    config = rules.read_object(bundle.path, "config.json")
    for key, fits in CONFIG_RULES.items():
        if not fits(config.get(key)):
            raise RuleError(f"in config.json, {key} is {config.get(key)!r}")
    vision = config.get("vision_config") or {}
    for key, fits in VISION_RULES.items():
        if not fits(vision.get(key)):
            raise RuleError(f"in config.json, vision_config.{key} is {vision.get(key)!r}")
    lists = [key for key, value in vision.items() if key in VISION_RULES and type(value) is list]
    if uneven := [key for key in lists if len(vision[key]) != len(vision["layers"])]:
        raise RuleError(
            f"in config.json, vision_config.{uneven[0]} has not an entry for each stage"
        )
    size, data = vision["image_size"], _preprocessor(bundle.path)
    of_pixels: dict[str, Callable[[Any], bool]] = {
        "processor_class": lambda value: value == "FastVLMProcessor",
        "size": lambda value: value == {"shortest_edge": size},
        "crop_size": lambda value: value == {"height": size, "width": size},
        "image_mean": lambda value: _list_of(_number)(value) and len(value) == 3,
        "image_std": lambda value: _list_of(_number)(value) and len(value) == 3,
    }
    for key, fits in of_pixels.items():
        if not fits(data.get(key)):
            raise RuleError(f"in preprocessor_config.json, {key} is {data.get(key)!r}")
    _check_weights(rules.read_headers(bundle.path), config)
    end = rules.check_end_of_turn(bundle.path)
    if config["eos_token_id"] != end:
        raise RuleError(
            f"in config.json, eos_token_id is {config['eos_token_id']}, expected {end}, the end "
            "of a turn"
        )


def _preprocessor(directory: Path) -> dict[str, Any]:
    """mlx-vlm's own conversions have one file for both processors."""
    if (directory / "preprocessor_config.json").is_file():
        return rules.read_object(directory, "preprocessor_config.json")
    both = rules.read_object(directory, "processor_config.json")
    inside = both.get("image_processor")
    return both | inside if isinstance(inside, dict) else both


def _check_weights(found: Mapping[str, Entry], config: Mapping[str, Any]) -> None:
    shapes, matrices = rules.decoder_shapes(config)
    for more, others in (
        rules.projector_shapes(config, "mm_projector.0", "mm_projector.2"),
        _tower_shapes(config["vision_config"]),
    ):
        shapes, matrices = shapes | more, matrices | others
    expected = {name: Entry("float", shape) for name, shape in shapes.items()}
    quantization = config.get("quantization")
    if quantization is not None:
        _check_paths(quantization, matrices)
        for path in sorted(matrices):
            shape = shapes[f"{path}.weight"]
            form = _form_of(quantization, path, shape, scaled=f"{path}.scales" in found)
            if form is not None:
                expected |= rules.parts(path, shape, form)
    rules.check_entries(found, expected)


def _check_paths(quantization: Mapping[str, Any], matrices: set[str]) -> None:
    """Whatever is said of a module is said of one that is there: both pass over the rest."""
    for path, said in quantization.items():
        if isinstance(said, dict) and path not in matrices:
            raise RuleError(
                f"in config.json, quantization gives {path} a form, expected a module's path in "
                "their models, as mm_projector.0"
            )


def _form_of(
    quantization: Mapping[str, Any], path: str, shape: tuple[int, ...], *, scaled: bool
) -> Format | None:
    """How both build the module at `path`.

    mlx-vlm (`load_model_weights`): what config.json says of the path, or of it without
    `language_model.`, stands, scales or not; of what it says nothing of, whatever has scales and
    a multiple of 64 weights has the form for all. mlx-swift-lm (`BaseConfiguration`, `Load`):
    what has scales has the path's own form, or the one for all.

    Raises:
        RuleError: they build it differently, or a form is none of theirs.
    """
    names = (path, path.removeprefix("language_model."))
    said = next((quantization[n] for n in names if n in quantization), None)
    default = rules.quantized_form(quantization, "quantization")
    if isinstance(said, dict):
        in_python: Format | None = rules.quantized_form(said, path)
    else:
        in_python = default if said is not False and scaled and prod(shape) % 64 == 0 else None
    own = quantization.get(path)
    in_swift = None
    if scaled and own is not False:
        in_swift = default if own is None else rules.quantized_form(own, path)
    if in_python != in_swift:
        raise RuleError(
            f"in config.json, quantization gives {path} {said!r}, of which mlx-vlm makes "
            f"{in_python or 'no quantized module'} and mlx-swift-lm {in_swift or 'none'}"
        )
    if in_python is not None and not LOADERS["mlx"].knows(in_python):
        raise RuleError(
            f"in config.json, quantization gives {path} {in_python}, expected "
            f"{LOADERS['mlx'].known()} ({LOADERS['mlx'].versions})"
        )
    return in_python


def _tower_shapes(vision: Mapping[str, Any]) -> tuple[rules.Shapes, set[str]]:
    """FastViTHD below `vision_tower.vision_model.`, and the paths of its linear layers."""
    widths, kernel = vision["embed_dims"], vision["repmixer_kernel_size"]
    shapes: rules.Shapes = {}
    linear: set[str] = set()

    def convolution(path: str, *shape: int) -> None:
        """Out, height, width, in (1 where each channel is by itself)."""
        shapes[f"{path}.weight"], shapes[f"{path}.bias"] = shape, shape[:1]

    def mlp(path: str, width: int, inner: int) -> None:
        shapes[f"{path}.conv.conv.weight"] = (width, 7, 7, 1)
        for name in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{path}.conv.bn.{name}"] = (width,)
        convolution(f"{path}.fc1", inner, 1, 1, width)
        convolution(f"{path}.fc2", width, 1, 1, inner)

    def block(path: str, mixer: str, width: int, inner: int) -> None:
        mlp(f"{path}.convffn", width, inner)
        if mixer == "repmixer":
            convolution(f"{path}.token_mixer.reparam_conv", width, kernel, kernel, 1)
            shapes[f"{path}.layer_scale"] = (1, 1, width)
            return
        shapes[f"{path}.norm.weight"] = shapes[f"{path}.norm.bias"] = (width,)
        shapes[f"{path}.token_mixer.qkv.weight"] = (3 * width, width)
        shapes[f"{path}.token_mixer.proj.weight"] = (width, width)
        shapes[f"{path}.token_mixer.proj.bias"] = (width,)
        linear.update(f"{path}.token_mixer.{name}" for name in ("qkv", "proj"))
        for number in (1, 2):
            shapes[f"{path}.layer_scale_{number}"] = (1, 1, width)

    first, last = widths[0], int(widths[-1] * vision["cls_ratio"])
    convolution("patch_embed.blocks.0.reparam_conv", first, 3, 3, 3)
    convolution("patch_embed.blocks.1.reparam_conv", first, 3, 3, 1)
    convolution("patch_embed.blocks.2.reparam_conv", first, 1, 1, first)
    index = 0
    for stage, (width, count) in enumerate(zip(widths, vision["layers"], strict=True)):
        if stage and (vision["downsamples"][stage - 1] or widths[stage - 1] != width):
            size = vision["down_patch_size"]
            convolution(f"network.{index}.proj.0.lkb_reparam", width, size, size, 1)
            convolution(f"network.{index}.proj.1.reparam_conv", width, 1, 1, width)
            index += 1
        if (position := vision["pos_embs_shapes"][stage]) is not None:
            convolution(f"network.{index}.reparam_conv", width, *position, 1)
            index += 1
        inner = int(width * vision["mlp_ratios"][stage])
        for number in range(count):
            block(f"network.{index}.{number}", vision["token_mixers"][stage], width, inner)
        index += 1
    convolution("conv_exp.reparam_conv", last, 3, 3, 1)
    convolution("conv_exp.se.reduce", last // 16, 1, 1, last)
    convolution("conv_exp.se.expand", last, 1, 1, last // 16)
    shapes["head.proj"] = (last, vision["projection_dim"])
    prefix = "vision_tower.vision_model."
    return {prefix + name: shape for name, shape in shapes.items()}, {prefix + n for n in linear}
