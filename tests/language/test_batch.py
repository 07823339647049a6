"""Many images at once: the answers of one at a time, in their order, from a stream without end."""

import gc
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest

import fastvlm_mlx
from fastvlm_mlx.errors import FastVLMError, ImageError, OptionError, PromptError
from fastvlm_mlx.image.preprocess import ImageProcessor
from model_export.samples import scenes

HELD_OUT = scenes.held_out(9)
IMAGES = [scene.draw(256) for scene, _ in HELD_OUT]
PROMPTS = [question.prompt for _, question in HELD_OUT]
LONG = {"max_tokens": 40, "temperature": 5.0, "seed": 1}


@pytest.fixture(scope="module", params=["app", "mlx"])
def model(request, demo_bundle):
    if request.param == "app":
        return fastvlm_mlx.load(demo_bundle)
    return fastvlm_mlx.load(request.getfixturevalue("mlx_bundle"))


@pytest.mark.parametrize("kept_bytes", [0, 10**8])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 1.5, "seed": 3}, {"repetition_penalty": 1.4, "stop": ["e"]}],
    ids=["greedy", "sampled", "penalized"],
)
def test_answers_are_those_of_one_at_a_time(model, options, kept_bytes):
    model = replace(model, kept_bytes=kept_bytes)
    options |= {"max_tokens": 12}
    images = [*IMAGES[:7], None, IMAGES[0]]
    expected = [
        model.generate(image, prompt, **options)
        for image, prompt in zip(images, PROMPTS, strict=True)
    ]
    found = list(model.batch(images, PROMPTS, batch_size=3, **options))
    for one, each in zip(expected, found, strict=True):
        assert (each.prompt, each.text, each.tokens) == (one.prompt, one.text, one.tokens)
        assert (each.finish_reason, each.generation_tokens) == (
            one.finish_reason,
            one.generation_tokens,
        )
        assert each.timings.ttft_s > 0
    assert any(each.generation_tokens != found[0].generation_tokens for each in found)


def test_images_are_taken_as_there_is_room_and_prepared_beside(model, monkeypatch):
    taken, threads, prepare = 0, set(), ImageProcessor.__call__

    def prepared(processor, image):
        threads.add(threading.current_thread().name.rpartition("_")[0])
        return prepare(processor, image)

    def images():
        nonlocal taken
        for taken in count(1):
            yield IMAGES[taken % 9]

    monkeypatch.setattr(ImageProcessor, "__call__", prepared)
    answers = model.batch(images(), "What is it?", max_tokens=2, batch_size=2)
    for given, answer in enumerate(islice(answers, 20), 1):
        assert answer.generation_tokens in (1, 2)
        # Two that are decoded, two ready, and some whose answers came before their turn.
        assert taken <= given + 8
    assert threads == {"fastvlm-prepare"}
    answers.close()
    assert list(answers) == []


def test_what_is_wrong_with_one_image_is_raised_in_its_place(model, tmp_path):
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(b"no image")
    features = model.encode(IMAGES[0])
    images = [IMAGES[0], damaged, IMAGES[1], replace(features, model="another"), features]
    prompts = ["What is it?", "What is it?", " ", "What is it?", "What is it?"]
    answers = model.batch(images, prompts, max_tokens=3)
    found = []
    for _ in images:
        try:
            found.append(next(answers).tokens)
        except FastVLMError as error:
            found.append(type(error))
    expected = model.generate(features, "What is it?", max_tokens=3).tokens
    assert found == [expected, ImageError, PromptError, OptionError, expected]
    assert next(answers, None) is None


def test_completed_gives_each_answer_as_it_ends(model, tmp_path):
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(b"no image")
    images = [IMAGES[0], damaged, *IMAGES[1:]]
    prompts = [PROMPTS[0], "What is it?", *PROMPTS[1:]]
    ordered = model.batch(images, prompts, batch_size=4, max_tokens=12)
    expected = [next(ordered).tokens]
    with pytest.raises(ImageError):
        next(ordered)
    expected += [ImageError, *(answer.tokens for answer in ordered)]
    found = list(model.batch(images, prompts, batch_size=4, max_tokens=12).completed())
    assert sorted(index for index, _ in found) == list(range(len(images)))
    # A long answer holds up none that is shorter.
    assert [index for index, _ in found] != list(range(len(images)))
    for index, answer in found:
        assert getattr(answer, "tokens", type(answer)) == expected[index]


@pytest.mark.parametrize(("images", "prompts"), [(2, 3), (3, 2)])
def test_as_many_prompts_as_images(model, images, prompts):
    answers = model.batch(IMAGES[:images], PROMPTS[:prompts], max_tokens=2)
    assert [next(answers).prompt for _ in range(2)] == PROMPTS[:2]
    with pytest.raises(PromptError, match=r"there are 2 .* and more .*: expected as many"):
        next(answers)


