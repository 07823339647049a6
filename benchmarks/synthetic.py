"""Checkpoints of FastVLM's real shapes with random weights, in Apple's layout.

For benchmarks: sizes, names and files are those of the published checkpoints, the answers mean
nothing. `python -m benchmarks.synthetic DIRECTORY --size 0.5b`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastvlm_mlx.bundle.config import MODEL_TYPE, VisionConfig
from model_export.encoder.reference import FastViTHD

_TOWER = "model.vision_tower.vision_tower.model."
_VOCABULARY = 151_643  # Qwen2's byte-level entries; the special tokens follow
_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_SHARD_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Size:
    """A language model of the FastVLM family (Qwen2)."""

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    intermediate_size: int
    vocab_size: int
    tied: bool


SIZES = {
    "0.5b": Size(896, 24, 14, 2, 4864, 151_936, True),
    "1.5b": Size(1536, 28, 12, 2, 8960, 151_936, True),
    "7b": Size(3584, 28, 28, 4, 18_944, 152_064, False),
}


def encoder_state_dict(config: VisionConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random float32 tensors of FastViTHD under the checkpoint's names, BatchNorm included.

    Depthwise mixers are near the identity, as re-parameterized ones are, and layer scales are large
    enough for every branch to matter. At 1024×1024 the largest value inside is some tens and the
    largest output a few units.
    """
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in FastViTHD(config).state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    return {name: _encoder_tensor(name, shape, generator) for name, shape in shapes.items()}


def _encoder_tensor(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    def normal(std: float) -> Tensor:
        return torch.empty(shape).normal_(0, std, generator=generator)

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(shape).uniform_(low, high, generator=generator)

    if name.endswith("num_batches_tracked"):
        return torch.tensor(0)
    if name.endswith("running_var"):
        return uniform(0.5, 2.0)
    if "layer_scale" in name:
        return normal(0.2)
    if name.endswith(("norm.weight", "bn.weight")):
        return uniform(0.5, 1.5)
    if name.endswith(("bias", "running_mean")):
        return normal(0.1)
    if name.endswith("token_mixer.reparam_conv.weight"):
        weight = normal(0.1)
        weight[:, :, shape[2] // 2, shape[3] // 2] += 1
        return weight
    fan_in = shape[1:].numel() if len(shape) > 1 else 1
    return normal(1.2 * fan_in**-0.5)


def write_checkpoint(directory: Path, size: str = "0.5b", seed: int = 0) -> None:
    """Write a complete checkpoint: config, bf16 shards with their index, Qwen2's slow tokenizer.

    Holds one shard (512 MiB, or the largest tensor) in memory at a time.

    Args:
        directory: created; must not hold a checkpoint.
        size: a key of `SIZES`.
        seed: of every weight.

    Raises:
        FileExistsError: `directory` holds a config.json.
        KeyError: an unknown size.
    """
    shape = SIZES[size]
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "config.json").open("x", encoding="utf-8") as file:
        json.dump(_config(shape), file, indent=2)
    _dump(
        directory / "generation_config.json",
        {"bos_token_id": 151_643, "eos_token_id": [151_645, 151_643], "pad_token_id": 151_643},
    )
    _write_weights(directory, shape, seed)
    _write_tokenizer(directory)


def _config(size: Size) -> dict[str, Any]:
    vision = VisionConfig()
    return {
        "architectures": ["LlavaQwen2ForCausalLM"],
        "model_type": MODEL_TYPE,
        "attention_dropout": 0.0,
        "bos_token_id": 151_643,
        "eos_token_id": 151_645,
        "freeze_mm_mlp_adapter": False,
        "hidden_act": "silu",
        "hidden_size": size.hidden_size,
        "image_aspect_ratio": "pad",
        "image_grid_pinpoints": None,
        "initializer_range": 0.02,
        "intermediate_size": size.intermediate_size,
        "max_position_embeddings": 32_768,
        "max_window_layers": size.layers,
        "mm_hidden_size": vision.hidden_size,
        "mm_patch_merge_type": "flat",
        "mm_projector_lr": None,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": f"mobileclip_l_{vision.image_size}",
        "num_attention_heads": size.heads,
        "num_hidden_layers": size.layers,
        "num_key_value_heads": size.kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "sliding_window": 32_768,
        "tie_word_embeddings": size.tied,
        "tokenizer_model_max_length": 8192,
        "tokenizer_padding_side": "right",
        "torch_dtype": "bfloat16",
        "tune_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": True,
        "use_cache": True,
        "use_mm_proj": True,
        "use_sliding_window": False,
        "vocab_size": size.vocab_size,
    }


def _tensors(size: Size, seed: int) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> Tensor:
        made = torch.empty(shape, dtype=torch.float32).normal_(0, std, generator=generator)
        return made.bfloat16()

    for name, tensor in encoder_state_dict(VisionConfig(), seed).items():
        yield _TOWER + name, tensor.bfloat16() if tensor.is_floating_point() else tensor
    width, inner = size.hidden_size, size.intermediate_size
    kv_width = width // size.heads * size.kv_heads
    vision_width = VisionConfig().hidden_size
    for index, columns in ((0, vision_width), (2, width)):
        yield f"model.mm_projector.{index}.weight", normal(width, columns, std=columns**-0.5)
        yield f"model.mm_projector.{index}.bias", normal(width, std=0.02)
    yield "model.embed_tokens.weight", normal(size.vocab_size, width, std=0.02)
    for layer in range(size.layers):
        prefix = f"model.layers.{layer}."
        for name, rows in (("q", width), ("k", kv_width), ("v", kv_width)):
            yield (
                f"{prefix}self_attn.{name}_proj.weight",
                normal(rows, width, std=width**-0.5),
            )
            yield f"{prefix}self_attn.{name}_proj.bias", normal(rows, std=0.1)
        yield f"{prefix}self_attn.o_proj.weight", normal(width, width, std=width**-0.5)
        for name, rows, columns in (
            ("gate", inner, width),
            ("up", inner, width),
            ("down", width, inner),
        ):
            yield f"{prefix}mlp.{name}_proj.weight", normal(rows, columns, std=columns**-0.5)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}{name}.weight", torch.ones(width, dtype=torch.bfloat16)
    yield "model.norm.weight", torch.ones(width, dtype=torch.bfloat16)
    if not size.tied:
        yield "lm_head.weight", normal(size.vocab_size, width, std=0.02)


