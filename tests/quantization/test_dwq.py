"""DWQ as an algorithm: its gradients are MLX's of mlx-lm's model, and what it trains loses less."""

from types import SimpleNamespace

import mlx.core as mx
import mlx.nn
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from mlx_lm.models import qwen2 as mlx_qwen2

from fastvlm_mlx.bundle.config import TextConfig
from fastvlm_mlx.bundle.quantization import Format
from model_export.language import qwen2
from model_export.language.recipes import PREFIX
from model_export.quantization.rounding import dwq
from model_export.quantization.rounding.layers import LAYERS, MATRICES

LENGTH = 12
FORM = Format(3, 32)
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
}
TEXT = TextConfig(**SIZES, max_position_embeddings=128)


class _Matrix:
    def __init__(self, weight):
        self._weight = weight

    def float(self):
        return self._weight

    def blocks(self):
        return iter(self._weight.split(10))


class _Weights(dict):
    """Tensors by their names in a bundle."""

    def matrix(self, name):
        return _Matrix(self[name])


@pytest.fixture
def small(tmp_path):
    """mlx-lm's model of two layers, and the same in torch with its layers rounded to 3 bits."""
    model = mlx_qwen2.Model(mlx_qwen2.ModelArgs(model_type="qwen2", **SIZES))
    mx.random.seed(0)
    for name, array in tree_flatten(model.parameters()):
        changed = mx.random.normal(array.shape) * (array.shape[-1] ** -0.5)
        model.load_weights([(name, 1 + changed if "norm" in name else changed)], strict=False)
    arrays = dict(tree_flatten(model.parameters()))
    weights = _Weights(
        {f"{PREFIX}{name}": torch.tensor(np.array(array)) for name, array in arrays.items()}
    )
    layers = []
    for index in range(2):
        prefix = f"{LAYERS}{index}."
        names = [n.removeprefix(prefix) for n in weights if n.startswith(prefix)]
        groups = {
            f"{m}.weight": dwq.Groups(
                weights[f"{prefix}{m}.weight"], FORM, tmp_path / f"{prefix}{m}"
            )
            for m in MATRICES
        }
        rest = {n: weights[prefix + n] for n in names if n not in groups}
        layers.append(dwq.Layer(groups, lambda rest=rest: rest))
    hidden = torch.tensor(np.array(mx.random.normal((1, LENGTH, 64))))
    mask = torch.full((LENGTH, LENGTH), float("-inf")).triu(1)[None, None]
    rotation = qwen2.rotary_embedding(TEXT)(hidden, torch.arange(LENGTH)[None])
    around = {"attention_mask": mask, "position_embeddings": rotation}
    layer = qwen2.decoder_layer(TEXT)
    target = hidden
    with torch.no_grad():
        for index in range(2):
            prefix = f"{LAYERS}{index}."
            state = {n[len(prefix) :]: w for n, w in weights.items() if n.startswith(prefix)}
            target = torch.func.functional_call(layer, state, (target,), around)
    scored = torch.tensor([5, 6, 11])
    lesson = dwq.TrainingDialogue(hidden, around, scored, target[0, scored])
    head = dwq.Head(TEXT, weights, weights)
    return SimpleNamespace(model=model, layer=layer, layers=layers, lesson=lesson, head=head)


def quantized_loss(small):
    """mlx-lm's model with its layers quantized, and the loss as a function of it."""
    embeddings = mx.array(small.lesson.hidden.numpy())
    places = mx.array(small.lesson.scored.numpy())
    ids = mx.zeros((1, LENGTH), mx.int32)

    def log_probabilities(model):
        logits = model(ids, input_embeddings=embeddings)[0, places]
        return logits - mx.logsumexp(logits, axis=-1, keepdims=True)

    expected = log_probabilities(small.model)
    mx.eval(expected)
    mlx.nn.quantize(
        small.model,
        group_size=FORM.group_size,
        bits=FORM.bits,
        class_predicate=lambda path, module: path.startswith("model.layers") and "proj" in path,
    )

    def loss(model):
        return mlx.nn.losses.kl_div_loss(log_probabilities(model), expected, reduction="mean")

    return small.model, loss


def test_the_gradients_are_mlx_s(small):
    with torch.no_grad():
        order = list(dwq.backward(small.layer, small.layers, small.head, small.lesson))
    assert order == [1, 0]
    model, loss = quantized_loss(small)
    model.freeze()
    model.apply_to_modules(
        lambda _, m: (
            m.unfreeze(keys=["scales", "biases"], recurse=False) if hasattr(m, "bits") else None
        )
    )
    _, gradients = mlx.nn.value_and_grad(model, loss)(model)
    theirs = dict(tree_flatten(gradients))
    for index, each in enumerate(small.layers):
        for name, groups in each.groups.items():
            for part in ("scales", "biases"):
                path = f"model.layers.{index}.{name.removesuffix('weight')}{part}"
                expected, found = np.array(theirs[path]), getattr(groups, part).grad.numpy()
                np.testing.assert_allclose(
                    found, expected, rtol=2e-3, atol=1e-5 * np.abs(expected).max() + 1e-7
                )
