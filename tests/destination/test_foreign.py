"""What other people made: leftovers that nobody left, and directories that are no bundle."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from staged import killed

from fastvlm_mlx.errors import DestinationError
from model_export.destination.content import content_of
from model_export.destination.destination import appearing, check_replaceable, look_at
from model_export.destination.staging import MAGIC
from tests.fuzz.kills import version, write

# Of a hand: it lists more than an export writes.
MANIFEST = json.dumps(
    dict.fromkeys(("schema_version", "layout", "source", "encoder", "llm", "gates"))
    | {
        "files": dict.fromkeys(
            ("config.json", "model.safetensors", "thesis.docx", "my.mlpackage/thesis.docx")
        )
    }
)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def publish(out, text, *, overwrite=False):
    with appearing(check_replaceable(out, overwrite=overwrite)) as directory:
        write(directory, text)


def content_of_path(path):
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        return content_of(path.name, directory)
    finally:
        os.close(directory)


class TestForged:
    """A repository, an archive or a copy may hold what looks like a killed run's."""

    @pytest.mark.parametrize("owner", ["1 x", "1 x\n5 6", "1 x\n", ""])
    @pytest.mark.parametrize("destination", ["models", ".git", None])
    def test_it_is_left_alone_and_told_of(self, tmp_path, out, capsys, owner, destination):
        any_one = [[".", stat.S_IFDIR, 0, 0, 0]]
        record = {"destination": destination, "found": any_one, "made": any_one}
        record = record if destination else None
        left = self._forged(tmp_path, owner, record)
        before = sorted(left.rglob("*"))
        publish(out, "new")
        publish(out, "newer", overwrite=True)
        assert sorted(left.rglob("*")) == before
        assert sorted(os.listdir(tmp_path)) == [left.name, "out"]
        (told,) = capsys.readouterr().err.splitlines()
        assert str(left) in told
        assert "left alone" in told

    def test_a_copy_of_a_real_one_is(self, tmp_path, out):
        left = killed(tmp_path)
        copy = tmp_path / ".fastvlm-0123456789abcdef"
        shutil.copytree(left, copy)
        publish(out, "new")
        assert sorted(os.listdir(tmp_path)) == [copy.name, "out"]
        assert (copy / "bundle").is_dir()

    def test_nothing_hidden_is_made_of_a_real_one(self, tmp_path):
        left = killed(tmp_path)
        write(left / "replaced", "old")
        found, made = (content_of_path(left / name).to_json() for name in ("replaced", "bundle"))
        record = {"destination": ".git", "found": found, "made": made}
        (left / "record").write_text(json.dumps(record))
        with pytest.raises(DestinationError, match=r"\.git is a hidden name"):
            look_at(tmp_path / "out")
        (kept,) = os.listdir(tmp_path)
        assert kept.startswith("fastvlm-kept-")
        assert version(tmp_path / kept) == "old"

    @pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "null", "[]", "1" * 5000])
    def test_a_broken_record_keeps_nobody_from_exporting(self, tmp_path, out, text):
        left = killed(tmp_path)
        (left / "record").write_text(text)
        publish(out, "new")
        assert version(out) == "new"
        assert (left / "bundle").is_dir()

    @staticmethod
    def _forged(parent, owner, record):
        left = parent / f".fastvlm-{len(str(record) + owner):016x}"
        write(left / "bundle", "theirs")
        (left / "lock").write_text(f"{MAGIC}\n{owner}\n")
        if record is not None:
            (left / "record").write_text(json.dumps(record))
        return left


