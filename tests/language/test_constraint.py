"""Structured answers: whatever the schema, JSON that meets it, or one sentence before the image."""

import json
import threading
from dataclasses import replace

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastvlm_mlx
from fastvlm_mlx.errors import OptionError
from fastvlm_mlx.language.model import load_model
from fastvlm_mlx.language.sampling import SamplingOptions
from fastvlm_mlx.language.structured import json_schema
from fastvlm_mlx.language.structured.constraint import Grammars
from model_export.samples import scenes

HELD_OUT = scenes.held_out(4)
IMAGES = [scene.draw(256) for scene, _ in HELD_OUT]
SHAPES = {
    "type": "object",
    "properties": {
        "count": {"type": "integer", "minimum": 0, "maximum": 20},
        "shapes": {
            "type": "array",
            "maxItems": 2,
            "items": {
                "type": "object",
                "properties": {
                    "colour": {"enum": ["red", "blue", "a very long colour's name"]},
                    "note": {"type": "string", "maxLength": 8},
                },
                "required": ["colour"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["count", "shapes"],
    "additionalProperties": False,
}
# Found out when the first quotation mark is past.
FAILS_LATE = {"type": "string", "pattern": "^((a{1000}){1000}){1000}$"}


def in_mlx(loaded):
    """The same bundle with its language model in MLX, which computes ahead, on every machine."""

    def make():
        made = load_model(loaded.bundle)
        made.set_dtype(mx.float32)
        mx.eval(made.parameters())
        return made

    return replace(loaded, model=loaded.worker.run(make))


@pytest.fixture(scope="module", params=["torch", "mlx"])
def model(request, demo_bundle):
    """Of either language model."""
    loaded = fastvlm_mlx.load(demo_bundle)
    return loaded if request.param == "torch" else in_mlx(loaded)


@pytest.fixture(scope="module")
def one(demo_bundle):
    return fastvlm_mlx.load(demo_bundle)


def meets(value, schema):
    """JSON Schema's meaning of what `schemas` draws."""
    if "anyOf" in schema:
        return any(meets(value, each) for each in schema["anyOf"])
    if "enum" in schema:
        return any(type(value) is type(each) and value == each for each in schema["enum"])
    if schema["type"] == "object":
        known = schema["properties"]
        return (
            isinstance(value, dict)
            and set(schema["required"]) <= set(value) <= set(known)
            and all(meets(each, known[key]) for key, each in value.items())
        )
    if schema["type"] == "array":
        return (
            isinstance(value, list)
            and schema["minItems"] <= len(value) <= schema["maxItems"]
            and all(meets(each, schema["items"]) for each in value)
        )
    if schema["type"] == "string":
        return isinstance(value, str) and len(value) <= schema["maxLength"]
    if schema["type"] == "number":
        return isinstance(value, int | float) and schema["minimum"] <= value <= schema["maximum"]
    kind = {"boolean": bool, "integer": int, "null": type(None)}[schema["type"]]
    return type(value) is kind and schema.get("minimum", 0) <= (value or 0) <= schema.get(
        "maximum", 1
    )


def objects(inner):
    properties = st.dictionaries(st.text(max_size=4), inner, max_size=3)
    return properties.flatmap(
        lambda known: st.fixed_dictionaries(
            {
                "type": st.just("object"),
                "properties": st.just(known),
                "required": st.lists(st.sampled_from(sorted(known)), unique=True)
                if known
                else st.just([]),
                "additionalProperties": st.just(False),
            }
        )
    )


# Letters of every kind; those without an escape of one letter are in no answer.
LETTERS = st.characters(exclude_categories=["Cc", "Cs"]) | st.sampled_from('\n\t"\\/')
VALUES = st.none() | st.booleans() | st.integers(-999, 999) | st.text(LETTERS, max_size=5)
LEAVES = st.one_of(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}]),
    st.fixed_dictionaries({"type": st.just("string"), "maxLength": st.integers(0, 6)}),
    st.fixed_dictionaries({"enum": st.lists(VALUES, min_size=1, max_size=3)}),
    st.tuples(st.sampled_from(["integer", "number"]), st.integers(-99, 99), st.integers(1, 99)).map(
        lambda drawn: {"type": drawn[0], "minimum": drawn[1], "maximum": drawn[1] + drawn[2]}
    ),
)
SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        objects(inner),
        st.lists(inner, min_size=1, max_size=3).map(lambda each: {"anyOf": each}),
        st.tuples(inner, st.integers(0, 1), st.integers(0, 1)).map(
            lambda drawn: {
                "type": "array",
                "items": drawn[0],
                "minItems": drawn[1],
                "maxItems": drawn[1] + drawn[2],
            }
        ),
    ),
    max_leaves=5,
)


@settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(schema=SCHEMAS, seed=st.integers(0, 99))
def test_an_answer_meets_its_schema(model, monkeypatch, schema, seed):
    # The trial of each in a process of its own has its own tests.
    monkeypatch.setattr(json_schema, "_try", lambda *_: None)
    for temperature in (0, 1):
        answer = model.generate(
            None, "Hm?", json_schema=schema, temperature=temperature, seed=seed, max_tokens=300
        )
        if answer.finish_reason == "length":
            # Of a number alone nothing bounds the digits.
            assert '"number"' in json.dumps(schema)
        else:
            assert meets(json.loads(answer.text), schema), answer.text


@pytest.mark.slow
@settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
@given(schema=SCHEMAS, seed=st.integers(0, 99))
def test_many_answers_meet_their_schemas(model, monkeypatch, schema, seed):
    test_an_answer_meets_its_schema.hypothesis.inner_test(model, monkeypatch, schema, seed)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="greedy", marks=pytest.mark.slow),
        pytest.param({"temperature": 1.2, "top_p": 0.9, "seed": 3}, id="sampled"),
        pytest.param({"repetition_penalty": 1.4, "stop": ["f"]}, id="penalized"),
    ],
)
def test_a_batch_answers_as_one_at_a_time(model, options):
    options |= {"json_schema": SHAPES, "max_tokens": 160}
    alone = [model.generate(image, "Shapes?", **options) for image in IMAGES]
    together = list(model.batch(IMAGES, "Shapes?", batch_size=2, **options))
    found = [(each.tokens, each.text, each.finish_reason) for each in together]
    assert found == [(each.tokens, each.text, each.finish_reason) for each in alone]
    if "stop" not in options:
        assert all(json.loads(each.text)["count"] <= 20 for each in alone)


def test_both_language_models_give_the_same_answers(one):
    other = in_mlx(one)
    options = {"json_schema": SHAPES, "max_tokens": 160}
    for image in IMAGES[:2]:
        answers = [each.generate(image, "Shapes?", **options).text for each in (one, other)]
        assert answers[0] == answers[1]


def test_free_answers_beside_a_structured_one_are_what_they_were(model):
    options = {"max_tokens": 12, "temperature": 1.5, "seed": 5}
    expected = model.generate(IMAGES[0], "Shapes?", **options)
    structured = model.stream(IMAGES[0], "Shapes?", json_schema=SHAPES, **options)
    next(structured)
    assert model.generate(IMAGES[0], "Shapes?", **options).tokens == expected.tokens
    assert structured.result.generation_tokens <= 12


def test_the_end_comes_with_the_last_bracket_and_no_sooner(model):
    whole = model.generate(IMAGES[0], "Shapes?", json_schema=SHAPES, max_tokens=200)
    assert (whole.finish_reason, whole.text[-1]) == ("stop", "}")
    assert whole.generation_tokens == len(whole.tokens)
    options = {"json_schema": SHAPES}
    just = model.generate(IMAGES[0], "Shapes?", max_tokens=len(whole.tokens), **options)
    assert (just.finish_reason, just.text) == ("stop", whole.text)
    cut = model.generate(IMAGES[0], "Shapes?", max_tokens=len(whole.tokens) - 1, **options)
    assert (cut.finish_reason, cut.text) == ("length", whole.text[: len(cut.text)])
    stopped = model.generate(IMAGES[0], "Shapes?", stop=["shapes"], **options)
    assert (stopped.finish_reason, stopped.text) == ("stop", whole.text.partition("shapes")[0])
    # A number has no last bracket: there the end token is what ends.
    options = {"json_schema": {"type": "integer", "minimum": 10}, "temperature": 1.0, "seed": 1}
    number = model.generate(None, "Hm?", **options)
    assert int(number.text) >= 10
    assert number.generation_tokens == len(number.tokens) + 1


