"""What the evaluator reads of one operation, each parameter once, and what it refuses in it."""

from __future__ import annotations

from math import prod
from typing import Any

from fastvlm_mlx.errors import EncoderError
from fastvlm_mlx.vision.program.memory import MAX_ELEMENTS
from fastvlm_mlx.vision.program.mil import MILOperation, MILVariable

# Of axes, sizes, paddings: one for each axis, or each part of a split.
_PARAMETER_ELEMENTS = 10_000


class Operation:
    """What a builder reads of a MIL operation: every parameter once.

    `tensor` names an operand of the returned function (its arguments come in the order of the
    calls); `value` reads a constant. `places` is, of a mean, how many numbers it adds up.
    """

    def __init__(self, op: MILOperation):
        self._op = op
        self.places = 1
        self.name, self.type = op.name, op.type
        self.operands: list[MILVariable] = []
        self._unread = {name for name, variables in op.inputs.items() if variables}

    def tensor(self, name: str) -> None:
        self._unread.discard(name)
        self.operands.extend(self._op.inputs[name])

    def has(self, name: str) -> bool:
        """Whether an optional parameter is given."""
        return bool(self._op.inputs.get(name))

    def value(self, name: str, default: Any = None) -> Any:
        """A constant parameter as plain Python (arrays become lists)."""
        self._unread.discard(name)
        if not self.has(name):
            return default
        (variable,) = self._op.inputs[name]
        if variable.read is None:
            raise self.error(f"a {name} that is computed", "a constant")
        if prod(variable.shape) > _PARAMETER_ELEMENTS:
            raise self.error(f"a {name} of {prod(variable.shape):,} numbers", "some")
        value = variable.read()
        return value if isinstance(value, str) else value.tolist()

    @property
    def rank(self) -> int:
        """Rank of the operand `x`."""
        return len(self.shape_of("x"))

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Shape of an operand."""
        return self._op.inputs[name][0].shape

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first output."""
        return self._op.outputs[0].shape

    def makes(self, *shape: int) -> None:
        """Refuse an operation that would make more, or less, than the program declares."""
        if self.shape != shape:
            raise self.error(f"a result of {list(shape)}", f"{list(self.shape)} as declared")

    def works_with(self, *shape: int) -> None:
        """Refuse an operation that would make something larger on its way than any result is."""
        if prod(shape) > MAX_ELEMENTS:
            raise self.error(f"{prod(shape):,} numbers to work with", f"at most {MAX_ELEMENTS:,}")

    @property
    def dtype(self) -> str:
        """Type of the first output."""
        return self._op.outputs[0].dtype

    def error(self, found: str, expected: str) -> EncoderError:
        return EncoderError(
            f"operation {self.type} {self.name!r} has {found}, expected {expected}: this machine "
            "can't evaluate the package"
        )

    def finish(self) -> None:
        """Refuse an operation of which a parameter was not read, or whose types are mixed."""
        if self._unread:
            raise self.error(f"parameters {', '.join(sorted(self._unread))}", "only known ones")
        types = sorted({variable.dtype for variable in (*self.operands, *self._op.outputs)})
        if self.type != "cast" and len(types) > 1:
            raise self.error(f"values of {' and '.join(types)}", "one type")
