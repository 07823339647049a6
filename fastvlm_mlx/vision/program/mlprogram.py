"""An encoder package evaluated op by op with torch, where there is no Core ML.

What runs is the package as it lies on disk, weights decompressed: both the encoder of machines
without Core ML and the side of the numeric gate that speaks for what was written. Arithmetic is
fp32, also where the program says fp16: torch's own half-precision convolution takes minutes on a
CPU. `round_fp16` rounds the result of every fp16 operation instead, and of a mean the sum before
it is divided, which a kernel may hold in fp16: 256 places of 256 are infinite.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np

from fastvlm_mlx.errors import EncoderError
from fastvlm_mlx.vision.interface import check_features, check_images, encoder_shape, to_bytes
from fastvlm_mlx.vision.package import (
    IMAGE,
    INPUT_NAME,
    OUTPUT_NAME,
    PackageInfo,
    describe,
    describe_spec,
    one_line,
    operations,
    read_spec,
)
from fastvlm_mlx.vision.program.memory import MAX_ELEMENTS, check_memory
from fastvlm_mlx.vision.program.mil import is_constant, read_function
from fastvlm_mlx.vision.program.milops import BUILDERS
from fastvlm_mlx.vision.program.steps import Shared, compile_steps

if TYPE_CHECKING:
    import torch

    from fastvlm_mlx.vision.program.steps import Held

__all__ = ["MLProgram", "MLProgramEncoder", "PackageInfo", "describe"]

# What reading a program raises that is not well formed, and torch of what one asks.
_PROGRAM_ERRORS = (
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    NotImplementedError,
    RuntimeError,
    MemoryError,
    OSError,
)

_PIECE = 2**19  # elements

Observe = Callable[[str, str, "torch.Tensor"], None]


class MLProgram:
    """A function of an ML Program package, ready to run.

    Weights are widened to fp32 and laid out once, here: 4 bytes a parameter.

    Args:
        image_size: of the function, where the package has several; else it is the default one.
        fused_in: "float32" or "bfloat16" joins operations for speed, as `fusion` says, and
            computes in this type. Then nothing can be rounded or observed.
        like: another function of the same package, whose weights are used as far as they lie in
            memory as this one reads them.

    Raises:
        EncoderError: the package is missing or damaged, or holds an operation, a parameter or a
            type that is not known here.
        OptionError: it has no function of that size.
    """

    def __init__(
        self,
        package: Path,
        image_size: int | None = None,
        fused_in: str | None = None,
        like: MLProgram | None = None,
    ):
        if find_spec("torch") is None:
            raise EncoderError(
                "torch is not installed, which evaluates an encoder package where Core ML does "
                'not: expected it here, pip install "fastvlm-mlx[export]"'
            )
        self.package = package
        spec = read_spec(package)
        self.info = describe_spec(spec, package, image_size)
        for op in operations(spec, self.info.function):
            if op.type not in BUILDERS and not is_constant(op.type):
                raise EncoderError(
                    f"{package}: operation {op.type} {op.outputs[0].name!r} is not known: expected "
                    "an encoder exported by fastvlm or by Apple's script, run it on macOS"
                )
            _check_elements(package, op)
        try:
            function = read_function(spec, package, self.info.function)
            check_memory(function)
            self._shapes = {variable.name: variable.shape for variable in function.inputs}
            self.inputs = tuple(self._shapes)
            self.outputs = tuple(variable.name for variable in function.outputs)
            self._held: Held = WeakValueDictionary() if like is None else like._held
            shared = Shared(function, self._held)
            self._steps, self.constants = compile_steps(function, shared)
            self._fused_in = None
            if fused_in is not None:
                self._fuse(fused_in, shared)
        except EncoderError as error:
            raise EncoderError(f"{package}: {error}") from error
        except _PROGRAM_ERRORS as error:
            raise EncoderError(
                f"the program in {package} can't be read ({one_line(error)}): expected one "
                "written by coremltools, export it again"
            ) from error

    def _fuse(self, name: str, shared: Shared) -> None:
        import torch

        from fastvlm_mlx.vision.program.fusion import fused

        self._fused_in = dtype = getattr(torch, name)
        self._steps, self.constants = fused(
            self._steps, self.constants, self._shapes, self.outputs, dtype, shared
        )

    def run(
        self,
        inputs: Mapping[str, torch.Tensor],
        *,
        round_fp16: bool = False,
        observe: Observe | None = None,
    ) -> dict[str, torch.Tensor]:
        """Evaluate the function.

        Args:
            inputs: the function's inputs by name, float32; an image's pixels from 0 to 255.
            round_fp16: round what every fp16 operation makes to fp16, overflow included.
            observe: called with name, type and result (not to be written to) of every operation,
                with `round_fp16` of a mean's sum too; results are mostly channels-last, for
                reductions take `flat` of them.

        Raises:
            EncoderError: an input has another shape than the program's; or an operation fails,
                since the package is damaged, or the memory short.
        """
        import torch

        given = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
        if given != self._shapes:
            raise EncoderError(
                f"the program in {self.package} reads {self._shapes} and was given {given}: "
                "expected the same, export it again"
            )
        alive: dict[str, torch.Tensor] = dict(inputs)
        if self._fused_in is not None:
            if round_fp16 or observe is not None:
                raise ValueError("a fused program has no results of single operations")
            alive = {name: tensor.to(self._fused_in) for name, tensor in inputs.items()}
        with torch.inference_mode():
            for step in self._steps:
                operands = [
                    self.constants[n] if n in self.constants else alive[n] for n in step.operands
                ]
                try:
                    made = step.compute(*operands)
                except _PROGRAM_ERRORS as error:
                    raise EncoderError(
                        f"{self.package}: operation {step.type} {step.name!r} can't be evaluated "
                        f"({one_line(error)}): expected a package that is whole and memory to "
                        "run it in, export it again or free some"
                    ) from error
                values = [made] if isinstance(made, torch.Tensor) else list(made)
                del made
                shapes = tuple(tuple(value.shape) for value in values)
                if shapes != step.shapes:
                    raise EncoderError(
                        f"{self.package}: operation {step.type} {step.name!r} makes {shapes} "
                        f"where the program declares {step.shapes}: expected the same, export it "
                        "again"
                    )
                for name, half, value in zip(step.results, step.half, values, strict=True):
                    if half and round_fp16:
                        if step.places > 1:
                            value = _rounded(value * step.places, operands)
                            if observe is not None:
                                observe(step.name, step.type, value)
                            value = value / step.places
                        alive[name] = _rounded(value, operands)
                    else:
                        alive[name] = value
                    if observe is not None:
                        observe(step.name, step.type, alive[name])
                del operands, values, value
                for name in step.dead:
                    alive.pop(name, None)
        return {
            name: self.constants[name] if name in self.constants else alive[name]
            for name in self.outputs
        }


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's elements in memory order: without a copy for one that fills its storage.

    Reductions over it take a fortieth of the time of those over a channels-last tensor.
    """
    if tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size():
        return tensor.as_strided((tensor.numel(),), (1,))
    return tensor.reshape(-1)


