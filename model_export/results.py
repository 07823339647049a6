"""What the exporter's functions give back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model_export.gates.gate import Gate


@dataclass(frozen=True)
class ExportResult:
    """A finished bundle, from `export` or `convert`.

    Attributes:
        path: the bundle's directory.
        manifest: the content of its manifest.json.
        gates: every figure it was judged by, with its limit.
        notes: what the user should be told, in sentences.
    """

    path: Path
    manifest: dict[str, Any]
    gates: tuple[Gate, ...]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether no gate failed."""
        return all(gate.passed for gate in self.gates)


@dataclass(frozen=True)
class VerifyResult:
    """A bundle that was checked again, from `verify`.

    Attributes:
        path: the bundle's directory.
        layout: app or mlx.
        files: how many files were compared with manifest.json; None where the bundle has none.
        gates: every figure it was judged by, with its limit.
    """

    path: Path
    layout: str
    files: int | None
    gates: tuple[Gate, ...]

    @property
    def passed(self) -> bool:
        """Whether no gate failed."""
        return all(gate.passed for gate in self.gates)
