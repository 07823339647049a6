"""What was measured beside the peers, as tables: in a terminal, and in the documentation."""

from __future__ import annotations

from typing import Any

from benchmarks.tables import machine_line, markdown

OURS = "fastvlm-mlx"
OURS_BF16 = f"{OURS}, bf16 encoder"
FP32, BF16 = "transformers, fp32", "transformers, bf16"
MLX_VLM, MLX_VLM_BLAS = "mlx-vlm", "mlx-vlm, with OpenBLAS"
# What must be reached: whose figure, beside whose, which one, and how many times as fast it is.
BARS = (
    (OURS, FP32, "decode", 5.0),
    (OURS, BF16, "decode", 2.5),
    (OURS, MLX_VLM, "decode", 10.0),
    (OURS, FP32, "prefill", 2.0),
    (OURS, BF16, "prefill", 1.0),
    (OURS, FP32, "ttft", 1.0),
    (OURS_BF16, BF16, "ttft", 1.0),
    (OURS, MLX_VLM, "ttft", 100.0),
    (OURS, MLX_VLM_BLAS, "ttft", 5.0),
)
NEXT_QUESTION, PEAK_BYTES = 8.0, 2.5e9
COMPARED = ("ttft", "encode", "prefill", "decode")


def spread(value: dict[str, float], digits: int) -> str:
    """`1.23 (1.20–1.31)`; without the brackets where there was one run."""
    low, middle, high = (value[k] for k in ("first_quartile", "median", "third_quartile"))
    if low == middle == high:
        return f"{middle:.{digits}f}"
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def bars(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Which of what must be reached is, of what was measured."""
    found: list[dict[str, Any]] = []

    def add(what: str, value: float, limit: float, holds: bool) -> None:
        found.append({"what": what, "value": value, "limit": limit, "reached": holds})

    for ours, peer, stage, limit in BARS:
        for one in result["ratios"]:
            if (one["system"], one["against"]) == (ours, peer):
                value = one[stage]["median"]
                add(f"{stage} of {ours} against {peer}", value, limit, value >= limit)
    for system in result["systems"]:
        if system["name"].startswith(OURS) and "next_question" in system:
            value = system["next_question"]["median"]
            name = f"second question against the first, {system['name']}"
            add(name, value, NEXT_QUESTION, value >= NEXT_QUESTION)
            peak = system["peak_memory_bytes"]
            add(f"peak, {system['name']}", peak, PEAK_BYTES, peak <= PEAK_BYTES)
    return found


def tables(result: dict[str, Any]) -> str:
    """For the documentation: each system's figures, and how many times as fast we are."""
    text = (
        f"{machine_line(result['machine'])} {result['checkpoint']}, {result['image']} at "
        f"{result['image_size']}×{result['image_size']}, {result['prompt_tokens']} tokens of "
        f"prompt. Medians of {result['runs']} runs in turns, {result['slow_runs']} beside mlx-vlm; "
        "in brackets the quartiles. mlx-vlm had no run to warm up, all others one.\n\n"
    )
    rows = []
    for one in result["systems"]:
        rows.append(
            [
                _named(one),
                spread(one["encode_s"], 2),
                spread(one["prefill_s"], 2),
                spread(one["ttft_s"], 2),
                spread(one["tokens_per_s"], 1),
                f"{one['peak_memory_bytes'] / 1e9:.2f}",
            ]
        )
    header = ["", "encode, s", "prefill, s", "TTFT, s", "tokens per second", "peak, GB"]
    text += markdown(header, rows) + "\n"
    text += "How many times as fast we are as each peer, round by round:\n\n"
    names = {"ttft": "TTFT", "encode": "encode", "prefill": "prefill", "decode": "decode"}
    rows = [
        [f"{one['system']} against {one['against']}", *(spread(one[k], 2) for k in COMPARED)]
        for one in result["ratios"]
    ]
    text += markdown(["", *(names[k] for k in COMPARED)], rows)
    nexts = [
        f"{spread(one['next_question'], 1)} ({one['name']})"
        for one in result["systems"]
        if "next_question" in one
    ]
    return text + (
        "\nA second question about the same image has its first token so many times as fast as "
        f"the first question: {'; '.join(nexts)}.\n"
    )


def _named(system: dict[str, Any]) -> str:
    versions = system["versions"]
    name: str = system["name"]
    package = name.partition(",")[0]
    return name.replace(package, f"{package} {versions[package]}", 1)
