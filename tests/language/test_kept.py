"""What earlier questions computed serves later ones, and no answer shows it."""

from dataclasses import replace
from functools import cache
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastvlm_mlx
from fastvlm_mlx.bundle.bundle import Bundle
from fastvlm_mlx.errors import OptionError
from fastvlm_mlx.language.kept import PREFILL_PLACES, Kept, Span, cut, keys
from fastvlm_mlx.language.model import load_model
from model_export.samples import scenes

PROMPTS = (
    "Describe the image.",
    "How many shapes are there?",
    "What number is written?",
    # Longer than what a turn needs to begin a piece.
    "Look at the image, and at each of its corners, and then tell me: " + "what is there? " * 30,
)
SAMPLING = (
    {},
    {"temperature": 2.0, "seed": 3},
    {"temperature": 1.0, "top_p": 0.9, "seed": 4, "repetition_penalty": 1.5},
    {"repetition_penalty": 1.8, "stop": ["e"]},
)
IMAGES = [scenes.generate(seed, held_out=True).draw(256) for seed in range(3)]
# One image, or several in one prompt.
cases = st.tuples(
    st.sampled_from([None, 0, 1, 2, (0, 1), (1, 0), (2, 2)]), st.integers(0, 3), st.integers(0, 3)
)


@pytest.fixture(scope="module", params=["torch", "MLX"])
def pair(request, demo_bundle):
    """A model that keeps little, so that much is dropped, and one that keeps nothing."""
    cold = fastvlm_mlx.load(demo_bundle, kept_bytes=0)
    if request.param == "MLX":

        def in_mlx():
            model = load_model(Bundle.open(demo_bundle))
            model.set_dtype(mx.float32)
            mx.eval(model.parameters())
            return model

        cold = replace(cold, model=cold.worker.run(in_mlx))
    features = [cold.encode(image).features for image in IMAGES]
    projected = [cold.project(each) for each in features]

    @cache
    def answer(case):
        return ask(cold, projected, case)

    return replace(cold, kept_bytes=300_000), projected, answer


def ask(model, projected, case, **more):
    image, prompt, sampling = case
    several = image if isinstance(image, tuple) else () if image is None else (image,)
    seen = [projected[each] for each in several]
    result = model.generate(seen, PROMPTS[prompt], max_tokens=8, **SAMPLING[sampling], **more)
    return result.tokens, result.text, result.finish_reason


@settings(max_examples=5, deadline=None)
@given(st.lists(cases, min_size=1, max_size=6))
def test_answers_are_those_of_a_cold_run(pair, asked):
    model, projected, cold = pair
    for case in asked:
        assert ask(model, projected, case) == cold(case)
        assert 0 <= model._kept.nbytes <= model.kept_bytes


def test_the_second_question_computes_only_itself(pair):
    model, projected, _ = pair
    model = replace(model, kept_bytes=10**8)
    first, second, long, again, other = (
        model.generate(projected[image], PROMPTS[prompt], max_tokens=2)
        for image, prompt in ((0, 0), (0, 1), (0, 3), (0, 3), (1, 0))
    )
    # All up to the end of the image.
    before = second.cached_tokens
    assert (first.cached_tokens, other.cached_tokens) == (0, 0)
    assert 16 < before < 40
    assert second.prompt_tokens - before < 20
    assert long.cached_tokens == before
    assert again.prompt_tokens - again.cached_tokens < 8
    assert again.tokens == long.tokens


def test_generations_of_one_image_that_are_left_half_way(pair):
    model, projected, cold = pair
    model = replace(model, kept_bytes=10**8)
    long = {"temperature": 5.0, "seed": 1, "max_tokens": 24}
    begun = [model.stream(projected[0], prompt, **long) for prompt in PROMPTS]
    for generation in begun * 3:
        next(generation)
    begun[0].close()
    del begun[1]
    for prompt in range(4):
        assert ask(model, projected, (0, prompt, 1)) == cold((0, prompt, 1))
    for prompt, generation in zip((2, 3), begun[1:], strict=True):
        expected = model.generate(projected[0], PROMPTS[prompt], **long)
        assert generation.result.tokens == expected.tokens


