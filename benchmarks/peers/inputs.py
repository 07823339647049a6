"""What every system is given: its own layout of the same checkpoint, and ids of the same prompt."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from fastvlm_mlx.bundle.config import VisionConfig
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.checkpoint.names import (
    ENCODER_PREFIX,
    TIMM,
    TRANSFORMERS,
    from_transformers,
    is_unused,
)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_COUNTER = ".num_batches_tracked"


def bundle(checkpoint: Path, directory: Path, layout: str) -> Path:
    """The checkpoint exported at 4 bits with an fp16 encoder, once."""
    out = directory / layout
    if not (out / "manifest.json").exists():
        command = [sys.executable, "-m", "fastvlm_mlx", "export", str(checkpoint), str(out)]
        subprocess.run(
            [*command, "--layout", layout, "--llm-bits", "4"], check=True, stdout=sys.stderr
        )
    return out


def transformers_checkpoint(checkpoint: Path, tokenizer: Path, directory: Path) -> Path:
    """The checkpoint in transformers' layout, once: renamed tensors, its own configuration.

    Args:
        tokenizer: a directory with a `tokenizer.json` that has `<image>`.
    """
    out = directory / "transformers"
    done = out / "config.json"
    if done.exists():
        return out
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    opened = Checkpoint(checkpoint)
    vision = opened.config.vision
    weight_map = {}
    for shard in sorted(checkpoint.glob("*.safetensors")):
        tensors = {}
        for name, tensor in load_file(shard).items():
            short = name.removeprefix(ENCODER_PREFIX)
            # timm counts batches as Apple does, and has no head.
            if short == name or not is_unused(short) or short.endswith(_COUNTER):
                tensors[to_transformers(name, vision)] = tensor
        save_file(tensors, out / shard.name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, shard.name))
    _dump(out / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    for name in TOKENIZER_FILES:
        if (tokenizer / name).exists():
            shutil.copyfile(tokenizer / name, out / name)
    added = json.loads((tokenizer / "tokenizer.json").read_text())["added_tokens"]
    image = next(token["id"] for token in added if token["content"] == "<image>")
    _dump(done, _config(opened, image))
    return out


def to_transformers(name: str, vision: VisionConfig) -> str:
    """Apple's name of a tensor → transformers'; the inverse of the checkpoint's own table.

    Raises:
        KeyError: transformers has no such tensor.
    """
    for candidate in _candidates(name, len(vision.layers)):
        if from_transformers(candidate, vision) == name:
            return candidate
    raise KeyError(name)


def _candidates(name: str, stages: int) -> Iterator[str]:
    """Names that it may have; all of them but one are other tensors', or nobody's."""
    suffix = ".gamma" if "layer_scale" in name else ""
    network = f"{ENCODER_PREFIX}network."
    if not name.startswith(network):
        # From the longest prefix on: Apple's `model.` begins nearly all names.
        for theirs, apple in sorted(TRANSFORMERS, key=lambda row: -len(row[1])):
            if name.startswith(apple):
                yield theirs + name.removeprefix(apple).replace(".convffn.", ".mlp.") + suffix
        return
    # The flat list of modules has no names: a stage's blocks are numbered, its others are not.
    rest = name.removeprefix(network).split(".", 1)[1].replace(".convffn.", ".mlp.")
    if rest.startswith("proj.0.lkb_reparam."):
        part = "downsample.proj.0.reparam_conv." + rest.removeprefix("proj.0.lkb_reparam.")
    elif rest.startswith("proj."):
        part = f"downsample.{rest}"
    else:
        part = f"blocks.{rest}" if rest[0].isdigit() else f"pos_emb.{rest}"
    for stage in range(stages):
        yield f"{TIMM}stages.{stage}.{part}{suffix}"


def _config(checkpoint: Checkpoint, image_token: int) -> dict[str, Any]:
    text, vision = checkpoint.config.text, checkpoint.config.vision
    return {
        "architectures": ["FastVlmForConditionalGeneration"],
        "model_type": "fast_vlm",
        "dtype": "bfloat16",
        "image_seq_length": vision.num_tokens,
        "image_token_index": image_token,
        "tie_word_embeddings": checkpoint.tied,
        "text_config": {
            "model_type": "qwen2",
            "hidden_size": text.hidden_size,
            "num_hidden_layers": text.num_hidden_layers,
            "num_attention_heads": text.num_attention_heads,
            "num_key_value_heads": text.num_key_value_heads,
            "intermediate_size": text.intermediate_size,
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.max_position_embeddings,
            "rms_norm_eps": text.rms_norm_eps,
            "rope_theta": text.rope_theta,
            "tie_word_embeddings": checkpoint.tied,
            "use_sliding_window": False,
        },
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "fastvit_mci3",
            "do_pooling": True,
            "hidden_size": vision.hidden_size,
            "model_args": {
                "inference_mode": True,
                "layers": list(vision.layers),
                "embed_dims": list(vision.embed_dims),
                "mlp_ratios": list(vision.mlp_ratios),
            },
        },
    }


def _dump(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n")
