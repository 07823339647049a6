"""The names of published models, and what each of them stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastvlm_mlx.bundle.kind import is_like_a_hub_id

# Where Apple's own scripts (get_models.sh, get_pretrained_mlx_model.sh) download from.
ARCHIVES = "https://ml-site.cdn-apple.com/datasets/fastvlm"
CHECKPOINT, BUNDLE = "checkpoint", "bundle"


@dataclass(frozen=True)
class Published:
    """A published model.

    Attributes:
        what: `CHECKPOINT` or `BUNDLE`.
        hub: its hub id, if it is taken from there.
        archive: the name of Apple's archive, without its suffix, if it is taken from that.
    """

    name: str
    what: str
    hub: str | None = None
    archive: str | None = None

    @property
    def origin(self) -> str:
        return f"{self.hub} on the hub" if self.hub else f"Apple's archive {self.archive}.zip"


def _published() -> Mapping[str, Published]:
    found = []
    for size, llm in (("0.5b", "fp16"), ("1.5b", "int8"), ("7b", "int4")):
        name, archive = f"fastvlm-{size}", f"llava-fastvithd_{size}"
        found.append(Published(name, CHECKPOINT, hub=f"apple/FastVLM-{size.upper()}"))
        for stage in ("stage2", "stage3"):
            found.append(Published(f"{name}-{stage}", CHECKPOINT, archive=f"{archive}_{stage}"))
        found.append(Published(f"{name}-{llm}", BUNDLE, archive=f"{archive}_stage3_llm.{llm}"))
    return {one.name: one for one in found}


PUBLISHED = _published()


def published(model: object) -> Published | None:
    """The published model of that name, however its letters are written."""
    return PUBLISHED.get(str(model).lower())


def is_elsewhere(model: object) -> bool:
    """Whether there is no directory of that name here, and it may be a model to be downloaded."""
    try:
        if not isinstance(model, str | Path) or Path(model).expanduser().exists():
            return False
    except (OSError, RuntimeError, ValueError):
        return False
    # What lies below a directory that exists is rather a path that is misspelt.
    return published(model) is not None or is_like_a_hub_id(Path(model))
