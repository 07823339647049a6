"""Conversations and several images in a prompt: each answer is that of a run from scratch."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import fastvlm_mlx
from fastvlm_mlx import Conversation
from fastvlm_mlx.errors import FastVLMError, ImageError, OptionError, PromptError
from fastvlm_mlx.language.prompt.messages import user_message
from model_export.samples import scenes

QUESTIONS = (
    "Describe the image.",
    "How many shapes are there?",
    "What number is written?",
    "Which shape is at the top left, and which one is at the bottom right of the image?",
    "What colour is it?",
)


@pytest.fixture(scope="module")
def cold(demo_bundle):
    return fastvlm_mlx.load(demo_bundle, kept_bytes=0)


@pytest.fixture
def model(cold):
    """It keeps what it computes, and counts the images that its encoder looks at."""
    warm = replace(cold, kept_bytes=10**8, _loading_s=[])
    encoder, seen = cold.encoder, []
    warm._encoders[encoder.image_size] = lambda pixels: (seen.append(1), encoder(pixels))[1]
    vars(warm)["seen"] = seen
    return warm


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    found = [folder / "first one.png", folder / "second.png"]
    for seed, path in enumerate(found):
        scenes.generate(seed, held_out=True).draw(256).save(path)
    return found


def test_every_turn_is_that_of_a_run_from_scratch(model, cold, paths):
    talk = Conversation(model, system="You are brief.", max_tokens=24)
    cached = []
    for number, question in enumerate(QUESTIONS):
        result = talk.ask(question, paths[0] if number == 0 else None).result
        again = cold.chat(talk.messages[:-1], max_tokens=24).result
        assert (result.tokens, result.text) == (again.tokens, again.text)
        assert (result.prompt_tokens, again.cached_tokens) == (again.prompt_tokens, 0)
        assert (result.timings.encode_s > 0) == (number == 0)
        cached.append(result.cached_tokens)
    assert len(model.seen) == 1
    assert [message["role"] for message in talk.messages] == ["system", *["user", "assistant"] * 5]
    # The image at first, and then the turns too.
    assert cached[0] == 0 < cached[1]
    assert cached == sorted(cached)
    assert result.prompt_tokens - cached[-1] < 64 + 24 + 30


def test_images_that_come_later(model, cold, paths):
    talk = Conversation(model, max_tokens=8)
    for question, images in (("Hello.", None), ("And this?", paths), ("And?", paths[1])):
        result = talk.ask(question, images).result
        assert result.tokens == cold.chat(talk.messages[:-1], max_tokens=8).result.tokens
    assert result.image_tokens == 3 * model.num_tokens
    assert len(model.seen) == 2
    talk.clear()
    assert talk.messages == []
    fresh = cold.generate(paths[0], QUESTIONS[0], max_tokens=8)
    assert talk.ask(QUESTIONS[0], paths[0]).result.tokens == fresh.tokens


def test_several_images_in_one_prompt(model, cold, paths):
    expected = cold.chat([user_message("What differs?", paths)], max_tokens=8).result
    encoded = [model.encode(path) for path in paths]
    for images in (paths, encoded, [paths[0], encoded[1]], tuple(paths)):
        result = model.generate(images, "What differs?", max_tokens=8)
        assert (result.tokens, result.image_tokens) == (expected.tokens, 2 * model.num_tokens)
    asked = [generation.result for generation in model.ask(paths, QUESTIONS[:2], max_tokens=8)]
    singly = [cold.generate(paths, question, max_tokens=8) for question in QUESTIONS[:2]]
    assert [each.tokens for each in asked] == [each.tokens for each in singly]
    assert asked[1].cached_tokens > 2 * model.num_tokens
    batch = list(model.batch([paths, paths[1], []], "What differs?", max_tokens=8))
    assert batch[0].tokens == expected.tokens
    assert [each.image_tokens // model.num_tokens for each in batch] == [2, 1, 0]
    # Their order matters, and it is no cache that decides.
    swapped = model.generate(paths[::-1], "What differs?", max_tokens=8, temperature=9.0, seed=1)
    assert swapped.tokens == (
        cold.generate(paths[::-1], "What differs?", max_tokens=8, temperature=9.0, seed=1).tokens
    )


def test_the_context_is_checked_before_an_image_is_looked_at(model, paths):
    context, each = model.config.text.max_position_embeddings, model.num_tokens
    few = context // each
    with pytest.raises(PromptError, match=r"of \d+ images, and the context is [\d,]+: give fewer"):
        model.generate([paths[0]] * few, QUESTIONS[0])
    with pytest.raises(PromptError, match="images of 16 tokens each and the context is"):
        model.generate(["nowhere.png"] * (few + 1), QUESTIONS[0])
    with pytest.raises(PromptError, match="role of message 1"):
        model.chat([{"role": "tool", "content": paths[0]}])
    with pytest.raises(OptionError, match="put together by hand"):
        model.generate([paths[0], replace(model.encode(paths[1]), model="")], QUESTIONS[0])
    assert len(model.seen) == 1
    with pytest.raises(ImageError, match="does not exist"):
        model.generate(["nowhere.png"], QUESTIONS[0])


def test_a_conversation_that_is_full(model, paths):
    talk = Conversation(model, max_tokens=2)
    assert talk.ask("Describe it. " * 300, paths[0]).result
    before = talk.messages
    with pytest.raises(PromptError, match=r"the conversation has [\d,]+ tokens and .*: begin"):
        talk.ask("And now? " * 300)
    assert talk.messages == before
    talk.clear()
    assert talk.ask("And now?").result.text


def test_an_answer_that_is_given_up(model, cold, paths):
    talk = Conversation(model)
    answer = talk.ask(QUESTIONS[0], paths[0])
    first = next(answer)
    with pytest.raises(PromptError, match="has not ended: iterate over it"):
        talk.ask("And?")
    assert talk.messages == [user_message(QUESTIONS[0], paths[:1])]
    answer.close()
    # What was seen of it stays.
    assert talk.messages[1:] == [{"role": "assistant", "content": first}]
    result = talk.ask("And?", max_tokens=4).result
    assert result.tokens == cold.chat(talk.messages[:-1], max_tokens=4).result.tokens
    before = talk.messages
    talk.ask("Again?").close()
    assert talk.messages == before
    talk.ask("And again?")
    talk.clear()
    assert talk.messages == []


def test_saved_and_loaded(model, cold, paths, tmp_path, monkeypatch):
    monkeypatch.chdir(paths[0].parent)
    talk = Conversation(model, system="Be brief.", max_tokens=4)
    assert talk.ask(QUESTIONS[0], [paths[0].name, paths[1]]).result
    file = tmp_path / "talk.json"
    talk.save(file)
    assert talk.ask(QUESTIONS[1]).result
    talk.save(file)
    assert [each.name for each in tmp_path.iterdir()] == ["talk.json"]
    monkeypatch.chdir(tmp_path)
    again = Conversation.load(model, file, max_tokens=4)
    assert [message["role"] for message in again.messages] == ["system", *["user", "assistant"] * 2]
    assert again.messages[1]["content"][0]["image"] == str(paths[0].resolve())
    result = again.ask(QUESTIONS[2]).result
    assert result.tokens == talk.ask(QUESTIONS[2]).result.tokens
    assert len(model.seen) == 2


def test_what_can_t_be_saved_or_loaded(model, paths, tmp_path):
    talk = Conversation(model, max_tokens=2)
    assert talk.ask("Hello.", paths[0].read_bytes()).result
    with pytest.raises(OptionError, match="image 1 of the conversation was given as bytes"):
        talk.save(tmp_path / "talk.json")
    talk.clear()
    photo = tmp_path / "photo.png"
    photo.write_bytes(paths[0].read_bytes())
    with pytest.raises(OptionError, match="exists and holds no conversation"):
        talk.save(photo)
    assert photo.read_bytes() == paths[0].read_bytes()
    with pytest.raises(OptionError, match=r"can't be written \(No such file"):
        talk.save(tmp_path / "nowhere" / "talk.json")
    message = {"role": "user", "content": [{"type": "image", "image": 7}]}
    for content in (
        "",
        "[]",
        "{}",
        "[" * 100_000,
        json.dumps({"format": "fastvlm-conversation-1", "messages": [{"role": "x"}]}),
        json.dumps({"format": "fastvlm-conversation-1", "messages": [message]}),
        json.dumps({"format": "fastvlm-conversation-2", "messages": []}),
    ):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(OptionError, match=r"bad\.json"):
            Conversation.load(model, tmp_path / "bad.json")
    os.mkfifo(tmp_path / "pipe.png")
    for image in (tmp_path / "pipe.png", "/dev/null"):
        message = {"role": "user", "content": [{"type": "image", "image": str(image)}]}
        saved = {"format": "fastvlm-conversation-1", "messages": [message]}
        (tmp_path / "bad.json").write_text(json.dumps(saved))
        with pytest.raises(OptionError, match=r"bad\.json is a device, a pipe or a socket"):
            Conversation.load(model, tmp_path / "bad.json")
    for bad in ("~nobody-of-that-name/talk.json", 7, "\0", "a" * 5000):
        with pytest.raises(OptionError):
            Conversation.load(model, bad)
        with pytest.raises(OptionError):
            talk.save(bad)
    with pytest.raises(FastVLMError, match="nowhere"):
        Conversation.load(model, Path("nowhere.json"))
    with pytest.raises(PromptError, match="the system message is of type int"):
        Conversation(model, system=7)


def test_an_event_loop_is_free_while_an_answer_comes(model, cold, paths):
    async def both():
        ticks = 0

        async def count():
            nonlocal ticks
            while True:
                await asyncio.sleep(0)
                ticks += 1

        counting = asyncio.create_task(count())
        pieces = [piece async for piece in model.astream(paths[0], QUESTIONS[0], max_tokens=8)]
        counting.cancel()
        generation = model.stream(paths[0], QUESTIONS[0])
        async for _ in generation:
            break
        half_way = asyncio.create_task(anext(model.astream(paths[0], QUESTIONS[0])))
        half_way.cancel()
        await asyncio.gather(half_way, return_exceptions=True)
        return pieces, ticks

    pieces, ticks = asyncio.run(both())
    assert "".join(pieces) == cold.generate(paths[0], QUESTIONS[0], max_tokens=8).text
    assert ticks > 10
    with pytest.raises(ImageError, match="does not exist"):
        asyncio.run(anext(model.astream("nowhere.png", "?")))


def test_one_vector_for_an_image(model, paths):
    vector, other = model.embed(paths[0]), model.embed(paths[1])
    assert (vector.dtype, vector.shape) == (np.float32, (model.config.text.hidden_size,))
    mean = np.array(model.encode(paths[0]).projected).mean(0)
    assert np.allclose(vector, mean / np.linalg.norm(mean), atol=1e-6)
    assert np.array_equal(model.embed(model.encode(paths[0])), vector)
    assert vector @ other < 0.999 < vector @ vector
