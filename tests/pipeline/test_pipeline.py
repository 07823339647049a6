"""The export as a whole: it appears complete or not at all, and says everything in its manifest."""

import errno
import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time

import pytest
from PIL import Image

from fastvlm_mlx.bundle.bundle import Bundle
from fastvlm_mlx.errors import CheckpointError, DestinationError, GateError, OptionError
from model_export import build, space
from model_export.checkpoint import licenses
from model_export.destination.destination import Destination, appearing, check_replaceable
from model_export.destination.staging import MAGIC
from model_export.gates.gate import Gate
from model_export.language import llm
from model_export.options import ExportOptions
from model_export.pipeline import export


def fingerprint(path):
    return {
        p.relative_to(path).as_posix(): (
            hashlib.sha256(p.read_bytes()).hexdigest(),
            p.stat().st_mtime_ns,
        )
        for p in sorted(path.rglob("*"))
        if p.is_file()
    }


@pytest.fixture
def quick(monkeypatch, demo_bundle):
    """Exports whose encoder is copied and whose gates are skipped: for what surrounds them."""
    from fastvlm_mlx.vision.package import describe

    def export_package(spec, package, progress):
        shutil.copytree(demo_bundle / package.name, package)
        return describe(package)

    def source_features(spec, progress):
        return {spec.checkpoint.config.vision.image_size: []}

    monkeypatch.setattr(build, "export_package", export_package)
    monkeypatch.setattr(build, "source_features", source_features)
    monkeypatch.setattr("model_export.gates.encoder.encoder_gates", lambda *arguments: ([], []))
    monkeypatch.setattr(build, "answer_gates", lambda *arguments, **options: [])


def test_the_manifest_says_what_the_bundle_is(demo_bundle, demo_checkpoint):
    manifest = json.loads((demo_bundle / "manifest.json").read_text())
    assert manifest["schema_version"] == 1
    assert manifest["layout"] == "app"
    assert manifest["source"]["license"]
    weights = manifest["source"]["files"]["model.safetensors"]
    data = (demo_checkpoint / "model.safetensors").read_bytes()
    assert weights == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert manifest["options"]["llm_bits"] == 4
    assert manifest["options"]["min_snr_db"] == 35
    assert 4.5 <= manifest["llm"]["bits_per_weight"] < 7
    assert set(manifest["llm"]["left_unquantized"]) == {
        "multi_modal_projector.linear_0.weight",
        "multi_modal_projector.linear_2.weight",
    }
    assert {"mlx", "coremltools", "torch", "python", "fastvlm-mlx"} <= set(manifest["versions"])
    assert manifest["encoder"]["deployment_target"].startswith("iOS")
    assert manifest["gates_passed"]
    assert [gate["name"] for gate in manifest["gates"]] == [
        "encoder SNR",
        "encoder conversion SNR",
        "encoder largest magnitude",
        "KL divergence",
        "greedy agreement",
        "LLM largest magnitude",
        "settings changed",
        "tensors changed",
    ]
    assert manifest["gates_left_out"] == {}
    listed = set(manifest["files"]) | {"manifest.json"}
    assert listed == {
        p.relative_to(demo_bundle).as_posix() for p in demo_bundle.rglob("*") if p.is_file()
    }
    Bundle.open(demo_bundle).check_files()


def test_two_exports_are_the_same_bytes(demo_checkpoint, demo_bundle, tmp_path, quick):
    export(demo_checkpoint, tmp_path / "again", ExportOptions.of(llm_bits=4))
    first = {k: v[0] for k, v in fingerprint(demo_bundle).items() if k != "manifest.json"}
    second = {k: v[0] for k, v in fingerprint(tmp_path / "again").items() if k != "manifest.json"}
    assert first == second


def test_calibration_that_can_t_be_read_is_told(demo_checkpoint, tmp_path, quick):
    """Whoever looks at it; here it is the encoder's measuring."""
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (40, 30), "red").save(images / "red.png")
    (images / "broken.png").write_bytes(b"no image")
    options = ExportOptions.of(encoder_precision="mixed", calibration=str(images))
    (note,) = export(demo_checkpoint, tmp_path / "out", options).notes
    assert note.startswith("calibration: 1 skipped")
    assert "broken.png" in note


