"""Named sets of an export's options, and what each is for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastvlm_mlx.errors import OptionError

# The options by their names on the command line. A preset with limits promises what they say.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    # The smallest bundle whose answers stay nearly the same.
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
    # Nothing is quantized; weights are cast to 16-bit floats.
    "exact": {"llm_bits": 16, "encoder_precision": "fp16"},
}
# Each of these replaces a preset's bits and method.
LLM_CHOICES = ("llm_mode", "recipe", "llm_bpw", "method")


def preset(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a preset, and over them those that are given beside it.

    Raises:
        OptionError: there is no such preset.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise OptionError(f"--preset is {name}: expected one of {', '.join(PRESETS)}")
    fields = dict(PRESETS[name])
    if any(choice in given for choice in LLM_CHOICES):
        fields = {key: value for key, value in fields.items() if key not in ("llm_bits", "method")}
    if given.get("layout") == "mlx":
        # Its encoder has the type of everything else.
        fields.pop("encoder_precision")
    return {"preset": name, **fields, **given}
