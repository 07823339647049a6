"""Time to the first token and tokens per second: ours beside transformers' and mlx-vlm's.

    python -m benchmarks.peers [--checkpoint DIR | --synthetic 0.5b] [--runs 5] [--keep]
    python -m benchmarks.peers --table

Every system answers the same question about the same image, from the same checkpoint: ours and
mlx-vlm with the language model at 4 bits, transformers with the weights as they are, in float32
and in bfloat16. Each has a process of its own, which loads once, and they take turns, so that a
busy machine slows all of them. mlx-vlm, which takes minutes on a CPU, has turns of its own with
ours, fewer of them, and no run to warm up. Every answer has the same number of tokens.

The peers' environments are given (`--transformers PYTHON`, `--mlx-vlm PYTHON`) or made with pip.
`--blas LIBRARY` adds mlx-vlm with a fast BLAS: a shared library that exports plain `cblas_sgemm`.
`--keep` writes benchmarks/results/peers.json, from which `--table` makes what docs/measured.md
shows.
"""

from __future__ import annotations

import argparse
import ctypes.util
import inspect
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.peers import environments, inputs, report
from benchmarks.synthetic import SIZES, make
from fastvlm_mlx import __version__, load
from fastvlm_mlx.bench.environment import describe, sentence
from fastvlm_mlx.bench.measure import MEASURED
from fastvlm_mlx.bench.process import WORKER, Process
from fastvlm_mlx.bench.spread import Spread, ratios
from fastvlm_mlx.bundle.bundle import Bundle
from fastvlm_mlx.components import placeholder_id
from fastvlm_mlx.errors import OptionError
from fastvlm_mlx.image.decode import load_image
from fastvlm_mlx.language.prompt.template import encode_prompt
from fastvlm_mlx.sizes import sizes_of
from model_export.samples.images import photographs

HERE = Path(__file__).parent
PROMPTS = ("Describe the image.", "How many people are there?")
SYSTEMS = ("ours", "transformers", "mlx-vlm")


@dataclass(frozen=True)
class System:
    """What answers: its process, and what that is given."""

    name: str
    command: Sequence[str]
    job: dict[str, Any]
    versions: dict[str, str]
    # Where that would take minutes, the first run counts.
    warm: bool = True