def _write_weights(directory: Path, size: Size, seed: int) -> None:
    shards: list[tuple[Path, list[str]]] = []
    total = held = 0
    shard: dict[str, Tensor] = {}

    def flush() -> None:
        nonlocal held
        if shard:
            path = directory / f"shard-{len(shards)}"
            save_file(shard, path, metadata={"format": "pt"})
            shards.append((path, list(shard)))
            shard.clear()
            held = 0

    for name, tensor in _tensors(size, seed):
        if held + tensor.nbytes > _SHARD_BYTES:
            flush()
        shard[name] = tensor.contiguous()
        held += tensor.nbytes
        total += tensor.nbytes
    flush()
    weight_map = {}
    for number, (path, names) in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        path.rename(directory / name)
        weight_map.update(dict.fromkeys(names, name))
    _dump(
        directory / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )


def _byte_symbols() -> list[str]:
    """GPT-2's printable stand-in for each of the 256 bytes, by byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


def _write_tokenizer(directory: Path) -> None:
    symbols = _byte_symbols()
    # Text first, so that a prompt is merged at all: space and lower case before the other bytes.
    order = sorted(range(256), key=lambda b: (b != 32, not 97 <= b <= 122, b))
    ranked = [symbols[b] for b in order]
    merges = [(a, b) for a in ranked for b in ranked]
    for a, b in list(merges):
        missing = _VOCABULARY - len(symbols) - len(merges)
        if missing <= 0:
            break
        merges.extend((a + b, c) for c in ranked[:missing])
    tokens = [*symbols, *(a + b for a, b in merges)]
    _dump(directory / "vocab.json", {token: i for i, token in enumerate(tokens)})
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    ids = {token: _VOCABULARY + i for i, token in enumerate(_SPECIAL_TOKENS)}
    _dump(directory / "added_tokens.json", ids)
    names = {
        "additional_special_tokens": list(_SPECIAL_TOKENS[1:]),
        "eos_token": _SPECIAL_TOKENS[2],
        "pad_token": _SPECIAL_TOKENS[0],
    }
    _dump(directory / "special_tokens_map.json", names)
    _dump(
        directory / "tokenizer_config.json",
        {
            **names,
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(i): {
                    "content": token,
                    "lstrip": False,
                    "normalized": False,
                    "rstrip": False,
                    "single_word": False,
                    "special": True,
                }
                for token, i in ids.items()
            },
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "errors": "replace",
            "model_max_length": 8192,
            "padding_side": "right",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )


def _dump(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


def make(directory: Path, size: str) -> None:
    """`write_checkpoint` in a process of its own: on Linux the peak memory of a process counts as
    that of those it starts."""
    command = [sys.executable, "-m", "benchmarks.synthetic", str(directory), "--size", size]
    subprocess.run(command, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a random checkpoint of FastVLM's shapes.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--size", choices=SIZES, default="0.5b")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write_checkpoint(options.directory, options.size, options.seed)


if __name__ == "__main__":
    main()
