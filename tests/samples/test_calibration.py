"""Calibration data: what is read, what is skipped and said, what is refused."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastvlm_mlx.bundle.config import VisionConfig
from fastvlm_mlx.errors import OptionError
from model_export.quantization.rounding.held_out import LEAST_IMAGES
from model_export.samples import calibration, documents
from model_export.samples.images import Sample, gate_samples

SMALL = VisionConfig(image_size=256)


def pixels(samples):
    return {sample.image.tobytes() for sample in samples}


@pytest.mark.parametrize("vision", [SMALL, VisionConfig()], ids=["small", "real"])
def test_without_data_there_is_enough_of_our_own_and_none_of_the_gates(vision):
    own = calibration.load_calibration(None, vision)
    assert len(own.samples) >= 8
    assert all(sample.questions for sample in own.samples)
    gates = gate_samples(vision)
    assert not {p.name for p in own.samples} & {p.name for p in gates}
    assert not pixels(own.samples) & pixels(gates)
    assert own.digest == calibration.load_calibration(None, vision).digest
    assert own.notes() == []
    seen, judges = calibration.split(own, vision.image_size, LEAST_IMAGES)
    assert len(judges) == len(own.samples) // 4 >= LEAST_IMAGES
    assert not pixels(seen) & pixels(judges)
    assert pixels(seen) | pixels(judges) <= pixels(own.samples)


def test_a_real_encoder_sees_a_photograph_scenes_and_every_kind_of_document():
    own = calibration.load_calibration(None, VisionConfig())
    flower, *generated = own.samples
    assert flower.name == "flower.jpg"
    assert {p.image.size for p in generated} == {(1024, 1024)}
    for some in calibration.split(own, 1024, LEAST_IMAGES):
        kinds = {
            type(documents.generate(int(p.name.split()[1]))).__name__
            for p in some
            if p.name.startswith("document")
        }
        assert kinds == {"Page", "Table", "Bars", "Line"}
        assert any(p.name.startswith("scene") for p in some)
    for sample in generated:
        number = int(sample.name.split()[1])
        if sample.name.startswith("document"):
            assert sample.questions == documents.generate(number).questions()
    small = calibration.load_calibration(None, SMALL)
    assert all(p.name.startswith("scene") for p in small.samples)


def plain(*colours):
    samples = [
        Sample(f"{i}", Image.new("RGB", (8, 8), (colour, 0, 0)), (("?", "!"),))
        for i, colour in enumerate(colours)
    ]
    return calibration.Calibration(tuple(samples), ())


@pytest.mark.parametrize(
    ("count", "kept_back"), [(1, 0), (2, 1), (3, 1), (9, 4), (10, 5), (12, 5), (24, 6), (32, 8)]
)
def test_a_quarter_is_kept_back_and_half_of_a_few(count, kept_back):
    seen, judges = calibration.split(plain(*range(count)), 256, least=5)
    assert (len(seen), len(judges)) == (count - kept_back, kept_back)
    assert not {p.name for p in seen} & {p.name for p in judges}


def test_a_copy_of_an_image_that_is_looked_at_does_not_judge():
    seen, judges = calibration.split(plain(*range(12), *range(12)), 256, least=5)
    assert len(seen) + len(judges) == 12
    assert not pixels(seen) & pixels(judges)


def test_large_encoders_look_at_fewer_and_enough_judge():
    seen, judges = calibration.split(plain(*range(32)), 1024, least=5)
    assert (len(seen), len(judges)) == (16, 8)
    seen, judges = calibration.split(plain(*range(32)), 2048, least=5)
    assert (len(seen), len(judges)) == (4, 5)


def test_a_directory(tmp_path):
    (tmp_path / "below").mkdir()
    for name, colour in (("a.png", "red"), ("below/b.JPG", "green")):
        Image.new("RGB", (900, 300), colour).save(tmp_path / name)
    (tmp_path / "c.jpg").write_bytes(b"no image")
    (tmp_path / "notes.txt").write_text("not looked at")
    found = calibration.load_calibration(tmp_path, SMALL)
    assert [p.name for p in found.samples] == ["a.png", "below/b.JPG"]
    assert found.samples[0].image.size == (512, 171)
    assert len(found.skipped) == 1
    assert "c.jpg" in found.notes()[0]
    assert "1 skipped" in found.notes()[0]


def test_lines(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = [
        {"image": "a.png", "prompt": "One?", "answer": "Yes."},
        {"image": "a.png", "prompt": "Two?", "answer": "No."},
        {"image": "gone.png", "prompt": "Three?", "answer": "?"},
        {"image": "a.png", "prompt": "Four?"},
    ]
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n{broken\n")
    found = calibration.load_calibration(file, SMALL)
    assert [p.questions for p in found.samples] == [(("One?", "Yes."), ("Two?", "No."))]
    assert len(found.skipped) == 3
    assert "line 4" in found.notes()[0]
    assert "line 6 is not JSON" in found.notes()[0]
    assert "gone.png" in found.notes()[0]


def test_a_large_collection_is_read_in_part(tmp_path):
    for i in range(100):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / f"{i:03}.png")
    found = calibration.load_calibration(tmp_path, SMALL)
    names = [p.name for p in found.samples]
    assert len(names) == calibration.MAX_IMAGES
    assert names == sorted(set(names))
    assert names[-1] > "090"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist"),
        ({}, "holds no image that can be used: expected"),
        ({"a.png": b"x"}, r"holds no image that can be used \(calibration: 1 skipped \(.*a\.png"),
        (b"", "holds no image"),
        (b"{}\n", "line 1 has not image, prompt and answer"),
        (b"\xff\xfe", "can't be read as text"),
    ],
)
def test_what_is_refused(tmp_path, content, words):
    path = tmp_path / "data"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.mkdir()
        for name, data in content.items():
            (path / name).write_bytes(data)
    with pytest.raises(OptionError, match=words):
        calibration.load_calibration(path, SMALL)


@settings(max_examples=50, deadline=None)
@given(text=st.text())
def test_any_text_is_read_or_refused(tmp_path_factory, text):
    file = tmp_path_factory.mktemp("lines") / "data.jsonl"
    file.write_text(text, encoding="utf-8", errors="replace")
    with pytest.raises(OptionError):
        calibration.load_calibration(file, SMALL)


def test_a_pipe_among_the_images_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    lines = [
        {"image": name, "prompt": "What is it?", "answer": "Red."}
        for name in ("pipe.png", "red.png")
    ]
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    found = calibration.load_calibration(file, VisionConfig(image_size=256))
    assert [sample.name for sample in found.samples] == ["red.png"]
    assert "a device, a pipe or a socket" in found.skipped[0]
