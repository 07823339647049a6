"""One model, stored in every way that people have it: each exports to the same bundle."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastvlm_mlx
from fastvlm_mlx.vision.package import describe
from model_export import build, pipeline
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.options import ExportOptions
from model_export.samples import images

GOLDEN = Path(__file__).parents[1] / "golden"
EXACT = ExportOptions.of(llm_bits=16, dtype="float32", encoder_precision="fp32")
EXACT_MLX = ExportOptions.of(llm_bits=16, dtype="float32", layout="mlx")
CASES = json.loads((GOLDEN / "answers.json").read_text())
# Q of one layer, an MLP's matrix, and a convolution of the encoder.
ADAPTED = (
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
    "model.vision_tower.vision_tower.model.patch_embed.2.reparam_conv.weight",
)
SAME = (
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
)


def copy(tmp_path, name, state=None):
    """The golden checkpoint in Apple's layout, with another state dict where one is given."""
    path = Path(shutil.copytree(GOLDEN / "apple", tmp_path / name))
    if state is not None:
        save_file(state, path / "model.safetensors")
    return path


def golden_state():
    return load_file(GOLDEN / "apple" / "model.safetensors")


def apple(tmp_path):
    return copy(tmp_path, "source"), {}


def apple_sharded(tmp_path):
    path, state = copy(tmp_path, "source"), golden_state()
    (path / "model.safetensors").unlink()
    weight_map = {}
    for i in range(2):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        save_file({k: state[k] for k in sorted(state)[i::2]}, path / file)
        weight_map |= dict.fromkeys(sorted(state)[i::2], file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path, {}


def apple_bin(tmp_path):
    path = copy(tmp_path, "source")
    (path / "model.safetensors").unlink()
    torch.save(golden_state(), path / "pytorch_model.bin")
    return path, {}


def transformers(tmp_path):
    return shutil.copytree(GOLDEN / "transformers", tmp_path / "source"), {}


def lora(tmp_path):
    """An adapter whose product fills a column that the base has zero: exact in any precision."""
    state, adapter = golden_state(), {}
    for name in ADAPTED:
        column = torch.zeros(2, *state[name].shape[1:])
        column[0, 3] = 1
        rows = torch.zeros(state[name].shape[0], 2, *[1] * (state[name].dim() - 2))
        rows[:, 0] = state[name][:, 3].float() / 2
        state[name][:, 3] = 0
        module = "base_model.model." + name.removesuffix(".weight")
        adapter |= {f"{module}.lora_A.weight": column, f"{module}.lora_B.weight": rows}
    base = copy(tmp_path, "base", state)
    path = tmp_path / "source"
    path.mkdir()
    save_file(adapter, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(base)}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path, {}


def projector(tmp_path):
    state = golden_state()
    stored = {name: state[name] for name in state if "mm_projector" in name}
    base = copy(tmp_path, "base", state | {n: torch.zeros_like(t) for n, t in stored.items()})
    path = tmp_path / "source"
    path.mkdir()
    torch.save(stored, path / "mm_projector.bin")
    shutil.copyfile(GOLDEN / "apple" / "config.json", path / "config.json")
    return path, {"base": base}


def hub(tmp_path):
    repository = tmp_path / "hub" / "models--owner--golden"
    shutil.copytree(GOLDEN / "apple", repository / "snapshots" / ("b" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("b" * 40)
    return "owner/golden", {"revision": "main"}


SOURCES = (apple, apple_sharded, apple_bin, transformers, lora, projector, hub)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The golden checkpoint, in transformers' layout, exported with nothing rounded and checked."""
    out = tmp_path_factory.mktemp("golden") / "bundle"
    pipeline.export(GOLDEN / "transformers", out, EXACT)
    return out


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def one_sample(monkeypatch):
    """An mlx export's gates look at one image, not at nine."""
    every = images.gate_samples
    monkeypatch.setattr(images, "gate_samples", lambda vision: every(vision)[:1])


def answers(bundle, cases=CASES):
    """The tokens of a bundle's answers, as many as transformers' own were recorded."""
    model = fastvlm_mlx.load(bundle)
    features = {
        name: model.encode(GOLDEN / "images" / name) for name in {c["image"] for c in cases}
    }
    return [
        list(model.generate(features[c["image"]], c["prompt"], max_tokens=len(c["tokens"])).tokens)
        for c in cases
    ]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.__name__)
def test_every_kind_of_source_exports_to_the_same_bundle(
    source, expected, tmp_path, monkeypatch, hub_cache
):
    states = []

    def export_package(spec, package, progress):
        # Made from these alone; converting the same ones again would tell nothing new.
        states.append(spec.checkpoint.encoder_state())
        shutil.copytree(expected / package.name, package)
        return describe(package)

    monkeypatch.setattr(build, "export_package", export_package)
    monkeypatch.setattr(build, "source_features", lambda spec, progress: {256: []})
    monkeypatch.setattr(build, "gates_of_sizes", lambda *arguments: ([], []))
    monkeypatch.setattr(build, "answer_gates", lambda *arguments, **options: [])
    reference, options = source(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    result = pipeline.export(reference, tmp_path / "out", EXACT, **options)
    assert all(p.stat().st_mtime_ns == at for p, at in before.items() if p != tmp_path)
    for name in SAME:
        assert (result.path / name).read_bytes() == (expected / name).read_bytes(), name
    state = Checkpoint(GOLDEN / "apple").encoder_state()
    for name, tensor in states[0].items():
        if name != "head.proj":
            assert torch.equal(tensor, state[name]), name
    configs = [json.loads((p / "config.json").read_text()) for p in (result.path, expected)]
    for key in ("image_token_index", "image_aspect_ratio", "vocab_size", "tie_word_embeddings"):
        assert configs[0][key] == configs[1][key]


def test_transformers_layout_answers_as_transformers_does(expected):
    assert answers(expected) == [case["tokens"] for case in CASES]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.__name__)
def test_every_kind_of_source_exports_to_layout_mlx(source, tmp_path, hub_cache, one_sample):
    """With its gates, and the answers are transformers' own, as the app bundle's are."""
    reference, options = source(tmp_path)
    result = pipeline.export(reference, tmp_path / "out", EXACT_MLX, **options)
    assert result.manifest["gates_passed"]
    # A merge is a sum in float32, which another machine may round otherwise.
    assert ("tensors" in result.manifest["llm"]) == (source is lora)
    cases = [case for case in CASES if case["image"] == CASES[0]["image"]]
    assert answers(result.path, cases) == [case["tokens"] for case in cases]


@pytest.mark.slow
def test_adapter_input_size_and_full_vocabulary_through_the_commands(tmp_path, one_sample):
    """Export and verify by the command line: --base, --image-size, and a row for <image>."""
    path, _ = lora(tmp_path)
    base = tmp_path / "base"
    state = load_file(base / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        # The vocabulary and three control tokens.
        state[name] = state[name][:403].clone()
    save_file(state, base / "model.safetensors")
    moved = base.rename(tmp_path / "moved")
    out = tmp_path / "out"

    def fastvlm(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "fastvlm_mlx", *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )

    options = ("--llm-bits", 16, "--image-size", 128)
    refused = fastvlm("export", path, out, *options)
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith("error: ")
    assert "which does not exist here: give the base's" in refused.stderr
    assert not out.exists()
    done = fastvlm("export", path, out, *options, "--base", moved)
    assert done.returncode == 0, done.stderr
    assert "encoder tokens per image   4\n" in done.stdout
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["options"]["image_size"] == manifest["encoder"]["image_size"] == 128
    assert manifest["encoder"]["tokens_per_image"] == 4
    assert manifest["source"]["base"]["directory"] == "moved"
    config = json.loads((out / "config.json").read_text())
    assert (config["vocab_size"], config["image_token_index"]) == (448, 403)
    assert config["mm_vision_tower"] == "mobileclip_l_128"
    checked = fastvlm("verify", out, "--checkpoint", path, "--base", moved)
    assert checked.returncode == 0, checked.stderr
    assert "KL divergence" in checked.stdout
    in_mlx = ExportOptions.of(llm_bits=16, image_size=128, layout="mlx")
    pipeline.export(path, tmp_path / "mlx", in_mlx, base=moved)
    assert answers(tmp_path / "mlx") == answers(out) != [case["tokens"] for case in CASES]
