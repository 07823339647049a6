"""`fastvlm doctor`: what is here and whether it works, line by line, with what to do.

It is what a person runs first on a new machine, and pastes into an issue. Nothing stops it: what
fails is a line that says so, and the lines after it follow.
"""

from __future__ import annotations

import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from fastvlm_mlx import __version__, machine
from fastvlm_mlx.errors import FastVLMError, printable

if TYPE_CHECKING:
    from PIL import Image

    from fastvlm_mlx.bundle.bundle import Bundle

OK, WARNING, PROBLEM, ABSENT = "ok", "warning", "problem", "not here"
INSTALL = 'pip install "fastvlm-mlx[export]"'
EXTRA = ("torch", "transformers", "scikit-learn", "matplotlib", "scipy")
_SMALL_BYTES = 8e9


@dataclass(frozen=True)
class Line:
    """One thing that was looked at.

    Attributes:
        verdict: OK, WARNING (it works, less well than it should), PROBLEM, or ABSENT, which this
            machine does not have, or what it was not given.
        found: a sentence, or figures in words.
        advice: what to do about it.
        figures: the same for programs; seconds, dB, bytes, names in full.
    """

    name: str
    verdict: str
    found: str
    advice: str = ""
    figures: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        """On one line of a terminal, or two."""
        said = f"{self.verdict:8}  {self.name}: {printable(self.found)}"
        return said + (f"\n          → {printable(self.advice)}" if self.advice else "")


@dataclass(frozen=True)
class Question:
    """Something to ask about an image, and how to tell a right answer, where that is known."""

    image: Image.Image
    prompt: str
    is_right: Callable[[str], bool]


@dataclass(frozen=True)
class Exporter:
    """What the doctor asks of the exporter, whose own packages may be missing.

    Attributes:
        export_demo: puts the demo's bundle into a new directory.
        is_demo: whether a bundle is of the demo's checkpoint, so that its answers can be judged.
        questions: to ask any bundle.
        forecast: a bundle's times on an Apple chip, as `fastvlm plan --json` has them.
    """

    export_demo: Callable[[Path], None]
    is_demo: Callable[[Bundle], bool]
    questions: Callable[[], list[Question]]
    forecast: Callable[[Path, str], dict[str, Any]]


def diagnose(bundle: Path | None, exporter: Exporter) -> Iterator[Line]:
    """Every line, as it is found: of the machine, and of `bundle` or, without one, the demo's."""
    from fastvlm_mlx.doctor.bundle_checks import examine

    yield from checked("versions", versions)
    yield from checked("machine", machine_line)
    yield from checked("export extra", extra)
    yield from checked("GPU", gpu)
    yield from checked("Neural Engine", neural_engine)
    if bundle is not None:
        yield from examine(bundle, exporter)
        return
    with TemporaryDirectory(prefix="fastvlm-doctor-") as directory:
        made = Path(directory) / "bundle"
        yield from checked("export of the demo", lambda: export_demo(made, exporter))
        if made.exists():
            yield from examine(made, exporter)
        else:
            yield Line(
                "bundle", ABSENT, "none was given or made", "name one: fastvlm doctor BUNDLE"
            )


def worst(lines: list[Line]) -> str:
    """The verdict on all of them."""
    verdicts = {line.verdict for line in lines}
    return next((v for v in (PROBLEM, WARNING) if v in verdicts), OK)


def checked(name: str, check: Callable[[], Iterator[Line]]) -> Iterator[Line]:
    """The lines of a check, and one more where it could not be finished."""
    try:
        yield from check()
    except ModuleNotFoundError as error:
        yield Line(name, ABSENT, f"this needs {error.name}, which is not installed", INSTALL)
    except FastVLMError as error:
        yield Line(name, PROBLEM, str(error))
    # Nobody foresaw it: that is what the doctor is asked about, and the next lines may say why.
    except Exception as error:  # noqa: BLE001
        yield Line(name, PROBLEM, f"{type(error).__name__}: {error}", "report this with every line")


