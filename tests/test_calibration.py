"""Calibration data: what is read, what is skipped and said, what is refused."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastvlm_mlx.config import VisionConfig
from fastvlm_mlx.errors import OptionError
from model_export import calibration
from model_export.pictures import gate_pictures

SMALL = VisionConfig(image_size=256)


def test_without_data_there_are_scenes_or_a_photograph_and_none_of_the_gates():
    for vision in (SMALL, VisionConfig()):
        own = calibration.load_calibration(None, vision)
        assert all(picture.questions for picture in own.pictures)
        assert not {p.name for p in own.pictures} & {p.name for p in gate_pictures(vision)}
        assert own.digest == calibration.load_calibration(None, vision).digest
        assert own.notes() == []


def test_a_directory(tmp_path):
    (tmp_path / "below").mkdir()
    for name, colour in (("a.png", "red"), ("below/b.JPG", "green")):
        Image.new("RGB", (900, 300), colour).save(tmp_path / name)
    (tmp_path / "c.jpg").write_bytes(b"no picture")
    (tmp_path / "notes.txt").write_text("not looked at")
    found = calibration.load_calibration(tmp_path, SMALL)
    assert [p.name for p in found.pictures] == ["a.png", "below/b.JPG"]
    assert found.pictures[0].image.size == (512, 171)
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
    assert [p.questions for p in found.pictures] == [(("One?", "Yes."), ("Two?", "No."))]
    assert len(found.skipped) == 3
    assert "line 4" in found.notes()[0]
    assert "line 6 is not JSON" in found.notes()[0]
    assert "gone.png" in found.notes()[0]


def test_a_large_collection_is_read_in_part(tmp_path):
    for i in range(100):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / f"{i:03}.png")
    found = calibration.load_calibration(tmp_path, SMALL)
    names = [p.name for p in found.pictures]
    assert len(names) == calibration.MAX_PICTURES
    assert names == sorted(set(names))
    assert names[-1] > "090"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist"),
        ({}, "holds no picture that can be used: expected"),
        ({"a.png": b"x"}, r"holds no picture that can be used \(calibration: 1 skipped \(.*a\.png"),
        (b"", "holds no picture"),
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
