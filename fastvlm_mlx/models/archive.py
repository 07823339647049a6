"""Apple's archives: downloaded, resumed where they were cut, checked and unpacked."""

from __future__ import annotations

import errno
import json
import re
import shutil
import stat
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath

from fastvlm_mlx.bundle.files import MAX_FILES, MB, is_litter, shown_bytes
from fastvlm_mlx.bundle.schema import read_json
from fastvlm_mlx.errors import CheckpointError, DestinationError, FastVLMError
from fastvlm_mlx.machine import tell
from fastvlm_mlx.models import cache
from fastvlm_mlx.models.names import ARCHIVES, Published

# A 7B checkpoint has 16 GB.
MAX_BYTES = 100_000 * MB
_FILE, _FACTS, _UNPACKED = "archive.zip", "archive.json", "unpacked"
_BLOCK = 1 << 20
# No more digits than a size can have: Python refuses to read thousands.
_RANGE = re.compile(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18})")
_LENGTH = re.compile(r"[0-9]{1,18}")
_AGAIN = "run the same command again, it resumes"
_ANEW = "run the same command again, it downloads it anew"
# What the system says of a name that can't be a file's, or is there already.
_OF_NAMES = (
    errno.EEXIST,
    errno.EILSEQ,
    errno.EINVAL,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
)


def entry(model: Published) -> cache.Entry:
    """The model of an archive, in the cache, downloaded if it is not there.

    An archive is known by its address: Apple does not publish another under the same.

    Raises:
        CheckpointError: it can't be downloaded, or is damaged.
        DestinationError: the disk is full, or the cache can't be written.
    """
    key = cache.Key(model.name, {"archive": model.archive}, str(model.archive))
    planned = cache.Entry(model.name, model.what, model.origin, "", 0, 0.0)
    if found := cache.find(key):
        return found
    url = f"{ARCHIVES}/{model.archive}.zip"
    waiting = f"another process downloads {model.name}; waiting for it, Ctrl-C ends that"

    def make(target: Path, partial: Path) -> None:
        tell(f"downloading {url}")
        partial.mkdir(mode=0o700, exist_ok=True)
        try:
            _download(url, partial)
            _unpack(url, partial, target)
        finally:
            shutil.rmtree(partial / _UNPACKED, ignore_errors=True)
            if _known(partial) is None:
                # Nothing can be added to it, and it may fill the disk.
                _forget(partial)

    made = cache.obtain(key, planned, make, waiting=waiting)
    cache.announce(made)
    return made


def _download(url: str, partial: Path) -> None:
    """Fetch an archive, from where an earlier download of the same one was cut."""
    import httpx2

    file, known = partial / _FILE, _known(partial)
    have = file.stat().st_size if file.is_file() and known else 0
    if known and have == known[1]:
        return
    if known and have > known[1]:
        have = 0
    # Bytes are counted as they are sent.
    headers = {"Accept-Encoding": "identity"}
    if have and known:
        headers |= {"Range": f"bytes={have}-", "If-Range": known[0]}
    try:
        with httpx2.stream(
            "GET", url, headers=headers, follow_redirects=True, timeout=30
        ) as response:
            _check_way(url, [*response.history, response])
            if response.status_code == 416:
                # It has become shorter than what is there.
                raise _changed(url, partial)
            if response.status_code not in (200, 206):
                raise CheckpointError(
                    f"{url} can't be downloaded (HTTP {response.status_code}): try again later, or "
                    "take the model from the hub"
                )
            at, total = _place_and_size(response.status_code, response.headers)
            if at not in (0, have):
                raise CheckpointError(
                    f"{url} was answered with another part than asked for: {_AGAIN}"
                )
            etag = response.headers.get("ETag", "")
            if at and known and (total != known[1] or etag not in ("", known[0])):
                raise _changed(url, partial)
            if total is not None and total > MAX_BYTES:
                raise CheckpointError(
                    f"{url} has {shown_bytes(total)}: expected an archive of a model, and less"
                )
            if total is not None:
                _check_room(total - at)
            if not at:
                _forget(partial)
            if etag and total is not None and not etag.startswith("W/"):
                facts = {"etag": etag, "bytes": total}
                cache.write_whole(partial / _FACTS, json.dumps(facts))
            with file.open("ab") as stream:
                for block in response.iter_raw(_BLOCK):
                    stream.write(block)
                    at += len(block)
                    if at > MAX_BYTES:
                        raise CheckpointError(f"{url} does not end: expected an archive of a model")
    # The latter where a proxy is set that needs a package which is not installed.
    except (httpx2.HTTPError, ImportError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"{url} can't be downloaded ({reason}): go online, then {_AGAIN}"
        ) from error
    if total is not None and at != total:
        raise CheckpointError(
            f"{url} broke off after {shown_bytes(at)} of {shown_bytes(total)}: {_AGAIN}"
        )


