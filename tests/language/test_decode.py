"""Prefill and decode, against mlx-lm's own generation."""

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models import qwen2

from fastvlm_mlx.language.decode import Batch, Continuation, decode
from fastvlm_mlx.language.kept import Kept, Prompt
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


def continued(prompt, options, ends=None, keys=()):
    ids, embeddings = prompt
    return Continuation(
        Prompt(ids, embeddings, ends or (len(ids),), keys),
        max_tokens=options.max_tokens,
        sampler=Sampler(options, VOCABULARY),
        processors=processors(options),
    )


def by_mlx_lm(model, prompt, options):
    ids, embeddings = prompt
    steps = generate_step(
        ids,
        model,
        input_embeddings=embeddings,
        max_tokens=options.max_tokens,
        sampler=Sampler(options, VOCABULARY),
        logits_processors=processors(options),
    )
    return [token for token, _ in steps]


OPTIONS = {
    "greedy": SamplingOptions(max_tokens=20),
    "sampled": SamplingOptions(max_tokens=300, temperature=0.9, top_p=0.9, seed=4),
    "penalized": SamplingOptions(max_tokens=30, repetition_penalty=1.4),
    "one token": SamplingOptions(max_tokens=1),
}


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("ends", [(13,), (1, 9, 13), (12, 13)])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_ids_are_those_of_mlx_lm(model, prompt, options, ends, ahead):
    expected = by_mlx_lm(model, prompt, options)
    names = tuple(bytes([end]) for end in ends[:-1])
    kept = Kept()
    for cached in (0, (0, *ends)[-2]):
        made = continued(prompt, options, ends, names)
        assert list(decode(model, made, kept, ahead=ahead)) == expected
        assert made.cached_tokens == cached


def test_a_prompt_of_one_token_and_no_step_too_many(model):
    calls = []

    def counted(ids, **inputs):
        calls.append(ids.shape)
        return model(ids, **inputs)

    counted.layers = model.layers
    ids = mx.array([7])
    made = continued((ids, model.model.embed_tokens(ids)), SamplingOptions(max_tokens=3))
    assert len(list(decode(counted, made, Kept(0)))) == 3
    assert calls == [(1, 1)] * 3


@pytest.mark.parametrize("ahead", [True, False])
def test_prompts_of_a_batch_join_and_leave_at_different_times(model, prompt, ahead):
    ids, embeddings = prompt
    cases = [
        ((ids[:length], embeddings[:length]), options)
        for length, options in zip((13, 4, 9, 12), OPTIONS.values(), strict=True)
    ]
    expected = [by_mlx_lm(model, *case) for case in cases]
    found = [[] for _ in cases]
    batch, waiting, active = Batch(model, ahead=ahead), list(range(len(cases))), []
    while waiting or active:
        while waiting and len(active) < 2:
            active.append(waiting.pop(0))
            made = continued(*cases[active[-1]])
            made.begin(model, Kept(0))
            batch.join(made)
        for case, token in zip(active, batch.advance(), strict=True):
            found[case].append(token)
        ended = [i for i, c in enumerate(active) if len(found[c]) == cases[c][1].max_tokens]
        batch.leave(ended)
        active = [case for i, case in enumerate(active) if i not in ended]
    assert found == expected
