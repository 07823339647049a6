"""The encoder as it is written to disk: its numbers, its graph, its declarations, its bytes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import resource
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder
from torch import nn

from benchmarks.synthetic import encoder_state_dict
from fastvlm_mlx.bundle.config import VisionConfig
from fastvlm_mlx.errors import DestinationError, GateError, OptionError
from fastvlm_mlx.vision.package import PackageInfo, describe
from fastvlm_mlx.vision.program.mlprogram import MLProgramEncoder
from model_export.encoder import reference
from model_export.encoder.coreml import EncoderMetadata, Form, check_graph, export_encoder
from model_export.encoder.fastvithd import ChannelNorm, FastViTHD, fold

CONFIG = VisionConfig(image_size=128, layers=(1, 2, 1, 2, 1), embed_dims=(16, 32, 64, 64, 128))
METADATA = EncoderMetadata(
    "tiny-random", "research only", version="3.2.1", options={"seed": "seven"}
)
FLOORS_DB = {"fp32": 80, "fp16": 35}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Layers this small are slower on several threads, far slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def export(path: Path, precision: str, module: FastViTHD | None = None) -> PackageInfo:
    module = module or fold(encoder_state_dict(CONFIG), CONFIG)
    return export_encoder(module, CONFIG, path, Form(precision, METADATA))


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("packages")
    paths = {p: directory / f"{p}.mlpackage" for p in FLOORS_DB}
    export(paths["fp32"], "fp32")
    export(paths["fp16"], "fp16")
    return paths


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    size = CONFIG.image_size
    return np.random.default_rng(0).random((1, 3, size, size), np.float32)


@pytest.fixture(scope="module")
def expected(images: np.ndarray) -> np.ndarray:
    module = reference.FastViTHD(CONFIG).eval()
    module.load_state_dict(encoder_state_dict(CONFIG))
    with torch.inference_mode():
        return module(torch.from_numpy(images)).numpy()


def snr_db(reference: np.ndarray, found: np.ndarray) -> float:
    return float(20 * np.log10(np.linalg.norm(reference) / np.linalg.norm(found - reference)))


@pytest.mark.parametrize("precision", FLOORS_DB)
@pytest.mark.parametrize("round_fp16", [False, True])
def test_what_is_on_disk_equals_the_unfolded_source(
    precision: str,
    round_fp16: bool,
    packages: dict[str, Path],
    images: np.ndarray,
    expected: np.ndarray,
) -> None:
    found = MLProgramEncoder(packages[precision]).evaluate(images, round_fp16=round_fp16)
    assert snr_db(expected, found) >= FLOORS_DB[precision]


@pytest.mark.parametrize("precision", FLOORS_DB)
def test_the_graph_is_what_the_neural_engine_wants(
    precision: str, packages: dict[str, Path]
) -> None:
    ops = describe(packages[precision]).ops
    blocks, attention = sum(CONFIG.layers), sum(CONFIG.layers[3:])
    # stem 3, patch embeddings 2 each, positions 1 each, conv_exp and its two of squeeze-excite
    assert ops["conv"] == 3 + 4 * 2 + 2 + 3 + 3 * blocks + (blocks - attention) + 2 * attention
    assert ops["gelu"] == 3 + 4 * 2 + 1 + blocks
    assert ops["add"] == blocks + attention
    assert ops["layer_norm"] == ops["softmax"] == ops["split"] == attention
    assert ops["matmul"] == 2 * attention
    assert ops["transpose"] == 1
    assert ops.get("cast", 0) == {"fp32": 0, "fp16": 2}[precision]
    assert set(ops) - {"cast"} == {
        *("conv", "gelu", "add", "layer_norm", "softmax", "split", "matmul", "transpose"),
        *("reshape", "reduce_mean", "reduce_sum", "relu", "sigmoid", "mul"),
    }
    # Of squeeze and excite: the division before the mean, and the gate.
    assert (ops["reduce_mean"], ops["reduce_sum"], ops["mul"]) == (1, 1, 2)


@pytest.mark.parametrize("precision", FLOORS_DB)
def test_what_the_package_declares(precision: str, packages: dict[str, Path]) -> None:
    info = describe(packages[precision])
    [image], [features] = info.inputs, info.outputs
    assert (image.name, image.dtype, image.shape) == ("images", "float32", (1, 3, 128, 128))
    assert (features.name, features.dtype) == ("image_features", "float32")
    assert features.shape == (1, 4, 256)
    assert "0 to 1" in image.description
    assert "4 tokens of 256 channels" in features.description
    assert info.precision == precision
    assert info.specification_version == 6
    assert info.deployment_target == "iOS15/macOS12"
    assert info.license == "research only"
    assert info.version == "3.2.1"
    assert "FastVLM" in info.author
    assert precision in info.short_description
    assert info.metadata["source"] == "tiny-random"
    assert info.metadata["seed"] == "seven"
    assert info.metadata["precision"] == precision
    assert info.metadata["torch"] == torch.__version__
    assert info.metadata["coremltools"].startswith("9.")
    assert VisionConfig.from_dict(json.loads(info.metadata["vision_config"])) == CONFIG
    size = sum(p.stat().st_size for p in packages[precision].rglob("*") if p.is_file())
    assert info.bytes == size


def digests(package: Path) -> dict[str, str]:
    return {
        path.relative_to(package).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(package.rglob("*"))
        if path.is_file()
    }


@pytest.mark.slow
def test_the_same_module_makes_the_same_bytes(packages: dict[str, Path], tmp_path: Path) -> None:
    # What an interrupted conversion leaves in the process.
    Builder.name_count["conv2d_pad"] += 1
    export(tmp_path / "again.mlpackage", "fp16")
    once = digests(packages["fp16"])
    assert digests(tmp_path / "again.mlpackage") == once
    code = (
        "import sys; from pathlib import Path; sys.path[:0] = sys.argv[2:];"
        "from test_coreml import export; export(Path(sys.argv[1]), 'fp16')"
    )
    here = Path(__file__).parent
    subprocess.run(
        [sys.executable, "-c", code, tmp_path / "other.mlpackage", here, here.parent],
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "12345"},
    )
    assert digests(tmp_path / "other.mlpackage") == once
    assert set(once) == {
        "Manifest.json",
        "Data/com.apple.CoreML/model.mlmodel",
        "Data/com.apple.CoreML/weights/weight.bin",
    }


def test_export_is_silent_and_leaves_nothing_changed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from tqdm import tqdm

    logger = logging.getLogger("coremltools")
    before = (logger.level, list(logger.handlers), tqdm.__init__, list(warnings.filters))
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        filters = list(warnings.filters)
        export(tmp_path / "silent.mlpackage", "fp16")
        assert list(warnings.filters) == filters
    assert not raised
    assert (logger.level, list(logger.handlers), tqdm.__init__) == before[:3]
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


class SourceNorm(nn.Module):
    """Channel norm as the released source writes it, which Core ML does not fuse."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        return (x - u) / torch.sqrt(s + 1e-5)


