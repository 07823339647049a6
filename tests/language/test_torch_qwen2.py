"""The language model in torch: its matrices against MLX's, its logits against mlx-lm's, answers."""

from __future__ import annotations

import math
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch

import fastvlm_mlx
from fastvlm_mlx.bundle.bundle import Bundle
from fastvlm_mlx.bundle.quantization import MODES
from fastvlm_mlx.language.cpu.cache import KVCache
from fastvlm_mlx.language.cpu.matrix import (
    FEW_TOKENS,
    AffineMatrix,
    Arithmetic,
    Codes,
    as_torch,
    matrix,
    unpacked,
)
from fastvlm_mlx.language.cpu.qwen2 import TorchModel, arithmetic
from fastvlm_mlx.language.model import for_this_machine, load_model
from model_export.options import ExportOptions
from model_export.pipeline import export
from model_export.samples import scenes

EXACT = Arithmetic(torch.float32, packed=False, keep_dense=True)
FAST = Arithmetic(torch.bfloat16, packed=True, keep_dense=False)
KEPT = Arithmetic(torch.bfloat16, packed=True, keep_dense=True)
FORMS = [
    (bits, group, mode)
    for mode, (all_bits, groups) in MODES.items()
    for bits in all_bits
    for group in groups
]


def snr_db(expected, found):
    expected, found = (np.asarray(a, dtype=np.float64) for a in (expected, found))
    return 10 * math.log10((expected**2).sum() / max(((expected - found) ** 2).sum(), 1e-30))


@pytest.mark.parametrize("bits", MODES["affine"][0])
def test_codes_are_those_that_mlx_reads(bits):
    words, scales, biases = mx.quantize(mx.random.normal((32, 192)), 64, bits)
    read = mx.dequantize(words, mx.ones_like(scales), mx.zeros_like(biases), 64, bits)
    found = unpacked(as_torch(words).view(torch.uint8), bits)
    assert np.array_equal(found.numpy(), np.array(read).astype(np.uint8))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("bits", "group", "mode"), FORMS)
def test_products_are_mlx_s(bits, group, mode, dtype):
    linears = [nn.Linear(256, rows) for rows in (64, 32)]
    for linear in linears:
        linear.set_dtype(getattr(mx, dtype))
    quantized = [nn.QuantizedLinear.from_linear(each, group, bits, mode) for each in linears]
    mx.eval([each.parameters() for each in quantized])
    for each in quantized:
        each["bias"] = mx.random.normal(each["bias"].shape).astype(each["bias"].dtype)
    matrices = {each: matrix(quantized, each) for each in (EXACT, FAST, KEPT)}
    # As a prompt and its answer do, and few rows alone.
    for rows in (1, FEW_TOKENS + 1, 1, FEW_TOKENS):
        x = np.random.default_rng(rows).normal(size=(rows, 256)).astype(np.float32)
        weights = [
            mx.dequantize(q["weight"], q["scales"], q.get("biases"), group, bits, mode)
            for q in quantized
        ]
        expected = np.concatenate(
            [
                x @ np.array(weight.astype(mx.float32)).T + np.array(q["bias"].astype(mx.float32))
                for weight, q in zip(weights, quantized, strict=True)
            ],
            1,
        )
        found = {each: matrices[each](torch.from_numpy(x)) for each in matrices}
        # What scales of half precision are rounded to when MLX dequantizes.
        assert snr_db(expected, found[EXACT]) > (100 if dtype == "float32" else 45)
        assert snr_db(expected, found[FAST]) > 44
        assert snr_db(expected, found[KEPT]) > 44
    ids = torch.tensor([3, 90, 0])
    assert (
        snr_db(
            np.concatenate([np.array(w.astype(mx.float32)) for w in weights])[ids],
            matrix(quantized, EXACT).rows(ids),
        )
        > 40
    )


@pytest.mark.parametrize("numbers", [FAST, KEPT], ids=["dequantized each time", "kept"])
def test_a_product_is_the_same_each_time_and_a_batch_s_rows_are_those_of_one(numbers):
    words, scales, biases = (as_torch(a) for a in mx.quantize(mx.random.normal((8256, 64)), 64, 4))
    made = AffineMatrix([Codes(words.view(torch.uint8), scales, biases, 4)], None, numbers)
    tokens = torch.randn(20, 1, 64)
    prompt = torch.randn(1, FEW_TOKENS + 1, 64)
    # The first token's products must not depend on whether another was there before.
    first, alone = made(prompt), [made(each) for each in tokens]
    assert torch.equal(made(prompt), first)
    assert torch.equal(made(tokens), torch.stack(alone))


