"""The same asking by the workers of a Ray cluster, each with a model of its own.

The names of the images go out in batches, rows come back, and the process that began it writes them
down. What a worker that is lost was asked is asked of another.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

from fastvlm_mlx.errors import FastVLMError
from fastvlm_mlx.extras import needs_extra
from fastvlm_mlx.mapping import rows
from fastvlm_mlx.mapping.job import Job
from fastvlm_mlx.mapping.rows import Row


class Asking:
    """A worker: batches of names in, batches of rows out, both as bytes."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._model = job.load()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        names = [os.fsdecode(bytes(name)) for name in batch["name"]]
        return {"row": [rows.line(row) for row in self._job.answers(self._model, names)]}


def answers(job: Job, names: Sequence[str], workers: int) -> Iterator[Row]:
    """A row for each name as it comes.

    The cluster is the one that `RAY_ADDRESS` names; without that, one is started on this machine.
    Folder and bundle have the same paths on every machine.

    Raises:
        OptionError: Ray is not installed.
        FastVLMError: what a worker has raised; or Ray has failed.
    """
    with needs_extra():
        import ray
        import ray.data

    began = not ray.is_initialized()
    if began:
        # Ray tells its makers of every cluster that it starts, unless this is 0.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(log_to_driver=False, logging_level="ERROR")
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        # A batch in a block: rows come back as soon as a batch has its answers.
        blocks = -(-len(names) // job.batch_size)
        asked = ray.data.from_items(
            [{"name": os.fsencode(name)} for name in names], override_num_blocks=blocks
        )
        answered = asked.map_batches(
            Asking,
            fn_constructor_args=(job,),
            batch_size=job.batch_size,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=1,
        )
        for batch in answered.iter_batches(batch_size=None, prefetch_batches=0):
            for line in batch["row"]:
                yield rows.read(bytes(line))
    except ray.exceptions.RayError as error:
        raise _told(error) from error
    finally:
        if began:
            ray.shutdown()


def _told(error: BaseException) -> FastVLMError:
    """What a worker has raised on purpose, or a sentence on what else went wrong."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, FastVLMError):
            return cause
        cause = getattr(cause, "cause", None) or cause.__cause__
    return FastVLMError(
        f"Ray could not go on ({str(error).strip().splitlines()[-1]}): check the cluster, and give "
        "the same command again, which goes on"
    )
