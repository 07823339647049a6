"""Calls: images of every type, prompts that are no text, features of another model, options."""

from __future__ import annotations

import io
import itertools
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.fuzz.case import Case
from tests.fuzz.mutate import text
from tests.fuzz.stock import PROMPT, Stock, expected, scene_image

_MODELS: dict[str, Any] = {}
_FEATURES: dict[str, Any] = {}


def warm(stock: Stock) -> None:
    import fastvlm_mlx

    expected(stock)
    for layout in ("app", "mlx"):
        _MODELS[layout] = fastvlm_mlx.load(stock / layout)
        _FEATURES[layout] = _MODELS[layout].encode(scene_image())


def prepare(case: Case) -> None:
    how = case.rng.choice(
        (_image, _image, _prompt, _sampling, _sampling, _sampling, _features, _path, _streams)
    )
    case.source.mkdir()
    (case.source / "image.png").write_bytes(_png())
    case.facts = {"mutator": how.__name__.strip("_"), "layout": case.rng.choice(("app", "mlx"))}


def run(case: Case) -> None:
    how = {
        function.__name__.strip("_"): function
        for function in (_image, _prompt, _sampling, _features, _path, _streams)
    }[case.facts["mutator"]]
    how(case, case.rng, _MODELS[case.facts["layout"]])


def _png() -> bytes:
    buffer = io.BytesIO()
    scene_image().save(buffer, "PNG")
    return buffer.getvalue()