def test_a_graph_that_is_not_fused_is_refused_and_removed(tmp_path: Path) -> None:
    module = fold(encoder_state_dict(CONFIG), CONFIG)
    norm = next(n for n, m in module.named_modules() if isinstance(m, ChannelNorm))
    module.set_submodule(norm, SourceNorm())
    with pytest.raises(GateError, match=r"has 2 layer_norm, 1 transpose and 2 cast: expected 3"):
        export(tmp_path / "unfused.mlpackage", "fp16", module)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("ops", "message"),
    [
        ({"transpose": 3}, "3 transpose"),
        ({"cast": 4}, "4 cast"),
        ({"layer_norm": 0}, "0 layer_norm"),
    ],
)
def test_the_budget_of_operations(
    ops: dict[str, int], message: str, packages: dict[str, Path]
) -> None:
    info = describe(packages["fp16"])
    check_graph(info, CONFIG, Form("fp16", METADATA))
    with pytest.raises(GateError, match=message):
        check_graph(replace(info, ops={**info.ops, **ops}), CONFIG, Form("fp16", METADATA))


@pytest.mark.parametrize(
    "change",
    [
        {"inputs": ()},
        {"precision": "fp32"},
    ],
)
def test_the_contract_at_both_ends(change: dict[str, Any], packages: dict[str, Path]) -> None:
    with pytest.raises(GateError):
        check_graph(replace(describe(packages["fp16"]), **change), CONFIG, Form("fp16", METADATA))


def test_bad_destinations_and_options(tmp_path: Path) -> None:
    (tmp_path / "there.mlpackage").mkdir()
    with pytest.raises(DestinationError, match="exists"):
        export(tmp_path / "there.mlpackage", "fp16")
    with pytest.raises(DestinationError, match=r"in \.mlpackage"):
        export(tmp_path / "encoder", "fp16")
    with pytest.raises(OptionError, match="choose fp16 or fp32"):
        export(tmp_path / "encoder.mlpackage", "int3")


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A write past the limit fails as one on a full disk does.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(DestinationError, match="expected room for it") as caught:
            export(tmp_path / "large.mlpackage", "fp16")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
