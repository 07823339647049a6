"""The benchmarks beside others: names of tensors, tables from results, and what the pages show."""

import json
import shutil

import pytest

from benchmarks import search, tables
from benchmarks.operations.__main__ import table as operations
from benchmarks.peers import inputs
from benchmarks.peers import report as peers
from benchmarks.peers.__main__ import System, compared, take_turns
from benchmarks.resolution import paper, prefill
from benchmarks.resolution import report as resolution
from benchmarks.resolution.encoders import (
    FASTVITHD,
    SIGLIP,
    SIZES,
    STRIDES,
    TILED,
    VIT,
    multi_scale,
    tokens,
)
from fastvlm_mlx.bench.measure import MEASURED
from fastvlm_mlx.bundle.config import VisionConfig
from model_export.checkpoint.names import encoder_specs, from_transformers, is_unused

PAGES = {
    "search": (search.PAGE, search.table),
    "operations": (tables.MEASURED, operations),
    "peers": (tables.MEASURED, peers.tables),
    "resolution": (tables.ROOT / "docs" / "resolution.md", resolution.page),
}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_shows_what_was_measured(name):
    page, made = PAGES[name]
    kept = (tables.RESULTS / f"{name}.json").exists()
    assert tables.shown(page, name) == (made(tables.read(name)) if kept else "")