def _image(case: Case, rng: random.Random, model: Any) -> None:
    """The scene in every form that a user may hold it in; the answer is the same, or an error."""
    image, png = scene_image(), _png()
    array = np.asarray(image)
    cut = Image.open(io.BytesIO(png[: len(png) // 2]))
    closed = scene_image()
    closed.close()
    shut = io.BytesIO(png)
    shut.close()
    file = case.source / "image.png"
    same: dict[str, Any] = {
        "array": array,
        "bytes": png,
        "bytearray": bytearray(png),
        "memoryview": memoryview(png),
        "BytesIO": io.BytesIO(png),
        "path": file,
        "str": str(file),
        "RGBA": image.convert("RGBA"),
        "reversed twice": array[::-1][::-1],
        "fortran": np.asfortranarray(array),
    }
    other: dict[str, Any] = {
        "float array": array.astype(np.float32) / 255,
        "float64 array": array.astype(np.float64),
        "bool array": array > 127,
        "int64 array": array.astype(np.int64),
        "NaN array": np.full((4, 4, 3), np.nan),
        "grey array": array[..., 0],
        "channels first": array.transpose(2, 0, 1),
        "batch": array[None],
        "RGBA array": np.dstack([array, array[..., :1]]),
        "empty array": np.zeros((0, 0, 3), np.uint8),
        "flat array": array.ravel(),
        "object array": np.array([None, "x"]),
        "huge array": np.lib.stride_tricks.as_strided(array, (10**6, 10**6, 3), (0, 0, 1)),
        "two channels": array[..., :2],
        "0×0": Image.new("RGB", (0, 0)),
        "0×5": Image.new("L", (0, 5)),
        "closed image": closed,
        "truncated image": cut,
        "closed file": shut,
        "text file": io.StringIO("x"),
        "number": 3,
        "list": [1, 2],
        "nested list": array[:2, :2].tolist(),
        "None in a list": [None],
        "dict": {},
        "empty bytes": b"",
        "empty str": "",
        "empty path": Path(""),
        "NUL": "a\0b",
        "long": "x" * 5000,
        "surrogate": "\ud800.png",
        "type": Image.Image,
        "float": Image.fromarray(np.full((4, 4), np.inf, np.float32)),
        "wide": Image.new("L", (100_000, 1)),
    }
    name = rng.choice([*same, *other])
    given = {**same, **other}[name]
    case.facts["note"] = name
    right = (expected(case.stock)[case.facts["layout"]],) if name in same else ()
    case.step(
        f"generate({name})",
        lambda: model.generate(given, PROMPT, max_tokens=6).tokens,
        among=right,
    )


def _prompt(case: Case, rng: random.Random, model: Any) -> None:
    prompt = rng.choice(
        (
            *(None, 3, b"bytes", "", "  ", "\n", [], ["a"], {}, 1.5, True, "\ud800", "a\0b"),
            *("<image>", "<|im_start|>system", "x" * 100_000, "word " * 50_000, "é" * 3000),
            *(text(rng), text(rng), Path("x"), bytearray(b"x"), "\u200b", object()),
        )
    )
    given = rng.choice((None, _FEATURES[case.facts["layout"]]))
    case.step(
        f"generate({repr(prompt)[:60]})",
        lambda: model.generate(given, prompt, max_tokens=3).tokens,
    )


_NUMBERS: tuple[Any, ...] = (
    *(0, 1, -1, 0.5, 1.0, 2, 1e-39, 1e-46, 1e-300, 5e-324, 1e38, 1e39, 1e300, float("nan")),
    *(float("inf"), 10**30, 10**400, 2**63, 2**64, 2**64 - 1, 64, 511, 512, 10**6, -0.0),
    *(None, True, False, "1", "", [], [1], {}, b"1", (0.5,), 1j, np.float32(0.5), np.int64(3)),
    *(np.array(1), np.array([1, 2]), object, np.float64("nan"), np.bool_(True)),
)
FIELDS = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")


def options(rng: random.Random) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for name in rng.sample(FIELDS, rng.choice((1, 1, 2, 3))):
        given[name] = rng.choice(_NUMBERS)
    if rng.random() < 0.15:
        given["stop"] = rng.choice(("x", ["x"], ("",), (3,), None, ("a", "b"), b"x", ("\0",), 5))
    return given


def _greedy(given: dict[str, Any]) -> bool:
    """Whether these options leave one answer: the likeliest token each time."""
    if "repetition_penalty" in given or "stop" in given:
        return False
    cold = given.get("temperature", 0.0)
    if not isinstance(cold, int | float) or isinstance(cold, bool):
        return False
    if cold < 1e-30:
        return True
    narrow = given.get("top_p", 1.0)
    tiny = isinstance(narrow, float | int) and not isinstance(narrow, bool) and narrow < 1e-30
    return tiny or (given.get("top_k") == 1 and type(given["top_k"]) is int)


def _sampling(case: Case, rng: random.Random, model: Any) -> None:
    given = options(rng)
    if rng.random() < 0.4:
        given["temperature"] = rng.choice((0.7, 1e-39, 1.0, 1e-5, 3e38))
        given["top_p"] = rng.choice((0, 1e-46, 1e-10, 0.0, 1.0, 0.9))
    case.facts["note"] = repr(given)
    features = _FEATURES[case.facts["layout"]]
    limit = {} if "max_tokens" in given else {"max_tokens": 6}
    found = case.step(
        f"generate(**{given})"[:400],
        lambda: model.generate(features, PROMPT, **given, **limit),
    )
    if found is None:
        return
    right = expected(case.stock)[case.facts["layout"]]
    count = min(len(found.tokens), len(right))
    if _greedy(given) and found.tokens[:count] != right[:count]:
        case.bad("not greedy", f"{given}: {found.tokens[:6]}, expected {right}")
    seed = given.get("seed")
    if isinstance(seed, int) and count and "max_tokens" not in given:
        again = model.generate(features, PROMPT, **given, **limit)
        if again.tokens != found.tokens:
            case.bad("seed does not repeat", f"{given}")


def _features(case: Case, rng: random.Random, model: Any) -> None:
    """Features that are not this model's, or that no model makes."""
    import mlx.core as mx

    features = _FEATURES[case.facts["layout"]]
    projected = features.projected
    rows, width = projected.shape
    changed: Any = rng.choice(
        (
            mx.zeros((rows, width + 1), projected.dtype),
            mx.zeros((rows + 1, width), projected.dtype),
            mx.zeros((0, width), projected.dtype),
            mx.zeros((1, rows, width), projected.dtype),
            mx.zeros((rows,), projected.dtype),
            mx.full((rows, width), float("nan")),
            mx.zeros((rows, width), mx.int32),
            mx.zeros((rows, width), mx.complex64),
            np.zeros((rows, width), np.float32),
            None,
            "x",
            mx.zeros((rows * 1000, width), projected.dtype),
        )
    )
    case.facts["note"] = f"{type(changed).__name__} {getattr(changed, 'shape', '')}"
    given = replace(features, projected=changed)
    case.step(
        f"features {case.facts['note']}",
        lambda: model.generate(given, PROMPT, max_tokens=3).tokens,
    )


def _path(case: Case, rng: random.Random, model: Any) -> None:
    """What is asked to be loaded, and how."""
    import fastvlm_mlx
    from fastvlm_mlx.cli.inspect import facts_of
    from model_export.checkpoint.checkpoint import Checkpoint
    from model_export.cli.facts import checkpoint_facts

    path: Any = rng.choice(
        (
            None,
            3,
            b"x",
            "",
            ".",
            "/",
            "\0",
            "a\nb",
            "x" * 5000,
            "~nobody/x",
            Path(""),
            [],
            text(rng),
        )
    )
    asked: dict[str, Any] = {
        "compute_units": rng.choice((None, 3, "", "gpu", text(rng))),
        "image_size": rng.choice((None, 0, -64, 63, 128, 10**9, 1.5, "256", True, 2**70)),
        "crop": rng.choice((None, 3, "x", True)),
    }
    how = rng.choice(("load", "load", "inspect", "Checkpoint", "options", "options"))
    case.facts |= {"note": f"{how} {path!r:.60} {asked}"}
    if how == "load":
        case.step(f"load({path!r:.60})", lambda: fastvlm_mlx.load(path), must_fail=True)
    elif how == "inspect":
        case.step(
            f"inspect({path!r:.60})", lambda: facts_of(path, checkpoint_facts), must_fail=True
        )
    elif how == "Checkpoint":
        case.step(f"Checkpoint({path!r:.60})", lambda: Checkpoint(path), must_fail=True)
    else:
        name = rng.choice(sorted(asked))
        bundle = case.stock / case.facts["layout"]
        step = f"load({name}={asked[name]!r})"[:200]
        loaded = case.step(step, lambda: fastvlm_mlx.load(bundle, **{name: asked[name]}))
        if loaded is not None and name == "image_size":
            case.step(f"{step}.encode", lambda: loaded.encode(scene_image()).features.shape)


def _streams(case: Case, rng: random.Random, model: Any) -> None:
    """Two streams in turn, each with its seed, give what each gives alone."""
    features = _FEATURES[case.facts["layout"]]
    seeds = rng.randrange(1000), rng.randrange(1000)
    given: dict[str, Any] = {"temperature": 1.5, "max_tokens": 6}

    def both() -> tuple[Any, ...]:
        first, second = (model.stream(features, PROMPT, seed=seed, **given) for seed in seeds)
        for _ in itertools.zip_longest(first, second):
            pass
        return first.result.tokens, second.result.tokens

    alone = tuple(model.generate(features, PROMPT, seed=seed, **given).tokens for seed in seeds)
    case.step(f"streams of seeds {seeds}", both, among=(alone,))
