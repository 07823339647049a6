"""An `.mlpackage` on disk: what it declares, and whether it is whole.

Everything here reads the specification (a megabyte) and the headers of the weights, never the
weights themselves.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any

from fastvlm_mlx.bundle.files import inside, listing, read_bytes
from fastvlm_mlx.bundle.schema import read_json
from fastvlm_mlx.errors import EncoderError, OptionError
from fastvlm_mlx.imports import part
from fastvlm_mlx.vision.program.blobs import check_weights

INPUT_NAME = "images"
OUTPUT_NAME = "image_features"
FUNCTION_NAME = "main"
MIXED = "mixed"
# What `Feature.dtype` says of an input that takes 8-bit RGB images and no array.
IMAGE = "image"

# coremltools/__init__.py: specification versions that hold an ML Program.
_TARGETS = {
    6: "iOS15/macOS12",
    7: "iOS16/macOS13",
    8: "iOS17/macOS14",
    9: "iOS18/macOS15",
    10: "iOS26/macOS26",
}
# FeatureTypes.proto, ArrayFeatureType.ArrayDataType.
_ARRAY_TYPES = {
    65568: "float32",
    65552: "float16",
    65600: "float64",
    131104: "int32",
    131080: "int8",
}
# FeatureTypes.proto, ImageFeatureType.ColorSpace.
_RGB = 20
_UNCOMPRESSED = ("fp16", "fp32")
_one_at_a_time = RLock()
COMPLETE = "expected a complete .mlpackage, export it again"


@dataclass(frozen=True)
class Feature:
    """One input or output as the package declares it.

    Where it declares no shape of an output, as packages of older coremltools do not, `shape` is
    what the program makes. Empty where none is fixed.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    description: str


@dataclass(frozen=True)
class PackageInfo:
    """What an ML Program package says about itself, and about one of its functions.

    `function` is the one that `inputs`, `outputs`, `precision` and `ops` are of: the default one,
    unless another was asked for. `functions` has the input size in pixels of each.
    `precision` is that of the weights of the convolutions: fp32, fp16, or what they are compressed
    to (int8, int4, palette6 …, mixed where some differ from others), whatever small ones were left
    as they are. `ops` counts the operations by type, constants left out. `bytes` is the size of
    the package on disk.
    """

    function: str
    functions: dict[str, int]
    inputs: tuple[Feature, ...]
    outputs: tuple[Feature, ...]
    specification_version: int
    deployment_target: str
    precision: str
    ops: dict[str, int]
    author: str
    license: str
    version: str
    short_description: str
    metadata: dict[str, str]
    bytes: int


@contextmanager
def quiet_coremltools() -> Iterator[None]:
    """Import or use coremltools without its warnings and progress bars.

    One thread at a time: what is put back is the whole process's, and so is what coremltools notes
    of a program that it reads or builds.

    On Linux it warns at import that Core ML's native libraries are missing, and about versions of
    packages that it has not been tested with. Everything is put back on leaving.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    logger = logging.getLogger("coremltools")
    with _one_at_a_time:
        level = logger.level
        start_bar = tqdm.__init__
        logger.setLevel(logging.CRITICAL)
        tqdm.__init__ = functools.partialmethod(start_bar, disable=True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            tqdm.__init__ = start_bar
            logger.setLevel(level)


def one_line(error: Exception) -> str:
    """An error of somebody else's, to stand in a sentence."""
    return " ".join(str(error).split())


def model_path(package: Path) -> Path:
    """The specification inside a package, found through its Manifest.json.

    Raises:
        EncoderError: no package, or no readable manifest.
    """
    if not package.is_dir():
        raise EncoderError(
            f"no encoder package at {package}: expected an .mlpackage directory, export it again"
        )
    if package.is_symlink():
        raise EncoderError(
            f"{package} is a link to {package.resolve()}, which is not followed: expected the "
            ".mlpackage itself"
        )
    manifest = package / "Manifest.json"
    if not manifest.is_file():
        raise EncoderError(
            f"{package} has no Manifest.json: expected a complete .mlpackage, export it again"
        )
    content = read_json(package, manifest, EncoderError, remedy=COMPLETE)
    try:
        path = content["itemInfoEntries"][content["rootModelIdentifier"]]["path"]
        specification = package / "Data" / path
    except (KeyError, TypeError) as error:
        raise EncoderError(f"{manifest} does not name a model: {COMPLETE}") from error
    # Not the file that a link of the hub's cache leads to: the weights lie beside the link.
    inside(package, specification, EncoderError)
    return specification


