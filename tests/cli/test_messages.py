"""What a person meets who gives one thing where another belongs: one sentence, exit status 2."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from fastvlm_mlx.cli import main

IMAGE = Path(__file__).parents[1] / "golden" / "images" / "clear.png"


@pytest.fixture
def refused(monkeypatch, capsys):
    """The sentence that a verb ends in."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fastvlm", *map(str, arguments)])
        with pytest.raises(SystemExit) as leaving:
            main.main()
        out, err = capsys.readouterr()
        *before, line = err.splitlines()
        assert (leaving.value.code, out) == (2, ""), err
        # Before it stages of long work at most, and no box.
        assert all(re.match(r"\d+\.\d s ", stage) for stage in before), err
        assert line.startswith("error: ")
        return line.removeprefix("error: ")

    return run


def words_of(verb, path, out):
    """A command line of the verb with `path` where its bundle or checkpoint belongs."""
    more = {
        "generate": ["--image", IMAGE, "--prompt", "Hm?"],
        "export": [out],
        "convert": [out, "--layout", "app"],
        "install": [out],
        "push": ["me/model"],
        "sweep": ["--out", out],
    }
    return [verb, path, *more.get(verb, [])]


OF_BUNDLES = ("verify", "convert", "install", "push")
OF_CHECKPOINTS = ("export", "sweep")


class TestACheckpointWhereABundleBelongs:
    @pytest.mark.parametrize("verb", OF_BUNDLES)
    def test_apple_s(self, refused, demo_checkpoint, tmp_path, verb):
        said = refused(*words_of(verb, demo_checkpoint, tmp_path / "out"))
        assert said.startswith(f"{demo_checkpoint} is a checkpoint, not a bundle: run `fastvlm ex")

    @pytest.mark.parametrize("kind", ["pickles", "transformers", "adapter", "projector"])
    def test_of_every_other_kind(self, refused, edit_checkpoint, tmp_path, kind):
        path = edit_checkpoint(
            config=lambda c: c.update(model_type="fast_vlm") if kind == "transformers" else None
        )
        file = path / "model.safetensors"
        if kind == "pickles":
            file.rename(path / "pytorch_model-00001-of-00002.bin")
        elif kind == "adapter":
            file.unlink()
            (path / "config.json").unlink()
            (path / "adapter_config.json").write_text("{}")
        elif kind == "projector":
            file.rename(path / "mm_projector.bin")
        else:
            # Its tensors, too, have other names; here it is told by what config.json says.
            file.unlink()
        assert "is a checkpoint, not a bundle" in refused("verify", path)


class TestABundleWhereACheckpointBelongs:
    @pytest.mark.parametrize("verb", OF_CHECKPOINTS)
    def test_ours(self, refused, demo_bundle, tmp_path, verb):
        said = refused(*words_of(verb, demo_bundle, tmp_path / "out"))
        assert f"{demo_bundle} is a bundle: expected a checkpoint" in said
        name = json.loads((demo_bundle / "manifest.json").read_text())["source"]["name"]
        assert said.endswith(f"give the one that it was made from, {name}")
        assert not (tmp_path / "out").exists()

    def test_in_verify(self, refused, demo_bundle):
        said = refused("verify", demo_bundle, "--checkpoint", demo_bundle)
        assert "is a bundle: expected a checkpoint" in said

    def test_without_a_manifest(self, refused, bundle_copy, tmp_path):
        (bundle_copy / "manifest.json").unlink()
        said = refused("export", bundle_copy, tmp_path / "out")
        assert said.endswith(
            "is a bundle: expected a checkpoint, give the one that it was made from"
        )

    def test_a_checkpoint_with_a_package_in_it_stays_one(
        self, edit_checkpoint, bundle_copy, capsys, monkeypatch
    ):
        path = edit_checkpoint()
        shutil.copytree(bundle_copy / "fastvithd.mlpackage", path / "fastvithd.mlpackage")
        monkeypatch.setattr(sys, "argv", ["fastvlm", "inspect", str(path), "--json"])
        with pytest.raises(SystemExit):
            main.main()
        assert json.loads(capsys.readouterr().out)["kind"] == "checkpoint"


