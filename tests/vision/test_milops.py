"""Every operation that the evaluator knows, against torch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from programs import build, ct, mb, normal, run, t

from fastvlm_mlx.errors import EncoderError
from fastvlm_mlx.vision.package import describe
from fastvlm_mlx.vision.program import milops
from fastvlm_mlx.vision.program.milops import BUILDERS
from fastvlm_mlx.vision.program.mlprogram import MLProgram


@dataclass(frozen=True)
class Case:
    """Shapes of the inputs, the operation, and what torch makes of the same inputs."""

    shapes: list[tuple[int, ...]]
    body: Callable[..., Any]
    expected: Callable[..., Any]
    positive: bool = False


def conv_case(
    shape: tuple[int, ...], weight: np.ndarray, expected: Callable[..., Any], **parameters: Any
) -> Case:
    return Case([shape], lambda a: mb.conv(x=a, weight=weight, **parameters), expected)


def unary_case(build_op: Callable[..., Any], expected: Callable[..., Any]) -> Case:
    return Case([(2, 3, 4)], lambda a: build_op(x=a), expected, positive=True)


def binary_case(build_op: Callable[..., Any], expected: Callable[..., Any]) -> Case:
    return Case([(2, 3, 4), (3, 1)], lambda a, b: build_op(x=a, y=b), expected, positive=True)


W1, W2, W3D = normal(6, 4, 3), normal(6, 2, 3, 3), normal(3, 2, 2, 3, 3)
EVEN = normal(4, 4, 5, 4)
DEPTHWISE = normal(16, 1, 7, 7)
BIAS6, BIAS5 = normal(6), normal(5)
GAMMA, BETA, MEAN, VARIANCE = normal(8), normal(8), normal(8), np.abs(normal(8)) + 0.5
GAMMA2, BETA2 = normal(8, 4), normal(8, 4)
LINEAR = normal(5, 6)

CASES: dict[str, Case] = {
    "conv": conv_case((1, 2, 9, 8), W2, lambda x: F.conv2d(x, t(W2))),
    "conv, bias, groups, strides, pad": conv_case(
        (1, 4, 9, 8),
        W2,
        lambda x: F.conv2d(x, t(W2), t(BIAS6), (2, 1), (1, 2), 1, 2),
        bias=BIAS6,
        groups=2,
        strides=[2, 1],
        pad_type="custom",
        pad=[1, 1, 2, 2],
    ),
    "conv, pads unlike before and after": conv_case(
        (1, 2, 9, 8),
        W2,
        lambda x: F.conv2d(F.pad(x, (2, 1, 0, 3)), t(W2)),
        pad_type="custom",
        pad=[0, 3, 2, 1],
    ),
    "conv, dilations": conv_case(
        (1, 2, 12, 12), W2, lambda x: F.conv2d(x, t(W2), dilation=(2, 3)), dilations=[2, 3]
    ),
    "conv, same": conv_case(
        (1, 4, 9, 9), EVEN, lambda x: F.conv2d(F.pad(x, (1, 2, 2, 2)), t(EVEN)), pad_type="same"
    ),
    "conv, same, strides": conv_case(
        (1, 4, 9, 10),
        EVEN,
        lambda x: F.conv2d(F.pad(x, (1, 1, 2, 2)), t(EVEN), stride=2),
        pad_type="same",
        strides=[2, 2],
    ),
    "conv, same_lower": conv_case(
        (1, 4, 9, 9),
        EVEN,
        lambda x: F.conv2d(F.pad(x, (2, 1, 2, 2)), t(EVEN)),
        pad_type="same_lower",
    ),
    "conv, valid": conv_case((1, 2, 9, 8), W2, lambda x: F.conv2d(x, t(W2)), pad_type="valid"),
    "conv, depthwise, twice as many out": conv_case(
        (1, 8, 9, 9),
        DEPTHWISE,
        lambda x: F.conv2d(x, t(DEPTHWISE), None, 2, 3, 1, 8),
        groups=8,
        strides=[2, 2],
        pad_type="custom",
        pad=[3, 3, 3, 3],
    ),
    "conv, one dimension": conv_case(
        (1, 4, 9), W1, lambda x: F.conv1d(x, t(W1), stride=2), strides=[2]
    ),
    "conv, three dimensions": conv_case((1, 2, 4, 5, 6), W3D, lambda x: F.conv3d(x, t(W3D))),
    "conv, weight computed": Case(
        [(1, 2, 6, 6), (3, 2, 3, 3)],
        lambda a, b: mb.conv(x=a, weight=b),
        lambda a, b: F.conv2d(a, b),
    ),
    "avg_pool": Case(
        [(1, 3, 9, 8)],
        lambda a: mb.avg_pool(
            x=a, kernel_sizes=[3, 2], strides=[2, 1], pad_type="custom", pad=[1, 1, 0, 0]
        ),
        lambda x: F.avg_pool2d(x, (3, 2), (2, 1), (1, 0)),
    ),
    "avg_pool, padding excluded": Case(
        [(1, 3, 9, 8)],
        lambda a: mb.avg_pool(
            x=a,
            kernel_sizes=[3, 3],
            pad_type="custom",
            pad=[1, 1, 1, 1],
            exclude_padding_from_average=True,
        ),
        lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    ),
    "linear": Case(
        [(2, 3, 6)],
        lambda a: mb.linear(x=a, weight=LINEAR, bias=BIAS5),
        lambda x: F.linear(x, t(LINEAR), t(BIAS5)),
    ),
    "linear, no bias": Case(
        [(2, 6)], lambda a: mb.linear(x=a, weight=LINEAR), lambda x: F.linear(x, t(LINEAR))
    ),
    "matmul": Case([(2, 3, 4), (2, 4, 5)], lambda a, b: mb.matmul(x=a, y=b), torch.matmul),
    "matmul, transpose_x": Case(
        [(1, 2, 4, 3), (1, 2, 4, 5)],
        lambda a, b: mb.matmul(x=a, y=b, transpose_x=True),
        lambda a, b: a.mT @ b,
    ),
    "matmul, transpose_y": Case(
        [(1, 2, 3, 4), (1, 2, 5, 4)],
        lambda a, b: mb.matmul(x=a, y=b, transpose_y=True),
        lambda a, b: a @ b.mT,
    ),
    "matmul, both": Case(
        [(4, 3), (5, 4)],
        lambda a, b: mb.matmul(x=a, y=b, transpose_x=True, transpose_y=True),
        lambda a, b: a.mT @ b.mT,
    ),
    "layer_norm, channels": Case(
        [(1, 8, 5, 4)],
        lambda a: mb.layer_norm(x=a, axes=[1], gamma=GAMMA, beta=BETA, epsilon=0.25),
        lambda x: F.layer_norm(x.movedim(1, 3), (8,), t(GAMMA), t(BETA), 0.25).movedim(3, 1),
    ),
    "layer_norm, plain": Case(
        [(2, 3, 8)],
        lambda a: mb.layer_norm(x=a, axes=[-1]),
        lambda x: F.layer_norm(x, (8,), eps=1e-5),
    ),
    "layer_norm, axes not next to each other": Case(
        [(2, 8, 3, 4)],
        lambda a: mb.layer_norm(x=a, axes=[1, 3], gamma=GAMMA2, beta=BETA2),
        lambda x: F.layer_norm(x.permute(0, 2, 1, 3), (8, 4), t(GAMMA2), t(BETA2)).permute(
            0, 2, 1, 3
        ),
    ),
    "layer_norm, every axis": Case(
        [(2, 3, 4)],
        lambda a: mb.layer_norm(x=a, axes=[0, 1, 2]),
        lambda x: F.layer_norm(x, (2, 3, 4)),
    ),
    "layer_norm, gamma only": Case(
        [(2, 8)],
        lambda a: mb.layer_norm(x=a, axes=[1], gamma=GAMMA),
        lambda x: F.layer_norm(x, (8,), t(GAMMA)),
    ),
    "batch_norm": Case(
        [(1, 8, 5, 4)],
        lambda a: mb.batch_norm(
            x=a, mean=MEAN, variance=VARIANCE, gamma=GAMMA, beta=BETA, epsilon=0.1
        ),
        lambda x: F.batch_norm(x, t(MEAN), t(VARIANCE), t(GAMMA), t(BETA), eps=0.1),
    ),
    "batch_norm, plain": Case(
        [(1, 8, 5, 4)],
        lambda a: mb.batch_norm(x=a, mean=MEAN, variance=VARIANCE),
        lambda x: F.batch_norm(x, t(MEAN), t(VARIANCE)),
    ),
    "gelu": Case([(3, 40)], lambda a: mb.gelu(x=a), F.gelu),
    "gelu, exact": Case([(3, 40)], lambda a: mb.gelu(x=a, mode="EXACT"), F.gelu),
    "gelu, tanh": Case(
        [(3, 40)],
        lambda a: mb.gelu(x=a, mode="TANH_APPROXIMATION"),
        lambda x: F.gelu(x, approximate="tanh"),
    ),
    "gelu, sigmoid": Case(
        [(3, 40)],
        lambda a: mb.gelu(x=a, mode="SIGMOID_APPROXIMATION"),
        lambda x: x * torch.sigmoid(1.702 * x),
    ),
    "softmax": Case([(2, 3, 4)], lambda a: mb.softmax(x=a), lambda x: x.softmax(-1)),
    "softmax, axis": Case([(2, 3, 4)], lambda a: mb.softmax(x=a, axis=1), lambda x: x.softmax(1)),
    "reshape": Case(
        [(2, 3, 4)], lambda a: mb.reshape(x=a, shape=[4, 6]), lambda x: x.reshape(4, 6)
    ),
    "reshape, inferred": Case(
        [(2, 3, 4)], lambda a: mb.reshape(x=a, shape=[0, 2, -1]), lambda x: x.reshape(2, 2, 6)
    ),
    "transpose": Case(
        [(2, 3, 4)], lambda a: mb.transpose(x=a, perm=[2, 0, 1]), lambda x: x.permute(2, 0, 1)
    ),
    "squeeze": Case([(1, 3, 1, 4)], lambda a: mb.squeeze(x=a, axes=[2]), lambda x: x.squeeze(2)),
    "squeeze, every axis": Case([(1, 3, 1, 4)], lambda a: mb.squeeze(x=a), lambda x: x.squeeze()),
    "expand_dims": Case(
        [(3, 4)], lambda a: mb.expand_dims(x=a, axes=[0, -1]), lambda x: x[None, ..., None]
    ),
    "split, sizes": Case(
        [(1, 7, 4)],
        lambda a: mb.split(x=a, split_sizes=[2, 4, 1], axis=1),
        lambda x: x.split([2, 4, 1], 1),
    ),
    "split, count": Case(
        [(1, 6, 4)], lambda a: mb.split(x=a, num_splits=3, axis=1), lambda x: x.chunk(3, 1)
    ),
    "concat": Case(
        [(2, 3), (2, 5)],
        lambda a, b: mb.concat(values=[a, b], axis=1),
        lambda a, b: torch.cat([a, b], 1),
    ),
    "slice_by_index": Case(
        [(5, 6, 7)],
        lambda a: mb.slice_by_index(
            x=a,
            begin=[1, 0, 2],
            end=[4, 0, 3],
            stride=[2, 1, 1],
            begin_mask=[False, True, False],
            end_mask=[False, True, False],
            squeeze_mask=[False, False, True],
        ),
        lambda x: x[1:4:2, :, 2],
    ),
    "slice_by_index, one place of a masked beginning": Case(
        [(5, 6, 7)],
        lambda a: mb.slice_by_index(
            x=a,
            begin=[3, 0, -2],
            end=[4, 6, 6],
            begin_mask=[True, False, False],
            end_mask=[True, False, False],
            squeeze_mask=[True, False, True],
        ),
        lambda x: x[0, :, -2],
    ),
    "reduce_mean": Case(
        [(1, 3, 4, 5)],
        lambda a: mb.reduce_mean(x=a, axes=[2, 3], keep_dims=True),
        lambda x: x.mean((2, 3), keepdim=True),
    ),
    "reduce_mean, axes dropped": Case(
        [(1, 3, 4, 5)], lambda a: mb.reduce_mean(x=a, axes=[-1]), lambda x: x.mean(-1)
    ),
    "reduce_sum": Case(
        [(2, 3, 4)], lambda a: mb.reduce_sum(x=a, axes=[0, 2]), lambda x: x.sum((0, 2))
    ),
    "rsqrt": Case(
        [(2, 3)], lambda a: mb.rsqrt(x=a, epsilon=0.5), lambda x: (x + 0.5).rsqrt(), positive=True
    ),
    "rsqrt, default": unary_case(mb.rsqrt, torch.rsqrt),
    "identity": unary_case(mb.identity, lambda x: x),
    "relu": Case([(3, 4)], lambda a: mb.relu(x=a), torch.relu),
    "sigmoid": unary_case(mb.sigmoid, torch.sigmoid),
    "tanh": unary_case(mb.tanh, torch.tanh),
    "erf": unary_case(mb.erf, torch.erf),
    "sqrt": unary_case(mb.sqrt, torch.sqrt),
    "square": unary_case(mb.square, torch.square),
    "add": binary_case(mb.add, torch.add),
    "sub": binary_case(mb.sub, torch.sub),
    "mul": binary_case(mb.mul, torch.mul),
    "real_div": binary_case(mb.real_div, torch.div),
    "pow": binary_case(mb.pow, torch.pow),
    "maximum": binary_case(mb.maximum, torch.maximum),
    "minimum": binary_case(mb.minimum, torch.minimum),
    "add, a number": Case([(2, 3)], lambda a: mb.add(x=a, y=1.5), lambda x: x + 1.5),
    "cast, to whole numbers and back": Case(
        [(3, 4)],
        lambda a: mb.cast(x=mb.cast(x=mb.mul(x=a, y=9.0), dtype="int32"), dtype="fp32"),
        lambda x: (9 * x).trunc(),
    ),
    "identity, an input used twice": Case(
        [(2, 3)],
        lambda a: [mb.identity(x=a), mb.relu(x=a)],
        lambda x: [x, x.relu()],
    ),
}


def test_every_operation_known_is_compared() -> None:
    compared = {name.partition(",")[0] for name in CASES}
    assert set(BUILDERS) <= compared


@pytest.mark.parametrize("name", CASES)
def test_operation(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    inputs = [normal(*shape) for shape in case.shapes]
    if case.positive:
        inputs = [np.abs(x) + 0.1 for x in inputs]
    expected = case.expected(*(t(x) for x in inputs))
    found = run(build(tmp_path, case.shapes, case.body), *inputs)
    expected = [expected] if isinstance(expected, torch.Tensor) else list(expected)
    assert len(found) == len(expected)
    for got, wanted in zip(found, expected, strict=True):
        assert got.shape == wanted.shape
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", ["iOS16", "iOS17", "iOS18"])
def test_operations_of_later_systems_read_the_same(target: str, tmp_path: Path) -> None:
    def body(a: Any) -> Any:
        x = mb.conv(x=a, weight=W2, bias=BIAS6, pad_type="custom", pad=[1, 1, 1, 1])
        x = mb.layer_norm(x=mb.gelu(x=x), axes=[1])
        left, right = mb.split(x=mb.reshape(x=x, shape=[1, 6, 16]), num_splits=2, axis=1)
        return mb.softmax(x=mb.matmul(x=left, y=right, transpose_x=True), axis=-1)

    images = normal(1, 2, 4, 4)
    x = F.gelu(F.conv2d(t(images), t(W2), t(BIAS6), padding=1))
    x = F.layer_norm(x.movedim(1, 3), (6,)).movedim(3, 1).reshape(1, 6, 16)
    expected = (x[:, :3].mT @ x[:, 3:]).softmax(-1)
    package = build(tmp_path, [(1, 2, 4, 4)], body, target=getattr(ct.target, target))
    assert describe(package).deployment_target.startswith(target)
    torch.testing.assert_close(run(package, images)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (lambda a: mb.cos(x=a), r"operation cos 'cos_0' is not known"),
        (lambda a: mb.concat(values=[a, a], axis=1, interleave=True), "concat .* interleave"),
        (
            lambda a: mb.avg_pool(x=a, kernel_sizes=[2, 2], pad_type="same"),
            "avg_pool .* pad_type 'same'",
        ),
        (
            lambda a: mb.avg_pool(
                x=a, kernel_sizes=[2, 2], strides=[2, 2], pad_type="valid", ceil_mode=True
            ),
            "avg_pool .* ceil_mode",
        ),
        (
            lambda a: mb.slice_by_index(
                x=a, begin=[0, 3, 0, 0], end=[1, 0, 4, 4], stride=[1, -1, 1, 1]
            ),
            "slice_by_index .* stride",
        ),
    ],
)
def test_what_is_not_known_is_an_error_that_names_it(
    body: Callable[..., Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(EncoderError, match=message):
        MLProgram(build(tmp_path, [(1, 4, 5, 5)], body))


def test_a_parameter_that_no_builder_reads_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BUILDERS, "softmax", functools.partial(milops.unary, "exp"))
    with pytest.raises(EncoderError, match=r"softmax .* parameters axis"):
        MLProgram(build(tmp_path, [(2, 3)], lambda a: mb.softmax(x=a, axis=0)))
