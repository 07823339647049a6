"""mlx-vlm itself, from the package index, on our `mlx` bundles as they are.

Slow: an environment is made and 1 GB put into it (a minute or two where the index is near); then
each bundle takes some ten seconds. `pytest -m slow tests/layouts/test_mlx_vlm.py`.

mlx-vlm builds MobileCLIP-L whatever a bundle's `vision_config` says, so one checkpoint has that
encoder, with random weights, at 128×128, before the demo's language model. What it answers means
nothing, and must be the same every time: PyTorch from the checkpoint, our runtime, mlx-vlm from
Python and by its own command. The demo checkpoint, whose answers mean something, is loaded with
mlx-vlm's constants set to its shape.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fastvlm_mlx
from benchmarks.synthetic import encoder_state_dict
from fastvlm_mlx.bundle.config import VisionConfig
from fastvlm_mlx.image.preprocess import load_image
from model_export.checkpoint.names import ENCODER_PREFIX
from model_export.conversion import convert
from model_export.demo.model import DemoModel
from model_export.gates.encoder import snr_db
from model_export.options import ExportOptions
from model_export.pipeline import export
from model_export.samples import images, scenes

pytestmark = pytest.mark.slow

DRIVER = Path(__file__).parents[1] / "oracles" / "drive_mlx_vlm.py"
ANSWERER = DRIVER.with_name("answer_mlx_vlm.py")
VERSION = "0.7.10"
VISION = VisionConfig(image_size=128)
PROMPT = "Describe the image."
MAX_TOKENS = 24
# How near mlx-vlm's features and ours are, in dB, each computing as it does on this machine.
BUNDLES = {
    "16-bit float32": (ExportOptions.of(llm_bits=16, dtype="float32", layout="mlx"), 80.0),
    "16-bit float16": (ExportOptions.of(llm_bits=16, layout="mlx"), 35.0),
    "8-bit": (ExportOptions.of(llm_bits=8, layout="mlx"), 35.0),
    "4-bit": (ExportOptions.of(llm_bits=4, layout="mlx"), 35.0),
}


def clean_environment():
    """Nothing of this interpreter's, and no network for what has no need of it."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    return kept | {"HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def mlx_vlm(tmp_path_factory):
    """The interpreter of an environment that has mlx-vlm and not us."""
    folder = tmp_path_factory.mktemp("mlx-vlm") / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    mlx = "mlx[cpu]" if sys.platform == "linux" else "mlx"
    subprocess.run([python, "-m", "pip", "install", "-q", f"mlx-vlm=={VERSION}", mlx], check=True)
    return python


@pytest.fixture(scope="module")
def checkpoint(demo_checkpoint, tmp_path_factory):
    """MobileCLIP-L's shape at 128×128, a random projector, the demo's language model."""
    path = Path(shutil.copytree(demo_checkpoint, tmp_path_factory.mktemp("real") / "checkpoint"))
    config = json.loads((path / "config.json").read_text())
    config |= {
        "vision_config": VISION.to_dict(),
        "mm_hidden_size": VISION.hidden_size,
        "mm_vision_tower": f"mobileclip_l_{VISION.image_size}",
    }
    (path / "config.json").write_text(json.dumps(config))
    state = load_file(path / "model.safetensors")
    state = {name: tensor for name, tensor in state.items() if "vision_tower" not in name}
    shape = (config["hidden_size"], VISION.hidden_size)
    random = torch.empty(shape).normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    state["model.mm_projector.0.weight"] = random.bfloat16()
    for name, tensor in encoder_state_dict(VISION).items():
        # As the checkpoint would hold it: rounded once, and by nobody later.
        state[ENCODER_PREFIX + name] = (
            tensor.bfloat16() if tensor.is_floating_point() else tensor.clone()
        )
    save_file(state, path / "model.safetensors")
    return path


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    file = tmp_path_factory.mktemp("image") / "scene.png"
    scenes.generate(3, held_out=True).draw(256).save(file)
    return file


@pytest.fixture
def one_sample(monkeypatch):
    """The gates look at one image, not at nine."""
    every = images.gate_samples
    monkeypatch.setattr(images, "gate_samples", lambda vision: every(vision)[:1])


