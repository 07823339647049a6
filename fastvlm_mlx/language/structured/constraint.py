"""Structured answers: of each token's logits only those are left that can lead to JSON of a schema.

llguidance follows the answer in the schema's grammar and says which tokens may come next, as bits
that are made on the CPU. What applies them is `mx.where`, which every device of MLX has.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Set
from threading import Lock
from typing import Any

import mlx.core as mx
import numpy as np
from tokenizers import Tokenizer

from fastvlm_mlx.bundle.manifest import EXPORT_AGAIN
from fastvlm_mlx.bundle.tokenizer import no_panic
from fastvlm_mlx.errors import BundleError, OptionError
from fastvlm_mlx.language.structured.json_schema import refused
from fastvlm_mlx.language.structured.schema_trial import matcher, on_large_stack

# Schemas whose grammars are kept, each of some megabytes at most.
_KEPT = 16


class Grammars:
    """The grammars of one model's tokenizer. They may be asked for from any thread."""

    def __init__(self, tokenizer: Tokenizer, rows: int, eos_token_ids: Set[int]):
        """
        Args:
            rows: V, the ids that a model gives logits to; of some the tokenizer knows nothing.
            eos_token_ids: end an answer.
        """
        self._tokenizer, self._rows = tokenizer, rows
        self._eos_token_ids = frozenset(id for id in eos_token_ids if id < rows)
        self._lock = Lock()
        self._made: tuple[Any, np.ndarray] | None = None
        self._grammars: OrderedDict[str, Any] = OrderedDict()

    def constraint(self, schema: str) -> Constraint:
        """For one answer, by a schema that `json_schema.schema_text` made.

        Raises:
            OptionError: the schema can't be followed with this tokenizer.
            BundleError: the tokenizer fails.
        """
        with self._lock:
            if self._made is None:
                self._made = self._prepare()
            tokenizer, usable = self._made
            if schema not in self._grammars:
                grammar = on_large_stack(lambda: matcher(tokenizer, schema))
                if grammar.is_error():
                    raise refused(grammar.get_error())
                self._grammars[schema] = grammar
                if len(self._grammars) > _KEPT:
                    self._grammars.popitem(last=False)
            self._grammars.move_to_end(schema)
            copy = self._grammars[schema].deep_copy()
        return Constraint(copy, usable, self._eos_token_ids)

    def _prepare(self) -> tuple[Any, np.ndarray]:
        """llguidance's tokenizer, which takes it a second, and the bits of the ids that may ever
        come: text, and ends. Control tokens and placeholders, and rows without a token, may not."""
        import llguidance

        with no_panic("the tokenizer can't be followed", BundleError, EXPORT_AGAIN):
            tokenizer = llguidance.LLTokenizer(
                self._tokenizer.to_str(),
                n_vocab=self._rows,
                eos_token=sorted(self._eos_token_ids),
            )
        usable = np.zeros(self._rows, np.bool_)
        usable[list(self._tokenizer.get_vocab(with_added_tokens=False).values())] = True
        usable[list(self._tokenizer.get_added_tokens_decoder())] = False
        usable[list(self._eos_token_ids)] = True
        return tokenizer, np.packbits(usable, bitorder="little")


class Constraint:
    """Where one answer stands in its grammar. For one thread at a time."""

    def __init__(self, matcher: Any, usable: np.ndarray, eos_token_ids: frozenset[int]):
        """
        Args:
            matcher: llguidance's, at its beginning.
            usable: the ids that may ever come, as bits.
        """
        self._matcher, self._usable, self._eos_token_ids = matcher, usable, eos_token_ids
        self._count = 0

    def add(self, place: int, token: int) -> None:
        """Go on by the token at a place of the answer; of no effect where that was done before."""
        if place == self._count:
            self._count += 1
            if token not in self._eos_token_ids and not self._matcher.is_stopped():
                self._matcher.consume_token(token)

    def mask(self, logits: mx.array) -> mx.array:
        """Logits [1, V] with -∞ for every token that must not come next.

        After the end, and after a failure, they stay as they are: what is chosen then is not read.
        """
        if self._matcher.is_stopped():
            return logits
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            return logits
        # There may be a word more of them than there are ids.
        bits = bits[: len(self._usable)] & self._usable
        allowed = np.unpackbits(bits, bitorder="little", count=logits.shape[-1])
        return mx.where(mx.array(allowed.view(np.bool_)), logits, -mx.inf)

    @property
    def whole(self) -> bool:
        """Whether the JSON is complete, and nothing may come after it.

        Raises:
            OptionError: following the schema has come to an end before that of the answer.
        """
        if self._matcher.is_error():
            reason = self._matcher.get_error().split("\n", 1)[0]
            raise OptionError(
                f"--json-schema can't be followed any further in this answer ({reason}): make the "
                "schema simpler"
            )
        stopped: bool = self._matcher.is_stopped()
        return stopped
