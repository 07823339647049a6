"""Every key of a checkpoint's `config.json`: used, without a meaning here, or refused.

A setting that nobody reads changes the model in silence. The keys are those that LLaVA's training
(llava/model/llava_arch.py, llava/train), transformers' Qwen2Config and its base class write.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from fastvlm_mlx.bundle.config import FastVLMConfig, TextConfig
from fastvlm_mlx.errors import ConfigError

# transformers' Qwen2Config, which leaves RoPE's base out of config.json where it equals this.
ROPE_THETA = 10_000.0

USED = frozenset(
    {field.name for field in fields(TextConfig)}
    | {field.name for field in fields(FastVLMConfig)}
    | {
        "model_type",
        "torch_dtype",
        "mm_hidden_size",
        "mm_projector_type",
        "mm_vision_tower",
        "vision_config",
        "rope_parameters",
        "rope_scaling",
        "license",
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "tokenizer_model_max_length",
        "tokenizer_padding_side",
        "mm_patch_merge_type",
    }
)
# What must be as FastVLM has it, where it is stated: another value would be another model.
EXPECTED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "use_sliding_window": (False, None),
    "mm_use_im_start_end": (False, None),
    "mm_use_im_patch_token": (False, None),
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_patch_merge_type": ("flat", None),
    "mm_resampler_type": (None,),
    "attention_bias": (True, None),
    "mlp_bias": (False, None),
    "use_mrope": (False, None),
    "quantization": (None,),
    "quantization_config": (None,),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "pruned_heads": ({}, None),
    "use_mm_proj": (True, None),
    "pretraining_tp": (1, None),
}
# Of training, of generation's defaults, and of how a library computes: no answer depends on them.
WITHOUT_MEANING = frozenset(
    """attention_dropout initializer_range max_window_layers sliding_window use_cache
    image_grid_pinpoints image_crop_resolution image_split_resolution mm_vision_select_feature
    mm_vision_select_layer mm_tunable_parts mm_spatial_pool_mode mm_spatial_pool_stride
    mm_newline_position mm_vision_tower_type mm_projector_depth delay_load s2 s2_scales
    transformers_version dtype text_config auto_map chunk_size_feed_forward
    cross_attention_hidden_size is_decoder tie_encoder_decoder return_dict output_hidden_states
    output_attentions torchscript use_bfloat16 max_length min_length do_sample early_stopping
    num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    bad_words_ids num_return_sequences output_scores return_dict_in_generate forced_bos_token_id
    forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens finetuning_task id2label label2id tokenizer_class prefix sep_token_id
    decoder_start_token_id task_specific_params problem_type tf_legacy_loss use_flash_attn
    num_labels head_dim image_seq_length lora_enable vision_tower_pretrained""".split()  # noqa: SIM905
)
# Training's own, by what they begin or end with: learning rates, what is frozen, private notes.
OF_TRAINING = re.compile(r"_.*|.*_lr|(un)?freeze_.*|tune_.*|lora_.*|.*attn_implementation.*")


def check_settings(raw: Mapping[str, Any], where: str) -> None:
    """Refuse settings that would make another model of the same tensors.

    Args:
        raw: `config.json` in Apple's words, or transformers' `text_config`.
        where: the file and section, for the error.

    Raises:
        ConfigError: naming the first key that is not implemented, or that nobody knows.
    """
    for key, allowed in EXPECTED.items():
        if key in raw and raw[key] not in allowed:
            raise ConfigError(
                f"{where}: {key} is {raw[key]!r}, which FastVLM does not have: expected "
                f"{allowed[0]!r}, export a checkpoint that was trained with it"
            )
    layers = raw.get("layer_types")
    if layers is not None and (
        not isinstance(layers, list) or any(kind != "full_attention" for kind in layers)
    ):
        raise ConfigError(
            f"{where}: layer_types holds other than full_attention, which FastVLM does not have: "
            "export a checkpoint that was trained with it alone"
        )
    heads, width = raw.get("head_dim"), raw.get("hidden_size")
    if heads is not None and [heads] != [_head_width(width, raw.get("num_attention_heads"))]:
        raise ConfigError(
            f"{where}: head_dim is {heads!r}, expected hidden_size over num_attention_heads, as "
            "Qwen2 has it"
        )
    known = USED | EXPECTED.keys() | WITHOUT_MEANING | {"layer_types"}
    for key in raw:
        if key not in known and not OF_TRAINING.fullmatch(key):
            near = get_close_matches(key, known, n=1)
            hint = f" (the nearest known one is {near[0]})" if near else ""
            raise ConfigError(
                f"{where} has {key!r}, which is no setting of FastVLM that is known here{hint}: if "
                "the model was trained without it, export a copy whose config.json does not have it"
            )


def _head_width(width: Any, heads: Any) -> int | None:
    if type(width) is int and type(heads) is int and heads > 0:
        return width // heads
    return None
