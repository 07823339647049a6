"""Options by their classes, the command line, and the files that options name."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable
from typing import Any

from tests.fuzz import api
from tests.fuzz.case import Case
from tests.fuzz.mutate import edited_json, fragment, text
from tests.fuzz.stock import Stock

_RECIPE = json.dumps({"model.layers.*.mlp.*": 4, "*": 8, "lm_head": {"bits": 6, "group_size": 64}})
_CHOICES = json.dumps({"four": {"llm_bits": 4}, "mixed": {"encoder_precision": "int8"}})


def warm(stock: Stock) -> None:
    _command(["inspect", str(stock / "app"), "--json"])
    _command(["generate", str(stock / "app"), "--image", "nothing", "--prompt", "x"])


def prepare(case: Case) -> None:
    rng = case.rng
    case.source.mkdir()
    how = rng.choice((_sampling, _export, _export, _line, _line, _line, _recipe, _choices, _jsonl))
    case.facts = {"mutator": how.__name__.strip("_")}
    if how is _recipe:
        _write(case, "recipe.json", edited_json(rng, _RECIPE)[0])
    elif how is _choices:
        _write(case, "choices.json", edited_json(rng, _CHOICES, ("llm_bits", "layout"))[0])
    elif how is _jsonl:
        shutil.copyfile(case.stock / "images" / "small.png", case.source / "small.png")
        _write(case, "data.jsonl", _lines(case, rng))


def run(case: Case) -> None:
    functions: tuple[Callable[[Case, random.Random], None], ...] = (
        *(_sampling, _export, _line, _recipe, _choices, _jsonl),
    )
    names = {function.__name__.strip("_"): function for function in functions}
    names[case.facts["mutator"]](case, case.rng)


def _write(case: Case, name: str, content: str) -> None:
    (case.source / name).write_bytes(content.encode("utf-8", "surrogatepass"))


def _lines(case: Case, rng: random.Random) -> str:
    good = json.dumps({"image": "small.png", "prompt": "What?", "answer": "A circle."})
    lines = [good]
    for _ in range(rng.randint(1, 5)):
        entry = json.loads(good)
        entry["image"] = rng.choice(
            (
                text(rng),
                # A user's own file may name images anywhere.
                str(case.stock / "images" / "small.png"),
                "../source/small.png",
                "small.png",
                3,
            )
        )
        entry[rng.choice(("prompt", "answer"))] = rng.choice((text(rng), 3, None, "a\nb"))
        lines.append(rng.choice((json.dumps(entry), edited_json(rng, good)[0], fragment(rng), "")))
    return "\n".join(lines)


def _sampling(case: Case, rng: random.Random) -> None:
    from fastvlm_mlx.language.generate import SamplingOptions

    given = api.options(rng)
    case.step(f"SamplingOptions(**{given})"[:300], lambda: SamplingOptions(**given))


_VALUES: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 4, 5, 8, 16, 32, 64, 128, 1024, 10**9, 2**70, 1.5, 4.0, 1e300, float("nan")),
    *(float("inf"), None, True, "", "4", "affine", "mlx", "app", "mixed", "awq", "mxfp4", "iOS18"),
    *([], [4], (64,), (64, 128), (64, "x"), (64, 64), {}, b"x", object, (10**30,), "512,1024"),
)


def _export(case: Case, rng: random.Random) -> None:
    from model_export.options import FLAT_NAMES, ExportOptions, parse_sizes

    names = sorted(FLAT_NAMES)
    given = {
        name: rng.choice((*_VALUES, text(rng))) for name in rng.sample(names, rng.randint(1, 4))
    }
    case.step(f"ExportOptions.of(**{given})"[:300], lambda: ExportOptions.of(**given))
    sizes = rng.choice(("64,128", "", ",", "9" * 5000, "1e3", "64,,64", "٦٤", "-64", text(rng)))
    case.step(f"parse_sizes({sizes!r:.60})", lambda: parse_sizes(sizes))


def _checkpoint(case: Case) -> Any:
    from model_export.checkpoint.checkpoint import Checkpoint

    return Checkpoint(case.stock / "apple")


def _recipe(case: Case, rng: random.Random) -> None:
    from model_export.language import recipes
    from model_export.options import LLMOptions

    checkpoint = _checkpoint(case)
    file = str(case.source / "recipe.json")
    case.step(
        "recipe",
        lambda: recipes.scheme(
            checkpoint.llm_specs, checkpoint.config, LLMOptions(recipe=file), "app"
        ),
    )


def _choices(case: Case, rng: random.Random) -> None:
    from model_export.comparison import sweep

    def read() -> None:
        found = sweep.read_choices(case.source / "choices.json", "app")
        for name, fields in found.items():
            sweep._options(name, fields, "app")

    case.step("choices", read)


def _jsonl(case: Case, rng: random.Random) -> None:
    from model_export.samples.calibration import load_calibration

    vision = _checkpoint(case).config.vision
    case.step("calibration", lambda: load_calibration(case.source / "data.jsonl", vision))


_LONG = ("--max-tokens", "--temperature", "--top-p", "--top-k", "--min-p", "--seed", "--stop")
_FLAGS = ("--json", "--crop", "--help", "--version", "--dry-run", "--overwrite", "--private", "--x")


def _line(case: Case, rng: random.Random) -> None:
    """A command line, in this process, as the shell would give it."""
    bundle, image = str(case.stock / "app"), str(case.stock / "images" / "small.png")
    verb = rng.choice(
        (
            "generate",
            "generate",
            "inspect",
            "verify",
            "plan",
            "compare",
            "install",
            "push",
            "export",
        )
    )
    arguments = [verb]
    odd = [text(rng).split("\0")[0] for _ in range(4)]
    place = rng.choice((bundle, bundle, *odd, str(case.stock / "apple"), "/dev/null"))
    if verb == "generate":
        arguments += [place, "--image", rng.choice((image, image, *odd)), "--max-tokens", "3"]
        arguments += ["--prompt", rng.choice(("What?", *odd))]
        for name in rng.sample(_LONG, rng.randint(0, 3)):
            values = ("0", "1", "-1", "nan", "inf", "1e-46", "1e400", "x", "", "9" * 5000, odd[0])
            arguments += [name, rng.choice(values)]
    elif verb == "install":
        app = case.out / "app"
        (app / "FastVLM").mkdir(parents=True, exist_ok=True)
        arguments += [place, rng.choice((str(app), *odd)), "--dry-run"]
    elif verb == "push":
        arguments += [place, rng.choice(("me/bundle", *odd)), "--dry-run"]
    elif verb == "export":
        # Of what is no checkpoint, or with options that can't be met.
        arguments += [rng.choice((*odd, "/dev/null", bundle)), str(case.out / "bundle")]
        arguments += ["--llm-bits", rng.choice(("4", "7", odd[1]))]
    elif verb == "compare":
        arguments += [place, rng.choice(odd), "--count", rng.choice(("1", "0", "-5", "x"))]
    elif verb == "plan":
        context = rng.choice(("1", "0", "-1", "9" * 30, "2048"))
        arguments += [place, "--device", rng.choice(("iphone-15", odd[0], "", "8GB", "-1"))]
        arguments += ["--context", context]
    else:
        arguments.append(place)
    if rng.random() < 0.4:
        arguments.append(rng.choice(_FLAGS))
    case.facts |= {"note": repr(arguments)[:500], "prints": True}
    # What a terminal never passes on can't be given.
    arguments = [argument.encode("utf-8", "replace").decode() for argument in arguments]
    found = case.step(f"fastvlm {arguments}"[:400], lambda: _command(arguments))
    if found is not None and found not in (0, 2):
        case.bad("exit status", f"{found} of {arguments}"[:400])
    if verb == "export" and (left := [file.name for file in case.out.iterdir()]):
        case.bad("left beside a destination", str(left))


def _command(arguments: list[str]) -> int:
    from fastvlm_mlx.cli.main import main

    kept = sys.argv
    sys.argv = ["fastvlm", *arguments]
    try:
        main()
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    finally:
        sys.argv = kept
    return 0
