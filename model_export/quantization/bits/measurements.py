"""The cache of measured sensitivities: the next search of the same checkpoint reads them."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from fastvlm_mlx.bundle.quantization import Format


@dataclass(frozen=True)
class Measurements:
    """A directory of losses: for each format a file of nats by a matrix's path.

    Attributes:
        key: a hash of all that the losses depend on, except the format.
    """

    key: str

    @property
    def directory(self) -> Path:
        """Where the platform keeps caches."""
        custom = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
        home = os.environ.get("XDG_CACHE_HOME") or custom
        return Path(home).expanduser() / "fastvlm-mlx" / "sensitivities" / self.key

    def read(self, form: Format) -> dict[str, float]:
        """Read what is known; a damaged file counts as empty."""
        try:
            data = json.loads(self._file(form).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(data, dict):
            return {}
        return {path: value for path, value in data.items() if _is_loss(value)}

    def write(self, form: Format, losses: dict[str, float]) -> None:
        """Add to what is known.

        A cache that can't be written costs the next run its minutes, and this one nothing.
        """
        known = self.read(form) | losses
        with suppress(OSError):
            self.directory.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=self.directory)
            try:
                with open(descriptor, "w", encoding="utf-8") as stream:
                    json.dump(known, stream)
                os.replace(name, self._file(form))
            finally:
                # Of a write that failed; a whole one has the file's own name by now.
                with suppress(FileNotFoundError):
                    os.unlink(name)

    def _file(self, form: Format) -> Path:
        return self.directory / f"{form.mode}-{form.bits}-{form.group_size}.json"


def _is_loss(value: object) -> bool:
    return type(value) is float and isfinite(value) and value >= 0
