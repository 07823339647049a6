"""Log-probabilities, against those of the plain logits, and the text that they come with."""

import mlx.core as mx
import numpy as np
import pytest

import fastvlm_mlx
from fastvlm_mlx.bundle.bundle import Bundle
from fastvlm_mlx.errors import OptionError
from fastvlm_mlx.language.detokenizer import Text
from fastvlm_mlx.language.logprobs import Logprobs, Scores, TokenLogprob
from fastvlm_mlx.language.model import load_model
from fastvlm_mlx.language.prompt.template import asked, encode_messages
from model_export.samples import scenes

# Natural logarithms, between arithmetic of float32 in MLX and in torch.
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def model(mlx_bundle):
    return fastvlm_mlx.load(mlx_bundle)


@pytest.fixture(scope="module")
def plain(mlx_bundle, model):
    """The model in MLX, which knows neither a cache nor a batch nor an answer."""
    made = load_model(Bundle.open(mlx_bundle))
    made.config = model.config
    made.set_dtype(mx.float32)
    return made


def by_hand(plain, model, image, prompt, result):
    """Log-probabilities [n, V] of each place of an answer, from one run over all its ids."""
    encoded = encode_messages(
        model.tokenizer,
        asked(image, prompt),
        image_token_id=model.config.image_token_index,
        num_image_tokens=model.num_tokens,
        context=model.config.text.max_position_embeddings,
    )
    ids = mx.array([*encoded.ids, *result.tokens])
    features = [] if image is None else [model.encode(image).projected]
    embeddings = plain.embed_inputs(ids, *features)
    logits = np.asarray(plain.language_model(ids[None], input_embeddings=embeddings[None])[0])
    logits = logits[len(encoded.ids) - 1 :].astype(np.float64)[: len(result.tokens)]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def check(result, expected, top):
    assert [each.id for each in result.logprobs] == list(result.tokens)
    assert "".join(each.text for each in result.logprobs) == result.text
    for place, each in enumerate(result.logprobs):
        row = expected[place]
        assert each.logprob == pytest.approx(row[each.id], abs=TOLERANCE)
        assert [other.logprob for other in each.top] == pytest.approx(
            np.sort(row)[::-1][:top], abs=TOLERANCE
        )
        for other in each.top:
            assert other.logprob == pytest.approx(row[other.id], abs=TOLERANCE)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.7, "top_p": 0.9, "top_k": 50, "seed": 4}]
)
def test_they_are_those_of_the_plain_logits_alone_and_in_a_batch(plain, model, options):
    drawn = scenes.held_out(4)
    images = [scene.draw(256) for scene, _ in drawn]
    prompts = [question.prompt for _, question in drawn]
    options = {**options, "max_tokens": 12, "logprobs": 5}
    together = list(model.batch(images, prompts, **options))
    for image, prompt, batched in zip(images, prompts, together, strict=True):
        alone = model.generate(image, prompt, **options)
        expected = by_hand(plain, model, image, prompt, alone)
        check(alone, expected, 5)
        check(batched, expected, 5)


def test_nothing_is_told_unless_asked_for(model):
    generation = model.stream(None, "Well?", max_tokens=4)
    assert {type(piece) for piece in generation} == {str}
    assert generation.result.logprobs is None
    assert model.generate(None, "Well?", max_tokens=4, logprobs=0).logprobs[0].top == ()
    for wrong in (-1, 21, 1.5, True):
        with pytest.raises(OptionError, match=r"--logprobs is .*: expected a whole number, from 0"):
            model.generate(None, "Well?", logprobs=wrong)


def test_a_repetition_penalty_and_a_schema_change_the_distribution(plain, model):
    schema = {"enum": ["red", "green"]}
    found = model.generate(None, "Well?", json_schema=schema, logprobs=20)
    for each in found.logprobs:
        assert each.logprob <= 0
        assert sum(np.exp(other.logprob) for other in each.top) <= 1 + 1e-5
    # Of two words one is begun, and what can't begin either is not among the likeliest.
    assert any(
        sum(np.exp(other.logprob) for other in each.top) == pytest.approx(1) and len(each.top) < 20
        for each in found.logprobs
    )
    penalized = model.generate(None, "a a a a", repetition_penalty=1e6, max_tokens=4, logprobs=1)
    raw = by_hand(plain, model, None, "a a a a", penalized)
    assert any(
        abs(each.logprob - raw[place][each.id]) > TOLERANCE
        for place, each in enumerate(penalized.logprobs)
    )


