"""What the doctor checks in a bundle: files, loading, encoder, language model, answers, times."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from fastvlm_mlx import machine
from fastvlm_mlx.bundle.bundle import Bundle
from fastvlm_mlx.components import evaluated_model, load_bundle_encoder
from fastvlm_mlx.doctor.report import (
    ABSENT,
    INSTALL,
    OK,
    PROBLEM,
    WARNING,
    Exporter,
    Line,
    checked,
    has_gpu,
)
from fastvlm_mlx.errors import OptionError
from fastvlm_mlx.fastvlm import FastVLM
from fastvlm_mlx.language.prompt.template import encode_prompt
from fastvlm_mlx.loading import load
from fastvlm_mlx.vision.package import describe
from fastvlm_mlx.vision.program.mlprogram import MLProgramEncoder
from fastvlm_mlx.vision.units import NAMES, floor_db, probe, snr_db

EXPORT_AGAIN = "export the checkpoint again, or copy the bundle again from where it is whole"
# Of one encoder or language model on a GPU and on the CPU, from what 16-bit arithmetic costs.
_GPU_FLOOR_DB = 35.0
_SAME_NATS, _USABLE_NATS = 0.01, 0.1
# Shares of the demo's answers that are right.
_GOOD, _USABLE = 0.8, 0.6
_LONGEST = 64  # tokens of an answer
_PROMPT = "What is in the picture?"
# A stage that takes longer than was predicted by this factor is slow; below this many seconds
# what is measured is the calling, not the computing.
_SLOW, _SHORT_S = 3.0, 0.01
_STAGES = {"encode_s": "encoder_s", "project_s": "project_s", "prefill_s": "prefill_s"}


def examine(path: Path, exporter: Exporter) -> Iterator[Line]:
    """Every line about a bundle; where it can't be loaded, those that need no loading."""
    opened: list[Bundle] = []
    yield from checked("bundle", lambda: _files(path, opened))
    if not opened:
        yield Line("encoder and language model", ABSENT, "the bundle can't be read", EXPORT_AGAIN)
        return
    bundle = opened[0]
    loaded: list[FastVLM] = []
    yield from checked("first load", lambda: _first_load(path, loaded))
    if bundle.layout == "app":
        yield from checked("encoder, evaluated op by op", lambda: _evaluated(bundle))
        yield from checked("encoder, Core ML", lambda: _core_ml(bundle))
    else:
        yield from checked("encoder, GPU against the CPU", lambda: _encoders(bundle))
    yield from checked("language model, GPU against the CPU", lambda: _language(bundle))
    if not loaded:
        yield Line("answers", ABSENT, "the bundle can't be loaded", EXPORT_AGAIN)
        return
    yield from checked("answers", lambda: _answers(loaded[0], exporter))
    yield from checked("time to the first token", lambda: _times(path, loaded[0], exporter))


def _files(path: Path, opened: list[Bundle]) -> Iterator[Line]:
    bundle = Bundle.open(path)
    facts: dict[str, Any] = {"layout": bundle.layout, "manifest": bundle.manifest is not None}
    if bundle.manifest is None:
        opened.append(bundle)
        told = f"layout {bundle.layout}, without manifest.json, so its files can't be checked"
        advice = (
            "only bundles of Apple and of mlx-vlm come without one; if this is one of ours, export "
            "the checkpoint again"
        )
        yield Line("bundle", WARNING, told, advice, facts)
        return
    facts["source"] = bundle.manifest["source"]["name"]
    facts["versions"] = bundle.manifest["versions"]
    # What has changed is still looked at: how far it is off says what happened to it.
    opened.append(bundle)
    bundle.check_files()
    told = f"layout {bundle.layout}, from {facts['source']}, every file as it was written"
    if bundle.manifest["gates_passed"]:
        yield Line("bundle", OK, told, figures=facts)
    else:
        advice = "see which gates in manifest.json, and export with other options"
        yield Line("bundle", WARNING, f"{told}, but its export failed a gate", advice, facts)


