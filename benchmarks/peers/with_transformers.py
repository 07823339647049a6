"""A worker for `benchmarks.peers`, run by a Python that has transformers, timm and torchvision.

    python with_transformers.py JOB

It knows nothing of this repository. JOB has `checkpoint`, `dtype`, `image`, `size`, `ids` (the
prompt with the image's placeholders) and `max_tokens`; what it reads and prints is what
`fastvlm_mlx.bench.worker` reads and prints.
"""

from __future__ import annotations

import re
import sys
import time
from typing import Any

import torch
from pipe import peak_bytes, serve

_LIBRARIES = []


def import_torchvision() -> None:
    """Beside a build of torch for CPUs alone torchvision finds its compiled operators missing, and
    stops at each of their names. FastVLM uses none of them: the names are enough."""
    while True:
        try:
            import torchvision  # noqa: F401
        except RuntimeError as error:
            missing = re.match(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None:
                raise
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(f"{missing.group(1)}(Tensor x) -> Tensor")
            _LIBRARIES.append(library)
            for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
                del sys.modules[name]
        else:
            return


class Clock:
    """What `generate` tells of each token."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        # First it tells the prompt's ids.
        if not self._prompt:
            self.times.append(time.perf_counter())
        self._prompt = False

    def end(self) -> None:
        pass


class Subject:
    def __init__(self, job: dict[str, Any]):
        started = time.perf_counter()
        import_torchvision()
        from PIL import Image
        from transformers import CLIPImageProcessor, FastVlmForConditionalGeneration

        size = job["size"]
        self.processor = CLIPImageProcessor(
            size={"shortest_edge": size},
            crop_size={"height": size, "width": size},
            image_mean=[0, 0, 0],
            image_std=[1, 1, 1],
        )
        self.model, loaded = FastVlmForConditionalGeneration.from_pretrained(
            job["checkpoint"], dtype=getattr(torch, job["dtype"]), output_loading_info=True
        )
        if wrong := [*loaded["missing_keys"], *loaded["unexpected_keys"]]:
            raise SystemExit(f"the checkpoint is not what transformers expects: {wrong[0]}")
        self.model.eval()
        self.load_s = time.perf_counter() - started
        self.ids = torch.tensor([job["ids"]])
        self.max_tokens = job["max_tokens"]
        self.size = size
        self.image = Image.open(job["image"]).convert("RGB")
        self.image.load()

    @torch.inference_mode()
    def run(self, number: int) -> dict[str, Any]:
        from PIL import Image

        start = time.perf_counter()
        # The reference's own geometry, for which transformers has no word.
        side = max(self.image.size)
        square = Image.new("RGB", (side, side))
        square.paste(self.image, ((side - self.image.width) // 2, (side - self.image.height) // 2))
        pixels = self.processor(square, return_tensors="pt")["pixel_values"]
        preprocessed = time.perf_counter()
        inner = self.model.model
        features = inner.vision_tower(pixels.to(self.model.dtype)).last_hidden_state
        encoded = time.perf_counter()
        projected = inner.multi_modal_projector(features.flatten(2).permute(0, 2, 1))
        embeddings = self.model.get_input_embeddings()(self.ids)
        places = self.ids == self.model.config.image_token_id
        embeddings[places] = projected[0].to(embeddings.dtype)
        ready = time.perf_counter()
        clock = Clock()
        out = self.model.generate(
            inputs_embeds=embeddings,
            attention_mask=torch.ones_like(self.ids),
            max_new_tokens=self.max_tokens,
            min_new_tokens=self.max_tokens,
            do_sample=False,
            streamer=clock,
            pad_token_id=0,
        )
        first, last = clock.times[0], clock.times[-1]
        return {
            "preprocess_s": preprocessed - start,
            "encode_s": encoded - preprocessed,
            "project_s": ready - encoded,
            "prefill_s": first - ready,
            "ttft_s": first - start,
            "decode_s": last - first,
            "tokens_per_s": (len(clock.times) - 1) / (last - first),
            "load_s": self.load_s,
            "image_tokens": int(places.sum()),
            "text_tokens": int((~places).sum()),
            "generation_tokens": len(clock.times),
            "tokens": out[0].tolist()[-len(clock.times) :],
            "image_size": self.size,
            "compute": f"torch {str(self.model.dtype).removeprefix('torch.')}",
            "peak_memory_bytes": peak_bytes(),
        }


if __name__ == "__main__":
    serve(Subject, ("transformers", "torch", "timm"))