def versions() -> Iterator[Line]:
    """Python's, ours, and of every package that we require, against what we ask for."""
    found = {"python": platform.python_version(), "fastvlm-mlx": __version__}
    try:
        requirements = requires("fastvlm-mlx") or []
    except PackageNotFoundError:
        requirements = [f"{name}>=0" for name in ("mlx", "mlx-lm", "coremltools", "numpy")]
    wrong = []
    for requirement in requirements:
        name = re.split(r"[^\w.-]", requirement)[0]
        if "extra ==" in requirement or name in found:
            continue
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            # Those of another system.
            continue
        bounds = re.findall(r"(>=|<)\s*([\d.]+)", requirement.partition(";")[0])
        if not all(_within(found[name], side, bound) for side, bound in bounds):
            wrong.append(f"{name} {found[name]} where {requirement.partition(';')[0].strip()}")
    told = ", ".join(f"{name} {number}" for name, number in found.items())
    if wrong:
        advice = f"install what is asked for: {INSTALL}"
        yield Line("versions", WARNING, f"{', '.join(wrong)}, of {told}", advice, found)
    else:
        yield Line("versions", OK, told, figures=found)


def _within(found: str, side: str, bound: str) -> bool:
    numbers = [tuple(int(n) for n in re.findall(r"\d+", text)[:3]) for text in (found, bound)]
    mine, other = (n + (0,) * (3 - len(n)) for n in numbers)
    return mine >= other if side == ">=" else mine < other


def machine_line() -> Iterator[Line]:
    chip, memory, architecture = machine.chip(), machine.memory_bytes(), platform.machine()
    figures = {
        "system": machine.system(),
        "chip": chip,
        "architecture": architecture,
        "memory_bytes": memory,
    }
    told = f"{machine.system()}, {chip} ({architecture}), {memory / 1e9:.0f} GB"
    if sys.platform == "darwin" and architecture != "arm64":
        advice = "install a Python for arm64: MLX has nothing for Intel's, nor under Rosetta"
        yield Line("machine", PROBLEM, told, advice, figures)
    elif memory < _SMALL_BYTES:
        advice = "take the 0.5B model, and see `fastvlm plan` for what fits"
        yield Line("machine", WARNING, told, advice, figures)
    else:
        yield Line("machine", OK, told, figures=figures)


def extra() -> Iterator[Line]:
    found: dict[str, str | None] = {}
    for name in EXTRA:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    missing = [name for name, number in found.items() if number is None]
    figures: dict[str, Any] = dict(found)
    if missing:
        told = f"{', '.join(missing)} missing: bundles run, and nothing is exported or verified"
        yield Line("export extra", ABSENT, told, INSTALL, figures)
    else:
        told = ", ".join(f"{name} {number}" for name, number in found.items())
        yield Line("export extra", OK, told, figures=figures)


def gpu() -> Iterator[Line]:
    import mlx.core as mx

    if not has_gpu():
        if sys.platform == "darwin":
            advice = "use a Mac with Apple's chip, and its own system rather than a virtual one's"
            yield Line("GPU", WARNING, "MLX finds no Metal and computes on the CPU", advice)
        else:
            yield Line("GPU", ABSENT, "Metal is macOS's: the CPU computes here")
        return
    facts: dict[str, Any] = dict(mx.device_info())
    name = facts.get("device_name") or facts.get("architecture") or "one without a name"
    yield Line("GPU", OK, f"{name}, which MLX computes on", figures=facts)


def has_gpu() -> bool:
    """Whether MLX computes on one."""
    import mlx.core as mx

    return mx.default_device() != mx.Device(mx.cpu)


def neural_engine() -> Iterator[Line]:
    if sys.platform != "darwin":
        yield Line("Neural Engine", ABSENT, "it is a Mac's, and so is Core ML")
        return
    from fastvlm_mlx.vision.units import available

    found = available()
    figures = {"compute_units": list(found)}
    if "ne" in found:
        yield Line("Neural Engine", OK, "Core ML lists one", figures=figures)
    else:
        told = "Core ML lists none, as on virtual Macs, hosted CI's for example: others take over"
        yield Line("Neural Engine", ABSENT, told, figures=figures)


def export_demo(path: Path, exporter: Exporter) -> Iterator[Line]:
    started = time.perf_counter()
    exporter.export_demo(path)
    seconds = time.perf_counter() - started
    told = f"{seconds:.1f} s, every gate passed"
    yield Line("export of the demo", OK, told, figures={"seconds": seconds})
