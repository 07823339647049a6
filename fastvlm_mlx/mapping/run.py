"""A whole folder: listed, asked about, written down."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

from fastvlm_mlx.errors import DestinationError, ImageError, OptionError
from fastvlm_mlx.mapping import images, journal
from fastvlm_mlx.mapping.images import Found
from fastvlm_mlx.mapping.job import Job
from fastvlm_mlx.mapping.rows import Row

JSONL, PARQUET = ".jsonl", ".parquet"


@dataclass
class Tally:
    """How far a run is.

    Attributes:
        images: how many are meant.
        done: how many of them have a row.
        broken: how many of those rows are errors.
        new: how many rows this run has added.
        others, links: as `images.Found` has them.
        unreadable: of each directory that can't be read a sentence.
    """

    images: int
    done: int
    broken: int
    new: int = 0
    others: int = 0
    links: int = 0
    unreadable: Sequence[str] = ()

    @property
    def complete(self) -> bool:
        """Whether every image has an answer, and every directory was read."""
        return self.done == self.images and not self.broken and not self.unreadable


# Called before the first row, and with each.
Progress = Callable[[Tally, Row | None], None]


def map_folder(
    job: Job,
    out: str | Path,
    *,
    overwrite: bool = False,
    retry_errors: bool = False,
    ray: int | None = None,
    progress: Progress | None = None,
) -> Tally:
    """Ask about every image of a folder that has no row in `out` yet, and add its row.

    The same call continues a run that was killed. Rows stand in the order in which their
    answers ended.

    Args:
        out: a file that ends in `.jsonl` or `.parquet`. The rows of the latter are collected beside
            it, and converted when every image has one.
        overwrite: begin anew what an earlier run made there.
        retry_errors: ask again, once each, about the images whose rows are errors.
        ray: how many workers of a Ray cluster are to ask, in place of this process.

    Raises:
        ImageError: the folder can't be read, or holds no image.
        DestinationError: `out` is somebody else's, was made of something else, is being written by
            another run, or can't be written.
        OptionError, PromptError, BundleError, ConfigError, EncoderError: as `fastvlm_mlx.load` and
            `FastVLM.batch`.
    """
    path = _destination(out)
    if ray is not None and not (isinstance(ray, Integral) and ray >= 1):
        raise OptionError(f"--ray is {ray!r}: expected a number of workers, 1 or more")
    parquet = path.suffix.lower() == PARQUET
    rows_path = path.with_name(f"{path.name}{JSONL}") if parquet else path
    if parquet:
        from fastvlm_mlx.mapping.parquet import check, convert

        check(path, rows_path, overwrite=overwrite)
    made_of = job.made_of()
    own = [str(path), str(rows_path), f"{rows_path}.run"]
    found = images.find(str(job.folder), job.patterns, job.shard, own)
    _check_some(job, found)
    with journal.opened(rows_path, made_of, overwrite=overwrite) as written:
        if retry_errors:
            written.forget(name for name in found.names if written.done.get(name))
        tally = _tally(found, written.done)
        left = [name for name in found.names if name not in written.done]
        if progress is not None:
            progress(tally, None)
        if left:
            with closing(_answers(job, left, ray)) as answers:
                _write_down(job, answers, written, tally, progress)
        written.begin()
        written.sync()
        if parquet:
            convert(rows_path, path, job.options.json_schema)
    return tally


def _answers(job: Job, names: Sequence[str], workers: int | None) -> Generator[Row]:
    if workers is not None:
        from fastvlm_mlx.mapping.on_ray import answers

        yield from answers(job, names, workers)
        return
    yield from job.answers(job.load(), names)


def _write_down(
    job: Job,
    answers: Iterator[Row],
    written: journal.Journal,
    tally: Tally,
    progress: Progress | None,
) -> None:
    for row in answers:
        # A worker that is lost after it has answered is asked again.
        if row.name in written.done:
            continue
        written.write(row)
        tally.done += 1
        tally.new += 1
        tally.broken += row.error is not None
        if tally.new % job.batch_size == 0:
            written.sync()
        if progress is not None:
            progress(tally, row)


def _destination(out: str | Path) -> Path:
    try:
        path = Path(os.path.abspath(Path(out).expanduser()))
        os.fsencode(path)
    # An unknown user, and what no file's name can hold.
    except (RuntimeError, ValueError, OSError) as error:
        raise DestinationError(
            f"{os.fspath(out)!r} can't be written to ({error}): give --out the path of a file"
        ) from error
    if path.suffix.lower() not in (JSONL, PARQUET):
        raise OptionError(f"--out is {path.name}: expected a name that ends in .jsonl or .parquet")
    journal.check_regular(path)
    if not path.parent.is_dir():
        raise DestinationError(f"{path.parent} is no directory: make it first, for --out")
    return path


def _check_some(job: Job, found: Found) -> None:
    if found.names or job.shard.count > 1 or found.unreadable:
        return
    hint = f"{found.others:,} files of other names; --pattern '*' takes all" if found.others else ""
    raise ImageError(
        f"{job.folder} holds no image ({hint or 'no file at all'}): give a folder of images"
    )


def _tally(found: Found, done: dict[str, bool]) -> Tally:
    known = [done[name] for name in found.names if name in done]
    return Tally(
        images=len(found.names),
        done=len(known),
        broken=sum(known),
        others=found.others,
        links=found.links,
        unreadable=found.unreadable,
    )
