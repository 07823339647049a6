"""What the documentation shows is run, and what comes out is what it shows.

All pages share one directory and one process. A command that stands on several pages is run once,
and a bundle that an example reads is made by the command of whichever page makes it.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from fractions import Fraction
from pathlib import Path

import av
import pytest
from documentation.pages import EXAMPLES, PAGES, ROOT, Example, Page
from hub_server import HubServer
from PIL import Image

from model_export.comparison.sweep import CHOICES
from model_export.samples import scenes

SECONDS = 900
# A sweep's eight exports take two minutes. Of them these are made unless slow tests are asked for.
SOME_CHOICES = ("fp16-4", "palette4-4")
# A small file that a page has one write.
ECHO = re.compile(r"^echo '(.*)' > (\w[\w.]*)$", re.MULTILINE)
FLOAT = re.compile(r"\d+(\.\d+)?(e[-+]\d+)?")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
MAKERS = {example.made: example for example in EXAMPLES if example.made}
# The Swift packages that the demo app's project asks for, as it was released.
PACKAGES = {
    "ml-explore/mlx-swift-examples": "2.21.2",
    "ml-explore/mlx-swift": "0.21.2",
    "huggingface/swift-transformers": "0.1.18",
}


def words(text: str) -> list[str]:
    """Lines without what differs from machine to machine: numbers and widths of columns."""
    return [" ".join(FLOAT.sub("0", line).split()) for line in text.splitlines() if line.strip()]


class Reader:
    """Does what a reader of the documentation does, in a directory of its own."""

    def __init__(self, folder: Path, environment: dict[str, str]):
        self.folder, self.whole_sweeps = folder, False
        self.done: dict[str, str] = {}
        self.environment = {**os.environ, **environment, "COLUMNS": "80"}
        self.server: subprocess.Popen[str] | None = None
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("reader.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=self.environment,
        )

    def follow(self, example: Example) -> str:
        """Run an example, after what makes the files that it reads, and return its output."""
        if example.text in self.done:
            return self.done[example.text]
        for word in example.words:
            name = Path(word).parts[0] if word else ""
            maker = MAKERS.get(name)
            if maker and maker.text != example.text and not (self.folder / name).exists():
                self.follow(maker)
        text = example.text
        if example.served:
            serve = (each for each in EXAMPLES if each.text.startswith("fastvlm serve "))
            self.follow(next(each for each in serve if each.page == example.page))
            text = text.replace(":8080", f":{self.port}")
        if example.text.startswith("fastvlm serve "):
            self.serve([word for word in shlex.split(text)[1:] if word not in ("--port", "8080")])
            answer = {"status": 0, "stdout": ""}
        elif example.python:
            answer = self.ask({"code": text, "page": example.page})
        else:
            argv = shlex.split(example.command)[1:]
            if argv[0] == "sweep" and not self.whole_sweeps:
                choices = {name: CHOICES["app"][name] for name in SOME_CHOICES}
                (self.folder / "some.json").write_text(json.dumps(choices))
                argv += ["--choices", "some.json"]
            answer = self.ask({"argv": argv, "stdin": example.piped})
        assert answer["status"] == 0, f"{example.text}\n{answer['stderr']}"
        self.done[example.text] = answer["stdout"]
        return answer["stdout"]

    def serve(self, argv: list[str]) -> None:
        """Start a server, at a port that is free, in place of an earlier one."""
        self.end_server()
        command = [sys.executable, "-m", "fastvlm_mlx", *argv, "--port", "0"]
        self.server = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, cwd=self.folder, env=self.environment
        )
        line = self.server.stdout.readline()
        self.port = re.search(r"http://127\.0\.0\.1:(\d+)/v1", line)[1]

    def end_server(self) -> None:
        if self.server is not None:
            self.server.terminate()
            self.server.communicate()

    def ask(self, told: dict) -> dict:
        timer = threading.Timer(SECONDS, self.process.kill)
        timer.start()
        try:
            self.process.stdin.write(json.dumps(told) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        finally:
            timer.cancel()
        assert line, f"the process has died of {told}"
        return json.loads(line)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A reader with a clone of this repository, one of the demo app, a photograph, a clip of six
    seconds, and a hub."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "model_export").symlink_to(ROOT / "model_export")
    Image.radial_gradient("L").resize((320, 240)).convert("RGB").save(folder / "photo.jpg")
    (folder / "photos").mkdir()
    shutil.copy(folder / "photo.jpg", folder / "photos")
    (folder / "things.json").write_text('{"type": "array", "items": {"enum": ["cat", "dog"]}}')
    for page in PAGES:
        for text, name in ECHO.findall((ROOT / page.name).read_text(encoding="utf-8")):
            (folder / name).write_text(text)
    write_clip(folder / "clip.mp4")
    app = folder / "ml-fastvlm" / "app"
    (app / "FastVLM" / "model").mkdir(parents=True)
    (app / "FastVLM" / "FastVLM.swift").touch()
    (app / "FastVLM.xcodeproj").mkdir()
    (app / "FastVLM.xcodeproj" / "project.pbxproj").write_text(project())
    hub = HubServer()
    demo = ROOT / "model_export" / "demo" / "checkpoint"
    files = {path.name: path.read_bytes() for path in demo.iterdir() if path.is_file()}
    # In the place of Apple's, whose weights are not here.
    hub.repositories["apple/FastVLM-0.5B"] = files
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "hub"),
        "FASTVLM_CACHE": str(folder / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "PYTHONPATH": str(ROOT),
    }
    reader = Reader(folder, environment)
    yield reader
    reader.process.kill()
    reader.process.communicate()
    reader.end_server()
    hub.shutdown()


def write_clip(path: Path) -> None:
    """Scenes of the demo checkpoint's, two seconds each."""
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 128
        stream.pix_fmt, stream.bit_rate = "yuv420p", 2_000_000
        for number in range(30):
            scene = scenes.generate(12 + number // 10, held_out=True).draw(128)
            frame = av.VideoFrame.from_image(scene)
            frame.pts, frame.time_base = number, Fraction(1, 5)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def project() -> str:
    """As much of the demo app's Xcode project as names its Swift packages."""
    blocks = [
        f'\t\t{number:024X} /* XCRemoteSwiftPackageReference "{name}" */ = {{\n'
        "\t\t\tisa = XCRemoteSwiftPackageReference;\n"
        f'\t\t\trepositoryURL = "https://github.com/{name}";\n'
        "\t\t\trequirement = {\n"
        "\t\t\t\tkind = upToNextMajorVersion;\n"
        f"\t\t\t\tminimumVersion = {version};\n"
        "\t\t\t};\n"
        "\t\t};\n"
        for number, (name, version) in enumerate(PACKAGES.items())
    ]
    return f"// !$*UTF8*$!\n{{\n\tobjects = {{\n{''.join(blocks)}\t}};\n}}\n"


def test_each_name_is_made_by_one_command():
    made = {example.text: example.made for example in EXAMPLES if example.made}
    assert len(set(made.values())) == len(made)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_examples_do_what_the_page_shows(page: Page, reader: Reader):
    for example in page.examples:
        if not example.ours:
            continue
        output = reader.follow(example)
        if example.output is None:
            continue
        found = words(output)
        # A line of … stands for lines that are left out.
        head, gap, tail = example.output.partition("…\n")
        first, last = words(head), words(tail)
        if example.text.startswith("fastvlm sweep ") and not reader.whole_sweeps:
            assert len(found) == 2 + len(SOME_CHOICES)
            assert set(found) <= set(first)
            continue
        if gap:
            assert len(found) > len(first + last)
            found = found[: len(first)] + found[len(found) - len(last) :]
        assert found == first + last, example.text


@pytest.mark.slow
def test_a_sweep_makes_all_of_its_table(reader: Reader):
    reader.whole_sweeps = True
    for example in EXAMPLES:
        if example.text.startswith("fastvlm sweep ") and example.output:
            reader.done.pop(example.text, None)
            assert words(reader.follow(example)) == words(example.output)


def test_every_option_that_is_named_exists(reader: Reader):
    shown = reader.ask({"argv": ["--help"]})["stdout"]
    verbs = {
        shlex.split(example.command)[1]
        for example in EXAMPLES
        if example.ours and not example.python
    }
    assert all(verb in shown for verb in verbs)
    helps = [reader.ask({"argv": [verb, "--help"]})["stdout"] for verb in sorted(verbs)]
    known = set(OPTION.findall(shown + "".join(helps)))
    for page in PAGES:
        prose = re.sub(r"`(python|pytest|pip)\b[^`]*`", "", page.prose)
        assert set(OPTION.findall(prose)) <= known, page.name