def _first_load(path: Path, loaded: list[FastVLM]) -> Iterator[Line]:
    """Seconds until a bundle can look and answer, by what they go to; and once more."""
    started = time.perf_counter()
    # Changed files are the line before; here it is loaded as far as it goes. Times are to be those
    # of an image and a question that it has not seen.
    model = load(path, check_hashes=False, kept_bytes=0)
    load_s = time.perf_counter() - started
    encoder = model.encoder
    encoder_s = time.perf_counter() - started - load_s
    loaded.append(model)
    figures: dict[str, Any] = {"load_s": load_s, "encoder_s": encoder_s, "backend": encoder.backend}
    why, verdict, advice = "its weights read and laid out", OK, ""
    made = getattr(encoder, "compiled", None)
    if made is not None:
        figures |= {"compile_s": made.compile_s, "cached": made.compile_s == 0, "kept": made.kept}
        why = "found compiled in the cache, so it was the system's preparing for its devices"
        if made.compile_s:
            why = (
                f"compiled for Core ML in {made.compile_s:.1f} s, then prepared by the system and "
                "tried on every compute unit, once for it on this Mac"
            )
        if not made.kept:
            verdict, why = WARNING, f"{why}; nothing of that can be kept"
            advice = "give permission and room in ~/Library/Caches/fastvlm-mlx"
    started = time.perf_counter()
    again = load(path, check_hashes=False)
    _ = again.encoder
    figures["again_s"] = time.perf_counter() - started
    told = (
        f"{load_s:.2f} s for the language model, {encoder_s:.2f} s for the "
        f"encoder ({encoder.backend}: {why}); a second time {figures['again_s']:.2f} s for both"
    )
    yield Line("first load", verdict, told, advice, figures)


def _evaluated(bundle: Bundle) -> Iterator[Line]:
    """What the package says, computed exactly, and with fp16 rounding as any device has to."""
    name = "encoder, evaluated op by op"
    if find_spec("torch") is None:
        yield Line(name, ABSENT, "torch is not installed, which evaluates it", INSTALL)
        return
    encoder = MLProgramEncoder(bundle.package)
    pixels = probe(encoder.image_size)
    started = time.perf_counter()
    exact = encoder(pixels)
    seconds = time.perf_counter() - started
    rounded = snr_db(exact, encoder.evaluate(pixels, round_fp16=True))
    floor = floor_db(encoder.info.precision)
    figures = {"seconds": seconds, "rounded_snr_db": _json(rounded), "floor_db": floor}
    told = f"{seconds:.2f} s an image; {_decibels(rounded)} with every fp16 result rounded"
    if rounded >= floor and np.isfinite(exact).all():
        yield Line(name, OK, told, figures=figures)
    else:
        advice = "export the encoder with --encoder-precision fp32: fp16 is too small for its range"
        yield Line(name, PROBLEM, told, advice, figures)


def _core_ml(bundle: Bundle) -> Iterator[Line]:
    if sys.platform != "darwin":
        told = "Core ML is macOS's: here the package is evaluated op by op"
        yield Line("encoder, Core ML", ABSENT, told)
        return
    from fastvlm_mlx.vision.coreml import choose_units

    floor = floor_db(describe(bundle.package).precision)
    choice = choose_units(bundle.package)
    holds = choice.best.holds(floor)
    tried = {each.units for each in choice.measured}
    for each in choice.measured:
        verdict, advice = OK, ""
        if not each.holds(floor):
            verdict = WARNING if holds else PROBLEM
            advice = f"leave the choice to fastvlm, which takes {choice.best.units}"
            if not holds:
                advice = "report this line with the machine's: no compute units compute the encoder"
        told = each.error or (
            f"{_decibels(each.snr_db)} from {choice.reference} (floor {floor:g}), "
            f"{each.seconds * 1000:.1f} ms an image, {each.first_s:.2f} s the first"
        )
        figures = {**each.to_dict(), "floor_db": floor, "reference": choice.reference}
        yield Line(f"encoder, Core ML on {each.units}", verdict, told, advice, figures)
    for units in NAMES:
        if units not in tried:
            yield Line(f"encoder, Core ML on {units}", ABSENT, "this Mac has no such device")
    told = f"{choice.best.units} is what `load` takes here"
    why = ", the fastest that holds" if holds else ", the nearest: none holds"
    figures = {"chosen": choice.best.units}
    yield Line("encoder, in use", OK if holds else PROBLEM, told + why, figures=figures)


