"""FastViTHD in MLX against the torch module of the same weights, nothing folded."""

import shutil

import mlx.core as mx
import numpy as np
import pytest
import torch

from benchmarks.synthetic import encoder_state_dict
from fastvlm_mlx.bundle.config import VisionConfig
from fastvlm_mlx.bundle.quantization import Format, Quantization
from fastvlm_mlx.errors import EncoderError
from fastvlm_mlx.vision.fastvithd import FastViTHD
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.encoder import reference

SMALL = VisionConfig(image_size=128, layers=(1, 2, 1, 2, 1), embed_dims=(16, 32, 32, 64, 128))
OTHERS = [
    VisionConfig(
        image_size=64,
        layers=(1, 1, 1, 1, 1),
        embed_dims=(16, 16, 32, 64, 64),
        mlp_ratios=(2, 2, 3, 4, 4),
        token_mixers=("repmixer", "repmixer", "attention", "attention", "repmixer"),
        pos_embs_shapes=(None, 3, None, 7, None),
        repmixer_kernel_size=5,
        cls_ratio=1.0,
    ),
    # Three outputs a channel: no pair of depthwise convolutions.
    VisionConfig(image_size=64, layers=(1, 1, 1, 1, 1), embed_dims=(16, 32, 32, 96, 96)),
]


def mlx_arrays(state):
    """The state dict in MLX's layout, by the definition of the layout and not by our writer."""
    arrays = {}
    for name, tensor in state.items():
        array = tensor.float().numpy()
        if name.endswith("num_batches_tracked"):
            continue
        if array.ndim == 4:
            array = array.transpose(0, 2, 3, 1)
        if "layer_scale" in name:
            array = array.reshape(1, 1, -1)
        name = name.replace("patch_embed.", "patch_embed.blocks.")
        arrays[name] = mx.array(np.ascontiguousarray(array))
    return arrays


def in_torch(state, config, pixels):
    module = reference.FastViTHD(config)
    module.load_state_dict(state)
    with torch.inference_mode():
        return module.eval()(torch.from_numpy(pixels)).numpy()


def relative_error(state, config, **how):
    pixels = np.random.default_rng(1).random((1, 3, config.image_size, config.image_size))
    pixels = pixels.astype(np.float32)
    expected = in_torch(state, config, pixels)
    found = FastViTHD(mlx_arrays(state), config, **how)(pixels)
    assert found.dtype == np.float32
    assert found.shape == expected.shape == (1, config.num_tokens, config.hidden_size)
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("config", [SMALL, *OTHERS])
def test_equal_to_torch_on_random_weights(config):
    assert relative_error(encoder_state_dict(config, seed=3), config) < 1e-4


def test_equal_to_torch_on_the_demo_checkpoint(demo_checkpoint):
    checkpoint = Checkpoint(demo_checkpoint)
    assert relative_error(checkpoint.encoder_state(), checkpoint.config.vision) < 1e-4


@pytest.fixture
def as_written():
    """Operations one by one: MLX compiles for a CPU with the system's C++ compiler."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.mark.parametrize("config", [SMALL, *OTHERS])
@pytest.mark.parametrize("device", ["metal", "cuda"])
def test_a_gpu_s_operations_are_equal_to_torch(config, device, as_written):
    state = encoder_state_dict(config, seed=3)
    assert relative_error(state, config, device=device) < 1e-4


def test_a_gpu_s_operations_are_equal_to_torch_on_the_demo_checkpoint(demo_checkpoint, as_written):
    checkpoint = Checkpoint(demo_checkpoint)
    state, config = checkpoint.encoder_state(), checkpoint.config.vision
    assert relative_error(state, config, device="metal") < 1e-4
    # Half precision as a GPU computes it: 10 bits of a mantissa.
    assert relative_error(state, config, device="metal", dtype=mx.float16) < 2e-2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="MLX compiles for a CPU with g++")
def test_compiled_as_a_whole_it_is_equal_to_torch():
    """Minutes the first time; MLX keeps what it compiled."""
    assert relative_error(encoder_state_dict(SMALL, seed=3), SMALL, device="metal") < 1e-4


def test_heads_have_the_width_of_a_fused_kernel(monkeypatch, as_written):
    widths = []
    fused = mx.fast.scaled_dot_product_attention

    def seen(q, k, v, **options):
        widths.append((q.shape[-1], k.shape[-1], v.shape[-1]))
        return fused(q, k, v, **options)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", seen)
    pixels = np.zeros((1, 3, 128, 128), np.float32)
    state = encoder_state_dict(SMALL)
    for device in ("metal", "cuda", ""):
        FastViTHD(mlx_arrays(state), SMALL, device=device)(pixels)
    # Two blocks in one stage and one in the next; CUDA takes 32; a CPU has no fused kernel.
    assert widths == [(64,) * 3] * 3 + [(32,) * 3] * 3


def test_a_weight_is_not_in_memory_twice(tmp_path):
    """Neither as it was stored beside what it was folded into, nor all of the layers unfolded."""
    config = VisionConfig(image_size=64, layers=(4, 4, 4, 4, 4), embed_dims=(32, 64, 64, 128, 128))
    arrays = {k: v.astype(mx.float16) for k, v in mlx_arrays(encoder_state_dict(config)).items()}
    mx.save_safetensors(str(tmp_path / "weights.safetensors"), arrays)
    stored = sum(array.nbytes for array in arrays.values())
    del arrays
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    arrays = mx.load(str(tmp_path / "weights.safetensors"))
    encoder = FastViTHD(arrays, config)
    assert arrays == {}
    assert mx.get_active_memory() - before < 2 * stored  # float32, on a CPU
    assert mx.get_peak_memory() - before < 2.3 * stored
    assert encoder.num_tokens == 1


def test_a_quantized_matrix_is_dequantized():
    """What mlx-vlm's conversions do to qkv: 8 bits are near enough for a look."""
    state = encoder_state_dict(SMALL, seed=5)
    arrays = mlx_arrays(state)
    name = "network.7.0.token_mixer.qkv"
    packed = mx.quantize(arrays[f"{name}.weight"], group_size=32, bits=8)
    arrays |= dict(
        zip([f"{name}.{p}" for p in ("weight", "scales", "biases")], packed, strict=True)
    )
    pixels = np.random.default_rng(1).random((1, 3, 128, 128)).astype(np.float32)
    found = FastViTHD(dict(arrays), SMALL, Quantization(Format(8, 32)))(pixels)
    expected = in_torch(state, SMALL, pixels)
    assert 0 < np.abs(found - expected).max() / np.abs(expected).max() < 0.02
    with pytest.raises(
        EncoderError, match=r"qkv\.weight is not quantized to 8 bits in groups of 64"
    ):
        FastViTHD(arrays, SMALL, Quantization(Format(8, 64)))


