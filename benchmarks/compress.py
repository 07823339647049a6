"""What each precision of the encoder costs at its real size: bytes, noise, seconds, memory.

    python -m benchmarks.compress [CHOICE …] [--size 1024] [--json FILE]

A choice is a precision, or `mixed:5.5` for that many bits per weight. The weights are random, in
the published encoder's shapes. Measured as the gate does: the package as written, each operation's
result rounded to fp16, against the unfolded module on a photograph that nothing was calibrated on.
Each choice has a process of its own; seconds are of processor time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.encoder import machine, peak_rss_bytes
from fastvlm_mlx.bundle.config import VisionConfig
from fastvlm_mlx.image.preprocess import ImageProcessor

CHOICES = ("fp16", "int8", "palette6", "palette4", "mixed")


def _state(config: VisionConfig) -> dict[str, Any]:
    import torch

    from benchmarks.synthetic import encoder_state_dict

    # A checkpoint's own precision.
    return {
        k: v.bfloat16() if v.is_floating_point() else v
        for k, v in encoder_state_dict(config).items()
        if isinstance(v, torch.Tensor)
    }


def _photograph(config: VisionConfig, name: str) -> np.ndarray:
    from model_export.samples.images import photographs

    (sample,) = (p for p in photographs() if p.name == name)
    return ImageProcessor(config.image_size, "pad")(sample.image)


def reference(config: VisionConfig) -> np.ndarray:
    """What the unfolded module makes of the gate's photograph."""
    import torch

    from model_export.encoder.reference import FastViTHD

    with torch.device("meta"):
        module = FastViTHD(config)
    state = {k: v.float() if v.is_floating_point() else v for k, v in _state(config).items()}
    module.load_state_dict(state, assign=True)
    module.eval().to(memory_format=torch.channels_last)
    with torch.inference_mode():
        return module(torch.from_numpy(_photograph(config, "china.jpg"))).contiguous().numpy()


def write(config: VisionConfig, choice: str, package: Path) -> dict[str, Any]:
    """Compress and export: seconds of the compression alone, peak memory of both."""
    from model_export.encoder import coreml, fastvithd
    from model_export.encoder.compression import uniform
    from model_export.options import ExportOptions
    from model_export.quantization.bits.encoder_sensitivity import calibration_pixels
    from model_export.quantization.bits.mixed import mixed
    from model_export.samples.calibration import load_calibration

    precision, _, bpw = choice.partition(":")
    options = ExportOptions.of(
        encoder_precision=precision,  # type: ignore[arg-type]
        encoder_bpw=float(bpw) if bpw else None,
    )
    module = fastvithd.fold(_state(config), config)
    started = time.process_time()
    compression = coreml.NOT_COMPRESSED
    if precision == "mixed":
        pixels = calibration_pixels(load_calibration(None, config), config, "pad")
        compression = mixed(module, pixels, options.encoder.bits_per_weight)
    elif options.encoder.compressed:
        compression = uniform(module, precision)
    compress_s = time.process_time() - started
    info = coreml.export_encoder(
        module,
        config,
        package,
        coreml.Form(
            "fp16",
            coreml.EncoderMetadata("synthetic", "none: random weights"),
            compression,
            options.encoder.target,
        ),
    )
    return {
        "choice": choice,
        "deployment_target": info.deployment_target,
        "bytes": info.bytes,
        "compress_s": compress_s,
        "export_s": time.process_time() - started - compress_s,
        "peak_rss_bytes": peak_rss_bytes(),
        "formats": compression.formats,
    }


def judge(config: VisionConfig, package: Path, expected: np.ndarray) -> dict[str, Any]:
    from fastvlm_mlx.vision.program.mlprogram import MLProgramEncoder
    from model_export.gates.encoder import mean_cosine, snr_db

    pixels = _photograph(config, "china.jpg")
    found = MLProgramEncoder(package).evaluate(pixels, round_fp16=True)
    return {"snr_db": snr_db(expected, found), "cosine": mean_cosine(expected, found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("choices", nargs="*", default=CHOICES)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    config = VisionConfig(image_size=arguments.size)
    expected = reference(config)
    print("choice     first iOS           MB   SNR dB   cosine    compress s  export s  peak GB")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for choice in arguments.choices:
            package = Path(folder) / f"{choice.replace(':', '-')}.mlpackage"
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=context) as process:
                row = process.submit(write, config, choice, package).result()
            row |= judge(config, package, expected)
            rows.append(row)
            print(
                f"{choice:9}  {row['deployment_target']:14}  {row['bytes'] / 1e6:6.1f}  "
                f"{row['snr_db']:7.2f}  {row['cosine']:.6f}  {row['compress_s']:10.0f}  "
                f"{row['export_s']:8.0f}  {row['peak_rss_bytes'] / 1e9:7.2f}",
                flush=True,
            )
    if arguments.json:
        result = {"machine": machine(), "image_size": arguments.size, "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
