"""The weights of an `.mlpackage`: whether every blob is there that the program refers to."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastvlm_mlx.bundle.files import inside, is_file
from fastvlm_mlx.errors import EncoderError

# MILBlob's header of one blob: sentinel, data type, bytes, offset of the data.
_BLOB_HEADER = struct.Struct("<IIQQ")
_BLOB_SENTINEL = 0xDEADBEEF


def check_weights(spec: Any, package: Path, directory: Path) -> None:
    """Compare the header of every blob that a specification refers to with its file.

    Args:
        directory: of the specification in `package`, which its file names are relative to.

    Raises:
        EncoderError: a file is missing, outside of the package or too short, or has something else
            in the blob's place.
    """
    blobs: dict[str, list[tuple[str, int]]] = {}
    for function in spec.mlProgram.functions.values():
        for block in function.block_specializations.values():
            for op in block.operations:
                if not op.outputs:
                    raise EncoderError(
                        f"{package} has an operation {op.type!r} without a result: expected an "
                        "encoder's, export it again"
                    )
                for value in _values(op):
                    if value.WhichOneof("value") == "blobFileValue":
                        blob = value.blobFileValue
                        blobs.setdefault(blob.fileName, []).append(
                            (op.outputs[0].name, blob.offset)
                        )
    for file_name, entries in blobs.items():
        path = directory / file_name.removeprefix("@model_path/")
        if not is_file(path):
            raise EncoderError(
                f"{path} is missing: expected the weights of the encoder package, export it again"
            )
        path = inside(package, path, EncoderError)
        size = path.stat().st_size
        with path.open("rb") as file:
            for name, offset in entries:
                # An offset has 64 bits, of which no file takes the last.
                file.seek(min(offset, size))
                header = file.read(_BLOB_HEADER.size)
                if len(header) == _BLOB_HEADER.size:
                    sentinel, _, length, start = _BLOB_HEADER.unpack(header)
                    if sentinel == _BLOB_SENTINEL and start + length <= size:
                        continue
                raise EncoderError(
                    f"{path} has {size} bytes and no room for {name} at {offset}: expected the "
                    "whole file of weights, export it again"
                )


def _values(operation: Any) -> Iterator[Any]:
    """Every value an operation holds: a const's under attributes, a constexpr's under inputs."""
    yield from operation.attributes.values()
    for argument in operation.inputs.values():
        for binding in argument.arguments:
            if binding.WhichOneof("binding") == "value":
                yield binding.value
