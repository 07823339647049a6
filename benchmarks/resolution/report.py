"""The figures as tables beside the paper's, its claims restated, and a chart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.peers.report import spread
from benchmarks.resolution import paper
from benchmarks.resolution.encoders import CONVNEXT, FASTVITHD, SIGLIP, VIT
from benchmarks.tables import machine_line, markdown

COLOURS = {FASTVITHD: "#30407a", VIT: "#c8553d", CONVNEXT: "#6fb46c", SIGLIP: "#8a6fb4"}


CHART = (
    "![Encoder seconds by resolution for four encoders, and the time to the first token by "
    "stage](images/resolution.png)\n\n"
)


def page(result: dict[str, Any]) -> str:
    """What docs/resolution.md shows."""
    return CHART + tables(result)


def tables(result: dict[str, Any]) -> str:
    """All figures."""
    parts = [
        f"{machine_line(result['machine'])} Encoders in torch, float32; language model: "
        f"{result['language_model']}. Medians of {result['runs']} runs in turns; in brackets the "
        "quartiles.\n",
        "### One resolution\n",
        _whole(result),
        "### Tiles\n",
        _tiles(result),
        "### Multi-scale features\n",
        _multi_scale(result),
        "### The claims\n",
        _claims(result),
    ]
    return "\n".join(part for part in parts if part)


def _whole(result: dict[str, Any]) -> str:
    rows = []
    for one in result["encoders"]:
        name, size = one["encoder"], one["size"]
        ttft = paper.TTFT_MS.get((name, size))
        rows.append(
            [
                name,
                str(size),
                str(one["tokens"]),
                spread(one["encode_s"], 2),
                _published(name, size),
                spread(_prefill(result, one["tokens"]), 2),
                f"{_ttft(result, name, size):.2f}",
                f"{ttft:g}" if ttft else "",
            ]
        )
    header = ["encoder", "pixels", "tokens", "encode, s", "the paper's encode, ms"]
    return markdown([*header, "prefill, s", "TTFT, s", "the paper's TTFT, ms"], rows)


def _published(name: str, size: int) -> str:
    figure = paper.ENCODER_MS.get((name, size))
    other = paper.TABLE_4_MS.get(size) if name == FASTVITHD else None
    words = [f"{figure:g}"] if figure else []
    return "; ".join([*words, f"Table 4: {other:g}"] if other else words)


def _tiles(result: dict[str, Any]) -> str:
    rows = []
    for one in result["tiles"]:
        size = one["size"]
        direct = next(
            e for e in result["encoders"] if (e["encoder"], e["size"]) == (FASTVITHD, size)
        )
        encode = one["encodings"] * _encode(result, FASTVITHD, one["tile"])
        whole = _ttft(result, FASTVITHD, size)
        cut = encode + _prefill(result, one["tokens"])["median"]
        rows.append(
            [
                str(size),
                f"{direct['tokens']}",
                f"{direct['encode_s']['median']:.2f}",
                f"{whole:.2f}",
                f"{one['tile']}",
                f"{one['tokens']}",
                f"{encode:.2f}",
                f"{cut:.2f}",
                f"{cut / whole:.2f}",
            ]
        )
    header = ["pixels", "tokens", "encode, s", "TTFT, s", "tile", "tokens of 5", "encode of 5, s"]
    return markdown([*header, "TTFT of 5, s", "tiles / whole"], rows)


def _multi_scale(result: dict[str, Any]) -> str:
    found = result["multi_scale"]
    names = [name for name in paper.MULTI_SCALE if name in found]
    if not names:
        return ""
    base = _encode(result, FASTVITHD, found["size"])
    rows = [
        ["none", "", "", f"{paper.MULTI_SCALE['none']}"],
        *(
            [
                name,
                f"{1000 * found[name]['median']:.1f}",
                f"{found[name]['median'] / base:.1%}",
                f"{paper.MULTI_SCALE[name]}",
            ]
            for name in names
        ),
    ]
    header = ["features", "added at this size, ms", "of the encoder", "the paper's mean score"]
    return f"At {found['size']}×{found['size']}.\n\n" + markdown(header, rows)


def claims(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The paper's claims, with what was measured in their place."""
    found: list[dict[str, Any]] = []

    def has(name: str, size: int) -> bool:
        return any((e["encoder"], e["size"]) == (name, size) for e in result["encoders"])

    def add(claim: str, here: str, published: float, measured: float) -> None:
        found.append({"claim": claim, "here": here, "paper": published, "measured": measured})

    if has(FASTVITHD, 768) and has(VIT, 336):
        add(
            "3.2 times the speed to the first token of LLaVA-1.5 (ViT-L/14 at 336)",
            "FastViTHD at 768, both with the same language model",
            paper.TTFT_TIMES,
            _ttft(result, VIT, 336) / _ttft(result, FASTVITHD, 768),
        )
        add(
            "the encoder of that claim alone",
            "the same sizes",
            paper.ENCODER_MS[VIT, 336] / paper.ENCODER_MS[FASTVITHD, 768],
            _encode(result, VIT, 336) / _encode(result, FASTVITHD, 768),
        )
    if has(FASTVITHD, 1024) and has(SIGLIP, 384):
        one = result["onevision"]
        slow = one["encodings"] * _encode(result, SIGLIP, 384)
        slow += _prefill(result, one["tokens"])["median"]
        for size in (1024, 1152):
            if has(FASTVITHD, size):
                add(
                    "85 times the speed to the first token of LLaVA-OneVision at 1152",
                    f"{one['encodings']} encodings of SigLIP-SO400M and {one['tokens']:,} tokens, "
                    f"against FastViTHD at {size}",
                    paper.ONEVISION_TIMES,
                    slow / _ttft(result, FASTVITHD, size),
                )
    strides = result["strides"]
    add(
        "16 times fewer tokens",
        "a ViT with patches of 16 at the same pixels",
        paper.TOKENS_TIMES,
        (strides[FASTVITHD] / 16) ** 2,
    )
    add(
        "16 times fewer tokens",
        "ViT-L/14 at the same pixels",
        paper.TOKENS_TIMES,
        (strides[FASTVITHD] / strides[VIT]) ** 2,
    )
    if has(FASTVITHD, 1024) and has(CONVNEXT, 1024):
        add(
            "the encoder against ConvNeXt-L at 1024",
            "the same",
            paper.ENCODER_MS[CONVNEXT, 1024] / paper.ENCODER_MS[FASTVITHD, 1024],
            _encode(result, CONVNEXT, 1024) / _encode(result, FASTVITHD, 1024),
        )
    return found


