"""What each choice of bits costs in answers: the demo checkpoint on 1,000 held-out questions.

    python -m benchmarks.answers [--questions 1000] [--only CHOICE …] [--encoder-compute TYPE]
        [--json FILE]

PyTorch answers from the source checkpoint (transformers' Qwen2 on the unfolded encoder); every
bundle answers through the runtime. Lost are the answers that PyTorch has right and the bundle has
not.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastvlm_mlx
from model_export import demo
from model_export.demo.model import DemoModel, to_pixels
from model_export.options import ExportOptions
from model_export.pipeline import export
from model_export.samples import scenes

CHECKPOINT = Path(demo.__path__[0]) / "checkpoint"
PLAIN = (
    (16, "fp32"),
    (16, "fp16"),
    (16, "int8"),
    (16, "palette6"),
    (16, "palette4"),
    (16, "mixed"),
    (8, "fp16"),
    (6, "fp16"),
    (5, "fp16"),
    (4, "fp16"),
    (3, "fp16"),
)
CHOICES = {
    **{f"{p}-{bits}": {"encoder_precision": p, "llm_bits": bits} for bits, p in PLAIN},
    **{name: {"preset": name} for name in ("balanced", "phone")},
}


def right(texts: list[str], pairs: list[tuple[scenes.Scene, scenes.Question]]) -> np.ndarray:
    return np.array([scenes.is_right(q, text) for text, (_, q) in zip(texts, pairs, strict=True)])


def bundle_answers(
    path: Path,
    pairs: list[tuple[scenes.Scene, scenes.Question]],
    features: dict[str, list[Any]],
    encoder_compute: str,
) -> list[str]:
    """Through the runtime; images are encoded once for each precision of the encoder."""
    model = fastvlm_mlx.load(path, encoder_compute=encoder_compute)
    precision = json.loads((path / "manifest.json").read_text())["encoder"]["precision"]
    if precision not in features:
        features[precision] = [
            model.encoder(model.image_processor(scene.draw(256))) for scene, _ in pairs
        ]
    texts = []
    for array, (_, question) in zip(features[precision], pairs, strict=True):
        seen = model.project(array)
        texts.append(model.generate(seen, question.prompt, max_tokens=48).text)
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--only", nargs="+", choices=CHOICES, help="of the choices these")
    parser.add_argument(
        "--encoder-compute", default="auto", help="what the bundle's encoder is computed in"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    pairs = scenes.held_out(arguments.questions)

    source = DemoModel.load(CHECKPOINT)
    texts: list[str] = []
    with torch.inference_mode():
        for i in range(0, len(pairs), 50):
            part = pairs[i : i + 50]
            seen = source.encode(to_pixels([scene.draw(256) for scene, _ in part]))
            texts += source.answer(seen, [question.prompt for _, question in part])
    before = right(texts, pairs)
    print(f"{platform.platform()}, {len(pairs)} questions, PyTorch right: {before.sum()}")
    print("choice       bits/weight  bundle MB  right  lost  KL nats  encoder SNR dB")
    rows = []
    features: dict[str, list[Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, fields in CHOICES.items():
            if arguments.only and name not in arguments.only:
                continue
            out = Path(folder) / name
            started = time.perf_counter()
            options = ExportOptions.of(**fields, allow_failed_gates=True)
            manifest = export(CHECKPOINT, out, options).manifest
            exported_s = time.perf_counter() - started
            answered = bundle_answers(out, pairs, features, arguments.encoder_compute)
            after = right(answered, pairs)
            gates = {gate["name"]: gate["value"] for gate in manifest["gates"]}
            row = {
                "choice": name,
                "encoder": options.encoder.precision,
                "llm_bits": options.llm.resolved_bits,
                "bits_per_weight": manifest["llm"]["bits_per_weight"],
                "bundle_bytes": sum(f["bytes"] for f in manifest["files"].values()),
                "right": int(after.sum()),
                "lost": int((before & ~after).sum()),
                "kl_nats": gates["KL divergence"],
                "snr_db": gates["encoder SNR"],
                "export_s": exported_s,
            }
            rows.append(row)
            print(
                f"{name:11}  {row['bits_per_weight']:11}  "
                f"{row['bundle_bytes'] / 1e6:9.2f}  {row['right']:5}  {row['lost']:4}  "
                f"{row['kl_nats']:7.2g}  {row['snr_db']:.1f}",
                flush=True,
            )
    if arguments.json:
        result = {
            "questions": len(pairs),
            "pytorch_right": int(before.sum()),
            "encoder_compute": arguments.encoder_compute,
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
