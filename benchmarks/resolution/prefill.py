"""How long the language model takes for a number of tokens, whatever they stand for."""

from __future__ import annotations

from pathlib import Path

import fastvlm_mlx
from fastvlm_mlx.bench.subject import FIRST, question

# What the prompt has beside the image: the chat's own and a short question.
TEXT_TOKENS = 26


class Prefill:
    """A bundle's language model, asked without an image: an image's tokens cost what others do."""

    def __init__(self, bundle: Path):
        self.model = fastvlm_mlx.load(bundle)
        found = self.model.generate(None, "A", max_tokens=1)
        self._own = found.prompt_tokens - 1
        self.compute = found.compute
        self._asked = 0

    def seconds(self, tokens: int) -> float:
        """Prefill of so many tokens in all."""
        # A question that begins as no other did, so that nothing of it is kept from before.
        self._asked += 1
        text = f"{self._asked} times {FIRST}"
        prompt = question(self.model, text, tokens - self._own)
        result = self.model.generate(None, prompt, max_tokens=1)
        if result.prompt_tokens != tokens:
            raise SystemExit(f"a prompt of {tokens} tokens came out at {result.prompt_tokens}")
        return result.timings.prefill_s
