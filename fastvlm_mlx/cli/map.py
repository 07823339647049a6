"""`fastvlm map`: the verb, and its progress."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastvlm_mlx.cli.common import OUTPUT, Json, Model, argument, option, print_json, resolve
from fastvlm_mlx.cli.options import (
    ComputeUnits,
    Crop,
    Detail,
    EncoderCompute,
    ImageSize,
    JsonSchema,
    MaxPixels,
    MaxTokens,
    MinP,
    RepetitionPenalty,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
    sampling,
)

if TYPE_CHECKING:
    from fastvlm_mlx.mapping.rows import Row
    from fastvlm_mlx.mapping.run import Progress, Tally

QUESTION, WORK = "Question", "Work"
# Errors that are shown; all are in the output.
SHOWN_ERRORS = 20
# As `language.batch` has it, which takes long to import.
BATCH_SIZE = 16


def map(
    call: typer.Context,
    model: Model,
    folder: Annotated[
        Path, argument("FOLDER", "The folder of the images; folders in it are looked through too.")
    ],
    prompt: Annotated[str, option("What to ask about each image.", group=QUESTION, value="TEXT")],
    out: Annotated[
        Path,
        option(
            "The file for the rows, .jsonl or .parquet; if an earlier run did not finish it, this "
            "one goes on.",
            group=OUTPUT,
            value="FILE",
        ),
    ],
    pattern: Annotated[
        list[str] | None,
        option(
            "Take the files with such names.",
            group=QUESTION,
            value="PATTERN",
            default="names that images have",
        ),
    ] = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = None,
    stop: Stop = None,
    json_schema: JsonSchema = None,
    compute_units: ComputeUnits = "auto",
    encoder_compute: EncoderCompute = "auto",
    image_size: ImageSize = None,
    detail: Detail = "auto",
    crop: Crop = False,
    max_pixels: MaxPixels = None,
    batch_size: Annotated[
        int, option("Decode this many answers together.", group=WORK, value="N")
    ] = BATCH_SIZE,
    shard: Annotated[
        str,
        option(
            "Take one part of the images, such as 2/8; each part needs an --out of its own.",
            group=WORK,
            value="I/N",
        ),
    ] = "1/1",
    ray: Annotated[
        int | None,
        option("Ask with this many workers of a Ray cluster.", group=WORK, value="WORKERS"),
    ] = None,
    overwrite: Annotated[
        bool,
        option("Begin anew what an earlier run made at --out.", "--overwrite", group=OUTPUT),
    ] = False,
    retry_errors: Annotated[
        bool,
        option(
            "Ask again about the images that an earlier run has errors for.",
            "--retry-errors",
            group=OUTPUT,
        ),
    ] = False,
    quiet: Annotated[
        bool, option("Show errors and nothing else.", "--quiet", group=OUTPUT)
    ] = False,
    as_json: Json = False,
) -> None:
    """Each image gets a row with its path, the answer and its tokens, or with what is wrong with
    the image. Run the same command again to continue a run that was interrupted or killed. The exit
    status is 1 if an image or a folder could not be read."""
    from fastvlm_mlx.image.decode import DEFAULT_MAX_PIXELS
    from fastvlm_mlx.mapping import Job, map_folder
    from fastvlm_mlx.mapping.images import Shard

    options = sampling(call)
    job = Job(
        model,
        folder,
        prompt,
        options,
        patterns=tuple(pattern or ()),
        shard=Shard.parse(shard),
        batch_size=batch_size,
        image_size=image_size,
        detail=detail,
        crop=crop,
        max_pixels=DEFAULT_MAX_PIXELS if max_pixels is None else max_pixels,
        compute_units=compute_units,
        encoder_compute=encoder_compute,
    )
    # Last, since an export takes minutes.
    job = replace(job, bundle=resolve(call, model))
    with _shown(out, quiet=quiet) as progress:
        tally = map_folder(
            job, out, overwrite=overwrite, retry_errors=retry_errors, ray=ray, progress=progress
        )
    if as_json or not quiet:
        _report(tally, out, as_json=as_json)
    if not tally.complete:
        raise typer.Exit(1)


@contextmanager
def _shown(out: Path, *, quiet: bool) -> Iterator[Progress]:
    """A callback for `map_folder` that shows how far it is; an interruption says how to go on."""
    from fastvlm_mlx.cli import show

    last: Tally | None = None
    errors = 0
    with nullcontext() if quiet else show.counting("images") as count:

        def progress(tally: Tally, row: Row | None) -> None:
            nonlocal last, errors
            if last is None:
                _introduce(tally, quiet=quiet)
            last = tally
            if row is not None and row.error is not None:
                errors += 1
                if errors <= SHOWN_ERRORS:
                    show.note(row.error)
                if errors == SHOWN_ERRORS:
                    show.note(f"{SHOWN_ERRORS} errors are shown; further ones are in {out} only")
            if count is not None:
                count(tally.done, tally.images)

        try:
            yield progress
        except KeyboardInterrupt:
            if last is not None:
                show.note(
                    f"{last.done:,} of {last.images:,} images are done; the same command goes on "
                    "with the rest"
                )
            raise


def _introduce(tally: Tally, *, quiet: bool) -> None:
    from fastvlm_mlx.cli import show

    if tally.done and not quiet:
        show.note(f"{tally.done:,} of {tally.images:,} images were done before")
    if tally.others and not quiet:
        show.note(f"left out, as their names are not those of images: {tally.others:,} files")
    if tally.links and not quiet:
        show.note(f"not followed, as they lead to folders: {tally.links:,} links")
    for sentence in tally.unreadable:
        show.note(sentence)


def _report(tally: Tally, out: Path, *, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "out": str(out),
                "images": tally.images,
                "answered": tally.done - tally.broken,
                "errors": tally.broken,
                "new": tally.new,
                "unreadable_folders": list(tally.unreadable),
            }
        )
        return
    from fastvlm_mlx.errors import printable

    print(
        f"{printable(out)}: {tally.done - tally.broken:,} of {tally.images:,} images answered, "
        f"errors: {tally.broken:,}"
    )
