"""The limits that a bundle is judged by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fastvlm_mlx.errors import OptionError
from model_export.options.checks import check_types

# Floors of the encoder's signal-to-noise ratio in dB, RMS of the reference over RMS of the error.
ENCODER_SNR_DB = {"fp32": 80.0, "fp16": 35.0, "bf16": 20.0}
# A compressed encoder has by itself only to be louder than its noise; what it costs, the answers
# show.
COMPRESSED_SNR_DB = 0.0
FLAT_NAMES: Mapping[str, str] = {}


@dataclass(frozen=True)
class GateLimits:
    """Limits that stand in place of the gates' own, where they are given.

    Attributes:
        min_snr_db: floor of the encoder's signal-to-noise ratio, in dB.
        max_kl_nats: ceiling of the KL divergence of the next token, in nats.
        min_agreement: floor of the share of places where both sides choose the same token.
    """

    min_snr_db: float | None = None
    max_kl_nats: float | None = None
    min_agreement: float | None = None

    def __post_init__(self) -> None:
        check_types(self, FLAT_NAMES)
        for name, value in vars(self).items():
            if value is not None and value < 0:
                raise OptionError(f"--{name.replace('_', '-')} is {value}: expected zero or more")
        if self.min_agreement is not None and self.min_agreement > 1:
            raise OptionError(f"--min-agreement is {self.min_agreement}: expected a share up to 1")

    def snr_floor_db(self, encoder_format: str) -> float:
        """The floor of the encoder's signal-to-noise ratio in dB.

        Args:
            encoder_format: what the encoder is stored in, as `ExportOptions.encoder_format`.
        """
        if self.min_snr_db is not None:
            return self.min_snr_db
        return ENCODER_SNR_DB.get(encoder_format, COMPRESSED_SNR_DB)
