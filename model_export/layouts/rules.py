"""The rules that the loaders of both layouts share, decoded as those programs do.

No function of our writer or our reader is used here, or both could be wrong alike: headers are read
again, names and shapes follow from the numbers in config.json as the programs' own modules compute
them, and the shapes of a quantized matrix follow from its bits. `app` and `mlx` say which rule
belongs to which program.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlm_mlx.bundle.quantization import Format
from fastvlm_mlx.errors import BundleError

FLOATS = ("F16", "BF16", "F32")
# No header is longer; that of a 7B model has 50 kB.
MAX_HEADER_BYTES = 100_000_000
END_OF_TURN = "<|im_end|>"


class RuleError(BundleError):
    """A rule that is not kept: in which file, what was found and what was expected. The layout adds
    which program the rule belongs to."""


@dataclass(frozen=True)
class Entry:
    """A tensor as a header describes it: safetensors' name of its type, and its shape."""

    dtype: str
    shape: tuple[int, ...]


# The shape of each tensor before quantization, by its name.
Shapes = dict[str, tuple[int, ...]]


def read_object(directory: Path, name: str) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        RuleError: there is no such file, or it holds something else.
    """
    try:
        data = json.loads((directory / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RuleError(f"{name} can't be read as JSON ({error})") from error
    if not isinstance(data, dict):
        raise RuleError(f"{name} holds a {type(data).__name__}, expected an object")
    return data


def read_headers(directory: Path) -> dict[str, Entry]:
    """Read which tensors the safetensors files below a directory hold.

    Raises:
        RuleError: a header can't be read, or two files hold the same name.
    """
    entries: dict[str, Entry] = {}
    for file in sorted(directory.rglob("*.safetensors")):
        # macOS leaves such a file beside each that it copies to a disk of another system.
        if file.name.startswith("._"):
            continue
        for name, entry in _header(file).items():
            if name in entries:
                raise RuleError(f"the .safetensors files hold {name} twice, expected it once")
            entries[name] = entry
    return entries


def _header(file: Path) -> dict[str, Entry]:
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > MAX_HEADER_BYTES:
                raise RuleError(
                    f"{file.name} has a header of {length:,} bytes, expected safetensors"
                )
            data = json.loads(stream.read(length))
        return {
            name: Entry(entry["dtype"], tuple(entry["shape"]))
            for name, entry in data.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RuleError(f"{file.name} is not a whole safetensors file ({error})") from error


def quantized_form(data: Any, path: str) -> Format:
    """Read an entry of config.json's `quantization`, which is affine unless it says otherwise.

    Raises:
        RuleError: bits or group size are no numbers.
    """
    form = (data.get("bits"), data.get("group_size"), data.get("mode", "affine"))
    if [type(value) for value in form] != [int, int, str]:
        raise RuleError(f"config.json gives {path} the form {data}, expected bits and group_size")
    return Format(*form)


def decoder_shapes(config: Mapping[str, Any]) -> tuple[Shapes, set[str]]:
    """Compute the shapes of Qwen2's tensors below `language_model.`, and list the paths of its
    matrices, whose weights may be quantized."""
    prefix = "language_model.model."
    width, inner, rows = (config[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    narrow = width // heads * groups
    matrices = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (narrow, width),
        "self_attn.v_proj": (narrow, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    shapes: Shapes = {f"{prefix}norm.weight": (width,)}
    of_matrices = {f"{prefix}embed_tokens": (rows, width)}
    # Where the key is missing, every loader takes the head to be the embedding.
    if config.get("tie_word_embeddings") is False:
        of_matrices["language_model.lm_head"] = (rows, width)
    for index in range(config["num_hidden_layers"]):
        layer = f"{prefix}layers.{index}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}{norm}.weight"] = (width,)
        for name in ("q_proj", "k_proj", "v_proj"):
            shapes[f"{layer}self_attn.{name}.bias"] = matrices[f"self_attn.{name}"][:1]
        of_matrices |= {layer + name: shape for name, shape in matrices.items()}
    shapes |= {f"{path}.weight": shape for path, shape in of_matrices.items()}
    return shapes, {*of_matrices}


def projector_shapes(config: Mapping[str, Any], first: str, second: str) -> tuple[Shapes, set[str]]:
    """Compute the shapes of the projector's two linear layers, and list their paths.

    Args:
        first, second: the paths of the two layers.
    """
    width = config["hidden_size"]
    shapes: Shapes = {
        f"{first}.weight": (width, config["mm_hidden_size"]),
        f"{second}.weight": (width, width),
    }
    shapes |= {f"{path}.bias": (width,) for path in (first, second)}
    return shapes, {first, second}


def parts(path: str, shape: tuple[int, ...], form: Format) -> Iterator[tuple[str, Entry]]:
    """Yield the tensors that a quantized matrix consists of.

    The codes of a row lie end to end in words of 32 bits. Each group of a row has a scale. In the
    affine mode that is a float, with a bias; in the other modes it is one byte.

    Raises:
        RuleError: a row does not divide into such groups, or into whole words.
    """
    rows, columns = shape
    if columns % form.group_size or columns * form.bits % 32:
        raise RuleError(
            f"config.json gives {path} {form}, which do not divide its {columns} columns"
        )
    yield f"{path}.weight", Entry("U32", (rows, columns * form.bits // 32))
    shared = (rows, columns // form.group_size)
    if form.mode == "affine":
        yield f"{path}.scales", Entry("float", shared)
        yield f"{path}.biases", Entry("float", shared)
    else:
        yield f"{path}.scales", Entry("U8", shared)


def check_entries(found: Mapping[str, Entry], expected: Mapping[str, Entry]) -> None:
    """Check that every tensor is there with its type and shape, and that no other is.

    Args:
        expected: a type of "float" stands for any floating type.

    Raises:
        RuleError: naming the first tensor that is not.
    """
    for name in sorted(found.keys() | expected.keys()):
        where = f"in the .safetensors files, {name}"
        if name not in found:
            raise RuleError(f"{where} is missing, expected {_shown(expected[name])}")
        if name not in expected:
            raise RuleError(f"{where} is {_shown(found[name])}, expected no such weight")
        wanted, held = expected[name], found[name]
        types = FLOATS if wanted.dtype == "float" else (wanted.dtype,)
        if held.shape != wanted.shape or held.dtype not in types:
            raise RuleError(f"{where} is {_shown(held)}, expected {_shown(wanted)}")


def check_end_of_turn(directory: Path) -> int:
    """Check that the tokenizer ends an answer with the token that the model ends its turn with, and
    return the id of it.

    Raises:
        RuleError: it has another `eos_token`, or no token for the end of a turn.
    """
    name = "tokenizer_config.json"
    said = read_object(directory, name).get("eos_token")
    found = said.get("content") if isinstance(said, dict) else said
    if found != END_OF_TURN:
        raise RuleError(
            f"{name} has eos_token {found!r}, expected {END_OF_TURN!r}: answers would go on to "
            "their limit"
        )
    for token in read_object(directory, "tokenizer.json").get("added_tokens") or ():
        if token.get("content") == END_OF_TURN:
            return int(token["id"])
    raise RuleError(f"tokenizer.json has no {END_OF_TURN}, expected Qwen2's tokens")


def _shown(entry: Entry) -> str:
    return f"{entry.dtype} {list(entry.shape)}"


def refuse(path: Path, loader: str, broken: RuleError) -> BundleError:
    """Make the error that says which program can't load the bundle, and why."""
    return BundleError(f"{path} can't be loaded by {loader}: {broken}; export the checkpoint again")