def _place_and_size(status: int, headers: object) -> tuple[int, int | None]:
    """Where the answer begins in the file, and how long that is as a whole."""
    get = headers.get  # type: ignore[attr-defined]
    if status == 206:
        match = _RANGE.fullmatch(get("Content-Range", ""))
        return (int(match[1]), int(match[2])) if match else (-1, None)
    length = get("Content-Length", "")
    return 0, int(length) if _LENGTH.fullmatch(length) else None


def _check_way(url: str, responses: Sequence[object]) -> None:
    """Nobody but the archive's server vouches for what it holds, so that no step of the way to it
    may be open to others."""
    schemes = {response.url.scheme for response in responses}  # type: ignore[attr-defined]
    if url.startswith("https:") and schemes != {"https"}:
        raise CheckpointError(
            f"{url} was redirected to an address without https, where anybody on the way can "
            "change it: try again in another network, or take the model from the hub"
        )


def _changed(url: str, partial: Path) -> CheckpointError:
    _forget(partial)
    return CheckpointError(f"{url} has changed since a part of it was downloaded: {_ANEW}")


def _forget(partial: Path) -> None:
    """Remove what was downloaded. First what describes it, which is never to describe another."""
    (partial / _FACTS).unlink(missing_ok=True)
    (partial / _FILE).unlink(missing_ok=True)


def _known(partial: Path) -> tuple[str, int] | None:
    """The ETag and the size of the archive that a part is there of."""
    with suppress(FastVLMError):
        facts = read_json(partial, partial / _FACTS, CheckpointError, remedy="")
        if isinstance(facts.get("etag"), str) and isinstance(facts.get("bytes"), int):
            return facts["etag"], facts["bytes"]
    return None


def _unpack(url: str, partial: Path, target: Path) -> None:
    """Unpack an archive of one directory, which becomes `target`. Every file's CRC is compared.

    Raises:
        CheckpointError: it is damaged, or holds something else. It is downloaded anew then.
    """
    unpacked = partial / _UNPACKED
    shutil.rmtree(unpacked, ignore_errors=True)
    try:
        with zipfile.ZipFile(partial / _FILE) as archive:
            members = [m for m in archive.infolist() if not _is_left_out(m)]
            _check_members(url, members)
            _check_room(sum(member.file_size for member in members))
            for member in members:
                place = unpacked.joinpath(*PurePosixPath(member.filename).parts)
                place.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, place.open("xb") as stream:
                    shutil.copyfileobj(source, stream, _BLOCK)
                    if stream.tell() != member.file_size:
                        raise zipfile.BadZipFile(f"{member.filename} has another size")
        _top(url, unpacked).rename(target)
    except CheckpointError:
        _forget(partial)
        raise
    # By where the damage is, zipfile raises errors of every kind, its decoders' own among them;
    # that of bzip2 is an OSError without a number.
    except Exception as error:
        if isinstance(error, MemoryError) or (
            isinstance(error, OSError) and error.errno not in (None, *_OF_NAMES)
        ):
            raise
        _forget(partial)
        raise CheckpointError(f"{url} arrived damaged ({error}): {_ANEW}") from error


def _is_left_out(member: zipfile.ZipInfo) -> bool:
    return member.is_dir() or any(is_litter(part) for part in member.filename.split("/"))


def _check_members(url: str, members: list[zipfile.ZipInfo]) -> None:
    for member in members:
        parts = PurePosixPath(member.filename).parts
        mode = member.external_attr >> 16
        if (
            member.filename.startswith("/")
            or "\\" in member.filename
            or any(part in ("..", "/") for part in parts)
            or stat.S_IFMT(mode) not in (0, stat.S_IFREG)
        ):
            raise CheckpointError(
                f"{url} holds {member.filename}, which is no file below one directory: expected "
                "an archive of a model"
            )
    if len(members) > MAX_FILES or sum(member.file_size for member in members) > MAX_BYTES:
        raise CheckpointError(f"{url} holds too much to be one model: expected an archive of one")


def _top(url: str, unpacked: Path) -> Path:
    """The directory of the model: the one with config.json, at the top or right below it."""
    found = [p for p in (unpacked, *sorted(unpacked.glob("*"))) if (p / "config.json").is_file()]
    if len(found) != 1:
        raise CheckpointError(
            f"{url} holds {len(found)} directories with a config.json: expected one, a model's"
        )
    return found[0]


def _check_room(needed: int) -> None:
    root = cache.directory()
    free = shutil.disk_usage(root).free
    if free < needed:
        raise DestinationError(
            f"the disk of the cache {root} has {shown_bytes(free)} left, and {shown_bytes(needed)} "
            f"are needed: make room with `fastvlm models --remove NAME`, or set {cache.VARIABLE} "
            "to a directory on another disk"
        )
