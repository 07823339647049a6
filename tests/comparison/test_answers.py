"""Right answers, held through every stage: PyTorch, MLX at 16, 8 and 4 bits, fp32 and fp16.

The questions are about scenes that training never showed. What counts is how many of the answers
that PyTorch gets right from the checkpoint are lost on the way.
"""

import numpy as np
import pytest
import torch

import fastvlm_mlx
from model_export.demo.model import DemoModel, to_pixels
from model_export.options import ExportOptions
from model_export.pipeline import export
from model_export.samples import scenes

QUESTIONS = 250


@pytest.fixture(scope="module")
def pairs():
    return scenes.held_out(QUESTIONS)


@pytest.fixture(scope="module")
def images(pairs):
    return [scene.draw(256) for scene, _ in pairs]


@pytest.fixture(scope="module")
def expected(demo_checkpoint, pairs, images):
    """PyTorch's answers from the source checkpoint: transformers' Qwen2 on unfolded features."""
    model = DemoModel.load(demo_checkpoint)
    with torch.inference_mode():
        features = torch.cat(
            [model.encode(to_pixels(images[i : i + 50])) for i in range(0, QUESTIONS, 50)]
        )
        return model.answer(features, [question.prompt for _, question in pairs])


@pytest.fixture(scope="module")
def bundles(demo_checkpoint, demo_bundle, tmp_path_factory):
    """LLM bits and encoder precision → a loaded bundle."""
    folder = tmp_path_factory.mktemp("answers")
    loaded = {(4, "fp16"): fastvlm_mlx.load(demo_bundle)}
    for bits, precision in ((8, "fp16"), (16, "fp32")):
        out = folder / f"{bits}-{precision}"
        export(demo_checkpoint, out, ExportOptions.of(llm_bits=bits, encoder_precision=precision))
        loaded[bits, precision] = fastvlm_mlx.load(out)
    return loaded


@pytest.fixture(scope="module")
def features(bundles, images):
    """Every image as each encoder sees it, computed once for all language models."""

    def encode(model):
        return [model.encoder(model.image_processor(image)) for image in images]

    return {"fp16": encode(bundles[4, "fp16"]), "fp32": encode(bundles[16, "fp32"])}


def answers(model, features, pairs):
    texts = []
    for array, (_, question) in zip(features, pairs, strict=True):
        seen = model.project(array)
        texts.append(model.generate(seen, question.prompt, max_tokens=48).text)
    return texts


def right(texts, pairs):
    return np.array(
        [scenes.is_right(question, text) for text, (_, question) in zip(texts, pairs, strict=True)]
    )


def test_pytorch_is_right(expected, pairs):
    found = scenes.score(pairs, expected)
    assert found["all"].share >= 0.95
    assert min(score.share for score in found.values()) >= 0.9


@pytest.mark.parametrize(
    ("bits", "precision", "most_lost"),
    [(16, "fp32", 0.0), (16, "fp16", 0.0), (8, "fp16", 0.01), (4, "fp16", 0.05)],
)
def test_answers_are_kept(bundles, features, expected, pairs, bits, precision, most_lost):
    model = bundles[bits, "fp32" if bits == 16 else "fp16"]
    found = answers(model, features[precision], pairs)
    before, after = right(expected, pairs), right(found, pairs)
    lost = int((before & ~after).sum())
    assert lost <= most_lost * before.sum(), [
        (pairs[i][1], found[i]) for i in np.flatnonzero(before & ~after)[:5]
    ]