def _encoders(bundle: Bundle) -> Iterator[Line]:
    """An `mlx` bundle's encoder on both devices."""
    name = "encoder, GPU against the CPU"
    pixels = probe(bundle.config.vision.image_size)
    with _on_cpu():
        expected, seconds = _timed(load_bundle_encoder(bundle), pixels)
    if not has_gpu():
        told = f"no GPU; {seconds * 1000:.1f} ms an image in MLX on the CPU"
        verdict = ABSENT if np.isfinite(expected).all() else PROBLEM
        yield Line(name, verdict, told, figures={"cpu_seconds": seconds})
        return
    found, gpu_seconds = _timed(load_bundle_encoder(bundle), pixels)
    ratio = snr_db(expected, found)
    figures = {
        "snr_db": _json(ratio),
        "floor_db": _GPU_FLOOR_DB,
        "seconds": gpu_seconds,
        "cpu_seconds": seconds,
    }
    told = f"{_decibels(ratio)} from the CPU (floor {_GPU_FLOOR_DB:g}), "
    told += f"{gpu_seconds * 1000:.1f} ms an image, {seconds * 1000:.1f} on the CPU"
    if ratio >= _GPU_FLOOR_DB:
        yield Line(name, OK, told, figures=figures)
    else:
        yield Line(name, PROBLEM, told, "report this line with the machine's", figures)


def _timed(encoder: Any, pixels: np.ndarray) -> tuple[np.ndarray, float]:
    encoder(pixels)
    started = time.perf_counter()
    return encoder(pixels), time.perf_counter() - started


def _language(bundle: Bundle) -> Iterator[Line]:
    """The next token's distribution at every place of a prompt, on both devices."""
    name = "language model, GPU against the CPU"
    if not has_gpu():
        yield Line(name, ABSENT, "no GPU: the CPU computes here")
        return
    stored = sum(file.stat().st_size for file in bundle.weight_files)
    # On a CPU what is not quantized is widened to float32.
    needed = stored * (1 if bundle.config.quantization else 2)
    if needed > machine.memory_bytes() / 2:
        yield Line(name, ABSENT, f"{needed / 1e9:.0f} GB on the CPU are too much for this machine")
        return
    config = bundle.config
    ids = encode_prompt(bundle.tokenizer(), _PROMPT, image_token_id=config.image_token_index)
    found = _distributions(bundle, ids)
    with _on_cpu():
        expected = _distributions(bundle, ids)
    divergence = float((np.exp(expected) * (expected - found)).sum(-1).mean())
    agreed = float((expected.argmax(-1) == found.argmax(-1)).mean())
    figures = {"kl_nats": _json(divergence), "agreement": agreed, "tokens": len(ids)}
    told = f"KL divergence {divergence:.2g} nats, the same token at {agreed:.0%} of {len(ids)}"
    if divergence <= _SAME_NATS:
        yield Line(name, OK, told, figures=figures)
    else:
        verdict = WARNING if divergence <= _USABLE_NATS else PROBLEM
        yield Line(name, verdict, told, "report this line with the machine's", figures)


def _distributions(bundle: Bundle, ids: list[int]) -> np.ndarray:
    """Logarithms of the next token's probabilities, float32 [L, V]."""
    model = evaluated_model(bundle)
    tokens = mx.array(ids)
    embedded = model.embed_inputs(tokens)
    logits = model.language_model(tokens[None], input_embeddings=embedded[None])[0]
    logits = logits.astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


@contextmanager
def _on_cpu() -> Iterator[None]:
    """MLX on the CPU, as on a machine without a GPU, and as before afterwards."""
    device = mx.default_device()
    mx.set_default_device(mx.Device(mx.cpu))
    try:
        yield
    finally:
        mx.set_default_device(device)
        if device != mx.Device(mx.cpu):
            # A model on a CPU turns it off for the whole process.
            mx.enable_compile()


