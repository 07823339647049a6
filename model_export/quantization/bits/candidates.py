"""Assignments of bits that a search may take: those that losses say are best, and the plain ones.

Plain is what a user could have asked for instead: one form for the layers, one each for projector,
embedding and head, or a recipe of mlx-lm's.
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
from model_export.options import ExportOptions, LLMOptions
from model_export.quantization.bits.allocation import Choice, allocate
from model_export.quantization.bits.sensitivity import Losses

# Beside the widest form that all could have: so many narrower ones, and so many wider.
NARROWER, WIDER = 1, 3
# Of plain choices, those that nothing at or below the size is wider than everywhere, and as many
# more of the others.
LIKELY = 8
# Of those, as many are the start of a search of their own.
GROWN = 2
# A size is looked at that is larger by this share, for what a little more would buy.
A_LITTLE_MORE = 0.05
ABOVE = 3
_LEAST_LOSS = 1e-12


@dataclass(frozen=True)
class Candidate:
    """An assignment and what it is called; `bytes` of matrices, norms and biases apart."""

    name: str
    scheme: Scheme
    bytes: int
    predicted: float


# The form of each part that plain options can give one of its own; layers, projector and others.
Parts = Mapping[str, Format | None]


# Whether a search may give a matrix a form.
Allowed = Callable[[str, Format | None], bool]


@dataclass(frozen=True)
class Space:
    """What may be chosen from: a language model's matrices, and forms that the layout's loaders
    read."""

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
        """Of a matrix: what plain options can give a form of its own."""
        if path.startswith(PROJECTOR):
            return "projector"
        return {EMBEDDING: "embedding", HEAD: "head"}.get(path, "layers")

    def bytes_of(self, spec: TensorSpec, form: Format | None) -> int:
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
        """Bytes of everything, nothing quantized."""
        return self.rest + sum(self.bytes_of(spec, None) for spec in self.matrices)

    def budget(self, target: float) -> int:
        """Bytes that `target` bits per weight leave for matrices."""
        # No more is ever needed than all of it in the widest type.
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
        """Forms that a layer's matrix may get: the widest that all could have, and its
        neighbours. Beyond them too much is lost in one place for what it gains in another."""
        budget = self.budget(target)
        fitting = [f for f in self.forms if self._everywhere(f) <= budget]
        widest = self.forms.index(fitting[-1])
        if self.options.destination.layout == "app":
            # All that is quantized has one of them: wider ones fit no matrix.
            return self.forms[max(0, widest - NARROWER) : widest + 1]
        return self.forms[max(0, widest - NARROWER) : widest + 1 + WIDER]

    def _everywhere(self, form: Format) -> int:
        return sum(self.bytes_of(spec, form) for spec in self.matrices)

    def plain(self) -> Iterator[tuple[Parts, Scheme, int]]:
        """Every form for the layers with every form for each other part: these, scheme, bytes."""
        paths = [path_of(spec) for spec in self.matrices]
        parts = list(dict.fromkeys(self.part(path) for path in paths))
        choices: list[Format | None] = [*self.forms, None]
        sizes = dict.fromkeys(product(parts, choices), 0)
        for spec, form in product(self.matrices, choices):
            sizes[self.part(path_of(spec)), form] += self.bytes_of(spec, form)
        for forms in product(choices, repeat=len(parts)):
            chosen = dict(zip(parts, forms, strict=True))
            if recipes.unreadable(chosen, self.options.destination.layout) is None:
                scheme = {path: chosen[self.part(path)] for path in paths}
                yield chosen, scheme, sum(sizes[item] for item in chosen.items())

    def stock(self) -> Iterator[tuple[str, Scheme, int]]:
        """mlx-lm's recipes, as far as the layout holds them: name, scheme, bytes."""
        for name in recipes.STOCK:
            asked = LLMOptions(recipe=name, group_size=self.options.llm.group_size)
            layout = self.options.destination.layout
            try:
                scheme = recipes.scheme(self.specs, self.config, asked, layout)
            except OptionError:
                continue
            yield name, scheme, self.size(scheme)


def at_or_below(space: Space, losses: Losses, target: float) -> list[Candidate]:
    """What is worth measuring at `target` bits per weight, each assignment once."""
    budget = space.budget(target)
    found = [(parts, c) for parts, c in _plain(space, losses) if c.bytes <= budget]
    widest = [c for parts, c in found if not any(_dominates(other, parts) for other, _ in found)]
    likely = sorted((c for _, c in found), key=lambda c: c.predicted)[:LIKELY]
    stock = [
        Candidate(name, scheme, size, _predicted(scheme, losses))
        for name, scheme, size in space.stock()
        if size <= budget
    ]
    unique = {tuple(c.scheme.items()): c for c in [*widest, *likely, *stock]}
    for candidate in _assigned(space, losses, target, likely[:GROWN]):
        unique.setdefault(tuple(candidate.scheme.items()), candidate)
    return list(unique.values())


