"""fp16 as the evaluator shows it: every operation's result rounded, nobody's memory written to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from programs import build, ct, half, mb, run, t

from fastvlm_mlx.vision.package import quiet_coremltools
from fastvlm_mlx.vision.program.mlprogram import flat
from model_export.encoder.fastvithd import SEBlock
from model_export.gates.gate import Magnitude


def test_rounding_follows_each_fp16_operation(tmp_path: Path) -> None:
    def body(a: Any) -> Any:
        x = mb.cast(x=a, dtype="fp16")
        x = mb.mul(x=x, y=np.float16(3.1))
        x = mb.add(x=x, y=np.float16(100.3))
        return mb.cast(x=x, dtype="fp32")

    package = build(tmp_path, [(50,)], body)
    values = np.random.default_rng(0).standard_normal(50).astype(np.float32)
    factor, term = float(np.float16(3.1)), float(np.float16(100.3))
    x = t(values)
    [plain] = run(package, values)
    torch.testing.assert_close(plain, x * factor + term)
    seen: list[tuple[str, torch.Tensor]] = []
    [rounded] = run(
        package,
        values,
        round_fp16=True,
        observe=lambda name, kind, value: seen.append((kind, value.clone())),
    )
    steps = [half(x), half(half(x) * factor), half(half(half(x) * factor) + term)]
    torch.testing.assert_close(rounded, steps[-1], rtol=0, atol=0)
    assert [kind for kind, _ in seen] == ["cast", "mul", "add", "cast"]
    for (_, got), wanted in zip(seen, [*steps, steps[-1]], strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_rounding_does_not_write_to_what_is_given(tmp_path: Path) -> None:
    def body(a: Any) -> Any:
        x = mb.cast(x=a, dtype="fp16")
        parts = mb.split(x=mb.reshape(x=x, shape=[2, 3, 8]), num_splits=2, axis=2)
        y = mb.mul(x=mb.transpose(x=parts[0], perm=[2, 0, 1]), y=np.float16(0.3))
        return [mb.cast(x=y, dtype="fp32"), mb.cast(x=parts[1], dtype="fp32")]

    package = build(tmp_path, [(6, 8)], body)
    values = np.random.default_rng(1).standard_normal((6, 8)).astype(np.float32)
    before = values.copy()
    first, second = run(package, values, round_fp16=True)
    np.testing.assert_array_equal(values, before)
    left, right = half(t(before)).reshape(2, 3, 8).chunk(2, 2)
    factor = float(np.float16(0.3))
    assert torch.equal(first, half(left.permute(2, 0, 1) * factor))
    assert torch.equal(second, right)


def test_flat_is_every_element_once() -> None:
    x = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    last = x.contiguous(memory_format=torch.channels_last)
    for tensor in (x, last, x.permute(3, 1, 0, 2), x[:, 1:], x[..., ::2], x[0, 0, 0, 0]):
        assert sorted(flat(tensor).tolist()) == sorted(tensor.flatten().tolist())
    assert flat(last).data_ptr() == last.data_ptr()


def test_rounding_shows_an_overflow(tmp_path: Path) -> None:
    package = build(
        tmp_path,
        [(2,)],
        lambda a: mb.cast(x=mb.square(x=mb.cast(x=a, dtype="fp16")), dtype="fp32"),
    )
    values = np.array([300.0, 3.0], np.float32)
    assert run(package, values)[0].tolist() == [90_000, 9]
    assert run(package, values, round_fp16=True)[0].tolist() == [float("inf"), 9]


@pytest.mark.parametrize(
    "mean",
    [
        lambda x: mb.reduce_mean(x=x, axes=[2, 3], keep_dims=True),
        lambda x: mb.avg_pool(x=x, kernel_sizes=[16, 16], pad_type="valid"),
    ],
)
def test_rounding_shows_a_mean_s_sum(mean: Any, tmp_path: Path) -> None:
    """256 places of 300 are a mean of 300, and a sum that fp16 has no number for."""
    package = build(
        tmp_path,
        [(1, 2, 16, 16)],
        lambda a: mb.cast(x=mean(mb.cast(x=a, dtype="fp16")), dtype="fp32"),
    )
    values = np.ones((1, 2, 16, 16), np.float32)
    values[:, 0] = 300
    seen: list[float] = []

    def observe(name: str, kind: str, value: torch.Tensor) -> None:
        seen.append(float(value.max()))

    [plain] = run(package, values, observe=observe)
    assert plain.flatten().tolist() == [300, 1]
    assert max(seen) == 300
    [rounded] = run(package, values, round_fp16=True, observe=observe)
    assert rounded.flatten().tolist() == [float("inf"), 1]
    assert max(seen) == float("inf")
    [small] = run(package, values / 2, round_fp16=True)
    assert small.flatten().tolist() == [150, 0.5]


def test_the_exported_mean_does_not_overflow(tmp_path: Path) -> None:
    """Squeeze and excite as the exporter writes it: no sum is larger than its largest term."""
    block = SEBlock(16)
    for parameter in block.parameters():
        parameter.data.fill_(1e-5)
    shape = (1, 16, 16, 16)
    with quiet_coremltools(), torch.no_grad():
        program = torch.export.export(block.eval(), (torch.zeros(shape),))
        ct.convert(
            program.run_decompositions({}),
            convert_to="mlprogram",
            inputs=[ct.TensorType("a", shape, dtype=np.float32)],
            outputs=[ct.TensorType("b", dtype=np.float32)],
            minimum_deployment_target=ct.target.iOS16,
            compute_precision=ct.precision.FLOAT16,
            skip_model_load=True,
        ).save(str(tmp_path / "block.mlpackage"))
    values = np.full(shape, 60_000, np.float32)
    magnitude = Magnitude()
    [gated] = run(tmp_path / "block.mlpackage", values, round_fp16=True, observe=magnitude)
    assert magnitude.largest <= 60_000
    with torch.no_grad():
        torch.testing.assert_close(gated, block(t(values)), rtol=2e-3, atol=0)
