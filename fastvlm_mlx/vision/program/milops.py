"""The operations of an ML Program, in torch.

One builder for each operation type: it reads an operation's parameters once and returns a function
of the operation's tensors. A parameter that a builder does not read, or a value it can't honour,
is an error. Semantics are those of coremltools' `converters/mil/mil/ops/defs`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from fastvlm_mlx.vision.program.operation import Operation

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Compute = Callable[..., Any]


# Computations that `fusion` knows when it sees them.


@dataclass(frozen=True)
class Convolution:
    """`uneven` is what `torch.nn.functional.pad` adds first, where `padding` can't say it."""

    function: Callable[..., Tensor]
    strides: list[int]
    padding: list[int]
    dilations: list[int]
    groups: int
    uneven: list[int]

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        import torch.nn.functional as F

        x = F.pad(x, self.uneven) if self.uneven else x
        return self.function(
            x, weight, bias, self.strides, self.padding, self.dilations, self.groups
        )


@dataclass(frozen=True)
class Matmul:
    """Whether the last two axes of the operands are exchanged before."""

    flip_x: bool
    flip_y: bool

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        x = x.transpose(-1, -2) if self.flip_x else x
        return x @ (y.transpose(-1, -2) if self.flip_y else y)


@dataclass(frozen=True)
class Softmax:
    axis: int

    def __call__(self, x: Tensor) -> Tensor:
        return x.softmax(self.axis)