def alternatives(space: Space, target: float, *, widest: bool) -> list[Candidate]:
    """Everything plain at or below `target` bits per weight, and mlx-lm's recipes.

    Args:
        widest: only what nothing else that fits is wider than everywhere.
    """
    budget = space.budget(target)
    fitting = [each for each in space.plain() if each[2] <= budget]
    plain = [
        Candidate(name_of(parts), scheme, size, 0.0)
        for parts, scheme, size in fitting
        if not widest or not any(_dominates(other, parts) for other, _, _ in fitting)
    ]
    stock = [Candidate(name, scheme, size, 0.0) for name, scheme, size in space.stock()]
    return plain + [candidate for candidate in stock if candidate.bytes <= budget]


def a_little_above(space: Space, losses: Losses, target: float) -> list[Candidate]:
    """Plain choices just beyond `target`, those that promise most."""
    low, high = space.budget(target), space.budget(target * (1 + A_LITTLE_MORE))
    found = [c for _, c in _plain(space, losses) if low < c.bytes <= high]
    return sorted(found, key=lambda c: c.predicted)[:ABOVE]


def _plain(space: Space, losses: Losses) -> Iterator[tuple[Parts, Candidate]]:
    for parts, scheme, size in space.plain():
        yield parts, Candidate(name_of(parts), scheme, size, _predicted(scheme, losses))


def _predicted(scheme: Scheme, losses: Losses) -> float:
    """As if losses added up."""
    return sum(_loss(losses[path], form) for path, form in scheme.items() if form is not None)


def _loss(by_form: Mapping[Format, float], form: Format) -> float:
    """Of a form that was not measured what follows from the nearest one that was."""
    if form in by_form:
        return by_form[form]
    nearest = min(by_form, key=lambda f: abs(f.bits - form.bits))
    return by_form[nearest] * 4.0 ** (nearest.bits - form.bits)


def _dominates(one: Parts, other: Parts) -> bool:
    """Whether it is as wide everywhere, and not the same."""
    wider = [_bits(one[part]) - _bits(form) for part, form in other.items()]
    return min(wider) >= 0 and max(wider) > 0


def _bits(form: Format | None) -> int:
    return 16 if form is None else form.bits


def _assigned(
    space: Space, losses: Losses, target: float, below: Sequence[Candidate]
) -> Iterator[Candidate]:
    """The assignments of least loss by what was measured, and by the trend of it over the widths:
    a single measurement may be luck. Losses of few bits are more together than their sum, so each
    is also solved with narrow forms left out; with what fits widened and nothing narrowed; and with
    what is a little too large narrowed and nothing widened."""
    app = space.options.destination.layout == "app"
    layers = next(forms for path, forms in losses.items() if space.part(path) == "layers")
    near = sorted(layers, key=lambda form: form.bits)
    above = [] if app else a_little_above(space, losses, target)

    def among(some: Sequence[Format]) -> Allowed:
        # A part that is small or read once may well have more bits than any layer's matrix.
        return lambda path, form: (
            form is None or form in some or (not app and space.part(path) != "layers")
        )

    def beyond(base: Candidate, sign: int) -> Allowed:
        held = [base.scheme[path] for path in losses if base.scheme[path] is not None]
        return lambda path, form: (
            sign * _bits(form) >= sign * _bits(base.scheme[path])
            and (not app or form is None or form in held)
        )

    sets = [among([form]) for form in near] if app else [among(near[i:]) for i in range(len(near))]
    sets += [beyond(base, 1) for base in below] + [beyond(base, -1) for base in above]
    for name, believed in (("search", losses), ("search by trend", _trend(losses))):
        for allowed in sets:
            chosen = _allocated(space, believed, allowed, space.budget(target))
            if chosen is not None:
                predicted = _predicted(chosen, losses)
                yield Candidate(name, chosen, space.size(chosen), predicted)


def _trend(losses: Losses) -> Losses:
    """Losses that fall to a quarter with each bit, through what was measured in the mean of logs:
    an error's energy does."""
    found = {}
    for path, by_form in losses.items():
        level = [log(max(loss, _LEAST_LOSS)) + f.bits * log(4) for f, loss in by_form.items()]
        mean = sum(level) / len(level)
        found[path] = {form: exp(mean - form.bits * log(4)) for form in by_form}
    return found


def _allocated(space: Space, losses: Losses, allowed: Allowed, budget: int) -> Scheme | None:
    """None where what is allowed is too large, or was not measured."""
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


def name_of(chosen: Mapping[str, Format | None]) -> str:
    """`every matrix at 4 bits`, or each part's bits."""
    bits = {part: _bits(form) for part, form in chosen.items()}
    if len({*bits.values()}) == 1:
        return f"every matrix at {next(iter(bits.values()))} bits"
    ordered = sorted(bits.items(), key=lambda item: item[0] != "layers")
    return ", ".join(f"{part} at {n} bits" for part, n in ordered)