@pytest.mark.parametrize("arithmetic", [EXACT, FAST, KEPT])
@pytest.mark.parametrize("kind", [nn.Linear, nn.Embedding])
def test_codes_are_let_go_of_when_nothing_more_is_made_of_them(kind, arithmetic):
    module = kind(64, 64).to_quantized(64, 4)
    mx.eval(module.parameters())
    made, ids = matrix([module], arithmetic), torch.tensor([3, 9])
    rows = made.rows(ids)
    prompt, token = torch.ones(FEW_TOKENS + 1, 64), torch.ones(1, 64)
    before = [made(x) for x in (prompt, token, token, token)][-1]
    # Without dequantized weights that stay, each prompt needs them.
    needed = kind is nn.Embedding or not arithmetic.keep_dense
    assert bool(made.stored) == needed
    assert torch.equal(made(token), before)
    if kind is nn.Embedding:
        assert torch.equal(made.rows(ids), rows)


@pytest.fixture(scope="module", params=["4", "16", "8, mlx"])
def bundle(request, demo_bundle, demo_checkpoint, tmp_path_factory):
    if request.param == "4":
        return demo_bundle
    options = {
        "16": ExportOptions.of(llm_bits=16),
        "8, mlx": ExportOptions.of(embed_bits=4, layout="mlx", projector_bits=8),
    }
    out = tmp_path_factory.mktemp("forms") / "bundle"
    export(demo_checkpoint, out, options[request.param])
    return out


def loaded(bundle, dtype=None):
    model = load_model(bundle if isinstance(bundle, Bundle) else Bundle.open(bundle))
    if dtype is not None:
        model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model


def test_logits_are_mlx_lm_s(bundle):
    model = loaded(bundle)
    exact = TorchModel(model, EXACT)
    model.set_dtype(mx.float32)
    features = mx.random.normal((1, 16, model.config.vision.hidden_size))
    projected = model.project(features)
    assert snr_db(projected, exact.project(features)) > 90
    start = [5, 6, 7]
    ids = mx.array([*start, *[model.config.image_token_index] * 16, *range(20, 60)])
    embedded = model.embed_inputs(ids, projected)
    assert snr_db(embedded, exact.embed_inputs(ids, projected)) > 90
    expected = model.language_model(ids[None], input_embeddings=embedded[None])
    found = exact.language_model(ids[None], input_embeddings=embedded[None])
    assert found.shape == expected.shape
    assert snr_db(expected, found) > 90


def test_a_cache_changes_nothing(demo_bundle):
    language_model = TorchModel(loaded(demo_bundle), EXACT).language_model
    ids = mx.array(np.random.default_rng(0).integers(0, 400, (1, 300)))
    expected = np.array(language_model(ids))[0]
    cache = language_model.make_cache()
    # More than one block of places, a part with many rows after another, then one by one.
    for start, stop in ((0, 250), (250, 290), *((i, i + 1) for i in range(290, 300))):
        found = np.array(language_model(ids[:, start:stop], cache=cache))
        assert found.shape[1] == 1
        assert snr_db(expected[stop - 1], found[0, 0]) > 90
    assert {each.offset for each in cache} == {300}
    assert [each.trim(7) for each in cache] == [7] * len(cache)
    again = np.array(language_model(ids[:, 293:], cache=cache))[0, 0]
    assert snr_db(expected[-1], again) > 90


def test_mlx_lm_s_batches_take_it(demo_bundle):
    """Prompts of different lengths at once, which it pads, and later ones that take free places."""
    from mlx_lm.generate import BatchGenerator, generate_step

    language_model = TorchModel(loaded(demo_bundle), EXACT).language_model
    prompts = [np.random.default_rng(n).integers(0, 400, n).tolist() for n in (5, 30, 1, 12, 7)]
    expected = [
        [token for token, _ in generate_step(mx.array(prompt), language_model, max_tokens=count)]
        for count, prompt in enumerate(prompts, 3)
    ]
    generator = BatchGenerator(language_model, prefill_batch_size=2, completion_batch_size=3)
    uids = generator.insert(prompts, list(range(3, 8)))
    found = {uid: [] for uid in uids}
    while responses := generator.next_generated():
        for response in responses:
            found[response.uid].append(response.token)
            if response.finish_reason is not None:
                held = len(prompts[uids.index(response.uid)]) + len(found[response.uid])
                assert {each.offset for each in response.prompt_cache} <= {held, held - 1}
    generator.close()
    assert list(found.values()) == expected


