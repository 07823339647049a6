"""Operations, multiply-accumulates and bytes of a traced encoder, as a GPU would run it.

An operation is a kernel that MLX starts. What only looks at an array in another way is none, until
the result has to lie in order: then it is a copy. Each operation reads its inputs once and writes
its result once. Nothing here is measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from benchmarks.operations.trace import ATTENTION, LAYER_NORM, Traced

# What mx.compile joins, as far as an encoder has it (mlx/compile.cpp, is_fusable), and how deep.
ELEMENTWISE = {
    *("Abs", "Add", "AsType", "Divide", "Erf", "Exp", "Maximum", "Minimum", "Multiply", "Negative"),
    *("Power", "Sigmoid", "Sqrt", "Square", "Subtract", "Tanh"),
}
MAX_DEPTH = 11
# Reshape is one as long as the elements lie in order.
RESHAPES = {"ExpandDims", "Flatten", "Reshape", "Squeeze", "Unflatten"}
VIEWS = RESHAPES | {"Broadcast", "Slice", "Split", "Transpose"}
# Head widths of fused attention (mlx/backend/metal/scaled_dot_product_attention.cpp,
# has_fused_kernel; mlx/backend/cuda/scaled_dot_product_attention.cpp, supports_sdpa_cudnn).
FUSED_WIDTHS = {"metal": {64, 72, 80, 96, 128}, "cuda": set(range(8, 129, 8))}


@dataclass(frozen=True)
class Operation:
    """One kernel: what it is, multiply-accumulates, bytes read and written."""

    name: str
    macs: int
    bytes: int


@dataclass(frozen=True)
class Total:
    operations: int
    macs: int
    bytes: int
    # Depthwise convolutions that Metal's own kernel does not take.
    slow_convolutions: int


def total(graph: list[Traced], device: str, *, compiled: bool) -> Total:
    """Count a graph; `compiled` joins elementwise operations as mx.compile does."""
    found = operations(graph, device, compiled=compiled)
    return Total(
        len(found),
        sum(operation.macs for operation in found),
        sum(operation.bytes for operation in found),
        sum(node["name"] == "Convolution" and _slow(node) for node in graph),
    )


def operations(graph: list[Traced], device: str, *, compiled: bool) -> list[Operation]:
    """The kernels of a graph on "metal" or "cuda", in order."""
    joined = _join(graph) if compiled else {}
    arrays: dict[str, np.ndarray] = {}
    sizes: dict[str, int] = {}
    found: list[Operation] = []

    def layout(value: tuple[str, list[int], int]) -> np.ndarray:
        """An array of bytes of the same shape and strides: it is never written to."""
        name, shape, size = value
        sizes[name] = size
        if name not in arrays:
            arrays[name] = np.empty(shape, np.uint8)
        return arrays[name]

    def size_of(name: str) -> int:
        array = arrays[name]
        # What is broadcast is read once.
        dims = zip(array.shape, array.strides, strict=True)
        return prod(n for n, stride in dims if stride or n == 1) * sizes[name]

    def copied(name: str) -> None:
        found.append(Operation("Copy", 0, 2 * size_of(name)))

    inner = {index for members, _ in joined.values() for index in members}
    for index, node in enumerate(graph):
        inputs = [layout(value) for value in node["inputs"]]
        names = [name for name, *_ in node["inputs"]]
        out = node["outputs"][0][0]
        kind, arguments = node["name"], node["arguments"]
        if kind == "Broadcast":
            arrays[out] = np.broadcast_to(inputs[0], node["outputs"][0][1])
        elif kind in RESHAPES:
            flat = inputs[0].reshape(node["outputs"][0][1])
            if not np.may_share_memory(flat, inputs[0]):
                copied(names[0])
                flat = np.empty(flat.shape, np.uint8)
            arrays[out] = flat
        elif kind == "Transpose":
            arrays[out] = inputs[0].transpose(arguments[0])
        elif kind == "Slice":
            start, stop, step = arguments
            cut = tuple(slice(*bounds) for bounds in zip(start, stop, step, strict=True))
            arrays[out] = inputs[0][cut]
        elif kind == "Split":
            parts = np.split(inputs[0], arguments[0], arguments[1])
            for (name, *_), part in zip(node["outputs"], parts, strict=True):
                arrays[name] = part
        for value in node["outputs"]:
            layout(value)
        if kind in VIEWS or index in inner:
            continue
        if kind == ATTENTION:
            # The inner of the two has keys and values.
            if len(found) and found[-1].name == "keys and values":
                key_value = found.pop()
                found += _attention(node, key_value.bytes // 2, FUSED_WIDTHS[device])
            else:
                found.append(Operation("keys and values", 0, sum(map(size_of, names))))
            continue
        if kind == "Convolution" and not inputs[0].flags.c_contiguous:
            copied(names[0])
        if kind in ("Matmul", "AddMM"):
            for name in names[:2]:
                if 1 not in arrays[name].strides[-2:]:
                    copied(name)
        read = joined[index][1] if index in joined else set(names)
        moved = sum(map(size_of, read)) + sum(size_of(name) for name, *_ in node["outputs"])
        label = {LAYER_NORM: "LayerNorm"}.get(kind, kind)
        found.append(Operation("Elementwise" if kind in ELEMENTWISE else label, _macs(node), moved))
    return found


def _attention(node: Traced, one: int, fused: set[int]) -> list[Operation]:
    """`one` is the bytes of queries, of keys, of values and of the result alike."""
    _, shape, size = node["outputs"][0]
    *batch, places, width = shape
    macs = prod(batch) * places**2 * width
    scores = prod(batch) * places**2 * size
    if width in fused:
        return [Operation("Attention", 2 * macs, 4 * one)]
    return [
        Operation("Elementwise", 0, 2 * one),
        Operation("Matmul", macs, 2 * one + scores),
        Operation("Softmax", 0, 2 * scores),
        Operation("Matmul", macs, 2 * one + scores),
    ]


def _macs(node: Traced) -> int:
    shape = node["outputs"][0][1]
    if node["name"] in ("Matmul", "AddMM"):
        return prod(shape) * int(node["inputs"][0][1][-1])
    if node["name"] == "Convolution":
        return prod(shape) * prod(node["inputs"][1][1][1:])
    return 0


def _slow(node: Traced) -> bool:
    """Grouped, and not what `depthwise_conv_2D_gpu` takes (mlx/backend/metal/conv.cpp)."""
    channels = node["inputs"][0][1][-1]
    outputs, high, wide, columns = node["inputs"][1][1]
    strides = node["arguments"][0]
    if columns == channels:
        return False
    return (
        columns != 1
        or outputs != channels
        or max(high, wide) > 7
        or max(strides) > 2
        or channels % 16 != 0
    )


def _join(graph: list[Traced]) -> dict[int, tuple[set[int], set[str]]]:
    """What mx.compile joins (mlx/compile.cpp, compile_fuse): by the last operation's index, the
    indices of the others, and the names of what they all read."""
    maker = {value[0]: index for index, node in enumerate(graph) for value in node["outputs"]}
    readers: dict[str, list[int]] = {}
    for index, node in enumerate(graph):
        for name, *_ in node["inputs"]:
            readers.setdefault(name, []).append(index)
    groups: dict[int, tuple[set[int], set[str]]] = {}
    done: set[int] = set()
    for last in reversed(range(len(graph))):
        if last in done or graph[last]["name"] not in ELEMENTWISE:
            continue
        group = {last}

        def visit(name: str, depth: int, group: set[int] = group) -> None:
            index = maker.get(name)
            if index is None or index in group or depth >= MAX_DEPTH:
                return
            kind = graph[index]["name"]
            joins = kind in ELEMENTWISE and all(reader in group for reader in readers[name])
            # A broadcast is joined for each of those that read it.
            if joins or kind == "Broadcast":
                group.add(index)
                for inner, *_ in graph[index]["inputs"]:
                    visit(inner, depth + 1)

        for name, *_ in graph[last]["inputs"]:
            visit(name, 1)
        made = {value[0] for index in group for value in graph[index]["outputs"]}
        read = {name for index in group for name, *_ in graph[index]["inputs"]} - made
        others = {index for index in group if graph[index]["name"] in ELEMENTWISE} - {last}
        done |= others
        groups[last] = others, read
    return groups
