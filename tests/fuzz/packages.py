"""The Core ML encoder of an `app` bundle without a manifest: its Manifest.json, program, weights.

Any features of the declared shape are right where the package could be read; a link that leads out
of it is an error.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzz.case import Case
from tests.fuzz.mutate import damage, damaged, edit_json, fragment, link, text
from tests.fuzz.stock import Stock

PACKAGE = "fastvithd.mlpackage"
DATA = f"{PACKAGE}/Data/com.apple.CoreML"
MODEL = f"{DATA}/model.mlmodel"
WEIGHTS = f"{DATA}/weights/weight.bin"


def warm(stock: Stock) -> None:
    import fastvlm_mlx
    from tests.fuzz.stock import scene_image

    fastvlm_mlx.load(stock / "app").encode(scene_image())


def prepare(case: Case) -> None:
    rng = case.rng
    compact = rng.random() < 0.35 and (case.stock / "compact").is_dir()
    shutil.copytree(case.stock / ("compact" if compact else "app"), case.source)
    (case.source / "manifest.json").unlink()
    how = rng.choices(
        (_manifest, _bytes, _description, _operation, _blob, _weights, _links, _files),
        (10, 16, 14, 28, 12, 12, 6, 4),
    )[0]
    case.facts = {"mutator": how.__name__.strip("_"), "must_fail": False, "size": None}
    if compact and rng.random() < 0.5:
        case.facts["size"] = 128
    case.facts["note"] = how(case, rng)


def run(case: Case) -> None:
    import fastvlm_mlx
    from fastvlm_mlx.vision.package import describe
    from tests.fuzz.stock import scene_image

    must_fail = case.facts["must_fail"]
    case.step("describe", lambda: describe(case.source / PACKAGE) and None)
    size = case.facts["size"]
    model = case.step("load", lambda: fastvlm_mlx.load(case.source, image_size=size))
    if model is None:
        return
    encoded = case.step("encode", lambda: model.encode(scene_image()), must_fail=must_fail)
    if encoded is not None:
        _check(case, encoded.features, model.num_tokens, model.config.vision.hidden_size)


def _check(case: Case, features: np.ndarray, tokens: int, channels: int) -> None:
    if features.shape != (1, tokens, channels) or features.dtype != np.float32:
        case.bad("wrong features", f"{features.shape} {features.dtype}")


def _manifest(case: Case, rng: random.Random) -> str:
    file = case.source / PACKAGE / "Manifest.json"
    if rng.random() < 0.6:
        return edit_json(rng, file)
    data = json.loads(file.read_text())
    entry = data["itemInfoEntries"][data["rootModelIdentifier"]]
    outside = case.stock.outside
    entry["path"] = rng.choice(
        (
            *("../../../../etc/passwd", "/etc/passwd", "", ".", "..", text(rng), "x" * 5000),
            *(
                str(outside / MODEL),
                "com.apple.CoreML",
                "/dev/zero",
                "\0",
                "com.apple.CoreML/weights",
            ),
        )
    )
    case.facts["must_fail"] = True
    file.write_bytes(json.dumps(data).encode("utf-8", "surrogatepass"))
    return f"path {entry['path'][:60]!r}"


def _bytes(case: Case, rng: random.Random) -> str:
    file = case.source / MODEL
    data, notes = file.read_bytes(), []
    for _ in range(rng.choice((1, 1, 3, 10))):
        data, note = damaged(rng, data)
        notes.append(note)
    file.write_bytes(data)
    return "; ".join(notes)


def _read(case: Case) -> Any:
    from coremltools.proto import Model_pb2

    spec = Model_pb2.Model()
    spec.ParseFromString((case.source / MODEL).read_bytes())
    return spec


def _write(case: Case, spec: Any) -> None:
    (case.source / MODEL).write_bytes(spec.SerializeToString())


def _utf8(rng: random.Random) -> str:
    return text(rng).replace("\ud800", "x")


def _whole(rng: random.Random) -> int:
    return rng.choice((0, 1, 2, 3, 7, 64, 10**6, 2**31 - 1, 2**31, 2**32, 2**62))


def _description(case: Case, rng: random.Random) -> str:
    spec = _read(case)
    description = spec.description
    how = rng.choice(
        ("name", "shape", "dtype", "none", "twice", "target", "function", "meta", "kind")
    )
    # With several functions each has a description of its own.
    described = rng.choice(description.functions) if description.functions else description
    side = rng.choice((described.input, described.output))
    if how == "name":
        side[0].name = _utf8(rng)
    elif how == "shape":
        shape = side[0].type.multiArrayType.shape
        count = rng.choice((0, 1, 3, 4, 5, 100))
        del shape[:]
        shape.extend(rng.choice((_whole(rng), -1)) for _ in range(count))
    elif how == "dtype":
        side[0].type.multiArrayType.dataType = rng.choice((0, 65552, 65600, 131104))
    elif how == "none":
        del side[:]
    elif how == "twice":
        side.add().CopyFrom(side[0])
    elif how == "target":
        spec.specificationVersion = rng.choice((0, 1, 6, 7, 8, 9, 10, 99, 2**31 - 1))
    elif how == "function":
        description.defaultFunctionName = _utf8(rng)
    elif how == "meta":
        description.metadata.license = _utf8(rng)
        description.metadata.userDefined[_utf8(rng)] = _utf8(rng)
    else:
        spec.neuralNetwork.SetInParent()
    _write(case, spec)
    return how


def _operations(spec: Any) -> Any:
    functions = spec.mlProgram.functions
    function = functions[sorted(functions)[0]]
    return function.block_specializations[function.opset].operations


def _operation(case: Case, rng: random.Random) -> str:
    """The program: types, names, order, shapes and values of its operations."""
    spec = _read(case)
    operations = _operations(spec)
    op = rng.choice(operations)
    how = rng.choice(
        (
            *("type", "rename", "swap", "delete", "shape", "value", "value", "value", "value"),
            *("input", "output", "opset", "block", "attribute", "copy", "dtype"),
        )
    )
    note = f"{how} of {op.type}"
    if how == "type":
        op.type = rng.choice((_utf8(rng), "add", "conv", "const", "cond", "while_loop", "gather"))
    elif how == "rename":
        op.outputs[0].name = rng.choice((_utf8(rng), rng.choice(operations).outputs[0].name))
    elif how == "swap":
        other, kept = rng.choice(operations), type(op)()
        kept.CopyFrom(op)
        op.CopyFrom(other)
        other.CopyFrom(kept)
    elif how == "delete":
        operations.remove(op)
    elif how == "copy":
        operations.add().CopyFrom(op)
    elif how == "shape":
        _reshape(op.outputs[0].type.tensorType, rng)
    elif how == "dtype":
        op.outputs[0].type.tensorType.dataType = rng.choice((0, 1, 2, 10, 11, 21, 23, 30, 36))
    elif how == "value":
        note += _change_value(operations, rng)
    elif how == "input":
        others = [o for o in operations if o.inputs]
        op = rng.choice(others)
        argument = op.inputs[rng.choice(sorted(op.inputs))]
        names = (rng.choice(operations).outputs[0].name, op.outputs[0].name, "nothing", _utf8(rng))
        if rng.random() < 0.3:
            del argument.arguments[:]
        elif argument.arguments:
            argument.arguments[0].name = rng.choice(names)
    elif how == "output":
        del op.outputs[:]
    elif how == "opset":
        function = spec.mlProgram.functions[sorted(spec.mlProgram.functions)[0]]
        function.opset = rng.choice(("CoreML3", "CoreML99", _utf8(rng)))
    elif how == "block":
        op.blocks.add()
    else:
        keys = sorted(op.attributes)
        if keys:
            del op.attributes[rng.choice(keys)]
    _write(case, spec)
    return note


def _reshape(tensor: Any, rng: random.Random) -> None:
    how = rng.choice(("rank", "size", "dynamic", "more"))
    if how == "rank":
        tensor.rank = _whole(rng)
    elif how == "more" or not tensor.dimensions:
        tensor.dimensions.add().constant.size = _whole(rng)
        tensor.rank += 1
    elif how == "size":
        rng.choice(tensor.dimensions).constant.size = _whole(rng)
    else:
        rng.choice(tensor.dimensions).unknown.SetInParent()


def _change_value(operations: Any, rng: random.Random) -> str:
    """A constant: strides, pads, axes, groups, shapes."""
    holders = [op for op in operations if op.type == "const" and "val" in op.attributes]
    op = rng.choice(holders)
    value = op.attributes["val"]
    if value.WhichOneof("value") != "immediateValue":
        _reshape(value.type.tensorType, rng)
        return f" shape of {op.outputs[0].name}"
    tensor = value.immediateValue.tensor
    kind = tensor.WhichOneof("value")
    held = getattr(tensor, kind) if kind else None
    values = getattr(held, "values", None)
    if kind == "ints" and values:
        place = rng.randrange(len(values))
        values[place] = rng.choice((0, -1, 1, 2, 3, 1000, 10**6, 2**31 - 1, -(2**31)))
    elif kind == "floats" and values:
        values[0] = rng.choice((0.0, -1.0, float("nan"), float("inf"), 1e38))
    elif kind == "strings" and values:
        values[0] = rng.choice((_utf8(rng), "same", "valid", "custom", "fp16", "fp32", "int8"))
    elif kind == "bools" and values:
        values[0] = not values[0]
    else:
        tensor.Clear()
    if values and rng.random() < 0.2:
        values.append(values[0])
    return f" value of {op.outputs[0].name}"


def _values(op: Any) -> Iterator[Any]:
    """What an operation holds: by name, and where its weights are compressed, as its inputs."""
    yield from (op.attributes[name] for name in sorted(op.attributes))
    for name in sorted(op.inputs):
        yield from (bound.value for bound in op.inputs[name].arguments if bound.HasField("value"))


def _blob(case: Case, rng: random.Random) -> str:
    """Where the program says that a weight lies: other files, beyond the end, in another blob."""
    spec = _read(case)
    holders = [
        value.blobFileValue
        for op in _operations(spec)
        for value in _values(op)
        if value.WhichOneof("value") == "blobFileValue"
    ]
    blob = rng.choice(holders)
    how = rng.choice(("file", "file", "offset", "offset", "other"))
    if how == "file":
        outside = case.stock.outside
        blob.fileName = rng.choice(
            (
                *("@model_path/../../../../../../etc/passwd", "/etc/passwd", "", "@model_path/"),
                *(
                    str(outside / WEIGHTS),
                    f"@model_path/{outside / WEIGHTS}",
                    "/dev/zero",
                    _utf8(rng),
                ),
                *("@model_path/weights/../weights/weight.bin", "@model_path/weights", "x" * 5000),
            )
        )
        if "weights/../weights" not in blob.fileName:
            case.facts["must_fail"] = True
    elif how == "offset":
        blob.offset = rng.choice(
            (0, 1, 63, 64, 65, 10**9, 2**31, 2**62, 2**63, 2**64 - 1, 2**64 - 64)
        )
    else:
        blob.offset = rng.choice(holders).offset
    _write(case, spec)
    return f"{how} {blob.fileName[:60]!r} {blob.offset}"


def _weights(case: Case, rng: random.Random) -> str:
    file = case.source / WEIGHTS
    if rng.random() < 0.5:
        return damage(rng, file)
    # A blob's header: 64 bytes, of which sentinel, type, length and place are read.
    data = bytearray(file.read_bytes())
    starts = [i for i in range(0, len(data) - 64, 64) if data[i : i + 4] == b"\xef\xbe\xad\xde"]
    at = rng.choice(starts) + rng.choice((0, 4, 8, 16))
    data[at : at + 4] = rng.choice((b"\0\0\0\0", b"\xff" * 4, b"\x01\0\0\0", rng.randbytes(4)))
    file.write_bytes(bytes(data))
    return f"header at {at}"


def _links(case: Case, rng: random.Random) -> str:
    names = (MODEL, WEIGHTS, f"{PACKAGE}/Manifest.json", f"{PACKAGE}/Data", DATA, f"{DATA}/weights")
    name = rng.choice((*names, PACKAGE))
    how = link(rng, case.source / name, case.stock.outside, case.stock.outside / "app" / name)
    case.facts["must_fail"] = True
    return f"{name} → {how}"


def _files(case: Case, rng: random.Random) -> str:
    package: Path = case.source / PACKAGE
    how = rng.choice(("second", "file", "empty", "no weights", "weights are a directory", "text"))
    if how == "second":
        shutil.copytree(package, case.source / "another.mlpackage")
    elif how == "file":
        shutil.rmtree(package)
        package.write_text("x")
    elif how == "empty":
        shutil.rmtree(package)
        package.mkdir()
    elif how == "text":
        (case.source / MODEL).write_text(fragment(rng).replace("\ud800", ""))
    else:
        (case.source / WEIGHTS).unlink()
        if how != "no weights":
            (case.source / WEIGHTS).mkdir()
    return how
