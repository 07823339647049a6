"""What a user calls a model, and the bundle that it stands for; the hub is one on this machine."""

import json
import shutil
from pathlib import Path

import pytest

import fastvlm_mlx
from fastvlm_mlx.errors import BundleError, CheckpointError, GateError, OptionError
from fastvlm_mlx.models import cache
from fastvlm_mlx.models.names import is_elsewhere
from fastvlm_mlx.models.resolve import Found, refuse, resolve
from model_export import cached, pipeline
from model_export.options import ExportOptions
from model_export.results import ExportResult


def files(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def exports(demo_bundle, monkeypatch):
    """Every export gives the demo's bundle; these are the checkpoints that were exported."""
    asked = []

    def export(checkpoint, destination, options, progress):
        asked.append(str(checkpoint))
        shutil.copytree(demo_bundle, destination)
        return ExportResult(destination, {}, (), ("a note",))

    monkeypatch.setattr(pipeline, "export", export)
    return asked


class TestDirectories:
    def test_a_bundle_is_itself(self, demo_bundle, cache_directory):
        assert resolve(demo_bundle) == cached.resolve(demo_bundle) == demo_bundle
        assert not cache_directory.exists()

    def test_a_checkpoint_is_exported_once(self, demo_checkpoint, exports, capsys):
        path = cached.resolve(demo_checkpoint)
        assert (path / "manifest.json").exists()
        said = capsys.readouterr().err
        assert "is a checkpoint: it is exported once" in said
        assert "fastvlm export" in said
        assert " MB in " in said
        assert "a note" in said
        assert cached.resolve(str(demo_checkpoint)) == path
        assert capsys.readouterr().err == ""
        assert exports == [str(demo_checkpoint)]

    @pytest.mark.parametrize("name", ["model.safetensors", "vocab.json", "config.json"])
    def test_one_that_changed_is_exported_again(self, edit_checkpoint, exports, name):
        checkpoint = edit_checkpoint()
        first = cached.resolve(checkpoint)
        file = checkpoint / name
        if name.endswith(".json"):
            file.write_text(json.dumps(json.loads(file.read_text()), indent=3))
        else:
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)
        assert cached.resolve(checkpoint) != first
        assert len(exports) == 2

    def test_what_is_beside_it_changes_nothing(self, edit_checkpoint, exports):
        checkpoint = edit_checkpoint()
        cached.resolve(checkpoint)
        (checkpoint / "notes.md").touch()
        cached.resolve(checkpoint)
        assert len(exports) == 1

    def test_options_and_releases_have_bundles_of_their_own(
        self, demo_checkpoint, exports, monkeypatch
    ):
        cached.resolve(demo_checkpoint)
        cached.resolve(demo_checkpoint, options=ExportOptions.of(llm_bits=4))
        monkeypatch.setattr(cached, "__version__", "9.9.9")
        cached.resolve(demo_checkpoint)
        assert len(exports) == 3

    def test_hashes_are_kept_as_long_as_the_files_are_the_same(
        self, demo_checkpoint, exports, monkeypatch
    ):
        from model_export.checkpoint import identity

        cached.resolve(demo_checkpoint)
        monkeypatch.setattr(identity, "sha256", lambda file: 1 / 0)
        cached.resolve(demo_checkpoint)
        assert len(exports) == 1

    def test_one_that_changes_meanwhile_is_not_kept(self, edit_checkpoint, exports, monkeypatch):
        checkpoint, export = edit_checkpoint(), pipeline.export

        def changing(*arguments):
            (checkpoint / "tokenizer_config.json").write_text("{}")
            return export(*arguments)

        monkeypatch.setattr(pipeline, "export", changing)
        with pytest.raises(CheckpointError, match="changed while it was exported"):
            cached.resolve(checkpoint)
        assert cache.entries() == []

    def test_one_that_fails_its_gates_is_not_kept(
        self, demo_checkpoint, monkeypatch, cache_directory
    ):
        def export(checkpoint, destination, options, progress):
            destination.with_name(destination.name + ".failed-gates").mkdir()
            raise GateError("the bundle failed and is kept at …", "SNR 3 dB, at least 35")

        monkeypatch.setattr(pipeline, "export", export)
        with pytest.raises(GateError, match=r"failed its check \(SNR 3 dB, at least 35\)"):
            cached.resolve(demo_checkpoint)
        assert [path.name for path in cache_directory.iterdir()] == [cache.HASHES]

    def test_without_the_extra_one_sentence_names_it(self, demo_checkpoint, exports, monkeypatch):
        from fastvlm_mlx import extras

        monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "scipy" else name)
        with pytest.raises(OptionError, match=r"needs scipy of the `export` extra.*fastvlm-mlx\["):
            cached.resolve(demo_checkpoint)
        monkeypatch.undo()

    @pytest.mark.parametrize(
        ("model", "words"),
        [
            ("nowhere/at/all", "does not exist: expected .* a hub id .* or a name that"),
            ("https://example.org/model", "is a URL: expected"),
            ("tests/nowhere", "does not exist: expected"),
            ("tests", "tests holds no config.json: expected"),
            ("README.md", "is a file: expected"),
            ("a\0b", "can't be opened as a path|does not exist"),
            (None, "can't be opened as a path"),
        ],
    )
    def test_what_is_none(self, model, words, monkeypatch):
        monkeypatch.chdir(Path(__file__).parents[2])
        with pytest.raises(BundleError, match=words):
            cached.resolve(model)

    def test_a_directory_of_several(self, demo_bundle, tmp_path):
        for name in ("one", "two"):
            (tmp_path / "several" / name).mkdir(parents=True)
            shutil.copy(demo_bundle / "manifest.json", tmp_path / "several" / name)
        with pytest.raises(BundleError, match="but the bundles one, two: give the one"):
            cached.resolve(tmp_path / "several")

    def test_what_exists_wins_over_names(self, demo_bundle, tmp_path, monkeypatch):
        (tmp_path / "fastvlm-0.5b").symlink_to(demo_bundle)
        monkeypatch.chdir(tmp_path)
        assert resolve("fastvlm-0.5b") == Path("fastvlm-0.5b")


