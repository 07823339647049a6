"""The assignments that a search chooses from: those of least predicted loss, and plain ones.

An assignment is plain where a user could have asked for it with other options: one form for the
layers and one each for projector, embedding and head, or one of mlx-lm's recipes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import exp, log, prod

from fastvlm_mlx.bundle.config import FastVLMConfig
from fastvlm_mlx.bundle.quantization import MODES, Format
from fastvlm_mlx.errors import OptionError
from model_export.checkpoint.names import TensorSpec
from model_export.language import llm, recipes
from model_export.language.recipes import EMBEDDING, HEAD, PROJECTOR, Scheme, is_matrix, path_of
from model_export.options import RECIPES, ExportOptions, LLMOptions
from model_export.quantization.bits.allocation import Choice, allocate
from model_export.quantization.bits.sensitivity import Losses

# A layer's matrix may get the widest form that all matrices could have, and this many forms that
# are narrower and wider than that.
NARROWER, WIDER = 1, 3
# How many plain choices are measured for their small predicted loss, beside those that no other
# choice of the size is wider than everywhere.
LIKELY = 8
# How many of those are the start of a search of their own.
GROWN = 2
# What a little more would buy is looked for in sizes up to this share above the one asked for.
A_LITTLE_MORE = 0.05
ABOVE = 3
_LEAST_LOSS = 1e-12


@dataclass(frozen=True)
class Candidate:
    """An assignment of a form to every matrix.

    Attributes:
        name: what reports call it.
        bytes: what the matrices take; norms and biases are not counted.
        predicted: KL divergence in nats, as if the losses of single matrices added up.
    """

    name: str
    scheme: Scheme
    bytes: int
    predicted: float


# The form of each part that the plain options can set alone: layers, projector, embedding, head.
Parts = Mapping[str, Format | None]


# Says of a matrix's path and a form whether a search may give it that form.
Allowed = Callable[[str, Format | None], bool]


@dataclass(frozen=True)
class Space:
    """What a search chooses from: the matrices of a language model, and the forms that the loaders
    of the layout read."""

    specs: Sequence[TensorSpec]
    config: FastVLMConfig
    options: ExportOptions

    @property
    def forms(self) -> list[Format]:
        """Every affine form that the layout holds, narrowest first."""
        group_size = self.options.llm.resolved_group_size
        all_forms = [Format(bits, group_size) for bits in MODES["affine"][0]]
        layout = self.options.destination.layout
        return [f for f in all_forms if recipes.unreadable({EMBEDDING: f}, layout) is None]

    @property
    def matrices(self) -> list[TensorSpec]:
        return [spec for spec in self.specs if is_matrix(spec)]

    @property
    def parameters(self) -> int:
        return sum(prod(spec.shape) for spec in self.specs)

    def part(self, path: str) -> str:
        """The part that a matrix belongs to, among those that plain options can set alone."""
        if path.startswith(PROJECTOR):
            return "projector"
        return {EMBEDDING: "embedding", HEAD: "head"}.get(path, "layers")

    def bytes_of(self, spec: TensorSpec, form: Format | None) -> int:
        """Bytes that a tensor takes in a form, with its scales and biases."""
        stored = llm.stored(spec, {path_of(spec): form}, self.options.llm.dtype)
        return sum(entry.bytes for entry in stored)

    def size(self, scheme: Scheme) -> int:
        """Bytes of all matrices."""
        return sum(self.bytes_of(spec, scheme[path_of(spec)]) for spec in self.matrices)

    @property
    def rest(self) -> int:
        """Bytes of norms and biases, which stay as they are."""
        return sum(self.bytes_of(spec, None) for spec in self.specs if not is_matrix(spec))

    @property
    def largest(self) -> int:
        """Bytes of the whole model where nothing is quantized."""
        return self.rest + sum(self.bytes_of(spec, None) for spec in self.matrices)

    def budget(self, target: float) -> int:
        """Bytes that `target` bits per weight leave for matrices."""
        # 32 bits, the widest type, are enough for any model.
        return int(min(target, 32.0) * self.parameters / 8) - self.rest

    def bits_per_weight(self, size: int) -> float:
        return 8 * (size + self.rest) / self.parameters

    def check(self, target: float) -> None:
        """Raises OptionError: the group size does not fit, or the size can't be reached."""
        group = self.options.llm.resolved_group_size
        if any(spec.shape[1] % group for spec in self.matrices):
            raise OptionError(
                f"group size {group} does not divide the widths of this model: choose another "
                "--group-size"
            )
        smallest = self.forms[0]
        least = self.bits_per_weight(sum(self.bytes_of(s, smallest) for s in self.matrices))
        if target < least:
            # Rounded up, so that what is advised can be reached.
            raise OptionError(
                f"--llm-bpw is {target:g} and {smallest} everywhere take {least:.3f} bits per "
                f"weight, scales included: ask for {least + 0.005:.2f} or more, or a larger "
                "--group-size"
            )

    def near(self, target: float) -> list[Format]:
        """The forms that a layer's matrix may get: the widest that all matrices could have, and its
        neighbours. Forms beyond them lose more in one matrix than they gain in the others."""
        budget = self.budget(target)
        fitting = [f for f in self.forms if self._everywhere(f) <= budget]
        widest = self.forms.index(fitting[-1])
        if self.options.destination.layout == "app":
            # The app reads one form for all that is quantized, so a wider one never fits the size.
            return self.forms[max(0, widest - NARROWER) : widest + 1]
        return self.forms[max(0, widest - NARROWER) : widest + 1 + WIDER]

    def _everywhere(self, form: Format) -> int:
        return sum(self.bytes_of(spec, form) for spec in self.matrices)

    def plain(self) -> Iterator[tuple[Parts, Scheme, int]]:
        """Yield every form for the layers with every form for each other part: the forms by part,
        the scheme that they make, and its bytes."""
        paths = [path_of(spec) for spec in self.matrices]
        parts = list(dict.fromkeys(self.part(path) for path in paths))
        choices: list[Format | None] = [*self.forms, None]
        sizes = dict.fromkeys(product(parts, choices), 0)
        for spec, form in product(self.matrices, choices):
            sizes[self.part(path_of(spec)), form] += self.bytes_of(spec, form)
        for forms in product(choices, repeat=len(parts)):
            form_of_part = dict(zip(parts, forms, strict=True))
            if recipes.unreadable(form_of_part, self.options.destination.layout) is None:
                scheme = {path: form_of_part[self.part(path)] for path in paths}
                yield form_of_part, scheme, sum(sizes[item] for item in form_of_part.items())

    def named_recipes(self) -> Iterator[tuple[str, Scheme, int]]:
        """Yield name, scheme and bytes of those recipes of mlx-lm that the layout can hold."""
        for name in RECIPES:
            asked = LLMOptions(recipe=name, group_size=self.options.llm.group_size)
            layout = self.options.destination.layout
            try:
                scheme = recipes.scheme(self.specs, self.config, asked, layout)
            except OptionError:
                continue
            yield name, scheme, self.size(scheme)


