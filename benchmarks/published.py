"""What others measured on Apple's chips, for `benchmarks/plan.py`: every figure with its source.

Left out: figures whose build is a debug build, whose GPU or model is not said, of mixtures of
experts, and of runtimes that fuse what MLX does not (Core AI).
"""

from __future__ import annotations

from dataclasses import dataclass

from model_export.planning.roofline import Decoder

MODELS: dict[str, Decoder] = {
    "Llama 2 7B": Decoder(4096, 32, 32, 32, 128, 11_008, 32_000, False),
    "Llama 3.1 8B": Decoder(4096, 32, 32, 8, 128, 14_336, 128_256, False),
    "Llama 3.2 1B": Decoder(2048, 16, 32, 8, 64, 8192, 128_256, True),
    "Llama 3.2 3B": Decoder(3072, 28, 24, 8, 128, 8192, 128_256, True),
    "Qwen2 0.5B": Decoder(896, 24, 14, 2, 64, 4864, 151_936, True),
    "Qwen2.5 7B": Decoder(3584, 28, 28, 4, 128, 18_944, 152_064, False),
    "Qwen3 0.6B": Decoder(1024, 28, 16, 8, 128, 3072, 151_936, True),
    "Qwen3 8B": Decoder(4096, 36, 32, 8, 128, 12_288, 151_936, False),
}
# GMAC of one image. FastViTHD's is counted from the shapes; the others' by torch's
# FlopCounterMode on timm's modules, re-parameterized (the model cards of T8 and MA36 agree).
ENCODERS = {
    "FastViT T8": 0.685,
    "FastViT MA36": 7.815,
    "MobileCLIP S0": 2.385,
    "MobileCLIP S1": 4.658,
    "MobileCLIP S2": 7.834,
    "MobileCLIP B (ViT-B/16)": 17.708,
}
SOURCES = {
    "mac-llm-bench": "https://github.com/enescingoz/mac-llm-bench/tree/main/results",
    "llama.cpp #4167": "https://github.com/ggml-org/llama.cpp/discussions/4167",
    "andrewginns": "https://gist.github.com/andrewginns/cf95867c2d79458bd894c07b9e7d5cbd",
    "normiebench #3": "https://github.com/brand-o/normiebench/issues/3",
    "apple-silicon-llm-bench": "https://github.com/john-rocky/apple-silicon-llm-bench",
    "Apple, coreml-FastViT": "https://huggingface.co/apple/coreml-FastViT-MA36",
    "Apple, ml-mobileclip": "https://github.com/apple/ml-mobileclip",
    "Apple, FastVLM paper": "https://arxiv.org/abs/2412.13303",
    "mlxcel": "https://github.com/lablup/mlxcel (docs, model_tests_m5max.md: the mlx-lm column)",
    "Apple, MLX on the M5": "https://particle.news/story/"
    "apples-m5-macs-with-macos-262-deliver-up-to-4x-faster-local-llm-start-times-in-mlx",
    "fastvlm-coreai": "https://github.com/tmorales2000/fastvlm-coreai/blob/main/docs/PERFORMANCE.md",
}


@dataclass(frozen=True)
class Measured:
    """One published figure.

    Attributes:
        stage: `encoder` (seconds), `prefill` and `decode` (tokens a second), `ttft` (seconds),
            `gain` (M5 over M4, tokens a second), `memory` (bytes).
        bits: for each weight, scales included.
        cores: of the GPU, where fewer than the chip's.
        fitted: whether the factors come from it; the others only check them.
    """

    stage: str
    model: str
    chip: str
    value: float
    source: str
    bits: float = 4.5
    cores: int | None = None
    tokens: int = 512
    fitted: bool = True


def _mlx(model: str, chip: str, prefill: float, decode: float, cores: int | None) -> list[Measured]:
    return [
        Measured(stage, model, chip, value, "mac-llm-bench", cores=cores)
        for stage, value in (("prefill", prefill), ("decode", decode))
    ]


def _mlx_lm_m5_max() -> list[Measured]:
    rows = (
        ("Qwen2 0.5B", 4.5, 637.17),
        ("Qwen2 0.5B", 16, 402.73),
        ("Qwen3 0.6B", 4.5, 651.14),
        ("Llama 3.2 1B", 4.5, 578.64),
        ("Qwen2.5 7B", 4.5, 123.59),
        ("Qwen2.5 7B", 8.5, 67.44),
        ("Llama 3.1 8B", 4.5, 117.43),
        ("Llama 3.1 8B", 16, 34.29),
        ("Qwen3 8B", 4.5, 113.40),
    )
    return [
        Measured("decode", model, "M5 Max", value, "mlxcel", bits, tokens=100)
        for model, bits, value in rows
    ]


