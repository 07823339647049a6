"""Scenes: the same everywhere, one answer to each question, held-out ones never trained on."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_export.samples import scenes
from model_export.samples.scenes import (
    GRID,
    KINDS,
    Number,
    Question,
    Scene,
    Shape,
    evaluate,
    generate,
    held_out,
    is_right,
    quadrant,
    score,
)

seeds = st.integers(0, 2**40)


@settings(deadline=None, max_examples=200)
@given(seeds)
def test_a_scene_has_one_answer_to_each_question(seed):
    scene = generate(seed)
    things = [*scene.shapes, *([scene.number] if scene.number else [])]
    assert 1 <= len(scene.shapes) <= 4
    assert len({quadrant(thing) for thing in things}) == len(things) <= 4
    assert len({item.shape for item in scene.shapes}) == len(scene.shapes)
    assert len({item.colour for item in scene.shapes}) == len(scene.shapes)
    assert [quadrant(s) for s in scene.shapes] == sorted(quadrant(s) for s in scene.shapes)
    assert all(0 <= thing.row < GRID and 0 <= thing.column < GRID for thing in things)
    if scene.number:
        assert 10 <= scene.number.value <= 99
        assert scene.number.column % 2 == 0

    kinds = Counter(question.kind for question in scene.questions(seed))
    assert kinds["describe"] == kinds["count"] == 1
    assert kinds["colour"] == len(scene.shapes)
    assert kinds["where"] == len(things)
    assert kinds["read"] == (scene.number is not None)
    for question in scene.questions(seed):
        assert is_right(question, question.answer)
        assert "{" not in question.prompt


@settings(deadline=None, max_examples=50)
@given(seeds)
def test_training_and_held_out_scenes_never_meet(seed):
    assert not generate(seed, held_out=False).held_out
    assert generate(seed, held_out=True).held_out


def test_a_background_or_a_radius_does_not_move_a_scene_between_the_two():
    for seed in range(100):
        scene = generate(seed)
        for background in scenes.BACKGROUNDS:
            shapes = tuple(
                Shape(s.shape, s.colour, s.row, s.column, scenes.RADII[0]) for s in scene.shapes
            )
            assert Scene(shapes, scene.number, background).held_out == scene.held_out


def test_the_same_seed_gives_the_same_scene_and_image():
    scene = generate(7)
    assert scene == generate(7)
    assert scene == Scene(
        (Shape("cross", "purple", 0, 2, 0.42), Shape("circle", "green", 3, 2, 0.38)),
        Number(56, 0, 0),
    )
    assert scene.draw(256).tobytes() == generate(7).draw(256).tobytes()
    assert scene.questions(3) == scene.questions(3)


def test_the_words():
    scene = Scene((Shape("circle", "red", 0, 1), Shape("square", "blue", 3, 2)), Number(42, 1, 2))
    assert scene.describe() == (
        "A red circle at the top left and a blue square at the bottom right. "
        "The number 42 is at the top right."
    )
    answers = {(q.kind, q.answer) for q in scene.questions()}
    assert answers >= {
        ("count", "Two."),
        ("colour", "Red."),
        ("colour", "Blue."),
        ("where", "At the top left."),
        ("where", "At the top right."),
        ("read", "42."),
    }
    one = Scene((Shape("star", "orange", 2, 0),), None)
    assert one.describe() == "An orange star at the bottom left."


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("Red.", True),
        ("red", True),
        (" RED!\n", True),
        ("Red", True),
        ("Blue.", False),
        ("Red or blue.", False),
        ("", False),
    ],
)
def test_is_right_minds_words_and_not_stops(text, right):
    assert is_right(Question("colour", "What colour is the star?", "Red."), text) == right


@pytest.mark.parametrize("size", [64, 256, 1024])
def test_an_image_shows_its_scene_at_any_size(size):
    scene = generate(11)
    pixels = np.asarray(scene.draw(size)).reshape(GRID, size // GRID, GRID, size // GRID, 3)
    assert scene.draw(size).mode == "RGB"
    middle = size // GRID // 2
    filled = {(item.row, item.column) for item in scene.shapes}
    if scene.number:
        filled |= {(scene.number.row, scene.number.column + i) for i in (0, 1)}
    for row in range(GRID):
        for column in range(GRID):
            plain = (pixels[row, :, column] == scene.background).all()
            assert plain == ((row, column) not in filled)
    for item in scene.shapes:
        seen = pixels[item.row, middle, item.column, middle]
        assert tuple(seen) == scenes.COLOURS[item.colour]


@pytest.mark.parametrize("size", [0, -4, 255])
def test_a_size_that_the_grid_does_not_divide_is_refused(size):
    with pytest.raises(ValueError, match="multiple of 4"):
        generate(0).draw(size)


def test_held_out_questions_are_always_the_same_and_balanced():
    pairs = held_out(50)
    assert pairs == held_out(60)[:50]
    assert Counter(question.kind for _, question in pairs) == dict.fromkeys(KINDS, 10)
    assert all(scene.held_out for scene, _ in pairs)
    assert all(q.kind == "read" for _, q in held_out(5, ["read"]))
    digest = hashlib.sha256(repr(held_out(20)).encode()).hexdigest()
    assert digest.startswith("8ee2c8b3ee7d9c77")


def test_scores_are_counted_by_kind():
    pairs = held_out(10)
    answers = [question.answer for _, question in pairs]
    answers[0] = "nothing"
    scores = score(pairs, answers)
    assert (scores["all"].right, scores["all"].asked, scores["all"].share) == (9, 10, 0.9)
    assert scores[pairs[0][1].kind].right == 1
    with pytest.raises(ValueError, match="argument"):
        score(pairs, answers[1:])
    by_prompt = {question.prompt: question.answer for _, question in pairs[:2]}
    sizes = set()

    def answer(image, prompt):
        sizes.add(image.size)
        return by_prompt[prompt]

    assert evaluate(answer, pairs[:2], size=512)["all"].share == 1
    assert sizes == {(512, 512)}
