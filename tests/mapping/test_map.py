"""A folder of images through the demo bundle: rows, errors, going on, Parquet, the command line."""

import json
import os
import shutil
import sys
from dataclasses import replace

import pytest

import fastvlm_mlx
from fastvlm_mlx.cli import main
from fastvlm_mlx.errors import DestinationError, ImageError, OptionError, PromptError
from fastvlm_mlx.mapping import Job, map_folder
from fastvlm_mlx.mapping.images import Shard
from model_export.samples import scenes

PROMPT = "How many shapes are there?"
BROKEN = {"broken.png", "dangling.png", "pipe.png"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Nine scenes, three files that are no images and would each hold up a program of its own."""
    path = tmp_path_factory.mktemp("images")
    (path / "more").mkdir()
    for seed in range(9):
        name = f"more/{seed}.png" if seed % 2 else f"{seed}.png"
        scenes.generate(seed).draw(256).save(path / name)
    (path / "broken.png").write_bytes((path / "0.png").read_bytes()[:200])
    (path / "dangling.png").symlink_to("nowhere")
    os.mkfifo(path / "pipe.png")
    return path


@pytest.fixture
def job(demo_bundle, folder):
    return Job(demo_bundle, folder, PROMPT, batch_size=4)


@pytest.fixture(scope="module")
def model(demo_bundle):
    return fastvlm_mlx.load(demo_bundle, kept_bytes=0)


@pytest.fixture
def loaded(model, monkeypatch):
    """Loading takes no time."""
    monkeypatch.setattr(Job, "load", lambda _: model)


def read(path):
    return {row["image"]: row for row in map(json.loads, path.read_bytes().splitlines())}


@pytest.fixture
def run(monkeypatch, capsys):
    """A command line's status, standard output and standard error."""

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["fastvlm", "map", *map(str, words)])
        with pytest.raises(SystemExit) as leaving:
            main.main()
        return leaving.value.code, *capsys.readouterr()

    return command


def test_each_image_has_a_row_and_a_second_run_asks_about_new_ones_alone(
    job, model, tmp_path, monkeypatch
):
    out = tmp_path / "captions.jsonl"
    with monkeypatch.context() as patched:
        patched.setattr(Job, "load", lambda _: model)
        tally = map_folder(job, out)
    found = read(out)
    assert (tally.images, tally.done, tally.broken, tally.new) == (12, 12, 3, 12)
    assert not tally.complete
    assert {name for name, row in found.items() if row["error"]} == BROKEN
    for name in ("0.png", "more/7.png"):
        alone = model.generate(job.folder + "/" + name, PROMPT)
        row = found[name]
        assert (row["text"], row["generation_tokens"]) == (alone.text, alone.generation_tokens)
        assert (row["image_tokens"], row["finish_reason"]) == (16, "stop")
    assert "pipe.png is a device, a pipe or a socket" in found["pipe.png"]["error"]
    rows = out.read_bytes()
    monkeypatch.setattr(Job, "load", lambda _: 1 / 0)
    again = map_folder(job, out)
    assert (again.done, again.broken, again.new) == (12, 3, 0)
    assert out.read_bytes() == rows
    # A row that is removed is made again.
    out.write_bytes(b"".join(line for line in rows.splitlines(True) if b'"error":null' in line))
    monkeypatch.setattr(Job, "load", lambda _: model)
    assert map_folder(job, out).new == 3
    assert read(out) == found


@pytest.mark.usefixtures("loaded")
def test_parquet_holds_the_same(job, tmp_path, monkeypatch):
    import pyarrow.parquet as pq

    out = tmp_path / "captions.parquet"
    monkeypatch.setattr("fastvlm_mlx.mapping.parquet._GROUP", 5)
    map_folder(job, out)
    table = pq.read_table(out).to_pylist()
    found = read(tmp_path / "captions.parquet.jsonl")
    assert [{**row, "image_bytes": None} for row in found.values()] == table
    assert pq.ParquetFile(out).num_row_groups == 3
    assert {path.name for path in tmp_path.iterdir()} == {
        "captions.parquet",
        "captions.parquet.jsonl",
        "captions.parquet.jsonl.run",
    }
    assert map_folder(job, out).new == 0
    (tmp_path / "captions.parquet.jsonl").unlink()
    with pytest.raises(DestinationError, match="without captions"):
        map_folder(job, out)
    out.write_bytes(b"mine")
    with pytest.raises(DestinationError, match="`fastvlm map` did not make it"):
        map_folder(job, out, overwrite=True)
    assert out.read_bytes() == b"mine"