def _rounded(value: torch.Tensor, operands: Sequence[torch.Tensor]) -> torch.Tensor:
    """`value` rounded to fp16, in place where it is nobody else's memory."""
    import torch

    storage = value.untyped_storage()
    shared = {operand.untyped_storage().data_ptr() for operand in operands}
    if storage.data_ptr() in shared or storage.nbytes() != value.numel() * value.element_size():
        return value.half().float()
    # By pieces that stay in the cache: a third of the time of a whole half-precision copy.
    elements = flat(value)
    half = torch.empty(min(_PIECE, elements.numel()), dtype=torch.float16)
    for piece in elements.split(_PIECE):
        piece.copy_(half[: piece.numel()].copy_(piece))
    return value


class MLProgramEncoder:
    """The encoder in an `.mlpackage`, on any machine: float32 [1, 3, S, S] → [1, N, C].

    One that takes images gets them as Core ML would, in 8 bits: `to_bytes`.

    Args:
        image_size: S, where the package takes several; its default one's unless given.
        fused_in, like: as `MLProgram` has them.

    Raises:
        EncoderError: the package is missing, damaged, not an encoder's, or uses what is not known
            here.
        OptionError: it does not take that size.
    """

    backend = "ML Program evaluated with torch"

    def __init__(
        self,
        package: Path,
        image_size: int | None = None,
        fused_in: str | None = None,
        like: MLProgramEncoder | None = None,
    ):
        program = None if like is None else like._program
        self._program: MLProgram = MLProgram(Path(package), image_size, fused_in, program)
        if fused_in is not None:
            self.backend = f"torch {fused_in}"
        self.info = self._program.info
        self.image_size, self.num_tokens, self.hidden_size = encoder_shape(self.info)
        names = (self._program.inputs, self._program.outputs)
        if names != ((INPUT_NAME,), (OUTPUT_NAME,)):
            raise EncoderError(
                f"the program in {package} reads {', '.join(names[0])} and makes "
                f"{', '.join(names[1])}: expected {INPUT_NAME} and {OUTPUT_NAME}, export it again"
            )

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """float32 [1, 3, S, S] in 0 to 1 → float32 [1, N, C]."""
        return self.evaluate(images)

    @property
    def constants(self) -> Mapping[str, torch.Tensor]:
        """Weights and biases by the names of the program's constants, decompressed, float32."""
        return self._program.constants

    def evaluate(
        self, images: np.ndarray, *, round_fp16: bool = False, observe: Observe | None = None
    ) -> np.ndarray:
        """`__call__` with fp16 rounding and with a look at every operation's result.

        Args:
            images: float32 [1, 3, S, S].
            round_fp16: round what every fp16 operation makes to fp16, overflow included.
            observe: called with name, type and result of every operation, in order.

        Raises:
            EncoderError: `images` has another shape, or what is made has another than declared.
        """
        import torch

        check_images(images, self.image_size)
        if self.info.inputs[0].dtype == IMAGE:
            images = to_bytes(images)
        # torch takes no array that is read-only without a warning.
        x = torch.from_numpy(np.require(images, np.float32, ["C", "W"]))
        x = x.to(memory_format=torch.channels_last)
        made = self._program.run({INPUT_NAME: x}, round_fp16=round_fp16, observe=observe)
        features = made[OUTPUT_NAME].float().contiguous().numpy()
        check_features(features, (1, self.num_tokens, self.hidden_size))
        return features


def _check_elements(package: Path, op: Any) -> None:
    """Raises EncoderError: an operation declares a result that fills the memory."""
    for output in op.outputs:
        elements = prod(d.constant.size for d in output.type.tensorType.dimensions)
        if elements > MAX_ELEMENTS:
            raise EncoderError(
                f"{package}: operation {op.type} {output.name!r} makes {elements:,} numbers: "
                f"expected at most {MAX_ELEMENTS:,}, export the encoder again"
            )
