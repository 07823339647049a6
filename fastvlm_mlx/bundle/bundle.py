"""A bundle: its configuration, tokenizer and weights, read from its directory when asked for.

Read by the runtime and written by the exporter. Apple's own bundles (layout `app`) and mlx-vlm's
conversions (layout `mlx`) have no manifest; they are taken as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from fastvlm_mlx.bundle.config import IMAGE_TOKEN, TRANSFORMERS_MODEL_TYPE, FastVLMConfig
from fastvlm_mlx.bundle.directory import Directory, checkpoint_found
from fastvlm_mlx.bundle.kind import is_bundle
from fastvlm_mlx.bundle.manifest import EXPORT_AGAIN
from fastvlm_mlx.bundle.quantization import Format
from fastvlm_mlx.bundle.schema import TokenId, check
from fastvlm_mlx.bundle.tokenizer import read_tokenizer
from fastvlm_mlx.errors import BundleError

if TYPE_CHECKING:
    import mlx.core as mx
    from tokenizers import Tokenizer

PACKAGE = "fastvithd.mlpackage"
# Weights of an `mlx` bundle: the encoder's, and the projector's with the model's own names.
ENCODER_PREFIX = "vision_tower.vision_model."
MLX_PROJECTOR = {
    "mm_projector.0.": "multi_modal_projector.linear_0.",
    "mm_projector.2.": "multi_modal_projector.linear_2.",
}

# Weights that a checkpoint has and a bundle never.
PICKLED = ("pytorch_model*.bin", "mm_projector.bin", "non_lora_trainables.bin", "adapter_*.bin")


@dataclass(frozen=True)
class Bundle(Directory):
    """A bundle on disk, its configuration read and nothing else."""

    raw_config: dict[str, Any]
    config: FastVLMConfig

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Look at what is at `path`, and read `config.json`.

        Raises:
            BundleError: as `Directory.look`; or config.json is not what the manifest says.
            ConfigError: config.json describes something else.
        """
        found = Directory.look(path)
        raw = found.read_json("config.json")
        if found.manifest is None and _is_checkpoint(found, raw):
            raise checkpoint_found(found.path)
        config = FastVLMConfig.from_dict(raw)
        bundle = cls(found.path, found.manifest, found.stamps, raw, config)
        # Of a bundle with a manifest nothing is parsed that was not compared with its hash.
        if found.manifest is None and any(n.startswith("model.") for n in bundle.tensor_names):
            raise checkpoint_found(bundle.path)
        return bundle

    def at(self, image_size: int) -> Bundle:
        """The same bundle, its configuration that of another input size in pixels.

        Raises:
            ConfigError: a size that the encoder can't have.
        """
        vision = replace(self.config.vision, image_size=image_size)
        return replace(self, config=replace(self.config, vision=vision))

    @cached_property
    def layout(self) -> str:
        """`app` or `mlx`: by the manifest, else by where the encoder is."""
        if self.manifest is not None:
            return str(self.manifest["layout"])
        holds_encoder = any(name.startswith(ENCODER_PREFIX) for name in self.tensor_names)
        return "mlx" if holds_encoder else "app"

    @cached_property
    def package(self) -> Path:
        """The Core ML encoder.

        Raises:
            BundleError: there is none, or more than one.
        """
        first = {PurePosixPath(name).parts[0] for name in self.stamps}
        found = sorted(name for name in first if name.endswith(".mlpackage"))
        if len(found) != 1:
            raise BundleError(
                f"{self.path} holds {len(found)} encoders ({', '.join(found) or 'none'}): expected "
                f"one, {PACKAGE}; {EXPORT_AGAIN}"
            )
        return self.path / found[0]

    @cached_property
    def encoder_files(self) -> list[str]:
        """The relative names of the files that the encoder is in.

        Raises:
            BundleError: there is no package, or more than one, or no weights.
        """
        if self.layout == "app":
            return [name for name in self.stamps if name.startswith(f"{self.package.name}/")]
        return [file.relative_to(self.path).as_posix() for file in self.weight_files]

    @cached_property
    def weight_files(self) -> list[Path]:
        """Every `.safetensors` below the directory, as the loaders of the layout read them.

        Raises:
            BundleError: there is none.
        """
        found = sorted(self.path / name for name in self.stamps if name.endswith(".safetensors"))
        if not found:
            raise BundleError(f"{self.path} holds no .safetensors file: {EXPORT_AGAIN}")
        return found

    @cached_property
    def tensor_names(self) -> frozenset[str]:
        """The names of all tensors, from the headers; none where there are no weights.

        Raises:
            BundleError: a file is damaged, or two hold a tensor of the same name.
        """
        if not any(name.endswith(".safetensors") for name in self.stamps):
            return frozenset()
        return frozenset(tensor_names(self.weight_files))

    def tensors(self) -> dict[str, mx.array]:
        """The weights by name, unevaluated: headers are read, data when it is used.

        A new map each time, as an array that was evaluated stays in its map, and memory. Whoever
        has evaluated them calls `check_unchanged`.

        Raises:
            BundleError: there is none, a file is damaged, or has changed since it was opened.
        """
        import mlx.core as mx

        _ = self.weight_files, self.tensor_names
        arrays: dict[str, mx.array] = {}
        for file in self.weight_files:
            try:
                arrays |= mx.load(str(file))  # type: ignore[arg-type]
            # A name that is no text, for example, is a ValueError.
            except (RuntimeError, ValueError) as error:
                raise BundleError(
                    f"{file} is not a safetensors file that MLX reads ({error}): {EXPORT_AGAIN}"
                ) from error
        self.check_unchanged(file.relative_to(self.path).as_posix() for file in self.weight_files)
        return arrays

    def model_tensors(self) -> dict[str, mx.array]:
        """Projector and language model by the model's own names. Errors as `tensors`."""
        return {
            model_name(name): array
            for name, array in self.tensors().items()
            if not name.startswith(ENCODER_PREFIX)
        }

    def format_of(self, path: str) -> Format | None:
        """The quantized form of the module that the model calls `path`, if its weights have scales.

        None where config.json has no quantization, or says that this module is left out.
        """
        quantization = self.config.quantization
        return None if quantization is None else quantization.of(stored_name(path, self.layout))

    def encoder_arrays(self) -> dict[str, mx.array]:
        """The encoder of an `mlx` bundle, by its own names. Errors as `tensors`."""
        return {
            name.removeprefix(ENCODER_PREFIX): array
            for name, array in self.tensors().items()
            if name.startswith(ENCODER_PREFIX)
        }

    @property
    def tokenizer_file(self) -> Path:
        return self.path / "tokenizer.json"

    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer.json; an `app` bundle's is checked for the placeholder.

        Raises:
            BundleError: it can't be read, its `<image>` is not what config.json says, or it has a
                token without a row in the embedding.
        """
        file, rows = self.tokenizer_file, self.config.text.vocab_size
        if file.name not in self.stamps:
            raise BundleError(
                f"{self.path} holds no tokenizer.json: expected the tokenizer in the form that "
                f"Swift reads, {EXPORT_AGAIN}"
            )
        data = self.read(file.name)
        tokenizer = read_tokenizer(data, str(file), BundleError, remedy=EXPORT_AGAIN, rows=rows)
        if self.layout == "mlx":
            return tokenizer
        found, expected = tokenizer.token_to_id(IMAGE_TOKEN), self.config.image_token_index
        if found != expected:
            raise BundleError(
                f"{file} gives {IMAGE_TOKEN} the id {found} where config.json says {expected}: "
                f"{EXPORT_AGAIN}"
            )
        return tokenizer

    @cached_property
    def preprocessor_config(self) -> dict[str, Any]:
        if "preprocessor_config.json" in self.stamps:
            return self.read_json("preprocessor_config.json")
        # transformers 5, and with it mlx-vlm's conversions, put one inside the other.
        present = "processor_config.json" in self.stamps
        processor = self.read_json("processor_config.json") if present else {}
        inside = processor.get("image_processor")
        return {**processor, **inside} if isinstance(inside, dict) else {}

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        """The ids that end an answer: generation_config.json's and config.json's together.

        Raises:
            BundleError: one is no id of the embedding's rows.
        """
        name, rows = "generation_config.json", self.config.text.vocab_size
        ids: set[int] = set()
        for source in (self.read_json(name) if name in self.stamps else {}, self.raw_config):
            found = source.get("eos_token_id")
            listed = found if isinstance(found, list) else [] if found is None else [found]
            where = f"eos_token_id of {self.path}"
            ids.update(check(listed, list[TokenId], where, BundleError, remedy=EXPORT_AGAIN))
        if ids and max(ids) >= rows:
            raise BundleError(
                f"eos_token_id of {self.path} is {max(ids)} and the embedding has {rows:,} rows: "
                f"expected the ids of this model's tokens, {EXPORT_AGAIN}"
            )
        return frozenset(ids)


def _is_checkpoint(found: Directory, raw_config: dict[str, Any]) -> bool:
    """Whether a directory without a manifest is a checkpoint that other tools than Apple's wrote;
    Apple's has tensors by which it is told."""
    pickled = any(fnmatch(name, pattern) for name in found.stamps for pattern in PICKLED)
    of_transformers = raw_config.get("model_type") == TRANSFORMERS_MODEL_TYPE
    return (pickled or of_transformers) and not is_bundle(found.path)