def drive(mlx_vlm, bundle, image, pixels, folder, *own_shape):
    """What mlx-vlm computes from `pixels` and makes of `image`, and its answer."""
    np.save(folder / "pixels.npy", pixels)
    files = [str(bundle), str(image), str(folder / "pixels.npy"), str(folder / "out.npz")]
    done = subprocess.run(
        [mlx_vlm, str(DRIVER), *files, PROMPT, str(MAX_TOKENS), *own_shape],
        check=True,
        cwd=folder,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    return np.load(folder / "out.npz"), json.loads(done.stdout.splitlines()[-1])


def generate_command(mlx_vlm, bundle, image, folder):
    command = [mlx_vlm, "-m", "mlx_vlm", "generate", "--model", str(bundle)]
    command += ["--image", str(image), "--prompt", PROMPT]
    command += ["--temperature", "0", "--max-tokens", str(MAX_TOKENS)]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=folder, env=clean_environment()
    )
    return done.stdout


@pytest.mark.parametrize("name", BUNDLES)
def test_the_published_encoder_s_shape_as_it_is(
    name, mlx_vlm, checkpoint, image, tmp_path, one_sample
):
    options, floor = BUNDLES[name]
    result = export(checkpoint, tmp_path / "bundle", options)
    assert result.manifest["fits_unmodified_mlx_vlm"]
    ours = fastvlm_mlx.load(result.path)
    seen = ours.encode(image)
    pixels = ours.image_processor(load_image(image))
    theirs, text = drive(mlx_vlm, result.path, image, pixels, tmp_path)
    # mlx-vlm goes through 8 bits once more after scaling: one step down for some values.
    assert np.abs(theirs["pixels"] - pixels).max() <= 1 / 255 + 1e-6

    source = DemoModel.load(checkpoint)
    with torch.inference_mode():
        expected = source.encode(torch.from_numpy(pixels)).numpy()
    assert snr_db(expected, seen.features) > floor
    assert snr_db(expected, theirs["features"]) > floor
    assert snr_db(seen.features, theirs["features"]) > floor
    projected = np.array(seen.projected.astype(mx.float32))[None]
    assert snr_db(projected, theirs["projected"]) > floor
    if options.llm.dtype == "float32":
        for found in (seen.features, theirs["features"]):
            assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()

    answer = ours.generate(seen, PROMPT, max_tokens=MAX_TOKENS).text.strip()
    assert text.strip() == answer
    assert generate_command(mlx_vlm, result.path, image, tmp_path).strip() == answer
    if options.llm.bits != 4:
        # A random projector's answer hangs on little, and 4 bits change it.
        features = torch.from_numpy(expected)
        assert source.answer(features, [PROMPT], max_tokens=MAX_TOKENS)[0].strip() == answer


@pytest.mark.parametrize("name", BUNDLES)
def test_the_trained_checkpoint(name, mlx_vlm, demo_checkpoint, image, tmp_path, one_sample):
    options, floor = BUNDLES[name]
    result = export(demo_checkpoint, tmp_path / "bundle", options)
    ours = fastvlm_mlx.load(result.path)
    pixels = ours.image_processor(load_image(image))
    theirs, text = drive(mlx_vlm, result.path, image, pixels, tmp_path, "own-shape")
    source = DemoModel.load(demo_checkpoint)
    with torch.inference_mode():
        expected = source.encode(torch.from_numpy(pixels))
    assert snr_db(expected.numpy(), theirs["features"]) > floor
    answer = ours.generate(image, PROMPT, max_tokens=MAX_TOKENS).text
    assert text == answer == source.answer(expected, [PROMPT], max_tokens=MAX_TOKENS)[0]


