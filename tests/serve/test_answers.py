"""What the official client gets: the answers of `FastVLM`, in OpenAI's forms."""

import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import openai
import pydantic
import pytest
from serving import NAME, busy, client_of, data_url, message, serving, until

import fastvlm_mlx
from fastvlm_mlx.fastvlm import FastVLM
from fastvlm_mlx.language.decode import Batch
from model_export.samples import scenes

SCENES = scenes.held_out(8)
IMAGES = [scene.draw(256) for scene, _ in SCENES]
URLS = [data_url(image) for image in IMAGES]
PROMPTS = [question.prompt for _, question in SCENES]
LONG = {"max_tokens": 64, "temperature": 2.0, "seed": 1}


def asked(place=0):
    return [message(PROMPTS[place], URLS[place])]


def test_an_answer_is_that_of_generate(client, model):
    expected = model.generate(IMAGES[0], PROMPTS[0])
    found = client.chat.completions.create(model=NAME, messages=asked())
    choice = found.choices[0]
    assert choice.message.content == expected.text
    assert (choice.message.role, choice.finish_reason) == ("assistant", "stop")
    usage = found.usage
    assert usage.prompt_tokens == expected.prompt_tokens
    assert usage.completion_tokens == expected.generation_tokens
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 < usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens


@pytest.mark.parametrize("include_usage", [True, False])
def test_a_stream_is_the_answer_in_pieces(client, model, include_usage):
    expected = model.generate(IMAGES[0], PROMPTS[0], max_tokens=7, stop=["zz"])
    stream = client.chat.completions.create(
        model=NAME,
        messages=asked(),
        max_completion_tokens=7,
        stop="zz",
        stream=True,
        stream_options={"include_usage": include_usage},
    )
    chunks = list(stream)
    told = [chunk for chunk in chunks if chunk.choices]
    assert told[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content for chunk in told]
    assert "".join(piece or "" for piece in pieces) == expected.text
    assert len([piece for piece in pieces if piece]) > 1
    assert told[-1].choices[0].finish_reason == expected.finish_reason == "length"
    assert len({chunk.id for chunk in chunks}) == 1
    usages = [chunk.usage for chunk in chunks if chunk.usage]
    assert [usage.completion_tokens for usage in usages] == [7] * include_usage


def test_several_answers_are_drawn_with_one_seed_after_the_other(client, model):
    options = {"temperature": 2, "max_tokens": 16}
    expected = [model.generate(None, "Well?", seed=5 + i, **options) for i in range(8)]
    arguments = {"model": NAME, "messages": [message("Well?")], "seed": 5, "n": 8, **options}
    found = client.chat.completions.create(**arguments)
    texts = [choice.message.content for choice in found.choices]
    assert texts == [result.text for result in expected]
    assert found.usage.completion_tokens == sum(each.generation_tokens for each in expected)
    streamed = [""] * 8
    for chunk in client.chat.completions.create(**arguments, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts
    assert len(set(texts)) > 1


def test_a_conversation_with_several_images(client, model):
    image = [{"type": "image", "image": IMAGES[0]}, {"type": "image", "image": IMAGES[1]}]
    text = {"type": "text", "text": PROMPTS[0]}
    messages = [
        {"role": "system", "content": "Be brief.\n\nBe kind."},
        {"role": "user", "content": [*image, text]},
        {"role": "assistant", "content": "A circle."},
        {"role": "user", "content": PROMPTS[1]},
    ]
    expected = model.chat(messages, max_tokens=8).result
    sent = [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": "Be kind."},
        message(PROMPTS[0], URLS[0], URLS[1]),
        *messages[2:],
    ]
    found = client.chat.completions.create(model=NAME, messages=sent, max_tokens=8)
    assert found.choices[0].message.content == expected.text
    assert found.usage.prompt_tokens == expected.prompt_tokens


def test_responses(client, model):
    expected = model.generate(IMAGES[0], PROMPTS[0])
    content = [
        {"type": "input_image", "image_url": URLS[0], "detail": "auto"},
        {"type": "input_text", "text": PROMPTS[0]},
    ]
    arguments = {"model": NAME, "input": [{"role": "user", "content": content}]}
    found = client.responses.create(**arguments)
    assert (found.output_text, found.status) == (expected.text, "completed")
    assert found.usage.output_tokens == expected.generation_tokens
    with client.responses.stream(**arguments) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert "".join(deltas) == final.output_text == expected.text
    assert len(deltas) > 1
    short = client.responses.create(model=NAME, input="Hello", max_output_tokens=1)
    assert short.status == "incomplete"
    assert short.incomplete_details.reason == "max_output_tokens"


def test_each_image_has_its_detail(mlx_bundle):
    model = fastvlm_mlx.load(mlx_bundle, image_size=128)
    tokens = {"auto": 4, "low": 4, "high": 16, "original": 20}
    with serving(model) as running:
        client = client_of(running)
        for detail, count in tokens.items():
            expected = model.generate(IMAGES[0], PROMPTS[0], detail=detail, max_tokens=8)
            assert expected.image_tokens == count
            url = {"url": URLS[0], "detail": detail}
            parts = [{"type": "image_url", "image_url": url}, {"type": "text", "text": PROMPTS[0]}]
            messages = [{"role": "user", "content": parts}]
            found = client.chat.completions.create(model=NAME, messages=messages, max_tokens=8)
            assert found.choices[0].message.content == expected.text
            assert found.usage.prompt_tokens == expected.prompt_tokens
        parts = [
            {"type": "input_image", "image_url": URLS[0], "detail": "original"},
            {"type": "input_text", "text": PROMPTS[0]},
        ]
        asked_for = [{"role": "user", "content": parts}]
        answer = client.responses.create(model=NAME, input=asked_for, max_output_tokens=8)
        assert answer.output_text == expected.text
        assert answer.usage.input_tokens == expected.prompt_tokens
        parts[0]["detail"] = "medium"
        with pytest.raises(openai.BadRequestError, match="detail"):
            client.responses.create(model=NAME, input=asked_for)


def test_json_by_a_schema(client):
    class Count(pydantic.BaseModel):
        how_many: Literal["one", "two"]

    found = client.chat.completions.parse(model=NAME, messages=asked(), response_format=Count)
    assert isinstance(found.choices[0].message.parsed, Count)
    kind = {"type": "object", "properties": {"a": {"enum": ["x"]}}, "required": ["a"]}
    form = {"type": "json_schema", "name": "a", "schema": {**kind, "additionalProperties": False}}
    answer = client.responses.create(model=NAME, input="Well?", text={"format": form})
    assert json.loads(answer.output_text) == {"a": "x"}


def test_sixteen_at_once_get_the_answers_of_one_at_a_time(running, client, model):
    kinds = [{}, {"temperature": 1.5, "seed": 3}, {"stop": [" a"]}]
    questions = [(place, kinds[place % 3]) for place in range(8)] * 3
    expected = {
        (place, str(kind)): model.generate(IMAGES[place], PROMPTS[place], **kind, max_tokens=16)
        for place, kind in questions[:8]
    }
    together = 0

    def ask(question):
        nonlocal together
        place, kind = question
        found = client.chat.completions.create(
            model=NAME, messages=asked(place), max_tokens=16, **kind
        )
        together = max(together, running.service.places.taken)
        return found.choices[0].message.content

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(ask, questions))
    assert found == [expected[place, str(kind)].text for place, kind in questions]
    assert together > 1
    running.free()


