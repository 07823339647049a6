"""What `adapter_config.json` says of a LoRA adapter, as PEFT reads it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

from fastvlm_mlx.errors import CheckpointError
from model_export.checkpoint.weights.weight_files import read_json

# Settings of PEFT's LoraConfig under which a weight is not W + scale * B @ A.
REFUSED = {
    "use_dora": "DoRA",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "BD-LoRA",
    "lora_bias": "LoRA with biases",
    "layer_replication": "layer replication",
    "trainable_token_indices": "trainable tokens",
    "target_parameters": "LoRA of bare parameters",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
}
# Initializations that leave the base as it is; PiSSA, OLoRA, CorDA and others change it.
INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
# Of PEFT's patterns, those that Python's engine compares in a time that is no surprise.
SIMPLE_PATTERN = re.compile(r"[^(){}]{1,200}")
# A scale, and its product with a weight, stay far from infinity.
LARGEST = 1e15
REPEATS = re.compile(r"[*+?]")


@dataclass(frozen=True)
class LoraConfig:
    """The settings of `adapter_config.json` that decide a merged weight."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    modules_to_save: tuple[str, ...] = ()
    ensure_weight_tying: bool = False
    base: str | None = None

    @classmethod
    def read(cls, file: Path) -> LoraConfig:
        """Read `adapter_config.json`.

        `fan_in_fan_out` is ignored: FastVLM's layers are all Linear, for which PEFT itself turns
        it off.

        Raises:
            CheckpointError: not LoRA, a variant of it that is not supported, or damaged.
        """
        data = read_json(file)
        kind = data.get("peft_type")
        if kind != "LORA":
            raise CheckpointError(
                f"{file} describes a {kind} adapter: expected LORA, merge it into its base with "
                "PEFT and export the result"
            )
        variants = [name for key, name in REFUSED.items() if data.get(key)]
        start = data.get("init_lora_weights", True)
        if start not in INITIALIZATIONS:
            variants.append(f"LoRA begun by {start!r}, which changes the base")
        if variants:
            raise CheckpointError(
                f"{file} describes {variants[0]}, which is not supported: expected plain LoRA, "
                "merge it into its base with PEFT (merge_and_unload) and export the result"
            )
        ranks = _numbers(file, data, "rank_pattern", int)
        alphas = _numbers(file, data, "alpha_pattern", int, float)
        base = data.get("base_model_name_or_path")
        saved = data.get("modules_to_save") or []
        return cls(
            rank=_number(file, "r", data.get("r"), int),
            alpha=_number(file, "lora_alpha", data.get("lora_alpha"), int, float),
            rank_pattern=ranks,
            alpha_pattern=alphas,
            use_rslora=bool(data.get("use_rslora")),
            modules_to_save=tuple(map(str, saved)) if isinstance(saved, list) else (),
            ensure_weight_tying=bool(data.get("ensure_weight_tying")),
            base=base if isinstance(base, str) and base else None,
        )

    def rank_and_scale(self, module: str) -> tuple[int, float]:
        """Return a module's rank and scale, by the first pattern that its end fits, as in PEFT."""
        rank = self.rank_pattern.get(_matching(self.rank_pattern, module), self.rank)
        alpha = self.alpha_pattern.get(_matching(self.alpha_pattern, module), self.alpha)
        return rank, alpha / (sqrt(rank) if self.use_rslora else rank)


def _matching(patterns: Mapping[str, Any], module: str) -> str:
    for pattern in patterns:
        if re.match(_ending(pattern), module):
            return pattern
    return module


def _ending(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _numbers(file: Path, data: dict[str, Any], key: str, *kinds: type) -> dict[str, Any]:
    patterns = data.get(key) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{file}: {key} is {patterns!r}, expected a JSON object")
    for pattern, value in patterns.items():
        if not SIMPLE_PATTERN.fullmatch(pattern) or len(REPEATS.findall(pattern)) > 2:
            raise CheckpointError(
                f"{file}: {key} holds {pattern!r}, which could take forever to compare: expected a "
                "module's name, or a regular expression without groups and with two repetitions at "
                "most, merge the adapter into its base with PEFT and export the result"
            )
        try:
            re.compile(_ending(pattern))
        except re.error as error:
            raise CheckpointError(
                f"{file}: {key} holds {pattern!r}, which is no regular expression ({error})"
            ) from error
        _number(file, f"{key}[{pattern!r}]", value, *kinds)
    return patterns


def _number(file: Path, key: str, value: Any, *kinds: type) -> Any:
    if type(value) not in kinds or not 0 < value <= LARGEST:
        raise CheckpointError(
            f"{file}: {key} is {value!r}, expected a number above zero and at most {LARGEST:g}: "
            "the adapter is damaged, save it again"
        )
    return value
