"""The Swift packages of the demo app's Xcode project: told, pinned, unpinned, and nothing else."""

import json
import os
import re
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlm_mlx.cli import main
from fastvlm_mlx.errors import DestinationError
from model_export.layouts import install as installer
from model_export.layouts import plist, xcode

RELEASED = {
    "https://github.com/ml-explore/mlx-swift-examples": ("upToNextMajorVersion", "2.21.2"),
    "https://github.com/ml-explore/mlx-swift": ("upToNextMajorVersion", "0.21.2"),
    "https://github.com/huggingface/swift-transformers": ("upToNextMajorVersion", "0.1.18"),
}
KEYS = {"exactVersion": "version", "revision": "revision", "branch": "branch"}
BLOCK = """\
\t\tC0FFEE00000000000000000{n} /* XCRemoteSwiftPackageReference "{name}" */ = {{
\t\t\tisa = XCRemoteSwiftPackageReference;
\t\t\trepositoryURL = "{url}";
\t\t\trequirement = {{
\t\t\t\tkind = {kind};
\t\t\t\t{key} = {value};
\t\t\t}};
\t\t}};
"""
# What else is in such a file: comments and strings with braces, lists, another `requirement`.
PROJECT = """\
// !$*UTF8*$!
{{
\tarchiveVersion = 1;
\tobjects = {{

/* Begin XCBuildConfiguration section, with {{ kind = exactVersion; }} in a comment */
\t\tC0FFEE0000000000000000A1 /* Debug */ = {{
\t\t\tisa = XCBuildConfiguration;
\t\t\tbuildSettings = {{
\t\t\t\tDEVELOPMENT_TEAM = "";
\t\t\t\tOTHER_FLAGS = "-DBRACES=\\"{{ requirement = {{ kind = branch; }}; \\"";
\t\t\t\tPRODUCT_NAME = "Caf\u00e9 $(TARGET_NAME)";
\t\t\t\tPATHS = (
\t\t\t\t\t"$(inherited)",
\t\t\t\t\t../lib,
\t\t\t\t);
\t\t\t}};
\t\t\trequirement = none;
\t\t}};
/* Begin XCRemoteSwiftPackageReference section */
{blocks}/* End XCRemoteSwiftPackageReference section */
\t}};
\trootObject = C0FFEE0000000000000000A0 /* Project object */;
}}
"""


def text_of(packages):
    blocks = [
        BLOCK.format(
            n=n,
            name=url.rpartition("/")[2],
            url=url,
            kind=kind,
            key=KEYS.get(kind, "minimumVersion"),
            value=value,
        )
        for n, (url, (kind, value)) in enumerate(packages.items())
    ]
    return PROJECT.format(blocks="".join(blocks))


@pytest.fixture
def app(tmp_path):
    """What a clone of apple/ml-fastvlm looks like where it matters."""
    folder = tmp_path / "app"
    (folder / "FastVLM" / "model").mkdir(parents=True)
    (folder / "FastVLM" / "FastVLM.swift").touch()
    (folder / xcode.PROJECT).mkdir()
    write(folder, text_of(RELEASED))
    return folder


def write(app, text):
    data = text if isinstance(text, bytes) else text.encode()
    (app / xcode.PROJECT / xcode.PBXPROJ).write_bytes(data)


def read(app):
    return (app / xcode.PROJECT / xcode.PBXPROJ).read_bytes()


def project(app):
    return xcode.read_project(app / "FastVLM" / "model")


def files(app):
    return sorted(os.listdir(app / xcode.PROJECT))


def resolve(app, content):
    file = app / xcode.PROJECT / xcode.RESOLVED
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture
def install(app, demo_bundle, monkeypatch, capsys):
    """Run the verb: exit status, standard output, standard error."""
    monkeypatch.setattr(installer, "app_misfit", lambda info: None)

    def run(*options):
        arguments = ["fastvlm", "install", str(demo_bundle), str(app), *options]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as leaving:
            main.main()
        return leaving.value.code or 0, *capsys.readouterr()

    return run


