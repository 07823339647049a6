"""The exporter's part of the command line: its verbs, and what it adds to the runtime's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvlm_mlx.cli.app.verbs import Additions, Verb

if TYPE_CHECKING:
    from fastvlm_mlx.doctor.report import Exporter

VERBS = (
    Verb(
        "export",
        "Export",
        "Turn a checkpoint into a verified bundle.",
        "fastvlm export apple/FastVLM-0.5B my-bundle --preset phone",
        "model_export.cli.export",
        needs_export=True,
        writes=True,
    ),
    Verb(
        "convert",
        "Export",
        "Turn an mlx bundle into an app bundle, without its checkpoint.",
        "fastvlm convert mlx-bundle app-bundle",
        "model_export.cli.convert",
        needs_export=True,
        writes=True,
    ),
    Verb(
        "sweep",
        "Export",
        "Export a checkpoint in many ways and compare them all.",
        "fastvlm sweep apple/FastVLM-0.5B --out sweep --plot sweep.png",
        "model_export.cli.sweep",
        needs_export=True,
        writes=True,
    ),
    Verb(
        "plan",
        "Export",
        "Predict memory and speed on a device, without exporting.",
        "fastvlm plan apple/FastVLM-0.5B --device iphone-16-pro --llm-bits 4",
        "model_export.cli.plan",
    ),
    Verb(
        "verify",
        "Check",
        "Check a bundle again, by itself or against its checkpoint.",
        "fastvlm verify my-bundle --checkpoint apple/FastVLM-0.5B",
        "model_export.cli.verify",
        needs_export=True,
    ),
    Verb(
        "compare",
        "Check",
        "Compare the sizes and the losses of bundles and checkpoints.",
        "fastvlm compare bundle-4 bundle-8 --reference apple/FastVLM-0.5B",
        "model_export.cli.compare",
        needs_export=True,
    ),
    Verb(
        "demo",
        "Run",
        "Try export, check and answers on a small model that ships with the package.",
        "fastvlm demo",
        "model_export.cli.demo",
        needs_export=True,
        writes=True,
    ),
    Verb(
        "install",
        "Share",
        "Put a bundle into the Xcode project of Apple's demo app.",
        "fastvlm install my-bundle ml-fastvlm/app",
        "model_export.cli.install",
        writes=True,
    ),
    Verb(
        "push",
        "Share",
        "Upload a bundle to the Hugging Face hub, with a model card.",
        "fastvlm push my-bundle me/my-model --private",
        "model_export.cli.push",
        writes=True,
    ),
)


def _checkpoint_facts(path: Path) -> dict[str, Any]:
    from model_export.cli.facts import checkpoint_facts

    return checkpoint_facts(path)


def _exporter() -> Exporter:
    from model_export.demo.checkup import exporter

    return exporter()


def _resolve(model: str) -> Path:
    from fastvlm_mlx.cli import show
    from model_export.cached import resolve

    with show.stages() as progress:
        return resolve(model, progress)


ADDITIONS = Additions(VERBS, _checkpoint_facts, _exporter, _resolve)