@pytest.mark.usefixtures("loaded")
def test_parquet_leaves_alone_what_lies_or_comes_beside_it(job, tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".a.parquet.part").symlink_to("mine")
    map_folder(job, tmp_path / "a.parquet")
    assert not (tmp_path / "a.parquet").is_symlink()
    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / ".a.parquet.part").is_symlink()

    out = tmp_path / "b.parquet"

    def meanwhile(tally, row):
        out.write_text("mine")

    with pytest.raises(DestinationError, match="`fastvlm map` did not make it"):
        map_folder(job, out, progress=meanwhile)
    assert out.read_text() == "mine"
    assert not list(tmp_path.glob(".b*"))


@pytest.mark.usefixtures("loaded")
def test_shards_together_are_all(job, tmp_path):
    found = {}
    for index in (1, 2):
        shard = replace(job, shard=Shard(index, 2), prompt="What is it?")
        map_folder(shard, tmp_path / f"{index}.jsonl")
        part = read(tmp_path / f"{index}.jsonl")
        assert not part.keys() & found.keys()
        found |= part
    assert len(found) == 12


class TestTheCommandLine:
    def test_what_it_says(self, run, job, tmp_path):
        out = tmp_path / "rows.jsonl"
        words = [job.bundle, job.folder, "--prompt", PROMPT, "--out", out, "--max-tokens", 2]
        (tmp_path / "mine.txt").touch()
        status, printed, said = run(*words)
        assert (status, printed) == (1, f"{out}: 9 of 12 images answered, errors: 3\n")
        assert all(name in said for name in BROKEN)
        status, printed, said = run(*words, "--json")
        assert said.splitlines() == ["12 of 12 images were done before"]
        assert json.loads(printed) == {
            "out": str(out),
            "images": 12,
            "answered": 9,
            "errors": 3,
            "new": 0,
            "unreadable_folders": [],
        }

    @pytest.mark.usefixtures("loaded")
    def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(self, run, job, tmp_path, monkeypatch):
        from fastvlm_mlx.mapping.journal import Journal

        write = Journal.write

        def pressed(journal, row):
            if len(journal.done) == 5:
                raise KeyboardInterrupt
            write(journal, row)

        out = tmp_path / "rows.jsonl"
        words = [job.bundle, job.folder, "--prompt", PROMPT, "--out", out, "--max-tokens", 1]
        with monkeypatch.context() as patched:
            patched.setattr(Journal, "write", pressed)
            status, _, said = run(*words)
        assert status == 130
        assert "5 of 12 images are done; the same command goes on with the rest" in said
        assert len(read(out)) == 5
        assert run(*words)[1].endswith(": 9 of 12 images answered, errors: 3\n")

    def test_a_package_that_is_missing(self, run, job, tmp_path, monkeypatch):
        words = [job.bundle, job.folder, "--prompt", PROMPT, "--out"]
        for package, more in (("pyarrow", ["a.parquet"]), ("ray", ["a.jsonl", "--ray", "2"])):
            with monkeypatch.context() as patched:
                patched.setitem(sys.modules, package, None)
                status, _, said = run(*words, tmp_path / more[0], *more[1:])
            extra = {"pyarrow": "parquet", "ray": "ray"}[package]
            assert status == 2
            assert f"{package} of the `{extra}` extra, which is not installed: run pip" in said
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "out", "error", "match"),
    [
        ({"prompt": " "}, "a.jsonl", PromptError, "empty"),
        ({"folder": "nowhere"}, "a.jsonl", ImageError, "can't be read"),
        ({"patterns": ("*.gif",)}, "a.jsonl", ImageError, r"holds no image \(12 files of other"),
        ({}, "a.txt", OptionError, "ends in .jsonl or .parquet"),
        ({}, "no/a.jsonl", DestinationError, "is no directory: make it first"),
        ({}, "a\0.jsonl", DestinationError, "can't be written"),
    ],
)
@pytest.mark.usefixtures("loaded")
def test_a_mistake_is_a_sentence_and_leaves_nothing(job, tmp_path, changes, out, error, match):
    with pytest.raises(error, match=match):
        map_folder(replace(job, **changes), f"{tmp_path}/{out}")
    assert list(tmp_path.iterdir()) == []


def test_an_option_that_is_none(job, tmp_path):
    with pytest.raises(OptionError, match="--ray is 0: expected a number of workers"):
        map_folder(job, tmp_path / "a.jsonl", ray=0)
    for name, value in (("batch_size", 0), ("max_pixels", 0), ("patterns", ("",))):
        with pytest.raises(OptionError):
            replace(job, **{name: value})


def test_another_model_of_the_same_sizes_is_another(demo_bundle, folder, tmp_path):
    bundle = tmp_path / "bundle"
    shutil.copytree(demo_bundle, bundle)
    (bundle / "manifest.json").unlink()
    job = Job(bundle, folder, PROMPT)
    before = job.made_of()
    weights = bundle / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert job.made_of()["bundle"] != before["bundle"]