def test_who_goes_away_frees_a_place_and_disturbs_nobody(running, client, model):
    expected = client.chat.completions.create(model=NAME, messages=asked(2))
    stream = client.chat.completions.create(model=NAME, messages=asked(), stream=True, **LONG)
    next(iter(stream))
    stream.close()
    # Nor does who goes away before the first token.
    with busy(model):
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.2).chat.completions.create(
                model=NAME, messages=asked(), n=8, **LONG
            )
        running.free()
    found = client.chat.completions.create(model=NAME, messages=asked(2))
    assert found.choices[0].message.content == expected.choices[0].message.content


def test_a_full_queue_is_told_when_to_come_again(model):
    with serving(model, batch_size=1, queue=1) as running, ThreadPoolExecutor(2) as pool:
        client = client_of(running)

        def ask(**more):
            return client.chat.completions.create(model=NAME, messages=asked(), **more)

        with busy(model):
            waiting = [pool.submit(ask) for _ in range(2)]
            until(lambda: running.service.places.taken == 2)
            with pytest.raises(openai.RateLimitError) as refused:
                ask()
        assert int(refused.value.response.headers["Retry-After"]) >= 1
        assert refused.value.code == "rate_limit_exceeded"
        texts = {each.result().choices[0].message.content for each in waiting}
        assert len(texts) == 1
        with pytest.raises(openai.RateLimitError):
            ask(n=3)


def test_a_fault_of_one_is_not_that_of_another(running, client, model, monkeypatch):
    begin = FastVLM._begin

    def failing(self, prepared):
        if prepared[0].options.seed == 666:
            raise RuntimeError("out of memory")
        return begin(self, prepared)

    monkeypatch.setattr(FastVLM, "_begin", failing)
    stream = client.chat.completions.create(model=NAME, messages=asked(), stream=True)
    first = next(iter(stream))
    with pytest.raises(openai.InternalServerError) as error:
        client.chat.completions.create(model=NAME, messages=asked(), seed=666)
    assert "memory" not in str(error.value)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in [first, *stream])
    assert text == model.generate(IMAGES[0], PROMPTS[0]).text


def test_a_batch_that_fails_is_begun_anew(running, client, model, monkeypatch):
    advance = Batch.advance
    monkeypatch.setattr(Batch, "advance", lambda self: 1 / 0)
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model=NAME, messages=asked())
    monkeypatch.setattr(Batch, "advance", advance)
    assert client.chat.completions.create(model=NAME, messages=asked()).choices
    running.free()


def test_models_health_and_metrics(running, client):
    assert [each.id for each in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")
    with urllib.request.urlopen(f"{running.url}/health") as answer:
        assert answer.status == 200
    with urllib.request.urlopen(f"{running.url}/metrics") as answer:
        text = answer.read().decode()
    assert 'fastvlm_requests_total{path="/v1/models",status="200"}' in text
    assert 'fastvlm_tokens_total{kind="generated"}' in text
