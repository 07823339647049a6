"""Which of a Mac's compute units run an encoder, how exactly and how fast, and which one to use.

Core ML computes otherwise on each: a Neural Engine in fp16 throughout, with sums as its own
hardware makes them. So each is measured, and one that is near enough is enough.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from math import inf, isfinite, log10
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from fastvlm_mlx.bundle.schema import to_json
from fastvlm_mlx.errors import EncoderError
from fastvlm_mlx.vision.package import quiet_coremltools

# Names of coremltools.ComputeUnit.
NAMES = {"all": "ALL", "cpu": "CPU_ONLY", "gpu": "CPU_AND_GPU", "ne": "CPU_AND_NE"}
# Of Core ML's output against the package's own arithmetic with nothing rounded. What fp16 costs
# is known from the emulation, 10 to 20 dB above; in fp32 kernels differ in how they sum.
FLOOR_DB = {"fp32": 60.0}
FLOOR_FP16_DB = 35.0
_TIMES = 3

Encode = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Measured:
    """An encoder on some compute units.

    Attributes:
        units: all, cpu, gpu or ne.
        snr_db: of the worst image, RMS over RMS of the error; infinite without any.
        seconds: of an image, the median of some.
        first_s: until the first features, with what Core ML prepares at that.
        error: why there is nothing of the above.
    """

    units: str
    snr_db: float = -inf
    seconds: float = inf
    first_s: float = inf
    error: str = ""

    def holds(self, floor_db: float) -> bool:
        return not self.error and self.snr_db >= floor_db

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: None."""
        found = {key: value for key, value in asdict(self).items() if value != ""}
        return {
            k: None if isinstance(v, float) and not isfinite(v) else v for k, v in found.items()
        }

    def sentence(self) -> str:
        if self.error:
            return f"{self.units} can't: {self.error}"
        return f"{self.units} {self.snr_db:.1f} dB in {self.seconds * 1000:.1f} ms"


def floor_db(precision: str) -> float:
    """What one of the compute units has to hold, by `PackageInfo.precision`."""
    return FLOOR_DB.get(precision, FLOOR_FP16_DB)


def snr_db(reference: np.ndarray, features: np.ndarray) -> float:
    """Signal-to-noise ratio in dB; infinite where there is no error, and less so where there is
    no number."""
    reference = reference.astype(np.float64)
    signal = float(np.square(reference).mean())
    noise = float(np.square(features - reference).mean())
    if not isfinite(noise):
        return -inf
    return inf if noise == 0 else 10 * log10(signal / noise) if signal else -inf


def available() -> tuple[str, ...]:
    """The compute units of this Mac: virtual ones, as of hosted CI, have no Neural Engine.

    Core ML takes "ne" and "gpu" there too, and runs on the CPU.
    """
    found: set[str] = set()
    # Before macOS 14 there is nothing to ask; then all are tried.
    with quiet_coremltools(), suppress(AttributeError, TypeError, RuntimeError):
        from coremltools.models.compute_device import MLComputeDevice

        found = {type(d).__name__ for d in MLComputeDevice.get_all_compute_devices()}
    missing = {"gpu": "MLGPUComputeDevice", "ne": "MLNeuralEngineComputeDevice"}
    return tuple(n for n in NAMES if not found or n not in missing or missing[n] in found)


def measure(
    opened: Callable[[str], Encode],
    images: Sequence[np.ndarray],
    references: Sequence[np.ndarray],
    names: Sequence[str] | None = None,
) -> list[Measured]:
    """Measure compute units one after the other.

    Args:
        opened: makes the encoder on the compute units named.
        images: float32 [1, 3, S, S].
        references: of each image the right features, [1, N, C].
        names: of compute units; those that are here unless given.
    """
    results = []
    for name in available() if names is None else names:
        try:
            results.append(_measure(name, opened, images, references))
        except EncoderError as error:
            results.append(Measured(name, error=str(error)))
    return results


def _measure(
    name: str,
    opened: Callable[[str], Encode],
    images: Sequence[np.ndarray],
    references: Sequence[np.ndarray],
) -> Measured:
    started = time.perf_counter()
    encode = opened(name)
    features = [encode(images[0])]
    first_s = time.perf_counter() - started
    features += [encode(image) for image in images[1:]]
    times = []
    for _ in range(_TIMES):
        started = time.perf_counter()
        encode(images[0])
        times.append(time.perf_counter() - started)
    worst = min(snr_db(r, f) for r, f in zip(references, features, strict=True))
    return Measured(name, worst, median(times), first_s)


def best(measured: Sequence[Measured], floor: float) -> Measured:
    """The fastest of those that hold; where none does, the one that is nearest.

    Raises:
        EncoderError: none runs it.
    """
    running = [each for each in measured if not each.error]
    if not running:
        raise EncoderError(
            "no compute units run the encoder ("
            + "; ".join(each.sentence() for each in measured)
            + "): expected one that does, update macOS or export it again"
        )
    holding = [each for each in running if each.holds(floor)]
    if holding:
        return min(holding, key=lambda each: each.seconds)
    return max(running, key=lambda each: each.snr_db)


def probe(size: int) -> np.ndarray:
    """An image to measure with where there is no other, float32 [1, 3, S, S] from 0 to 1: coarse
    and fine structure as in a photograph, the same on every machine."""
    random = np.random.default_rng(0)
    total = np.zeros((size, size, 3), np.float32)
    side = 4
    while side <= size:
        noise = random.random((side, side, 3), np.float32)
        layers = [
            np.asarray(
                Image.fromarray(noise[..., c]).resize((size, size), Image.Resampling.BICUBIC)
            )
            for c in range(3)
        ]
        total += np.stack(layers, -1) / side
        side *= 2
    low, high = total.min(), total.max()
    return np.ascontiguousarray(((total - low) / (high - low)).transpose(2, 0, 1)[None])


def write_record(file: Path, units: str, reference: str, measured: Sequence[Measured]) -> None:
    """Keep what was measured; where that can't be, it is measured again."""
    content = {
        "chosen": units,
        "reference": reference,
        "measured": [each.to_dict() for each in measured],
    }
    with suppress(OSError):
        file.write_text(to_json(content) + "\n", encoding="utf-8")


def read_record(file: Path) -> str | None:
    """The compute units that were chosen, or None."""
    with suppress(OSError, ValueError, RecursionError):
        content = json.loads(file.read_text(encoding="utf-8"))
        chosen = content.get("chosen") if isinstance(content, dict) else None
        if isinstance(chosen, str) and chosen in NAMES:
            return chosen
    return None
