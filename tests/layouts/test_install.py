"""A bundle put into the demo app: where it goes, what it replaces, what is refused."""

import json
import os
import shutil

import pytest

from fastvlm_mlx.errors import BundleError, DestinationError
from model_export.layouts import install as installer


@pytest.fixture
def app(tmp_path):
    """What a clone of apple/ml-fastvlm looks like where it matters."""
    folder = tmp_path / "ml-fastvlm" / "app" / "FastVLM"
    (folder / "model").mkdir(parents=True)
    (folder / "FastVLM.swift").write_text("// Apple's")
    (folder / "model" / "old.safetensors").write_text("old")
    return tmp_path / "ml-fastvlm" / "app"


@pytest.fixture
def any_size(monkeypatch):
    """The demo checkpoint's encoder is smaller than the app's."""
    monkeypatch.setattr(installer, "app_misfit", lambda info: None)


def listing(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_what_lies_beside_the_bundle_s_files_stays_out_of_the_app(bundle_copy, app, any_size):
    files = listing(bundle_copy)
    (bundle_copy / ".cache").mkdir()
    (bundle_copy / ".cache" / "download.metadata").write_text("the hub's")
    (bundle_copy / "README.md").write_text("the hub's")
    assert list(installer.plan(bundle_copy, app).files) == files


@pytest.mark.parametrize("given", [".", "..", "FastVLM"])
def test_the_bundle_takes_the_model_s_place(demo_bundle, app, any_size, given):
    plan = installer.plan(demo_bundle, app / given)
    assert plan.model == (app / "FastVLM" / "model").resolve()
    assert plan.replaces == ("old.safetensors",)
    assert listing(app / "FastVLM" / "model") == ["old.safetensors"]
    installer.install(plan)
    assert listing(app / "FastVLM" / "model") == listing(demo_bundle)
    for name in plan.files:
        assert (plan.model / name).read_bytes() == (demo_bundle / name).read_bytes()
    assert sorted(os.listdir(app / "FastVLM")) == ["FastVLM.swift", "model"]


def test_what_the_unmodified_app_asserts_is_refused(demo_bundle, app):
    with pytest.raises(BundleError, match=r"16 tokens of 512 channels .* asserts 256 of 3072"):
        installer.plan(demo_bundle, app)


def test_a_broken_bundle_is_refused(bundle_copy, app, any_size):
    (bundle_copy / "tokenizer_config.json").unlink()
    with pytest.raises(BundleError, match=r"tokenizer_config\.json is missing"):
        installer.plan(bundle_copy, app)


def test_per_layer_quantization_is_refused(bundle_copy, app, any_size):
    config = json.loads((bundle_copy / "config.json").read_text())
    config["quantization"]["language_model.lm_head"] = {"group_size": 64, "bits": 8}
    (bundle_copy / "config.json").write_text(json.dumps(config))
    (bundle_copy / "manifest.json").unlink()
    with pytest.raises(BundleError, match="group_size and bits alone"):
        installer.plan(bundle_copy, app)


@pytest.mark.parametrize("given", ["nothing", "ml-fastvlm/app/FastVLM/model", "."])
def test_a_directory_that_is_not_the_app(demo_bundle, app, any_size, given, tmp_path):
    with pytest.raises(DestinationError, match="clone of apple/ml-fastvlm"):
        installer.plan(demo_bundle, tmp_path / given)


def test_what_was_there_stays_when_the_copy_fails(demo_bundle, app, any_size, monkeypatch):
    plan = installer.plan(demo_bundle, app)

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(installer.shutil, "copyfile", fail)
    with pytest.raises(DestinationError, match="is full"):
        installer.install(plan)
    assert listing(app / "FastVLM" / "model") == ["old.safetensors"]


def test_what_the_plan_did_not_list_is_not_removed(demo_bundle, app, any_size):
    plan = installer.plan(demo_bundle, app)
    (app / "FastVLM" / "model" / "thesis.txt").write_text("precious")
    with pytest.raises(DestinationError, match=r"thesis\.txt is new"):
        installer.install(plan)
    assert listing(app / "FastVLM" / "model") == ["old.safetensors", "thesis.txt"]
    assert sorted(os.listdir(app / "FastVLM")) == ["FastVLM.swift", "model"]


def test_a_model_that_came_to_be_there_stays(demo_bundle, app, any_size):
    model = app / "FastVLM" / "model"
    (model / "old.safetensors").unlink()
    model.rmdir()
    plan = installer.plan(demo_bundle, app)
    assert plan.replaces == ()
    model.mkdir()
    with pytest.raises(DestinationError, match="came to exist"):
        installer.install(plan)
    model.rmdir()
    model.write_text("a file")
    with pytest.raises(DestinationError, match="is a file"):
        installer.plan(demo_bundle, app)
    assert model.read_text() == "a file"


def test_a_dry_run_lists_and_changes_nothing(demo_bundle, app, any_size, monkeypatch, capsys):
    from fastvlm_mlx.cli import main

    monkeypatch.setattr("sys.argv", ["fastvlm", "install", str(demo_bundle), str(app), "--dry-run"])
    with pytest.raises(SystemExit):
        main.main()
    out = capsys.readouterr().out
    assert "would copy fastvithd.mlpackage/Manifest.json" in out
    assert "would remove old.safetensors" in out
    assert "Xcode" in out
    assert listing(app / "FastVLM" / "model") == ["old.safetensors"]


def test_a_model_that_is_a_link_is_not_followed(demo_bundle, app, any_size, tmp_path):
    thesis = tmp_path / "documents" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("precious")
    shutil.rmtree(app / "FastVLM" / "model")
    (app / "FastVLM" / "model").symlink_to(thesis.parent)
    with pytest.raises(DestinationError, match="is a symbolic link"):
        installer.plan(demo_bundle, app)
    assert thesis.read_text() == "precious"
