"""The command line as a user meets it: what is printed where, and with which exit status."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from edits import edit_json

from fastvlm_mlx.cli import show
from fastvlm_mlx.errors import DestinationError
from model_export.cli.export import note_padding
from model_export.demo import run as demo
from model_export.samples import scenes


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.jpg"
    scenes.generate(11, held_out=True).draw(400).save(path, quality=95)
    return path


def sentence(err):
    """The one line that an error is."""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in err
    return lines[0]


def in_a_new_process(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


def test_importing_the_runtime_loads_neither_torch_nor_coremltools():
    loaded = in_a_new_process(
        "import fastvlm_mlx, fastvlm_mlx.cli, sys; print(*sorted(sys.modules))"
    ).split()
    assert not {"torch", "coremltools", "transformers", "mlx.core", "model_export"} & set(loaded)


def test_the_public_names_load_mlx_but_not_coremltools():
    loaded = in_a_new_process(
        "from fastvlm_mlx import load, FastVLM, SamplingOptions; import sys;"
        "print('coremltools' in sys.modules, 'mlx.core' in sys.modules)"
    ).split()
    assert loaded == ["False", "True"]


def test_no_arguments_show_the_verbs(fastvlm):
    status, out, err = fastvlm()
    assert status in (0, 2)
    for verb in ("export", "generate", "verify", "inspect", "demo"):
        assert verb in out + err


def test_help_and_version(fastvlm):
    assert fastvlm("--version")[1].startswith("fastvlm-mlx 0.")
    for verb in ("export", "generate", "verify", "inspect", "demo"):
        status, out, _ = fastvlm(verb, "--help")
        assert status == 0
        assert "Usage" in out


class TestGenerate:
    def test_text_to_stdout_and_one_line_of_timings_to_stderr(self, fastvlm, demo_bundle, photo):
        status, out, err = fastvlm(
            "generate", demo_bundle, "--image", photo, "--prompt", "How many shapes are there?"
        )
        assert status == 0
        assert out.count("\n") == 1
        assert out.strip()
        assert len(err.strip().splitlines()) == 1
        assert "TTFT" in err
        assert "text tokens, 0 cached |" in err

    def test_quiet_leaves_the_answers(self, fastvlm, demo_bundle, photo):
        asked = ["--image", photo, "--prompt", "Hm?", "--prompt", "So?"]
        _, loud, _ = fastvlm("generate", demo_bundle, *asked)
        assert fastvlm("generate", demo_bundle, *asked, "--quiet") == (0, loud, "")

    def test_a_bundle_without_a_manifest_is_warned_of_once(self, fastvlm, bundle_copy, photo):
        (bundle_copy / "manifest.json").unlink()
        asked = ["--prompt", "Hm?", "--prompt", "So?"]
        status, _, err = fastvlm("generate", bundle_copy, "--image", photo, *asked)
        assert status == 0
        warned, *timings = err.splitlines()
        assert warned.startswith(f"warning: {bundle_copy} has no manifest.json, so its files can't")
        assert len(timings) == 2

    def test_json(self, fastvlm, demo_bundle, photo):
        prompts = ["How many shapes are there?", "Describe the image."]
        arguments = [part for prompt in prompts for part in ("--prompt", prompt)]
        status, out, _ = fastvlm("generate", demo_bundle, "--image", photo, *arguments, "--json")
        assert status == 0
        data = json.loads(out)
        assert (data["images"], data["video"], data["times_s"]) == ([str(photo)], None, [])
        assert {"model", "encoder", "answers", "peak_memory_bytes"} == set(data) - {
            *("images", "video", "times_s")
        }
        assert [answer["prompt"] for answer in data["answers"]] == prompts
        for answer in data["answers"]:
            assert {
                "text",
                "prompt_tokens",
                "image_tokens",
                "cached_tokens",
                "generation_tokens",
                "finish_reason",
                "timings",
            } <= set(answer)
            assert {
                "preprocess_s",
                "encode_s",
                "project_s",
                "prefill_s",
                "ttft_s",
                "decode_s",
                "tokens_per_s",
            } <= set(answer["timings"])
        first, second = data["answers"]
        assert first["cached_tokens"] == 0 < second["cached_tokens"] < second["prompt_tokens"]

    def test_an_answer_by_a_schema(self, fastvlm, demo_bundle, photo, tmp_path):
        file = tmp_path / "shapes.json"
        file.write_text('{"type": "object", "properties": {"n": {"type": "boolean"}}}')
        question = ["--image", photo, "--prompt", "Hm?", "--json-schema", file]
        code, out, _ = fastvlm("generate", demo_bundle, *question, "--max-tokens", "40")
        assert code == 0
        assert isinstance(json.loads(out), dict)
        code, out, _ = fastvlm("generate", demo_bundle, *question, "--json")
        assert code == 0
        assert isinstance(json.loads(json.loads(out)["answers"][0]["text"]), dict)

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (None, "shapes.json"),
            (b"\xff", "can't be read as text"),
            (b"[1", "can't be read as JSON"),
            (b" " * 300_000, "more than 256,000 bytes"),
        ],
    )
    def test_what_is_no_schema(self, fastvlm, tmp_path, content, words):
        file = tmp_path / "shapes.json"
        if content is not None:
            file.write_bytes(content)
        # Before the bundle is looked for.
        question = ["--image", "a.png", "--prompt", "Hm?", "--json-schema", file]
        code, _, err = fastvlm("generate", tmp_path / "nowhere", *question)
        assert code == 2
        assert words in sentence(err)

    def test_an_image_from_standard_input(self, demo_bundle, photo):
        command = [sys.executable, "-m", "fastvlm_mlx", "generate", str(demo_bundle)]
        command += ["--prompt", "Describe the image.", "--image"]
        piped = subprocess.run(
            [*command, "-"], input=photo.read_bytes(), capture_output=True, check=True
        )
        named = subprocess.run([*command, str(photo)], capture_output=True, check=True)
        assert piped.stdout == named.stdout != b""

    @pytest.mark.parametrize(
        ("data", "words"),
        [
            (b"", "photo"),
            (b"not an image at all", "photo"),
            (None, "does not exist"),
            ("half", "photo"),
        ],
    )
    def test_what_is_no_image(self, fastvlm, demo_bundle, photo, tmp_path, data, words):
        path = tmp_path / "photo.jpg"
        if data == "half":
            data = photo.read_bytes()[: photo.stat().st_size // 2]
        if data is not None:
            path.write_bytes(data)
        status, out, err = fastvlm("generate", demo_bundle, "--image", path, "--prompt", "Hm?")
        assert status == 2
        assert out == ""
        assert words in sentence(err)

    def test_a_limit_on_pixels_that_can_be_changed(self, fastvlm, demo_bundle, photo):
        arguments = ["generate", demo_bundle, "--image", photo, "--prompt", "Hm?"]
        status, _, err = fastvlm(*arguments, "--max-pixels", 1000)
        assert status == 2
        assert "--max-pixels" in sentence(err)
        assert fastvlm(*arguments, "--max-pixels", 400 * 400, "--max-tokens", 1)[0] == 0

    def test_compute_units_exist_on_macos_only(self, fastvlm, demo_bundle, photo):
        if sys.platform == "darwin":
            return
        arguments = ["generate", demo_bundle, "--image", photo, "--prompt", "Hm?"]
        status, _, err = fastvlm(*arguments, "--compute-units", "ne")
        assert status == 2
        assert "macOS" in sentence(err)

    @pytest.mark.skipif(sys.platform == "darwin", reason="Core ML computes the encoder")
    def test_what_the_encoder_is_computed_in_is_chosen_and_told(
        self, fastvlm, demo_bundle, photo, monkeypatch
    ):
        arguments = ["generate", demo_bundle, "--image", photo, "--prompt", "Hm?"]
        _, _, err = fastvlm(*arguments)
        assert "| encoder torch float32 | language model torch float32" in err
        monkeypatch.setattr("fastvlm_mlx.vision.program.fusion.multiplies_bfloat16", lambda: True)
        _, out, _ = fastvlm(*arguments, "--encoder-compute", "bfloat16", "--json")
        assert json.loads(out)["encoder"] == "torch bfloat16"
        status, _, err = fastvlm(*arguments, "--encoder-compute", "float64")
        assert status == 2
        assert "auto, float32, bfloat16" in sentence(err)

    def test_an_empty_prompt(self, fastvlm, demo_bundle, photo):
        status, _, err = fastvlm("generate", demo_bundle, "--image", photo, "--prompt", " ")
        assert status == 2
        assert "empty" in sentence(err)

    def test_a_missing_option_is_usage(self, fastvlm, demo_bundle):
        status, _, err = fastvlm("generate", demo_bundle)
        assert status == 2
        assert "--image" in err or "--prompt" in err


class TestExport:
    def test_a_path_that_does_not_exist(self, fastvlm, tmp_path):
        status, out, err = fastvlm("export", tmp_path / "nothing", tmp_path / "out")
        assert (status, out) == (2, "")
        assert "does not exist" in sentence(err)
        assert not (tmp_path / "out").exists()

    def test_bits_out_of_range(self, fastvlm, demo_checkpoint, tmp_path):
        status, _, err = fastvlm("export", demo_checkpoint, tmp_path / "out", "--llm-bits", 7)
        assert status == 2
        assert "--llm-bits is 7" in sentence(err)

    def test_an_existing_destination(self, fastvlm, demo_checkpoint, tmp_path):
        status, _, err = fastvlm("export", demo_checkpoint, tmp_path)
        assert status == 2
        assert "--overwrite" in sentence(err)


class TestInspect:
    def test_a_bundle(self, fastvlm, demo_bundle):
        status, out, _ = fastvlm("inspect", demo_bundle)
        assert status == 0
        for words in ("bits per weight", "precision", "tokens per image", "deployment target"):
            assert words in out
        for words in ("license", "encoder SNR", "passed"):
            assert words in out

    def test_a_bundle_as_json(self, fastvlm, demo_bundle):
        facts = json.loads(fastvlm("inspect", demo_bundle, "--json")[1])
        manifest = json.loads((demo_bundle / "manifest.json").read_text())
        assert facts["kind"] == "bundle"
        assert facts["llm"]["bits_per_weight"] == manifest["llm"]["bits_per_weight"]
        assert facts["llm"]["parameters"] == manifest["llm"]["parameters"]
        assert sum(facts["llm"]["bytes_by_part"].values()) == manifest["llm"]["bytes"]
        assert facts["encoder"]["tokens_per_image"] == 16

    def test_a_checkpoint(self, fastvlm, demo_checkpoint):
        facts = json.loads(fastvlm("inspect", demo_checkpoint, "--json")[1])
        assert facts["kind"] == "checkpoint"
        assert facts["stored_as"] == "Apple's layout"
        assert facts["llm"]["tie_word_embeddings"] is True

    def test_neither(self, fastvlm, tmp_path):
        status, _, err = fastvlm("inspect", tmp_path)
        assert status == 2
        assert "config.json" in sentence(err)

    def test_a_hub_id(self, fastvlm):
        status, _, err = fastvlm("inspect", "apple/FastVLM-0.5B")
        assert status == 2
        assert "apple/FastVLM-0.5B does not exist: expected the directory of a" in sentence(err)
        assert "export, plan, sweep, compare and `verify --checkpoint` take hub ids" in sentence(
            err
        )


class TestPadding:
    """mlx-vlm pads every image, whatever the checkpoint asks for."""

    @pytest.mark.parametrize("ratio", ["pad", "square"])
    def test_an_mlx_export_says_when_answers_will_differ(
        self, fastvlm, edit_checkpoint, tmp_path, ratio
    ):
        path = edit_checkpoint(config=lambda config: config.update(image_aspect_ratio=ratio))
        status, _, err = fastvlm(
            "export", path, tmp_path / "out", "--layout", "mlx", "--allow-failed-gates", "--json"
        )
        assert status == 0
        said = "image_aspect_ratio is 'square' and mlx-vlm pads every image" in err
        assert said == (ratio == "square")

    def test_nothing_of_the_app_layout(self, demo_bundle, bundle_copy, capsys):
        edit_json(bundle_copy, "config.json", image_aspect_ratio=None)
        for bundle in (demo_bundle, bundle_copy):
            note_padding(bundle)
        assert capsys.readouterr().err == ""


class TestVerify:
    def test_a_gate_that_failed_at_the_export_is_told(self, fastvlm, bundle_copy):
        def fail(manifest):
            manifest["gates"][0]["passed"] = manifest["gates_passed"] = False

        edit_json(bundle_copy, "manifest.json", fail)
        status, _, err = fastvlm("verify", bundle_copy)
        assert status == 0
        assert "encoder SNR failed when the bundle was exported" in err

    def test_a_changed_file_is_named(self, fastvlm, bundle_copy):
        data = bytearray((bundle_copy / "model.safetensors").read_bytes())
        data[-1] ^= 255
        (bundle_copy / "model.safetensors").write_bytes(data)
        status, _, err = fastvlm("verify", bundle_copy)
        assert status == 2
        assert "model.safetensors has SHA-256" in sentence(err)

    def test_a_gate_that_fails_is_told_and_shown(self, fastvlm, demo_bundle, demo_checkpoint):
        status, out, err = fastvlm(
            "verify", demo_bundle, "--checkpoint", demo_checkpoint, "--min-snr-db", 300
        )
        assert status == 2
        assert "FAILED" in out
        assert "below its floor of 300 dB" in sentence(err)

    def test_a_base_of_nothing(self, fastvlm, demo_bundle):
        status, _, err = fastvlm("verify", demo_bundle, "--base", "apple/FastVLM-0.5B")
        assert status == 2
        assert "without --checkpoint" in sentence(err)

    def test_json(self, fastvlm, demo_bundle):
        status, out, _ = fastvlm("verify", demo_bundle, "--json")
        assert status == 0
        assert json.loads(out)["passed"] is True


def test_demo_refuses_a_directory_that_is_not_its_own(fastvlm, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    status, _, err = fastvlm("demo", tmp_path)
    assert status == 2
    assert "name another directory" in sentence(err)
    assert os.listdir(tmp_path) == ["mine.txt"]


def test_a_demo_says_that_it_replaces_an_earlier_one(fastvlm, demo_bundle, tmp_path, monkeypatch):
    """The demo itself, which takes long, is left out."""

    def run_demo(directory, progress, *, seed, llm_bits):
        if not (directory / "bundle").exists():
            shutil.copytree(demo_bundle, directory / "bundle")
        scene = scenes.generate(seed)
        scene.draw(256).save(directory / "scene.png")
        return demo.Demo(directory, (), tuple(scene.questions(seed)[:1]))

    monkeypatch.setattr(demo, "run_demo", run_demo)
    said = f"{tmp_path} holds an earlier demo, which this one replaces"
    for expected in (False, True):
        status, _, err = fastvlm("demo", tmp_path)
        assert (status, said in err) == (0, expected)


def test_a_reader_that_leaves_is_no_error(demo_bundle):
    command = f"{sys.executable} -m fastvlm_mlx inspect {demo_bundle} --json | head -c 1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert "Traceback" not in result.stderr


def test_an_answer_gives_the_terminal_no_commands():
    said = "two\nlines\tand \x1b[31mred\x9b2J \u200d \N{FAMILY}\x00"
    assert show.answer(said) == "two\nlines\tand \\x1b[31mred\\x9b2J \u200d \N{FAMILY}\\x00"


def test_standard_input_that_never_ends(demo_bundle):
    """It is read as far as the largest image could be."""
    with subprocess.Popen(["yes"], stdout=subprocess.PIPE) as endless:
        command = ["generate", demo_bundle, "--image", "-", "--prompt", "What?"]
        done = subprocess.run(
            [sys.executable, "-m", "fastvlm_mlx", *map(str, command), "--max-pixels", "1000"],
            stdin=endless.stdout,
            capture_output=True,
            text=True,
            check=False,
        )
        endless.kill()
    assert done.returncode == 2
    assert "bytes: expected one image" in done.stderr


@pytest.mark.parametrize(
    "files",
    [
        {"bundle/manifest.json": "{}", "bundle/src/main.js": "mine"},
        {"scene.png": "mine"},
        {"bundle/manifest.json": "[" * 100_000, "bundle/config.json": "{}"},
        {"thesis.txt": "mine"},
    ],
    ids=range(4),
)
def test_a_demo_over_what_is_not_a_demo_s(tmp_path, files):
    from model_export.demo.run import check_directory, run_demo

    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(DestinationError, match="is not an earlier demo's"):
        check_directory(tmp_path)
    with pytest.raises(DestinationError, match="is not an earlier demo's"):
        run_demo(tmp_path, lambda stage, done: None, seed=1, llm_bits=4)
    assert {name: (tmp_path / name).read_text() for name in files} == files


def test_several_images_in_one_prompt(fastvlm, demo_bundle, photo, tmp_path):
    other = tmp_path / "other.png"
    scenes.generate(12, held_out=True).draw(64).save(other)
    images = ["--image", photo, "--image", other]
    status, out, err = fastvlm("generate", demo_bundle, *images, "--prompt", "Which?", "--json")
    data = json.loads(out)
    assert (status, data["images"]) == (0, [str(photo), str(other)])
    assert data["answers"][0]["image_tokens"] == 32
    assert "was trained with one image" in err
    status, _, err = fastvlm(
        "generate", demo_bundle, "--image", "-", "--image", "-", "--prompt", "?"
    )
    assert (status, "--image - is given twice" in sentence(err)) == (2, True)
