"""An encoder package evaluated op by op: rounding, compressed weights, damage."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from programs import build, ct, half, mb, run, t

from benchmarks.synthetic import encoder_state_dict
from fastvlm_mlx.bundle.config import VisionConfig
from fastvlm_mlx.errors import EncoderError, OptionError
from fastvlm_mlx.vision import load_encoder
from fastvlm_mlx.vision.package import (
    describe,
    model_path,
    operations,
    quiet_coremltools,
    read_spec,
)
from fastvlm_mlx.vision.program import mlprogram
from fastvlm_mlx.vision.program.memory import alive_elements, constant_elements
from fastvlm_mlx.vision.program.mil import read_function
from fastvlm_mlx.vision.program.mlprogram import MLProgramEncoder
from model_export.encoder import reference
from model_export.encoder.coreml import EncoderMetadata, Form, export_encoder
from model_export.encoder.fastvithd import fold

with quiet_coremltools():
    import coremltools.optimize.coreml as cto

CONFIG = VisionConfig(image_size=128, layers=(1, 1, 1, 1, 1), embed_dims=(32, 32, 64, 64, 64))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Layers this small are slower on several threads, far slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# The encoder as a package, whole, compressed and damaged.


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoder") / "encoder.mlpackage"
    module = fold(encoder_state_dict(CONFIG), CONFIG)
    export_encoder(module, CONFIG, path, Form("fp16", EncoderMetadata("random", "none")))
    return path


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).random((1, 3, 128, 128), np.float32)


@functools.cache
def converted(target: str) -> Any:
    """The small encoder as a model that coremltools can compress, for a later system."""
    size = CONFIG.image_size
    module = fold(encoder_state_dict(CONFIG), CONFIG)
    with quiet_coremltools(), torch.no_grad():
        sample = torch.zeros(1, 3, size, size)
        return ct.convert(
            torch.export.export(module, (sample,)).run_decompositions({}),
            inputs=[ct.TensorType("images", sample.shape, dtype=np.float32)],
            outputs=[ct.TensorType("image_features", dtype=np.float32)],
            minimum_deployment_target=getattr(ct.target, target),
            skip_model_load=True,
        )


@pytest.mark.parametrize(
    ("expected", "target"),
    [
        ("int8", "iOS16"),
        ("palette4", "iOS16"),
        ("palette6", "iOS16"),
        ("palette4", "iOS18"),
        ("int8", "iOS18"),
        ("int4", "iOS18"),
    ],
)
def test_compressed_weights(expected: str, target: str, images: np.ndarray, tmp_path: Path) -> None:
    """The same answer as from the weights that coremltools itself decompresses."""
    model = converted(target)
    with quiet_coremltools():
        bits = int(expected[-1])
        if expected.startswith("palette"):
            config = cto.OpPalettizerConfig(mode="uniform", nbits=bits, weight_threshold=512)
            small = cto.palettize_weights(model, cto.OptimizationConfig(config))
        elif bits == 8:
            config = cto.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=512)
            small = cto.linear_quantize_weights(model, cto.OptimizationConfig(config))
        else:
            config = cto.OpLinearQuantizerConfig(
                mode="linear_symmetric",
                dtype="int4",
                granularity="per_block",
                block_size=32,
                weight_threshold=512,
            )
            small = cto.linear_quantize_weights(model, cto.OptimizationConfig(config))
        large = cto.decompress_weights(small)
    small.save(str(tmp_path / "small.mlpackage"))
    large.save(str(tmp_path / "large.mlpackage"))
    compressed = MLProgramEncoder(tmp_path / "small.mlpackage")(images)
    plain = MLProgramEncoder(tmp_path / "large.mlpackage")(images)
    assert describe(tmp_path / "small.mlpackage").precision == expected
    assert describe(tmp_path / "large.mlpackage").precision == "fp16"
    np.testing.assert_allclose(compressed, plain, rtol=1e-3, atol=1e-3 * np.abs(plain).max())


def test_the_encoder_equals_the_module_it_was_made_from(encoder: Path, images: np.ndarray) -> None:
    package = MLProgramEncoder(encoder)
    assert (package.image_size, package.num_tokens, package.hidden_size) == (128, 4, 128)
    module = fold(encoder_state_dict(CONFIG), CONFIG)
    with torch.inference_mode():
        for parameter in module.parameters():
            parameter.copy_(half(parameter))
        expected = module(t(images)).numpy()
    found = package(images)
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    again = package(images)
    np.testing.assert_array_equal(found, again)


def test_a_package_made_from_the_unfolded_module_is_evaluated_too(
    images: np.ndarray, tmp_path: Path
) -> None:
    """The operations of Apple's own packages: BatchNorm, channel norm in five steps, linear."""
    module = reference.FastViTHD(CONFIG).eval()
    module.load_state_dict(encoder_state_dict(CONFIG))
    path = tmp_path / "unfolded.mlpackage"
    with quiet_coremltools(), torch.no_grad():
        expected = module(t(images)).numpy()
        ct.convert(
            torch.export.export(module, (t(images),)).run_decompositions({}),
            inputs=[ct.TensorType("images", images.shape, dtype=np.float32)],
            outputs=[ct.TensorType("image_features", dtype=np.float32)],
            minimum_deployment_target=ct.target.iOS15,
            compute_precision=ct.precision.FLOAT32,
            skip_model_load=True,
        ).save(str(path))
    ops = describe(path).ops
    assert {"batch_norm", "linear", "pow", "real_div", "sqrt", "squeeze", "sub"} <= set(ops)
    found = MLProgramEncoder(path)(images)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_torch_missing_is_one_sentence(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlprogram, "find_spec", lambda name: None)
    with pytest.raises(EncoderError, match="torch is not installed"):
        MLProgramEncoder(encoder)