def read_spec(package: Path) -> Any:
    """Parse the specification and check that every weight it refers to is in the package.

    Returns:
        coremltools' `Model` message.

    Raises:
        EncoderError: the package is missing, damaged, or holds no ML Program.
    """
    path = model_path(package)
    proto = part("coremltools.proto")
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    spec = proto.Model_pb2.Model()
    try:
        spec.ParseFromString(read_bytes(package, path, EncoderError))
    except DecodeError as error:
        raise EncoderError(f"{path} is not a Core ML model: {COMPLETE}") from error
    if spec.WhichOneof("Type") != "mlProgram":
        raise EncoderError(
            f"{path} holds {spec.WhichOneof('Type') or 'no model'}: expected an ML Program, export "
            "it again"
        )
    if spec.specificationVersion not in _TARGETS:
        raise EncoderError(
            f"{path} has specification version {spec.specificationVersion}: expected one of "
            f"{min(_TARGETS)} to {max(_TARGETS)}, export it again"
        )
    check_weights(spec, package, path.parent)
    return spec


def operations(spec: Any, name: str | None = None) -> Any:
    """The operations of a function, in order; of the default one unless named.

    Raises:
        EncoderError: there is no such function.
    """
    name = name or default_function(spec)
    function = spec.mlProgram.functions.get(name)
    if function is None or function.opset not in function.block_specializations:
        raise EncoderError(
            f"the .mlpackage has no function {name!r}: expected an encoder's, export it again"
        )
    return function.block_specializations[function.opset].operations


def default_function(spec: Any) -> str:
    """What runs where no function is named."""
    return str(spec.description.defaultFunctionName) or FUNCTION_NAME


def describe(package: Path, image_size: int | None = None) -> PackageInfo:
    """Read what a package declares, without loading its weights.

    Args:
        image_size: whose function is described, in pixels; the default one's unless given.

    Raises:
        EncoderError: the package is missing, damaged, or holds no ML Program.
        OptionError: it has no function of that size.
    """
    return describe_spec(read_spec(package), package, image_size)


def describe_spec(spec: Any, package: Path, image_size: int | None = None) -> PackageInfo:
    """`describe` for a specification already read."""
    # Before iOS 18 there was one function, and the package's own description was its.
    declared = {f.name: f for f in spec.description.functions} or {FUNCTION_NAME: spec.description}
    sizes = {name: _input_size(function) for name, function in declared.items()}
    name = default_function(spec)
    if image_size is not None and image_size != sizes.get(name):
        of_size = {size: other for other, size in sizes.items()}
        if image_size not in of_size:
            raise OptionError(
                f"image size {image_size} was asked for and {package} takes "
                f"{' or '.join(map(str, sorted(of_size)))}: choose what it takes, or export the "
                "checkpoint with --image-sizes"
            )
        name = of_size[image_size]
    made = operations(spec, name)
    function = declared.get(name, spec.description)
    metadata = spec.description.metadata
    return PackageInfo(
        function=name,
        functions=sizes,
        inputs=tuple(_feature(f) for f in function.input),
        outputs=tuple(_feature(f, _made_shape(made, f.name)) for f in function.output),
        specification_version=spec.specificationVersion,
        deployment_target=_TARGETS[spec.specificationVersion],
        precision=_precision(made),
        ops=dict(sorted(Counter(op.type for op in made if op.type != "const").items())),
        author=metadata.author,
        license=metadata.license,
        version=metadata.versionString,
        short_description=metadata.shortDescription,
        metadata=dict(sorted(metadata.userDefined.items())),
        bytes=sum((package / name).stat().st_size for name in listing(package, EncoderError)),
    )


def fits_app(info: PackageInfo) -> dict[str, Any]:
    """What the manifest and `inspect` say of Apple's demo app, as Apple publishes it."""
    misfit = app_misfit(info)
    return {"fits_unmodified_app": misfit is None} | ({"misfit": misfit} if misfit else {})


