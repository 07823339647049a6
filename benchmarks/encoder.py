"""FastViTHD at its real size: exported, then timed beside torch in the same run.

`python -m benchmarks.encoder [--size 1024] [--runs 3] [--json FILE]`

Three ways to compute the same features: the plain torch module of the checkpoint (unfolded), the
folded one channels-last, and the `.mlpackage` evaluated op by op. They take turns, so that a busy
machine slows all three. Weights are random. Export, evaluation and torch each have a process of
their own for their peak of memory.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from fastvlm_mlx.bundle.config import VisionConfig

PLAIN, FOLDED, PACKAGE = "torch", "torch folded", "mlpackage"
# What it must reach: evaluating the package against the plain torch module.
MAX_RATIO = 1.5


def peak_rss_bytes() -> int:
    """The largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": os.getloadavg()[0],
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "coremltools", "numpy")},
        },
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Wall-clock seconds of one call, and what it returned."""
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def export(config: VisionConfig, package: Path, precision: str) -> dict[str, Any]:
    """Fold and export random weights to `package`."""
    import torch

    from benchmarks.synthetic import encoder_state_dict
    from fastvlm_mlx.vision.package import quiet_coremltools
    from model_export.encoder.coreml import EncoderMetadata, Form, export_encoder
    from model_export.encoder.fastvithd import fold

    with quiet_coremltools():
        import_s, _ = timed(import_module, "coremltools")
    state = {
        # A checkpoint's own precision, and half the memory until it is folded.
        k: v.to(torch.bfloat16) if v.is_floating_point() else v
        for k, v in encoder_state_dict(config).items()
    }
    fold_s, module = timed(fold, state, config)
    del state
    metadata = EncoderMetadata("synthetic", "none: random weights")
    export_s, info = timed(
        lambda: export_encoder(module, config, package, Form(precision, metadata))
    )
    return {
        "import_s": import_s,
        "fold_s": fold_s,
        "export_s": export_s,
        "package_bytes": info.bytes,
        "deployment_target": info.deployment_target,
        "ops": info.ops,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def evaluate(config: VisionConfig, package: Path) -> dict[str, Any]:
    """Load the package and evaluate it once, with fp16 rounding off."""
    from fastvlm_mlx.vision.package import quiet_coremltools
    from fastvlm_mlx.vision.program.mlprogram import MLProgramEncoder

    with quiet_coremltools():
        import_s, _ = timed(import_module, "coremltools")
    load_s, encoder = timed(MLProgramEncoder, package)
    images = np.zeros((1, 3, config.image_size, config.image_size), np.float32)
    first_s, _ = timed(encoder, images)
    return {
        "import_s": import_s,
        "load_s": load_s,
        "first_s": first_s,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def plain(config: VisionConfig) -> dict[str, Any]:
    """The plain torch module, once."""
    import torch

    module = _reference(config)
    with torch.inference_mode():
        module(torch.zeros(1, 3, config.image_size, config.image_size))
    return {"peak_rss_bytes": peak_rss_bytes()}


def side_by_side(config: VisionConfig, package: Path, runs: int) -> dict[str, Any]:
    """Seconds for each of the three, in turns after a round to warm up, and how they agree."""
    import torch

    from benchmarks.synthetic import encoder_state_dict
    from fastvlm_mlx.vision.program.mlprogram import MLProgramEncoder
    from model_export.encoder.fastvithd import fold

    size = config.image_size
    images = np.random.default_rng(0).random((1, 3, size, size), np.float32)
    rows = torch.from_numpy(images)
    last = rows.contiguous(memory_format=torch.channels_last)
    reference = _reference(config)
    folded = fold(_rounded(encoder_state_dict(config)), config)
    folded = folded.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    encoder = MLProgramEncoder(package)
    calls: dict[str, Callable[[], np.ndarray]] = {
        PLAIN: lambda: reference(rows).numpy(),
        FOLDED: lambda: folded(last).contiguous().numpy(),
        PACKAGE: lambda: encoder(images),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        features = {name: call() for name, call in calls.items()}
        for _ in range(runs):
            for name, call in calls.items():
                seconds[name].append(timed(call)[0])
        rounded_s, rounded = timed(lambda: encoder.evaluate(images, round_fp16=True))
    medians = {name: median(times) for name, times in seconds.items()}
    return {
        "seconds": seconds,
        "median_s": medians,
        "ratio_to_torch": {name: m / medians[PLAIN] for name, m in medians.items()},
        "rounded_fp16_s": rounded_s,
        "snr_db": {
            FOLDED: _snr_db(features[PLAIN], features[FOLDED]),
            PACKAGE: _snr_db(features[PLAIN], features[PACKAGE]),
            "mlpackage, each fp16 result rounded": _snr_db(features[PLAIN], rounded),
        },
    }


def _rounded(state: dict[str, Any]) -> dict[str, Any]:
    """Weights as the exported checkpoint holds them, in bfloat16, widened again."""
    return {k: v.bfloat16().float() if v.is_floating_point() else v for k, v in state.items()}


def _reference(config: VisionConfig) -> Any:
    import torch

    from benchmarks.synthetic import encoder_state_dict
    from model_export.encoder.reference import FastViTHD

    with torch.device("meta"):
        module = FastViTHD(config)
    module.load_state_dict(_rounded(encoder_state_dict(config)), assign=True)
    return module.eval()


def _snr_db(reference: np.ndarray, found: np.ndarray) -> float:
    return float(20 * np.log10(np.linalg.norm(reference) / np.linalg.norm(found - reference)))


def _apart(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Run in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def measure(size: int, runs: int, precision: str) -> dict[str, Any]:
    """Everything, as one JSON object."""
    config = VisionConfig(image_size=size)
    about = machine()
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch) / "fastvithd.mlpackage"
        return {
            "machine": about,
            "image_size": size,
            "precision": precision,
            "export": _apart(export, config, package, precision),
            "evaluate": _apart(evaluate, config, package),
            "torch": _apart(plain, config),
            "side_by_side": _apart(side_by_side, config, package, runs),
        }


def report(result: dict[str, Any]) -> str:
    """The same for people."""
    about, exported = result["machine"], result["export"]
    together, once = result["side_by_side"], result["evaluate"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    lines = [
        f"{about['processor']}, {about['cores']} cores, {about['memory_bytes'] / 2**30:.0f} GiB, "
        f"load {about['load_average']:.1f}; {versions}",
        f"FastViTHD at {result['image_size']}×{result['image_size']}, {result['precision']}",
        f"export: fold {exported['fold_s']:.1f} s, Core ML {exported['export_s']:.1f} s, peak "
        f"{_gb(exported)}, {exported['package_bytes'] / 1e6:.0f} MB on disk, "
        f"{exported['deployment_target']}",
        "ops: " + ", ".join(f"{n} {name}" for name, n in exported["ops"].items()),
        f"package: load {once['load_s']:.1f} s, peak {_gb(once)}",
        f"torch: peak {_gb(result['torch'])}",
    ]
    for name, seconds in together["median_s"].items():
        snr = together["snr_db"].get(name)
        lines.append(
            f"{name:<13} {seconds:7.2f} s  {together['ratio_to_torch'][name]:5.2f} × torch"
            + (f"  SNR {snr:.1f} dB" if snr is not None else "")
        )
    ratio = together["ratio_to_torch"][PACKAGE]
    verdict = "within" if ratio <= MAX_RATIO else "ABOVE"
    lines.append(f"package over torch: {ratio:.2f}, {verdict} the limit of {MAX_RATIO}")
    return "\n".join(lines)


def _gb(measured: dict[str, Any]) -> str:
    return f"{measured['peak_rss_bytes'] / 1e9:.2f} GB"


def main() -> None:
    parser = argparse.ArgumentParser(description="Export FastViTHD and time it beside torch.")
    parser.add_argument("--size", type=int, default=1024, help="pixels of one side")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--precision", choices=("fp16", "fp32"), default="fp16")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    result = measure(options.size, options.runs, options.precision)
    print(report(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
