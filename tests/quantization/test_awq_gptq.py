"""AWQ and GPTQ as algorithms: against mlx-lm's own functions, and against plain rounding."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models import qwen2 as mlx_qwen2
from mlx_lm.quant import awq as mlx_awq
from mlx_lm.quant import gptq as mlx_gptq

from fastvlm_mlx.bundle.config import TextConfig
from fastvlm_mlx.bundle.quantization import MODES, Format
from fastvlm_mlx.errors import OptionError
from model_export.language import affine, llm, qwen2
from model_export.language.weights import unpack
from model_export.quantization.rounding import awq, gptq, layers

AFFINE_BITS, GROUPS = MODES["affine"]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.empty(shape).normal_(generator=torch.Generator().manual_seed(seed))


def moment(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x


def uneven(tokens: int, channels: int) -> torch.Tensor:
    """Inputs as a network's are: channels of different sizes, and correlated."""
    mixed = normal(tokens, channels, seed=1) @ normal(channels, channels, seed=2)
    return mixed * torch.logspace(0.5, -1.5, channels)


class TestAffine:
    @settings(max_examples=50, deadline=None)
    @given(bits=st.sampled_from(AFFINE_BITS), rows=st.integers(1, 5), seed=st.integers(0, 2**31))
    def test_codes_are_packed_as_they_are_unpacked(self, bits, rows, seed):
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(2**bits, (rows, 64), generator=generator, dtype=torch.uint8)
        assert torch.equal(unpack(affine.pack(codes, bits), bits), codes)

    @pytest.mark.parametrize("bits", AFFINE_BITS)
    def test_the_grid_is_mlx_s(self, bits):
        weight = normal(16, 128) * torch.logspace(-3, 1, 16)[:, None]
        weight[3] = 0
        weight[4] = 0.25
        parts = mx.quantize(mx.array(weight.numpy()), bits=bits, group_size=32)
        expected = np.array(mx.dequantize(*parts, bits=bits, group_size=32))
        found = affine.round_weight(weight, bits, 32).numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


