"""The same asking by the workers of a Ray cluster, each with a model of its own.

The names of the images go out in batches, rows come back, and the process that began it writes them
down. What a worker that is lost was asked is asked of another.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

from fastvlm_mlx.errors import FastVLMError
from fastvlm_mlx.extras import needs_extra
from fastvlm_mlx.fastvlm import FastVLM
from fastvlm_mlx.mapping import rows
from fastvlm_mlx.mapping.job import Job
from fastvlm_mlx.mapping.rows import Row


class Asking:
    """A worker: batches of names in, batches of rows out, both as bytes.

    What is wrong with the job comes out as a row would. Raised, Ray would take it for a fault of
    its own, and tell it in many lines.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._model: FastVLM | FastVLMError
        try:
            self._model = job.load()
        except FastVLMError as error:
            self._model = error

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        if isinstance(self._model, FastVLMError):
            return _failed(self._model)
        names = [os.fsdecode(bytes(name)) for name in batch["name"]]
        try:
            lines = [rows.line(row) for row in self._job.answers(self._model, names)]
        except FastVLMError as error:
            return _failed(error)
        return {"row": lines, "error": [b""] * len(lines)}


def _failed(error: FastVLMError) -> dict[str, list[bytes]]:
    return {"row": [b""], "error": [pickle.dumps(error)]}


def answers(job: Job, names: Sequence[str], workers: int) -> Iterator[Row]:
    """A row for each name as it comes.

    The cluster is the one that `RAY_ADDRESS` names; without that, one is started on this machine.
    Folder and bundle have the same paths on every machine.

    Raises:
        OptionError: Ray is not installed.
        FastVLMError: as `Job.load` and `Job.answers`; or Ray has failed.
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
            for line, failed in zip(batch["row"], batch["error"], strict=True):
                if failed:
                    # From a worker of ours.
                    raise pickle.loads(failed)
                yield rows.read(bytes(line))
    except ray.exceptions.RayError as error:
        raise FastVLMError(
            f"Ray can't go on ({type(error).__name__}): check the cluster, and give the same "
            "command again, which goes on"
        ) from error
    finally:
        if began:
            ray.shutdown()
