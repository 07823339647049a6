"""The program of an encoder package: its operations in order, with their types and constants.

It is read from the specification, as coremltools' `MIL.proto` describes it, and from the weights
beside it. coremltools has a reader too, which builds a program that can be edited: to import it is
to import the converters, and with them torch's quantization and scikit-learn, which takes longer
than everything else between a question and the first word of the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from fastvlm_mlx.vision.package import model_path, type_name
from fastvlm_mlx.vision.program.blobs import NUMPY_TYPES, blob_path, read_blob, unpack
from fastvlm_mlx.vision.program.constexpr import DECOMPRESS, MAX_WEIGHT

CONST, CONSTEXPR = "const", "constexpr_"
# A table of values that are quantized, for weights that are sparse, takes three. Whatever is read
# by two parameters is made twice.
_MAX_DEPTH = 4

Constant = np.ndarray | str


@dataclass(frozen=True, eq=False)
class MILVariable:
    """A value of the program by name, with the type that the program declares.

    Attributes:
        dtype: as MIL.proto names it, in lower case: float16, int32, string …
        read: reads the value of a constant, decompressed; None for what is computed.
        source: what it is read from; that of equal constants in several functions is the same.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Constant] | None = None
    source: Hashable = None


@dataclass(frozen=True, eq=False)
class MILOperation:
    """One operation. Every parameter has one variable, or, as `values` of a concat, several."""

    name: str
    type: str
    inputs: dict[str, tuple[MILVariable, ...]]
    outputs: tuple[MILVariable, ...]


@dataclass(frozen=True, eq=False)
class MILFunction:
    """A function without its constants, which are read through the variables."""

    inputs: tuple[MILVariable, ...]
    operations: tuple[MILOperation, ...]
    outputs: tuple[MILVariable, ...]


def is_constant(operation_type: str) -> bool:
    """Whether operations of this type make constants, plain or compressed ones."""
    return operation_type == CONST or operation_type.startswith(CONSTEXPR)


def read_function(spec: Any, package: Path, name: str) -> MILFunction:
    """Read the function `name` of a specification whose weights `read_spec` has checked.

    Raises:
        ValueError, LookupError, TypeError: it is not well formed.
        EncoderError: as `blob_path`.
    """
    return _Reader(package).function(spec.mlProgram.functions[name])