def test_every_result_is_observed_and_can_be_rounded():
    arrays = mlx_arrays(encoder_state_dict(SMALL))
    pixels = np.random.default_rng(1).random((1, 3, 128, 128)).astype(np.float32)
    seen = []

    def observe(result):
        seen.append(result.shape)
        return result.astype(mx.float16).astype(result.dtype)

    rounded = FastViTHD(dict(arrays), SMALL, observe=observe)(pixels)
    exact = FastViTHD(arrays, SMALL)(pixels)
    assert 0 < np.abs(rounded - exact).max() < 1e-2 * np.abs(exact).max()
    assert seen[0] == (1, 64, 64, 16)
    assert seen[-1] == (1, 2, 2, 256)
    assert len(seen) > 60


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda a: a.pop("network.0.0.layer_scale"), r"lacks network\.0\.0\.layer_scale"),
        (lambda a: a.update(other=mx.zeros(1)), "holds other, which is no weight"),
        (
            lambda a: a.update({"conv_exp.se.reduce.bias": mx.zeros(3)}),
            r"conv_exp\.se\.reduce\.bias has shape \[3\] where vision_config implies \[16\]",
        ),
    ],
)
def test_other_weights_are_refused(edit, words):
    arrays = mlx_arrays(encoder_state_dict(SMALL))
    edit(arrays)
    with pytest.raises(EncoderError, match=words):
        FastViTHD(arrays, SMALL)


def test_an_image_of_another_size_is_refused():
    encoder = FastViTHD(mlx_arrays(encoder_state_dict(SMALL)), SMALL)
    with pytest.raises(EncoderError, match=r"shape \[1, 3, 64, 64\], expected \[1, 3, 128, 128\]"):
        encoder(np.zeros((1, 3, 64, 64), np.float32))


def excited(config, value):
    """Arrays whose feature map is `value` everywhere before squeeze and excite, and so after it:
    the gate is a sigmoid of ten times what the mean is of `value`."""
    arrays = mlx_arrays(encoder_state_dict(config, seed=3))
    width, squeezed = config.hidden_size, config.hidden_size // 16
    filled = {
        "reparam_conv.weight": 0.0,
        "reparam_conv.bias": value,
        "se.reduce.weight": 1 / width,
        "se.reduce.bias": 0.0,
        "se.expand.weight": 10 / value / squeezed,
        "se.expand.bias": 0.0,
    }
    for name, number in filled.items():
        arrays[f"conv_exp.{name}"] = mx.full(arrays[f"conv_exp.{name}"].shape, number)
    return arrays


def test_half_precision_s_range_is_used_up_to_its_end():
    """Four places of 60,000 are summed in squeeze and excite, and doubled within GELU."""
    arrays = excited(SMALL, 60_000.0)
    pixels = np.random.default_rng(1).random((1, 3, 128, 128)).astype(np.float32)
    expected = FastViTHD(dict(arrays), SMALL)(pixels)
    np.testing.assert_allclose(expected, 60_000, rtol=1e-3)
    # What a GPU computes in; on a CPU MLX is only slow at it.
    found = FastViTHD(arrays, SMALL, dtype=mx.float16)(pixels)
    np.testing.assert_allclose(found, expected, rtol=2e-3)
