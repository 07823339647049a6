"""Operations of an encoder joined, for running it on a CPU as fast as the CPU allows.

What is joined, and only where nothing else reads what lies between:

- a convolution with the GELU or the addition after it, in oneDNN, from weights laid out once as
  its kernel reads them;
- two 1×1 convolutions with a large result between them, a band of rows at a time: the result of a
  band stays in the cache, where the whole is memory that the system has to clear for every image;
- a softmax between two matrix products, as torch's attention, which never holds all of the scores.

Sums are added up in another order than op by op: features differ by a millionth of the largest one
in float32. At 1024×1024 that takes 0.7 of the time. In bfloat16, which only some CPUs multiply
natively, it takes 0.4, and the features have 35 to 45 dB. Numeric gates evaluate op by op.

`torch.ops.mkldnn` is what torch's own compiler makes of a convolution on a CPU.
"""

from __future__ import annotations

import platform
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING

from fastvlm_mlx.vision.program.milops import Cast, Convolution, Matmul, Softmax
from fastvlm_mlx.vision.program.steps import Shared, Step, with_lifetimes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Of a result between two convolutions, in bytes. The C library keeps blocks of up to 32 MiB for
# the next use; larger ones come from the system anew, and page by page.
_BAND_BYTES = 2**25


def fuses() -> bool:
    """Whether this machine's torch has the joined kernels, and they were measured to pay."""
    import torch

    # On ARM oneDNN has no fast kernel for a GELU after a convolution.
    return platform.machine() == "x86_64" and torch.backends.mkldnn.is_available()


