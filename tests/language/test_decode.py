"""Prefill and decode, against mlx-lm's own generation."""

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models import qwen2

from fastvlm_mlx.language import decode as module
from fastvlm_mlx.language.decode import decode
from fastvlm_mlx.language.sampling import Sampler, SamplingOptions, processors

VOCABULARY = 200


@pytest.fixture(scope="module")
def model():
    mx.random.seed(0)
    arguments = qwen2.ModelArgs(
        model_type="qwen2",
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
    )
    made = qwen2.Model(arguments)
    mx.eval(made.parameters())
    return made


@pytest.fixture(scope="module")
def prompt(model):
    """Ids, and embeddings that are not theirs, as an image's are not."""
    ids = mx.array([5, 9, 9, 9, 9, 9, 9, 9, 9, 17, 3, 8, 41])
    embeddings = model.model.embed_tokens(ids) + mx.random.normal((len(ids), 32))
    mx.eval(embeddings)
    return ids, embeddings


@pytest.mark.parametrize("places", [1, 4, 12, 2048])
@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(max_tokens=20),
        SamplingOptions(max_tokens=300, temperature=0.9, top_p=0.9, seed=4),
        SamplingOptions(max_tokens=30, repetition_penalty=1.4),
        SamplingOptions(max_tokens=1),
    ],
    ids=["greedy", "sampled", "penalized", "one token"],
)
def test_the_ids_are_those_of_mlx_lm(model, prompt, options, places, monkeypatch):
    ids, embeddings = prompt
    monkeypatch.setattr(module, "PREFILL_PLACES", places)
    expected = generate_step(
        ids,
        model,
        input_embeddings=embeddings,
        max_tokens=options.max_tokens,
        sampler=Sampler(options, VOCABULARY),
        logits_processors=processors(options),
        prefill_step_size=places,
    )
    found = decode(
        model,
        ids,
        embeddings,
        max_tokens=options.max_tokens,
        sampler=Sampler(options, VOCABULARY),
        processors=processors(options),
    )
    assert list(found) == [token for token, _ in expected]


def test_a_prompt_of_one_token_and_no_step_too_many(model):
    calls = []

    def counted(ids, **inputs):
        calls.append(ids.shape)
        return model(ids, **inputs)

    counted.layers = model.layers
    ids = mx.array([7])
    greedy = Sampler(SamplingOptions(), VOCABULARY)
    embeddings = model.model.embed_tokens(ids)
    assert len(list(decode(counted, ids, embeddings, max_tokens=3, sampler=greedy))) == 3
    assert calls == [(1, 1)] * 3