def at_or_below(space: Space, losses: Losses, target: float) -> list[Candidate]:
    """List the assignments of `target` bits per weight or fewer that are worth measuring, each of
    them once."""
    budget = space.budget(target)
    plain = [(parts, c) for parts, c in _plain(space, losses) if c.bytes <= budget]
    widest = [c for parts, c in plain if not any(_dominates(other, parts) for other, _ in plain)]
    likely = sorted((c for _, c in plain), key=lambda c: c.predicted)[:LIKELY]
    by_recipe = [
        Candidate(name, scheme, size, _predicted(scheme, losses))
        for name, scheme, size in space.named_recipes()
        if size <= budget
    ]
    unique = {tuple(c.scheme.items()): c for c in [*widest, *likely, *by_recipe]}
    for candidate in _assigned(space, losses, target, likely[:GROWN]):
        unique.setdefault(tuple(candidate.scheme.items()), candidate)
    return list(unique.values())


def alternatives(space: Space, target: float, *, widest: bool) -> list[Candidate]:
    """List the plain choices of `target` bits per weight or fewer, mlx-lm's recipes among them.

    Args:
        widest: leave out a choice where another that fits is as wide or wider everywhere.
    """
    budget = space.budget(target)
    fitting = [each for each in space.plain() if each[2] <= budget]
    plain = [
        Candidate(name_of(parts), scheme, size, 0.0)
        for parts, scheme, size in fitting
        if not widest or not any(_dominates(other, parts) for other, _, _ in fitting)
    ]
    by_recipe = [Candidate(*recipe, 0.0) for recipe in space.named_recipes()]
    return plain + [candidate for candidate in by_recipe if candidate.bytes <= budget]


def a_little_above(space: Space, losses: Losses, target: float) -> list[Candidate]:
    """List the plain choices just above `target` bits per weight that promise least loss."""
    low, high = space.budget(target), space.budget(target * (1 + A_LITTLE_MORE))
    larger = [c for _, c in _plain(space, losses) if low < c.bytes <= high]
    return sorted(larger, key=lambda c: c.predicted)[:ABOVE]


def _plain(space: Space, losses: Losses) -> Iterator[tuple[Parts, Candidate]]:
    for parts, scheme, size in space.plain():
        yield parts, Candidate(name_of(parts), scheme, size, _predicted(scheme, losses))