def test_a_cache_keeps_what_it_held_when_it_grows():
    cache = KVCache()
    keys = torch.arange(2 * 600 * 4).view(2, 600, 4).float()
    for start in range(0, 600, 50):
        held, values = cache.update_and_fetch(
            keys[:, start : start + 50], -keys[:, start : start + 50]
        )
    assert torch.equal(held, keys)
    assert torch.equal(values, -keys)
    assert cache.nbytes == 2 * 2 * 768 * 4 * 4
    assert cache.trim(1000) == 600


def test_answers_are_mlx_s(bundle):
    """On any CPU a model of this size computes in float32; in bfloat16 few answers change."""
    here = fastvlm_mlx.load(bundle)
    mlx = here.worker.run(lambda: loaded(here.bundle, mx.float32))
    fast = replace(here, model=here.worker.run(lambda: TorchModel(loaded(here.bundle), FAST)))
    exact, changed, questions = replace(here, model=mlx), 0, 0
    for seed in range(40, 43):
        scene = scenes.generate(seed, held_out=True)
        features = here.encode(scene.draw(here.image_processor.size))
        projected = exact.project(features.features)
        for question in scene.questions(seed):
            expected = exact.generate(projected, question.prompt)
            found = here.generate(features, question.prompt)
            assert (found.tokens, found.compute) == (expected.tokens, "torch float32")
            changed += fast.generate(features, question.prompt).tokens != expected.tokens
            questions += 1
    assert questions > 10
    assert changed <= 2


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "seed": 4, "top_p": 0.95}])
def test_a_batch_s_answers_are_those_of_one_at_a_time(bundle, options):
    """In torch as on this machine, in torch with packed codes, and in MLX."""
    here = fastvlm_mlx.load(bundle, kept_bytes=0)
    mlx = here.worker.run(lambda: loaded(here.bundle, mx.float32))
    fast = here.worker.run(lambda: TorchModel(loaded(here.bundle), FAST))
    held_out = scenes.held_out(8)
    prompts = [question.prompt for _, question in held_out]
    seen = [here.encode(scene.draw(here.image_processor.size)) for scene, _ in held_out]
    for model in (here, replace(here, model=fast), replace(here, model=mlx)):
        images = [model.project(each.features) for each in seen]
        expected = [
            model.generate(image, prompt, max_tokens=12, **options).tokens
            for image, prompt in zip(images, prompts, strict=True)
        ]
        found = model.batch(images, prompts, max_tokens=12, batch_size=3, **options)
        assert [answer.tokens for answer in found] == expected


def test_torch_comes_with_the_first_question(demo_bundle):
    """And what MLX has read is given up as soon as torch has it."""
    mx.clear_cache()
    before = mx.get_active_memory()
    model = fastvlm_mlx.load(demo_bundle)
    loaded_bytes = mx.get_active_memory() - before
    assert model.generate(None, "What do you see?", max_tokens=2).compute == "torch float32"
    mx.clear_cache()
    assert mx.get_active_memory() - before < loaded_bytes


@pytest.mark.parametrize("error", [RuntimeError("no memory"), KeyboardInterrupt()])
def test_a_first_use_that_fails_is_tried_again(demo_bundle, monkeypatch, error):
    model = fastvlm_mlx.load(demo_bundle)

    def fail(*_):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr("fastvlm_mlx.language.cpu.qwen2.Qwen2", fail)
        with pytest.raises(type(error)):
            model.generate(None, "What do you see?", max_tokens=2)
    assert model.generate(None, "What do you see?", max_tokens=2).generation_tokens


def test_a_mac_keeps_mlx(demo_bundle, monkeypatch):
    monkeypatch.setattr("sys.platform", "darwin")
    model = loaded(demo_bundle)
    assert for_this_machine(model) is model
    assert model.compute == "MLX float32"


def test_arithmetic_is_exact_where_that_costs_nothing():
    assert arithmetic(2_000_000) == EXACT
    large = arithmetic(500_000_000)
    assert large.dtype in (torch.bfloat16, torch.float32)
    assert not arithmetic(10**15).keep_dense
