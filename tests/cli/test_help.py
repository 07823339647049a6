"""What `--help` shows, how fast, and that it is true; shell completion; interruptions."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from fastvlm_mlx.cli import main
from fastvlm_mlx.cli.app.verbs import GROUPS
from fastvlm_mlx.cli.main import Fastvlm

VERBS = Fastvlm.table


def run(*arguments, **more):
    return subprocess.run(
        [sys.executable, "-m", "fastvlm_mlx", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | more,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture
def shown(monkeypatch, capsys):
    """What a command line prints that ends well."""

    def show(*arguments):
        monkeypatch.setattr(sys, "argv", ["fastvlm", *arguments])
        with pytest.raises(SystemExit) as leaving:
            main.main()
        assert not leaving.value.code
        return capsys.readouterr().out

    return show


@pytest.fixture(params=VERBS)
def command(request):
    return VERBS[request.param].command()


def options(command):
    return [param for param in command.params if param.param_type_name == "option"]


class TestTheList:
    def test_fastvlm_alone_shows_every_verb_by_what_one_wants_to_do(self, shown):
        text = shown()
        assert text == shown("--help") == shown("-h")
        places = [text.index(f"\n{group}:\n") for group in GROUPS]
        assert places == sorted(places)
        for verb in VERBS.values():
            assert f"\n  {verb.name} " in text

    def test_nothing_slow_is_imported(self):
        code = "import sys; sys.argv = ['fastvlm']\nfrom fastvlm_mlx.cli.main import main\n"
        code += "try: main()\nexcept SystemExit: print(*sys.modules, file=sys.stderr)"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        slow = {"torch", "mlx", "numpy", "coremltools", "rich", "pydantic", "PIL", "msgspec"}
        assert not slow & {name.partition(".")[0] for name in done.stderr.split()}
        # Of the verbs none but the table.
        assert "model_export.cli.export" not in done.stderr

    def test_what_needs_the_extra_is_marked_where_that_is_missing(self, shown, monkeypatch):
        assert "[export]" not in shown()
        monkeypatch.setattr("fastvlm_mlx.cli.app.help_text.missing_extra", lambda: ["scipy"])
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr("fastvlm_mlx.cli.app.help_text.WIDEST", 200)
        lines = {line.split()[0]: line for line in shown().splitlines() if line.startswith("  ")}
        for verb in VERBS.values():
            assert ("Needs [export]" in lines[verb.name]) == verb.needs_export


class TestAVerb:
    def test_its_help(self, command, shown, monkeypatch):
        monkeypatch.setenv("COLUMNS", "100")
        text = shown(command.name, "--help")
        assert text == shown(command.name, "-h")
        assert text.startswith(f"Usage: fastvlm {command.name} ")
        assert text.rstrip().endswith(VERBS[command.name].example)
        assert "<" not in text
        assert max(map(len, text.splitlines())) <= 100
        for option in options(command):
            assert f"  {option.opts[0]}" in text

    def test_every_text_is_a_sentence_in_a_group(self, command):
        assert VERBS[command.name].summary.endswith(".")
        for param in command.params:
            assert param.help[0].isupper(), param.name
            assert param.help.endswith("."), param.name
        for option in options(command):
            assert option.rich_help_panel, option.name
            # Everything but a flag says what it takes.
            assert option.is_flag or option.metavar, option.name

    def test_its_example_is_a_command_line_of_it(self, command):
        program, verb, *arguments = shlex.split(VERBS[command.name].example)
        assert (program, verb) == ("fastvlm", command.name)
        with command.make_context(verb, arguments) as call:
            assert call.params

    def test_choices_and_defaults_are_those_of_the_options(self, shown, monkeypatch):
        from fastvlm_mlx.cli.options import COMPUTE_UNITS, MAX_PIXELS
        from fastvlm_mlx.cli.options import DETAILS as SHOWN_DETAILS
        from fastvlm_mlx.image.decode import DEFAULT_MAX_PIXELS
        from fastvlm_mlx.language.prompt.messages import DETAILS
        from fastvlm_mlx.vision.units import NAMES

        monkeypatch.setenv("COLUMNS", "100")
        text = shown("export", "-h")
        assert "--method rtn|awq|gptq|dwq\n" in text
        assert "--llm-bits 2|3|4|5|6|8|16\n" in text
        assert " [default: 8]" in text
        assert ("auto", *NAMES) == COMPUTE_UNITS
        assert MAX_PIXELS == DEFAULT_MAX_PIXELS
        assert SHOWN_DETAILS == DETAILS


class TestCompletion:
    def complete(self, line):
        words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
        return run(_FASTVLM_COMPLETE="complete_bash", **words).stdout.split()

    def test_verbs_options_and_choices(self):
        assert self.complete("fastvlm ex") == ["export"]
        assert self.complete("fastvlm export --llm-b") == ["--llm-bits", "--llm-bpw"]
        assert self.complete("fastvlm export --method ") == ["rtn", "awq", "gptq", "dwq"]

    def test_it_can_be_installed(self, shown):
        assert "--install-completion" in shown()


MISTAKES = """
import json, sys
from fastvlm_mlx.cli.main import main
for line in json.loads(sys.argv[1]):
    sys.argv = ["fastvlm", *line]
    try:
        main()
    except SystemExit as leaving:
        print(leaving.code, "torch" in sys.modules, "transformers" in sys.modules)
