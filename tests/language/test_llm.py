"""Casting, quantizing and streaming: the file that is written is what mlx-lm would compute."""

from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from fastvlm_mlx.bundle.quantization import MODES, Format
from fastvlm_mlx.errors import CheckpointError, OptionError
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.checkpoint.weights import tensors
from model_export.checkpoint.weights.tensors import ALL
from model_export.language import llm
from model_export.language.recipes import scheme
from model_export.language.weights import Matrix
from model_export.options import BITS, GROUP_SIZES, ExportOptions
from model_export.options.loaders import LOADERS

QUANTIZED = [bits for bits in BITS if bits != 16]


def write(checkpoint: Checkpoint, options: ExportOptions, directory: Path) -> llm.Summary:
    chosen = scheme(
        checkpoint.llm_specs, checkpoint.config, options.llm, options.destination.layout
    )
    return llm.write(
        checkpoint,
        chosen,
        options.destination.layout,
        options.llm.dtype,
        directory,
        lambda count: None,
    )


@pytest.mark.parametrize("bits", LOADERS["app"].forms["affine"][0])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_what_is_written_is_what_mlx_quantizes(
    demo_checkpoint, tmp_path, bits, group_size, monkeypatch
):
    # Five rows or fewer, so that no matrix is one block and the last one is not full.
    monkeypatch.setattr(tensors, "BLOCK_ELEMENTS", 700)
    checkpoint = Checkpoint(demo_checkpoint)
    options = ExportOptions.of(llm_bits=bits, group_size=group_size)
    summary = write(checkpoint, options, tmp_path)
    chosen = scheme(
        checkpoint.llm_specs, checkpoint.config, options.llm, options.destination.layout
    )
    written = mx.load(str(tmp_path / "model.safetensors"))
    assert sum(array.nbytes for array in written.values()) == summary.bytes
    for spec in checkpoint.llm_specs:
        source = checkpoint.array(spec.source)
        if llm.format_of(spec, chosen) is None:
            assert mx.array_equal(written[spec.name], source.astype(mx.float16)).item()
            continue
        stem = spec.name.removesuffix("weight")
        parts = [written[stem + part] for part in ("weight", "scales", "biases")]
        whole = mx.quantize(source.astype(mx.float32), group_size=group_size, bits=bits)
        for found, expected in zip(parts, whole, strict=True):
            assert mx.array_equal(found, expected.astype(found.dtype)).item()


@pytest.mark.parametrize(
    "form",
    [Format(bits, 64) for bits in QUANTIZED]
    + [Format(bits[0], groups[0], mode) for mode, (bits, groups) in MODES.items()],
    ids=str,
)
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_quantizing_in_float32_is_mlx_s_quantizing_in_half_precision(form, dtype):
    weight = mx.random.normal((64, 256), key=mx.random.key(form.bits)).astype(dtype)
    wide = mx.quantize(weight.astype(mx.float32), **asdict(form))
    for found, expected in zip(wide, mx.quantize(weight, **asdict(form)), strict=True):
        assert mx.array_equal(found.astype(expected.dtype), expected).item()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_unquantized_weights_are_the_source_s(demo_checkpoint, tmp_path, dtype):
    checkpoint = Checkpoint(demo_checkpoint)
    options = ExportOptions.of(llm_bits=16, dtype=dtype)
    summary = write(checkpoint, options, tmp_path)
    assert summary.unquantized == {}
    assert summary.bits_per_weight == (32 if dtype == "float32" else 16)
    with safe_open(str(tmp_path / "model.safetensors"), framework="pt") as stream:
        assert stream.metadata() == {"format": "mlx"}
        for spec in checkpoint.llm_specs:
            expected = checkpoint.tensor(spec.source).to(getattr(torch, dtype))
            assert torch.equal(stream.get_tensor(spec.name), expected)


