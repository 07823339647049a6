"""The operations of an encoder in MLX, read from the graph that MLX makes of it.

    PYTHON trace.py SIZE

prints those of mlx-vlm's encoder as JSON, if PYTHON has mlx-vlm. It knows nothing of this
repository. Nothing is computed: MLX makes a graph first, and here it is read instead of evaluated.
On a machine without a GPU MLX writes its fused operations out, so each has a stand-in while the
graph is made, an operation of the same inputs that no encoder has.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import mlx.core as mx

# One operation of the graph: its name, its settings, and what goes in and comes out, each array
# with its name, its shape, and the bytes of one element.
Traced = dict[str, Any]

LAYER_NORM, ATTENTION = "ArcTanh", "ArcTan2"


def _layer_norm(x: mx.array, *_: Any) -> mx.array:
    return mx.arctanh(x)


def _attention(q: mx.array, k: mx.array, v: mx.array, **_: Any) -> mx.array:
    return mx.arctan2(q, mx.arctan2(k, v))


def trace(function: Callable[[mx.array], mx.array], image: mx.array) -> list[Traced]:
    """What `function` computes of `image`, in order."""
    seen: list[dict[str, Any]] = []
    with ExitStack() as stack:
        stack.enter_context(patch.object(mx.fast, "layer_norm", _layer_norm))
        stack.enter_context(patch.object(mx.fast, "scaled_dot_product_attention", _attention))
        mx.export_function(seen.append, function, image)
    return [
        {
            "name": node["name"],
            "arguments": node["arguments"],
            "inputs": [(name, list(shape), dtype.size) for name, shape, dtype in node["inputs"]],
            "outputs": [(name, list(shape), dtype.size) for name, shape, dtype in node["outputs"]],
        }
        for node in seen
        if node["type"] == "primitive"
    ]


def mlx_vlm(size: int) -> list[Traced]:
    """mlx-vlm's encoder of FastVLM, in float16."""
    import mlx.nn as nn
    from mlx_vlm.models.fastvlm.config import VisionConfig
    from mlx_vlm.models.fastvlm.vision import VisionModel

    model = VisionModel(VisionConfig())
    model.set_dtype(mx.float16)
    model.eval()
    # Or making random weights would be counted.
    mx.eval(model.parameters())
    # MLX compiles its GELU by itself, so that it is one operation.
    with patch.object(nn.GELU, "__call__", lambda _, x: mx.erf(x)):
        return trace(lambda x: model(x)[1], mx.zeros((1, size, size, 3), mx.float16))


if __name__ == "__main__":
    json.dump(mlx_vlm(int(sys.argv[1])), sys.stdout, default=str)