def app_misfit(info: PackageInfo) -> str | None:
    """Why the demo app can't run the encoder; None if it can.

    It calls the default function with an MLMultiArray, and asserts the features' shape.
    """
    features = info.outputs[0].shape if info.outputs else ()
    if features != (1, 256, 3072):
        _, tokens, channels = features if len(features) == 3 else (1, 0, 0)
        return f"it makes {tokens} tokens of {channels} channels and the app asserts 256 of 3072"
    if info.inputs[0].dtype == IMAGE:
        return "it takes images (--image-input) and the app hands over an MLMultiArray"
    return None


def _input_size(function: Any) -> int:
    """In pixels along one side; 0 where the input has no fixed shape."""
    shapes = [_feature(feature).shape for feature in function.input]
    return shapes[0][-1] if shapes and shapes[0] else 0


def _made_shape(operations: Any, name: str) -> tuple[int, ...]:
    """The static shape of what is made under `name`, or nothing."""
    for op in operations:
        for output in op.outputs:
            if output.name == name:
                return tuple(d.constant.size for d in output.type.tensorType.dimensions)
    return ()


def _feature(feature: Any, made: tuple[int, ...] = ()) -> Feature:
    kind = feature.type.WhichOneof("Type")
    if kind == "imageType" and feature.type.imageType.colorSpace == _RGB:
        image = feature.type.imageType
        shape = (1, 3, image.height, image.width)
        return Feature(feature.name, IMAGE, shape, feature.shortDescription)
    if kind != "multiArrayType":
        return Feature(feature.name, kind or "none", (), feature.shortDescription)
    array = feature.type.multiArrayType
    dtype = _ARRAY_TYPES.get(array.dataType, f"type {array.dataType}")
    return Feature(feature.name, dtype, tuple(array.shape) or made, feature.shortDescription)


def _precision(operations: Any) -> str:
    makers = {output.name: op for op in operations for output in op.outputs}
    found: Counter[str] = Counter()
    for op in operations:
        if op.type not in ("conv", "linear"):
            continue
        bindings = op.inputs["weight"].arguments if "weight" in op.inputs else ()
        maker = makers.get(bindings[0].name) if bindings else None
        if maker is None:
            continue
        size = 1
        for dimension in maker.outputs[0].type.tensorType.dimensions:
            size *= dimension.constant.size
        found[_weight_format(maker, makers)] += size
    small = {name for name in found if name not in _UNCOMPRESSED}
    if small:
        # An exporter may leave some weights uncompressed.
        return MIXED if len(small) > 1 else small.pop()
    return found.most_common(1)[0][0] if found else "none"


def _weight_format(maker: Any, makers: dict[str, Any]) -> str:
    def stored(name: str) -> Any:
        if name in maker.attributes:
            return maker.attributes[name].type.tensorType
        if name in maker.inputs and maker.inputs[name].arguments:
            binding = maker.inputs[name].arguments[0]
            if binding.WhichOneof("binding") == "value":
                return binding.value.type.tensorType
            if binding.name in makers:
                return makers[binding.name].outputs[0].type.tensorType
        raise EncoderError(
            f"operation {maker.type} {maker.outputs[0].name} lacks {name}: expected a complete "
            ".mlpackage, export it again"
        )

    if maker.type == "constexpr_affine_dequantize":
        return type_name(stored("quantized_data")).removeprefix("u")
    if maker.type == "constexpr_blockwise_shift_scale":
        return type_name(stored("data")).removeprefix("u")
    if maker.type == "constexpr_lut_to_dense":
        lut = stored("lut")
        if lut.rank > 1:  # iOS 18's, where the type of the indices says it
            return "palette" + type_name(stored("indices")).removeprefix("uint")
        return f"palette{(lut.dimensions[0].constant.size - 1).bit_length()}"
    if maker.type.startswith("constexpr_"):
        return maker.type.removeprefix("constexpr_")
    return type_name(maker.outputs[0].type.tensorType).replace("float", "fp")


def type_name(tensor_type: Any) -> str:
    """`int8`, `float16` …"""
    types = part("coremltools.proto").MIL_pb2.DataType.DESCRIPTOR
    known = types.values_by_number.get(tensor_type.dataType)
    return known.name.lower() if known else f"type {tensor_type.dataType}"