VARIANTS = {
    "as Xcode writes it": lambda text: text,
    "other line ends": lambda text: text.replace("\n", "\r\n"),
    "on one line": lambda text: re.sub(
        r"requirement = \{\s+(kind = \w+;)\s+(\w+ = [\d.]+;)\s+\}", r"requirement = {\1 \2}", text
    ),
    "quoted": lambda text: re.sub(r"(kind|Version) = (up\w+|[\d.]+);", r'\1 = "\2";', text),
    "other addresses": lambda text: (
        text.replace(
            'https://github.com/ml-explore/mlx-swift"', 'git@github.com:ML-Explore/mlx-swift"'
        )
        .replace('swift-transformers";', 'swift-transformers.git";')
        .replace('mlx-swift-examples";', 'mlx-swift-examples/";')
    ),
    "bytes that are no UTF-8": lambda text: text.encode().replace("\u00e9".encode(), b"\xe9"),
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_only_three_requirements_change_and_come_back(app, variant):
    write(app, variant(text_of(RELEASED)))
    (app / xcode.PROJECT / xcode.PBXPROJ).chmod(0o640)
    before, found = read(app), project(app)
    assert found.verdict().startswith(
        "it does not build: the project asks for mlx-swift-examples up to the next major version "
        "from 2.21.2, mlx-swift up to the next major version from 0.21.2, swift-transformers up "
    )
    xcode.pin(found)
    after = project(app)
    assert {r.name: r.exact for r in after.requirements.values()} == {
        "mlx-swift-examples": "2.21.2",
        "mlx-swift": "0.21.3",
        "swift-transformers": "0.1.19",
    }
    assert after.verdict().startswith("it builds: the project asks for exactly mlx-swift-examples")

    def around(data):
        return re.split(rb"requirement = \{[^{}]*\};\s+\};\s", data)

    # But for what is in those braces, byte for byte.
    assert around(read(app)) == around(before)
    assert read(app).count(b"exactVersion;") == 4
    assert (app / xcode.PROJECT / xcode.PBXPROJ).stat().st_mode & 0o777 == 0o640
    assert (app / xcode.PROJECT / xcode.KEPT).read_bytes() == before
    xcode.pin(after)
    assert (app / xcode.PROJECT / xcode.KEPT).read_bytes() == before
    xcode.unpin(after)
    assert read(app) == before
    assert files(app) == [xcode.PBXPROJ]


def test_lines_are_set_as_they_were(app):
    xcode.pin(project(app))
    block = "requirement = {\n\t\t\t\tkind = exactVersion;\n\t\t\t\tversion = 0.21.3;\n\t\t\t};"
    assert block.encode() in read(app)


def test_the_team_that_xcode_wrote_meanwhile_stays(app):
    before = read(app)
    xcode.pin(project(app))
    team = (b'DEVELOPMENT_TEAM = "";', b"DEVELOPMENT_TEAM = ABCDE12345;")
    write(app, read(app).replace(*team))
    xcode.unpin(project(app))
    assert read(app) == before.replace(*team)


def test_a_requirement_that_was_changed_since_stays(app):
    xcode.pin(project(app))
    write(app, read(app).replace(b"version = 0.21.3;", b"version = 0.25.6;"))
    xcode.unpin(project(app))
    assert b"version = 0.25.6;" in read(app)
    assert b"minimumVersion = 2.21.2;" in read(app)


def test_nothing_to_undo(app):
    with pytest.raises(DestinationError, match="nothing to undo"):
        xcode.unpin(project(app))


OTHERS = {
    "the fork on mlx-swift-lm": (
        {
            "https://github.com/ml-explore/mlx-swift": ("upToNextMajorVersion", "0.31.3"),
            "https://github.com/ml-explore/mlx-swift-lm": ("upToNextMajorVersion", "3.31.3"),
        },
        "mlx-swift-lm up to the next major version from 3.31.3",
    ),
    "a commit": (
        RELEASED | {"https://github.com/huggingface/swift-transformers": ("revision", "e38e8dbc")},
        "swift-transformers at commit e38e8dbc",
    ),
    "a branch": (
        RELEASED | {"https://github.com/ml-explore/mlx-swift": ("branch", "main")},
        "mlx-swift of branch main",
    ),
    "another version": (
        RELEASED | {"https://github.com/ml-explore/mlx-swift": ("exactVersion", "0.25.6")},
        "mlx-swift exactly 0.25.6",
    ),
    "newer ones": (
        RELEASED | {"https://github.com/ml-explore/mlx-swift": ("upToNextMinorVersion", "0.25.0")},
        "mlx-swift up to the next minor version from 0.25.0",
    ),
    "somebody else's": (
        {url.replace("ml-explore", "somebody"): asked for url, asked in RELEASED.items()},
        "mlx-swift up to the next major version from 0.21.2",
    ),
    "a kind of tomorrow": (
        RELEASED | {"https://github.com/ml-explore/mlx-swift": ("registry", "0.21.2")},
        "mlx-swift by a requirement of kind registry",
    ),
    "none": ({}, "no Swift package at all"),
}


@pytest.mark.parametrize(("packages", "words"), OTHERS.values(), ids=OTHERS)
def test_what_asks_for_something_else_is_left(app, packages, words):
    write(app, text_of(packages))
    before, found = read(app), project(app)
    assert found.verdict().startswith("whether it builds is not known: the released app builds")
    assert words in found.verdict()
    xcode.pin(found)
    assert (read(app), files(app)) == (before, [xcode.PBXPROJ])


class TestPackageResolved:
    def pins(self, form, versions):
        urls = [f"https://github.com/{repository}" for repository in xcode.BUILDS_WITH]
        if form == 1:
            pins = [
                {"package": "x", "repositoryURL": f"{url}.git", "state": {"version": version}}
                for url, version in zip(urls, versions, strict=True)
            ]
            return {"object": {"pins": pins}, "version": 1}
        pins = [
            {"identity": "x", "kind": "k", "location": url, "state": {"version": version}}
            for url, version in zip(urls, versions, strict=True)
        ]
        return {"pins": pins, "version": form}

    @pytest.mark.parametrize("form", [1, 2, 3])
    def test_right_ones_are_kept_by_xcode(self, app, form):
        resolve(app, self.pins(form, xcode.BUILDS_WITH.values()))
        assert project(app).verdict().startswith("it builds as long as FastVLM.xcodeproj/project.x")
        xcode.pin(project(app))
        assert project(app).verdict().endswith("swift-transformers 0.1.19")

    def test_others_are_resolved_anew_once_the_project_is_pinned(self, app):
        resolve(app, self.pins(3, ["2.25.7", "0.25.6", "0.1.19"]))
        assert project(app).verdict().startswith("it does not build")
        xcode.pin(project(app))
        said = project(app).verdict()
        assert said.startswith("it builds: ")
        assert "still has mlx-swift-examples 2.25.7, mlx-swift 0.25.6, which Xcode resolves" in said

    @pytest.mark.parametrize(
        "content", ["", "[]", "{}", '{"pins": 3}', '{"pins": [{}]}', '{"object": null}', "\0" * 9]
    )
    def test_a_damaged_one_says_nothing(self, app, content):
        resolve(app, content)
        assert project(app).resolved == {}
        assert project(app).verdict().startswith("it does not build")


class TestTheVerb:
    def test_it_says_whether_the_app_will_build(self, install, app):
        status, out, _ = install()
        assert status == 0
        assert "Swift packages: it does not build: the project asks for" in out
        assert read(app).decode() == text_of(RELEASED)

    def test_a_dry_run_shows_the_difference(self, install, app):
        status, out, _ = install("--pin-packages", "--dry-run")
        assert status == 0
        changed = [line for line in out.splitlines() if re.match(r"[-+]\t", line)]
        assert [line.strip("\t-+") for line in changed] == [
            *("kind = upToNextMajorVersion;", "minimumVersion = 2.21.2;"),
            *("kind = exactVersion;", "version = 2.21.2;"),
            *("kind = upToNextMajorVersion;", "minimumVersion = 0.21.2;"),
            *("kind = exactVersion;", "version = 0.21.3;"),
            *("kind = upToNextMajorVersion;", "minimumVersion = 0.1.18;"),
            *("kind = exactVersion;", "version = 0.1.19;"),
        ]
        assert (read(app).decode(), files(app)) == (text_of(RELEASED), [xcode.PBXPROJ])
        assert os.listdir(app / "FastVLM" / "model") == []

    def test_pin_and_unpin(self, install, app):
        status, out, _ = install("--pin-packages")
        assert status == 0
        assert "Swift packages: it builds: the project asks for exactly" in out
        assert project(app).pinned
        assert "config.json" in os.listdir(app / "FastVLM" / "model")
        (app / "FastVLM" / "model" / "config.json").unlink()
        assert install("--unpin-packages", "--dry-run")[0] == 0
        assert project(app).pinned
        assert install("--unpin-packages")[0] == 0
        assert (read(app).decode(), files(app)) == (text_of(RELEASED), [xcode.PBXPROJ])
        assert "config.json" not in os.listdir(app / "FastVLM" / "model")
        status, _, err = install("--unpin-packages")
        assert status == 2
        assert "nothing to undo" in err

    def test_both_at_once(self, install):
        status, _, err = install("--pin-packages", "--unpin-packages")
        assert status == 2
        assert "choose one" in err

    @pytest.mark.parametrize("text", [None, "", "{", "<?xml version='1.0'?>", "{ objects = (); }x"])
    def test_no_project_that_can_be_read(self, install, app, text):
        (app / xcode.PROJECT / xcode.PBXPROJ).unlink()
        if text is not None:
            write(app, text)
        status, out, err = install("--pin-packages")
        assert (status, out) == (2, "")
        assert "project.pbxproj" in err
        assert os.listdir(app / "FastVLM" / "model") == []
        status, out, _ = install()
        assert status == 0
        assert f"Swift packages: {app}" in out


def test_what_was_there_stays_when_writing_fails(app, monkeypatch):
    before = read(app)

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(xcode.os, "replace", fail)
    with pytest.raises(DestinationError, match=r"No space left on device.*it is as it was"):
        xcode.pin(project(app))
    assert (read(app), files(app)) == (before, [xcode.PBXPROJ])


def test_depth_is_bounded(app):
    write(app, "{ objects = " + "{ a = " * 5000)
    with pytest.raises(DestinationError, match="can't be read as Xcode's"):
        project(app)


PIECES = ["{", "}", "(", ")", "=", ";", ",", '"', "a", "objects", "/*", "*/", "//", "\\", "\n", "é"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=30).map("".join))
def test_any_text_is_a_list_or_told(text):
    try:
        node = plist.parse(text)
    except ValueError:
        return
    start, stop = node.span
    assert plist.parse(text[start:stop]).entries.keys() == node.entries.keys()


class TestNothingIsLost:
    def test_a_second_pinning_keeps_what_the_first_kept(self, app):
        before = read(app)
        xcode.pin(project(app))
        # Loosened in Xcode, all of them.
        write(app, before + b"// saved\n")
        with pytest.raises(DestinationError, match="is there already, from an earlier"):
            xcode.pin(project(app))
        assert project(app).file.with_name(xcode.KEPT).read_bytes() == before

    def test_a_file_of_the_user_s_in_the_place_of_the_kept_one(self, app):
        kept = project(app).file.with_name(xcode.KEPT)
        kept.write_text("precious")
        with pytest.raises(DestinationError, match="or of your own"):
            xcode.pin(project(app))
        assert kept.read_text() == "precious"

    def test_what_xcode_saves_meanwhile(self, app):
        found = project(app)
        write(app, (read(app) + b"// saved\n").decode())
        with pytest.raises(DestinationError, match="was saved by another program just now"):
            xcode.pin(found)
        assert read(app).endswith(b"// saved\n")
