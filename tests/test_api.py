"""What a program may hand to the runtime by mistake: one error of ours, or what it meant."""

import fractions
import io
import json
import subprocess
import sys
import time
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastvlm_mlx
from fastvlm_mlx.errors import ImageError, OptionError, PromptError
from fastvlm_mlx.language.detokenizer import Text
from fastvlm_mlx.language.features import ImageFeatures
from fastvlm_mlx.language.generate import Timings
from fastvlm_mlx.language.sampling import Sampler, SamplingOptions, processors
from model_export.samples import scenes

LONG = "Describe the image."
ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.lists(st.text(max_size=3), max_size=3),
    st.sampled_from(
        [
            *(10**400, -(10**400), 5e-324, 1e-46, 1e-39, 1.7e308, fractions.Fraction(10**400)),
            *(np.float32(0.5), np.int64(3), np.bool_(True), np.array(1.0), np.float16("nan")),
            *({}, 1j, print),
        ]
    ),
)


@pytest.fixture(scope="module")
def model(demo_bundle):
    return fastvlm_mlx.load(demo_bundle)


@pytest.fixture(scope="module")
def features(model):
    return model.encode(scenes.generate(3, held_out=True).draw(300))


class TestOptions:
    @settings(max_examples=400, deadline=None)
    @given(st.sampled_from(list(SamplingOptions.__dataclass_fields__)), ANYTHING)
    def test_any_value_is_taken_as_a_number_or_named(self, name, value):
        try:
            options = SamplingOptions(**{name: value})
        except OptionError as error:
            options, said = None, str(error)
        if options is None:
            assert said.startswith(f"--{name.replace('_', '-')} ")
            assert "expected" in said or "give the JSON of a schema" in said
            assert len(said) < 200
        elif name == "stop":
            assert options.stop == ((value,) if isinstance(value, str) else tuple(value))
        elif name == "json_schema":
            assert options.json_schema == (None if value is None else json.dumps(value))
        else:
            taken = getattr(options, name)
            assert type(taken) in (int, float, type(None))
            assert taken == value or abs(taken) < 1e308

    @settings(max_examples=40, deadline=None)
    @given(
        temperature=st.floats(0, allow_infinity=False),
        top_p=st.floats(0, 1),
        min_p=st.floats(0, 1),
        top_k=st.integers(0, 300),
        penalty=st.none() | st.floats(5e-324, allow_infinity=False),
    )
    def test_in_range_is_a_token(self, model, temperature, top_p, min_p, top_k, penalty):
        """Whatever is asked for, it chooses one of the tokens that it leaves."""
        options = SamplingOptions(
            temperature=temperature,
            top_p=top_p,
            min_p=min_p,
            top_k=top_k,
            seed=1,
            repetition_penalty=penalty,
        )
        logits = mx.array(np.random.default_rng(0).normal(size=(1, 400)) * 20).astype(mx.float16)
        for process in processors(options):
            logits = process(mx.array([1, 2, 3]), logits)
        logprobs = logits - mx.logsumexp(logits, keepdims=True)
        assert not mx.isnan(logprobs).any().item()
        token = Sampler(options, 400)(logprobs).item()
        assert 0 <= token < 400
        if top_k:
            assert token in np.argsort(-np.array(logits.astype(mx.float32))[0])[:top_k]

    @pytest.mark.parametrize(
        "limit",
        [
            {"temperature": 1e-39},
            {"temperature": 5e-324},
            {"temperature": 1e-7},
            {"top_p": 0},
            {"top_p": 1e-46},
            {"top_p": np.float32(1e-30)},
            {"min_p": 1},
            {"min_p": True + 0},
            {"top_k": np.int32(1)},
        ],
    )
    def test_a_limit_is_greedy(self, model, features, limit):
        greedy = model.generate(features, LONG, max_tokens=12).tokens
        options = {"temperature": 50.0, "seed": 3} | limit
        assert model.generate(features, LONG, max_tokens=12, **options).tokens == greedy

    def test_the_least_penalty_repeats_the_likeliest_of_what_was_said(self):
        logits = mx.array([[0.5, 4.0, 3.0, 9.0, -2.0]])
        for penalty in (1e-3, 1e-39, 5e-324):
            (process,) = processors(SamplingOptions(repetition_penalty=penalty))
            changed = process(mx.array([0, 2, 4]), logits)
            assert mx.argmax(changed).item() == 2
            assert mx.isfinite(changed).all().item()
        # And the greatest, the likeliest of what was not.
        (process,) = processors(SamplingOptions(repetition_penalty=1.7e308))
        assert mx.argmax(process(mx.array([3, 4]), logits)).item() == 1

    def test_the_sampler_draws_by_the_probabilities(self, model):
        """Against the distribution: temperature 2 of three tokens, 2,000 times."""
        logprobs = mx.log(mx.array([[0.7, 0.2, 0.1]]))
        sampler = Sampler(SamplingOptions(temperature=2.0, seed=0), 3)
        drawn = mx.concatenate([sampler(logprobs) for _ in range(2000)])
        expected = np.sqrt([0.7, 0.2, 0.1]) / np.sqrt([0.7, 0.2, 0.1]).sum()
        assert np.bincount(np.array(drawn)) / 2000 == pytest.approx(expected, abs=0.05)

    def test_the_longest_answer_may_be_as_long_as_any_number(self, model, features):
        result = model.generate(features, LONG, max_tokens=10**30)
        assert result.finish_reason == "stop"

    def test_without_a_seed_answers_differ(self, model, features):
        sampled = {
            model.generate(features, LONG, max_tokens=16, temperature=20.0).tokens for _ in range(4)
        }
        assert len(sampled) == 4

    def test_an_option_that_there_is_not(self, model):
        with pytest.raises(OptionError, match=r"--max-token is no option .* --max-tokens\?"):
            model.generate(None, "Hello", max_token=3)
        for options in ({"max_tokens": 3}, "x", 5):
            with pytest.raises(OptionError, match="expected SamplingOptions"):
                model.generate(None, "Hello", options)

    def test_one_stop_string_may_be_a_text(self, model, features):
        assert SamplingOptions(stop="abc").stop == ("abc",)
        assert SamplingOptions(stop=["a", "b"]).stop == ("a", "b")
        with pytest.raises(OptionError, match="at most 100,000"):
            SamplingOptions(stop="x" * 100_001)

    def test_ten_thousand_stop_strings_cost_as_one(self, model):
        many = tuple(f"never {i:04}" for i in range(10_000))
        ids = model.tokenizer.encode("never ever, a star and a circle " * 40).ids
        started = time.perf_counter()
        text = Text(model.tokenizer, many)
        for token in ids:
            text.add(token)
        assert time.perf_counter() - started < 3
        assert not text.stopped
        text.flush()
        assert text.shown == "never ever, a star and a circle " * 40