def test_a_table_is_put_in_its_place(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("Before.\n\n<!-- benchmarks.it -->\n\n<!-- end -->\n\nAfter.\n")
    assert tables.shown(page, "it") == ""
    tables.put(page, "it", "old\n")
    tables.put(page, "it", "new\n")
    assert tables.shown(page, "it") == "new\n"
    assert page.read_text() == (
        "Before.\n\n<!-- benchmarks.it -->\n\nnew\n\n<!-- end -->\n\nAfter.\n"
    )
    with pytest.raises(ValueError, match="no place for other"):
        tables.put(page, "other", "")


def test_every_tensor_has_a_name_in_transformers():
    vision = VisionConfig()
    names = [spec.source for spec in encoder_specs(vision) if not is_unused(spec.name)]
    names += ["lm_head.weight", "model.norm.weight", "model.mm_projector.2.bias"]
    found = [inputs.to_transformers(name, vision) for name in names]
    assert len({*found}) == len(names)
    assert [from_transformers(name, vision) for name in found] == names
    # As timm and transformers have them.
    assert "model.vision_tower.timm_model.stages.3.pos_emb.reparam_conv.weight" in found
    assert "model.vision_tower.timm_model.stages.0.blocks.1.layer_scale.gamma" in found
    with pytest.raises(KeyError):
        inputs.to_transformers("visual.other", vision)


def test_the_demo_in_transformers_layout(demo_checkpoint, demo_bundle, tmp_path):
    from safetensors import safe_open

    out = inputs.transformers_checkpoint(demo_checkpoint, demo_bundle, tmp_path)
    config = json.loads((out / "config.json").read_text())
    assert config["vision_config"]["model_args"]["layers"] == [1, 1, 2, 1, 1]
    (file,) = out.glob("*.safetensors")
    with safe_open(file, "pt") as tensors:
        assert all(name.startswith(("model.", "lm_head.")) for name in tensors.keys())  # noqa: SIM118
    # What is there is used again.
    shutil.rmtree(out / "none", ignore_errors=True)
    assert inputs.transformers_checkpoint(demo_checkpoint, demo_bundle, tmp_path) == out


WORKER = """
import json, sys
job = json.loads(sys.argv[1])
print(json.dumps({"error": "no"} if job.get("error") else {"ready": 1, "versions": {"it": "1"}}))
sys.stdout.flush()
for line in sys.stdin:
    print(json.dumps({"ttft_s": job["s"] * (int(line) + 1), "tokens_per_s": 2.0}), flush=True)
"""


def test_systems_take_turns_and_what_cannot_run_is_left_out(capsys):
    import sys

    command = (sys.executable, "-c", WORKER)
    systems = [
        System("slow", command, {"s": 3}, {}, warm=False),
        System("fast", command, {"s": 1}, {}),
        System("never", command, {"error": True}, {}),
    ]
    runs = take_turns(systems, 1, 2)
    assert {name: [run["ttft_s"] for run in one] for name, one in runs.items()} == {
        "slow": [6, 9],
        "fast": [2, 3],
    }
    assert systems[0].versions == {"it": "1"}
    said = capsys.readouterr().err.splitlines()
    assert "never: left out, no" in said
    turns = [line.partition(":")[0] for line in said if ": run " in line]
    assert turns == ["fast", "slow", "fast", "slow", "fast"]


def spread(value):
    return {"median": value, "first_quartile": value, "third_quartile": value}


def test_peers_are_compared_round_by_round():
    run = dict.fromkeys(MEASURED, 1.0)
    runs = {
        peers.OURS: [run, {**run, "ttft_s": 10.0}],
        peers.FP32: [{**run, "ttft_s": 3.0}, {**run, "ttft_s": 30.0}],
    }
    (found,) = compared(runs)
    assert (found["system"], found["against"]) == (peers.OURS, peers.FP32)
    assert found["ttft"] == spread(3.0)
    result = {"ratios": [found], "systems": []}
    (bar,) = [b for b in peers.bars(result) if b["what"].startswith("ttft")]
    assert bar["reached"]
    assert not all(b["reached"] for b in peers.bars(result))


@pytest.fixture
def result():
    """As if every encoder took a second for each million pixels, and a token a millisecond."""
    encoders = [
        {
            "encoder": name,
            "size": size,
            "tokens": tokens(name, size),
            "encode_s": spread(size * size / 1e6),
        }
        for name, sizes in SIZES.items()
        for size in (*sizes, *((576,) if name == FASTVITHD else ()))
    ]
    tiles = [
        {
            "size": size,
            "tile": size // 2,
            "encodings": 5,
            "tokens": 5 * tokens(FASTVITHD, size // 2),
        }
        for size in TILED
    ]
    onevision = {"encodings": 10, "tokens": 10 * tokens(SIGLIP, 384)}
    counts = {one["tokens"] for one in (*encoders, *tiles, onevision)}
    return {
        "machine": {
            "system": "Linux 6",
            "architecture": "x86_64",
            "cores": 2,
            "processor": "AMD EPYC",
            "memory_bytes": 2**34,
        },
        "runs": 3,
        "language_model": "torch bfloat16",
        "strides": STRIDES,
        "encoders": encoders,
        "tiles": tiles,
        "onevision": onevision,
        "multi_scale": {"size": 1024, "average pooling": spread(0.1)},
        "prefill_s": {str(count): spread(count / 1000) for count in counts},
    }


def test_tokens_are_the_papers():
    assert [tokens(FASTVITHD, size) for size in (256, 768, 1024)] == [16, 144, 256]
    assert tokens(VIT, 336) == 576
    assert 10 * tokens(SIGLIP, 384) == 7290


def test_claims_are_restated_from_what_was_measured(result):
    found = resolution.claims(result)
    vit = 336**2 / 1e6 + 0.576
    ours = 768**2 / 1e6 + 0.144
    assert found[0]["measured"] == pytest.approx(vit / ours)
    assert found[0]["paper"] == paper.TTFT_TIMES
    assert [f["measured"] for f in found if f["claim"].startswith("16")] == [
        16,
        pytest.approx((64 / 14) ** 2),
    ]
    text = resolution.tables(result)
    assert "does not hold" in text
    # Five tiles of half the side take 5/4 of the encoder's time and of the tokens.
    assert "| 1024 | 256 | 1.05 | 1.30 | 512 | 320 | 1.31 | 1.63 | 1.25 |" in text


def test_the_chart_of_resolutions(result, tmp_path):
    resolution.draw(result, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 10_000


def test_multi_scale_features_stand_beside_the_last_stage():
    for call in multi_scale(256).values():
        assert call().shape == (1, 3072 + 96 + 192 + 384 + 768, 4, 4)


def test_prefill_is_of_as_many_tokens_as_asked_for(demo_bundle):
    measured = prefill.Prefill(demo_bundle)
    assert measured.seconds(64) > 0
    assert measured.seconds(300) > 0
