"""The models that are compared: bundles and checkpoints, opened alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from fastvlm_mlx.bundle.bundle import Bundle
from fastvlm_mlx.bundle.config import FastVLMConfig
from fastvlm_mlx.bundle.kind import is_bundle
from fastvlm_mlx.components import image_processor, placeholder_id
from fastvlm_mlx.inspection import inspect_bundle
from fastvlm_mlx.vision.program.mlprogram import MLProgramEncoder
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.checkpoint.tokenizer import export_tokenizer
from model_export.encoder.references import reference_features
from model_export.gates.mlx_encoder import EmulatedMLXEncoder
from model_export.language.weights import BundleWeights, SourceWeights, Weights
from model_export.samples.images import Sample


@dataclass(frozen=True)
class Model:
    """A bundle or a checkpoint, opened: sizes, and how its two halves are evaluated.

    Attributes:
        encode: images → features [1, N, C] of each, as its own precision makes them.
    """

    name: str
    kind: str
    config: FastVLMConfig
    tokenizer: Tokenizer
    placeholder: int
    sizes: dict[str, float]
    weights: Weights
    encode: Callable[[Sequence[Sample]], list[np.ndarray]]

    @property
    def shape(self) -> tuple[Any, ...]:
        """What two models must share to be compared."""
        vision, text = self.config.vision, self.config.text
        own = asdict(replace(text, vocab_size=0, tie_word_embeddings=True))
        return (vision.image_size, vision.num_tokens, vision.hidden_size, *own.values())


def open_model(path: str | Path) -> Model:
    """Open a bundle or a checkpoint; raises BundleError or CheckpointError if it is neither."""
    directory = Path(path).expanduser()
    if directory.is_dir() and is_bundle(directory):
        return _bundle(directory)
    return _checkpoint(path)


def _bundle(path: Path) -> Model:
    bundle = Bundle.open(path)
    tokenizer = bundle.tokenizer()
    facts = inspect_bundle(path)
    size = bundle.config.vision.image_size
    process = image_processor(bundle, size, bundle.config.image_aspect_ratio)

    def encode(samples: Sequence[Sample]) -> list[np.ndarray]:
        if bundle.layout == "mlx":
            rounded = EmulatedMLXEncoder(bundle, bundle.config.dtype)
            return [rounded(process(sample.image)) for sample in samples]
        encoder = MLProgramEncoder(bundle.package)
        return [encoder.evaluate(process(p.image), round_fp16=True) for p in samples]

    return Model(
        name=str(path),
        kind="bundle",
        config=bundle.config,
        tokenizer=tokenizer,
        placeholder=placeholder_id(tokenizer, bundle),
        sizes=_sizes(facts["encoder"]["bytes"], facts["llm"]["bytes"], facts["llm"]["parameters"]),
        weights=BundleWeights(bundle),
        encode=encode,
    )


def _checkpoint(path: str | Path) -> Model:
    checkpoint = Checkpoint(path)
    exported = export_tokenizer(checkpoint)
    stored = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8}
    sizes = {
        name: stored[tensor.dtype] * int(np.prod(tensor.shape))
        for name, tensor in checkpoint.tensors.items()
    }
    # config.json's word for it is often wrong.
    text = replace(checkpoint.config.text, tie_word_embeddings=checkpoint.tied)
    in_llm = {spec.source for spec in checkpoint.llm_specs}
    llm = sum(size for name, size in sizes.items() if name in in_llm)

    def encode(samples: Sequence[Sample]) -> list[np.ndarray]:
        state = checkpoint.encoder_state()
        return [r.features for r in reference_features(state, checkpoint, samples)]

    return Model(
        name=str(path),
        kind="checkpoint",
        config=replace(checkpoint.config, text=text),
        tokenizer=exported.tokenizer,
        placeholder=exported.image_token_id,
        sizes=_sizes(sum(sizes.values()) - llm, llm, checkpoint.llm_parameters),
        weights=SourceWeights(checkpoint),
        encode=encode,
    )


def _sizes(encoder: int, llm: int, parameters: int) -> dict[str, float]:
    return {"encoder": encoder, "llm": llm, "bits_per_weight": round(8 * llm / parameters, 3)}