class TestForeign:
    """What --overwrite would delete is a bundle's, all of it, or nothing is."""

    @pytest.mark.parametrize(
        "files",
        [
            {"manifest.json": '{"manifest_version": 3}', "src/main.js": "mine"},
            {"manifest.json": "[" * 100_000},
            {"manifest.json": '{"schema_version": 1, "files": {}}', ".git/objects/ab": "commit"},
            {"config.json": "{}", "fastvithd.mlpackage/a": "x", "photos/cat.png": "mine"},
            {"config.json": "{}", "main.py": "mine"},
            {"config.json": "{}", "package.json": "{}", "tsconfig.json": "{}"},
            {"config.json": "{}", "tokenizer.json": "{}", "vocab.json": "{}"},
            {"config.json": json.dumps({"model_type": "llava_qwen2"})},
            {"config.json": "{}", "fastvithd.mlpackage/Manifest.json": "{}"},
            {"manifest.json": MANIFEST, "config.json": "{}", "thesis.docx": "mine"},
            {"manifest.json": MANIFEST, "config.json": "{}", "my.mlpackage/thesis.docx": "mine"},
            {"manifest.json": MANIFEST, "__MACOSX/thesis.docx": "mine"},
            {"manifest.json": MANIFEST, "._thesis/all.txt": "mine"},
            {"manifest.json": '{"schema_version": 1, "files": {"config.json": {}}}'},
        ],
        ids=range(14),
    )
    def test_a_directory_with_something_else(self, out, files):
        for name, text in files.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text(text)
        with pytest.raises(DestinationError, match="holds what is no bundle"):
            check_replaceable(out, overwrite=True)
        assert {name: (out / name).read_text() for name in files} == files

    @pytest.mark.parametrize(
        "names",
        [
            "model_export/demo/checkpoint",
            "tests/golden/transformers",
            "tests/golden/apple",
            "tests/golden_lora/rslora",
        ],
    )
    def test_a_checkpoint(self, out, names):
        shutil.copytree(Path(__file__).parents[2] / names, out)
        (out / "README.md").unlink(missing_ok=True)
        before = look_at(out)
        with pytest.raises(DestinationError, match="holds what is no bundle"):
            check_replaceable(out, overwrite=True)
        if not (out / "adapter_config.json").exists():
            # Nor with a manifest, whatever that says.
            (out / "manifest.json").write_text(MANIFEST)
            with pytest.raises(DestinationError, match="tensors of a checkpoint"):
                check_replaceable(out, overwrite=True)
            (out / "manifest.json").unlink()
        assert look_at(out) == before

    def test_a_bundle_is_replaced_with_what_systems_left_in_it(self, out):
        publish(out, "old")
        for name in ("._config.json", "__MACOSX/._config.json", "Thumbs.db", ".DS_Store"):
            (out / name).parent.mkdir(exist_ok=True)
            (out / name).write_text("")
        publish(out, "new", overwrite=True)
        assert version(out) == "new"

    @pytest.mark.parametrize("layout", ["app", "mlx"])
    def test_a_bundle_as_others_publish_it(self, out, layout):
        out.mkdir()
        projector, encoder = {
            "app": ("multi_modal_projector.linear_0.weight", "multi_modal_projector.linear_2.bias"),
            "mlx": ("mm_projector.0.weight", "vision_tower.vision_model.conv_exp.weight"),
        }[layout]
        names = ("language_model.model.norm.weight", projector, encoder)
        save_file({name: np.ones(1, np.float32) for name in names}, out / "model.safetensors")
        (out / "config.json").write_text(json.dumps({"model_type": "llava_qwen2"}))
        (out / "merges.txt").write_text("")
        if layout == "app":
            (out / "fastvithd.mlpackage").mkdir()
            (out / "fastvithd.mlpackage" / "Manifest.json").write_text("{}")
        assert check_replaceable(out, overwrite=True).found is not None
        (out / "notes.json").write_text("{}")
        with pytest.raises(DestinationError, match=r"no bundle \(notes\.json\)"):
            check_replaceable(out, overwrite=True)

    @pytest.mark.linux
    def test_what_is_mounted_below_is_not_reached(self, tmp_path, out):
        """In a namespace of its own, where the system lets us have one."""
        real = tmp_path / "real"
        real.mkdir()
        (real / "thesis.txt").write_text("precious")
        write(out, "old")
        (out / "fastvithd.mlpackage" / "images").mkdir()
        script = (
            "import pathlib, subprocess, sys\n"
            "from model_export.destination.destination import check_replaceable\n"
            "from fastvlm_mlx.errors import DestinationError\n"
            "subprocess.run(['mount', '--bind', sys.argv[2], sys.argv[3]], check=True)\n"
            "try:\n"
            "    check_replaceable(pathlib.Path(sys.argv[1]), overwrite=True)\n"
            "except DestinationError as error:\n"
            "    print(error)\n"
        )
        done = subprocess.run(
            ["unshare", "-m", sys.executable, "-c", script]
            + [str(p) for p in (out, real, out / "fastvithd.mlpackage" / "images")],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 0:
            assert "something is mounted there" in done.stdout
        assert (real / "thesis.txt").read_text() == "precious"