def test_neither_control_tokens_nor_placeholders_come(one):
    added = set(one.tokenizer.get_added_tokens_decoder()) | {one.config.image_token_index}
    schema = {"type": "string", "minLength": 100}
    options = {"temperature": 100.0, "seed": 1, "max_tokens": 150}
    answer = one.generate(None, "Hm?", json_schema=schema, **options)
    assert not added & set(answer.tokens)


def test_a_schema_is_a_dict_a_text_or_a_model_and_keeps_its_order():
    class Model:
        @classmethod
        def model_json_schema(cls):
            return SHAPES

    given_as = [SHAPES, json.dumps(SHAPES, indent=4), Model]
    options = [SamplingOptions(json_schema=each) for each in given_as]
    assert options[0] == options[1] == options[2] == replace(options[0])
    assert list(json.loads(options[0].json_schema)["properties"]) == ["count", "shapes"]


@pytest.mark.parametrize(
    ("schema", "open_ones"),
    [
        ({"properties": {"a": {"properties": {"b": {}}}}}, 0),
        ({"properties": {"a": {}}, "additionalProperties": True}, 1),
        ({"properties": {"a": {}}, "required": ["b"]}, 1),
        ({"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}, 2),
        ({"properties": {"a": {}}, "anyOf": [{"properties": {"b": {}}}]}, 2),
        ({"enum": [{"properties": {"a": 1}}]}, 1),
    ],
)
def test_properties_that_are_not_named_are_left_out_where_they_may_be(schema, open_ones):
    text = json_schema.schema_text(schema)
    assert text.count('"properties"') - text.count('"additionalProperties": false') == open_ones
    assert json_schema.schema_text(text) == text


def test_a_schema_can_t_do_away_with_the_rules(one):
    schema = {"x-guidance": {"lenient": True, "whitespace_pattern": ".*"}, "type": "boolean"}
    assert one.generate(None, "Hm?", json_schema=schema).text in ("true", "false")
    # Written in another way, `\n` would pass for a key that the schema does not name.
    schema = {
        "type": "object",
        "properties": {"\n": {"type": "null"}},
        "additionalProperties": {"const": 3},
    }
    constraint = one._grammars.constraint(json_schema.schema_text(schema))
    follow = constraint._matcher.validate_tokens
    for text, passes in (('{"\\n": null}', True), ('{"\\u000a": 3}', False), ('{"q": 3}', True)):
        ids = one.tokenizer.encode(text, add_special_tokens=False).ids
        assert (follow(ids) == len(ids)) is passes


def chain(count):
    """Definitions each of which refers to the next one."""
    names = [f"d{index}" for index in range(count)]
    defs = {
        name: {"properties": {"x": {"$ref": f"#/$defs/{after}"}}}
        for name, after in zip(names, [*names[1:], "end"], strict=True)
    }
    return {"$ref": "#/$defs/d0", "$defs": defs | {"end": {"type": "null"}}}


def intersection(count):
    return {"allOf": [{"type": "string", "pattern": f".*a.{{{n}}}$"} for n in range(5, 5 + count)]}


DEEP = {}
for _ in range(100_000):
    DEEP = {"items": DEEP}
CYCLE = {}
CYCLE["properties"] = {"x": CYCLE}
REFUSED = {
    "a number": (3, "is of type int"),
    "an instance": (object(), "is of type object"),
    "no JSON": ("{", "can't be read as JSON"),
    "half a character": ('{"const": "\udc00"}', "can't be read as JSON"),
    "a list": ("[]", "holds a list, expected a JSON object"),
    "bytes in it": ({"const": b"x"}, "can't be written as JSON"),
    "NaN in it": ({"const": float("nan")}, "can't be written as JSON"),
    "itself in it": (CYCLE, "can't be written as JSON"),
    "deep": ('{"a":' * 40_000 + "1" + "}" * 40_000, "nested too deeply"),
    "deeper than any model": ('{"a":' * 70 + "1" + "}" * 70, "nested more than 64 deep"),
    "deep, in Python": (DEEP, "nested too deeply"),
    "long": ({"description": "x" * 300_000}, "expected at most 256,000"),
    "an unknown type": ({"type": "strnig"}, "Invalid type"),
    "not": ({"not": {"type": "string"}}, "Unimplemented keys"),
    "unique": ({"type": "array", "uniqueItems": True}, "Unimplemented keys"),
    "a control character": ({"enum": ["a\x01b"]}, "the control character U+0001"),
    "one deep in it": ({"items": {"const": [{"a": "\x7f"}]}}, "the control character U+007F"),
    "a number that is rounded": ({"const": 2**53 + 1}, "beyond the 9,007,199,254,740,992"),
    "counted": ({"items": {"minProperties": 2}}, "minProperties is 2"),
    "overlapping": ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
    "impossible": ({"type": "integer", "minimum": 5, "maximum": 3}, "Unsatisfiable"),
    "nothing but itself": ({"$ref": "#"}, "no JSON meets it"),
    "elsewhere": ({"$ref": "http://127.0.0.1:9/a.json"}, "does not fetch"),
    "a file": ({"$ref": "file:///etc/passwd"}, "does not fetch"),
    "no definition": ({"$ref": "#/$defs/none"}, "does not exist"),
    "lookahead": ({"type": "string", "pattern": "(?=a)"}, "look-around"),
    "branches": (
        {"allOf": [{"anyOf": [{"required": [f"{i}{j}"]} for j in "ab"]} for i in range(40)]},
        "schema too large",
    ),
    "hours": (intersection(30), "make the schema simpler"),
}


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        pytest.param(*each, id=name, marks=[pytest.mark.slow] if name == "hours" else [])
        for name, each in REFUSED.items()
    ],
)
def test_what_can_t_be_followed_is_one_sentence_before_the_image(one, schema, said):
    with pytest.raises(OptionError) as raised:
        one.generate("nowhere.png", "Hm?", json_schema=schema)
    message = str(raised.value)
    assert said in message
    assert len(message) < 500