class TestPrompts:
    @pytest.mark.parametrize("prompt", [None, b"Hello", 5, ["Hello"], 1.5, object()])
    def test_what_is_no_text(self, model, features, prompt):
        for seen in (None, features):
            with pytest.raises(PromptError, match="expected text"):
                model.generate(seen, prompt)
        with pytest.raises(PromptError):
            model.ask(features, [prompt])

    @settings(max_examples=60, deadline=None)
    @given(st.text(alphabet=st.characters(), max_size=40))
    def test_any_text_is_answered_or_refused(self, model, features, prompt):
        try:
            found = model.generate(features, prompt, max_tokens=1).generation_tokens
        except PromptError:
            found = 0
        refused = not prompt.strip() or any("\ud800" <= c <= "\udfff" for c in prompt)
        assert found == (0 if refused else 1)

    @pytest.mark.parametrize("unit", ["star ", "a", " ", "👍", "<|im_end|>", "e\u0301", "\0"])
    def test_ten_million_characters_are_refused_at_once(self, model, unit):
        prompt = "x" + unit * (10_000_000 // len(unit))
        started = time.perf_counter()
        with pytest.raises(PromptError, match="and the context is 2,048: shorten"):
            model.generate(None, prompt)
        assert time.perf_counter() - started < 2

    def test_prompts_that_are_no_list(self, model, features):
        for prompts in ("Hello", [], (), None, 5):
            with pytest.raises(PromptError, match="the list of prompts is"):
                model.ask(features, prompts)
        answers = [g.result.text for g in model.ask(features, (LONG,), max_tokens=4)]
        assert answers == [model.generate(features, LONG, max_tokens=4).text]


class TestFeatures:
    def test_of_the_same_bundle_loaded_again(self, model, features, demo_bundle):
        again = fastvlm_mlx.load(demo_bundle)
        found = again.generate(features, LONG, max_tokens=8)
        assert found.tokens == model.generate(features, LONG, max_tokens=8).tokens

    def test_of_another_model_and_of_another_size(self, model, features, mlx_bundle):
        other = fastvlm_mlx.load(mlx_bundle, image_size=192)
        seen = other.encode(scenes.generate(3, held_out=True).draw(300))
        with pytest.raises(OptionError, match="another model's, or of another image size"):
            model.generate(seen, LONG)
        # It has the bundle's own size too.
        assert other.generate(features, LONG, max_tokens=1).image_tokens == model.num_tokens

    def test_made_by_hand_or_changed(self, model, features):
        wrong = [
            ImageFeatures(features.features, features.projected, Timings()),
            replace(features, model="0" * 32),
            replace(features, projected=features.projected[:3]),
            replace(features, projected=np.array(features.projected)),
            replace(features, projected=None),
            replace(features, projected=features.projected.astype(mx.complex64)),
            replace(features, projected=features.projected.astype(mx.int32)),
        ]
        for seen in wrong:
            with pytest.raises(OptionError, match="the image's features"):
                model.generate(seen, LONG)

    def test_an_encoder_s_output_from_elsewhere(self, model, features):
        seen = model.project(features.features)
        assert mx.array_equal(seen.projected, features.projected).item()
        found = model.generate(seen, LONG, max_tokens=8).tokens
        assert found == model.generate(features, LONG, max_tokens=8).tokens
        for array in (
            features.features[0],
            features.features.astype(int),
            features.features * np.nan,
            features.features.tolist(),
            None,
        ):
            with pytest.raises(OptionError, match="the encoder's output"):
                model.project(array)


class TestImages:
    def test_as_whatever_it_comes(self, model, tmp_path):
        drawn = scenes.generate(3, held_out=True).draw(300)
        file = io.BytesIO()
        drawn.save(file, "PNG")
        data = file.getvalue()
        (tmp_path / "it.png").write_bytes(data)
        expected = model.encode(drawn).features
        sources = [data, bytearray(data), memoryview(data), tmp_path / "it.png", io.BytesIO(data)]
        sources += [np.asarray(drawn), np.asarray(drawn) / 255]
        for source in sources:
            assert np.array_equal(model.encode(source).features, expected)

    @pytest.mark.parametrize("image", [None, 5, [b""], {}, object(), io.StringIO("x"), print])
    def test_what_is_no_image(self, model, image):
        with pytest.raises(ImageError):
            model.encode(image)

    def test_the_limit_is_the_model_s(self, demo_bundle):
        model = fastvlm_mlx.load(demo_bundle, max_pixels=100)
        for image in (np.zeros((11, 10), np.uint8), scenes.generate(1).draw(64)):
            with pytest.raises(ImageError, match="over the limit"):
                model.generate(image, LONG)
        for limit in (0, -1, True, "5", 1.5, None, float("inf")):
            with pytest.raises(OptionError, match=r"--max-pixels is .*: expected a whole number"):
                fastvlm_mlx.load(demo_bundle, max_pixels=limit)


def test_the_package_names_all_that_is_public_and_loads_nothing_for_it():
    code = (
        "import sys, fastvlm_mlx; names = set(fastvlm_mlx.__all__);"
        "lines = [line.split()[:1] for line in fastvlm_mlx.__doc__.splitlines()];"
        "print(names <= set(dir(fastvlm_mlx)), all([name] in lines for name in names),"
        "*{'torch', 'coremltools', 'mlx.core'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert found.split() == ["True", "True"]
    assert all(getattr(fastvlm_mlx, name).__doc__ for name in fastvlm_mlx.__all__)