class TestTheHub:
    @pytest.fixture
    def apple(self, asked_hub, demo_checkpoint):
        """The demo's checkpoint in the place of Apple's."""
        asked_hub.repositories["apple/FastVLM-0.5B"] = files(demo_checkpoint)
        return asked_hub

    def offline(self, hub, monkeypatch):
        from huggingface_hub import constants

        hub.repositories.clear()
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")

    def test_a_checkpoint_by_id_and_by_name(self, apple, exports):
        path = cached.resolve("apple/FastVLM-0.5B")
        assert cached.resolve("FastVLM-0.5b") == path
        assert exports == [f"apple/FastVLM-0.5B@{'c' * 40}"]
        # It is told from a bundle by a header.
        assert set(apple.served) == {"model.safetensors"}

    def test_a_commit_that_moved_is_another_checkpoint(self, apple, exports, monkeypatch):
        import hub_server

        cached.resolve("apple/FastVLM-0.5B")
        monkeypatch.setattr(hub_server, "COMMIT", "d" * 40)
        cached.resolve("apple/FastVLM-0.5B")
        assert [reference[-1] for reference in exports] == ["c", "d"]

    def test_offline_with_the_bundle_cached(self, apple, exports, monkeypatch, capsys):
        path = cached.resolve("apple/FastVLM-0.5B")
        self.offline(apple, monkeypatch)
        capsys.readouterr()
        assert cached.resolve("apple/FastVLM-0.5B") == path
        assert "the hub can't be reached: using apple/FastVLM-0.5B" in capsys.readouterr().err
        with pytest.raises(CheckpointError, match="the hub can't be reached"):
            cached.resolve("apple/FastVLM-0.5B@other")

    def test_offline_with_the_checkpoint_cached(self, apple, exports, monkeypatch):
        from model_export.checkpoint import hub

        hub.locate("apple/FastVLM-0.5B")
        self.offline(apple, monkeypatch)
        cached.resolve("apple/FastVLM-0.5B")
        assert exports == [f"apple/FastVLM-0.5B@{'c' * 40}"]

    @pytest.mark.parametrize("layout", ["app", "mlx", "published"])
    def test_a_bundle_is_downloaded_once(
        self, asked_hub, demo_bundle, mlx_bundle, layout, monkeypatch, capsys
    ):
        bundle = {"app": demo_bundle}.get(layout, mlx_bundle)
        found = files(bundle) | {"README.md": b"# A card", ".gitattributes": b""}
        if layout == "published":
            # As mlx-vlm's conversions are.
            del found["manifest.json"]
        asked_hub.repositories["me/bundle"] = found
        path = resolve("me/bundle")
        assert files(path) == {n: d for n, d in found.items() if n[0] not in ".R"}
        assert "downloading the bundle me/bundle@" in capsys.readouterr().err
        asked_hub.served.clear()
        assert resolve("me/bundle@main") == path
        assert set(asked_hub.served) <= {"model.safetensors"}
        self.offline(asked_hub, monkeypatch)
        assert resolve("me/bundle") == path

    def test_load_takes_it(self, asked_hub, demo_bundle):
        asked_hub.repositories["me/bundle"] = files(demo_bundle)
        assert fastvlm_mlx.load("me/bundle").bundle.manifest is not None

    def test_load_does_not_export(self, apple):
        with pytest.raises(CheckpointError, match="is a checkpoint: expected a bundle"):
            fastvlm_mlx.load("apple/FastVLM-0.5B")

    def test_a_bundle_that_is_cut_is_resumed(self, asked_hub, demo_bundle, monkeypatch):
        import huggingface_hub

        found = files(demo_bundle)
        asked_hub.repositories["me/bundle"] = found
        whole = huggingface_hub.snapshot_download

        def cut(*arguments, local_dir, **options):
            whole(*arguments, local_dir=local_dir, **options)
            (local_dir / "tokenizer.json").unlink()

        monkeypatch.setattr(huggingface_hub, "snapshot_download", cut)
        with pytest.raises(BundleError, match=r"tokenizer\.json of me/bundle did not arrive"):
            resolve("me/bundle")
        assert cache.entries() == []
        monkeypatch.setattr(huggingface_hub, "snapshot_download", whole)
        asked_hub.served.clear()
        resolve("me/bundle")
        assert asked_hub.served == ["tokenizer.json"]

    def test_a_file_that_arrived_otherwise(self, asked_hub, demo_bundle, monkeypatch):
        import huggingface_hub

        asked_hub.repositories["me/bundle"] = files(demo_bundle)
        whole = huggingface_hub.snapshot_download

        def damaged(*arguments, local_dir, **options):
            whole(*arguments, local_dir=local_dir, **options)
            data = bytearray((local_dir / "model.safetensors").read_bytes())
            data[-1] ^= 1
            (local_dir / "model.safetensors").write_bytes(data)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", damaged)
        with pytest.raises(BundleError, match=r"model\.safetensors of me/bundle did not arrive as"):
            resolve("me/bundle")
        assert cache.entries() == []

    def test_one_that_does_not_exist(self, asked_hub):
        with pytest.raises(CheckpointError, match="neither a directory here nor a repository"):
            resolve("me/nothing")
        asked_hub.repositories["me/empty"] = {"config.json": b"{}"}
        with pytest.raises(CheckpointError, match="has no revision v2"):
            resolve("me/empty@v2")

    def test_names_that_lead_elsewhere(self, asked_hub, tmp_path):
        (tmp_path / "precious").touch()
        asked_hub.repositories["me/odd"] = {"manifest.json": b"{}", "../../../precious": b"x"}
        with pytest.raises(CheckpointError, match="which leads out of its directory"):
            resolve("me/odd")
        assert (tmp_path / "precious").exists()

    def test_weights_that_are_none(self, asked_hub):
        asked_hub.repositories["me/odd"] = {"config.json": b"{}", "model.safetensors": b"odd"}
        with pytest.raises(CheckpointError, match="is no safetensors file"):
            resolve("me/odd")