def _answers(model: FastVLM, exporter: Exporter) -> Iterator[Line]:
    judged = exporter.is_demo(model.bundle)
    asked: list[dict[str, Any]] = []
    right = babbled = cut = 0
    for question in exporter.questions():
        answer = model.generate(question.image, question.prompt, max_tokens=_LONGEST)
        correct = question.is_right(answer.text)
        right += correct
        cut += answer.finish_reason == "length"
        babbled += not answer.text.strip() or _repeats(answer.tokens)
        asked.append({"prompt": question.prompt, "answer": answer.text, "right": correct})
    count = len(asked)
    figures = {"asked": asked, "right": right if judged else None}
    if judged:
        told = f"{right} of {count} right about scenes that the demo knows"
        verdict = OK if right >= _GOOD * count else PROBLEM
        if verdict == PROBLEM and right >= _USABLE * count:
            verdict = WARNING
    else:
        told = (
            f"{count - babbled} of {count} are sentences, {cut} are longer than {_LONGEST} tokens"
        )
        told += "; whether they are right, only the demo's are judged"
        verdict = PROBLEM if 2 * babbled > count else WARNING if 2 * cut > count else OK
    if verdict == OK:
        yield Line("answers", verdict, told, figures=figures)
        return
    shown = "; ".join(f"{each['prompt']} {each['answer'][:40]!r}" for each in asked[:3])
    advice = f"{EXPORT_AGAIN}; `fastvlm verify` with --checkpoint says which part is off"
    yield Line("answers", verdict, f"{told} ({shown})", advice, figures)


def _repeats(tokens: tuple[int, ...]) -> bool:
    """Whether an answer goes round in a circle."""
    return len(tokens) >= 16 and len(set(tokens)) <= len(tokens) // 4


def _times(path: Path, model: FastVLM, exporter: Exporter) -> Iterator[Line]:
    """Stages of an answer, everything warm, beside what `plan` predicts for this chip."""
    name = "time to the first token"
    question = exporter.questions()[0]
    answer = min(
        (model.generate(question.image, question.prompt, max_tokens=_LONGEST) for _ in range(3)),
        key=lambda each: each.timings.ttft_s,
    )
    spent = asdict(answer.timings)
    figures: dict[str, Any] = {"measured": spent, "predicted": None}
    forecast, why = _forecast(path, exporter)
    figures["predicted"] = forecast
    parts, slow = [f"preprocess {spent['preprocess_s'] * 1000:.1f} ms"], []
    for stage, predicted in _STAGES.items():
        took, expected = spent[stage], (forecast or {}).get(predicted)
        told = f"{stage.removesuffix('_s')} {took * 1000:.1f} ms"
        if expected is not None:
            told += f" (predicted {expected * 1000:.1f})"
            if took > _SLOW * expected and took > _SHORT_S:
                slow.append(stage.removesuffix("_s"))
        parts.append(told)
    parts.append(f"together {spent['ttft_s'] * 1000:.1f} ms")
    parts.append(f"then {spent['tokens_per_s']:.1f} tokens/s")
    told = ", ".join(parts) + (f"; {why}" if why else "")
    if slow:
        advice = "close what else computes, plug it in, and see which compute units are in use"
        told += f"; slower than predicted: {', '.join(slow)}"
        yield Line(name, WARNING, told, advice, figures)
    else:
        yield Line(name, OK, told, figures=figures)


def _forecast(path: Path, exporter: Exporter) -> tuple[dict[str, Any] | None, str]:
    """Predict the times on this machine, or say why that can't be done."""
    if sys.platform != "darwin":
        return None, "there is no prediction, because `fastvlm plan` knows only Apple's chips"
    try:
        return exporter.forecast(path, machine.chip().removeprefix("Apple ")), ""
    except ModuleNotFoundError as error:
        return None, f"there is no prediction, which needs {error.name}: {INSTALL}"
    except OptionError as error:
        return None, f"there is no prediction: {error}"


def _decibels(value: float) -> str:
    return f"{value:.1f} dB" if isfinite(value) else "no error" if value > 0 else "no numbers"


def _json(value: float) -> float | None:
    return value if isfinite(value) else None
