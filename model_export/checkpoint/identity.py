"""What tells one checkpoint from another: its commit on the hub, or the hashes of its files.

Hashing a 7B checkpoint takes half a minute. Hashes are kept in the user's cache, each as long as
its file has the same stamp.
"""

from __future__ import annotations

import hashlib
import os
import time
from contextlib import suppress
from dataclasses import astuple
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from fastvlm_mlx.bundle.files import Stamp, inside, left_behind, sha256
from fastvlm_mlx.bundle.schema import read_json, to_json
from fastvlm_mlx.errors import CheckpointError, FastVLMError
from fastvlm_mlx.models import cache
from model_export.checkpoint.hub import PICKLED_WEIGHTS, SMALL_FILES, WEIGHTS
from model_export.checkpoint.sources import Source

# A file that changed later than this before it was hashed may change again within the clock's step.
_SETTLED_NS = 2_000_000_000


def identity(source: Source) -> dict[str, Any]:
    """What decides what an export makes of a checkpoint, its base's included.

    Raises:
        CheckpointError: a file can't be read, or changes meanwhile.
        DestinationError: the cache can't be used.
    """
    found: dict[str, Any]
    if source.hub_id is not None:
        found = {"hub": source.hub_id}
    else:
        directory = source.directories[0]
        weights = {file for tensor in source.tensors.values() for file in tensor.files}
        names = {file.name for file in weights if file.parent == directory}
        found = {"kind": source.kind, "files": _hashes(directory, names)}
    if source.base is not None:
        found["base"] = identity(source.base)
    return found


def _hashes(directory: Path, weights: set[str]) -> dict[str, str]:
    patterns = (*SMALL_FILES, *WEIGHTS, *PICKLED_WEIGHTS)
    names = weights | {
        entry.name
        for entry in os.scandir(directory)
        if any(fnmatch(entry.name, p) for p in patterns)
        and not left_behind(entry.name)
        and entry.is_file()
    }
    place = hashlib.sha256(os.fsencode(directory.resolve())).hexdigest()[:32]
    memory = cache.private() / cache.HASHES / f"{place}.json"
    known = _known(memory)
    found, kept = {}, {}
    for name in sorted(names):
        file = inside(directory, directory / name, CheckpointError)
        try:
            stamp = Stamp.of(file)
            stamped = list(astuple(stamp))
            entry = known.get(name)
            if isinstance(entry, list) and entry[:-1] == stamped:
                found[name] = str(entry[-1])
            else:
                found[name] = sha256(file)
            now = Stamp.of(file)
        except OSError as error:
            raise CheckpointError(
                f"{file} can't be read ({error.strerror}): check its permissions"
            ) from error
        if now != stamp:
            raise CheckpointError(f"{file} changed while it was read: run the same command again")
        if time.time_ns() - max(stamp.modified_ns, stamp.changed_ns) > _SETTLED_NS:
            kept[name] = [*stamped, found[name]]
    if kept != known:
        # Without it everything is hashed again.
        with suppress(OSError):
            memory.parent.mkdir(mode=0o700, exist_ok=True)
            cache.write_whole(memory, to_json(kept))
    return found


def _known(memory: Path) -> dict[str, Any]:
    with suppress(FastVLMError):
        return read_json(memory.parent, memory, CheckpointError, remedy="")
    return {}