def test_an_output_of_undeclared_shape_has_the_program_s(
    encoder: Path, images: np.ndarray, tmp_path: Path
) -> None:
    package = Path(shutil.copytree(encoder, tmp_path / "encoder.mlpackage"))
    spec = read_spec(package)
    del spec.description.output[0].type.multiArrayType.shape[:]
    model_path(package).write_bytes(spec.SerializeToString())
    assert describe(package).outputs[0].shape == (1, 4, 128)
    assert MLProgramEncoder(package)(images).shape == (1, 4, 128)


def test_observe_sees_every_operation_once_and_in_order(encoder: Path, images: np.ndarray) -> None:
    package = MLProgramEncoder(encoder)
    seen: list[tuple[str, str, tuple[int, ...]]] = []
    package.evaluate(
        images, observe=lambda name, kind, value: seen.append((name, kind, tuple(value.shape)))
    )
    kinds = Counter(kind for _, kind, _ in seen)
    splits = {"split": 3 * package.info.ops["split"]}  # three results each
    assert kinds == {**package.info.ops, **splits}
    assert seen[0][1:] == ("cast", (1, 3, 128, 128))
    assert seen[-1][2] == (1, 4, 128)
    written = [
        op.attributes["name"].immediateValue.tensor.strings.values[0]
        for op in operations(read_spec(encoder))
        if op.type != "const"
    ]
    assert list(dict.fromkeys(name for name, _, _ in seen)) == written


def test_the_memory_is_foreseen(encoder: Path, images: np.ndarray) -> None:
    function = read_function(read_spec(encoder), encoder, "main")
    program = MLProgramEncoder(encoder)
    weights = sum(constant.numel() for constant in program.constants.values())
    # Axes and sizes are counted too.
    assert weights <= constant_elements(function) <= 1.01 * weights
    storages: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}
    most = 0

    def observe(name: str, kind: str, value: torch.Tensor) -> None:
        nonlocal most
        storage = value.untyped_storage()
        storages[storage.data_ptr()] = weakref.ref(value), storage.nbytes() // 4
        most = max(most, sum(size for tensor, size in storages.values() if tensor() is not None))

    program.evaluate(images, observe=observe)
    assert most <= alive_elements(function) <= 3 * most


def test_results_are_freed_after_their_last_use(encoder: Path, images: np.ndarray) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def observe(name: str, kind: str, value: torch.Tensor) -> None:
        nonlocal most
        alive.append(weakref.ref(value))
        most = max(most, sum(ref() is not None for ref in alive))

    MLProgramEncoder(encoder).evaluate(images, observe=observe)
    # A residual, what is added to it, and the three parts of qkv with their attention.
    assert most <= 6


