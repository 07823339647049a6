"""`fastvlm chat` through a pipe and on a terminal, and what counts as an image in a line."""

import io
import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastvlm_mlx
from fastvlm_mlx.cli import chat as chat_module
from fastvlm_mlx.cli import main, options, show
from fastvlm_mlx.cli.input import lines as chat_input
from fastvlm_mlx.cli.input.lines import split_images
from fastvlm_mlx.errors import ImageError
from model_export.samples import scenes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("images")
    for seed, name in enumerate(("one.png", "my scene (2).png", "it's.png", "Makefile")):
        with (path / name).open("wb") as file:
            scenes.generate(seed, held_out=True).draw(64).save(file, "png")
    return path


@pytest.fixture(scope="module")
def model(demo_bundle):
    return fastvlm_mlx.load(demo_bundle)


@pytest.fixture
def chat(monkeypatch, capsys, model, demo_bundle, folder):
    """Pipe lines in, in the directory of the images: exit status, standard output and error."""
    monkeypatch.setattr("fastvlm_mlx.loading.load", lambda *_, **__: model)
    monkeypatch.chdir(folder)

    def run(*lines, options=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        monkeypatch.setattr(sys, "argv", ["fastvlm", "chat", str(demo_bundle), *map(str, options)])
        with pytest.raises(SystemExit) as leaving:
            main.main()
        out, err = capsys.readouterr()
        return leaving.value.code or 0, out.splitlines(), err

    return run


@pytest.mark.parametrize(
    ("line", "paths", "text"),
    [
        ("one.png What is it?", ["one.png"], "What is it?"),
        ("What is in one.png", ["one.png"], "What is in"),
        (r"my\ scene\ \(2\).png What?", ["my scene (2).png"], "What?"),
        ("'my scene (2).png' What?", ["my scene (2).png"], "What?"),
        ('What "my scene (2).png"', ["my scene (2).png"], "What"),
        (r"'it'\''s.png' one.png", ["it's.png", "one.png"], ""),
        ("don't say what's in one.png", ["one.png"], "don't say what's in"),
        ("HERE/my%20scene%20(2).png What?", ["{}/my scene (2).png"], "What?"),
        ("file://elsewhere/one.png What?", [], "file://elsewhere/one.png What?"),
        ("file://[ What?", [], "file://[ What?"),
        # No word is an image because there happens to be such a file.
        ("What is a Makefile? ./Makefile", ["./Makefile"], "What is a Makefile?"),
        ("Is it a PNG or gone.png?", [], "Is it a PNG or gone.png?"),
        ("/gone/far.jpg What?", ["/gone/far.jpg"], "What?"),
        # There may be no such file, where a path stands and a sentence does not mention one.
        ("gone.png", ["gone.png"], ""),
        ("gone.png one.png", ["one.png", "gone.png"], ""),
        ("gone.png?", [], "gone.png?"),
        ("sub/gone.png What?", ["sub/gone.png"], "What?"),
        ("one.png sub/gone.png What?", ["one.png", "sub/gone.png"], "What?"),
        ("What is in sub/gone.png?", ["sub/gone.png?"], "What is in"),
        ("Is 'my dir/gone.png' red?", ["my dir/gone.png"], "Is  red?"),
        (r"Is my\ dir/gone.png red?", ["my dir/gone.png"], "Is  red?"),
        ("Is sub/gone.png red?", [], "Is sub/gone.png red?"),
        ("my scene (2).png", ["my scene (2).png"], ""),
        ("./my scene (3).png", ["./my scene (3).png"], ""),
        ("my scene (3).png", [], "my scene (3).png"),
        ("http://a.b/c.png What?", ["http://a.b/c.png"], "What?"),
        ("left/right or up/down?", [], "left/right or up/down?"),
        ("\0/ " + "a/" * 9000, [], "\0/ " + "a/" * 9000),
        ("Say  'two  blanks' \\", [], "Say  'two  blanks' \\"),
        ("", [], ""),
    ],
)
def test_the_images_of_a_line(line, paths, text, folder, monkeypatch):
    monkeypatch.chdir(folder)
    found = split_images(line.replace("HERE", f"file://{folder}"))
    assert found == ([path.format(folder) for path in paths], text)


@pytest.mark.parametrize("part", ["\\ ", "\"'\\ ", "a", "'", "it's "])
def test_a_line_without_an_end_is_read_at_once(part):
    line = part * (200_000 // len(part))
    started = time.process_time()
    assert split_images(line) == ([], line.strip())
    assert time.process_time() - started < 10


NAMES = st.text("abc de'\"\\.é", min_size=3, max_size=12).map(str.strip).filter(len)


@given(NAMES, st.integers(0, 30), st.sampled_from(["", "What is it?"]))
@settings(max_examples=30, deadline=None)
def test_a_path_is_taken_as_one_whether_there_is_such_a_file(name, place, question):
    place %= len(name)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"x{name}.png")
        file.touch()
        mistyped = str(file.with_name(f"x{name[:place]}q{name[place:]}.png"))
        for path in (str(file), mistyped):
            found = split_images(f"{shlex.quote(path)} {question}")
            assert found == ([path], question)
        chat_input.check(str(file))
        with pytest.raises(ImageError, match="there is no file ") as error:
            chat_input.check(mistyped)
        # A sentence has no two blanks one after the other.
        assert str(error.value).endswith(f": use {' '.join(shlex.quote(str(file)).split())}")


@given(st.text(), st.text())
@settings(max_examples=100, deadline=None)
def test_a_sentence_may_mention_an_image(before, after):
    before, after = before.replace("/", ""), after.replace("/", "")
    line = f"Is {before} gone.png {after} red"
    assert split_images(line) == ([], line)


def test_questions_that_know_the_ones_before(chat, model, folder):
    first = model.generate(folder / "one.png", "How many?").text
    status, out, err = chat("", "one.png How many?", "And?", "/clear", "one.png", "How many?")
    assert (status, out[0], out[2]) == (0, first, first)
    assert len(out) == 3
    assert err == "All questions and images are forgotten.\n"
    assert chat("How many?", options=["--image", "one.png"])[1] == [first]


def test_sampling_and_images_have_the_options_that_generate_has():
    groups = [
        {
            option.opts[0]
            for option in main.Fastvlm.table[verb].command().params
            if getattr(option, "rich_help_panel", None) in (options.SAMPLING, options.IMAGE)
        }
        for verb in ("chat", "generate")
    ]
    assert groups[0] == groups[1]
    assert {"--top-k", "--json-schema", "--max-pixels"} <= groups[0]


def test_every_answer_obeys_the_options(chat, model, tmp_path, monkeypatch, folder):
    whole = model.generate(folder / "one.png", "Describe the image.").text
    stop = whole.split()[3]
    cut = ["--stop", stop]
    assert chat("one.png Describe the image.", options=cut)[1] == [whole[: whole.index(stop)]]
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["yes", "no"]}')
    _, out, _ = chat("one.png Red?", "Blue?", options=["--json-schema", schema])
    assert [json.loads(line) in ("yes", "no") for line in out] == [True, True]

    given = {}
    monkeypatch.setattr("fastvlm_mlx.loading.load", lambda _, **named: given.update(named) or model)
    assert chat("/exit", options=["--crop", "--max-pixels", 5000])[0] == 0
    assert (given["crop"], given["max_pixels"]) == (True, 5000)
    status, _, err = chat(options=["--image", "one.png", "--max-pixels", 99])
    assert (status, "over the limit" in err) == (2, True)


