"""What a checkpoint is, as `fastvlm inspect` shows it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from model_export.checkpoint.checkpoint import Checkpoint


def checkpoint_facts(path: Path) -> dict[str, Any]:
    """Read from its headers; of the tensors nothing is read but the head, if it has one.

    Raises:
        CheckpointError, ConfigError: it is no whole FastVLM.
    """
    checkpoint = Checkpoint(path)
    config = checkpoint.config
    dtypes = Counter(tensor.dtype for tensor in checkpoint.tensors.values())
    return {
        "kind": "checkpoint",
        "path": str(path),
        "source": checkpoint.name,
        "stored_as": checkpoint.kind,
        "license": checkpoint.license,
        "encoder": {
            "parameters": checkpoint.encoder_parameters,
            "image_size": config.vision.image_size,
            "tokens_per_image": config.vision.num_tokens,
            "channels": config.vision.hidden_size,
        },
        "llm": {
            "parameters": checkpoint.llm_parameters,
            "layers": config.text.num_hidden_layers,
            "hidden_size": config.text.hidden_size,
            "vocab_size": config.text.vocab_size,
            "tie_word_embeddings": checkpoint.tied,
        },
        "dtypes": dict(dtypes),
        "files": len(checkpoint.weight_files),
        "total_bytes": sum(file.stat().st_size for file in checkpoint.weight_files),
        "image_aspect_ratio": config.image_aspect_ratio,
    }