@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (3, 128, 128), (2, 3, 128, 128)])
def test_pixels_of_another_shape_are_an_error(encoder: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(EncoderError, match=r"expected \[1, 3, 128, 128\]"):
        MLProgramEncoder(encoder)(np.zeros(shape, np.float32))


def test_a_program_that_is_no_encoder_is_an_error(tmp_path: Path) -> None:
    package = build(tmp_path, [(1, 3, 8, 8)], lambda a: mb.relu(x=a))
    with pytest.raises(EncoderError, match=r"declares a float32 \[1, 3, 8, 8\], relu_0"):
        MLProgramEncoder(package)


def weights(package: Path) -> Path:
    return model_path(package).parent / "weights" / "weight.bin"


def truncate(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def point_elsewhere(package: Path) -> None:
    manifest = json.loads((package / "Manifest.json").read_text())
    manifest["rootModelIdentifier"] = "nobody"
    (package / "Manifest.json").write_text(json.dumps(manifest))


def shift_offset(package: Path) -> None:
    spec = read_spec(package)
    for op in operations(spec):
        if op.type == "const" and op.attributes["val"].WhichOneof("value") == "blobFileValue":
            op.attributes["val"].blobFileValue.offset += 64
            break
    model_path(package).write_bytes(spec.SerializeToString())


def shrink_shape(package: Path) -> None:
    spec = read_spec(package)
    for op in operations(spec):
        if op.type == "const" and op.attributes["val"].WhichOneof("value") == "blobFileValue":
            op.attributes["val"].type.tensorType.dimensions[0].constant.size += 1
            break
    model_path(package).write_bytes(spec.SerializeToString())


def no_program(package: Path) -> None:
    model_path(package).write_bytes(b"")


def future(package: Path) -> None:
    spec = read_spec(package)
    spec.specificationVersion = 99
    model_path(package).write_bytes(spec.SerializeToString())


def declare_more_tokens(package: Path) -> None:
    spec = read_spec(package)
    spec.description.output[0].type.multiArrayType.shape[1] = 9
    model_path(package).write_bytes(spec.SerializeToString())


def rename_output(package: Path) -> None:
    spec = read_spec(package)
    function = spec.mlProgram.functions["main"]
    block = function.block_specializations[function.opset]
    block.operations[-1].outputs[0].name = block.outputs[0] = "other"
    model_path(package).write_bytes(spec.SerializeToString())


def unconnected(package: Path) -> None:
    spec = read_spec(package)
    conv = next(op for op in operations(spec) if op.type == "conv")
    conv.inputs["x"].arguments[0].name = "nowhere"
    model_path(package).write_bytes(spec.SerializeToString())


def test_an_operation_that_fails_is_named(tmp_path: Path) -> None:
    package = build(tmp_path, [(2, 3)], lambda a: mb.softmax(x=a, axis=1))
    spec = read_spec(package)
    [axis] = [op for op in operations(spec) if "axis" in op.outputs[0].name]
    axis.attributes["val"].immediateValue.tensor.ints.values[0] = 7
    model_path(package).write_bytes(spec.SerializeToString())
    with pytest.raises(EncoderError, match="operation softmax 'softmax_0' can't be evaluated"):
        run(package, np.zeros((2, 3), np.float32))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "gone": (shutil.rmtree, "no encoder package"),
    "no manifest": (lambda p: (p / "Manifest.json").unlink(), "has no Manifest.json"),
    "manifest garbled": (lambda p: (p / "Manifest.json").write_text("{"), "read as JSON"),
    "manifest points nowhere": (point_elsewhere, "does not name a model"),
    "no specification": (lambda p: model_path(p).unlink(), "can't be opened"),
    "specification garbled": (
        lambda p: model_path(p).write_bytes(b"\xff" * 1000),
        "is not a Core ML model",
    ),
    "specification cut": (lambda p: truncate(model_path(p), 0.5), "is not a Core ML model"),
    "specification empty": (no_program, "holds no model"),
    "specification from the future": (future, "has specification version 99"),
    "declared shape wrong": (declare_more_tokens, r"made features of shape \[1, 4, 128\]"),
    "output renamed": (rename_output, "reads images and makes other"),
    "operand missing": (unconnected, "can't be read"),
    "shape wrong": (shrink_shape, "can't be read"),
    "no weights": (lambda p: weights(p).unlink(), "weight.bin is missing"),
    "weights cut": (lambda p: truncate(weights(p), 0.9), "no room for"),
    "weights empty": (lambda p: truncate(weights(p), 0), "has 0 bytes and no room for"),
    "weights elsewhere": (shift_offset, "no room for"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_package_is_one_sentence(
    damage: str, encoder: Path, images: np.ndarray, tmp_path: Path
) -> None:
    package = tmp_path / "encoder.mlpackage"
    shutil.copytree(encoder, package)
    inflict, message = DAMAGES[damage]
    inflict(package)
    with pytest.raises(EncoderError, match=message) as caught:
        MLProgramEncoder(package)(images)
    assert "\n" not in str(caught.value)
    assert "expected" in str(caught.value)


def test_load_encoder_takes_compute_units_on_macos_only(
    encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    assert load_encoder(encoder).num_tokens == 4
    with pytest.raises(OptionError, match="exist on macOS only"):
        load_encoder(encoder, "ne")
    with pytest.raises(OptionError, match="choose one of auto, all, cpu, gpu, ne"):
        load_encoder(encoder, "tpu")


def test_neither_torch_nor_coremltools_is_loaded_by_importing() -> None:
    code = (
        "import sys, fastvlm_mlx.vision.coreml, fastvlm_mlx.vision.program.mlprogram;"
        "sys.exit(bool({'torch', 'coremltools'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