# Every form that an option can ask for, by itself and where it meets another.
FORMS: dict[str, dict[str, Any]] = {
    "2 bits of 32": {"llm_bits": 2, "group_size": 32},
    "3 bits of 128": {"llm_bits": 3, "group_size": 128},
    "5 bits": {"llm_bits": 5},
    "6 bits": {"llm_bits": 6},
    "projector": {"llm_bits": 4, "projector_bits": 8},
    "projector alone": {"llm_bits": 16, "projector_bits": 4},
    "embedding": {"llm_bits": 4, "embed_bits": 6},
    "whole embedding": {"llm_bits": 4, "embed_bits": 16},
    "all parts": {"llm_bits": 4, "projector_bits": 3, "embed_bits": 8},
    "mxfp4": {"llm_mode": "mxfp4"},
    "mxfp4 and parts": {"llm_mode": "mxfp4", "projector_bits": 6, "embed_bits": 8},
    "mxfp8": {"llm_mode": "mxfp8", "projector_bits": 8},
    "nvfp4": {"llm_mode": "nvfp4", "embed_bits": 5},
    "mlx-lm's recipe": {"recipe": "mixed_3_6", "projector_bits": 4},
    "recipe": {"recipe": "RECIPE", "llm_bits": 4},
    "search": {"llm_bpw": 5.5},
    "bfloat16": {"llm_bits": 4, "projector_bits": 8, "dtype": "bfloat16"},
}
RECIPE = {
    "*.layers.0.*": {"bits": 8, "group_size": 32},
    "*.mlp.down_proj": {"mode": "mxfp4"},
    "multi_modal_projector.linear_2": 6,
    "multi_modal_projector.linear_0": {"mode": "nvfp4"},
    "model.layers.3.self_attn.*": 16,
}


@pytest.fixture(scope="module")
def untied(demo_checkpoint, tmp_path_factory):
    """The demo with a head of its own, which differs from the embedding."""
    path = Path(shutil.copytree(demo_checkpoint, tmp_path_factory.mktemp("untied") / "checkpoint"))
    state = load_file(path / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"] * 1.0625
    save_file(state, path / "model.safetensors")
    return path


def test_every_form_is_loaded_and_answers_alike(
    mlx_vlm, demo_checkpoint, untied, image, tmp_path, one_sample, monkeypatch
):
    """As they are written, in one process of mlx-vlm's: its answers are our runtime's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "recipe.json").write_text(json.dumps(RECIPE))
    bundles = {}
    heads = {
        "head": {"llm_bits": 4, "head_bits": 8},
        "whole head": {"llm_bits": 4, "head_bits": 16},
    }
    for name, asked in (FORMS | heads).items():
        given = asked | ({"recipe": str(tmp_path / "recipe.json")} if name == "recipe" else {})
        options = ExportOptions.of(layout="mlx", max_kl_nats=9.0, min_agreement=0.0, **given)
        source = untied if name in heads else demo_checkpoint
        bundles[name] = export(source, tmp_path / name.replace(" ", "-"), options).path
    found = answers_of_all(mlx_vlm, bundles.values(), image, tmp_path)
    for name, path in bundles.items():
        ours = fastvlm_mlx.load(path).generate(image, PROMPT, max_tokens=MAX_TOKENS).text
        assert found[str(path)].strip() == ours.strip(), name


def answers_of_all(mlx_vlm, bundles, image, folder):
    done = subprocess.run(
        [mlx_vlm, str(ANSWERER), str(image), PROMPT, str(MAX_TOKENS), *map(str, bundles)],
        check=True,
        cwd=folder,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_its_own_conversion_becomes_an_app_bundle(
    mlx_vlm, checkpoint, image, tmp_path, monkeypatch
):
    """Quantized as it does by default, the projector included; answers stay what they were."""
    command = [mlx_vlm, "-m", "mlx_vlm", "convert", "--hf-path", str(checkpoint), "-q"]
    command += ["--mlx-path", str(tmp_path / "theirs")]
    subprocess.run(command, check=True, cwd=tmp_path, env=clean_environment())
    every = images.gate_samples
    monkeypatch.setattr(images, "gate_samples", lambda vision: every(vision)[:1])
    result = convert(tmp_path / "theirs", tmp_path / "ours", "app")
    assert result.manifest["llm"]["bits"] == 4
    assert result.manifest["llm"]["left_unquantized"] == {}
    models = [fastvlm_mlx.load(tmp_path / name) for name in ("theirs", "ours")]
    answers = [model.generate(image, PROMPT, max_tokens=MAX_TOKENS).text for model in models]
    assert answers[0] == answers[1]
