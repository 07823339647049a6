"""The format of every matrix of the language model and the projector.

It comes from one format for all; from bits for the embedding, the head or the projector; or from a
recipe by layer, which is one of mlx-lm's own by name, or a JSON file of the form

    {"*.mlp.down_proj": 6, "model.layers.0.*": {"bits": 8, "group_size": 32}, "lm_head": 16}

whose keys are paths of modules or patterns of them; of those that fit a module the last one counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any

from fastvlm_mlx.bundle.bundle import Bundle, model_name, stored_name
from fastvlm_mlx.bundle.config import FastVLMConfig
from fastvlm_mlx.bundle.quantization import MODES, Format, Quantization
from fastvlm_mlx.bundle.schema import read_json
from fastvlm_mlx.errors import ConfigError, OptionError
from model_export.checkpoint.names import TensorSpec
from model_export.options import GROUP_SIZES, RECIPES, LLMOptions
from model_export.options.loaders import LOADERS

PREFIX = "language_model."
EMBEDDING = PREFIX + "model.embed_tokens"
HEAD = PREFIX + "lm_head"
PROJECTOR = "multi_modal_projector."

# The bytes of a scale or a bias, which a group of weights shares.
DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}

# The format of each matrix by its path in the model; None where it is left at the export's dtype.
Scheme = Mapping[str, Format | None]


def path_of(spec: TensorSpec) -> str:
    """Return the model's path of the module that a tensor of either layout belongs to."""
    return model_name(spec.name).rpartition(".")[0]


def is_matrix(spec: TensorSpec) -> bool:
    """Whether it is a weight that can be quantized: of the projector or the language model."""
    return len(spec.shape) == 2 and model_name(spec.name).startswith((PREFIX, PROJECTOR))


def scheme(
    specs: Sequence[TensorSpec], config: FastVLMConfig, options: LLMOptions, layout: str
) -> Scheme:
    """Choose the format of every matrix among `specs`, as the options ask for it.

    Raises:
        OptionError: a recipe can't be read or names what is not there; a width is no multiple of
            its group; bits for a head that is the embedding; or the layout's loaders can't read it.
    """
    widths = {path_of(spec): spec.shape[1] for spec in specs if is_matrix(spec)}
    formats: dict[str, Format | None] = dict.fromkeys(widths, options.format)
    projector = options.part_format(options.projector_bits)
    formats |= {path: projector for path in widths if path.startswith(PROJECTOR)}
    if options.recipe is not None:
        formats |= _recipe(str(options.recipe), widths, config, options)
    if options.embed_bits is not None:
        formats[EMBEDDING] = options.part_format(options.embed_bits)
    if options.head_bits is not None:
        if HEAD not in widths:
            raise OptionError(
                f"--head-bits is {options.head_bits} and this model's head is its embedding: use "
                "--embed-bits"
            )
        formats[HEAD] = options.part_format(options.head_bits)
    for path, stored in formats.items():
        _check_width(path, widths[path], stored)
    check_layout(formats, layout)
    return formats


def check_layout(formats: Scheme, layout: str) -> None:
    """Check a scheme against its layout; raises OptionError if the loaders can't read it."""
    if reason := unreadable(formats, layout):
        raise OptionError(f"{reason}; use --layout mlx, or one format and 16 bits")


def unreadable(formats: Scheme, layout: str) -> str | None:
    """Say why the layout's loaders can't read a scheme; None where they can."""
    loader = LOADERS[layout]
    distinct = {stored for stored in formats.values() if stored is not None}
    if unknown := sorted(str(stored) for stored in distinct if not loader.knows(stored)):
        return (
            f"layout {layout} can't hold {unknown[0]}: {loader.program} ({loader.versions}) reads "
            f"{loader.known()}"
        )
    if loader.per_module or len(distinct) <= 1:
        return None
    listed = " and ".join(sorted(map(str, distinct)))
    return (
        f"layout {layout} can't hold {listed}: {loader.program} reads one choice of affine "
        "bits and group size for all that is quantized"
    )


def scheme_of(bundle: Bundle) -> Scheme:
    """Read the scheme of a bundle, ours or another program's, from its files."""
    tensors = bundle.model_tensors()
    matrices = [
        name.rpartition(".")[0]
        for name, array in tensors.items()
        if name.endswith(".weight") and array.ndim == 2
    ]
    return {
        path: bundle.format_of(path) if f"{path}.scales" in tensors else None for path in matrices
    }


