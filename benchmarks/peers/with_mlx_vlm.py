"""A worker for `benchmarks.peers`, run by a Python that has mlx-vlm.

    python with_mlx_vlm.py JOB

It knows nothing of this repository. JOB has `bundle`, `image`, `prompt`, `max_tokens` and `blas`,
a library that exports plain `cblas_sgemm`, or None; what it reads and prints is what
`fastvlm_mlx.bench.worker` reads and prints.
"""

from __future__ import annotations

import ctypes
import json
import time
from pathlib import Path
from typing import Any

from pipe import peak_bytes, serve


class Subject:
    def __init__(self, job: dict[str, Any]):
        started = time.perf_counter()
        if job["blas"]:
            # MLX's own reference BLAS is found after what has been loaded for everyone.
            ctypes.CDLL(job["blas"], mode=ctypes.RTLD_GLOBAL)
        import mlx.core as mx
        from mlx_vlm import load
        from mlx_vlm.models.fastvlm.config import VisionConfig
        from mlx_vlm.prompt_utils import apply_chat_template

        bundle = Path(job["bundle"])
        shape = json.loads((bundle / "config.json").read_text())["vision_config"]
        # It takes the encoder's shape from attributes of a class and not from the bundle.
        for key in ("layers", "embed_dims", "mlp_ratios", "token_mixers"):
            setattr(VisionConfig, key, shape[key])
        self.model, self.processor = load(str(bundle))
        self.load_s = time.perf_counter() - started
        self.prompt = apply_chat_template(
            self.processor, self.model.config, job["prompt"], num_images=1
        )
        self.image, self.max_tokens = job["image"], job["max_tokens"]
        self.size, self.channels = shape["image_size"], shape["hidden_size"]
        self.marks: dict[str, tuple[float, float]] = {}
        self._timed(type(self.model.vision_tower), self.model.vision_tower, "encode", mx)
        self._timed(type(self.model.mm_projector), self.model.mm_projector, "project", mx)

    def _timed(self, kind: type, one: Any, name: str, mx: Any) -> None:
        """Note when `one` is called and when its result is there."""
        call = kind.__call__

        def timed(instance: Any, *arguments: Any, **more: Any) -> Any:
            if instance is not one:
                return call(instance, *arguments, **more)
            # What it is called with belongs to what came before.
            mx.eval(*[a for a in arguments if isinstance(a, mx.array)])
            started = time.perf_counter()
            result = call(instance, *arguments, **more)
            mx.eval(result)
            self.marks[name] = (started, time.perf_counter())
            return result

        kind.__call__ = timed  # type: ignore[method-assign]

    def run(self, number: int) -> dict[str, Any]:
        from mlx_vlm import stream_generate

        start = time.perf_counter()
        times, text, prompt_tokens = [], "", 0
        for response in stream_generate(
            self.model,
            self.processor,
            self.prompt,
            image=[self.image],
            max_tokens=self.max_tokens,
            temperature=0.0,
        ):
            if len(times) < response.generation_tokens:
                times.append(time.perf_counter())
            text, prompt_tokens = text + response.text, response.prompt_tokens
        if len(times) < 2:
            raise SystemExit(f"mlx-vlm ended after {len(times)} tokens: too few to be timed")
        encode, project = self.marks["encode"], self.marks["project"]
        image_tokens = (self.size // 64) ** 2
        return {
            "preprocess_s": encode[0] - start,
            "encode_s": encode[1] - encode[0],
            "project_s": project[1] - project[0],
            "prefill_s": times[0] - project[1],
            "ttft_s": times[0] - start,
            "decode_s": times[-1] - times[0],
            "tokens_per_s": (len(times) - 1) / (times[-1] - times[0]),
            "load_s": self.load_s,
            "image_tokens": image_tokens,
            # One id stands for all of an image.
            "text_tokens": prompt_tokens - 1,
            "generation_tokens": len(times),
            "text": text,
            "image_size": self.size,
            "compute": "MLX",
            "peak_memory_bytes": peak_bytes(),
        }


if __name__ == "__main__":
    serve(Subject, ("mlx-vlm", "mlx"))