class TestImages:
    @pytest.fixture
    def counted(self, demo_bundle):
        """A model, and how many images its encoder has looked at."""
        model = fastvlm_mlx.load(demo_bundle)
        encoder, seen = model.encoder, []

        def look(pixels):
            seen.append(pixels)
            return encoder(pixels)

        model._encoders[encoder.image_size] = look
        return model, seen

    def test_an_image_is_known_by_its_pixels(self, counted, tmp_path):
        model, seen = counted
        path = tmp_path / "image.png"
        IMAGES[0].save(path)
        first, again = model.encode(IMAGES[0]), model.encode(path)
        assert len(seen) == 1
        assert np.array_equal(first.features, again.features)
        assert mx.array_equal(first.projected, again.projected)
        assert first.timings.encode_s > 0 == again.timings.encode_s == again.timings.project_s
        path.unlink()
        IMAGES[1].save(path)
        assert not np.array_equal(model.encode(path).features, first.features)

    def test_one_pixel_makes_another_image(self, counted):
        model, seen = counted
        changed = IMAGES[0].copy()
        changed.putpixel((9, 9), (200, 17, 3))
        assert model.generate(IMAGES[0], PROMPTS[0], max_tokens=2).cached_tokens == 0
        assert model.generate(changed, PROMPTS[0], max_tokens=2).cached_tokens == 0
        assert model.generate(IMAGES[0].copy(), PROMPTS[1], max_tokens=2).cached_tokens > 0
        assert len(seen) == 2

    def test_features_are_their_owner_s_to_change(self, counted):
        model, _ = counted
        expected = model.generate(IMAGES[0], PROMPTS[0], max_tokens=8).tokens
        for _ in range(2):
            features = model.encode(IMAGES[0])
            features.features[:] = 0
            features.projected[:] = 0
            changed = model.generate(features, PROMPTS[0], max_tokens=8)
            assert changed.tokens != expected
        assert model.generate(IMAGES[0], PROMPTS[0], max_tokens=8).tokens == expected

    def test_nothing_is_kept_where_that_is_asked_for(self, counted):
        model, seen = counted
        cold = replace(model, kept_bytes=0)
        cold._encoders.update(model._encoders)
        for _ in range(2):
            assert cold.generate(IMAGES[0], PROMPTS[0], max_tokens=2).cached_tokens == 0
        assert (len(seen), len(cold._kept)) == (2, 0)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 60)), max_size=40))
def test_what_was_used_last_is_kept_within_the_limit(puts):
    kept, order, sizes = Kept(100), [], {}
    for key, size in puts:
        name = bytes([key])
        kept.put(name, key, size)
        order = [each for each in order if each != key] + [key]
        sizes[key] = size
        while sum(sizes[each] for each in order) > 100:
            order.pop(0)
        assert kept.nbytes == sum(sizes[each] for each in order)
        assert len(kept) == len(order)
    for key in order:
        assert kept.get(bytes([key])) == key


def test_what_is_larger_than_the_limit_drops_nothing():
    kept = Kept(100)
    kept.put(b"a", 1, 100)
    kept.put(b"b", 2, 101)
    assert (kept.get(b"a"), kept.get(b"b"), kept.nbytes) == (1, None, 100)


TURN = 7


@given(st.lists(st.sampled_from([1, 2, TURN]), min_size=1, max_size=400), st.data())
def test_where_a_piece_ends_depends_on_what_is_before_it(ids, data):
    images = []
    if len(ids) > 40:
        # One, or two that stand side by side or apart.
        start = data.draw(st.integers(0, len(ids) - 31))
        images = [Span(start, start + 10, b"image")]
        for gap in data.draw(st.lists(st.integers(0, 9), max_size=1)):
            images.append(Span(start + 10 + gap, start + 20 + gap, b"other"))
    ends = cut(ids, images, TURN)
    assert ends[-1] == len(ids)
    assert all(first < second for first, second in pairwise((0, *ends)))
    assert all(image.end in ends for image in images)
    # A prompt that begins alike has the same pieces, and they have the same keys.
    for count, end in enumerate(ends[:-1], 1):
        longer = [*ids[: end + 1], *data.draw(st.lists(st.integers(1, 3), max_size=100))]
        before = [image for image in images if image.end <= end]
        found = cut(longer, before, TURN)
        assert found[:count] == ends[:count]
        assert keys(longer, before, found)[:count] == keys(ids, images, ends)[:count]


def test_keys_tell_images_apart():
    ids, ends = [1] * 30, (12, 20, 30)

    def of(content, start=2):
        return keys(ids, [Span(start, 12, content)], ends)

    assert len({*of(b"a"), *of(b"b"), *of(b"a", 1), *keys(ids, [], ends)}) == 8


def test_a_piece_has_so_many_places_at_most():
    assert cut([1] * 5000, [], TURN) == (PREFILL_PLACES, 2 * PREFILL_PLACES, 5000)


@pytest.mark.parametrize("limit", [-1, 1.5, "1", True, None])
def test_a_limit_that_is_no_number_of_bytes(demo_bundle, limit):
    with pytest.raises(OptionError, match="bytes to keep for later questions"):
        fastvlm_mlx.load(demo_bundle, kept_bytes=limit)
