"""What desktop systems leave beside files: everything behaves as if it were not there."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from fastvlm_mlx.bundle.bundle import Bundle
from fastvlm_mlx.bundle.config import VisionConfig
from fastvlm_mlx.bundle.files import is_empty
from fastvlm_mlx.bundle.manifest import MANIFEST, hash_tree
from fastvlm_mlx.errors import DestinationError
from fastvlm_mlx.inspection import inspect_bundle
from fastvlm_mlx.vision.program.mlprogram import MLProgramEncoder
from model_export.bundle_source import bundle_tensors
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.cli.facts import checkpoint_facts
from model_export.comparison.sweep import _State
from model_export.layouts import install as installer
from model_export.planning import plan
from model_export.publish import push
from model_export.samples.calibration import load_calibration

# How an AppleDouble file begins: what Finder keeps of a file where the disk has no room for it.
APPLE_DOUBLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(4072)


def litter(directory: Path) -> None:
    """As a visit by Finder, by Explorer, and a trip through a USB stick and a zip leave it."""
    shutil.copytree(directory, directory.parent / "__MACOSX")
    for file in (directory.parent / "__MACOSX").rglob("*"):
        if file.is_file():
            file.unlink()
            file.with_name("._" + file.name).write_bytes(APPLE_DOUBLE)
    for path in [directory, *directory.rglob("*")]:
        if path.is_dir():
            for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
                (path / name).write_bytes(b"\0\0\0\1Bud1")
        if path != directory:
            path.with_name("._" + path.name).write_bytes(APPLE_DOUBLE)
    (directory.parent / "__MACOSX").rename(directory / "__MACOSX")


def app_with(model: Path, root: Path) -> Path:
    """The demo app where it matters, with a model of its own."""
    shutil.copytree(model, root / "app" / "FastVLM" / "model")
    (root / "app" / "FastVLM" / "FastVLM.swift").touch()
    return root / "app"


@pytest.mark.parametrize("manifest", [True, False], ids=["ours", "Apple's"])
def test_an_app_bundle(bundle_copy, tmp_path, monkeypatch, manifest):
    monkeypatch.setattr(installer, "app_misfit", lambda info: None)
    app = app_with(bundle_copy, tmp_path)

    def everything():
        installation = installer.plan(bundle_copy, app)
        found = {
            "inspect": inspect_bundle(bundle_copy),
            "plan": plan.run(bundle_copy, "m4", {}),
            "install": (installation.files, installation.bytes, installation.replaces),
            "hashes": hash_tree(bundle_copy),
        }
        return found | ({"push": push.plan(bundle_copy, "me/model")} if manifest else {})

    if not manifest:
        (bundle_copy / MANIFEST).unlink()
    before = everything()
    litter(bundle_copy)
    litter(app / "FastVLM" / "model")
    assert everything() == before
    assert MLProgramEncoder(Bundle.open(bundle_copy).package)


def test_an_mlx_bundle(mlx_bundle, tmp_path):
    copy = Path(shutil.copytree(mlx_bundle, tmp_path / "bundle"))
    (copy / MANIFEST).unlink()

    def everything():
        bundle = Bundle.open(copy)
        return inspect_bundle(copy), list(bundle_tensors(bundle)), hash_tree(copy)

    before = everything()
    litter(copy)
    assert everything() == before


def test_a_checkpoint(demo_checkpoint, tmp_path):
    copy = Path(shutil.copytree(demo_checkpoint, tmp_path / "checkpoint"))

    def everything():
        return checkpoint_facts(copy), Checkpoint(copy).source(), plan.run(copy, "m4", {})

    before = everything()
    litter(copy)
    # Even a bundle's encoder is one only if it is no shadow of one.
    (copy / "._fastvithd.mlpackage").write_bytes(APPLE_DOUBLE)
    assert everything() == before


def test_images_to_calibrate_with(tmp_path):
    folder = tmp_path / "images" / "below"
    folder.mkdir(parents=True)
    Image.new("RGB", (64, 64), "red").save(folder / "a.jpg")
    before = load_calibration(tmp_path / "images", VisionConfig())
    litter(tmp_path / "images")
    after = load_calibration(tmp_path / "images", VisionConfig())
    assert after.digest == before.digest
    assert after.notes() == before.notes() == []


def test_a_directory_with_nothing_else_is_empty(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in (".DS_Store", "Thumbs.db", "._out"):
        (out / name).touch()
    assert is_empty(out)
    assert _State.open(out, "digest")
    # What a tool keeps its books in is somebody's work.
    (out / ".git").mkdir()
    assert not is_empty(out)
    with pytest.raises(DestinationError, match="was not made by a sweep"):
        _State.open(out, "digest")
