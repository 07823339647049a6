"""Named sets of an export's options, and what each is for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model_export.options import unknown

# With limits of their own, of what is promised of the answers.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    # The smallest that keeps them.
    "phone": {
        "llm_bits": 4,
        "method": "gptq",
        "encoder_precision": "mixed",
        "max_kl_nats": 0.25,
        "min_agreement": 0.9,
    },
    # No answer is expected to change, at half the size.
    "balanced": {
        "llm_bits": 8,
        "encoder_precision": "int8",
        "max_kl_nats": 0.025,
        "min_agreement": 0.97,
    },
    # The checkpoint's own precision.
    "exact": {"llm_bits": 16, "encoder_precision": "fp16"},
}
# In place of a preset's bits and method, where one of them is given.
LLM_CHOICES = ("llm_mode", "recipe", "llm_bpw", "method")


def preset(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `ExportOptions` that a preset and what is given beside it come to.

    Raises:
        OptionError: there is no such preset.
    """
    if name not in PRESETS:
        raise unknown("preset", name, tuple(PRESETS))
    fields = dict(PRESETS[name])
    if any(choice in given for choice in LLM_CHOICES):
        fields = {key: value for key, value in fields.items() if key not in ("llm_bits", "method")}
    if given.get("layout") == "mlx":
        # Its encoder has the type of everything else.
        fields.pop("encoder_precision")
    return {"preset": name, **fields, **given}
