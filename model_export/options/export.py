"""What an export is asked for: the groups together, and what holds between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

from fastvlm_mlx.bundle.quantization import Format
from fastvlm_mlx.errors import OptionError
from model_export import presets
from model_export.options import destination, encoder, limits, llm
from model_export.options.destination import DestinationOptions
from model_export.options.encoder import EncoderOptions
from model_export.options.limits import GateLimits
from model_export.options.llm import LLMOptions
from model_export.options.loaders import LOADERS

ENCODER_FORMATS = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
GROUPS: Mapping[str, tuple[type, Mapping[str, str]]] = {
    "encoder": (EncoderOptions, encoder.FLAT_NAMES),
    "llm": (LLMOptions, llm.FLAT_NAMES),
    "limits": (GateLimits, limits.FLAT_NAMES),
    "destination": (DestinationOptions, destination.FLAT_NAMES),
}


class FlatOptions(TypedDict, total=False):
    """Every option by its name on the command line, in the order of the manifest's record."""

    llm_bits: int | None
    group_size: int | None
    llm_mode: Literal["affine", "mxfp4", "mxfp8", "nvfp4"]
    embed_bits: int | None
    head_bits: int | None
    projector_bits: int
    recipe: str | Path | None
    llm_bpw: float | None
    method: Literal["rtn", "awq", "gptq", "dwq"]
    calibration: str | Path | None
    dtype: Literal["float16", "bfloat16", "float32"]
    encoder_precision: Literal["fp16", "fp32", "int8", "palette6", "palette4", "mixed"]
    encoder_bpw: float | None
    deployment_target: Literal["iOS15", "iOS16", "iOS17", "iOS18"] | None
    layout: Literal["app", "mlx"]
    overwrite: bool
    allow_failed_gates: bool
    image_size: int | None
    image_sizes: tuple[int, ...]
    image_input: bool
    min_snr_db: float | None
    max_kl_nats: float | None
    min_agreement: float | None
    preset: str | None


FLAT_NAMES = tuple(FlatOptions.__annotations__)


