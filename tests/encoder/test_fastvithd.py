"""The folded FastViTHD against the unfolded one that the checkpoint describes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.synthetic import encoder_state_dict
from fastvlm_mlx.bundle.config import VisionConfig
from fastvlm_mlx.errors import CheckpointError
from model_export.encoder import reference
from model_export.encoder.fastvithd import fold

SMALL = VisionConfig(image_size=128, layers=(1, 2, 1, 2, 1), embed_dims=(16, 32, 32, 64, 128))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Layers this small are slower on several threads, far slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def unfolded(state: dict[str, torch.Tensor], config: VisionConfig) -> torch.nn.Module:
    module = reference.FastViTHD(config)
    module.load_state_dict(state)
    return module.eval()


def relative_error(state: dict[str, torch.Tensor], config: VisionConfig) -> float:
    """Largest difference between folded and unfolded, over the output's largest value."""
    images = torch.rand(1, 3, config.image_size, config.image_size)
    with torch.inference_mode():
        expected = unfolded(state, config)(images)
        found = fold(state, config)(images)
    assert found.shape == expected.shape == (1, config.num_tokens, config.hidden_size)
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("size", [128, 256])
def test_equal_to_the_unfolded_module(size: int) -> None:
    config = VisionConfig(image_size=size, layers=(1, 2, 1, 2, 1), embed_dims=(16, 32, 32, 64, 128))
    assert relative_error(encoder_state_dict(config, seed=size), config) < 1e-4


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    layers=st.lists(st.integers(1, 2), min_size=5, max_size=5),
    dims=st.sampled_from([(8, 8, 16, 32, 64), (16, 32, 32, 64, 64), (8, 16, 32, 32, 96)]),
    attention=st.lists(st.booleans(), min_size=2, max_size=2),
    position=st.sampled_from([None, 3, 7]),
    ratio=st.sampled_from([2, 3.5, 4]),
    kernel=st.sampled_from([3, 5]),
    size=st.sampled_from([64, 128]),
)
def test_equal_for_other_shapes(
    seed: int,
    layers: list[int],
    dims: tuple[int, ...],
    attention: list[bool],
    position: int | None,
    ratio: float,
    kernel: int,
    size: int,
) -> None:
    config = VisionConfig(
        image_size=size,
        layers=tuple(layers),
        embed_dims=dims,
        mlp_ratios=(ratio,) * 5,
        token_mixers=(
            "repmixer",
            "repmixer",
            "repmixer",
            *("attention" if a else "repmixer" for a in attention),
        ),
        pos_embs_shapes=(None, None, None, position, position),
        repmixer_kernel_size=kernel,
    )
    assert relative_error(encoder_state_dict(config, seed), config) < 1e-4


def test_the_real_shape_has_the_checkpoint_s_tensors() -> None:
    with torch.device("meta"):
        state = reference.FastViTHD(VisionConfig()).state_dict()
    assert len(state) == 629
    learned = [t.numel() for k, t in state.items() if "running_" not in k and t.dim()]
    assert sum(learned) / 1e6 == pytest.approx(125.07, abs=0.005)


def test_half_precision_and_channels_last_sources_are_widened_and_left_alone() -> None:
    state = {k: v.bfloat16() for k, v in encoder_state_dict(SMALL).items()}
    state = {
        k: v.contiguous(memory_format=torch.channels_last) if v.dim() == 4 else v
        for k, v in state.items()
    }
    before = {k: v.clone() for k, v in state.items()}
    module = fold(state, SMALL)
    assert all(torch.equal(state[k], before[k]) for k in state)
    for parameter in module.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.is_contiguous()
        assert not parameter.requires_grad


class Recorder(dict[str, torch.Tensor]):
    """A state dict that remembers what was read."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        super().__init__(tensors)
        self.read: list[str] = []

    def __getitem__(self, name: str) -> torch.Tensor:
        self.read.append(name)
        return super().__getitem__(name)


def test_every_tensor_is_read_once() -> None:
    state = Recorder(encoder_state_dict(SMALL))
    fold(state, SMALL)
    expected = sorted(k for k in state if not k.endswith("num_batches_tracked"))
    assert sorted(state.read) == expected


@pytest.mark.parametrize(
    "name",
    [
        "network.0.0.layer_scale",
        "network.7.1.layer_scale_1",
        "network.7.1.layer_scale_2",
        "network.7.0.norm.weight",
        "network.7.0.norm.bias",
        "network.7.0.token_mixer.qkv.weight",
        "network.2.1.convffn.conv.bn.weight",
        "network.2.1.convffn.conv.bn.bias",
        "network.2.1.convffn.conv.bn.running_mean",
        "network.2.1.convffn.conv.bn.running_var",
    ],
)
def test_what_is_folded_away_still_counts(name: str) -> None:
    state = encoder_state_dict(SMALL)
    images = torch.rand(1, 3, 128, 128)
    changed = {**state, name: state[name] + 0.5 * torch.rand(state[name].shape)}
    with torch.inference_mode():
        original, found = fold(state, SMALL)(images), fold(changed, SMALL)(images)
        expected = unfolded(changed, SMALL)(images)
    assert (expected - found).abs().max() < 0.05 * (original - found).abs().max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network.0.0.layer_scale": None}, r"network\.0\.0\.layer_scale is missing"),
        ({"conv_exp.se.reduce.bias": None}, r"conv_exp\.se\.reduce\.bias is missing"),
        ({"head.proj": None}, r"head\.proj is missing"),
        ({"network.9.bogus": torch.zeros(1)}, r"network\.9\.bogus"),
        ({"conv_exp.reparam_conv.weight": torch.zeros(1, 1, 3, 3)}, r"has shape \[1, 1, 3, 3\]"),
    ],
)
def test_a_state_that_does_not_fit_is_an_error(
    change: dict[str, torch.Tensor | None], message: str
) -> None:
    state = {**encoder_state_dict(SMALL), **change}
    with pytest.raises(CheckpointError, match=message):
        fold({k: v for k, v in state.items() if v is not None}, SMALL)