def test_the_projector_stays_in_16_bits_and_the_summary_says_so(demo_checkpoint, tmp_path):
    checkpoint = Checkpoint(demo_checkpoint)
    summary = write(checkpoint, ExportOptions.of(llm_bits=4), tmp_path)
    assert set(summary.unquantized) == {
        "multi_modal_projector.linear_0.weight",
        "multi_modal_projector.linear_2.weight",
    }
    written = mx.load(str(tmp_path / "model.safetensors"))
    assert not [name for name in written if name.endswith("scales") and "projector" in name]


@dataclass(frozen=True)
class InMemory:
    array: mx.array

    @property
    def shape(self):
        return self.array.shape

    def read(self, rows=ALL):
        return self.array[rows]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 4),
    bits=st.sampled_from(QUANTIZED),
    group_size=st.sampled_from(GROUP_SIZES),
    seed=st.integers(0, 2**32 - 1),
)
def test_our_unpacking_is_mlx_s(rows, groups, bits, group_size, seed):
    weight = np.random.default_rng(seed).standard_normal((rows, groups * group_size))
    parts = mx.quantize(mx.array(weight.astype(np.float32)), group_size=group_size, bits=bits)
    matrix = Matrix(*map(InMemory, parts), Format(bits, group_size))
    expected = np.array(mx.dequantize(*parts, group_size=group_size, bits=bits))
    np.testing.assert_allclose(matrix.float().numpy(), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(matrix.float(slice(0, 1)), matrix.float()[:1])
    np.testing.assert_array_equal(torch.cat(list(matrix.blocks())), matrix.float())


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "affine"])
def test_our_unpacking_of_float_formats_is_mlx_s(mode):
    form = Format(MODES[mode][0][0], MODES[mode][1][0], mode)
    scale = 2.0 ** np.arange(-12, 12, 0.75)[:, None]
    weight = np.random.default_rng(1).standard_normal((32, 128)) * scale
    parts = mx.quantize(mx.array(weight.astype(np.float32)), **asdict(form))
    words, scales = map(InMemory, parts)
    matrix = Matrix(words, scales, None, form)
    expected = np.array(mx.dequantize(*parts, **asdict(form)).astype(mx.float32))
    # MLX rounds what it dequantizes to bfloat16.
    np.testing.assert_allclose(matrix.float().numpy(), expected, rtol=2**-8)


def test_shards_are_complete_and_indexed(demo_checkpoint, tmp_path, monkeypatch):
    import json

    monkeypatch.setattr(llm, "SHARD_BYTES", 300_000)
    checkpoint = Checkpoint(demo_checkpoint)
    summary = write(checkpoint, ExportOptions.of(llm_bits=8), tmp_path)
    assert len(summary.files) > 2
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    found = {name: file for file in summary.files for name in mx.load(str(tmp_path / file))}
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == summary.bytes


def test_progress_adds_up(demo_checkpoint, tmp_path):
    checkpoint = Checkpoint(demo_checkpoint)
    options = ExportOptions.of(llm_bits=3)
    counts: list[int] = []
    chosen = scheme(
        checkpoint.llm_specs, checkpoint.config, options.llm, options.destination.layout
    )
    llm.write(checkpoint, chosen, "app", "float16", tmp_path, counts.append)
    assert sum(counts) == llm.total_bytes(checkpoint, chosen, "app", "float16")


def test_a_weight_beyond_float16_is_named(edit_checkpoint, tmp_path):
    def enlarge(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6

    checkpoint = Checkpoint(edit_checkpoint(tensors=enlarge))
    with pytest.raises(
        OptionError, match=r"layers\.1\.mlp\.up_proj\.weight reaches 1e\+06.*bfloat"
    ):
        write(checkpoint, ExportOptions(), tmp_path)
    write(checkpoint, ExportOptions.of(dtype="bfloat16"), tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_no_number_is_named(edit_checkpoint, tmp_path, value):
    def spoil(tensors):
        tensors["model.layers.0.self_attn.k_proj.weight"][3, 5] = value

    checkpoint = Checkpoint(edit_checkpoint(tensors=spoil))
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.k_proj\.weight holds NaN"):
        write(checkpoint, ExportOptions.of(dtype="float32"), tmp_path)