def test_what_a_checkpoint_gets_from_the_runtime_alone():
    with pytest.raises(CheckpointError, match="`fastvlm export demo OUT`"):
        refuse(Found("demo"))


@pytest.mark.parametrize("model", ["tests/nothing", 3, "a\0b", "one", "a/b/c"])
def test_what_is_not_looked_for_elsewhere(model, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    assert not is_elsewhere(model)


@pytest.mark.parametrize(
    "answer",
    [
        b"<html>Log in</html>",
        [],
        {},
        {"id": "a/b", "siblings": []},
        {"id": "a/b", "siblings": [{}], "sha": "c" * 40},
        {"id": "a/b", "siblings": 3, "sha": "c" * 40},
        {"id": "a/b", "siblings": [], "sha": "../../outside"},
    ],
)
def test_an_answer_that_is_no_hub_s(asked_hub, answer, monkeypatch):
    monkeypatch.setattr(
        asked_hub.RequestHandlerClass, "do_GET", lambda handler: handler.reply(200, answer)
    )
    with pytest.raises(CheckpointError, match="can't be downloaded from the hub"):
        resolve("a/b")


def test_a_hub_behind_a_proxy_that_needs_a_package(monkeypatch):
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    close_session()
    with pytest.raises(CheckpointError, match=r"can't be downloaded .*SOCKS"):
        resolve("a/b")
    close_session()
