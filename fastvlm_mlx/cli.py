"""`fastvlm`: every verb. What is slow to import is imported by the verb that needs it."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer

from fastvlm_mlx import __version__
from fastvlm_mlx.cli_compare import compare, sweep
from fastvlm_mlx.cli_plan import plan
from fastvlm_mlx.errors import FastVLMError, GateError, ImageError, OptionError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="FastVLM: any checkpoint in, one verified bundle out, the same answers everywhere.",
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Out = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's directory.")]
Base = Annotated[
    str | None, typer.Option(help="What an adapter adapts, if not the base that it names.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
MinSnr = Annotated[
    float | None, typer.Option(help="Floor of the encoder's signal-to-noise ratio, dB.")
]
MaxKl = Annotated[float | None, typer.Option(help="Ceiling of the KL divergence, nats.")]
MinAgreement = Annotated[float | None, typer.Option(help="Floor of the greedy agreement, 0 to 1.")]


def main() -> None:
    """Run a verb; a user's mistake becomes one sentence and exit status 2, Ctrl-C 130."""
    # PIL's remarks on a picture's metadata; what matters about a picture is an ImageError.
    warnings.filterwarnings("ignore", module="PIL")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # A terminal without a character for an answer's letter still gets the answer.
            stream.reconfigure(errors="replace")
    try:
        app()
    except FastVLMError as error:
        _fail(str(error), error.exit_status)
    except BrokenPipeError:
        # The reader of our output has gone; Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.filename is not None:
            raise
        _fail(f"the output can't be written ({error.strerror}): make room where it goes", 2)
    except SystemExit as leaving:
        if leaving.code == 130:
            print("interrupted: nothing half done was left behind", file=sys.stderr)
        raise