def test_pieces_have_those_of_their_text(model):
    for options in ({}, {"stop": [" circle"]}, {"temperature": 2.0, "seed": 3, "max_tokens": 40}):
        generation = model.stream(None, "Describe it.", logprobs=1, **options)
        pieces = list(generation)
        result = generation.result
        told = [each for piece in pieces for each in piece.logprobs]
        assert tuple(told) == result.logprobs
        assert "".join(pieces) == result.text


def spelled(tokenizer, text, stop=()):
    """What is told of the ids of a text."""
    decoder, kept, pieces = Text(tokenizer, stop), Logprobs(tokenizer), []
    no = Scores(mx.zeros((1, 1)), mx.zeros((1, 0), mx.uint32), mx.zeros((1, 0)))
    for id in tokenizer.encode(text).ids:
        before = decoder.decoded
        shown = decoder.add(id)
        kept.add(id, no, before, decoder.decoded)
        pieces.append(kept.piece(shown, len(decoder.shown)))
        if decoder.stopped:
            break
    pieces.append(kept.last(decoder.flush(), len(decoder.shown), stopped=decoder.stopped))
    return decoder, pieces


@pytest.mark.parametrize("text", ["5 € in a café, naïve 𝒳!", "日本語", "<|im_end|> \x00\x7f\xad"])
def test_bytes_are_those_of_the_text_where_tokens_split_a_character(model, text):
    decoder, pieces = spelled(model.tokenizer, text)
    assert "".join(pieces) == decoder.shown
    every = [each for piece in pieces for each in piece.logprobs]
    assert b"".join(each.bytes or b"" for each in every).decode() == decoder.shown
    assert all(isinstance(each, TokenLogprob) for each in every)
    for piece in pieces:
        # Each piece comes with the whole of its own bytes.
        assert b"".join(each.bytes or b"" for each in piece.logprobs) == piece.encode()
    assert any(each.bytes is None for each in every) == ("<|im_end|>" in text)


def test_of_what_a_stop_string_cuts_off_nothing_is_told(model):
    tokenizer = model.tokenizer
    decoder, pieces = spelled(tokenizer, "a red circle at the top", (" circle at",))
    assert (decoder.shown, "".join(pieces)) == ("a red", "a red")
    every = [each.text for piece in pieces for each in piece.logprobs]
    assert "".join(every) == "a red"
    # A token that the cut goes through is told whole.
    decoder, pieces = spelled(tokenizer, "a red circle", ("rcle",))
    assert decoder.shown == "a red ci"
    every = [each.text for piece in pieces for each in piece.logprobs]
    assert "".join(every).startswith("a red ci")
    # What waited for the rest of a stop string that did not come, comes at the end.
    decoder, pieces = spelled(tokenizer, "a red circle", ("circles",))
    assert "".join(pieces) == decoder.shown == "a red circle"
    assert "".join(each.text for piece in pieces for each in piece.logprobs) == "a red circle"


def test_an_id_without_a_token_and_a_token_that_is_no_bytes():
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.BPE(vocab={"中": 0, "a": 1}, merges=[]))
    logits = mx.array([[3.0, 1.0, 2.0]])
    made = Logprobs(tokenizer)
    made.add(2, Scores.of(logits, mx.array([2]), 20), 0, 0)
    (found,) = made.last("", 0, stopped=False).logprobs
    assert (found.text, found.bytes) == ("", None)
    assert [(each.text, each.bytes) for each in found.top] == [
        ("中", "中".encode()),
        ("", None),
        ("a", b"a"),
    ]
    expected = np.array([3.0, 2.0, 1.0]) - np.log(np.exp([3.0, 2.0, 1.0]).sum())
    assert [each.logprob for each in found.top] == pytest.approx(expected)