def test_several_images_are_warned_about_once(chat, model, folder):
    status, out, err = chat("/image one.png 'my scene (2).png'", "What differs?", "one.png And?")
    both = [folder / "one.png", folder / "my scene (2).png"]
    assert (status, out[0]) == (0, model.generate(both, "What differs?").text)
    assert err.count("was trained with one image") == 1


def test_what_fails_is_one_sentence_and_the_next_line_works(chat):
    lines = (
        "/imgae one.png",
        "/image",
        "/image gone.png",
        "/clear all",
        "/load one.png",
        "/save /nowhere/talk.json",
        "/gone/far.jpg What?",
        "./onw.png What?",
        "What is in sub/onw.png?",
        "gone.png",
        "http://a.b/c.png What?",
        "What? " * 3000,
        "\ud83d?",
        "/nope\x1b[2J",
    )
    status, out, err = chat(*lines, "Hello.")
    assert (status, len(out)) == (2, 1)
    assert err.count("error: ") == len(err.splitlines()) == len(lines)
    assert "use /image" in err
    assert "there is no file ./onw.png: use ./one.png\n" in err
    assert "there is no file /gone/far.jpg: check the path\n" in err
    assert "a.b/c.png is a URL" in err
    assert "\x1b" not in err
    assert chat("/exit", "Hello.") == (0, [], "")