def quantization(formats: Scheme, layout: str) -> Quantization | None:
    """Describe a scheme for config.json: the commonest format, and the modules that differ."""
    counted = Counter(stored for stored in formats.values() if stored is not None)
    if not counted:
        return None
    default = counted.most_common(1)[0][0]
    # What is left unquantized has no scales, which every loader goes by.
    differing = {
        stored_name(path, layout): stored
        for path, stored in formats.items()
        if stored is not None and stored != default
    }
    return Quantization(default, differing)


def layer_bits(formats: Scheme, specs: Iterable[TensorSpec]) -> int:
    """Compute the mean bits of the layers' weights, rounded down: what a model card's tag says."""
    layers = [spec for spec in specs if is_matrix(spec) and ".layers." in spec.name]
    of_layers = [formats.get(path_of(spec)) for spec in layers]
    if not any(of_layers):
        return 16
    sizes = [prod(spec.shape) for spec in layers]
    bits = [16 if stored is None else stored.bits for stored in of_layers]
    mean = sum(b * size for b, size in zip(bits, sizes, strict=True)) / sum(sizes)
    return min(int(mean), 8)


def _check_width(path: str, width: int, stored: Format | None) -> None:
    if stored is None or width % stored.group_size == 0:
        return
    fitting = [str(group) for group in GROUP_SIZES if width % group == 0]
    advice = f"use --group-size {' or '.join(fitting)}" if fitting else "leave it at 16 bits"
    raise OptionError(
        f"{path} is {width} wide, which is no multiple of the group size {stored.group_size}: "
        + advice
    )


def _recipe(
    name: str, widths: Mapping[str, int], config: FastVLMConfig, options: LLMOptions
) -> dict[str, Format | None]:
    if name in RECIPES:
        predicate = _predicate(name, config, options.resolved_group_size)
        return {path: predicate(path.removeprefix(PREFIX)) for path in widths if PREFIX in path}
    file = Path(name).expanduser()
    if not file.is_file():
        raise OptionError(
            f"--recipe {name} is no file and no recipe by name: expected a JSON file, or "
            f"{', '.join(RECIPES)}"
        )
    entries = read_json(None, file, OptionError, remedy="correct it")
    by_pattern: dict[str, Format | None] = {}
    for pattern, value in entries.items():
        fitting = [path for path in widths if _fits(path, pattern)]
        if not fitting:
            raise OptionError(
                f"{file} names {pattern}, which no layer is called{_near(pattern, widths)}"
            )
        by_pattern |= dict.fromkeys(fitting, _entry(file, pattern, value, options))
    return by_pattern


def _fits(path: str, pattern: str) -> bool:
    return fnmatchcase(path, pattern) or fnmatchcase(path.removeprefix(PREFIX), pattern)


def _near(pattern: str, paths: Iterable[str]) -> str:
    known = [path.removeprefix(PREFIX) for path in paths]
    near = get_close_matches(pattern.removeprefix(PREFIX), known, n=3, cutoff=0.4)
    return f": the nearest are {', '.join(near)}" if near else ": see `fastvlm inspect --json`"


def _entry(file: Path, pattern: str, value: Any, options: LLMOptions) -> Format | None:
    """Read an entry of a recipe: a number of bits, or a format as in config.json."""
    if value is False or value == 16:
        return None
    given = {"bits": value} if type(value) is int else value
    if not isinstance(given, dict) or not given.keys() <= {"bits", "group_size", "mode"}:
        raise OptionError(
            f"{file}: {pattern} is {value!r}, expected bits, or an object of bits, group_size and "
            "mode"
        )
    bits, groups = MODES.get(given.get("mode", "affine"), ((0,), (0,)))
    own = {"bits": bits[0], "group_size": groups[0]}
    if given.get("mode", "affine") == "affine":
        own = {"group_size": options.affine_group_size}
    try:
        return Quantization.from_dict(own | given).default
    except ConfigError as error:
        allowed = "; ".join(f"{m}: bits {b}, groups {g}" for m, (b, g) in MODES.items())
        raise OptionError(f"{file}: {pattern} is {value!r}, expected one of {allowed}") from error


def _predicate(name: str, config: FastVLMConfig, group_size: int) -> Callable[[str], Format | None]:
    """Make mlx-lm's own function that gives a module's path its format, for this model."""
    from mlx_lm.convert import mixed_quant_predicate_builder

    from fastvlm_mlx.language.model import Model

    model = Model(config).language_model
    predicate = mixed_quant_predicate_builder(name, model, group_size)

    def format_of(path: str) -> Format | None:
        form = predicate(path, model)
        return Format(**form) if isinstance(form, dict) else None

    return format_of