class TestOneDirectoryAbove:
    @pytest.fixture
    def above(self, demo_bundle, tmp_path):
        for name in ("b", "a"):
            shutil.copytree(demo_bundle, tmp_path / "above" / name)
        (tmp_path / "above" / "scene.png").touch()
        return tmp_path / "above"

    @pytest.mark.parametrize(
        "verb", ["inspect", "plan", "compare", "generate", *OF_BUNDLES, *OF_CHECKPOINTS]
    )
    def test_bundles(self, refused, above, tmp_path, verb):
        said = refused(*words_of(verb, above, tmp_path / "out"))
        assert (
            said == f"{above} holds no config.json but the bundles a, b: give the one that is meant"
        )

    def test_bundles_and_a_checkpoint(self, refused, above, demo_checkpoint):
        shutil.rmtree(above / "b")
        shutil.copytree(demo_checkpoint, above / "c")
        assert "but the bundle a and the checkpoint c: give" in refused("inspect", above)


class TestHubIds:
    @pytest.mark.parametrize("verb", OF_BUNDLES)
    def test_a_verb_that_takes_none(self, refused, tmp_path, monkeypatch, verb):
        monkeypatch.chdir(tmp_path)
        said = refused(*words_of(verb, "apple/FastVLM-0.5B", tmp_path / "out"))
        assert said.startswith("apple/FastVLM-0.5B does not exist here, and is no hub id to this")
        assert "`hf download apple/FastVLM-0.5B --local-dir OUT`" in said

    def test_a_path_misspelt_is_none(self, refused, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "out").mkdir()
        assert refused("verify", "out/bundel").startswith("out/bundel does not exist: expected a")

    @pytest.mark.parametrize("verb", ["generate", "verify", "export"])
    def test_a_url(self, refused, tmp_path, verb):
        said = refused(*words_of(verb, "https://example.org/apple/FastVLM-0.5B", tmp_path / "out"))
        assert "FastVLM-0.5B is a URL: expected a" in said