def _llama(
    chip: str, cores: int | None, source: str, *rows: tuple[str, float, float, float]
) -> list[Measured]:
    return [
        Measured(stage, model, chip, value, source, bits, cores, fitted=False)
        for model, bits, prefill, decode in rows
        for stage, value in (("prefill", prefill), ("decode", decode))
    ]


def _encoder(model: str, chip: str, milliseconds: float, source: str) -> Measured:
    return Measured("encoder", model, chip, milliseconds / 1000, source, bits=16)


def _ttft() -> list[Measured]:
    """The paper says "M1 MacBook Pro" and not how long its prompt is: a question of 40 tokens on
    the smallest and the largest of these chips."""
    rows = (("M1", 0.166, 296), ("M1 Max", 0.166, 296), ("M4 Pro", 0.270, 345))
    return [
        Measured(
            "ttft",
            "Qwen2 0.5B",
            chip,
            seconds,
            "fastvlm-coreai" if chip == "M4 Pro" else "Apple, FastVLM paper",
            bits=16,
            tokens=tokens,
            fitted=False,
        )
        for chip, seconds, tokens in rows
    ]


PUBLISHED: tuple[Measured, ...] = (
    _encoder("FastViTHD 1024", "M1 Max", 116, "Apple, FastVLM paper"),
    _encoder("FastViT T8", "A14", 0.79, "Apple, coreml-FastViT"),
    _encoder("FastViT T8", "M3 Max", 0.62, "Apple, coreml-FastViT"),
    _encoder("FastViT MA36", "A14", 4.50, "Apple, coreml-FastViT"),
    _encoder("FastViT MA36", "M3 Max", 2.99, "Apple, coreml-FastViT"),
    _encoder("MobileCLIP S0", "A14", 1.5, "Apple, ml-mobileclip"),
    _encoder("MobileCLIP S1", "A14", 2.5, "Apple, ml-mobileclip"),
    _encoder("MobileCLIP S2", "A14", 3.6, "Apple, ml-mobileclip"),
    _encoder("MobileCLIP B (ViT-B/16)", "A14", 10.4, "Apple, ml-mobileclip"),
    *_mlx("Qwen3 0.6B", "M1", 944.75, 114.71, 7),
    *_mlx("Qwen3 8B", "M1", 67.77, 12.49, 7),
    *_mlx("Qwen3 8B", "M2 Max", 290.37, 48.10, 30),
    *_mlx("Qwen3 0.6B", "M5", 3108.4, 259.1, None),
    *_mlx("Llama 3.2 1B", "M5", 5075.1, 156.7, None),
    *_mlx("Llama 3.2 3B", "M5", 1756.3, 63.1, None),
    *_mlx("Llama 3.1 8B", "M5", 528.0, 28.3, None),
    *_mlx("Qwen3 8B", "M5", 405.0, 24.0, None),
    *_mlx("Qwen2.5 7B", "M5", 404.8, 23.5, None),
    *_mlx_lm_m5_max(),
    Measured("decode", "Qwen3 0.6B", "A19 Pro", 158.8, "apple-silicon-llm-bench", tokens=19),
    *_llama(
        "M1",
        None,
        "llama.cpp #4167",
        ("Llama 2 7B", 8.5, 117.25, 7.91),
        ("Llama 2 7B", 4.5, 117.96, 14.15),
    ),
    *_llama(
        "M1 Pro",
        14,
        "andrewginns",
        ("Llama 2 7B", 16, 262.65, 12.75),
        ("Llama 2 7B", 8.5, 235.16, 21.95),
        ("Llama 2 7B", 4.5, 232.55, 35.52),
    ),
    *_llama(
        "M3 Pro",
        None,
        "andrewginns",
        ("Llama 2 7B", 16, 357.45, 9.89),
        ("Llama 2 7B", 8.5, 344.66, 17.53),
        ("Llama 2 7B", 4.5, 341.67, 30.74),
    ),
    *_llama("M4", None, "normiebench #3", ("Llama 3.1 8B", 4.85, 224.81, 20.87)),
    Measured("gain", "Qwen3 8B", "M5", 1.23, "Apple, MLX on the M5", fitted=False),
    *_ttft(),
    Measured(
        "memory",
        "Qwen3 0.6B",
        "A19 Pro",
        489e6,
        "apple-silicon-llm-bench",
        tokens=147,
        fitted=False,
    ),
)
