"""`fastvlm`: all verbs in one command line. A verb's module is imported when the verb is used."""

from __future__ import annotations

import os
import sys
import warnings
from io import TextIOWrapper
from typing import Annotated

import typer

from fastvlm_mlx import __version__
from fastvlm_mlx.cli.app.usage import UsageError, usage_sentence
from fastvlm_mlx.cli.app.verbs import Verb, Verbs, in_order
from fastvlm_mlx.cli.common import needs_extra
from fastvlm_mlx.errors import FastVLMError, printable
from model_export.cli import ADDITIONS

RUNTIME = (
    Verb(
        "inspect",
        "Check",
        "Show what a bundle or a checkpoint contains.",
        "fastvlm inspect my-bundle",
        "fastvlm_mlx.cli.inspect",
    ),
    Verb(
        "doctor",
        "Check",
        "Check that this machine, its packages and a bundle work.",
        "fastvlm doctor my-bundle",
        "fastvlm_mlx.cli.doctor",
    ),
    Verb(
        "generate",
        "Run",
        "Answer one or several questions about an image or a video.",
        'fastvlm generate my-bundle --image photo.jpg --prompt "Describe the image."',
        "fastvlm_mlx.cli.generate",
    ),
    Verb(
        "chat",
        "Run",
        "Talk about images, one question after the other.",
        "fastvlm chat my-bundle --image photo.jpg",
        "fastvlm_mlx.cli.chat",
    ),
    Verb(
        "map",
        "Run",
        "Ask one question about every image of a folder.",
        'fastvlm map my-bundle images --prompt "Describe the image." --out captions.jsonl',
        "fastvlm_mlx.cli.map",
    ),
    Verb(
        "bench",
        "Run",
        "Measure how fast a bundle answers, stage by stage.",
        "fastvlm bench my-bundle --image photo.jpg",
        "fastvlm_mlx.cli.bench",
    ),
    Verb(
        "serve",
        "Run",
        "Serve a bundle to clients of OpenAI's API.",
        "fastvlm serve my-bundle --port 8080",
        "fastvlm_mlx.cli.serve",
    ),
    Verb(
        "models",
        "Run",
        "List the models that are known and cached, or remove some from the cache.",
        "fastvlm models --remove fastvlm-0.5b",
        "fastvlm_mlx.cli.models",
    ),
)
INTERRUPTED = 130


class Fastvlm(Verbs):
    """The verbs of the runtime and of the exporter."""

    table = in_order((*ADDITIONS.verbs, *RUNTIME))


app = typer.Typer(
    cls=Fastvlm,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "obj": ADDITIONS},
    help="Turn a FastVLM checkpoint into a verified bundle that gives the same answers everywhere.",
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
        with needs_extra():
            status = app(prog_name="fastvlm", standalone_mode=False) or 0
    except FastVLMError as error:
        _fail(str(error), error.exit_status)
    except UsageError as error:
        _fail(printable(usage_sentence(error, sys.argv[1:])), error.exit_code)
    except BrokenPipeError:
        # The reader of our output has gone; Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.filename is not None:
            raise
        _fail(f"the output can't be written ({error.strerror}): make room where it goes", 2)
    if status == INTERRUPTED:
        print(_interrupted(sys.argv[1:]), file=sys.stderr)
    sys.exit(status)


def _interrupted(arguments: list[str]) -> str:
    verb = Fastvlm.table.get(arguments[0]) if arguments else None
    if verb is not None and verb.writes:
        return "interrupted: nothing half done was left behind"
    return "interrupted"


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
