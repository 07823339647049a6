"""Answers by a schema as typed columns, and rows that are errors tried again."""

import json
import os
from dataclasses import replace

import pyarrow.parquet as pq
import pydantic
import pytest

import fastvlm_mlx
from fastvlm_mlx.errors import DestinationError
from fastvlm_mlx.language.sampling import SamplingOptions
from fastvlm_mlx.mapping import Job, map_folder
from fastvlm_mlx.mapping.journal import Journal
from fastvlm_mlx.mapping.structured import cells, columns, value_of
from model_export.samples import scenes

SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green"]},
        "how_many": {"enum": [1, 2]},
        "share": {"const": 0.5},
        "whole": {"type": "boolean"},
        "nothing": {"type": "null"},
        "list": {"const": [1, {"a": "é"}]},
        "text": {"const": "x"},
    },
    "required": ["colour", "how_many", "share", "whole", "nothing", "list", "text"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("images")
    for seed in range(4):
        scenes.generate(seed).draw(256).save(path / f"{seed}.png")
    (path / "broken.png").write_bytes((path / "0.png").read_bytes()[:200])
    return path


@pytest.fixture(scope="module")
def model(demo_bundle):
    return fastvlm_mlx.load(demo_bundle, kept_bytes=0)


@pytest.fixture
def job(demo_bundle, folder, model, monkeypatch):
    monkeypatch.setattr(Job, "load", lambda _: model)
    return Job(demo_bundle, folder, "Well?", batch_size=2)


def read(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_a_column_for_each_property(job, tmp_path):
    job = replace(job, options=SamplingOptions(json_schema=SCHEMA))
    out = tmp_path / "a.parquet"
    map_folder(job, out)
    table = pq.read_table(out)
    types = {field.name: str(field.type) for field in table.schema}
    assert {name: types[name] for name in ("colour", "how_many", "share", "whole", "list")} == {
        "colour": "string",
        "how_many": "int64",
        "share": "double",
        "whole": "bool",
        "list": "string",
    }
    found = {row["image"]: row for row in table.to_pylist()}
    lines = {row["image"]: row for row in read(tmp_path / "a.parquet.jsonl")}
    assert found.keys() == lines.keys()
    for name, line in lines.items():
        row, value = found[name], line["json"]
        if name == "broken.png":
            assert value is None
            assert row["error"] == line["error"] != None  # noqa: E711
            assert row["colour"] is row["json.text"] is None
            continue
        assert line["error"] is None
        assert value == json.loads(line["text"])
        assert list(value) == SCHEMA["required"]
        assert {name: row[name] for name in ("colour", "how_many", "share", "whole")} == {
            name: value[name] for name in ("colour", "how_many", "share", "whole")
        }
        assert row["nothing"] is None
        assert json.loads(row["list"]) == [1, {"a": "é"}]
        # The answer's own column keeps its name.
        assert (row["text"], row["json.text"]) == (line["text"], "x")
    assert map_folder(job, out).new == 0


def test_an_answer_that_was_cut_is_an_error(job, tmp_path, fastvlm):
    job = replace(job, options=SamplingOptions(json_schema=SCHEMA, max_tokens=3))
    out = tmp_path / "a.parquet"
    tally = map_folder(job, out)
    assert (tally.done, tally.broken) == (5, 5)
    for row in pq.read_table(out).to_pylist():
        if row["image"] != "broken.png":
            expected = f"the answer about {row['image']} was ended by --max-tokens before"
            assert row["error"].startswith(expected)
            assert row["text"]
        assert row["colour"] is None


def test_without_a_schema_a_row_has_no_value(job, tmp_path):
    map_folder(replace(job, options=SamplingOptions(max_tokens=1)), tmp_path / "a.jsonl")
    assert not any("json" in row for row in read(tmp_path / "a.jsonl"))


class Kind(pydantic.BaseModel):
    name: str


class Answer(pydantic.BaseModel):
    title: str | None
    count: int | None = None
    mean: int | float
    either: int | str
    kind: Kind
    kinds: list[Kind]


def test_the_types_of_pydantic():
    schema = json.dumps(Answer.model_json_schema())
    made = columns(schema, ())
    assert {column.name: column.kind for column in made} == {
        "title": "string",
        "count": "integer",
        "mean": "number",
        "either": "json",
        "kind": "json",
        "kinds": "json",
    }
    answer = Answer(title=None, mean=1, either="a", kind=Kind(name="é"), kinds=[])
    assert cells(made, answer.model_dump_json().encode()) == {
        "title": None,
        "count": None,
        "mean": 1.0,
        "either": '"a"',
        "kind": '{"name":"é"}',
        "kinds": "[]",
    }


@pytest.mark.parametrize(
    "schema",
    [
        "true",
        '{"type": "array"}',
        '{"$ref": "#"}',
        '{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}',
        '{"properties": []}',
        '{"properties": {"\\ud800": {}}}',
    ],
)
def test_what_is_no_object_has_no_columns(schema):
    assert columns(schema, ()) == []


def test_a_reference_to_the_whole():
    schema = '{"$ref": "#/$defs/a", "$defs": {"a": {"properties": {"b": {"$ref": "#/$defs/a"}}}}}'
    assert [(column.key, column.kind) for column in columns(schema, ())] == [("b", "json")]


def test_what_a_column_can_not_hold_is_null():
    made = columns('{"properties": {"a": {"type": "integer"}, "b": {"type": "number"}}}', ())
    assert cells(made, b'{"a":9223372036854775808,"b":1%b}' % (b"0" * 400)) == {
        "a": None,
        "b": None,
    }
    assert cells(made, b'{"a":1.5,"b":"x"}') == {"a": None, "b": None}
    assert cells(made, b"[1]") == cells(made, None) == {"a": None, "b": None}


@pytest.mark.parametrize(
    ("text", "cut", "expected"),
    [
        ('{"a":\n 1.50}', False, b'{"a":1.50}'),
        ('{"a": 1}', True, b'{"a":1}'),
        ('{"a": 1', True, None),
        # Of 123, say.
        ("12", True, None),
        ("12", False, b"12"),
        ("true", True, b"true"),
        ('{"a": 1e999}', False, None),
        ('"\\ud800"', False, None),
        ("[" * 20_000 + "]" * 20_000, False, None),
        ("NaN", False, None),
    ],
)
def test_a_value_is_whole_and_on_one_line_or_none(text, cut, expected):
    assert value_of(text, cut=cut) == expected


@pytest.fixture
def damaged(tmp_path):
    """A folder of three images, two of which can't be read until `mend` is called."""
    path = tmp_path / "images"
    path.mkdir()
    for seed in range(3):
        scenes.generate(seed).draw(256).save(path / f"{seed}.png")
    whole = {name: (path / name).read_bytes() for name in ("1.png", "2.png")}
    for name in whole:
        (path / name).write_bytes(b"x")

    def mend():
        for name, data in whole.items():
            (path / name).write_bytes(data)

    return path, mend


def errors(path):
    return {row["image"]: row["error"] is not None for row in read(path)}


def test_errors_are_tried_again_once_each(job, damaged, tmp_path):
    path, mend = damaged
    job = replace(job, folder=path, options=SamplingOptions(max_tokens=1))
    out = tmp_path / "a.jsonl"
    assert map_folder(job, out).broken == 2
    out.chmod(0o640)
    first = read(out)
    # One that is gone keeps its row.
    (path / "2.png").rename(tmp_path / "2.png")
    asked = []
    again = map_folder(
        job, out, retry_errors=True, progress=lambda _, row: asked.append(row and row.image)
    )
    assert asked == [None, "1.png"]
    assert (again.new, again.broken) == (1, 1)
    assert errors(out) == {"0.png": False, "1.png": True, "2.png": True}
    (tmp_path / "2.png").rename(path / "2.png")
    mend()
    assert map_folder(job, out).new == 0
    again = map_folder(job, out, retry_errors=True)
    assert (again.new, again.broken, again.complete) == (2, 0, True)
    assert len(read(out)) == 3
    assert errors(out) == {"0.png": False, "1.png": False, "2.png": False}
    assert out.stat().st_mode & 0o777 == 0o640
    assert read(out)[0] == next(row for row in first if row["image"] == "0.png")
    assert {each.name for each in tmp_path.iterdir()} == {"a.jsonl", "a.jsonl.run", "images"}
    rows = out.read_bytes()
    assert map_folder(job, out, retry_errors=True).new == 0
    assert out.read_bytes() == rows


@pytest.mark.parametrize("at", ["before the rename", "after it", "after the first row"])
def test_a_run_that_ends_while_it_tries_again_loses_no_answer(
    job, damaged, tmp_path, monkeypatch, at
):
    path, mend = damaged
    job = replace(job, folder=path, options=SamplingOptions(max_tokens=1))
    out = tmp_path / "a.jsonl"
    map_folder(job, out)
    mend()
    count = 0

    def ended(*_, **__):
        raise KeyboardInterrupt

    def second(journal, data):
        nonlocal count
        count += 1
        return append(journal, data) if count == 1 else ended()

    append = Journal._append
    with monkeypatch.context() as patched:
        if at == "before the rename":
            patched.setattr(os, "replace", ended)
        else:
            patched.setattr(Journal, "_append", ended if at == "after it" else second)
        with pytest.raises(KeyboardInterrupt):
            map_folder(job, out, retry_errors=True)
    left = {"before the rename": 3, "after it": 1, "after the first row": 2}[at]
    assert len(read(out)) == len(errors(out)) == left
    assert errors(out)["0.png"] is False
    assert map_folder(job, out, retry_errors=True).complete
    assert len(read(out)) == len(errors(out)) == 3
    assert not list(tmp_path.glob(".*"))


def test_what_was_written_meanwhile_is_left_as_it_is(job, damaged, tmp_path):
    path, _ = damaged
    job = replace(job, folder=path, options=SamplingOptions(max_tokens=1))
    out = tmp_path / "a.jsonl"
    map_folder(job, out)

    def meanwhile(tally, row):
        out.write_text("mine")

    with pytest.raises(DestinationError, match="was written to by something else"):
        map_folder(job, out, retry_errors=True, progress=meanwhile)
    assert out.read_text() == "mine"


def test_quiet_says_errors_alone(fastvlm, job, damaged, tmp_path):
    path, mend = damaged
    out = tmp_path / "a.jsonl"
    words = ["map", job.bundle, path, "--prompt", "Well?", "--out", out, "--max-tokens", 1]
    status, printed, said = fastvlm(*words, "--quiet")
    assert (status, printed) == (1, "")
    assert len(said.splitlines()) == 2
    assert all(name in said for name in ("1.png", "2.png"))
    mend()
    assert fastvlm(*words, "--quiet", "--retry-errors") == (0, "", "")
    status, printed, said = fastvlm(*words, "--quiet", "--json")
    assert (status, json.loads(printed)["answered"], said) == (0, 3, "")
