"""An encoder with its operations joined: the same features, and nothing joined that is needed."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from programs import build, mb, normal

import fastvlm_mlx
from fastvlm_mlx import vision
from fastvlm_mlx.bundle.bundle import Bundle
from fastvlm_mlx.errors import OptionError
from fastvlm_mlx.vision.program import fusion
from fastvlm_mlx.vision.program.mlprogram import MLProgram, MLProgramEncoder

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="operations are joined on x86 alone"
)
NATIVE = fusion.multiplies_bfloat16()
BFLOAT16 = pytest.mark.skipif(not NATIVE, reason="this CPU does not multiply bfloat16")

IN, MID, OUT = (normal(8, 4, 1, 1), normal(16, 8, 1, 1), normal(8, 16, 1, 1))
BIAS = normal(16)


def pointwise(x: Any, weight: np.ndarray, **options: Any) -> Any:
    return mb.conv(x=x, weight=weight, **options)


def both(directory: Path, body: Callable[..., Any], *inputs: np.ndarray) -> list[str]:
    """Evaluate a program op by op and joined; the types of what was left to compute."""
    package = build(directory, [x.shape for x in inputs], body)
    tensors = {n: torch.from_numpy(x) for n, x in zip("abcd", inputs, strict=False)}
    joined = MLProgram(package, fused_in="float32")
    expected = MLProgram(package).run(tensors)
    for found, wanted in zip(joined.run(tensors).values(), expected.values(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6 * float(wanted.abs().max()))
    return [type(step.compute).__name__ for step in joined._steps]


def test_a_convolution_takes_the_gelu_after_it(tmp_path: Path) -> None:
    def body(a: Any) -> Any:
        return mb.gelu(x=pointwise(a, IN), mode="EXACT")

    assert both(tmp_path, body, normal(1, 4, 6, 5)) == ["PackedConvolution"]


def test_and_the_addition_with_what_is_made_before_or_after(tmp_path: Path) -> None:
    def body(a: Any) -> Any:
        first = pointwise(a, IN)
        return mb.add(x=mb.relu(x=a), y=pointwise(first, normal(4, 8, 1, 1)))

    made = both(tmp_path, body, normal(1, 4, 6, 5))
    assert sorted(made) == ["PackedConvolution", "PackedConvolution", "builtin_function_or_method"]

    def two(a: Any) -> Any:
        return mb.add(x=pointwise(a, IN), y=pointwise(a, 2 * IN, bias=BIAS[:8]))

    assert both(tmp_path / "two", two, normal(1, 4, 6, 5)) == ["PackedConvolution"] * 2


@pytest.mark.parametrize("mode", ["read twice", "an output", "another gelu", "broadcast", "twice"])
def test_what_is_needed_elsewhere_or_is_something_else_stays(tmp_path: Path, mode: str) -> None:
    def body(a: Any) -> Any:
        made = pointwise(a, IN)
        if mode == "broadcast":
            return mb.add(x=made, y=normal(8, 1, 1))
        if mode == "twice":
            return mb.add(x=made, y=made)
        after = mb.gelu(x=made, mode="TANH_APPROXIMATION" if mode == "another gelu" else "EXACT")
        if mode == "read twice":
            return mb.mul(x=made, y=after)
        return [made, after] if mode == "an output" else after

    made = both(tmp_path, body, normal(1, 4, 6, 5))
    assert made[0] == "PackedConvolution"
    assert len(made) == (3 if mode == "read twice" else 2)


def test_grouped_and_unevenly_padded_convolutions_stay(tmp_path: Path) -> None:
    def body(a: Any) -> Any:
        grouped = mb.conv(x=a, weight=normal(4, 1, 3, 3), groups=4, pad_type="same")
        return mb.conv(x=grouped, weight=normal(4, 4, 2, 2), pad_type="custom", pad=[0, 1, 0, 1])

    assert both(tmp_path, body, normal(1, 4, 6, 5)) == ["Convolution", "Convolution"]


@pytest.mark.parametrize("rows", [6, 7])
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_large_result_between_two_is_made_by_bands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, kernel: int
) -> None:
    monkeypatch.setattr(fusion, "_BAND_BYTES", 16 * 2 * 5 * 4)

    def body(a: Any) -> Any:
        x = pointwise(a, normal(8, 4, 1, 1))
        middle = mb.gelu(x=pointwise(x, MID, bias=BIAS), mode="EXACT")
        last = mb.conv(x=middle, weight=normal(8, 16, kernel, kernel), pad_type="same")
        return mb.add(x=x, y=last)

    made = both(tmp_path, body, normal(1, 4, rows, 5))
    # A window of three reads rows of the next band.
    assert made[-1] == ("PackedPair" if kernel == 1 else "PackedConvolution")


@pytest.mark.parametrize("count", [3, 4])
def test_a_pair_takes_no_third_convolution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(fusion, "_BAND_BYTES", 64)

    def body(a: Any) -> Any:
        for _ in range(count):
            a = pointwise(a, normal(4, 4, 1, 1))
        return a

    left = ["PackedConvolution"] if count == 3 else ["PackedPair"]
    assert both(tmp_path, body, normal(1, 4, 6, 5)) == ["PackedPair", *left]


@pytest.mark.parametrize("flip_q", [False, True])
@pytest.mark.parametrize("flip_k", [False, True])
@pytest.mark.parametrize("flip_v", [False, True])
@pytest.mark.parametrize("across", [False, True])
def test_attention_is_one_operation_whichever_way_it_is_written(
    tmp_path: Path, flip_q: bool, flip_k: bool, flip_v: bool, across: bool
) -> None:
    tokens, width = 6, 4

    def given(flip: bool) -> np.ndarray:
        return normal(1, 2, *((width, tokens) if flip else (tokens, width)))

    def body(a: Any, b: Any, c: Any) -> Any:
        scores = mb.matmul(x=a, y=b, transpose_x=flip_q, transpose_y=not flip_k)
        shares = mb.softmax(x=scores, axis=-1)
        if across:
            return mb.matmul(x=c, y=shares, transpose_x=not flip_v, transpose_y=True)
        return mb.matmul(x=shares, y=c, transpose_y=flip_v)

    inputs = (given(flip_q), given(flip_k), given(flip_v))
    assert both(tmp_path, body, *inputs) == ["Attention"]


@pytest.mark.parametrize("mode", ["axis", "transposed", "scores", "heads"])
def test_and_what_only_looks_like_attention_stays(tmp_path: Path, mode: str) -> None:
    def body(a: Any, b: Any, c: Any) -> Any:
        scores = mb.matmul(x=a, y=b, transpose_y=True)
        shares = mb.softmax(x=scores, axis=2 if mode == "axis" else -1)
        made = mb.matmul(x=shares, y=c, transpose_x=mode == "transposed")
        return [made, scores] if mode == "scores" else made

    heads = 1 if mode == "heads" else 2
    inputs = (normal(1, 2, 6, 4), normal(1, 2, 6, 4), normal(1, heads, 6, 4))
    assert both(tmp_path, body, *inputs) == ["Matmul", "Softmax", "Matmul"]


@pytest.fixture(scope="module")
def pixels(demo_bundle: Path) -> np.ndarray:
    size = MLProgramEncoder(Bundle.open(demo_bundle).package).image_size
    return np.random.default_rng(1).random((1, 3, size, size), np.float32)


def snr(found: np.ndarray, expected: np.ndarray) -> float:
    return float(20 * np.log10(np.linalg.norm(expected) / np.linalg.norm(found - expected)))


def test_the_encoder_joined_has_the_same_features(demo_bundle: Path, pixels: np.ndarray) -> None:
    package = Bundle.open(demo_bundle).package
    exact = MLProgramEncoder(package)(pixels)
    joined = MLProgramEncoder(package, fused_in="float32")
    assert snr(joined(pixels), exact) > 100
    np.testing.assert_array_equal(joined(pixels), joined(pixels))
    # What was laid out is in memory once: left are the weights of depthwise convolutions.
    left = [tensor for tensor in joined.constants.values() if tensor.dim() == 4]
    assert left
    assert all(tensor.shape[1] == 1 for tensor in left)
    with pytest.raises(ValueError, match="single operations"):
        joined.evaluate(pixels, round_fp16=True)


@BFLOAT16
def test_in_bfloat16_it_is_near(demo_bundle: Path, pixels: np.ndarray) -> None:
    package = Bundle.open(demo_bundle).package
    exact = MLProgramEncoder(package)(pixels)
    found = MLProgramEncoder(package, fused_in="bfloat16")(pixels)
    assert found.dtype == np.float32
    assert 20 < snr(found, exact) < 60


@BFLOAT16
def test_where_nothing_is_joined_it_still_runs(
    demo_bundle: Path, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = Bundle.open(demo_bundle).package
    exact = MLProgramEncoder(package)(pixels)
    monkeypatch.setattr(fusion, "fuses", lambda: False)
    np.testing.assert_array_equal(MLProgramEncoder(package, fused_in="float32")(pixels), exact)
    assert 20 < snr(MLProgramEncoder(package, fused_in="bfloat16")(pixels), exact) < 60


@pytest.mark.parametrize(
    ("compute", "where", "said"),
    [
        ("bf16", "linux", "'bf16' is unknown: choose one of auto, float32, bfloat16"),
        ("float32", "darwin", "Core ML computes this one"),
        ("bfloat16", "darwin", "Core ML computes this one"),
        ("bfloat16", "no native", "does not multiply natively"),
    ],
)
def test_a_type_that_nothing_here_has_is_refused(
    demo_bundle: Path, monkeypatch: pytest.MonkeyPatch, compute: str, where: str, said: str
) -> None:
    if where == "darwin":
        monkeypatch.setattr(vision.sys, "platform", where)
    monkeypatch.setattr(fusion, "multiplies_bfloat16", lambda: where != "no native")
    with pytest.raises(OptionError, match=said):
        fastvlm_mlx.load(demo_bundle, encoder_compute=compute)


def test_an_encoder_in_mlx_takes_none(mlx_bundle: Path) -> None:
    with pytest.raises(OptionError, match="MLX computes this one"):
        fastvlm_mlx.load(mlx_bundle, encoder_compute="float32")