def main() -> None:
    options = _options()
    if options.table:
        tables.put(tables.MEASURED, "peers", report.tables(tables.read("peers")))
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        result = measure(options, work)
    print(report.tables(result))
    for bar in report.bars(result):
        verdict = "reached" if bar["reached"] else "NOT REACHED"
        print(f"{bar['what']}: {bar['value']:.4g}, limit {bar['limit']:.4g}: {verdict}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    if options.keep:
        print(tables.keep("peers", result))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint in Apple's layout")
    parser.add_argument("--synthetic", choices=SIZES, default="0.5b", help="or random weights")
    parser.add_argument("--name", help="what the table calls the checkpoint")
    parser.add_argument("--image", type=Path, help="a file; else a photograph of scikit-learn's")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--slow-runs", type=int, default=1, help="beside mlx-vlm")
    parser.add_argument("--slow-tokens", type=int, default=4, help="beside mlx-vlm")
    parser.add_argument("--only", default=",".join(SYSTEMS), help="some of the systems")
    parser.add_argument("--transformers", metavar="PYTHON", help="one that has it, and timm")
    parser.add_argument("--mlx-vlm", metavar="PYTHON", help="one that has it")
    parser.add_argument("--environments", type=Path, default=environments.DEFAULT)
    parser.add_argument("--blas", default=ctypes.util.find_library("openblas"))
    parser.add_argument("--app-bundle", type=Path, help="use this one, of the checkpoint at 4 bits")
    parser.add_argument("--work", type=Path, help="keep what is exported here")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/peers.json")
    parser.add_argument("--table", action="store_true", help="write the table of docs/measured.md")
    options = parser.parse_args()
    if unknown := {*options.only.split(",")} - {*SYSTEMS}:
        parser.error(f"--only has {', '.join(unknown)}: expected some of {', '.join(SYSTEMS)}")
    return options


def measure(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Everything, as one JSON object."""
    machine = describe()
    print(sentence(machine), file=sys.stderr, flush=True)
    checkpoint = options.checkpoint or work / "checkpoint"
    if not (checkpoint / "config.json").exists():
        make(checkpoint, options.synthetic)
    bundle = options.app_bundle or inputs.bundle(checkpoint, work, "app")
    image, image_name = _image(options.image, work)
    fast, slow = _systems(options, work, checkpoint, bundle, image)
    runs = take_turns(fast, options.warmup, options.runs)
    beside = take_turns(slow, options.warmup, options.slow_runs)
    first = next(iter({**beside, **runs}.values()))[0]
    return {
        "machine": machine,
        "checkpoint": _name(options),
        "image": image_name,
        "image_size": first["image_size"],
        "prompt_tokens": first["image_tokens"] + first["text_tokens"],
        "prompts": PROMPTS,
        "runs": options.runs,
        "slow_runs": options.slow_runs,
        "max_tokens": options.max_tokens,
        "slow_tokens": options.slow_tokens,
        "systems": [
            _system(system, found[system.name])
            for system, found in (
                *((s, runs) for s in fast),
                *((s, beside) for s in slow if s.name not in runs),
            )
            if system.name in found
        ],
        "ratios": [*compared(runs), *compared(beside)],
    }


def _systems(
    options: argparse.Namespace, work: Path, checkpoint: Path, bundle: Path, image: Path
) -> tuple[list[System], list[System]]:
    """Those that take turns with each other, and those that take theirs with mlx-vlm."""
    chosen = options.only.split(",")
    ours = {"bundle": str(bundle), "image": str(image), "prompts": PROMPTS}
    own = {"fastvlm-mlx": __version__}
    fast, slow = [], []
    if "ours" in chosen:
        # Of a runtime that knows no other, the exact encoder has no name.
        named = "encoder_compute" in inspect.signature(load).parameters
        exact = {"encoder_compute": "float32"} if named else {}
        job = {**ours, "max_tokens": options.max_tokens, "load": exact}
        fast.append(System(report.OURS, WORKER, job, own))
        slow.append(System(report.OURS, WORKER, {**job, "max_tokens": options.slow_tokens}, own))
        if named:
            rounded = {"encoder_compute": "bfloat16"}
            fast.append(System(report.OURS_BF16, WORKER, {**job, "load": rounded}, own))
    if "transformers" in chosen:
        python = environments.python_of("transformers", options.transformers, options.environments)
        job = _transformers_job(checkpoint, bundle, image, work)
        for name, dtype in ((report.FP32, "float32"), (report.BF16, "bfloat16")):
            more = {"dtype": dtype, "max_tokens": options.max_tokens}
            command = (python, str(HERE / "with_transformers.py"))
            fast.append(System(name, command, {**job, **more}, {}))
    if "mlx-vlm" not in chosen:
        return fast, []
    python = environments.python_of("mlx-vlm", options.mlx_vlm, options.environments)
    job = {
        "bundle": str(inputs.bundle(checkpoint, work, "mlx")),
        "image": str(image),
        "prompt": PROMPTS[0],
        "max_tokens": options.slow_tokens,
    }
    command = (python, str(HERE / "with_mlx_vlm.py"))
    slow.append(System(report.MLX_VLM, command, {**job, "blas": None}, {}, warm=False))
    if options.blas:
        fast_blas = {**job, "blas": options.blas}
        slow.append(System(report.MLX_VLM_BLAS, command, fast_blas, {}, warm=False))
    else:
        print("mlx-vlm with OpenBLAS: left out, --blas names no library", file=sys.stderr)
    return fast, slow


def _transformers_job(checkpoint: Path, bundle: Path, image: Path, work: Path) -> dict[str, Any]:
    opened = Bundle.open(bundle)
    tokenizer = opened.tokenizer()
    size = sizes_of(opened, None).auto
    ids = encode_prompt(
        tokenizer,
        PROMPTS[0],
        image_token_id=placeholder_id(tokenizer, opened),
        num_image_tokens=size.num_tokens,
    )
    layout = inputs.transformers_checkpoint(checkpoint, bundle, work)
    return {"checkpoint": str(layout), "image": str(image), "size": size.pixels, "ids": ids}


def take_turns(
    systems: Sequence[System], warmup: int, runs: int
) -> dict[str, list[dict[str, Any]]]:
    """The runs of each, in turns, after those that warm up."""
    found: dict[str, list[dict[str, Any]]] = {system.name: [] for system in systems}
    with ExitStack() as stack:
        processes = []
        for system in systems:
            print(f"{system.name}: load", file=sys.stderr, flush=True)
            process = stack.enter_context(Process(system.name, system.job, system.command))
            try:
                ready = process.wait()
            except OptionError as error:
                # The type that not every processor multiplies.
                print(f"{system.name}: left out, {error}", file=sys.stderr)
                del found[system.name]
                continue
            system.versions.update(ready.get("versions", {}))
            processes.append((system, process))
        for number in range(warmup + runs):
            for system, process in processes:
                if number < warmup and not system.warm:
                    continue
                run = process.run(number)
                print(
                    f"{system.name}: run {number + 1} of {warmup + runs}, TTFT "
                    f"{run['ttft_s']:.2f} s, {run['tokens_per_s']:.1f} tokens/s",
                    file=sys.stderr,
                    flush=True,
                )
                if number >= warmup:
                    found[system.name].append(run)
    return found


def compared(runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """How many times as fast each of ours is as each peer, round by round."""
    pairs = [
        (ours, peer)
        for peer in runs
        for ours in runs
        if ours.startswith(report.OURS) and not peer.startswith(report.OURS)
    ]
    return [
        {
            "system": ours,
            "against": peer,
            **{
                stage: ratios(
                    [run[f"{stage}_s"] for run in runs[peer]],
                    [run[f"{stage}_s"] for run in runs[ours]],
                ).to_dict()
                for stage in report.COMPARED
            },
        }
        for ours, peer in pairs
    ]


def _system(system: System, runs: list[dict[str, Any]]) -> dict[str, Any]:
    measured = [name for name in MEASURED if name in runs[0]]
    found: dict[str, Any] = {
        "name": system.name,
        "versions": system.versions,
        "compute": runs[0]["compute"],
        "load_s": runs[0]["load_s"],
        "peak_memory_bytes": max(run["peak_memory_bytes"] for run in runs),
        "image_tokens": runs[0]["image_tokens"],
        "text_tokens": runs[0]["text_tokens"],
        "generation_tokens": runs[0]["generation_tokens"],
        **{name: Spread.of([run[name] for run in runs]).to_dict() for name in measured},
        "runs": [{name: run[name] for name in measured} for run in runs],
    }
    if "next_ttft_s" in runs[0]:
        first, second = ([run[k] for run in runs] for k in ("ttft_s", "next_ttft_s"))
        found["next_question"] = ratios(first, second).to_dict()
    return found


def _image(given: Path | None, work: Path) -> tuple[Path, str]:
    """A file that every system can read, and what it is."""
    file = work / "image.png"
    if given is not None:
        load_image(given).save(file)
        return file, given.name
    photograph = photographs()[0]
    photograph.image.save(file)
    size = "×".join(map(str, photograph.image.size))
    return file, f"a photograph of {size} pixels"


def _name(options: argparse.Namespace) -> str:
    if options.checkpoint and not (options.checkpoint / "config.json").exists():
        raise SystemExit(f"{options.checkpoint} holds no checkpoint")
    if options.name:
        return str(options.name)
    return options.checkpoint.name if options.checkpoint else f"Random weights, {options.synthetic}"


if __name__ == "__main__":
    main()