def test_the_source_is_not_touched(demo_checkpoint, demo_bundle, tmp_path, quick):
    before = fingerprint(demo_checkpoint)
    export(demo_checkpoint, tmp_path / "out", ExportOptions())
    assert fingerprint(demo_checkpoint) == before


class TestLicences:
    """A checkpoint's licence goes with the bundle; what a link calls a licence does not."""

    @pytest.mark.parametrize("target", ["secret", "/dev/zero"])
    def test_a_link_elsewhere(self, edit_checkpoint, tmp_path, quick, target):
        path = edit_checkpoint()
        (tmp_path / "secret").write_text("the user's private key")
        (path / "LICENSE_x").symlink_to(tmp_path / target)
        with pytest.raises(CheckpointError, match="LICENSE_x is a link that leads out of"):
            export(path, tmp_path / "out", ExportOptions())
        assert not (tmp_path / "out").exists()

    def test_one_that_is_too_large(self, edit_checkpoint, tmp_path, quick):
        path = edit_checkpoint()
        (path / "LICENSE").write_bytes(b"x" * (licenses.LICENSE_BYTES + 1))
        with pytest.raises(CheckpointError, match="LICENSE has more than 1,000,000 bytes"):
            export(path, tmp_path / "out", ExportOptions())

    def test_a_name_for_terminals(self, edit_checkpoint, tmp_path, quick):
        path = edit_checkpoint()
        (path / "LICENSE\x1b[2J").write_text("no licence")
        export(path, tmp_path / "out", ExportOptions())
        copied = [file.name for file in (tmp_path / "out").glob("LICENSE*")]
        assert copied == [file.name for file in path.glob("LICENSE") if file.is_file()]


