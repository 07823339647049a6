"""What a second question costs after the first, many images at once beside one at a time, and an
answer that a schema holds to JSON beside a free one.

    python -m benchmarks.reuse [BUNDLE] [--questions 3] [--images 16] [--tokens 256] [--runs 3]
                               [--json FILE] [--only-structured]

Without BUNDLE, a synthetic 0.5B checkpoint (random weights in Apple's shapes) is exported first,
at 4 bits. Images are noise and every one is new. The seconds to the first token of a first and a
second question about an image are measured in turns. Then all images are asked about one at a
time and in one batch, which take turns, too, in a model that keeps nothing; the tokens of both
must be the same. With and without a schema answers are decoded in turns, too, and what a token of
each takes is processor time. Answers have exactly the given number of tokens, or fewer where they
end by themselves, which with random weights they hardly do.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

import fastvlm_mlx
from benchmarks.encoder import machine
from benchmarks.load import export
from fastvlm_mlx.fastvlm import FastVLM

PROMPTS = ("Describe the image.", "How many people are in the picture, and what do they do?")
# What it must reach: the first question's seconds to the first token over the second's, and images
# per minute of a batch of 16 over those of one at a time.
MIN_TTFT_RATIO, MIN_BATCH_RATIO = 8.0, 1.5
# And the processor time of a token under a schema over that of a free one.
MAX_STRUCTURED_RATIO = 1.1
# A list that never ends, of texts, numbers and choices.
SCHEMA = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 30},
            "count": {"type": "integer", "minimum": 0, "maximum": 100},
            "colour": {"enum": ["red", "green", "blue", "none of them"]},
        },
        "required": ["name", "count", "colour"],
        "additionalProperties": False,
    },
}


def noise(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (768, 1024, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def questions(model: FastVLM, count: int) -> list[dict[str, float]]:
    """Seconds to the first token of two questions about an image, of `count` images."""
    found = []
    # One before them, which loads the encoder and packs weights.
    for seed in range(count + 1):
        first, second = (
            model.generate(noise(seed), prompt, max_tokens=2).timings.ttft_s for prompt in PROMPTS
        )
        found.append({"first_s": first, "second_s": second})
    return found[1:]


def images(model: FastVLM, count: int, tokens: int) -> dict[str, Any]:
    """Seconds for `count` images one at a time, and in one batch."""
    drawn = [noise(1000 + seed) for seed in range(count)]
    started = time.perf_counter()
    alone = [model.generate(image, PROMPTS[0], max_tokens=tokens) for image in drawn]
    in_turn_s = time.perf_counter() - started
    started = time.perf_counter()
    together = list(model.batch(drawn, PROMPTS[0], max_tokens=tokens))
    batch_s = time.perf_counter() - started
    same = [a.tokens == b.tokens for a, b in zip(alone, together, strict=True)]
    parts = ("preprocess_s", "encode_s", "project_s", "prefill_s", "decode_s")
    return {
        "in_turn_s": in_turn_s,
        "batch_s": batch_s,
        "in_turn": {part: sum(getattr(one.timings, part) for one in alone) for part in parts},
        "answers": count,
        "same_answers": sum(same),
        "tokens": sum(one.generation_tokens for one in alone),
    }


def structured(model: FastVLM, tokens: int, runs: int) -> dict[str, float]:
    """Processor seconds of a decoded token without a schema and with one, and their ratio."""

    def spent(count: int, schema: object) -> tuple[float, int]:
        started = time.process_time()
        answer = model.generate(None, PROMPTS[1], max_tokens=count, json_schema=schema)
        return time.process_time() - started, answer.generation_tokens

    def of_a_token(schema: object) -> float:
        whole, made = spent(tokens, schema)
        first, _ = spent(1, schema)
        return (whole - first) / (made - 1)

    # One before them, which makes the vocabulary ready and packs weights.
    pairs = [(of_a_token(None), of_a_token(SCHEMA)) for _ in range(runs + 1)][1:]
    return {
        "free_s": median(free for free, _ in pairs),
        "structured_s": median(held for _, held in pairs),
        "ratio": median(held / free for free, held in pairs),
        "limit": MAX_STRUCTURED_RATIO,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path, nargs="?", help="a bundle's directory")
    parser.add_argument("--questions", type=int, default=3, help="pairs of questions")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only-structured", action="store_true")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        bundle = arguments.bundle or export(Path(temporary))
        model = fastvlm_mlx.load(bundle)
        by_schema = structured(model, arguments.tokens, arguments.runs)
        if arguments.only_structured:
            print(json.dumps(machine()))
            print(_structured_line(by_schema))
            return
        asked = questions(model, arguments.questions)
        del model
        cold = fastvlm_mlx.load(bundle, kept_bytes=0)
        _ = cold.generate(noise(0), PROMPTS[0], max_tokens=2)
        runs = [images(cold, arguments.images, arguments.tokens) for _ in range(arguments.runs)]
    ttft = {key: median(one[key] for one in asked) for key in asked[0]}
    ttft_ratio = median(one["first_s"] / one["second_s"] for one in asked)
    batch_ratio = median(run["in_turn_s"] / run["batch_s"] for run in runs)
    result = {
        "machine": machine(),
        "bundle": str(arguments.bundle or "synthetic 0.5b, 4 bits"),
        "ttft": {**ttft, "ratio": ttft_ratio, "limit": MIN_TTFT_RATIO, "runs": asked},
        "batch": {"ratio": batch_ratio, "limit": MIN_BATCH_RATIO, "runs": runs},
        "structured": by_schema,
    }
    print(json.dumps(result["machine"]))
    print(
        f"first token of the first question {ttft['first_s']:.2f} s, of the second "
        f"{ttft['second_s']:.2f}: {ttft_ratio:.1f} times faster, "
        f"limit {MIN_TTFT_RATIO}: {'' if ttft_ratio >= MIN_TTFT_RATIO else 'NOT '}met"
    )
    for run in runs:
        minute = 60 * run["answers"]
        print(
            f"{run['answers']} images, {run['tokens']} tokens: in turn "
            f"{minute / run['in_turn_s']:.1f} a minute, in a batch "
            f"{minute / run['batch_s']:.1f}, the same answers {run['same_answers']}; in turn "
            + ", ".join(f"{name} {seconds:.1f}" for name, seconds in run["in_turn"].items())
        )
    print(
        f"batch: {batch_ratio:.2f} times the images, limit {MIN_BATCH_RATIO}: "
        f"{'' if batch_ratio >= MIN_BATCH_RATIO else 'NOT '}met"
    )
    print(_structured_line(by_schema))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def _structured_line(found: dict[str, float]) -> str:
    return (
        f"processor time of a token: free {1000 * found['free_s']:.2f} ms, by a schema "
        f"{1000 * found['structured_s']:.2f}: {found['ratio']:.3f} times as much, "
        f"limit {found['limit']}: {'' if found['ratio'] <= found['limit'] else 'NOT '}met"
    )


if __name__ == "__main__":
    main()