def test_a_batch_refuses_a_schema_at_once(one):
    with pytest.raises(OptionError, match="Invalid type"):
        one.batch(["nowhere.png"], "Hm?", json_schema={"type": "strnig"})


def test_many_definitions_take_no_stack(one):
    answer = one.generate(None, "Hm?", json_schema=chain(2000), max_tokens=8)
    assert answer.finish_reason in ("stop", "length")


def test_a_failure_half_way_is_that_answer_s_alone(model):
    with pytest.raises(OptionError, match="any further in this answer"):
        model.generate(None, "Hm?", json_schema=FAILS_LATE)
    answers = model.batch([None, None, None], "Hm?", json_schema=FAILS_LATE)
    for _ in range(3):
        with pytest.raises(OptionError, match="make the schema simpler"):
            next(answers)
    assert next(answers, None) is None
    assert model.generate(None, "Hm?", json_schema={"const": 1}).text == "1"


def test_many_threads_prepare_once(one, monkeypatch):
    fresh, prepared, prepare = replace(one), [], Grammars._prepare
    monkeypatch.setattr(
        Grammars, "_prepare", lambda grammars: prepared.append(1) or prepare(grammars)
    )
    answers = []

    def ask(number):
        schema = {"const": f"number {number % 3}"}
        answers.append((number, fresh.generate(None, "Hm?", json_schema=schema).text))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [(number, f'"number {number % 3}"') for number in range(6)]
    assert len(prepared) == 1