class TestGptq:
    @pytest.mark.parametrize("bits", AFFINE_BITS)
    @pytest.mark.parametrize("group_size", GROUPS)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_mlx_decodes_what_was_meant(self, bits, group_size, dtype):
        form = Format(bits, group_size)
        weight = normal(24, 256)
        coded = gptq.quantize(weight, moment(uneven(300, 256)), form, dtype)
        words, scales, biases = coded.arrays()
        assert scales.dtype == biases.dtype == getattr(mx, str(dtype).removeprefix("torch."))
        wide = [array.astype(mx.float32) for array in (scales, biases)]
        decoded = mx.dequantize(words, *wide, bits=bits, group_size=group_size)
        np.testing.assert_allclose(np.array(decoded), coded.float().numpy(), rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("bits", [2, 3, 4])
    def test_its_output_is_nearer_than_rounding_s(self, bits):
        weight, (seen, unseen) = normal(48, 128), uneven(800, 128).chunk(2)
        coded = gptq.quantize(weight, moment(seen), Format(bits, 64), torch.float16)
        plain = affine.round_weight(weight, bits, 64)
        found = (unseen @ (coded.float() - weight).T).square().sum()
        assert found < 0.8 * (unseen @ (plain - weight).T).square().sum()

    @pytest.mark.parametrize("x", [torch.zeros(10, 64), torch.eye(64)])
    def test_without_correlations_it_is_plain_rounding(self, x):
        weight = normal(8, 64)
        coded = gptq.quantize(weight, moment(x), Format(4, 32), torch.float32)
        torch.testing.assert_close(coded.float(), affine.round_weight(weight, 4, 32))

    def test_channels_that_see_nothing_are_rounded(self):
        weight, x = normal(8, 64), uneven(100, 64)
        x[:, 5] = 0
        coded = gptq.quantize(weight, moment(x), Format(4, 32), torch.float32)
        assert bool(coded.float().isfinite().all())

    def test_rows_in_pieces_are_rows(self, monkeypatch):
        weight, hessian = normal(20, 64), moment(uneven(100, 64))
        whole = gptq.quantize(weight, hessian, Format(3, 32), torch.float16)
        monkeypatch.setattr(gptq, "ROWS", 7)
        parts = gptq.quantize(weight, hessian, Format(3, 32), torch.float16)
        torch.testing.assert_close(parts.float(), whole.float())

    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_against_mlx_lm_s(self, bits):
        weight, x = normal(32, 128), uneven(64, 128)
        linear = mlx.nn.Linear(128, 32, bias=False)
        linear.weight = mx.array(weight.numpy())
        model = mlx.nn.Sequential(linear)
        mlx_gptq.gptq_quantize(model, mx.array(x.numpy())[None], bits, 64, 8, 64)
        layer = model.layers[0]
        parts = (layer.weight, layer.scales, layer.biases)
        theirs = torch.tensor(np.array(mx.dequantize(*parts, bits=bits, group_size=64)))
        ours = gptq.quantize(weight, moment(x), Format(bits, 64), torch.float32).float()
        # An error that falls the other way at a tie is carried into everything after it.
        errors = [float((x @ (w - weight).T).square().sum()) for w in (ours, theirs)]
        assert errors[0] == pytest.approx(errors[1], rel=0.05)
        assert float(torch.isclose(ours, theirs, atol=1e-3).float().mean()) > 0.95


TEXT = TextConfig(
    hidden_size=64,
    num_hidden_layers=1,
    intermediate_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=32,
    rms_norm_eps=1e-6,
    rope_theta=10_000.0,
    max_position_embeddings=128,
    tie_word_embeddings=True,
)


@pytest.fixture(scope="module")
def small():
    """One layer in torch and in mlx-lm, with the same weights, and what each of its parts reads."""
    layer = qwen2.decoder_layer(TEXT).to_empty(device="cpu")
    state = {
        name: normal(*tensor.shape, seed=i) * tensor.shape[-1] ** -0.5
        if tensor.ndim == 2
        else 1 + 0.3 * normal(*tensor.shape, seed=i)
        for i, (name, tensor) in enumerate(layer.state_dict().items())
    }
    layer.load_state_dict(state)
    hidden = uneven(40, 64)[None]
    mask = torch.full((40, 40), float("-inf")).triu(1)[None, None]
    rotation = qwen2.rotary_embedding(TEXT)(hidden, torch.arange(40)[None])
    around = {"attention_mask": mask, "position_embeddings": rotation}
    sample = layers.HiddenStates(hidden, around, torch.arange(40))
    with torch.inference_mode():
        seen = awq.CalibrationInputs(layers.inputs_of(layer, [sample]), [sample.around])
    block = mlx_qwen2.TransformerBlock(
        mlx_qwen2.ModelArgs(
            model_type="qwen2",
            hidden_size=64,
            num_hidden_layers=1,
            intermediate_size=128,
            num_attention_heads=4,
            rms_norm_eps=1e-6,
            vocab_size=32,
            num_key_value_heads=2,
            rope_theta=10_000.0,
        )
    )
    block.load_weights([(name, mx.array(tensor.numpy())) for name, tensor in state.items()])
    for name, reads in layers.READS.items():
        (x,) = seen.inputs[reads]
        mlx_awq.submodule_from_key(block, name).input_feat = mx.array(x.numpy())[None]
    return SimpleNamespace(layer=layer, state=state, sample=sample, seen=seen, block=block)


FORMATS = dict.fromkeys(layers.MATRICES, Format(3, 32))


def mlx_rounding(weight: mx.array) -> mx.array:
    return mx.dequantize(*mx.quantize(weight, bits=3, group_size=32), bits=3, group_size=32)


class TestAwq:
    def test_the_clipping_is_mlx_lm_s(self, small):
        module = small.block.mlp.up_proj
        theirs = mlx_awq.search_best_clip(module, mlx_rounding, 32, 20)
        (x,) = small.seen.inputs["mlp.gate_proj"]
        ours = awq.clipped(small.state["mlp.up_proj.weight"], x, Format(3, 32))
        np.testing.assert_allclose(ours.numpy(), np.array(theirs), atol=1e-5)
        assert not np.allclose(ours.numpy(), np.array(module.weight))

    @torch.inference_mode()
    def test_the_scales_and_then_the_clipping_are_mlx_lm_s(self, small):
        ours = awq.scaled(small.state, awq.search_scales(small.layer, small.seen, FORMATS))
        mlx_awq.scale_block(
            small.block, mlx_awq.llama_awq.scale_configs, mlx_rounding, {"mask": "causal"}, 20
        )
        theirs = dict(mlx.utils.tree_flatten(small.block.parameters()))
        for name, weight in ours.items():
            np.testing.assert_allclose(weight.numpy(), np.array(theirs[name]), rtol=1e-3, atol=1e-5)
        assert not torch.equal(
            ours["input_layernorm.weight"], small.state["input_layernorm.weight"]
        )
        # What is clipped next reads inputs that are divided by the scales.
        mlx_awq.clip_block(small.block, mlx_awq.llama_awq.no_clip, mlx_rounding, 32, 20)
        theirs = dict(mlx.utils.tree_flatten(small.block.parameters()))
        for name, weight in awq.transformed(small.layer, small.seen, FORMATS).items():
            same = np.isclose(weight.numpy(), np.array(theirs[name]), rtol=1e-3, atol=1e-5)
            # Two cuts of a group may lose the same.
            assert same.mean() > 0.99, name

    @torch.inference_mode()
    def test_the_layer_is_left_as_it_was(self, small):
        awq.transformed(small.layer, small.seen, FORMATS)
        for name, weight in small.layer.state_dict().items():
            assert torch.equal(weight, small.state[name])

    @torch.inference_mode()
    def test_what_is_not_rounded_is_not_touched(self, small):
        formats = dict.fromkeys(layers.MATRICES) | {"mlp.down_proj": Format(3, 32)}
        found = awq.transformed(small.layer, small.seen, formats)
        changed = {name for name in found if not torch.equal(found[name], small.state[name])}
        assert changed == {"mlp.down_proj.weight", "mlp.up_proj.weight"}

    @torch.inference_mode()
    def test_a_scaled_weight_that_can_t_be_stored_is_named(self, small, monkeypatch):
        inputs = layers.LayerInputs(
            copy.deepcopy(small.layer), [replace(small.sample)], FORMATS, "float16"
        )
        assert awq.awq_layer(replace(inputs, layer=copy.deepcopy(small.layer)))
        largest = max(float(weight.abs().max()) for weight in small.state.values())
        monkeypatch.setattr(llm, "FLOAT16_MAX", largest / 2)
        with pytest.raises(OptionError, match="beyond float16"):
            awq.awq_layer(inputs)