def _predicted(scheme: Scheme, losses: Losses) -> float:
    """Predict a scheme's loss as if the losses of its matrices added up."""
    return sum(_loss(losses[path], form) for path, form in scheme.items() if form is not None)


def _loss(by_form: Mapping[Format, float], form: Format) -> float:
    """The loss of a form; one that was not measured follows from the nearest that was."""
    if form in by_form:
        return by_form[form]
    nearest = min(by_form, key=lambda f: abs(f.bits - form.bits))
    return by_form[nearest] * 4.0 ** (nearest.bits - form.bits)


def _dominates(one: Parts, other: Parts) -> bool:
    """Whether `one` has as many bits as `other` in every part, and more in some."""
    wider = [_bits(one[part]) - _bits(form) for part, form in other.items()]
    return min(wider) >= 0 and max(wider) > 0


def _bits(form: Format | None) -> int:
    return 16 if form is None else form.bits


def _assigned(
    space: Space, losses: Losses, target: float, below: Sequence[Candidate]
) -> Iterator[Candidate]:
    """Yield the assignments of least predicted loss, solved in several ways.

    The losses are those that were measured, and once more their trend over the widths, because a
    single measurement may be luck. Where bits are few, matrices lose more together than the sum of
    what each loses, so every problem is also solved with the narrowest forms left out; with a plain
    choice that fits, whose forms may only get wider; and with one that is a little too large, whose
    forms may only get narrower.
    """
    app = space.options.destination.layout == "app"
    layers = next(forms for path, forms in losses.items() if space.part(path) == "layers")
    near = sorted(layers, key=lambda form: form.bits)
    above = [] if app else a_little_above(space, losses, target)

    def among(some: Sequence[Format]) -> Allowed:
        # A part that is small, or read once for a token, may well have more bits than the layers.
        return lambda path, form: (
            form is None or form in some or (not app and space.part(path) != "layers")
        )

    def beyond(base: Candidate, sign: int) -> Allowed:
        in_base = [base.scheme[path] for path in losses if base.scheme[path] is not None]
        return lambda path, form: (
            sign * _bits(form) >= sign * _bits(base.scheme[path])
            and (not app or form is None or form in in_base)
        )

    sets = [among([form]) for form in near] if app else [among(near[i:]) for i in range(len(near))]
    sets += [beyond(base, 1) for base in below] + [beyond(base, -1) for base in above]
    for name, believed in (("search", losses), ("search by trend", _trend(losses))):
        for allowed in sets:
            scheme = _allocated(space, believed, allowed, space.budget(target))
            if scheme is not None:
                predicted = _predicted(scheme, losses)
                yield Candidate(name, scheme, space.size(scheme), predicted)


def _trend(losses: Losses) -> Losses:
    """Smooth the losses of each matrix: they fall to a quarter with each bit, as the energy of a
    rounding error does, and have the geometric mean of what was measured."""
    smoothed = {}
    for path, by_form in losses.items():
        level = [log(max(loss, _LEAST_LOSS)) + f.bits * log(4) for f, loss in by_form.items()]
        mean = sum(level) / len(level)
        smoothed[path] = {form: exp(mean - form.bits * log(4)) for form in by_form}
    return smoothed


def _allocated(space: Space, losses: Losses, allowed: Allowed, budget: int) -> Scheme | None:
    """Solve for the scheme of least loss within `budget` bytes; None where no allowed form of some
    matrix was measured, or even the smallest forms are too large."""
    choices: list[list[Format | None]] = []
    for spec in space.matrices:
        path = path_of(spec)
        choices.append([form for form in (*losses[path], None) if allowed(path, form)])
    if not all(choices):
        return None
    parts = [
        [
            Choice(space.bytes_of(spec, form), losses[path_of(spec)][form] if form else 0.0)
            for form in forms
        ]
        for spec, forms in zip(space.matrices, choices, strict=True)
    ]
    if sum(min(choice.bytes for choice in part) for part in parts) > budget:
        return None
    picked = zip(space.matrices, choices, allocate(parts, budget), strict=True)
    return {path_of(spec): forms[i] for spec, forms, i in picked}


def name_of(forms: Parts) -> str:
    """Say the bits of each part in words, as `every matrix at 4 bits`."""
    bits = {part: _bits(form) for part, form in forms.items()}
    if len({*bits.values()}) == 1:
        return f"every matrix at {next(iter(bits.values()))} bits"
    ordered = sorted(bits.items(), key=lambda item: item[0] != "layers")
    return ", ".join(f"{part} at {n} bits" for part, n in ordered)