@dataclass(frozen=True)
class Cast:
    dtype: torch.dtype

    def __call__(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


def _axes(values: Sequence[int] | int, rank: int) -> list[int]:
    return [int(v) % rank for v in ([values] if isinstance(values, int) else values)]


def conv(op: Operation) -> Compute:
    import torch.nn.functional as F

    op.tensor("x")
    op.tensor("weight")
    if op.has("bias"):
        op.tensor("bias")
    spatial = op.rank - 2
    convolve: Any = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}.get(spatial)
    if convolve is None:
        raise op.error(f"rank {op.rank}", "3, 4 or 5")
    strides = op.value("strides", [1] * spatial)
    dilations = op.value("dilations", [1] * spatial)
    groups = op.value("groups", 1)
    pad_type = op.value("pad_type", "valid")
    custom = op.value("pad", [0] * 2 * spatial)
    if pad_type not in ("valid", "custom", "same", "same_lower"):
        raise op.error(f"pad_type {pad_type!r}", "valid, custom, same or same_lower")
    (batch, _, *sizes), (channels, _, *kernel) = op.shape_of("x"), op.shape_of("weight")
    reach = [(n - 1) * dilation + 1 for n, dilation in zip(kernel, dilations, strict=True)]
    sides = [(0, 0)] * spatial
    if pad_type == "custom":
        sides = list(zip(custom[0::2], custom[1::2], strict=True))
    elif pad_type != "valid":
        totals = [
            max((-(-n // stride) - 1) * stride + length - n, 0)
            for n, stride, length in zip(sizes, strides, reach, strict=True)
        ]
        sides = [(total // 2, total - total // 2) for total in totals]
        if pad_type == "same_lower":
            sides = [(after, before) for before, after in sides]
    op.makes(batch, channels, *_windows(sizes, sides, reach, strides))
    even = all(before == after for before, after in sides)
    padding = [before if even else 0 for before, _ in sides]
    uneven = [] if even else [n for side in reversed(sides) for n in side]
    if uneven:
        padded = [n + sum(side) for n, side in zip(sizes, sides, strict=True)]
        op.works_with(*op.shape_of("x")[:2], *padded)
    return Convolution(convolve, strides, padding, dilations, groups, uneven)


def _windows(
    sizes: Sequence[int],
    sides: Sequence[tuple[int, int]],
    reach: Sequence[int],
    strides: Sequence[int],
) -> list[int]:
    """How often a window of `reach` places fits along each padded axis."""
    return [
        (n + before + after - length) // stride + 1
        for n, (before, after), length, stride in zip(sizes, sides, reach, strides, strict=True)
    ]


def avg_pool(op: Operation) -> Compute:
    import torch.nn.functional as F

    op.tensor("x")
    spatial = op.rank - 2
    if spatial != 2:
        raise op.error(f"rank {op.rank}", "4")
    kernel = op.value("kernel_sizes")
    stride = op.value("strides", [1] * spatial)
    pad_type, pad = op.value("pad_type", "valid"), op.value("pad", [0] * 2 * spatial)
    if pad_type not in ("valid", "custom"):
        raise op.error(f"pad_type {pad_type!r}", "valid or custom")
    pad = [0] * 2 * spatial if pad_type == "valid" else pad
    if pad[0::2] != pad[1::2]:
        raise op.error(f"pad {pad}", "the same before and after")
    if op.value("ceil_mode", False):
        raise op.error("ceil_mode", "sizes rounded down")
    batch, channels, *sizes = op.shape_of("x")
    sides = list(zip(pad[0::2], pad[1::2], strict=True))
    op.makes(batch, channels, *_windows(sizes, sides, kernel, stride))
    inside = op.value("exclude_padding_from_average", False)
    op.places = prod(kernel)
    return lambda x: F.avg_pool2d(x, kernel, stride, pad[0::2], False, not inside)


def linear(op: Operation) -> Compute:
    import torch.nn.functional as F

    op.tensor("x")
    op.tensor("weight")
    if op.has("bias"):
        op.tensor("bias")
    op.makes(*op.shape_of("x")[:-1], op.shape_of("weight")[0])
    return F.linear


def matmul(op: Operation) -> Compute:
    op.tensor("x")
    op.tensor("y")
    flip_x, flip_y = op.value("transpose_x", False), op.value("transpose_y", False)
    x_shape, y_shape = op.shape_of("x"), op.shape_of("y")
    batch = np.broadcast_shapes(x_shape[:-2], y_shape[:-2])
    op.makes(*batch, x_shape[-1 if flip_x else -2], y_shape[-2 if flip_y else -1])
    # torch repeats the one whose batch is broadcast.
    op.works_with(*batch, *x_shape[-2:])
    op.works_with(*batch, *y_shape[-2:])
    return Matmul(flip_x, flip_y)


def layer_norm(op: Operation) -> Compute:
    import torch.nn.functional as F

    op.tensor("x")
    affine = [name for name in ("gamma", "beta") if op.has(name)]
    for name in affine:
        op.tensor(name)
    epsilon = op.value("epsilon", 1e-5)
    rank = op.rank
    axes = _axes(op.value("axes", list(range(rank))), rank)
    if axes != sorted(set(axes)):
        raise op.error(f"axes {axes}", "ascending ones")
    order = [i for i in range(rank) if i not in axes] + axes
    back = [order.index(i) for i in range(rank)]

    def compute(x: Tensor, *parameters: Tensor) -> Tensor:
        given = dict(zip(affine, parameters, strict=True))
        z = x.permute(order)
        shape = z.shape[rank - len(axes) :]
        z = F.layer_norm(z, shape, given.get("gamma"), given.get("beta"), epsilon)
        return z.permute(back)

    return compute


def batch_norm(op: Operation) -> Compute:
    import torch.nn.functional as F

    for name in ("x", "mean", "variance"):
        op.tensor(name)
    affine = [name for name in ("gamma", "beta") if op.has(name)]
    for name in affine:
        op.tensor(name)
    epsilon = op.value("epsilon", 1e-5)

    def compute(x: Tensor, mean: Tensor, variance: Tensor, *parameters: Tensor) -> Tensor:
        given = dict(zip(affine, parameters, strict=True))
        return F.batch_norm(x, mean, variance, given.get("gamma"), given.get("beta"), eps=epsilon)

    return compute


def gelu(op: Operation) -> Compute:
    import torch.nn.functional as F

    op.tensor("x")
    mode = op.value("mode", "EXACT")
    if mode == "EXACT":
        return F.gelu
    if mode == "TANH_APPROXIMATION":
        return functools.partial(F.gelu, approximate="tanh")
    if mode == "SIGMOID_APPROXIMATION":
        return lambda x: x * (1.702 * x).sigmoid()
    raise op.error(f"mode {mode!r}", "EXACT, TANH_APPROXIMATION or SIGMOID_APPROXIMATION")


def softmax(op: Operation) -> Compute:
    op.tensor("x")
    return Softmax(op.value("axis", -1))


def cast(op: Operation) -> Compute:
    import torch

    op.tensor("x")
    dtype = op.value("dtype")
    # fp16 is a matter of rounding, which is the evaluator's; the arithmetic is fp32 throughout.
    kinds = {
        "fp16": ("float16", torch.float32),
        "fp32": ("float32", torch.float32),
        "int32": ("int32", torch.int32),
        "bool": ("bool", torch.bool),
    }
    if dtype not in kinds:
        raise op.error(f"dtype {dtype!r}", ", ".join(kinds))
    declared, kind = kinds[dtype]
    if op.dtype != declared:
        raise op.error(f"dtype {dtype!r} and a result of {op.dtype}", "the same type")
    return Cast(kind)


def reshape(op: Operation) -> Compute:
    op.tensor("x")
    op.value("shape")
    # The inferred shape: 0 and -1 in the parameter are resolved in it.
    shape = op.shape
    return lambda x: x.reshape(shape)


def transpose(op: Operation) -> Compute:
    op.tensor("x")
    perm = op.value("perm")
    return lambda x: x.permute(perm)


def change_axes(op: Operation) -> Compute:
    """`squeeze` and `expand_dims`, whose shapes the program declares."""
    op.tensor("x")
    op.value("axes")
    shape = op.shape
    return lambda x: x.reshape(shape)


def split(op: Operation) -> Compute:
    op.tensor("x")
    axis, sizes, count = op.value("axis"), op.value("split_sizes"), op.value("num_splits")

    def compute(x: Tensor) -> Any:
        return x.split(sizes if sizes is not None else x.shape[axis] // count, axis)

    return compute


def concat(op: Operation) -> Compute:
    import torch

    op.tensor("values")
    axis = op.value("axis")
    if op.value("interleave", False):
        raise op.error("interleave", "plain concatenation")
    shapes = [variable.shape for variable in op.operands]
    sizes = list(shapes[0])
    sizes[axis] = sum(shape[axis] for shape in shapes)
    op.makes(*sizes)
    return lambda *values: torch.cat(values, axis)


def slice_by_index(op: Operation) -> Compute:
    op.tensor("x")
    rank = op.rank
    begin, end = op.value("begin"), op.value("end")
    stride = op.value("stride", [1] * rank)
    no = [False] * rank
    from_start, to_end = op.value("begin_mask", no), op.value("end_mask", no)
    single = op.value("squeeze_mask", no)
    if min(stride) < 1:
        raise op.error(f"stride {stride}", "positive ones")
    first = [0 if from_start[i] else begin[i] for i in range(rank)]
    index = tuple(
        first[i] if single[i] else slice(first[i], None if to_end[i] else end[i], stride[i])
        for i in range(rank)
    )
    return lambda x: x[index]


def reduce(name: str, op: Operation) -> Compute:
    import torch

    op.tensor("x")
    axes = _axes(op.value("axes", list(range(op.rank))), op.rank)
    keep = op.value("keep_dims", False)
    if name == "mean":
        op.places = prod(op.shape_of("x")[axis] for axis in axes)
    function: Any = getattr(torch, name)
    return lambda x: function(x, axes, keepdim=keep)


def unary(name: str, op: Operation) -> Compute:
    import torch

    op.tensor("x")
    return getattr(torch, name)


def binary(name: str, op: Operation) -> Compute:
    import torch

    op.tensor("x")
    op.tensor("y")
    op.makes(*np.broadcast_shapes(op.shape_of("x"), op.shape_of("y")))
    return getattr(torch, name)


def rsqrt(op: Operation) -> Compute:
    op.tensor("x")
    epsilon = op.value("epsilon", 1e-12)
    return lambda x: (x + epsilon).rsqrt()


# Those that torch calls as MIL does.
_UNARY = ("relu", "sigmoid", "tanh", "erf", "sqrt", "square")
_BINARY = ("add", "sub", "mul", "pow", "maximum", "minimum")

BUILDERS: dict[str, Callable[[Operation], Compute]] = {
    "conv": conv,
    "avg_pool": avg_pool,
    "linear": linear,
    "matmul": matmul,
    "layer_norm": layer_norm,
    "batch_norm": batch_norm,
    "gelu": gelu,
    "softmax": softmax,
    "cast": cast,
    "reshape": reshape,
    "transpose": transpose,
    "squeeze": change_axes,
    "expand_dims": change_axes,
    "split": split,
    "concat": concat,
    "slice_by_index": slice_by_index,
    "rsqrt": rsqrt,
    **{f"reduce_{n}": functools.partial(reduce, t) for n, t in [("mean", "mean"), ("sum", "sum")]},
    "identity": functools.partial(unary, "clone"),
    "real_div": functools.partial(binary, "true_divide"),
    **{n: functools.partial(unary, n) for n in _UNARY},
    **{n: functools.partial(binary, n) for n in _BINARY},
}
