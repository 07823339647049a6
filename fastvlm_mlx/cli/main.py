"""`fastvlm`: every verb. What is slow to import is imported by the verb that needs it."""

from __future__ import annotations

import os
import sys
import warnings
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, BinaryIO

import typer

from fastvlm_mlx import __version__
from fastvlm_mlx.cli.common import (
    Base,
    Json,
    MaxKl,
    MinAgreement,
    MinSnr,
    Out,
    Revision,
    needs_export_extra,
    print_json,
)
from fastvlm_mlx.cli.doctor import doctor
from fastvlm_mlx.cli.usage import UsageError, Verbs, usage_sentence
from fastvlm_mlx.errors import FastVLMError, GateError, ImageError, OptionError, printable
from model_export.cli.compare import compare, sweep
from model_export.cli.convert import convert
from model_export.cli.export import export
from model_export.cli.install import install
from model_export.cli.plan import plan

app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="FastVLM: any checkpoint in, one verified bundle out, the same answers everywhere.",
)


def main() -> None:
    """Run a verb; a user's mistake becomes one sentence and exit status 2, Ctrl-C 130."""
    # PIL's remarks on an image's metadata; what matters about an image is an ImageError.
    warnings.filterwarnings("ignore", module="PIL")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # A terminal without a character for an answer's letter still gets the answer.
            stream.reconfigure(errors="replace")
    try:
        with needs_export_extra():
            status = app(prog_name="fastvlm", standalone_mode=False) or 0
    except FastVLMError as error:
        _fail(str(error), error.exit_status)
    except UsageError as error:
        # Without arguments the help was printed, and there is no more to say.
        if error.format_message():
            _fail(printable(usage_sentence(error, sys.argv[1:])), error.exit_code)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of our output has gone; Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.filename is not None:
            raise
        _fail(f"the output can't be written ({error.strerror}): make room where it goes", 2)
    if status == 130:
        print("interrupted: nothing half done was left behind", file=sys.stderr)
    sys.exit(status)


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


app.command()(export)


@app.command()
def generate(
    bundle: Out,
    image: Annotated[str, typer.Option(help="An image's path, or - for standard input.")],
    prompt: Annotated[list[str], typer.Option(help="What to ask; give several for one image.")],
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
        str, typer.Option(help="Where Core ML runs, on macOS: auto, all, cpu, gpu or ne.")
    ] = "auto",
    image_size: Annotated[
        int | None, typer.Option(help="Input size in pixels, of those that the bundle takes.")
    ] = None,
    crop: Annotated[
        bool, typer.Option("--crop", help="Crop to the centre as the demo app does.")
    ] = False,
    max_pixels: Annotated[
        int | None,
        typer.Option(help="Largest image that is read, in pixels; 178,956,970 unless given."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Answer one or several questions about an image."""
    from fastvlm_mlx.bundle.bundle import Bundle
    from fastvlm_mlx.cli import show
    from fastvlm_mlx.fastvlm import load
    from fastvlm_mlx.image.decode import (
        DEFAULT_MAX_PIXELS,
        ImageSource,
        check_max_pixels,
        load_image,
    )
    from fastvlm_mlx.language.sampling import SamplingOptions

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
    check_max_pixels(limit)
    source: ImageSource = _stdin() if image == "-" else image
    Bundle.open(bundle)
    decoded = load_image(source, max_pixels=limit)
    model = load(
        bundle,
        compute_units=compute_units,
        image_size=image_size,
        crop=crop,
        max_pixels=limit,
    )
    answers = []
    for generation in model.ask(decoded, prompt, options):
        for piece in generation:
            if not as_json:
                print(show.answer(piece), end="", flush=True)
        answers.append(generation.result)
        if not as_json:
            print(flush=True)
            print(show.timing_line(generation.result), file=sys.stderr)
    if as_json:
        print_json(
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
    from fastvlm_mlx.cli import show
    from model_export.gates.verify import verify as run

    if checkpoint is None and (base or revision):
        raise OptionError("--base or --revision is given without --checkpoint: name that too")
    limits = {
        "min_snr_db": min_snr_db,
        "max_kl_nats": max_kl_nats,
        "min_agreement": min_agreement,
    }
    with show.stages() as progress:
        checked, gates = run(bundle, checkpoint, limits, progress, base=base, revision=revision)
    failed = [gate for gate in gates if not gate.passed]
    judged = [gate.to_dict() for gate in gates if not gate.left_out]
    left_out = {gate.name: gate.left_out for gate in gates if gate.left_out}
    if as_json:
        print_json(
            {
                "bundle": str(bundle),
                "files": None if checked.manifest is None else len(checked.files) - 1,
                "layout": checked.layout,
                "gates": judged,
                "gates_left_out": left_out,
                "passed": not failed,
            }
        )
    else:
        if checkpoint is None:
            show.print_checks(checked)
        if judged:
            show.print_gates(judged)
        for name, why in left_out.items():
            show.note(f"{name} is not judged: {why}")
        if checkpoint is None:
            show.note("give --checkpoint to compare features and answers with the source")
    if failed:
        raise GateError("; ".join(gate.sentence() for gate in failed) + ": export again")


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A bundle's or a checkpoint's directory.")],
    as_json: Json = False,
) -> None:
    """Show what a bundle or a checkpoint is: sizes, precision, resolution, gates, licence."""
    from fastvlm_mlx.cli import show

    facts = show.inspect(path)
    if as_json:
        print_json(facts)
    else:
        show.print_bundle(facts)


app.command()(compare)
app.command()(sweep)
app.command()(plan)
app.command()(convert)
app.command()(doctor)
app.command()(install)


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
    from fastvlm_mlx.cli import show
    from model_export.publish.push import plan
    from model_export.publish.push import push as run

    with show.stages() as progress:
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
        print(f"{count} files, {show.shown_bytes(upload.bytes)}, and a model card: {url}")


@app.command()
def demo(
    directory: Annotated[Path, typer.Argument(help="Where everything is put.")] = Path(
        "fastvlm-demo"
    ),
    seed: Annotated[int, typer.Option(help="Which scene is drawn.")] = 18,
    llm_bits: Annotated[int, typer.Option(help="As for export.")] = 4,
) -> None:
    """Export the checkpoint that ships with the package, verify it, draw a scene and ask."""
    from model_export.demo.run import run_demo

    run_demo(directory, seed=seed, llm_bits=llm_bits)


def _stdin() -> BinaryIO:
    if sys.stdin is None or sys.stdin.isatty():
        raise ImageError(
            "--image - reads an image from standard input, which holds none: pipe one in"
        )
    return sys.stdin.buffer
