"""Reading a program and its weights, against coremltools' own reader and writer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from programs import build, ct, mb, normal, run

from fastvlm_mlx.errors import EncoderError
from fastvlm_mlx.vision.package import model_path, operations, quiet_coremltools, read_spec
from fastvlm_mlx.vision.program import mlprogram
from fastvlm_mlx.vision.program.blobs import PACKED_BITS, read_blob
from fastvlm_mlx.vision.program.constexpr import DECOMPRESS
from fastvlm_mlx.vision.program.mlprogram import MLProgram

with quiet_coremltools():
    from coremltools.converters.mil.mil.ops.defs.iOS16 import constexpr_ops as ios16
    from coremltools.converters.mil.mil.ops.defs.iOS18 import compression as ios18
    from coremltools.libmilstoragepython import _BlobStorageWriter
    from coremltools.optimize._utils import pack_elements_into_bits

RNG = np.random.default_rng(5)
INT8 = RNG.integers(-128, 128, (6, 4, 2), np.int8)
INT4 = RNG.integers(-8, 8, (6, 4, 2), np.int8)
HALF = RNG.standard_normal((6, 1, 1)).astype(np.float16)
BLOCKS = RNG.standard_normal((6, 2, 1)).astype(np.float16)
MASK = RNG.integers(0, 2, (6, 4, 2), np.uint8)
NONZERO = RNG.standard_normal(int(MASK.sum())).astype(np.float16)
CODES = RNG.integers(0, 4, (6, 4, 2), np.uint8)
LUT16 = RNG.standard_normal(64).astype(np.float16)
SHAPE = np.array([6, 4, 2], np.uint32)
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "affine_dequantize, along an axis": (
        ios16.constexpr_affine_dequantize,
        {
            "quantized_data": INT8,
            "zero_point": RNG.integers(-5, 5, 4, np.int8),
            "scale": RNG.standard_normal(4).astype(np.float16),
            "axis": np.int32(-2),
        },
    ),
    "affine_dequantize, one scale": (
        ios16.constexpr_affine_dequantize,
        {
            "quantized_data": INT8.view(np.uint8),
            "zero_point": np.uint8(3),
            "scale": np.float16(0.37),
            "axis": np.int32(0),
        },
    ),
    "blockwise_shift_scale": (
        ios18.constexpr_blockwise_shift_scale,
        {"data": INT4, "scale": BLOCKS, "offset": RNG.integers(-8, 8, (6, 2, 1), np.int8)},
    ),
    "blockwise_shift_scale, no offset": (
        ios18.constexpr_blockwise_shift_scale,
        {"data": INT8, "scale": HALF, "offset": None},
    ),
    "lut_to_dense, packed": (
        ios16.constexpr_lut_to_dense,
        {
            "indices": pack_elements_into_bits(RNG.integers(0, 64, 48, np.uint8), 6),
            "lut": LUT16,
            "shape": SHAPE,
        },
    ),
    "lut_to_dense, one table": (
        ios18.constexpr_lut_to_dense,
        {"indices": CODES, "lut": LUT16[:4].reshape(1, 1, 1, 4, 1), "vector_axis": None},
    ),
    "lut_to_dense, tables of blocks": (
        ios18.constexpr_lut_to_dense,
        {"indices": CODES, "lut": LUT16[:24].reshape(3, 2, 1, 4, 1), "vector_axis": None},
    ),
    "lut_to_dense, vectors": (
        ios18.constexpr_lut_to_dense,
        {
            "indices": CODES,
            "lut": LUT16[:24].reshape(2, 1, 1, 4, 3),
            "vector_axis": np.int32(1),
        },
    ),
    "sparse_to_dense": (ios18.constexpr_sparse_to_dense, {"nonzero_data": NONZERO, "mask": MASK}),
    "sparse_to_dense, packed": (
        ios16.constexpr_sparse_to_dense,
        {"nonzero_data": NONZERO, "mask": pack_elements_into_bits(MASK, 1), "shape": SHAPE},
    ),
    "lut_to_sparse": (
        ios18.constexpr_lut_to_sparse,
        {
            "indices_mask": MASK,
            "indices_nonzero_data": CODES.flatten()[: NONZERO.size],
            "lut": LUT16[:8].reshape(1, 1, 1, 4, 2),
            "vector_axis": np.int32(2),
        },
    ),
    "sparse_blockwise_shift_scale": (
        ios18.constexpr_sparse_blockwise_shift_scale,
        {
            "data_mask": MASK,
            "nonzero_data": INT8.flatten()[: NONZERO.size],
            "scale": HALF,
            "offset": None,
        },
    ),
}


def test_every_compression_is_compared() -> None:
    compared = {f"constexpr_{name.partition(',')[0]}" for name in CASES}
    assert compared == set(DECOMPRESS) - {"constexpr_cast"}


@pytest.mark.parametrize("name", CASES)
def test_a_weight_is_decompressed_as_by_coremltools(name: str) -> None:
    theirs, parameters = CASES[name]
    expected = theirs.decompress(**parameters)
    given = {key: np.asarray(value) for key, value in parameters.items() if value is not None}
    found = DECOMPRESS[theirs.__name__](**given)
    pairs = [(found, expected)] if isinstance(found, np.ndarray) else zip(found, expected)  # noqa: B905
    for ours, wanted in pairs:
        assert ours.dtype == wanted.dtype
        np.testing.assert_array_equal(ours, wanted)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("affine_dequantize, along an axis", {"scale": np.ones(3, np.float16)}),
        ("blockwise_shift_scale", {"scale": np.ones((6, 3, 1), np.float16)}),
        ("sparse_to_dense", {"nonzero_data": NONZERO[:-1]}),
        ("lut_to_dense, vectors", {"lut": np.broadcast_to(LUT16[0], (1, 1, 1, 4, 2**26))}),
    ],
)
def test_parameters_that_contradict_each_other(name: str, change: dict[str, Any]) -> None:
    theirs, parameters = CASES[name]
    given = {key: np.asarray(v) for key, v in (parameters | change).items() if v is not None}
    with pytest.raises(ValueError, match=r"scales for|cut into|values for|too many"):
        DECOMPRESS[theirs.__name__](**given)


def test_a_cast_of_a_constant() -> None:
    cast = DECOMPRESS["constexpr_cast"](source_val=HALF, output_dtype="fp32")
    np.testing.assert_array_equal(cast, HALF.astype(np.float32))


NAMES = {"float32": "float", "float16": "fp16"}
TYPES = ("float32", "float16", "int8", "uint8", "int16", "uint16", "int32", "uint32", *PACKED_BITS)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_blob_of_every_type_is_read_as_it_was_written(dtype: str, tmp_path: Path) -> None:
    width = PACKED_BITS.get(dtype, 7)
    low = -(2 ** (width - 1)) if dtype.startswith("int") else 0
    values = RNG.integers(low, low + 2**width, 13).astype(np.int64)
    plain = "int8" if dtype == "int4" else "uint8" if dtype in PACKED_BITS else dtype
    array = values.astype(plain)
    path = tmp_path / "weight.bin"
    writer = _BlobStorageWriter(str(path))
    write = getattr(writer, f"write_{NAMES.get(dtype, dtype)}_data")
    write(np.ones(3, array.dtype) if dtype != "float16" else np.ones(3, np.uint16))
    offset = write(array if dtype != "float16" else array.view(np.uint16))
    del writer, write
    found = read_blob(path, offset, dtype, 13)
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)
    for wrong in ((offset, dtype, 99), (offset, "int64", 13), (0, dtype, 13)):
        with pytest.raises((ValueError, LookupError)):
            read_blob(path, *wrong)


def declared(package: Path, change: Any) -> None:
    spec = read_spec(package)
    change({op.type: op for op in operations(spec)})
    model_path(package).write_bytes(spec.SerializeToString())


def widen(ops: dict[str, Any]) -> None:
    ops["relu"].outputs[0].type.tensorType.dimensions[0].constant.size = 7


def retype(ops: dict[str, Any]) -> None:
    ops["relu"].outputs[0].type.tensorType.dataType = 10


def rename(ops: dict[str, Any]) -> None:
    ops["relu"].outputs[0].name = "a"


def nest(ops: dict[str, Any]) -> None:
    ops["relu"].blocks.add()


def leave_out(ops: dict[str, Any]) -> None:
    del ops["concat"].inputs["values"].arguments[1:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (widen, r"concat 'concat_0' has a result of \[9, 3\], expected \[4, 3\] as declared"),
        (retype, r"relu 'relu_0' has values of float16 and float32, expected one type"),
        (rename, "'a' is made twice"),
        (nest, "relu holds a block"),
        (leave_out, r"concat 'concat_0' has a result of \[2, 3\], expected \[4, 3\]"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_program_that_contradicts_itself(change: Any, message: str, tmp_path: Path) -> None:
    def body(a: Any) -> Any:
        x = mb.relu(x=a)
        return mb.concat(values=[x, a], axis=0)

    package = build(tmp_path, [(2, 3)], body)
    assert run(package, normal(2, 3))[0].shape == (4, 3)
    declared(package, change)
    with pytest.raises(EncoderError, match=message):
        MLProgram(package)


def test_inputs_of_another_shape(tmp_path: Path) -> None:
    package = build(tmp_path, [(2, 3)], lambda a: mb.relu(x=a))
    with pytest.raises(EncoderError, match=r"was given \{'a': \(3, 3\)\}"):
        run(package, normal(3, 3))


def test_a_result_that_is_not_as_declared_where_only_computing_tells(tmp_path: Path) -> None:
    package = build(tmp_path, [(2, 3)], lambda a: mb.relu(x=a))
    declared(package, widen)
    with pytest.raises(EncoderError, match=r"relu 'relu_0' makes \(\(2, 3\),\) where the program"):
        run(package, normal(2, 3))


@pytest.mark.parametrize("pad", [10**6, 2**31 - 1, -3])
def test_a_padding_that_would_fill_the_memory(pad: int, tmp_path: Path) -> None:
    def body(a: Any) -> Any:
        return mb.conv(x=a, weight=normal(4, 3, 3, 3), pad_type="custom", pad=[1, 1, 1, 1])

    package = build(tmp_path, [(1, 3, 8, 8)], body)
    spec = read_spec(package)
    (value,) = [op for op in operations(spec) if op.outputs[0].name.endswith("pad_0")]
    value.attributes["val"].immediateValue.tensor.ints.values[0] = pad
    model_path(package).write_bytes(spec.SerializeToString())
    with pytest.raises(EncoderError, match=r"conv .* a result of .* \[1, 4, 8, 8\] as declared"):
        MLProgram(package)


# What a small package declares may fill any memory.


def test_results_that_are_needed_at_once(tmp_path: Path) -> None:
    """Each of them is small enough."""
    side = 20_000

    def body(a: Any) -> Any:
        column = mb.matmul(x=np.ones((side, 1), np.float32), y=a)
        row = np.ones((1, side), np.float32)
        tables = [mb.matmul(x=mb.mul(x=column, y=float(i)), y=row) for i in range(6)]
        total = tables[0]
        for table in tables[1:]:
            total = mb.add(x=total, y=table)
        return mb.reduce_sum(x=total, axes=[0, 1])

    with pytest.raises(EncoderError, match=r"its operations hold 3,\d+,\d+,\d+ numbers at a time"):
        MLProgram(build(tmp_path, [(1, 1)], body))


def declare(package: Path, rows: int, names: str) -> None:
    """Let constants have that many rows, whatever is stored of them."""
    spec = read_spec(package)
    for op in operations(spec):
        if op.type == "const" and op.outputs[0].name.startswith(names):
            for kind in (op.outputs[0].type, op.attributes["val"].type):
                kind.tensorType.dimensions[0].constant.size = rows
    model_path(package).write_bytes(spec.SerializeToString())


@pytest.mark.parametrize(
    ("rows", "names", "message"),
    [
        (2**25, "mul", r"its constants have 671,\d+,\d+ numbers: expected at most 536,870,912"),
        (2**28, "layer_norm_0_gamma", r"a constant has 268,435,456 numbers, more than 134,217,728"),
        (2**27, "transpose", r"transpose 'transpose_0' has a perm of 134,217,728 numbers"),
    ],
)
def test_constants_that_say_they_are_large(
    rows: int, names: str, message: str, tmp_path: Path
) -> None:
    def body(a: Any) -> Any:
        for _ in range(5):
            a = mb.mul(x=a, y=normal(1, 4))
        a = mb.layer_norm(x=a, axes=[1], gamma=np.ones(4, np.float32))
        return mb.transpose(x=a, perm=[1, 0])

    package = build(tmp_path, [(1, 4)], body)
    declare(package, rows, names)
    with pytest.raises(EncoderError, match=message):
        MLProgram(package)


def test_what_an_operation_works_with(tmp_path: Path) -> None:
    """torch repeats an operand whose batch is broadcast, and pads a copy of an image."""

    def broadcast(a: Any) -> Any:
        x = mb.reshape(x=mb.matmul(x=np.ones((20_000, 1), np.float32), y=a), shape=[1, 20_000, 1])
        y = mb.reshape(x=mb.matmul(x=np.ones((20_000, 1), np.float32), y=a), shape=[20_000, 1, 1])
        return mb.matmul(
            x=mb.matmul(x=x, y=np.ones((1, 9), np.float32)), y=mb.concat(values=[y] * 9, axis=1)
        )

    with pytest.raises(EncoderError, match=r"matmul .* 3,600,000,000 numbers to work with"):
        MLProgram(build(tmp_path, [(1, 1)], broadcast))


def test_a_weight_that_is_compressed_over_and_over(tmp_path: Path) -> None:
    """Each reads the one before twice, so that forty of them would never end."""

    def body(a: Any) -> Any:
        weight = mb.constexpr_blockwise_shift_scale(
            data=np.ones((1, 4), np.int8), scale=np.ones((1, 1), np.float32)
        )
        return mb.mul(x=a, y=weight)

    package = build(tmp_path, [(1, 4)], body, target=ct.target.iOS18)
    spec = read_spec(package)
    made = operations(spec)
    (first,) = [op for op in made if op.type.startswith("constexpr")]
    place, name = list(made).index(first), first.outputs[0].name
    for number in range(40):
        again = type(first)()
        again.CopyFrom(first)
        for parameter in ("data", "scale"):
            again.inputs[parameter].arguments[0].name = name
        name = again.outputs[0].name = f"again_{number}"
        made.insert(place + 1 + number, again)
    made[-1].inputs["y"].arguments[0].name = name
    model_path(package).write_bytes(spec.SerializeToString())
    with pytest.raises(EncoderError, match="a weight is compressed 5 times over"):
        MLProgram(package)


@pytest.mark.parametrize("swap", ["cut", "pipe", "link", "gone"])
def test_weights_that_change_after_they_were_looked_at(
    swap: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = build(tmp_path, [(1, 64)], lambda a: mb.mul(x=a, y=normal(1, 64)))
    (weights,) = package.rglob("weight.bin")
    read = mlprogram.read_function

    def late(*arguments: Any) -> Any:
        data = weights.read_bytes()
        weights.unlink()
        if swap == "cut":
            weights.write_bytes(data[:70])
        elif swap == "pipe":
            os.mkfifo(weights)
        elif swap == "link":
            weights.symlink_to("/dev/zero")
        return read(*arguments)

    monkeypatch.setattr(mlprogram, "read_function", late)
    with pytest.raises(EncoderError):
        MLProgram(package)


def test_weights_that_are_cut_between_a_look_and_a_read(tmp_path: Path) -> None:
    path = tmp_path / "weight.bin"
    for length in (0, 10, 23):
        path.write_bytes(bytes(length))
        with pytest.raises(ValueError, match="holds no 4 elements"):
            read_blob(path, 0, "float32", 4)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises((ValueError, OSError)):
        read_blob(path, 0, "float32", 4)
