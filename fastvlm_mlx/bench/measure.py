"""Measure a plan: for each setting a process for each bundle, which take turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastvlm_mlx.bench.process import Process
from fastvlm_mlx.bench.settings import Plan, Setting
from fastvlm_mlx.bench.spread import Spread, ratios
from fastvlm_mlx.errors import OptionError

STAGES = ("preprocess_s", "encode_s", "project_s", "prefill_s")
SECONDS = (*STAGES, "ttft_s", "next_ttft_s", "decode_s")
MEASURED = (*SECONDS, "tokens_per_s")
# What is the same in every run of a row.
FIXED = ("image_tokens", "text_tokens", "generation_tokens", "image_size", "compute")

Progress = Callable[[str, float | None], None]


@dataclass
class Row:
    """A bundle at a setting, with the runs that there are so far."""

    bundle: Path
    setting: Setting
    runs: list[dict[str, Any]] = field(default_factory=list)

    def spread(self, name: str) -> Spread:
        return Spread.of([run[name] for run in self.runs])

    @property
    def load_s(self) -> float:
        """Of the process's one time: the bundle, and its encoder at the first image."""
        return float(self.runs[0]["load_s"])

    @property
    def peak_memory_bytes(self) -> int:
        return max(run["peak_memory_bytes"] for run in self.runs)

    def to_dict(self) -> dict[str, Any]:
        last = self.runs[-1]
        return {
            "bundle": str(self.bundle),
            **self.setting.to_dict(),
            **{name: last[name] for name in FIXED},
            "load_s": self.load_s,
            "peak_memory_bytes": self.peak_memory_bytes,
            **{name: self.spread(name).to_dict() for name in MEASURED},
            "runs": [{name: run[name] for name in MEASURED} for run in self.runs],
        }


@dataclass(frozen=True)
class Comparison:
    """How many times as fast the first bundle is as the second one, round by round."""

    setting: Setting
    speed: dict[str, Spread]
    memory: float

    @classmethod
    def of(cls, ours: Row, other: Row) -> Comparison:
        speed = {
            name: ratios([run[name] for run in other.runs], [run[name] for run in ours.runs])
            for name in SECONDS
            if all(run[name] for run in ours.runs)
        }
        return cls(ours.setting, speed, ours.peak_memory_bytes / other.peak_memory_bytes)

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.setting.to_dict(),
            "times_as_fast": {
                name.removesuffix("_s"): spread.to_dict() for name, spread in self.speed.items()
            },
            "memory_ratio": self.memory,
        }


def check(plan: Plan) -> None:
    """Everything that can be known before minutes are spent.

    Raises:
        BundleError, ConfigError, EncoderError: a bundle is incomplete.
        OptionError: a bundle does not take an image size, or has not such compute units.
        ImageError: the image can't be read.
    """
    from fastvlm_mlx.bundle.bundle import Bundle
    from fastvlm_mlx.components import check_bundle_compute_units
    from fastvlm_mlx.image.decode import load_image
    from fastvlm_mlx.sizes import sizes_of

    for path in plan.bundles:
        bundle = Bundle.open(path)
        for units in plan.compute_units:
            check_bundle_compute_units(bundle, units)
        for size in plan.image_sizes:
            sizes_of(bundle, size)
        context = bundle.config.text.max_position_embeddings
        longest = max(plan.prompt_tokens)
        if longest + plan.max_tokens > context:
            raise OptionError(
                f"--prompt-tokens {longest} and --max-tokens {plan.max_tokens} are more than the "
                f"context of {path}, {context:,} tokens: choose fewer"
            )
    if plan.image is not None:
        load_image(plan.image)


def measure(plan: Plan, progress: Progress) -> Iterator[Row]:
    """Rows with one run or more, as they are filled: what has been yielded grows meanwhile, so
    that an interruption loses no run."""
    settings = list(plan.settings)
    for place, setting in enumerate(settings):
        rows = [Row(bundle, setting) for bundle in plan.bundles]
        yield from rows
        stage = f"{shown(setting)} ({place + 1} of {len(settings)})"
        progress(f"{stage}: load", None)
        with ExitStack() as stack:
            processes = [
                stack.enter_context(Process(str(row.bundle), _job(plan, row))) for row in rows
            ]
            for process in processes:
                process.wait()
            rounds = plan.warmup + plan.runs
            for number in range(rounds):
                for turn, (row, process) in enumerate(zip(rows, processes, strict=True)):
                    progress(f"{stage}: runs", (number + turn / len(rows)) / rounds)
                    run = process.run(number)
                    if number >= plan.warmup:
                        row.runs.append(run)


def compare(rows: list[Row]) -> list[Comparison]:
    """Of each setting that two bundles have been measured at."""
    settings = dict.fromkeys(row.setting for row in rows)
    pairs = [[row for row in rows if row.setting == setting and row.runs] for setting in settings]
    return [Comparison.of(*pair) for pair in pairs if len(pair) == 2]


def _job(plan: Plan, row: Row) -> dict[str, Any]:
    setting = row.setting
    return {
        "bundle": str(row.bundle),
        "image": str(plan.image) if plan.image else None,
        "prompt_tokens": setting.prompt_tokens,
        "max_tokens": plan.max_tokens,
        "load": {
            "image_size": setting.image_size,
            "compute_units": setting.compute_units,
            "encoder_compute": plan.encoder_compute,
        },
    }


def shown(setting: Setting) -> str:
    """A setting in words, as far as it was chosen."""
    size = f"{setting.image_size} pixels, " if setting.image_size else ""
    units = f", {setting.compute_units}" if setting.compute_units != "auto" else ""
    return f"{size}question of {setting.prompt_tokens} tokens{units}"