"""


def test_a_mistake_is_told_before_torch_is_imported(
    demo_checkpoint, demo_bundle, mlx_bundle, tmp_path
):
    new, there = str(tmp_path / "new"), str(tmp_path)
    (tmp_path / "mine.txt").touch()
    checkpoint, bundle = str(demo_checkpoint), str(demo_bundle)
    lines = [
        ["export", new, str(tmp_path / "out")],
        ["export", bundle, new],
        ["export", checkpoint, there],
        ["export", checkpoint, new, "--llm-bits", "7"],
        ["export", checkpoint, new, "--preset", "best"],
        ["export", checkpoint, new, "--base", checkpoint],
        ["export", checkpoint, new, "--recipe", new],
        ["export", checkpoint, new, "--head-bits", "4"],
        ["export", checkpoint, new, "--method", "gptq", "--calibration", new],
        ["convert", new, str(tmp_path / "out"), "--layout", "app"],
        ["convert", str(mlx_bundle), there, "--layout", "app"],
        ["verify", new],
        ["verify", bundle, "--checkpoint", new],
        ["verify", bundle, "--base", checkpoint],
        ["compare", new, bundle],
        ["compare", bundle, bundle, "--plot", "chart.doc"],
        ["sweep", new, "--out", there],
        ["sweep", checkpoint, "--out", there, "--layout", "apple"],
        ["sweep", checkpoint, "--out", there, "--choices", new],
        ["sweep", checkpoint, "--out", there, "--questions", new],
        ["demo", there],
        ["demo", new, "--llm-bits", "7"],
        ["install", new, there],
        ["push", new, "me/model"],
        ["plan", new],
        ["inspect", new],
        ["bench", new],
        ["map", new, there, "--prompt", "Why?", "--out", new],
        ["map", new, there, "--prompt", "Why?", "--out", f"{new}.jsonl"],
        ["map", bundle, there, "--prompt", "Why?", "--out", f"{new}.jsonl"],
        ["map", bundle, there, "--prompt", "Why?", "--out", f"{new}.jsonl", "--shard", "3/2"],
        ["bench", bundle, "--image-sizes", "300"],
        ["doctor", checkpoint],
    ]
    done = subprocess.run(
        [sys.executable, "-c", MISTAKES, json.dumps(lines)],
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout.splitlines()
    assert said == ["2 False False"] * len(lines), [*zip(lines, said, strict=False)]
    errors = done.stderr.splitlines()
    assert len(errors) == len(lines)
    assert all(line.startswith("error: ") for line in errors), errors
    assert sorted(os.listdir(tmp_path)) == ["mine.txt"]


class TestDoctor:
    def test_of_a_checkpoint_says_what_it_is(self, demo_checkpoint):
        done = run("doctor", demo_checkpoint)
        assert (done.returncode, done.stdout) == (2, "")
        assert f"error: {demo_checkpoint} is a checkpoint, not a bundle" in done.stderr


class TestInterrupted:
    @pytest.mark.parametrize("verb", ["generate", "export"])
    def test_what_it_says_fits_the_verb(self, verb, demo_checkpoint, mlx_bundle, tmp_path):
        words = [demo_checkpoint, tmp_path / "out"]
        if verb == "generate":
            words = [mlx_bundle, "--image", "-", "--prompt", "What?"]
        command = [sys.executable, "-m", "fastvlm_mlx", verb, *map(str, words)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as running:
            if verb == "export":
                running.stderr.readline()
            else:
                # It waits for an image that does not come.
                time.sleep(3)
            running.send_signal(signal.SIGINT)
            _, said = running.communicate()
        assert running.returncode == 130
        half_done = said.splitlines()[-1] == "interrupted: nothing half done was left behind"
        assert half_done == (verb == "export"), said
        assert "interrupted" in said