@dataclass(frozen=True)
class ExportOptions:
    """What an export is asked for, in four groups.

    `ExportOptions.of(llm_bits=4, layout="mlx")` makes one from the names of the command line.

    Attributes:
        encoder: of the vision encoder.
        llm: of the language model and the projector.
        limits: what the bundle is judged by, in place of the gates' own limits.
        destination: who loads the bundle, and what happens at its destination.
        calibration: a directory of images or a JSONL file. The search for `llm.bpw`, a method
            other than rtn and a mixed encoder look at it; scenes or a photograph stand in for it.
        preset: the name of the set that some of these come from, for the record.
    """

    encoder: EncoderOptions = field(default_factory=EncoderOptions)
    llm: LLMOptions = field(default_factory=LLMOptions)
    limits: GateLimits = field(default_factory=GateLimits)
    destination: DestinationOptions = field(default_factory=DestinationOptions)
    calibration: str | Path | None = None
    preset: str | None = None

    @classmethod
    def of(cls, **flat: Unpack[FlatOptions]) -> ExportOptions:
        """The options from their names on the command line, a preset's among them.

        Raises:
            OptionError: there is no such option or preset, or the values don't go together.
        """
        name = flat.get("preset")
        return cls._grouped(flat if name is None else presets.preset(name, flat))

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> ExportOptions:
        """The options that a manifest records, which may be an older release's."""
        known = {name: record[name] for name in FLAT_NAMES if name in record}
        if known.get("llm_bpw") is not None or known.get("recipe") in llm.RECIPES:
            # It is recorded all the same; the search or the recipe decided the bits.
            known.pop("llm_bits", None)
        if known.get("layout") == "mlx":
            # What it says of the encoder follows from the language model's type.
            known.pop("encoder_precision", None)
        return cls._grouped(known)

    @classmethod
    def _grouped(cls, flat: Mapping[str, Any]) -> ExportOptions:
        if unknown := sorted(flat.keys() - set(FLAT_NAMES)):
            raise OptionError(
                f"{unknown[0]} is no option of an export: expected some of {', '.join(FLAT_NAMES)}"
            )
        groups: dict[str, Any] = {}
        for name, (group, names) in GROUPS.items():
            asked = {f.name: names.get(f.name, f.name) for f in fields(group)}
            groups[name] = group(**{own: flat[n] for own, n in asked.items() if n in flat})
        rest = {name: flat[name] for name in ("calibration", "preset") if name in flat}
        return cls(**groups, **rest)

    def __post_init__(self) -> None:
        for name, (group, _) in GROUPS.items():
            if not isinstance(getattr(self, name), group):
                raise OptionError(
                    f"{name} is {getattr(self, name)!r}: expected {group.__name__}, or use "
                    "ExportOptions.of(llm_bits=4), which takes the names of the command line"
                )
        if isinstance(self.calibration, Path):
            object.__setattr__(self, "calibration", str(self.calibration))
        for name in ("calibration", "preset"):
            value = getattr(self, name)
            if not isinstance(value, str | None):
                raise OptionError(f"--{name} is {value!r}: expected str | null")
        self._check_calibration()
        self._check_loader()
        if self.destination.layout == "mlx":
            self._check_mlx_encoder()

    @property
    def calibrates(self) -> bool:
        """Whether anything looks at calibration data."""
        searched = self.llm.bpw is not None
        return searched or self.llm.method != "rtn" or self.encoder.precision == "mixed"

    @property
    def encoder_format(self) -> str:
        """fp16, fp32, bf16 or what it is compressed to. In an `mlx` bundle the encoder has the type
        of everything else, because mlx-vlm's projector and language model compute in whatever it
        hands them."""
        if self.destination.layout == "app":
            return self.encoder.precision
        return ENCODER_FORMATS[self.llm.dtype]

    @property
    def snr_floor_db(self) -> float:
        """The floor of the encoder's signal-to-noise ratio."""
        return self.limits.snr_floor_db(self.encoder_format)

    def flat(self) -> dict[str, Any]:
        """The options by their names on the command line: `of` makes the same export of them. The
        language model's bits and group size are those that hold where none were given."""
        values: dict[str, Any] = {"calibration": self.calibration, "preset": self.preset}
        for name, (_, names) in GROUPS.items():
            group = getattr(self, name)
            values |= {names.get(f.name, f.name): getattr(group, f.name) for f in fields(group)}
        values["llm_bits"] = None if self.llm.bits_decided else self.llm.resolved_bits
        values["group_size"] = self.llm.resolved_group_size
        return {name: values[name] for name in FLAT_NAMES}

    def to_record(self) -> dict[str, Any]:
        """The options as the manifest records them, resolved. The limits of the answers are in it
        where they were given; else the gates find them."""
        app = self.destination.layout == "app"
        mixed = self.encoder.precision == "mixed"
        record = self.flat() | {
            "llm_bits": self.llm.resolved_bits,
            "encoder_precision": self.encoder_format,
            "encoder_bpw": self.encoder.bits_per_weight if mixed else None,
            "deployment_target": self.encoder.target if app else None,
            "min_snr_db": self.snr_floor_db,
        }
        if not self.llm.has_groups:
            record["group_size"] = None
        del record["overwrite"]
        return record

    def _check_calibration(self) -> None:
        if self.calibration is not None and not self.calibrates:
            raise OptionError(
                "--calibration is given and nothing looks at it: add --llm-bpw, a --method, or "
                "--encoder-precision mixed"
            )

    def _check_loader(self) -> None:
        """The layout's loaders know the forms that are asked for."""
        loader, asked = LOADERS[self.destination.layout], self.llm
        forms: dict[str, Format | None] = {
            "--llm-bits" if asked.mode == "affine" else "--llm-mode": asked.format,
            "--embed-bits": asked.part_format(asked.embed_bits or 16),
            "--head-bits": asked.part_format(asked.head_bits or 16),
            "--projector-bits": asked.part_format(asked.projector_bits),
        }
        for option, form in forms.items():
            if form is not None and not loader.knows(form):
                elsewhere = [name for name, other in LOADERS.items() if other.knows(form)]
                raise OptionError(
                    f"layout {self.destination.layout} can't hold {form} ({option}): "
                    f"{loader.program} ({loader.versions}) reads {loader.known()}, choose one of "
                    f"those, or --layout {' or '.join(elsewhere)}"
                )

    def _check_mlx_encoder(self) -> None:
        if self.encoder.image_input:
            raise OptionError(
                "--image-input is for Core ML's encoder, and an mlx bundle has none: leave it out"
            )
        if self.encoder.precision != "fp16":
            advice = "use --dtype float32" if self.encoder.precision == "fp32" else "leave it out"
            raise OptionError(
                f"--encoder-precision {self.encoder.precision} is for Core ML's encoder, and the "
                f"encoder of an mlx bundle has the type of --dtype: {advice}"
            )
        if self.encoder.deployment_target is not None:
            raise OptionError(
                "--deployment-target is for Core ML's encoder, and an mlx bundle has none: leave "
                "it out"
            )
