"""Counting an encoder's operations and bytes, held to MLX's own graph and to counts by hand."""

import mlx.core as mx

from benchmarks.operations.__main__ import encoder_of_zeros, ours
from benchmarks.operations.count import VIEWS, Operation, operations, total
from benchmarks.operations.trace import trace
from fastvlm_mlx.bundle.config import VisionConfig

SMALL = VisionConfig(image_size=128, layers=(1, 2, 1, 2, 1), embed_dims=(16, 32, 32, 64, 128))
# Nothing that MLX writes out where there is no GPU.
CONVOLUTIONS = VisionConfig(
    image_size=64,
    layers=(1, 1, 1, 2, 1),
    embed_dims=(16, 16, 32, 32, 64),
    token_mixers=("repmixer",) * 5,
)


def compiled_by_mlx(function, image, tmp_path):
    """The operations of what mx.compile makes, from the graph that MLX draws of it."""
    # Loading a language model turns it off where there is no GPU.
    mx.enable_compile()
    try:
        mx.export_to_dot(str(tmp_path / "graph.dot"), mx.compile(function)(image))
    finally:
        mx.disable_compile()
    lines = (tmp_path / "graph.dot").read_text().splitlines()
    names = [line.split('label ="')[1].split('"')[0] for line in lines if "label =" in line]
    return [name for name in names if name not in VIEWS]


def test_as_many_operations_as_mlx_compiles(tmp_path):
    encoder = encoder_of_zeros(CONVOLUTIONS, "metal")
    image = mx.zeros((1, 64, 64, 3), mx.float16)
    mx.eval(image)
    found = operations(trace(encoder.graph, image), "metal", compiled=True)
    # The last one puts channels in order, which MLX calls a view and copies.
    assert found[-1].name == "Copy"
    assert len(found) - 1 == len(compiled_by_mlx(encoder.graph, image, tmp_path))


def test_what_is_counted_by_hand():
    matrix, bias = mx.zeros((8, 16)), mx.zeros((16,))
    kernel = mx.zeros((16, 3, 3, 1))
    mx.eval(matrix, bias, kernel)

    def function(x):
        y = mx.conv2d(x @ matrix + bias, kernel, groups=16)
        return mx.maximum(y, 0).transpose(0, 3, 1, 2).flatten(1)

    graph = trace(function, mx.zeros((1, 4, 4, 8)))
    product = Operation("Matmul", 16 * 8 * 16, 4 * (16 * 8 + 8 * 16 + 16 * 16))
    bias_added = Operation("Elementwise", 0, 4 * (16 * 16 + 16 + 16 * 16))
    convolution = Operation("Convolution", 4 * 16 * 9, 4 * (16 * 16 + 16 * 9 + 4 * 16))
    positive = Operation("Elementwise", 0, 4 * (4 * 16 + 1 + 4 * 16))
    copy = Operation("Copy", 0, 4 * 2 * 4 * 16)
    expected = [product, bias_added, convolution, positive, copy]
    assert operations(graph, "metal", compiled=True) == expected
    assert operations(graph, "metal", compiled=False) == expected


def test_joined_only_where_compiled():
    def function(x):
        y = mx.erf(x * 2)
        return x + y

    graph = trace(function, mx.zeros((4, 4)))
    assert operations(graph, "metal", compiled=True) == [Operation("Elementwise", 0, 4 * 33)]
    assert len(operations(graph, "metal", compiled=False)) == 3


def test_attention_is_one_operation_where_a_kernel_takes_the_heads():
    def function(x):
        return mx.fast.scaled_dot_product_attention(x, x, x, scale=1.0)

    wide, narrow = (trace(function, mx.zeros((1, 2, 16, n), mx.float16)) for n in (64, 32))
    assert operations(wide, "metal", compiled=True) == [
        Operation("Attention", 2 * 2 * 16 * 16 * 64, 4 * 2 * 2 * 16 * 64)
    ]
    names = ["Elementwise", "Matmul", "Softmax", "Matmul"]
    assert [o.name for o in operations(narrow, "metal", compiled=True)] == names
    assert [o.name for o in operations(narrow, "cuda", compiled=True)] == ["Attention"]


def test_metal_s_kernels_take_all_of_ours():
    graph = ours(SMALL, "metal")
    found = operations(graph, "metal", compiled=True)
    # Three blocks, no scores, and nothing that Metal's depthwise kernel refuses.
    assert sum(o.name == "Attention" for o in found) == 3
    assert not any(o.name == "Softmax" for o in found)
    assert total(graph, "metal", compiled=True).slow_convolutions == 0
    grouped = mx.zeros((32, 3, 3, 1))
    plain = trace(lambda x: mx.conv2d(x, grouped, groups=16), mx.zeros((1, 4, 4, 16)))
    assert total(plain, "metal", compiled=True).slow_convolutions == 1