def test_an_image_s_url(refused, demo_bundle):
    # Longer than a name may be.
    url = "https://example.org/cat.jpg?size=large&signature=" + "0" * 400
    said = refused("generate", demo_bundle, "--image", url, "--prompt", "Hm?")
    assert said.startswith(f"{url[:300]}")
    assert "is a URL: expected the path of an image, download it first with `curl -LO '" in said


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("exprot a b", "exprot is no verb of fastvlm: use export"),
        ("xyzzy", "xyzzy is no verb of fastvlm: expected one of export, convert, sweep, "),
        (
            "--verison",
            "--verison is no option of `fastvlm`: use --version, or see `fastvlm --help`",
        ),
        (
            "export a b --llm-bit 4",
            "--llm-bit is no option of `fastvlm export`: use --llm-bits, or ",
        ),
        (
            "inspect a --no-such",
            "--no-such is no option of `fastvlm inspect`: see `fastvlm inspect ",
        ),
        ("generate b --temp 0.7", "--temp is no option of `fastvlm generate`: use --temperature, "),
        ("generate b --verbose", "--verbose is no option of `fastvlm generate`: see `fastvlm gen"),
        (
            "generate b --image a.png --seed 1 --seed=2 --prompt Hm?",
            "--seed is given 2 times: expected once, leave all but one out",
        ),
        (
            "plan a --llm-bpw 4.5 --llm-bits 4",
            "--llm-bpw is given with --llm-bits, and a search decides every matrix's bits: leave ",
        ),
        ("inspect -x a", "-x is no option of `fastvlm inspect`: see `fastvlm inspect --help` for "),
        ("export a", "`fastvlm export` needs OUT, which is not given: see `fastvlm export --help`"),
        ("push", "`fastvlm push` needs BUNDLE, which is not given: see `fastvlm push --help`"),
        ("generate a --prompt b", "`fastvlm generate` needs --image or --video, which are not "),
        ("export a b --llm-bits four", "--llm-bits is 'four': expected a valid integer, see "),
        ("export a b --llm-bpw low", "--llm-bpw is 'low': expected a valid number, see "),
        ("export a b --llm-bits", "option '--llm-bits' requires an argument: see `fastvlm export "),
        ("inspect a --json=3", "option '--json' does not take a value: see `fastvlm inspect "),
        ("install a", "`fastvlm install` needs APP, which is not given: see `fastvlm install --"),
        ("install", "`fastvlm install` needs BUNDLE, which is not given: see `fastvlm install "),
        ("install --unpin-packages", "`fastvlm install` needs APP, which is not given: see "),
        ("install --unpin-packages no-app", "no-app is not a directory: give the app/ directory"),
        ("install a no-app --unpin-packages", "no-app is not a directory: give the app/ direct"),
        ("inspect a b", "got unexpected extra argument(s) (b): see `fastvlm inspect --help`"),
    ],
)
def test_a_wrong_command_line(refused, line, sentence):
    assert refused(*line.split()).startswith(sentence)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (
            "export {checkpoint} {new} --layout mlx --recipe mixed_2_6 --llm-bits 4",
            "--recipe mixed_2_6 is given with --llm-bits, and this recipe decides every matrix's "
            "bits itself: leave one of them out",
        ),
        (
            "plan {checkpoint} --layout mlx --recipe mixed_2_6 --llm-mode mxfp4",
            "--recipe mixed_2_6 is given with --llm-mode, and this recipe decides every ",
        ),
        (
            "export {checkpoint} {new} --layout mlx --encoder-precision int8",
            "--encoder-precision int8 is for Core ML's encoder, and the encoder of an mlx bundle "
            "has the type of --dtype: leave it out",
        ),
        (
            "export {checkpoint} {new} --layout mlx --encoder-precision fp32",
            "--encoder-precision fp32 is for Core ML's encoder, and the encoder of an mlx bundle "
            "has the type of --dtype: use --dtype float32",
        ),
        ("demo {new} --llm-bits 5", "--llm-bits is 5: expected one of 2, 3, 4, 6, 8, 16"),
        ("demo {new} --seed -1", "--seed is -1: expected 0 or more"),
        (
            "compare {bundle} {bundle}",
            "{bundle} is given twice and no other model with it: name two or more bundles or ",
        ),
        ("compare {bundle}", "only one model is given: name two or more bundles or checkpoints"),
        (
            "inspect {empty}",
            "{empty} holds no config.json: expected the directory of a bundle or a checkpoint",
        ),
        (
            "inspect {image}",
            "{image} is a file: expected the directory of a bundle or a checkpoint",
        ),
        (
            "install {mlx} {empty}",
            "{mlx} is of layout mlx and the demo app loads layout app: make such a bundle with ",
        ),
        (
            "export {image} {new}",
            "{image} is a file: expected the directory of a checkpoint, which holds config.json ",
        ),
        (
            "export {checkpoint} {new} --image-size 0",
            "--image-size is 0: expected 64 pixels or a larger multiple of 64, the encoder's ",
        ),
        (
            "export {checkpoint} {new} --method gptq --calibration {image}",
            "--calibration {image} is an image: expected a directory of images, or a JSONL file ",
        ),
        (
            "compare {bundle} {checkpoint} --questions {image}",
            "--questions {image} is an image: expected a directory of images, or a JSONL file ",
        ),
        ("compare {bundle} {checkpoint} --count 0", "--count is 0: expected 1 or more"),
        ("sweep {checkpoint} --out {new} --count -5", "--count is -5: expected 1 or more"),
        (
            "compare {bundle} {checkpoint} --questions {empty}",
            "--questions {empty} holds no image that can be used: expected images, or JSON lines ",
        ),
    ],
)
def test_what_does_not_go_together(
    refused, demo_bundle, mlx_bundle, demo_checkpoint, tmp_path, line, sentence
):
    names = {name: tmp_path / name for name in ("empty", "new")} | {"image": tmp_path / "a.png"}
    names["empty"].mkdir()
    Image.new("RGB", (64, 64)).save(names["image"])
    paths = {"bundle": demo_bundle, "mlx": mlx_bundle, "checkpoint": demo_checkpoint, **names}
    assert refused(*line.format(**paths).split()).startswith(sentence.format(**paths))
    assert not (tmp_path / "new").exists()


def test_what_is_shown_of_a_wrong_command_line_is_safe(refused):
    assert refused("inspect", "--\x1b[31mred").startswith(r"--\x1b[31mred is no option of ")
    assert refused("\x1b[31mred\n").startswith(r"\x1b[31mred is no verb of ")


class TestVerifyWithoutACheckpoint:
    def test_it_prints_what_it_did_check(self, monkeypatch, capsys, demo_bundle, bundle_copy):
        def run(bundle):
            monkeypatch.setattr(sys, "argv", ["fastvlm", "verify", str(bundle)])
            with pytest.raises(SystemExit) as leaving:
                main.main()
            assert not leaving.value.code
            return capsys.readouterr().out

        listed = len(json.loads((demo_bundle / "manifest.json").read_text())["files"])
        out = run(demo_bundle)
        assert f"all {listed} have the size and the SHA-256 that manifest.json lists" in out
        assert "app: it keeps the rules of the programs that load it" in out
        assert "encoder largest magnitude" in out
        (bundle_copy / "manifest.json").unlink()
        assert "not compared, because there is no manifest.json" in run(bundle_copy)