class TestDestination:
    def test_an_existing_one_needs_overwrite_and_is_whole_until_then(
        self, demo_checkpoint, tmp_path, quick, monkeypatch
    ):
        out = tmp_path / "out"
        export(demo_checkpoint, out, ExportOptions())
        (out / "mine.txt").write_text("precious")
        with pytest.raises(DestinationError, match=r"exists: choose another .* --overwrite"):
            export(demo_checkpoint, out, ExportOptions())
        with monkeypatch.context() as broken:
            broken.setattr(llm, "write", raiser(OSError(errno.EIO, "Input/output error")))
            (out / "mine.txt").unlink()
            with pytest.raises(DestinationError, match="can't be read or written"):
                export(demo_checkpoint, out, ExportOptions.of(overwrite=True))
            (out / "mine.txt").write_text("precious")
        with pytest.raises(DestinationError, match=r"what is no bundle \(mine\.txt\)"):
            export(demo_checkpoint, out, ExportOptions.of(overwrite=True))
        assert (out / "mine.txt").read_text() == "precious"
        (out / "mine.txt").unlink()
        export(demo_checkpoint, out, ExportOptions.of(overwrite=True))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]

    def test_one_inside_the_checkpoint_is_refused(self, edit_checkpoint):
        path = edit_checkpoint()
        before = fingerprint(path)
        with pytest.raises(DestinationError, match="never written to"):
            export(path, path / "out", ExportOptions.of(overwrite=True))
        for out in (path, path.parent):
            with pytest.raises(DestinationError, match=r"never written to|holds what is no bundle"):
                export(path, out, ExportOptions.of(overwrite=True))
        assert fingerprint(path) == before

    def test_a_full_disk(self, demo_checkpoint, tmp_path, quick, monkeypatch):
        monkeypatch.setattr(llm, "write", raiser(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(DestinationError, match=r"is full, nothing was left at .*: make room"):
            export(demo_checkpoint, tmp_path / "out", ExportOptions())
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.linux
    def test_a_disk_that_fills_while_the_third_shard_is_written(
        self, demo_checkpoint, tmp_path, quick, monkeypatch
    ):
        monkeypatch.setattr(llm, "SHARD_BYTES", 200_000)
        out = tmp_path / "out"
        export(demo_checkpoint, out, ExportOptions())
        before = fingerprint(out)
        shards = sorted(path.name for path in out.glob("model-*.safetensors"))
        export_package, found = build.export_package, []

        def fill(spec, package, progress):
            # Every write to /dev/full fails as on a full disk.
            (package.parent / shards[2]).symlink_to("/dev/full")
            return export_package(spec, package, progress)

        def look(stage, done):
            for directory in tmp_path.glob(".fastvlm-*/bundle"):
                found.append(sorted(path.name for path in directory.glob("model-*")))

        monkeypatch.setattr(build, "export_package", fill)
        sentence = rf"the disk of {tmp_path} is full, nothing was left at .*: make room, or choose"
        for destination in (out, tmp_path / "another"):
            with pytest.raises(DestinationError, match=sentence):
                export(demo_checkpoint, destination, ExportOptions.of(overwrite=True), look)
            assert found[-1] == shards[:3]
        assert fingerprint(out) == before
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_too_little_room_is_seen_before_any_work(self, demo_checkpoint, tmp_path, monkeypatch):
        from collections import namedtuple

        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(space.shutil, "disk_usage", lambda path: usage(9, 9, 1_000_000))
        with pytest.raises(DestinationError, match="has 1 MB free and the bundle needs"):
            export(demo_checkpoint, tmp_path / "out", ExportOptions())
        assert list(tmp_path.iterdir()) == []

    def test_a_file_in_its_parent_s_place(self, demo_checkpoint, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(DestinationError, match="can't be read or written"):
            export(demo_checkpoint, tmp_path / "file" / "out", ExportOptions())

    def test_what_a_killed_export_left_is_removed_by_the_next(
        self, demo_checkpoint, tmp_path, quick
    ):
        stale = tmp_path / ".fastvlm-0123456789abcdef"
        (stale / "bundle").mkdir(parents=True)
        (stale / "bundle" / "model.safetensors").write_bytes(b"half")
        lock = stale / "lock"
        lock.touch()
        numbers = f"{stale.stat().st_ino} {lock.stat().st_ino}"
        lock.write_text(f"{MAGIC}\n1 elsewhere\n{numbers}\n")
        with appearing(Destination(tmp_path / "another")) as running:
            (running / "config.json").write_text("{}")
            export(demo_checkpoint, tmp_path / "out", ExportOptions())
            left = sorted(p.name for p in tmp_path.iterdir())
            assert left == sorted([running.parent.name, "out"])

    def test_what_came_to_be_there_meanwhile_stays(self, demo_checkpoint, tmp_path, quick):
        out, thesis = tmp_path / "out", tmp_path / "out" / "thesis.txt"

        def intrude(stage, done):
            if stage == "check layout":
                out.mkdir(exist_ok=True)
                thesis.write_text("precious")

        with pytest.raises(
            DestinationError, match=r"came to exist while .*; what was made .* is d"
        ):
            export(demo_checkpoint, out, ExportOptions(), intrude)
        assert os.listdir(out) == ["thesis.txt"]
        thesis.unlink()
        out.rmdir()
        export(demo_checkpoint, out, ExportOptions())
        before = fingerprint(out)
        with pytest.raises(
            DestinationError, match=r"changed while .* \(thesis.txt is new\), and st"
        ):
            export(demo_checkpoint, out, ExportOptions.of(overwrite=True), intrude)
        assert thesis.read_text() == "precious"
        assert fingerprint(out).items() > before.items()
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_the_command_line_s_sentence(
        self, demo_checkpoint, tmp_path, quick, monkeypatch, capsys
    ):
        from fastvlm_mlx.cli import main

        out = tmp_path / "out"

        def check(bundle, encoder):
            out.mkdir()
            (out / "thesis.txt").write_text("precious")

        monkeypatch.setattr(build, "check_layout", check)
        monkeypatch.setattr("sys.argv", ["fastvlm", "export", str(demo_checkpoint), str(out)])
        with pytest.raises(SystemExit) as ended:
            main.main()
        assert ended.value.code == 2
        # One line for the eye's width is not one line of text.
        assert "came to exist while this was under way" in " ".join(capsys.readouterr().err.split())
        assert (out / "thesis.txt").read_text() == "precious"

    def test_all_files_have_the_modes_that_the_umask_gives(self, demo_checkpoint, tmp_path):
        earlier = os.umask(0o027)
        try:
            export(demo_checkpoint, tmp_path / "out", ExportOptions.of(llm_bits=4))
        finally:
            os.umask(earlier)
        modes = {
            (path.is_dir(), stat.S_IMODE(path.stat().st_mode))
            for path in [tmp_path / "out", *(tmp_path / "out").rglob("*")]
        }
        assert modes == {(True, 0o750), (False, 0o640)}

    def test_what_is_no_bundle_is_never_overwritten(self, demo_checkpoint, tmp_path, monkeypatch):
        docs = tmp_path / "home" / "docs"
        docs.mkdir(parents=True)
        (docs / "thesis.txt").write_text("precious")
        with pytest.raises(DestinationError, match=r"holds what is no bundle \(docs"):
            export(demo_checkpoint, docs.parent, ExportOptions.of(overwrite=True))
        monkeypatch.chdir(docs)
        for out in (".", "..", "", "~", "/"):
            with pytest.raises(DestinationError, match="can't become a bundle"):
                export(demo_checkpoint, out, ExportOptions.of(overwrite=True))
        assert (docs / "thesis.txt").read_text() == "precious"

    def test_a_symbolic_link_is_refused(self, demo_checkpoint, tmp_path):
        (tmp_path / "link").symlink_to(tmp_path / "nowhere")
        with pytest.raises(DestinationError, match="is a symbolic link"):
            export(demo_checkpoint, tmp_path / "link", ExportOptions())

    def test_parents_that_were_made_go_with_what_failed(
        self, demo_checkpoint, tmp_path, quick, monkeypatch
    ):
        monkeypatch.setattr(llm, "write", raiser(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            export(demo_checkpoint, tmp_path / "a" / "b" / "out", ExportOptions())
        assert list(tmp_path.iterdir()) == []


class TestRefusedBeforeAnyWork:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"llm_bits": 7}, "--llm-bits is 7: expected one of 2, 3, 4, 5, 6, 8, 16"),
            ({"llm_bits": 5}, "layout app can't hold 5 bits in groups of 64"),
            ({"group_size": 48}, "--group-size is 48: expected one of 32, 64, 128"),
            ({"dtype": "int8"}, "--dtype is int8"),
            ({"encoder_precision": "int3"}, "--encoder-precision is int3"),
            ({"min_agreement": 1.5}, "--min-agreement is 1.5"),
            ({"max_kl_nats": -1.0}, "--max-kl-nats is -1.0"),
        ],
    )
    def test_options(self, options, words):
        with pytest.raises(OptionError, match=words):
            ExportOptions.of(**options)

    def test_a_checkpoint_that_is_not_one(self, tmp_path):
        with pytest.raises(CheckpointError):
            export(tmp_path / "nothing", tmp_path / "out", ExportOptions())
        assert list(tmp_path.iterdir()) == []

    def test_a_missing_tokenizer(self, edit_checkpoint, tmp_path):
        path = edit_checkpoint()
        (path / "merges.txt").unlink()
        with pytest.raises(CheckpointError, match="holds no tokenizer"):
            export(path, tmp_path / "out", ExportOptions())
        assert not (tmp_path / "out").exists()


@pytest.fixture
def failing(monkeypatch, quick):
    """A gate that fails; its figure can be set."""
    gate = Gate("encoder SNR", 12.3, "dB", 35.0, True)
    monkeypatch.setattr("model_export.gates.encoder.encoder_gates", lambda *arguments: ([gate], []))


class TestAFailedGate:
    def test_nothing_is_left_at_the_destination_and_the_work_is_kept(
        self, demo_checkpoint, tmp_path, failing
    ):
        out, kept = tmp_path / "a" / "out", tmp_path / "a" / "out.failed-gates"
        words = (
            r"failed 1 of its 3 gates \(encoder SNR is 12\.3 dB, below its floor of 35 dB\) and is "
            rf"kept at {kept}: rename it to use it as it is, judge it again with `fastvlm verify "
            rf"{kept} --checkpoint …` and limits of your own, or choose more bits"
        )
        with pytest.raises(GateError, match=words):
            export(demo_checkpoint, out, ExportOptions.of(llm_bits=4))
        assert list(out.parent.iterdir()) == [kept]
        bundle = Bundle.open(kept)
        bundle.check_files()
        assert not bundle.manifest["gates_passed"]
        assert bundle.manifest["gates"][0]["passed"] is False

    def test_the_next_one_that_fails_takes_its_place(self, demo_checkpoint, tmp_path, failing):
        kept = tmp_path / "out.failed-gates"
        for bits in (4, 8):
            with pytest.raises(GateError, match="is kept at"):
                export(demo_checkpoint, tmp_path / "out", ExportOptions.of(llm_bits=bits))
            assert Bundle.open(kept).manifest["llm"]["bits"] == bits
        assert list(tmp_path.iterdir()) == [kept]

    def test_what_else_has_that_name_stays(self, demo_checkpoint, tmp_path, failing):
        kept = tmp_path / "out.failed-gates"
        kept.mkdir()
        (kept / "thesis.txt").write_text("precious")
        with pytest.raises(GateError, match=rf"is kept at {kept}-2: "):
            export(demo_checkpoint, tmp_path / "out", ExportOptions())
        assert [path.name for path in kept.iterdir()] == ["thesis.txt"]
        assert Bundle.open(tmp_path / "out.failed-gates-2").manifest

    def test_a_bundle_that_was_to_be_replaced_stays(
        self, demo_checkpoint, demo_bundle, tmp_path, failing
    ):
        out = tmp_path / "out"
        shutil.copytree(demo_bundle, out)
        before = fingerprint(out)
        with pytest.raises(GateError, match="is kept at"):
            export(demo_checkpoint, out, ExportOptions.of(overwrite=True))
        assert fingerprint(out) == before

    def test_it_is_at_the_destination_where_that_is_asked(self, demo_checkpoint, tmp_path, failing):
        options = ExportOptions.of(allow_failed_gates=True)
        result = export(demo_checkpoint, tmp_path / "out", options)
        assert not result.manifest["gates_passed"]
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_gate_with_too_little_to_judge_is_told(demo_checkpoint, tmp_path, quick, monkeypatch):
    gate = Gate("greedy agreement", 0.0, "", 0.8, True, left_out="2 places")
    monkeypatch.setattr(build, "answer_gates", lambda *arguments, **options: [gate])
    manifest = export(demo_checkpoint, tmp_path / "out", ExportOptions()).manifest
    assert manifest["gates_passed"]
    assert manifest["gates_left_out"] == {"greedy agreement": "2 places"}
    assert [gate["name"] for gate in manifest["gates"]] == ["settings changed", "tensors changed"]


def test_another_end_of_text_is_told(edit_checkpoint, tmp_path, quick):
    path = edit_checkpoint()
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": "<|endoftext|>"}))
    (note,) = export(path, tmp_path / "out", ExportOptions()).notes
    assert "the bundle says <|im_end|>, the end of a turn" in note


@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL],
)
def test_an_interrupted_export_leaves_no_destination(demo_checkpoint, tmp_path, number):
    out, temporary = tmp_path / "out", tmp_path / "temporary"
    temporary.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "fastvlm_mlx", "export", str(demo_checkpoint), str(out)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
        # Where the tests run in the background, SIGINT is ignored and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for line in process.stderr:
        if "Core ML encoder" in line:
            break
    time.sleep(0.5)
    process.send_signal(number)
    _, rest = process.communicate(timeout=120)
    assert not out.exists()
    if number == signal.SIGKILL:
        # The next run clears what this one could not.
        check_replaceable(out, overwrite=False)
        assert list(tmp_path.iterdir()) == [temporary]
        assert list(temporary.iterdir()) == []
        return
    assert process.returncode == 128 + number
    assert "Traceback" not in rest
    assert ("interrupted" in rest) == (number == signal.SIGINT)
    assert list(tmp_path.iterdir()) == [temporary]


def raiser(error):
    def write(*arguments):
        raise error

    return write