@pytest.mark.parametrize(
    ("arguments", "options", "error"),
    [
        (("photo.jpg", "What is it?"), {}, ImageError),
        ((Path("photo.jpg"), "What is it?"), {}, ImageError),
        ((IMAGES[0], "What is it?"), {}, ImageError),
        ((IMAGES, None), {}, PromptError),
        ((IMAGES, "What is it?"), {"batch_size": 0}, OptionError),
        ((IMAGES, "What is it?"), {"batch_size": 2.0}, OptionError),
        ((IMAGES, "What is it?"), {"warmth": 2}, OptionError),
        ((IMAGES, "What is it?"), {"top_k": 10**6}, OptionError),
    ],
)
def test_what_can_be_known_at_once_is_said_at_once(model, arguments, options, error):
    with pytest.raises(error):
        model.batch(*arguments, **options)


def test_a_batch_and_single_answers_and_another_batch_at_once(model):
    expected = [
        model.generate(image, prompt, max_tokens=8).tokens
        for image, prompt in zip(IMAGES, PROMPTS, strict=True)
    ]
    first = model.batch(IMAGES, PROMPTS, batch_size=4, max_tokens=8)
    second = model.batch(np.stack([np.asarray(image) for image in IMAGES]), PROMPTS, max_tokens=8)
    stream = model.stream(IMAGES[0], PROMPTS[0], **LONG)
    alone = list(model.stream(IMAGES[0], PROMPTS[0], **LONG))
    pieces, found = [], []
    for one, other in zip(first, second, strict=True):
        pieces += [piece for piece in [next(stream, None)] if piece]
        found.append((one.tokens, other.tokens))
    assert found == [(tokens, tokens) for tokens in expected]
    assert pieces + list(stream) == alone


def test_one_that_is_left_half_way_holds_nothing_up(model):
    before = threading.active_count()
    answers = model.batch(IMAGES, PROMPTS, batch_size=2, **LONG)
    next(answers)
    assert model.generate(IMAGES[0], "Hello", max_tokens=2).generation_tokens
    del answers
    until = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < until:
        gc.collect()
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_another_thread_may_close_it_while_one_waits(model, monkeypatch):
    """What has come by then is all that comes, and nothing is raised."""
    prepare = ImageProcessor.__call__

    def prepared(processor, image):
        closing = threading.Thread(target=answers.close)
        closing.start()
        closing.join()
        return prepare(processor, image)

    monkeypatch.setattr(ImageProcessor, "__call__", prepared)
    answers = model.batch(IMAGES, PROMPTS, batch_size=2, **LONG)
    assert list(answers) == []


def test_what_gives_the_images_may_close_it_but_not_wait_for_it(model):
    def images(use):
        yield from IMAGES[:3]
        use(answers)
        yield IMAGES[3]

    answers = model.batch(images(lambda answers: answers.close()), "What is it?", max_tokens=2)
    assert len(list(answers)) <= 3
    answers = model.batch(images(next), "What is it?", batch_size=8, max_tokens=2)
    found = []

    def ask():
        try:
            found.extend(answers)
        except ValueError as error:
            found.append(str(error))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(10)
    assert found[-1:] == ["generator already executing"]
    # Of the three, those that had ended before the fourth was wanted are found already.
    assert len(found) - 1 + len(list(answers)) == 3


_THREAD_OUTLIVES_MAIN = """
import sys, threading, time
import numpy as np
import fastvlm_mlx
model = fastvlm_mlx.load(sys.argv[1])
def images():
    for number in range(6):
        if number == 2:
            threading.main_thread().join()
            time.sleep(0.2)
        yield np.full((9, 9, 3), number, np.uint8)
def ask():
    print(len(list(model.batch(images(), "Hm?", max_tokens=2, batch_size=2))))
threading.Thread(target=ask).start()
"""


def test_a_thread_that_outlives_the_main_one_gets_all_answers(demo_bundle):
    command = [sys.executable, "-c", _THREAD_OUTLIVES_MAIN, str(demo_bundle)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (found.stdout, found.stderr) == ("6\n", "")


def test_a_failure_of_all_is_said_each_time(model, monkeypatch):
    answers = model.batch(IMAGES, PROMPTS, batch_size=2, **LONG)
    next(answers)
    monkeypatch.setattr("fastvlm_mlx.language.decode.Batch.advance", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(answers)
    with pytest.raises(FastVLMError, match="failed before it had all answers"):
        list(answers)