def _claims(result: dict[str, Any]) -> str:
    rows = [
        [
            one["claim"],
            one["here"],
            f"{one['paper']:.1f}",
            f"{one['measured']:.1f}",
            # What is measured within a tenth is the same figure.
            "holds" if one["measured"] >= 0.9 * one["paper"] else "does not hold",
        ]
        for one in claims(result)
    ]
    return markdown(["claim", "measured as", "the paper", "here", ""], rows)


def draw(result: dict[str, Any], file: Path) -> None:
    """Encoder seconds by resolution, and where the time to the first token goes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in dict.fromkeys(one["encoder"] for one in result["encoders"]):
        rows = [one for one in result["encoders"] if one["encoder"] == name]
        sizes = [one["size"] for one in rows]
        colour = COLOURS[name]
        seconds = [one["encode_s"]["median"] for one in rows]
        left.plot(sizes, seconds, "o-", color=colour, label=name, linewidth=1.2)
        known = [
            (s, paper.ENCODER_MS[name, s] / 1000) for s in sizes if (name, s) in paper.ENCODER_MS
        ]
        if known:
            left.plot(*zip(*known, strict=True), "o--", color=colour, mfc="white", linewidth=0.8)
    left.plot([], [], "o--", color="0.4", mfc="white", label="the paper's, M1 Max")
    left.set(
        xscale="log",
        yscale="log",
        xlabel="pixels of a side",
        ylabel="seconds to encode an image",
        title="Encoder",
    )
    ticks = [224, 384, 512, 768, 1024, 1536]
    left.set_xticks(ticks, [str(t) for t in ticks])
    left.set_xlim(200, 1750)
    left.minorticks_off()
    left.grid(color="0.93")
    left.legend(frameon=False, fontsize=8)
    shown = [one for one in result["encoders"] if one["encoder"] in (FASTVITHD, VIT, CONVNEXT)]
    names = [f"{one['encoder']} {one['size']} ({one['tokens']})" for one in shown]
    encode = [one["encode_s"]["median"] for one in shown]
    prefill = [_prefill(result, one["tokens"])["median"] for one in shown]
    right.barh(names, encode, 0.65, color="#2f7f8f", label="encode")
    right.barh(names, prefill, 0.65, left=encode, color="#f0d24b", label="prefill")
    right.invert_yaxis()
    right.set(xlabel="seconds", title="Time to the first token (image tokens)")
    right.tick_params(axis="y", labelsize=8)
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)


def _encode(result: dict[str, Any], name: str, size: int) -> float:
    for one in result["encoders"]:
        if (one["encoder"], one["size"]) == (name, size):
            return float(one["encode_s"]["median"])
    raise KeyError(f"{name} at {size}")


def _prefill(result: dict[str, Any], count: int) -> dict[str, float]:
    found: dict[str, float] = result["prefill_s"][str(count)]
    return found


def _ttft(result: dict[str, Any], name: str, size: int) -> float:
    one = next(e for e in result["encoders"] if (e["encoder"], e["size"]) == (name, size))
    return _encode(result, name, size) + _prefill(result, one["tokens"])["median"]
