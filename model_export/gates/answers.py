"""The language model's gates, end to end, against the source checkpoint.

Both sides answer the same questions about the same images, each with its own encoder's features,
its own pixels and its own settings. The right answers are given, so that both are asked for the
next token at the same places. The gates measure the mean KL divergence of the bundle's distribution
from the source's, and how often both choose the same token.

What the divergence may be. That the right weights are there, under the right settings, is proven
bit by bit elsewhere (`equality`). Left are two questions, and the ceiling is the lower answer.
What should it cost? A third side has the source's weights as plain rounding stores them in the
recorded forms, and the bundle's features: the divergence of that, measured at the same places, is
what the choice of bits and of encoder costs. A bundle by plain rounding repeats it to the last
digits, one by a method is below it; `PLAIN_FACTOR` is room for a method that gains elsewhere and
loses on these few images. A number for each width of bits would have to suit the tensors that
round worst, and lets a thousand times as much pass in the others.
Is it still the model? A choice can cost too much with nothing wrong in how it was carried out.
`USABLE_NATS` is where the bundle gives what the source says half of its probability, in the
(geometric) mean of the places: a model that babbles is at several times that. `USABLE_SHARE` asks
the same of the first choice. Who wants the bundle all the same gives limits of their own, which
stand in place of these.

A share is counted where the source is sure, which gives its choice at least twice the probability
of its second: nearer ties may fall either way. It is judged from `COUNTED_PLACES` on: there a
bundle that truly agrees in 95 of 100 places is below the floor of 0.8 in less than one case of a
hundred, and one that agrees in half of them above it in less than one. Of fewer, nothing follows
either way, and the manifest says that nothing was judged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import log
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

from fastvlm_mlx.bundle.bundle import Bundle
from fastvlm_mlx.components import placeholder_id
from fastvlm_mlx.errors import BundleError
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.encoder.references import Reference
from model_export.gates.gate import Gate
from model_export.options import FLOAT16_MAX, ExportOptions

if TYPE_CHECKING:
    import torch

    from model_export.language.dialogue import Dialogue

DECIDED_NATS = log(2)
USABLE_NATS = log(2)
USABLE_SHARE = 0.8
COUNTED_PLACES = 20
PLAIN_FACTOR = 2.0
# What float32 leaves of a divergence of zero.
EXACT_NATS = 1e-6


def answer_gates(
    checkpoint: Checkpoint,
    bundle: Bundle,
    tokenizer: Tokenizer,
    references: Sequence[Reference],
    features: Sequence[np.ndarray],
    options: ExportOptions,
    source_bundle: Bundle | None = None,
    *,
    is_plain: bool = False,
) -> list[Gate]:
    """Measure KL divergence, agreement and largest magnitude over every image with questions.

    Args:
        tokenizer: the source's; the bundle's own must give the same ids.
        features: the bundle's own, for the same images as `references`.
        source_bundle: read in place of the checkpoint's language model, as it may be quantized.
        is_plain: the exact gates have found that the bundle's tensors and settings are what plain
            rounding makes of the source, so its divergence is the third side's too.

    Raises:
        BundleError: the bundle's tokenizer gives other ids.
    """
    import torch

    from model_export.gates import equality
    from model_export.language.evaluation import ComparedModel, outcomes
    from model_export.language.weights import BundleWeights, SourceWeights, Weights

    text = replace(checkpoint.config.text, tie_word_embeddings=checkpoint.tied)
    of_checkpoint = SourceWeights(checkpoint)
    source: Weights = of_checkpoint
    plain: Weights = equality.PlainWeights(of_checkpoint, equality.Made.shown(bundle))
    if source_bundle is not None:
        # Its tensors are taken over as they are.
        source = plain = BundleWeights(source_bundle)
    pairs = [
        (reference, computed)
        for reference, computed in zip(references, features, strict=True)
        if reference.sample.questions
    ]
    expected_features = [reference.features for reference, _ in pairs]
    own_features = [computed for _, computed in pairs]
    models = [
        ComparedModel(source, expected_features),
        ComparedModel(BundleWeights(bundle), own_features, bundle.config.text),
    ]
    if not is_plain:
        models.append(ComparedModel(plain, own_features))
    dialogues = _dialogues(bundle, tokenizer, [reference for reference, _ in pairs])
    divergence, expected, agreed, decided, largest = [], [], [], [], 0.0
    for p, q, *rounded in outcomes(text, dialogues, models):
        divergence.append(q.divergence(p))
        expected.append((rounded or [q])[0].divergence(p))
        top = p.log_probabilities.topk(2, 1)
        decided.append(top.values[:, 0] - top.values[:, 1] >= DECIDED_NATS)
        agreed.append(top.indices[:, 0] == q.log_probabilities.argmax(1))
        largest = float(np.maximum(largest, q.largest))
    ceiling = options.limits.max_kl_nats
    if ceiling is None:
        cost = float(torch.cat(expected).mean())
        # In so many digits as are shown.
        ceiling = float(f"{min(USABLE_NATS, PLAIN_FACTOR * cost + EXACT_NATS):.3g}")
    kl = float(torch.cat(divergence).mean())
    gates = [
        Gate("KL divergence", kl, "nats", ceiling, False),
        _agreement(torch.cat(agreed)[torch.cat(decided)], options),
    ]
    if options.llm.dtype == "float16":
        gates.append(Gate("LLM largest magnitude", largest, "", FLOAT16_MAX, False))
    return gates


def _agreement(agreed: torch.Tensor, options: ExportOptions) -> Gate:
    """Of the places where the source is sure: bool [P]."""
    floor = USABLE_SHARE if options.limits.min_agreement is None else options.limits.min_agreement
    places = len(agreed)
    share = float(agreed.float().mean()) if places else 0.0
    why = ""
    if places < COUNTED_PLACES:
        why = (
            f"the source is sure of its next token at {places} places, and a share is judged from "
            f"{COUNTED_PLACES} on"
        )
    return Gate("greedy agreement", share, "", floor, True, left_out=why)


def _dialogues(
    bundle: Bundle, tokenizer: Tokenizer, references: Sequence[Reference]
) -> Iterator[Dialogue]:
    """Build the dialogues in the source's ids, which must be the bundle's.

    Raises:
        BundleError: they are not.
    """
    from model_export.language.evaluation import dialogues_of

    own = bundle.tokenizer()
    source_dialogues, own_dialogues = (
        dialogues_of(each, placeholder_id(each, bundle), references) for each in (tokenizer, own)
    )
    for expected, found in zip(source_dialogues, own_dialogues, strict=True):
        if expected.ids.tolist() != found.ids.tolist():
            raise BundleError(
                f"the tokenizer of {bundle.path} gives other ids than the checkpoint's: expected "
                "the same for every prompt, export the checkpoint again"
            )
        yield expected