def multiplies_bfloat16() -> bool:
    """Whether the CPU does so natively: elsewhere it is slower than float32, and no more exact."""
    import torch

    if platform.machine() == "x86_64":
        return bool(torch.cpu._is_avx512_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def fused(
    steps: Iterable[Step],
    constants: dict[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    outputs: Iterable[str],
    dtype: torch.dtype,
    shared: Shared,
) -> tuple[list[Step], dict[str, Tensor]]:
    """The same program joined where it can be, its weights in `dtype`.

    Args:
        constants: what the steps read; it is emptied, so that no weight is in memory twice.
        shapes: of the program's inputs, by name.
        shared: with other functions of the package.

    Returns:
        Its steps, and the constants that they still read by name.
    """
    program = _Program(steps, constants, shapes, outputs, shared)
    program.convert(dtype)
    if fuses():
        program.each(_attention)
        program.each(_convolution)
        program.each(_pair)
    return program.finish()


class _Program:
    """Steps that are being joined; what became part of a later one is None."""

    def __init__(
        self,
        steps: Iterable[Step],
        constants: dict[str, Tensor],
        shapes: Mapping[str, tuple[int, ...]],
        outputs: Iterable[str],
        shared: Shared,
    ):
        self._shared = shared
        self.steps: list[Step | None] = [*steps]
        self.constants, self.outputs = constants, set(outputs)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in constants.items()}
        self.shapes.update(shapes)
        for step in self._left():
            self.shapes.update(zip(step.results, step.shapes, strict=True))
        self._readers: dict[str, list[int]] = {}

    def convert(self, dtype: torch.dtype) -> None:
        """Floating-point constants, and casts to floating point, become `dtype`."""
        for name, tensor in self.constants.items():
            if tensor.is_floating_point():
                self.constants[name] = self._shared.one(name, str(dtype), partial(tensor.to, dtype))
        for i, step in enumerate(self.steps):
            if step and isinstance(step.compute, Cast) and step.compute.dtype.is_floating_point:
                self.steps[i] = replace(step, compute=Cast(dtype))

    def each(self, join: Callable[[_Program, int, Step], None]) -> None:
        """Let `join` look at every step in order."""
        self._readers = defaultdict(list)
        for i, step in enumerate(self.steps):
            for name in step.operands if step else ():
                self._readers[name].append(i)
        for i in range(len(self.steps)):
            if (step := self.steps[i]) is not None:
                join(self, i, step)

    def reader(self, step: Step) -> tuple[int, Step] | None:
        """The one step that reads what `step` makes, once; None where anything else does."""
        readers = self._readers[step.results[0]]
        if len(step.results) > 1 or step.results[0] in self.outputs or len(readers) != 1:
            return None
        found = self.steps[readers[0]]
        return None if found is None else (readers[0], found)

    def join(self, parts: Iterable[int], step: Step) -> None:
        """Put `step` in the place of the last of its parts, where all that it reads is made."""
        *before, place = sorted(parts)
        for i in before:
            self.steps[i] = None
        self.steps[place] = step

    def finish(self) -> tuple[list[Step], dict[str, Tensor]]:
        """The steps with their weights laid out, and the constants that are left."""
        left = self._left()
        uses = Counter(name for step in left for name in step.operands)
        uses.update(self.outputs)
        drafts = [step.compute.parameters for step in left if isinstance(step.compute, _Draft)]
        uses.update(name for names in drafts for name in names)
        for i, step in enumerate(left):
            if isinstance(draft := step.compute, _Draft):
                left[i] = replace(step, compute=draft.packed(self.constants, self._shared))
                uses.subtract(draft.parameters)
                for name in draft.parameters:
                    if not uses[name]:
                        self.constants.pop(name, None)
        kept = {name: tensor for name, tensor in self.constants.items() if uses[name]}
        self.constants.clear()
        return with_lifetimes(left, [*self.outputs, *kept]), kept

    def _left(self) -> list[Step]:
        return [step for step in self.steps if step is not None]


def _attention(program: _Program, i: int, step: Step) -> None:
    """softmax(q kᵀ) vᵀ, or its transpose, as the two products and the softmax between them."""
    scores = step.compute
    if not isinstance(scores, Matmul) or len(step.shapes[0]) != 4:
        return
    softmax = program.reader(step)
    if softmax is None or not isinstance(softmax[1].compute, Softmax):
        return
    product = program.reader(softmax[1])
    if softmax[1].compute.axis not in (-1, 3) or product is None:
        return
    mixed, shares = product[1].compute, softmax[1].results[0]
    if not isinstance(mixed, Matmul):
        return
    x, y = product[1].operands
    shared = scores.flip_x, not scores.flip_y
    if x == shares and not mixed.flip_x:
        compute, values = Attention(*shared, mixed.flip_y, False), y
    elif y == shares and mixed.flip_y:
        compute, values = Attention(*shared, not mixed.flip_x, True), x
    else:
        return
    operands = (*step.operands, values)
    if len({program.shapes[name][:2] for name in operands}) > 1:
        return
    program.join(
        [i, softmax[0], product[0]], replace(product[1], compute=compute, operands=operands)
    )


def _convolution(program: _Program, i: int, step: Step) -> None:
    """A dense convolution in two dimensions, with the GELU or the addition after it."""
    import torch
    import torch.nn.functional as F

    made = step.compute
    if not isinstance(made, Convolution) or made.function is not F.conv2d:
        return
    x, *parameters = step.operands
    if made.uneven or made.groups != 1 or not program.constants.keys() >= set(parameters):
        return
    draft = _Draft(made, tuple(parameters), program.shapes[x], program.shapes[parameters[0]])
    parts, last, operands = [i], step, [x]
    if (after := program.reader(step)) is not None:
        place, found = after
        others = [name for name in found.operands if name != step.results[0]]
        if found.compute is F.gelu:
            parts, last, draft = [i, place], found, replace(draft, gelu=True)
        elif found.compute is torch.add and [program.shapes[n] for n in others] == [step.shapes[0]]:
            parts, last, operands = [i, place], found, [x, *others]
    program.join(parts, replace(last, compute=draft, operands=tuple(operands)))


def _pair(program: _Program, i: int, step: Step) -> None:
    """Two 1×1 convolutions with a large result between them."""
    first, after = step.compute, program.reader(step)
    if not isinstance(first, _Draft) or after is None or len(step.operands) > 1:
        return
    place, found = after
    second = found.compute
    if not isinstance(second, _Draft) or found.operands[0] != step.results[0]:
        return
    # What is two already has no room for a third.
    if first.second is not None:
        return
    size = prod(step.shapes[0]) * program.constants[first.parameters[0]].element_size()
    rows = step.shapes[0][2]
    if size <= _BAND_BYTES or not (first.pointwise and second.pointwise):
        return
    band = max(1, rows // -(-size // _BAND_BYTES))
    pair = replace(first, second=second, band=band)
    program.join(
        [i, place], replace(found, compute=pair, operands=(*step.operands, *found.operands[1:]))
    )


@dataclass(frozen=True)
class _Draft:
    """A convolution, or two, whose weights are not laid out yet.

    Attributes:
        names: of the weight and, where there is one, the bias.
        size, kernel: shapes of the input and of the weight.
        second: what follows on each `band` of rows.
    """

    made: Convolution
    names: tuple[str, ...]
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    gelu: bool = False
    second: _Draft | None = None
    band: int = 0

    def __call__(self, *operands: Tensor) -> Tensor:
        raise NotImplementedError("the weights are not laid out")

    @property
    def parameters(self) -> tuple[str, ...]:
        return self.names if self.second is None else (*self.names, *self.second.names)

    @property
    def pointwise(self) -> bool:
        made = self.made
        plain = (*made.strides, *made.dilations, *self.kernel[2:]) == (1,) * 6
        return plain and not any(made.padding)

    def packed(
        self, constants: Mapping[str, Tensor], shared: Shared
    ) -> PackedConvolution | PackedPair:
        size = list(self.size)
        if self.second is None:
            return PackedConvolution(self, constants, size, shared)
        size[2] = self.band
        first = PackedConvolution(self, constants, size, shared)
        second = PackedConvolution(
            self.second, constants, [size[0], *self.second.size[1:2], *size[2:]], shared
        )
        return PackedPair(first, second, self.band)


class PackedConvolution:
    """[1, I, H, W] → [1, O, H', W'], and what follows it."""

    def __init__(
        self, draft: _Draft, constants: Mapping[str, Tensor], size: list[int], shared: Shared
    ):
        import torch

        weight, *bias = (constants[name] for name in draft.names)
        made = draft.made
        self._bias = bias[0] if bias else None
        self._window = (made.padding, made.strides, made.dilations, made.groups)
        self._gelu = draft.gelu
        packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *self._window, size)
        # How oneDNN lays a weight out may depend on the size of the image, and mostly does not.
        laid_out = torch.ops.mkldnn._get_mkldnn_serialized_md(packed).numpy().tobytes()
        self._weight = shared.one(draft.names[0], laid_out, lambda: packed)

    def __call__(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        import torch

        convolve = torch.ops.mkldnn._convolution_pointwise
        x = x.contiguous(memory_format=torch.channels_last)
        operands = (self._weight, self._bias, *self._window)
        if added is None:
            name, algorithm = ("gelu", "none") if self._gelu else ("none", "")
            return convolve(x, *operands, name, [], algorithm)
        added = added.contiguous(memory_format=torch.channels_last)
        return convolve.binary(x, added, *operands, "add", 1.0, None, [], None)


@dataclass(frozen=True)
class PackedPair:
    """One convolution after the other, `band` rows at a time."""

    first: PackedConvolution
    second: PackedConvolution
    band: int

    def __call__(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        import torch

        starts = range(0, x.shape[2], self.band)
        bands = [
            [t[:, :, start : start + self.band] for start in starts]
            for t in (x, added)
            if t is not None
        ]
        return torch.cat(
            [self.second(self.first(part), *rest) for part, *rest in zip(*bands, strict=True)], 2
        )


@dataclass(frozen=True)
class Attention:
    """Queries, keys and values [1, heads, …] → what they make, by which of them lie across.

    Attributes:
        queries, keys, values: whether the last two axes, [N, width] to torch, are exchanged.
        result: whether those of the result are.
    """

    queries: bool
    keys: bool
    values: bool
    result: bool

    def __call__(self, *operands: Tensor) -> Tensor:
        import torch.nn.functional as F

        flips = (self.queries, self.keys, self.values)
        q, k, v = (
            x.transpose(-1, -2) if flip else x for x, flip in zip(operands, flips, strict=True)
        )
        made = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        return made.transpose(-1, -2) if self.result else made