def model_name(stored: str) -> str:
    """The model's name of what a bundle of either layout stores as `stored`: a tensor's name, or
    the path of a module."""
    return _renamed(stored, MLX_PROJECTOR.items())


def stored_name(name: str, layout: str) -> str:
    """What a bundle of `layout` stores the model's `name` under: the inverse of `model_name`."""
    pairs = [(of_model, prefix) for prefix, of_model in MLX_PROJECTOR.items()]
    return _renamed(name, pairs) if layout == "mlx" else name


def _renamed(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    # A module's path has no dot at its end, which the prefixes have.
    path = f"{name}."
    for prefix, other in pairs:
        if path.startswith(prefix):
            return (other + path.removeprefix(prefix)).removesuffix(".")
    return name


def tensor_names(files: Iterable[Path]) -> dict[str, Path]:
    """Each tensor's file. Raises BundleError: one is not whole, or a tensor is in two."""
    from safetensors import SafetensorError, safe_open

    names: dict[str, Path] = {}
    for file in files:
        try:
            # Checks the header and that it accounts for every byte.
            with safe_open(str(file), framework="numpy") as stream:
                found = list(stream.keys())
        except (SafetensorError, OSError) as error:
            raise BundleError(
                f"{file} is not a whole safetensors file ({error}): {EXPORT_AGAIN}"
            ) from error
        for name in found:
            if name in names:
                raise BundleError(
                    f"{name} is in both {names[name]} and {file}: expected each tensor once, "
                    "remove the file that does not belong to this bundle"
                )
            names[name] = file
    return names