def test_bytes_that_are_no_text(chat, monkeypatch):
    lines = io.TextIOWrapper(io.BytesIO(b"What is \xff?\n\xff.png\nHello.\n"), "utf-8")
    monkeypatch.setattr("io.StringIO", lambda _: lines)
    status, out, err = chat()
    assert (status, len(out)) == (2, 1)
    assert err.splitlines()[1] == r"error: there is no file \udcff.png: use one.png"
    assert err.count("half a character") == err.count("error: ") - 1 == 1


def test_save_and_load(chat, tmp_path):
    file = tmp_path / "my talk.json"
    saved = str(file).replace(" ", "\\ ")
    _, out, err = chat("one.png How many?", f"/save {saved}", "And?")
    assert "The conversation is saved to" in err
    assert [each["role"] for each in json.loads(file.read_text())["messages"]] == [
        "user",
        "assistant",
    ]
    assert chat(f"/load '{file}'", "And?")[1] == out[1:]
    assert chat("And?", options=["--load", str(file)])[1] == out[1:]
    status, _, err = chat("And?", options=["--load", str(file), "--system", "Hi."])
    assert (status, "leave one out" in err) == (2, True)


def test_an_answer_s_controls_are_escaped_and_ctrl_c_stops_it(chat, monkeypatch):
    shown = []

    def interrupted(piece):
        shown.append(piece)
        if len(shown) == 2:
            raise KeyboardInterrupt
        return "\\x1b" + piece

    monkeypatch.setattr(show, "answer", interrupted)
    status, out, err = chat("one.png Describe the image.", "How many?")
    assert (status, len(out)) == (0, 2)
    assert out[0] == "\\x1b" + shown[0]
    assert err == "The answer was stopped.\n"


def test_typed_without_the_extra(monkeypatch, chat):
    typed = iter(["Hello.", KeyboardInterrupt, "one.png", "/help", EOFError])

    def answer(prompt):
        assert prompt == "> "
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr(chat_input, "is_interactive", lambda: True)
    monkeypatch.setattr(chat_input, "find_spec", lambda _: None)
    status, _, err = chat()
    assert status == 0
    assert 'pip install "fastvlm-mlx[chat]"' in err
    assert "Ctrl-D or /exit ends the chat." in err
    assert "The next question is about this image." in err
    assert all(f"\n{name} " in err for name in chat_module.COMMANDS)


@pytest.mark.slow
def test_on_a_terminal(demo_bundle, folder, tmp_path):
    """prompt_toolkit, Ctrl-C at the prompt and in an answer, Ctrl-D, and the history."""
    ours, theirs = pty.openpty()
    long = ["--max-tokens", "1500", "--temperature", "9", "--seed", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastvlm_mlx", "chat", demo_bundle, *long],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=folder,
        env=os.environ | {"XDG_STATE_HOME": str(tmp_path), "HOME": str(tmp_path), "TERM": "xterm"},
        start_new_session=True,
    )
    os.close(theirs)
    new = ""

    def until(pattern):
        nonlocal new
        end = time.monotonic() + 120
        while not (found := re.search(pattern, new)):
            assert time.monotonic() < end, new
            if select.select([ours], [], [], 1)[0]:
                data = os.read(ours, 65536)
                if b"\x1b[6n" in data:
                    # The terminal is asked where its cursor is.
                    os.write(ours, b"\x1b[1;1R")
                new += data.decode(errors="replace")
        new = new[found.end() :]

    # The prompt is drawn a second time, with the cursor moved up, once its place is known.
    drawn = r"\x1b\[\d+A"
    until("/help shows what else")
    until(drawn)
    os.write(ours, b"\x03")
    until("ends the chat")
    until(drawn)
    os.write(ours, b"'my scene (2).png' Describe the image.\r")
    until(r"\x1b\[\?2004l[^\x1b]{200}")
    process.send_signal(signal.SIGINT)
    until("The answer was stopped")
    until(drawn)
    os.write(ours, b"one.png\r")
    until("The next question is about this image")
    until(drawn)
    os.write(ours, b"\x04")
    assert process.wait(60) == 0
    os.close(ours)
    (history,) = tmp_path.rglob("chat-history")
    assert "Describe the image." in history.read_text()
    assert history.stat().st_mode & 0o077 == 0
