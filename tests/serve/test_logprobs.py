"""`logprobs` as the official client reads them; what they are is tested beside `generate`."""

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from serving import NAME, data_url, message

from model_export.samples import scenes

SCENES = scenes.held_out(6)
IMAGES = [scene.draw(256) for scene, _ in SCENES]
PROMPTS = [question.prompt for _, question in SCENES]
INCLUDE = ["message.output_text.logprobs"]
# Between an answer that is decoded alone and one of a batch.
TOLERANCE = 1e-4


def asked(place=0):
    return [message(PROMPTS[place], data_url(IMAGES[place]))]


def same(found, result):
    assert [each.token for each in found] == [each.text for each in result.logprobs]
    assert [bytes(each.bytes) for each in found] == [each.bytes for each in result.logprobs]
    for each, expected in zip(found, result.logprobs, strict=True):
        pairs = [(each, expected), *zip(each.top_logprobs, expected.top, strict=True)]
        for one, other in pairs:
            assert one.logprob == pytest.approx(other.logprob, abs=TOLERANCE)
            assert one.token == other.text
            assert bytes(one.bytes or []) == (other.bytes or b"")


def test_chat_completions_whole_and_in_pieces_and_together(running, client, model):
    options = {"temperature": 1.2, "seed": 9, "max_tokens": 12}
    expected = [
        model.generate(image, prompt, logprobs=2, **options)
        for image, prompt in zip(IMAGES, PROMPTS, strict=True)
    ]

    def ask(place):
        arguments = {"model": NAME, "messages": asked(place), "logprobs": True, **options}
        whole = client.chat.completions.create(**arguments, top_logprobs=2).choices[0]
        stream = client.chat.completions.create(**arguments, top_logprobs=2, stream=True)
        return whole, [chunk.choices[0] for chunk in stream]

    with ThreadPoolExecutor(len(IMAGES)) as pool:
        found = list(pool.map(ask, range(len(IMAGES))))
    for (whole, chunks), result in zip(found, expected, strict=True):
        assert whole.message.content == result.text
        same(whole.logprobs.content, result)
        told = [each for chunk in chunks if chunk.logprobs for each in chunk.logprobs.content]
        same(told, result)
        for chunk in chunks:
            if chunk.delta.content:
                text = "".join(each.token for each in chunk.logprobs.content)
                assert text == chunk.delta.content
    running.free()


def test_several_answers_and_none_of_the_others(client, model):
    arguments = {"model": NAME, "messages": asked(), "temperature": 2, "seed": 1, "max_tokens": 6}
    found = client.chat.completions.create(**arguments, n=2, logprobs=True)
    for index, choice in enumerate(found.choices):
        options = {"temperature": 2, "seed": 1 + index, "max_tokens": 6, "logprobs": 0}
        same(choice.logprobs.content, model.generate(IMAGES[0], PROMPTS[0], **options))
    assert client.chat.completions.create(**arguments).choices[0].logprobs is None
    without = client.chat.completions.create(**arguments, logprobs=False, top_logprobs=0)
    assert without.choices[0].logprobs is None


def test_responses(client, model):
    expected = model.generate(None, "Well?", max_tokens=8, logprobs=3)
    arguments = {"model": NAME, "input": "Well?", "max_output_tokens": 8}
    found = client.responses.create(**arguments, include=INCLUDE, top_logprobs=3)
    same(found.output[0].content[0].logprobs, expected)
    assert found.top_logprobs == 3
    arguments |= {"include": INCLUDE, "top_logprobs": 3}
    with client.responses.stream(**arguments) as stream:
        told = list(stream)
    final = told[-1].response
    deltas = [event for event in told if event.type == "response.output_text.delta"]
    tokens = [each for event in deltas for each in event.logprobs]
    assert [each.token for each in tokens] == [each.text for each in expected.logprobs]
    same(final.output[0].content[0].logprobs, expected)
    (done,) = [event for event in told if event.type == "response.output_text.done"]
    assert len(done.logprobs) == len(expected.logprobs)
    del arguments["include"], arguments["top_logprobs"]
    assert client.responses.create(**arguments).output[0].content[0].logprobs == []


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"top_logprobs": 3}, "add logprobs: true"),
        ({"logprobs": 5}, "logprobs"),
    ],
)
def test_what_is_refused(client, more, match):
    with pytest.raises(openai.BadRequestError, match=match) as refused:
        client.chat.completions.create(model=NAME, messages=asked(), extra_body=more)
    assert refused.value.param in ("logprobs", "top_logprobs")


def test_responses_refuse_alike(client):
    with pytest.raises(openai.BadRequestError, match="add include"):
        client.responses.create(model=NAME, input="Well?", top_logprobs=3)
    with pytest.raises(openai.BadRequestError, match="include is not supported"):
        client.responses.create(model=NAME, input="Well?", include=["reasoning.encrypted_content"])
