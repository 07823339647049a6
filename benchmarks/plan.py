"""How far `fastvlm plan` is off: every published figure, what the model predicts, the error.

    python -m benchmarks.plan [--json FILE]

The factors of `model_export/planning/roofline.py` are fitted here, by least squares of the
logarithms. A figure that they come from is predicted with factors fitted without any figure of its
chip (without that figure alone, where its chip has all there are); the others with all of them. The
table is in `docs/planning.md`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from math import log
from pathlib import Path
from statistics import median

import numpy as np
from scipy.optimize import least_squares

from benchmarks.published import ENCODERS, MODELS, PUBLISHED, Measured
from fastvlm_mlx.bundle.config import VisionConfig
from model_export.planning.devices import CHIPS
from model_export.planning.plan import lm_buffers
from model_export.planning.roofline import (
    FITTED,
    Efficiency,
    decode_seconds,
    encoder_macs,
    encoder_seconds,
    kv_cache_bytes,
    prefill_seconds,
)

VISION = VisionConfig()
# The factors that each stage's figures settle, in the order in which they are fitted.
STAGES = {"decode": ("bandwidth", "layer_s"), "encoder": ("neural_engine", "call_s")}


def predict(row: Measured, fit: Efficiency = FITTED) -> float:
    """The figure of `row`, in its unit."""
    chip = CHIPS[row.chip]
    if row.stage == "encoder":
        macs = (
            int(ENCODERS[row.model] * 1e9) if row.model in ENCODERS else encoder_macs(VISION).total
        )
        return _known(encoder_seconds(chip, macs, neural_engine=True, fit=fit))
    decoder = MODELS[row.model]
    weights = decoder.read_weights * row.bits / 8
    if row.stage == "prefill":
        return row.tokens / _known(
            prefill_seconds(chip, decoder, row.tokens, cores=row.cores, fit=fit)
        )
    if row.stage == "decode":
        read = weights + 2 * decoder.kv_elements(row.tokens)
        return 1 / _known(decode_seconds(chip, decoder, read, fit=fit))
    if row.stage == "gain":
        older = replace(row, stage="decode", chip="M4")
        return predict(replace(row, stage="decode"), fit) / predict(older, fit)
    if row.stage == "memory":
        return weights + kv_cache_bytes(decoder, row.tokens, 2) + lm_buffers(decoder, row.tokens, 2)
    look = encoder_seconds(chip, encoder_macs(VISION).total, neural_engine=True, fit=fit)
    return _known(look) + _known(prefill_seconds(chip, decoder, row.tokens, fit=fit))


def fit(rows: Sequence[Measured], start: Efficiency = FITTED) -> Efficiency:
    """The factors that predict `rows` best; those that no row settles stay."""
    found = start
    for stage, names in STAGES.items():
        found = _fitted(found, names, [r for r in rows if r.stage == stage])
    for accelerated, name in ((False, "gpu"), (True, "accelerated")):
        part = [r for r in rows if r.stage == "prefill"]
        part = [r for r in part if CHIPS[r.chip].accelerators is accelerated]
        found = _fitted(found, (name,), part)
    return found


def _fitted(start: Efficiency, names: tuple[str, ...], rows: list[Measured]) -> Efficiency:
    if not rows:
        return start

    def with_values(logs: np.ndarray) -> Efficiency:
        return replace(start, **dict(zip(names, np.exp(logs).tolist(), strict=True)))

    def residuals(logs: np.ndarray) -> list[float]:
        return [log(predict(row, with_values(logs)) / row.value) for row in rows]

    first = np.log([getattr(start, name) for name in names])
    return with_values(least_squares(residuals, first).x)


def held_out(row: Measured) -> Efficiency:
    """The factors without the figures of the row's chip, or all of them if it has no part."""
    if not row.fitted:
        return FITTED
    rest = [r for r in PUBLISHED if r.fitted and (r.chip, r.stage) != (row.chip, row.stage)]
    accelerated = CHIPS[row.chip].accelerators
    alike = [r for r in rest if CHIPS[r.chip].accelerators is accelerated]
    if row.stage == "prefill" and not any(r.stage == "prefill" for r in alike):
        rest = [r for r in PUBLISHED if r.fitted and r is not row]
    return fit(rest)


def _known(value: float | None) -> float:
    if value is None:
        raise SystemExit("a published figure is of a chip with a rate missing")
    return value


def _shown(stage: str, value: float) -> str:
    if stage in ("encoder", "ttft"):
        return f"{value * 1000:.3g} ms" if value < 0.1 else f"{value * 1000:.0f} ms"
    if stage == "memory":
        return f"{value / 1e6:.0f} MB"
    if stage == "gain":
        return f"{value:.2f}×"
    return f"{value:,.0f} tok/s" if value >= 100 else f"{value:.1f} tok/s"


def lines() -> list[str]:
    """The table, as `docs/planning.md` has it: a summary by stage, then every figure."""
    errors: dict[tuple[str, str], list[float]] = {}
    rows = []
    for row in PUBLISHED:
        predicted = predict(row, held_out(row))
        error = predicted / row.value - 1
        errors.setdefault((row.stage, "fitted" if row.fitted else "not fitted"), []).append(error)
        bits = "" if row.stage == "encoder" else f", {row.bits:g} bits"
        chip = row.chip + (f", {row.cores} cores" if row.cores else "")
        rows.append(
            f"| {row.stage} | {row.model}{bits} | {chip} | {_shown(row.stage, row.value)} | "
            f"{_shown(row.stage, predicted)} | {error:+.0%} | {row.source} |"
        )
    head = ["| stage | figures | median error | worst |", "|---|---|---|---|"]
    for (stage, kind), values in errors.items():
        worst = max(values, key=abs)
        head.append(
            f"| {stage}, {kind} | {len(values)} | {median(map(abs, values)):.0%} | {worst:+.0%} |"
        )
    return [
        *head,
        "",
        "| stage | model | chip | published | predicted | error | source |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    print("\n".join(lines()))
    if arguments.json:
        rows = [
            {**asdict(row), "predicted": predict(row, held_out(row)), "all": predict(row)}
            for row in PUBLISHED
        ]
        fitted = asdict(fit([row for row in PUBLISHED if row.fitted]))
        arguments.json.write_text(json.dumps({"rows": rows, "fitted": fitted}, indent=2) + "\n")


if __name__ == "__main__":
    main()
