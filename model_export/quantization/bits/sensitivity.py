"""The sensitivity of each matrix: the KL divergence that quantizing it alone costs.

One matrix at a time is quantized and everything else left as the source has it, in every form that
it may get: what three bits cost does not follow from what four do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from fastvlm_mlx.bundle.quantization import Format
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.checkpoint.tokenizer import ExportedTokenizer
from model_export.encoder.references import Reference
from model_export.language.recipes import Scheme
from model_export.quantization.bits import trial

# Nats lost, by the model's path of a matrix and the format it is in.
Losses = Mapping[str, Mapping[Format, float]]


def measure(
    checkpoint: Checkpoint,
    tokenizer: ExportedTokenizer,
    references: Sequence[Reference],
    formats: Mapping[str, Sequence[Format]],
    dtype: str,
    progress: Callable[[float], None],
) -> Losses:
    """Measure the nats that each matrix loses in each format, the mean over the answers' tokens.

    Args:
        references: images with questions.
        formats: those to measure, by the model's path of a matrix.
        dtype: of scales and biases.
        progress: called with the share that is done.
    """
    alone: list[Scheme] = [{path: form} for path, forms in formats.items() for form in forms]
    lost = trial.divergences(checkpoint, tokenizer, references, alone, dtype, progress)
    losses: dict[str, dict[Format, float]] = {path: {} for path in formats}
    for scheme, loss in zip(alone, trial.means(lost), strict=True):
        ((path, form),) = scheme.items()
        if form is not None:
            losses[path][form] = loss
    return losses
