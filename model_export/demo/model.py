"""The demo checkpoint in PyTorch: FastViTHD, projector and transformers' Qwen2, and greedy answers.

What the checkpoint is trained as, and what its answers are measured with. It reads and writes
Apple's layout and shares no code with the runtime.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import DynamicCache, Qwen2Config, Qwen2Model

from fastvlm_mlx.bundle.config import VisionConfig
from model_export.demo import tokenizer as demo_tokenizer
from model_export.demo.tokenizer import AFTER_IMAGE, BEFORE_IMAGE
from model_export.encoder.reference import FastViTHD

# Apple's names: what stands before the names of each part in the checkpoint.
PREFIXES = {
    "encoder": "model.vision_tower.vision_tower.model.",
    "projector": "model.mm_projector.",
    "language": "model.",
}

VISION = VisionConfig(
    image_size=256,
    layers=(1, 1, 2, 1, 1),
    embed_dims=(16, 32, 64, 128, 256),
    mlp_ratios=(2, 2, 4, 4, 4),
    projection_dim=16,
)
# Widths that every group size of affine quantization (32, 64, 128) divides.
TEXT: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "max_window_layers": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "sliding_window": 2048,
    "use_sliding_window": False,
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "use_cache": True,
}
_ROW_MULTIPLE = 64
_SPARE_ROWS = 8


def make_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """`config.json` as LLaVA training writes it, with a `vision_config` for the small encoder.

    The embedding has at least eight rows more than the tokenizer has tokens, room for `<image>`.
    """
    size = tokenizer.get_vocab_size() + _SPARE_ROWS
    return {
        "_name_or_path": "fastvlm-demo",
        "architectures": ["LlavaQwen2ForCausalLM"],
        "model_type": "llava_qwen2",
        "vocab_size": -(-size // _ROW_MULTIPLE) * _ROW_MULTIPLE,
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        **TEXT,
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": "pad",
        "image_grid_pinpoints": None,
        "mm_hidden_size": VISION.hidden_size,
        "mm_patch_merge_type": "flat",
        "mm_projector_lr": None,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": f"mobileclip_l_{VISION.image_size}",
        "tokenizer_model_max_length": TEXT["max_position_embeddings"],
        "tokenizer_padding_side": "right",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.39.3",
        "tune_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": True,
        "use_mm_proj": True,
        "vision_config": VISION.to_dict(),
    }


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """Square RGB images of the encoder's size → float32 [B, 3, S, S], 0 to 1."""
    stacked = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 255


class DemoModel(nn.Module):
    """float32 whatever the checkpoint stores."""

    def __init__(self, config: Mapping[str, Any], tokenizer: Tokenizer):
        super().__init__()
        vision = VisionConfig.from_dict(config["vision_config"])
        keys = ("vocab_size", "bos_token_id", "eos_token_id", *TEXT)
        self.config = dict(config)
        self.tokenizer = tokenizer
        self.encoder = FastViTHD(vision)
        self.projector = nn.Sequential(
            nn.Linear(vision.hidden_size, config["hidden_size"]),
            nn.GELU(),
            nn.Linear(config["hidden_size"], config["hidden_size"]),
        )
        self.language = Qwen2Model(Qwen2Config(**{key: config[key] for key in keys}))

    @classmethod
    def load(cls, folder: Path) -> DemoModel:
        """Read a checkpoint folder in Apple's layout; in eval mode."""
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model = cls(config, demo_tokenizer.load(folder))
        state = load_file(folder / "model.safetensors")
        model.load_state_dict({name: state[key] for name, key in model.checkpoint_names().items()})
        return model.eval()

    def save(self, folder: Path) -> None:
        """Write a checkpoint folder in Apple's layout, bfloat16."""
        folder.mkdir(parents=True, exist_ok=True)
        state = self.state_dict()
        tensors = {
            key: (t.bfloat16() if (t := state[name]).is_floating_point() else t).cpu().contiguous()
            for name, key in self.checkpoint_names().items()
        }
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        demo_tokenizer.save(self.tokenizer, folder)
        ids = {key: self.config[key] for key in ("bos_token_id", "eos_token_id")}
        generation = {
            "bos_token_id": ids["bos_token_id"],
            "pad_token_id": ids["bos_token_id"],
            "do_sample": False,
            "eos_token_id": [ids["eos_token_id"], ids["bos_token_id"]],
            "transformers_version": self.config["transformers_version"],
        }
        for name, value in (("config", self.config), ("generation_config", generation)):
            text = json.dumps(value, indent=2) + "\n"
            (folder / f"{name}.json").write_text(text, encoding="utf-8")

    def checkpoint_names(self) -> dict[str, str]:
        """Names of this module's state → names in the checkpoint."""
        names = {}
        for name in self.state_dict():
            part, rest = name.split(".", 1)
            names[name] = PREFIXES[part] + rest
        return names

    def encode(self, pixels: Tensor) -> Tensor:
        """float32 [B, 3, S, S] → [B, N, C]."""
        return self.encoder(pixels.contiguous(memory_format=torch.channels_last))

    @torch.no_grad()
    def answer(
        self, features: Tensor, prompts: Sequence[str], *, max_tokens: int = 64
    ) -> list[str]:
        """Greedy answers, one for each row of features [B, N, C] and its prompt."""
        answers = [""] * len(prompts)
        rows: dict[int, list[int]] = defaultdict(list)
        suffixes = [self.tokenizer.encode(AFTER_IMAGE.format(prompt)).ids for prompt in prompts]
        for row, suffix in enumerate(suffixes):
            rows[len(suffix)].append(row)
        for same_length in rows.values():
            ids = torch.tensor([suffixes[row] for row in same_length])
            for row, tokens in zip(
                same_length, self._greedy(features[same_length], ids, max_tokens), strict=True
            ):
                answers[row] = self.tokenizer.decode(tokens)
        return answers

    def _greedy(self, features: Tensor, suffix: Tensor, max_tokens: int) -> list[list[int]]:
        device = features.device
        table = self.language.embed_tokens.weight
        before = torch.tensor(self.tokenizer.encode(BEFORE_IMAGE).ids, device=device)
        embeddings = torch.cat(
            [
                table[before].expand(len(features), -1, -1),
                self.projector(features),
                table[suffix.to(device)],
            ],
            1,
        )
        cache = DynamicCache(config=self.language.config)
        end = self.config["eos_token_id"]
        chosen: list[Tensor] = []
        done = torch.zeros(len(features), dtype=torch.bool, device=device)
        while len(chosen) < max_tokens and not done.all():
            state = self.language(inputs_embeds=embeddings, past_key_values=cache, use_cache=True)
            tokens = (state.last_hidden_state[:, -1] @ table.T).argmax(-1)
            done |= tokens == end
            chosen.append(tokens)
            embeddings = table[tokens][:, None]
        generated = torch.stack(chosen, 1).tolist()
        return [row[: row.index(end)] if end in row else row for row in generated]
