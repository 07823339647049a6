"""A set of choices exported from one checkpoint and held to it: what each takes and loses.

The directory holds a bundle for each choice and `sweep.json`, written after every step: what has
been exported and measured is never done again.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

from fastvlm_mlx.bundle.files import is_empty
from fastvlm_mlx.bundle.manifest import MANIFEST
from fastvlm_mlx.bundle.schema import check, read_json, to_json
from fastvlm_mlx.errors import DestinationError, FastVLMError, OptionError
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.comparison import RESULTS, check_count, compare
from model_export.comparison.compare import Bench, Row, samples_of
from model_export.comparison.models import open_model
from model_export.destination.destination import clear_leftovers
from model_export.interruption import Progress
from model_export.options import FLAT_NAMES, ExportOptions
from model_export.pipeline import export

# By layout: name, encoder and language model, → options.
CHOICES: dict[str, dict[str, dict[str, Any]]] = {
    "app": {
        "fp16-16": {"llm_bits": 16},
        "fp16-8": {"llm_bits": 8},
        "fp16-4": {"llm_bits": 4},
        "fp16-3": {"llm_bits": 3},
        "int8-8": {"encoder_precision": "int8", "llm_bits": 8},
        "palette6-4": {"encoder_precision": "palette6", "llm_bits": 4},
        "mixed-4": {"encoder_precision": "mixed", "llm_bits": 4},
        "palette4-4": {"encoder_precision": "palette4", "llm_bits": 4},
    },
    "mlx": {
        "16": {"llm_bits": 16},
        "8": {"llm_bits": 8},
        "6": {"llm_bits": 6},
        "mxfp8": {"llm_mode": "mxfp8"},
        "mixed_4_6": {"recipe": "mixed_4_6"},
        "4": {"llm_bits": 4},
        "4-embed-6": {"llm_bits": 4, "embed_bits": 6},
        "nvfp4": {"llm_mode": "nvfp4"},
        "mxfp4": {"llm_mode": "mxfp4"},
        "mixed_3_6": {"recipe": "mixed_3_6"},
        "3": {"llm_bits": 3},
    },
}


def sweep(
    checkpoint_path: str | Path,
    out: Path,
    choices: Mapping[str, Mapping[str, Any]],
    layout: str,
    questions: str | Path | None,
    count: int,
    progress: Progress,
) -> tuple[list[Row], dict[str, str]]:
    """Export and measure every choice that has not been yet.

    Args:
        choices: name → options by the command line's names.
        questions, count: as for `compare`.

    Returns:
        A row for the checkpoint and for each choice; and why a choice could not be made, by name.

    Raises:
        OptionError: a choice is no set of options.
        DestinationError: `out` is another checkpoint's sweep, or can't be written.
    """
    check_count(count)
    options = {name: _options(name, fields, layout) for name, fields in choices.items()}
    progress("checkpoint", None)
    state = _State.open(out, _digest(Checkpoint(checkpoint_path), questions, count))
    bench: Bench | None = None
    refused: dict[str, str] = {}
    rows = []
    for number, (name, wanted) in enumerate(options.items()):
        label = f"{name} ({number + 1} of {len(options)})"

        def step(stage: str, done: float | None, label: str = label) -> None:
            progress(f"{label}: {stage}", done)

        try:
            _export_once(checkpoint_path, out / name, wanted, state, step)
        except DestinationError:
            raise
        except FastVLMError as error:
            refused[name] = str(error)
            continue
        row = state.row(name)
        if row is None:
            if bench is None:
                reference = open_model(checkpoint_path)
                bench = Bench.of(reference, samples_of(reference, questions, count), step)
                state.save_reference(bench.row(reference))
            step("compare", None)
            row = bench.row(open_model(out / name))
            row.name = name
            state.save_row(name, row)
        rows.append(row)
    reference_row = state.reference()
    return compare.mark_best([*([reference_row] if reference_row else []), *rows]), refused


def read_choices(file: Path | None, layout: str) -> Mapping[str, Mapping[str, Any]]:
    """The layout's own set, or a JSON file of name → options.

    Raises:
        OptionError: the file is not that, or there is no such layout.
    """
    if layout not in CHOICES:
        raise OptionError(f"--layout is {layout}: expected one of {', '.join(CHOICES)}")
    if file is None:
        return CHOICES[layout]
    data = read_json(None, file, OptionError, remedy="correct it")
    if not data or not all(isinstance(choice, dict) for choice in data.values()):
        raise OptionError(
            f'--choices {file} is no set of choices: expected {{"name": {{"llm_bits": 4}}, …}}'
        )
    return data


def _options(name: str, fields: Mapping[str, Any], layout: str) -> ExportOptions:
    if not name or name.startswith(".") or "/" in name or name == RESULTS:
        raise OptionError(f"the choice {name!r} can't be a directory's name: rename it")
    unknown = fields.keys() - set(FLAT_NAMES)
    if unknown:
        raise OptionError(
            f"the choice {name} has {min(unknown)}, which is no option: expected some of "
            f"{', '.join(FLAT_NAMES)}"
        )
    always = {"layout": layout, "overwrite": True, "allow_failed_gates": True}
    return ExportOptions.of(**{**fields, **always})


def _digest(checkpoint: Checkpoint, questions: str | Path | None, count: int) -> str:
    """What every row depends on besides its options."""
    parts = [checkpoint.source(), str(questions), count]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _export_once(
    checkpoint_path: str | Path,
    out: Path,
    options: ExportOptions,
    state: _State,
    progress: Progress,
) -> None:
    if state.exported(out, options):
        return
    state.begin(out, options)
    export(checkpoint_path, out, options, progress)
    state.save_export(out, options)


class _Choice(Struct):
    options: dict[str, Any]
    manifest: str
    row: Row | None = None


class _Results(Struct):
    """`sweep.json`, as far as it is read again."""

    made_from: str
    choices: dict[str, _Choice]
    reference: Row | None = None


class _State:
    """`sweep.json`: for each choice its options, its manifest's SHA-256, and its row."""

    def __init__(self, file: Path, data: dict[str, Any]):
        self._file, self._data = file, data

    @classmethod
    def open(cls, out: Path, digest: str) -> _State:
        file = out / RESULTS
        if not file.is_file():
            clear_leftovers(out)
            if out.exists() and (not out.is_dir() or not is_empty(out)):
                raise DestinationError(
                    f"{out} exists and was not made by a sweep: choose another directory"
                )
            return cls(file, {"made_from": digest, "choices": {}})
        data = read_json(out, file, DestinationError, remedy="remove it")
        check(data, _Results, str(file), DestinationError, remedy="remove it")
        if data["made_from"] != digest:
            raise DestinationError(
                f"{out} holds a sweep of another checkpoint, or by other questions: choose another "
                "directory"
            )
        return cls(file, data)

    def exported(self, bundle: Path, options: ExportOptions) -> bool:
        entry = self._data["choices"].get(bundle.name, {})
        manifest = bundle / MANIFEST
        return (
            entry.get("options") == _json(options)
            and manifest.is_file()
            and entry.get("manifest") == _sha256(manifest)
        )

    def begin(self, bundle: Path, options: ExportOptions) -> None:
        """Note that what will lie there is the sweep's own.

        Raises:
            DestinationError: something lies there that is not.
        """
        if bundle.name not in self._data["choices"]:
            if os.path.lexists(bundle):
                raise DestinationError(
                    f"{bundle} is there and not of this sweep: rename the choice, or move it away"
                )
            bundle.parent.mkdir(parents=True, exist_ok=True)
            self._data["choices"][bundle.name] = {"options": _json(options), "manifest": ""}
            self._save()

    def save_export(self, bundle: Path, options: ExportOptions) -> None:
        self._data["choices"][bundle.name] = {
            "options": _json(options),
            "manifest": _sha256(bundle / MANIFEST),
        }
        self._save()

    def row(self, name: str) -> Row | None:
        row = self._data["choices"][name].get("row")
        return Row(**row) if row else None

    def save_row(self, name: str, row: Row) -> None:
        self._data["choices"][name]["row"] = row.to_dict()
        self._save()

    def reference(self) -> Row | None:
        row = self._data.get("reference")
        return Row(**row) if row else None

    def save_reference(self, row: Row) -> None:
        self._data["reference"] = row.to_dict()
        self._save()

    def _save(self) -> None:
        # Under a name that nobody can have put a link at.
        with tempfile.NamedTemporaryFile("w", dir=self._file.parent, delete=False) as partial:
            partial.write(to_json(self._data) + "\n")
        os.replace(partial.name, self._file)


def _json(options: ExportOptions) -> dict[str, Any]:
    return json.loads(json.dumps(options.flat()))


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