def _fail(message: str, status: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fastvlm-mlx {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def export(
    checkpoint: Annotated[
        str, typer.Argument(help="A checkpoint's directory, an adapter's, or a hub id.")
    ],
    out: Annotated[Path, typer.Argument(help="Where the bundle appears.")],
    llm_bits: Annotated[
        int | None,
        typer.Option(help="Bits of the LLM's weights: 2, 3, 4, 5, 6, 8; 16 leaves them. Else 8."),
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Weights that share a scale: 32, 64 or 128. Else 64.")
    ] = None,
    llm_mode: Annotated[
        str, typer.Option(help="affine, or mxfp4, mxfp8, nvfp4, which have their own bits.")
    ] = "affine",
    embed_bits: Annotated[int | None, typer.Option(help="Of the embedding alone.")] = None,
    head_bits: Annotated[int | None, typer.Option(help="Of an untied head alone.")] = None,
    projector_bits: Annotated[int, typer.Option(help="Of the projector.")] = 16,
    recipe: Annotated[
        str | None,
        typer.Option(help="Bits by layer: a JSON file, or mixed_2_6, _3_4, _3_6, _4_6."),
    ] = None,
    llm_bpw: Annotated[
        float | None, typer.Option(help="Bits per weight: finds which layers need how many.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="rtn rounds; awq and gptq look at calibration data to lose less.")
    ] = "rtn",
    calibration: Annotated[
        str | None,
        typer.Option(help="What these look at: a directory of pictures, or a JSONL file."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Type of what is not quantized: float16, bfloat16 or float32.")
    ] = "float16",
    encoder_precision: Annotated[
        str,
        typer.Option(help="Core ML encoder: fp16, fp32, int8, palette6, palette4 or mixed."),
    ] = "fp16",
    encoder_bpw: Annotated[
        float | None, typer.Option(help="Bits per weight of a mixed encoder; 6 unless given.")
    ] = None,
    deployment_target: Annotated[
        str | None,
        typer.Option(help="First iOS that loads the encoder: iOS15 to iOS18; else the lowest."),
    ] = None,
    layout: Annotated[
        str, typer.Option(help="Who loads it: app (Core ML encoder), or mlx (mlx-vlm, Swift).")
    ] = "app",
    image_size: Annotated[
        int | None, typer.Option(help="Input size in pixels, a multiple of 64; else its own.")
    ] = None,
    base: Base = None,
    revision: Revision = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    allow_failed_gates: Annotated[
        bool, typer.Option("--allow-failed-gates", help="Keep a bundle that fails its check.")
    ] = False,
    min_snr_db: MinSnr = None,
    max_kl_nats: MaxKl = None,
    min_agreement: MinAgreement = None,
    as_json: Json = False,
) -> None:
    """Turn a checkpoint into a verified bundle for the app, a Mac and Linux."""
    with _needs_export_extra():
        from model_export.options import OWN, ExportOptions
        from model_export.pipeline import export as run

    from fastvlm_mlx import report

    options = ExportOptions(
        llm_bits=OWN if llm_bits is None else llm_bits,
        group_size=OWN if group_size is None else group_size,
        llm_mode=llm_mode,  # type: ignore[arg-type]
        embed_bits=embed_bits,
        head_bits=head_bits,
        projector_bits=projector_bits,
        recipe=recipe,
        llm_bpw=llm_bpw,
        method=method,  # type: ignore[arg-type]
        calibration=calibration,
        dtype=dtype,  # type: ignore[arg-type]
        encoder_precision=encoder_precision,  # type: ignore[arg-type]
        encoder_bpw=encoder_bpw,
        deployment_target=deployment_target,  # type: ignore[arg-type]
        layout=layout,  # type: ignore[arg-type]
        overwrite=overwrite,
        allow_failed_gates=allow_failed_gates,
        image_size=image_size,
        min_snr_db=min_snr_db,
        max_kl_nats=max_kl_nats,
        min_agreement=min_agreement,
    )
    with report.stages() as progress:
        result = run(checkpoint, out, options, progress, base=base, revision=revision)
    for note in result.notes:
        report.note(note)
    if as_json:
        _print_json({"bundle": str(out), **result.manifest})
    else:
        report.print_bundle(report.inspect_bundle(out))
    report.note_padding(out)


@app.command()
def generate(
    bundle: Out,
    image: Annotated[str, typer.Option(help="A picture's path, or - for standard input.")],
    prompt: Annotated[list[str], typer.Option(help="What to ask; give several for one picture.")],
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from this much probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample from this many tokens; 0: all.")] = 0,
    min_p: Annotated[
        float, typer.Option(help="Sample above this share of the likeliest's probability.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1 makes recent tokens less likely.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer.")] = None,
    compute_units: Annotated[
        str, typer.Option(help="Where Core ML runs, on macOS: all, cpu, gpu or ne.")
    ] = "all",
    crop: Annotated[
        bool, typer.Option("--crop", help="Crop to the centre as the demo app does.")
    ] = False,
    max_pixels: Annotated[
        int | None,
        typer.Option(help="Largest picture that is read, in pixels; 178,956,970 unless given."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Answer one or several questions about a picture."""
    from fastvlm_mlx import report
    from fastvlm_mlx.bundle import Bundle
    from fastvlm_mlx.fastvlm import load
    from fastvlm_mlx.generate import SamplingOptions
    from fastvlm_mlx.image import DEFAULT_MAX_PIXELS, load_image

    options = SamplingOptions(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop or ()),
    )
    limit = DEFAULT_MAX_PIXELS if max_pixels is None else max_pixels
    if limit < 1:
        raise OptionError(f"--max-pixels is {limit}: expected 1 or more")
    source = _stdin_bytes() if image == "-" else image
    Bundle.open(bundle)
    picture = load_image(source, max_pixels=limit)
    model = load(bundle, compute_units=compute_units, crop=crop)
    answers = []
    for generation in model.ask(picture, prompt, options):
        for piece in generation:
            if not as_json:
                print(piece, end="", flush=True)
        answers.append(generation.result)
        if not as_json:
            print(flush=True)
            print(report.timing_line(generation.result), file=sys.stderr)
    if as_json:
        _print_json(
            {
                "model": str(bundle),
                "image": image,
                "answers": [answer.to_dict() for answer in answers],
                "peak_memory_bytes": max(answer.peak_memory_bytes for answer in answers),
            }
        )


@app.command()
def verify(
    bundle: Out,
    checkpoint: Annotated[
        str | None, typer.Option(help="The checkpoint it was made from: compares both.")
    ] = None,
    base: Base = None,
    revision: Revision = None,
    min_snr_db: MinSnr = None,
    max_kl_nats: MaxKl = None,
    min_agreement: MinAgreement = None,
    as_json: Json = False,
) -> None:
    """Repeat a bundle's checks: files, layout, and with its checkpoint the numeric gates."""
    with _needs_export_extra():
        from model_export.verify import verify as run

    from fastvlm_mlx import report

    if checkpoint is None and (base or revision):
        raise OptionError("--base or --revision is given without --checkpoint: name that too")
    limits = {
        "min_snr_db": min_snr_db,
        "max_kl_nats": max_kl_nats,
        "min_agreement": min_agreement,
    }
    with report.stages() as progress:
        _, gates = run(bundle, checkpoint, limits, progress, base=base, revision=revision)
    failed = [gate for gate in gates if not gate.passed]
    if as_json:
        _print_json(
            {
                "bundle": str(bundle),
                "gates": [gate.to_dict() for gate in gates],
                "passed": not failed,
            }
        )
    else:
        report.print_gates([gate.to_dict() for gate in gates])
        if checkpoint is None:
            report.note("give --checkpoint to compare features and answers with the source")
    if failed:
        raise GateError("; ".join(gate.sentence() for gate in failed) + ": export again")


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A bundle's or a checkpoint's directory.")],
    as_json: Json = False,
) -> None:
    """Show what a bundle or a checkpoint is: sizes, precision, resolution, gates, licence."""
    from fastvlm_mlx import report

    facts = report.inspect(path)
    if as_json:
        _print_json(facts)
    else:
        report.print_bundle(facts)


app.command()(compare)
app.command()(sweep)
app.command()(plan)


@app.command()
def install(
    bundle: Out,
    app_dir: Annotated[
        Path, typer.Argument(help="The app/ directory of a clone of apple/ml-fastvlm.")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be done.")] = False,
) -> None:
    """Put a bundle where the demo app's Xcode project expects its model."""
    with _needs_export_extra():
        from model_export.install import install as run
        from model_export.install import plan

    installation = plan(bundle, app_dir)
    for name in installation.files:
        print(f"{'would copy' if dry_run else 'copy'} {name}")
    for name in sorted(set(installation.replaces) - set(installation.files)):
        print(f"{'would remove' if dry_run else 'remove'} {name}")
    if not dry_run:
        run(installation)
    print(
        f"{installation.bytes / 1e6:,.1f} MB {'would go' if dry_run else 'are'} in "
        f"{installation.model}\nNext: open FastVLM.xcodeproj beside it in Xcode, choose your team "
        "under Signing & Capabilities, a device, and run"
    )


@app.command()
def push(
    bundle: Out,
    repository: Annotated[str, typer.Argument(metavar="REPO", help="On the hub: owner/name.")],
    private: Annotated[bool, typer.Option("--private", help="Of a repository created.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch, created if missing.")] = None,
    message: Annotated[str | None, typer.Option(help="The commit's message.")] = None,
    allow_failed_gates: Annotated[
        bool, typer.Option("--allow-failed-gates", help="Push a bundle that fails its check.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the card alone.")] = False,
) -> None:
    """Upload a bundle to the Hugging Face hub, with a model card made from its manifest."""
    from fastvlm_mlx import report
    from model_export.push import plan
    from model_export.push import push as run

    with report.stages() as progress:
        upload = plan(
            bundle,
            repository,
            revision=revision,
            allow_failed_gates=allow_failed_gates,
            progress=progress,
        )
        url = "" if dry_run else run(upload, private=private, message=message, progress=progress)
    if dry_run:
        print(upload.card, end="")
    else:
        count = len(upload.files)
        print(f"{count} files, {report.shown_bytes(upload.bytes)}, and a model card: {url}")


@app.command()
def demo(
    directory: Annotated[Path, typer.Argument(help="Where everything is put.")] = Path(
        "fastvlm-demo"
    ),
    seed: Annotated[int, typer.Option(help="Which scene is drawn.")] = 18,
    llm_bits: Annotated[int, typer.Option(help="As for export.")] = 4,
) -> None:
    """Export the checkpoint that ships with the package, verify it, draw a scene and ask."""
    with _needs_export_extra():
        from model_export.demo.run import run_demo

    run_demo(directory, seed=seed, llm_bits=llm_bits)


@contextmanager
def _needs_export_extra() -> Iterator[None]:
    """Turns a missing package of the `export` extra into the command that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise OptionError(
            f"this needs {error.name}, which is not installed: run "
            'pip install "fastvlm-mlx[export]"'
        ) from error


def _stdin_bytes() -> bytes:
    if sys.stdin is None or sys.stdin.isatty():
        raise ImageError(
            "--image - reads a picture from standard input, which holds none: pipe one in"
        )
    return sys.stdin.buffer.read()


def _print_json(data: dict[str, Any]) -> None:
    print(json.dumps(data, indent=2, ensure_ascii=False))
