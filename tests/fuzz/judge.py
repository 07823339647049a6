"""What a good end is: an error of the one family, in one sentence that can be printed."""

from __future__ import annotations

import re
import traceback
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from fastvlm_mlx.errors import FastVLMError

LONGEST = 2000
PRODUCT = ("fastvlm_mlx", "model_export")
ROOT = Path(__file__).parent.parent.parent
# Control, format (bidi among them), surrogate, line and paragraph separators.
_UNPRINTABLE = ("Cc", "Cf", "Cs", "Zl", "Zp")
# A path, a file's name, an option on the command line, a field of an API call, a prompt's text.
_NAMED = re.compile(
    r"/|\.(json|safetensors|bin|mlpackage|jinja|txt|png|jpe?g)\b|--[a-z]|"
    r"\b(image|image|prompt|path|option|stop|seed|temperature|top_|min_p|max_tokens|features|"
    r"compute units|tokenizer|bundle|checkpoint|choice|recipe|array)\b"
)


@dataclass(frozen=True)
class Finding:
    """Something bad. `cause` is the same for every case that meets the same fault."""

    cause: str
    detail: str


def error(step: str, found: BaseException, names: str | None = None) -> list[Finding]:
    """What is wrong with an exception that came out of the product."""
    if not isinstance(found, FastVLMError):
        where, raised = frames(found)
        cause = f"{type(found).__name__} at {where}" + (f" from {raised}" if raised else "")
        text = "".join(traceback.format_exception(found, limit=-6))
        return [Finding(cause, f"{step}: {type(found).__name__}: {shown(found)}\n{text[-3000:]}")]
    message = str(found)
    where, _ = frames(found)
    findings = [
        Finding(f"{problem}: {type(found).__name__} at {where}", f"{step}: {message[:1000]!r}")
        for problem in sentence(message)
    ]
    if names is not None and names not in message:
        detail = f"{step}: expected {names!r} in {message[:600]!r}"
        findings.append(Finding(f"file not named: {type(found).__name__} at {where}", detail))
    return findings


def sentence(message: str) -> list[str]:
    """What is wrong with an error's text."""
    problems = []
    if unprintable(message):
        problems.append("unprintable characters in an error")
    if len(message) > LONGEST:
        problems.append("error too long")
    if not _NAMED.search(message):
        problems.append("error names nothing")
    return problems


def unprintable(text: str) -> bool:
    return any(unicodedata.category(character) in _UNPRINTABLE for character in text)


def frames(found: BaseException) -> tuple[str, str]:
    """The product's innermost frame, and what it called if that is not the product's."""
    stack = traceback.extract_tb(found.__traceback__)
    own = [f for f in stack if Path(f.filename).is_relative_to(ROOT) and _is_product(f.filename)]
    where = _frame(own[-1]) if own else "nowhere in the product"
    last = stack[-1] if stack else None
    return where, "" if last is None or (own and last is own[-1]) else _frame(last)


def _is_product(file: str) -> bool:
    return Path(file).relative_to(ROOT).parts[0] in PRODUCT


def _frame(frame: traceback.FrameSummary) -> str:
    path = Path(frame.filename)
    if path.is_relative_to(ROOT):
        path = path.relative_to(ROOT)
    elif "site-packages" in path.parts:
        path = Path(*path.parts[path.parts.index("site-packages") + 1 :])
    return f"{path}:{frame.name}"


def shown(value: object, length: int = 300) -> str:
    """A value's repr, cut; some values can't be shown."""
    try:
        return repr(value)[:length]
    except Exception as failure:  # noqa: BLE001 - other libraries' values may fail to show themselves
        return f"{type(value).__name__} whose repr fails ({type(failure).__name__})"
