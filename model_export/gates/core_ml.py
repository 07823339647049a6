"""Core ML's own arithmetic, on every compute unit of the Mac that exports or verifies.

The conversion is held to its floor elsewhere, on any machine. Left is how each unit computes what
the package says, which a bundle's maker can't choose for its users: one that holds is enough, and
on each Mac the one that runs is measured there.
"""

from __future__ import annotations

from math import inf
from pathlib import Path

import numpy as np

from fastvlm_mlx.vision.package import describe
from fastvlm_mlx.vision.units import floor_db
from model_export.gates.gate import Gate


def core_ml_gates(
    package: Path, pixels: np.ndarray, exact: np.ndarray, floor: float | None
) -> list[Gate]:
    """SNR and time of each compute unit, not judged; and the gate, that one of them holds.

    Args:
        pixels: float32 [1, 3, S, S].
        exact: what the package makes of them with nothing rounded, [1, N, C].
        floor: in dB, in place of what the package's precision asks for.
    """
    from fastvlm_mlx.vision.coreml import measure_units

    size = pixels.shape[-1]
    floor = floor_db(describe(package, size).precision) if floor is None else floor
    measured = measure_units(package, [pixels], [exact])
    running = [each for each in measured if not each.error]
    nearest = max((each.snr_db for each in running), default=-inf)
    gates = [
        Gate(
            f"encoder SNR, Core ML on {each.units}",
            each.snr_db,
            "dB",
            floor,
            True,
            detail=each.error or f"{each.seconds:.4g} s an image, {each.first_s:.4g} s the first",
            left_out="one of the compute units that holds is enough",
        )
        for each in measured
    ]
    told = "; ".join(each.sentence() for each in measured)
    return [*gates, Gate("encoder SNR through Core ML", nearest, "dB", floor, True, detail=told)]
