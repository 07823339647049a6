"""Damage that several kinds of input share: to bytes, to JSON, to the header of safetensors."""

from __future__ import annotations

import json
import os
import random
import string
import struct
from pathlib import Path
from typing import Any

# A name that is shown as it is, or as the word alone where it is taken for rich's markup.
MARKED = "mark7"
MARKUP = f"[red]{MARKED}[/red]"
# Stands in a document while it is edited; what takes its place need not be JSON.
_PLACE = '"@@place@@"'


def damaged(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Bytes as a bad disk, a broken download or a fuzzer would leave them."""
    buffer = bytearray(data)
    size = max(1, len(buffer))
    at, length = rng.randrange(size), rng.randint(1, max(1, size // 8))
    how = rng.choice(
        ("flip", "flip head", "bytes", "truncate", "extend", "splice", "zero", "ones", "remove")
    )
    if how.startswith("flip") and buffer:
        reach = min(len(buffer), 200) if how == "flip head" else len(buffer)
        for _ in range(rng.randint(1, 8)):
            buffer[rng.randrange(reach)] ^= 1 << rng.randrange(8)
    elif how == "bytes":
        buffer[at : at + 4] = rng.choice(
            (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\x80", b"\x01\0\0\0")
        )
    elif how == "truncate":
        del buffer[rng.choice((at, 0, 1, max(0, size - 1), size // 2)) :]
    elif how == "extend":
        buffer += rng.randbytes(rng.choice((1, 8, 1000)))
    elif how == "splice":
        buffer[at:at] = buffer[rng.randrange(size) :][:length]
    elif how == "zero":
        buffer[at : at + length] = bytes(len(buffer[at : at + length]))
    elif how == "ones":
        buffer[at : at + length] = b"\xff" * len(buffer[at : at + length])
    elif how == "remove":
        del buffer[at : at + length]
    return bytes(buffer), f"{how} at {at} of {len(data)}"


def text(rng: random.Random) -> str:
    """Names and words that somebody prints, opens or compares without thinking."""
    return rng.choice(
        (
            "",
            " ",
            ".",
            "..",
            "../../../etc/passwd",
            "/etc/passwd",
            "a\0b",
            "two\nlines",
            "\x1b[31mred\x1b[0m\x07",
            "\x9b31m",
            "right\u202eleft",
            "\u2028",
            MARKUP,
            "[/]",
            "[link=file:///etc/passwd]x[/link]",
            "x" * 10_000,
            "é" * 300,
            "\ud800",
            "%s%n{0}{}",
            "None",
            "<|im_end|>",
            "<image>",
            "CON",
            "a/b",
            "~root",
            "😀",
            "NaN",
            "".join(rng.choices(string.printable, k=12)),
        )
    )


def fragment(rng: random.Random) -> str:
    """A JSON value that nobody expects, as text; some are no JSON at all."""
    how = rng.randrange(10)
    if how < 3:
        return rng.choice(
            ("null", "true", "false", "0", "-1", "1", "0.5", "-0.0", "1e9", "1e308", "1e999")
        )
    if how < 4:
        return rng.choice(("NaN", "Infinity", "-Infinity", "1" * 5000, "-" + "9" * 400, "1e-400"))
    if how < 6:
        whole = (1_000_000_000, 2**31, 2**32, 2**63, 2**64, 10**30, -(2**31), 65536, 3, 7, 100_000)
        return str(rng.choice(whole))
    if how < 8:
        return json.dumps(text(rng))
    if how < 9:
        return rng.choice(
            (
                *("[]", "{}", "[[[]]]", "[null]", "[1e9]", "[[1,[2,[3]]]]", '{"a": {"b": []}}'),
                *('{"": null}', "[0, -1]", "[1000000000, 1000000000]", "[" + "1," * 50_000 + "1]"),
            )
        )
    depth = rng.choice((100, 1000, 100_000))
    return rng.choice(("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth))


def _places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    inner = enumerate(data) if isinstance(data, list) else ()
    if isinstance(data, dict):
        inner = data.items()  # type: ignore[assignment]
    for key, value in inner:
        found += _places(value, (*path, key))
    return found


def edited_json(rng: random.Random, source: str, keys: tuple[str, ...] = ()) -> tuple[str, str]:
    """A document with one to three places changed, or broken as a whole.

    Args:
        keys: added or replaced at the top now and then: what readers look for.
    """
    if rng.random() < 0.12:
        return rng.choice(
            (
                (fragment(rng), "another document"),
                ("", "empty"),
                ("\ufeff" + source, "byte order mark"),
                (source[: rng.randrange(len(source) + 1)], "truncated"),
                (source + source, "twice"),
                (source.rstrip().rstrip("}") + ', "x": NaN}', "NaN"),
                (" " * 3_000_000 + source, "a lot of space"),
            )
        )
    notes = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        try:
            data = json.loads(source)
        except (ValueError, RecursionError):
            break
        places = _places(data)
        if not places or not isinstance(data, dict):
            break
        path = (rng.choice(keys),) if keys and rng.random() < 0.3 else rng.choice(places)
        source, note = _edit(rng, data, path)
        notes.append(note)
    return source, "; ".join(notes)


def _edit(rng: random.Random, data: Any, path: tuple[Any, ...]) -> tuple[str, str]:
    parent = data
    for key in path[:-1]:
        parent = parent[key]
    last, where = path[-1], "/".join(map(str, path))[:80]
    how = rng.choice(("replace", "replace", "replace", "delete", "duplicate", "rename", "add"))
    if not isinstance(parent, dict) or (last not in parent):
        how = "replace"
    if how == "delete":
        del parent[last]
        return _dump(data), f"{where} deleted"
    if how == "rename":
        parent[text(rng)] = parent.pop(last)
        return _dump(data), f"{where} renamed"
    value = fragment(rng)
    if how == "duplicate":
        kept = json.dumps(parent[last])
        parent[last] = "@@place@@"
        value = f"{kept}, {json.dumps(last)}: {value}"
    elif how == "add":
        parent[text(rng)] = "@@place@@"
    else:
        parent[last] = "@@place@@"
    return _dump(data).replace(_PLACE, value, 1), f"{where} {how} {value[:60]}"


def _dump(data: Any) -> str:
    return json.dumps(data, ensure_ascii=True)


def edit_json(rng: random.Random, file: Path, keys: tuple[str, ...] = ()) -> str:
    # It may have been damaged before.
    source = file.read_bytes().decode("utf-8", "replace")
    changed, note = edited_json(rng, source, keys)
    file.write_bytes(changed.encode("utf-8", "surrogatepass"))
    return note


def damage(rng: random.Random, file: Path) -> str:
    changed, note = damaged(rng, file.read_bytes())
    file.write_bytes(changed)
    return note


def split_safetensors(file: Path) -> tuple[dict[str, Any], bytes]:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_safetensors(file: Path, header: str | bytes, body: bytes, length: int = -1) -> None:
    raw = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    raw += b" " * (-len(raw) % 8)
    file.write_bytes(struct.pack("<Q", len(raw) if length < 0 else length) + raw + body)


_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F4", "X", "", "C64")


def edit_safetensors(rng: random.Random, file: Path) -> str:
    """A header that lies: about places, shapes, types, names, lengths."""
    header, body = split_safetensors(file)
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    entry = header[name]
    how = rng.choice(
        (
            *("offsets", "shape", "dtype", "rename", "delete", "extra", "duplicate", "length"),
            *("text", "entry", "metadata", "numbers", "not utf-8", "fragment", "swap", "scalar"),
        )
    )
    length = -1
    raw: str | bytes
    if how == "offsets":
        start, end = entry["data_offsets"]
        entry["data_offsets"] = rng.choice(
            (
                [start, end + 8],
                [start + 8, end],
                [end, start],
                [start, len(body) + 1000],
                [0, 2**63],
                [-8, end],
                [start, start],
                [start],
                [float(start), end],
                [2**64 - 8, 2**64],
                header[rng.choice(names)]["data_offsets"],
                None,
            )
        )
    elif how == "shape":
        shape = entry["shape"]
        entry["shape"] = rng.choice(
            (
                [],
                shape[::-1],
                [*shape, 1],
                [1, *shape],
                [0],
                [-1, *shape[1:]],
                [2**32, 2**32],
                [2**62],
                [1] * 100,
                shape[:-1],
                [float(n) for n in shape],
                "3",
                None,
                [[3]],
                [True],
                [10**30],
            )
        )
    elif how == "dtype":
        entry["dtype"] = rng.choice((*_DTYPES, None, 3, text(rng)))
    elif how == "rename":
        header[text(rng)] = header.pop(name)
    elif how == "delete":
        del header[name]
    elif how == "extra":
        size = len(body)
        body += bytes(8)
        header[rng.choice((text(rng), name + ".x", "model.layers.99.mlp.up_proj.weight"))] = {
            "dtype": "F32",
            "shape": [2],
            "data_offsets": [size, size + 8],
        }
    elif how == "entry":
        header[name] = "@@place@@"
    elif how == "metadata":
        header["__metadata__"] = rng.choice(
            ([], None, {"format": 3}, {"a": text(rng)}, {"x": "y" * 100_000}, {"a": {"b": "c"}})
        )
    elif how == "swap":
        other = rng.choice(names)
        header[name], header[other] = header[other], header[name]
    elif how == "scalar":
        start = entry["data_offsets"][0]
        header[name] = {"dtype": "F32", "shape": [], "data_offsets": [start, start + 4]}
    raw = _dump(header)
    if how == "entry":
        raw = raw.replace(_PLACE, fragment(rng), 1)
    elif how == "duplicate":
        raw = raw[:-1] + f", {json.dumps(name)}: {json.dumps(header[rng.choice(names)])}" + "}"
    elif how == "length":
        length = rng.choice(
            (0, 1, 7, 10**8 + 1, 2**31, 2**63, 2**64 - 1, len(raw) + 8, len(raw) // 2)
        )
    elif how == "text":
        changed, _ = damaged(rng, raw.encode())
        raw = changed
    elif how == "not utf-8":
        raw = raw.encode().replace(name.encode(), name.encode()[:-1] + b"\xff", 1)
    elif how == "fragment":
        raw = fragment(rng)
    elif how == "numbers":
        start, end = entry["data_offsets"]
        raw = raw.replace(f"[{start}, {end}]", f"[{start}, {'9' * rng.choice((20, 5000))}]", 1)
    write_safetensors(file, raw, body, length)
    return f"{how} of {name}"


def link(rng: random.Random, file: Path, outside: Path, like: Path | None = None) -> str:
    """Put something else in a file's place: links that lead out, devices, pipes, loops.

    Args:
        like: a whole file of the same kind, outside; a link to it would work if it were followed.
    """
    if file.is_dir() and not file.is_symlink():
        import shutil

        shutil.rmtree(file)
    else:
        file.unlink(missing_ok=True)
    how = rng.choice(
        ("secret", "like", "like", "zero", "random", "pipe", "loop", "dangling", "dir")
    )
    if how == "like" and like is not None and like.exists():
        file.symlink_to(like)
    elif how == "zero":
        file.symlink_to("/dev/zero")
    elif how == "random":
        file.symlink_to("/dev/urandom")
    elif how == "pipe":
        os.mkfifo(file)
    elif how == "loop":
        file.symlink_to(file.name)
    elif how == "dangling":
        file.symlink_to(outside / "nothing")
    elif how == "dir":
        file.symlink_to(outside)
    else:
        how = "secret"
        file.symlink_to(outside / "secret.txt")
    return how