class _Reader:
    """Turns the messages of one function into operations; it knows every variable so far."""

    def __init__(self, package: Path):
        self._package = package
        self._directory = model_path(package).parent
        self._variables: dict[str, MILVariable] = {}
        # How many decompressions lead to a variable.
        self._depths: dict[str, int] = {}

    def function(self, message: Any) -> MILFunction:
        inputs = tuple(self._add(v.name, *_tensor_type(v.type)) for v in message.inputs)
        block = message.block_specializations[message.opset]
        operations = []
        for operation in block.operations:
            if operation.blocks:
                raise ValueError(f"{operation.type} holds a block of operations")
            if operation.type == CONST:
                self._add_const(operation)
            elif is_constant(operation.type):
                self._add_constexpr(operation)
            else:
                operations.append(self._operation(operation))
        outputs = tuple(self._variable(name) for name in block.outputs)
        return MILFunction(inputs, tuple(operations), outputs)

    def _operation(self, message: Any) -> MILOperation:
        inputs = {
            parameter: tuple(self._argument(message, parameter))
            for parameter in sorted(message.inputs)
        }
        # After its operands: an operation can't read what it makes itself.
        outputs = tuple(self._add(o.name, *_tensor_type(o.type)) for o in message.outputs)
        name = outputs[0].name
        if "name" in message.attributes:
            name = str(self._value(message.attributes["name"]))
        return MILOperation(name, message.type, inputs, outputs)

    def _add_const(self, message: Any) -> None:
        value = message.attributes["val"]
        output = message.outputs[0]
        dtype, shape = _tensor_type(output.type)
        if _tensor_type(value.type) != (dtype, shape):
            raise ValueError(f"the constant {output.name!r} is not of the type that it declares")
        self._add(output.name, dtype, shape, partial(self._value, value), _source(value))

    def _add_constexpr(self, message: Any) -> None:
        """Until iOS 17 the parameters are attributes, from iOS 18 on they are inputs."""
        decompress = DECOMPRESS.get(message.type)
        if decompress is None:
            raise ValueError(f"{message.type} is not known")
        parameters: dict[str, Callable[[], Constant] | None] = {
            name: partial(self._value, value)
            for name, value in message.attributes.items()
            if name != "name"
        }
        sources: dict[str, Hashable] = {
            name: _source(message.attributes[name]) for name in parameters
        }
        depth = 1
        for name in message.inputs:
            (variable,) = self._argument(message, name)
            parameters[name], sources[name] = variable.read, variable.source
            depth = max(depth, self._depths.get(variable.name, 0) + 1)
        if depth > _MAX_DEPTH:
            raise ValueError(f"a weight is compressed {depth} times over")
        for index, output in enumerate(message.outputs):
            dtype, shape = _tensor_type(output.type)
            read = partial(_decompressed, decompress, parameters, index, dtype, shape)
            source = (message.type, index, dtype, shape, tuple(sorted(sources.items())))
            self._add(output.name, dtype, shape, read, source)
            self._depths[output.name] = depth

    def _argument(self, message: Any, parameter: str) -> Iterator[MILVariable]:
        """What is bound to a parameter: names of variables, or constants in their place."""
        for binding in message.inputs[parameter].arguments:
            if binding.WhichOneof("binding") == "name":
                yield self._variable(binding.name)
            else:
                name = f"{message.outputs[0].name}.{parameter}.{len(self._variables)}"
                dtype, shape = _tensor_type(binding.value.type)
                read = partial(self._value, binding.value)
                yield self._add(name, dtype, shape, read, _source(binding.value))

    def _add(
        self,
        name: str,
        dtype: str,
        shape: tuple[int, ...],
        read: Callable[[], Constant] | None = None,
        source: Hashable = None,
    ) -> MILVariable:
        if name in self._variables:
            raise ValueError(f"{name!r} is made twice")
        self._variables[name] = MILVariable(name, dtype, shape, read, source)
        return self._variables[name]

    def _variable(self, name: str) -> MILVariable:
        if name not in self._variables:
            raise ValueError(f"{name!r} is read before it is made")
        return self._variables[name]

    def _value(self, value: Any) -> Constant:
        """A constant from the specification itself, or from the weights that it points to."""
        dtype, shape = _tensor_type(value.type)
        if prod(shape) > MAX_WEIGHT:
            raise ValueError(f"a constant has {prod(shape):,} numbers, more than {MAX_WEIGHT:,}")
        if value.WhichOneof("value") == "blobFileValue":
            blob = value.blobFileValue
            path = blob_path(self._package, self._directory, blob.fileName)
            return read_blob(path, blob.offset, dtype, prod(shape)).reshape(shape)
        tensor = value.immediateValue.tensor
        kind = tensor.WhichOneof("value")
        if kind is None:
            raise ValueError(f"a constant of type {dtype} has no value")
        held = getattr(tensor, kind).values
        if kind == "strings" and dtype == "string":
            (text,) = held
            return str(text)
        if kind == "bytes":
            return unpack(held, dtype, prod(shape)).reshape(shape)
        return np.array(held).astype(NUMPY_TYPES[dtype]).reshape(shape)


def _source(value: Any) -> bytes:
    """A constant's value, or the place in the weights that it points to, as the package has it."""
    return bytes(value.SerializeToString(deterministic=True))


def _tensor_type(value_type: Any) -> tuple[str, tuple[int, ...]]:
    """The type of the elements and the shape. Raises ValueError: no tensor of a fixed shape."""
    tensor = value_type.tensorType
    sizes = [d.constant.size for d in tensor.dimensions if d.WhichOneof("dimension") == "constant"]
    if value_type.WhichOneof("type") != "tensorType" or len(sizes) != tensor.rank:
        raise ValueError("a value is no tensor of a fixed shape")
    if len(tensor.dimensions) != tensor.rank:
        raise ValueError(f"a tensor of rank {tensor.rank} has {len(tensor.dimensions)} dimensions")
    return type_name(tensor), tuple(sizes)


def _decompressed(
    decompress: Callable[..., np.ndarray | tuple[np.ndarray, ...]],
    parameters: dict[str, Callable[[], Constant] | None],
    index: int,
    dtype: str,
    shape: tuple[int, ...],
) -> np.ndarray:
    """The output `index` of a decompression. Raises ValueError: it is not of the declared type."""
    values = {}
    for name, read in parameters.items():
        if read is None:
            raise ValueError(f"the parameter {name} of a compressed weight is computed")
        values[name] = read()
    made = decompress(**values)
    array = made[index] if isinstance(made, tuple) else made
    if array.shape != shape or array.dtype != NUMPY_TYPES[dtype]:
        raise ValueError(
            f"a compressed weight has shape {list(array.shape)} of {array.dtype} where "
            f"{list(shape)} of {dtype} is declared"
        )
    return array
