"""The weights of an `.mlpackage`: whether every blob is there, and what a blob holds."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastvlm_mlx.bundle.files import inside, is_file
from fastvlm_mlx.errors import EncoderError

# By the names of MIL.proto's `DataType`, in lower case.
NUMPY_TYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "bool": np.bool_,
        "float16": np.float16,
        "float32": np.float32,
        "int8": np.int8,
        "int16": np.int16,
        "int32": np.int32,
        "int64": np.int64,
        "uint8": np.uint8,
        "uint16": np.uint16,
        "uint32": np.uint32,
        # Below a byte, unpacked.
        "int4": np.int8,
        "uint1": np.uint8,
        "uint2": np.uint8,
        "uint3": np.uint8,
        "uint4": np.uint8,
        "uint6": np.uint8,
    }.items()
}
PACKED_BITS = {"int4": 4, "uint1": 1, "uint2": 2, "uint3": 3, "uint4": 4, "uint6": 6}
# MILBlob's header of one blob: sentinel, data type, bytes, offset of the data.
_BLOB_HEADER = struct.Struct("<IIQQ")
_BLOB_SENTINEL = 0xDEADBEEF
# MILBlob's BlobDataType.hpp, by the names of MIL.proto's types.
_BLOB_TYPES = {
    "float16": 1,
    "float32": 2,
    "uint8": 3,
    "int8": 4,
    "int16": 6,
    "uint16": 7,
    "int4": 8,
    "uint1": 9,
    "uint2": 10,
    "uint4": 11,
    "uint3": 12,
    "uint6": 13,
    "int32": 14,
    "uint32": 15,
}


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
        path = blob_path(package, directory, file_name)
        size = path.stat().st_size
        with _opened(path) as file:
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


def blob_path(package: Path, directory: Path, file_name: str) -> Path:
    """The file of weights that a specification in `directory` calls `file_name`.

    Raises:
        EncoderError: it is missing, or outside of the package.
    """
    path = directory / file_name.removeprefix("@model_path/")
    if not is_file(path):
        raise EncoderError(
            f"{path} is missing: expected the weights of the encoder package, export it again"
        )
    return inside(package, path, EncoderError)


def read_blob(path: Path, offset: int, dtype: str, count: int) -> np.ndarray:
    """The `count` elements of a blob, flat.

    Raises:
        ValueError: the blob at `offset` holds something else.
        OSError: the file can't be read.
    """
    with _opened(path) as file:
        file.seek(offset)
        header = file.read(_BLOB_HEADER.size)
        expected = (_BLOB_SENTINEL, _BLOB_TYPES[dtype], stored_bytes(dtype, count))
        # It may be shorter than when it was checked.
        *found, start = _BLOB_HEADER.unpack(header) if len(header) == _BLOB_HEADER.size else (0, 0)
        if tuple(found) != expected:
            raise ValueError(f"{path.name} holds no {count:,} elements of {dtype} at {offset}")
        file.seek(start)
        return unpack(file.read(expected[2]), dtype, count)


def _opened(path: Path) -> BinaryIO:
    """A file that `inside` has looked at; were it a link or a pipe by now, nobody waits for it."""
    return open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb")


def _values(operation: Any) -> Iterator[Any]:
    """Every value an operation holds: a const's under attributes, a constexpr's under inputs."""
    yield from operation.attributes.values()
    for argument in operation.inputs.values():
        for binding in argument.arguments:
            if binding.WhichOneof("binding") == "value":
                yield binding.value


def bits(dtype: str) -> int:
    """The bits that an element takes where it is stored."""
    return PACKED_BITS.get(dtype) or 8 * NUMPY_TYPES[dtype].itemsize


def stored_bytes(dtype: str, count: int) -> int:
    """The bytes that `count` elements take where they are stored, the last one filled up."""
    return -(-count * bits(dtype) // 8)


def unpack(data: bytes, dtype: str, count: int) -> np.ndarray:
    """The `count` elements that `data` holds, as numpy has them, flat.

    Raises:
        ValueError: `data` has another length.
    """
    if len(data) != stored_bytes(dtype, count):
        raise ValueError(f"{len(data)} bytes hold no {count} elements of {dtype}")
    if dtype not in PACKED_BITS:
        return np.frombuffer(data, NUMPY_TYPES[dtype])
    values = unpack_bits(np.frombuffer(data, np.uint8), PACKED_BITS[dtype], count)
    if not dtype.startswith("u"):
        sign = 1 << (PACKED_BITS[dtype] - 1)
        return (values ^ sign).astype(np.int8) - np.int8(sign)
    return values


def unpack_bits(packed: np.ndarray, width: int, count: int) -> np.ndarray:
    """The first `count` numbers of `width` bits, lowest bits first: uint8 [n] → uint8 [count]."""
    digits = np.unpackbits(packed, bitorder="little")[: width * count]
    return np.packbits(digits.reshape(count, width), axis=1, bitorder="little")[:, 0]
