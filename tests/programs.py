"""Small ML Programs, built operation by operation, and run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastvlm_mlx.vision.package import quiet_coremltools
from fastvlm_mlx.vision.program.mlprogram import MLProgram

with quiet_coremltools():
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb  # noqa: N813
    from coremltools.converters.mil.mil import Function, Program, types

__all__ = ["build", "ct", "half", "mb", "normal", "run", "t"]

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def build(
    directory: Path,
    shapes: list[tuple[int, ...]],
    body: Callable[..., Any],
    target: Any = None,
) -> Path:
    """An `.mlpackage` that holds exactly the operations of `body`, its inputs named a, b …"""
    inputs = {
        name: mb.placeholder(shape=shape, dtype=types.fp32)
        for name, shape in zip("abcd", shapes, strict=False)
    }
    target = target or ct.target.iOS16
    program = Program()
    with Function(inputs, opset_version=target) as function:
        made = body(*function.inputs.values())
        function.set_outputs(list(made) if isinstance(made, list | tuple) else [made])
        program.add_function("main", function)
    path = directory / "program.mlpackage"
    with quiet_coremltools():
        ct.convert(
            program,
            convert_to="mlprogram",
            pass_pipeline=ct.PassPipeline.EMPTY,
            minimum_deployment_target=target,
            skip_model_load=True,
        ).save(str(path))
    return path


def run(package: Path, *inputs: np.ndarray, **options: Any) -> list[torch.Tensor]:
    tensors = {n: torch.from_numpy(x) for n, x in zip("abcd", inputs, strict=False)}
    return list(MLProgram(package).run(tensors, **options).values())


def t(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array)


def half(x: torch.Tensor) -> torch.Tensor:
    return x.half().float()
