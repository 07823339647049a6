"""Compressed weights of an ML Program, decompressed: the operations `constexpr_…` in numpy.

Parameters have MIL's own names. Semantics are those of coremltools' `converters/mil/mil/ops/defs`,
`iOS16/constexpr_ops.py` and `iOS18/compression.py`; results are in the type that the program
computes in, rounded as there. Every function raises ValueError for parameters that contradict each
other, before it makes anything larger than what is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import numpy as np

from fastvlm_mlx.vision.program.blobs import unpack_bits

# Of a weight: more than the largest of FastViTHD's by a factor of 12.
MAX_WEIGHT = 2**27


def affine_dequantize(
    quantized_data: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, axis: np.ndarray
) -> np.ndarray:
    """One scale and zero point for all, or one for each place along `axis`."""
    along = [1] * quantized_data.ndim
    along[int(axis)] = -1
    for parameter in (scale, zero_point):
        if parameter.ndim and parameter.shape != (quantized_data.shape[int(axis)],):
            raise ValueError(f"{parameter.shape} scales for a weight of {quantized_data.shape}")
    data = quantized_data.astype(np.float32) - zero_point.astype(np.float32).reshape(along)
    return (data * scale.reshape(along)).astype(scale.dtype)


def blockwise_shift_scale(
    data: np.ndarray, scale: np.ndarray, offset: np.ndarray | None = None
) -> np.ndarray:
    """One scale, and offset where there is one, for each block of a weight."""
    values = data.astype(scale.dtype)
    if offset is not None:
        values = values - _spread(offset, data.shape)
    return (_spread(scale, data.shape) * values).astype(scale.dtype)


def lut_to_dense(
    indices: np.ndarray,
    lut: np.ndarray,
    shape: np.ndarray | None = None,
    vector_axis: np.ndarray | None = None,
) -> np.ndarray:
    """Entries of a look-up table: one for the whole weight (iOS 16), or one for each block.

    Args:
        indices: until iOS 17 packed into bytes, `shape` that of the weight.
        lut: [palettes], or [blocks …, palettes, length of a vector].
        vector_axis: along which the vectors lie.
    """
    if shape is not None:
        sizes = tuple(int(n) for n in shape)
        return lut[unpack_bits(indices, (lut.size - 1).bit_length(), prod(sizes))].reshape(sizes)
    palettes, length = lut.shape[-2:]
    if indices.size * length > MAX_WEIGHT:
        raise ValueError(f"{indices.size:,} vectors of {length:,} elements are too many")
    blocks = np.arange(prod(lut.shape[:-2]), dtype=np.int32).reshape(lut.shape[:-2])
    values = lut.reshape(-1, palettes, length)[_spread(blocks, indices.shape), indices]
    if vector_axis is None:
        return values.reshape(indices.shape)
    axis = int(vector_axis) % indices.ndim
    sizes = tuple(n * (length if i == axis else 1) for i, n in enumerate(indices.shape))
    return np.moveaxis(values, -1, axis + 1).reshape(sizes)


def sparse_to_dense(
    nonzero_data: np.ndarray, mask: np.ndarray, shape: np.ndarray | None = None
) -> np.ndarray:
    """Zeros, and the stored values where `mask` says so (until iOS 17 bits packed into bytes)."""
    if shape is not None:
        sizes = tuple(int(n) for n in shape)
        mask = unpack_bits(mask, 1, prod(sizes)).reshape(sizes)
    if int(np.count_nonzero(mask)) != nonzero_data.size:
        raise ValueError(f"{nonzero_data.size:,} values for {np.count_nonzero(mask):,} places")
    dense = np.zeros(mask.shape, nonzero_data.dtype)
    dense[mask != 0] = nonzero_data
    return dense


def lut_to_sparse(
    indices_mask: np.ndarray,
    indices_nonzero_data: np.ndarray,
    lut: np.ndarray,
    vector_axis: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The mask and the values of a weight that is both sparse and palettized."""
    indices = sparse_to_dense(indices_nonzero_data, indices_mask)
    values = lut_to_dense(indices, lut, vector_axis=vector_axis)
    mask = indices_mask
    if vector_axis is not None:
        mask = np.repeat(mask, lut.shape[-1], axis=int(vector_axis))
    return mask, values[mask != 0]


def sparse_blockwise_shift_scale(
    data_mask: np.ndarray,
    nonzero_data: np.ndarray,
    scale: np.ndarray,
    offset: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The mask and the values of a weight that is both sparse and quantized."""
    dense = blockwise_shift_scale(sparse_to_dense(nonzero_data, data_mask), scale, offset)
    return data_mask, dense[data_mask != 0]


def cast(source_val: np.ndarray, output_dtype: str) -> np.ndarray:
    """float16 → float32, the one cast that MIL has for constants."""
    if output_dtype != "fp32":
        raise ValueError(f"a constant is cast to {output_dtype}")
    return source_val.astype(np.float32)


DECOMPRESS: dict[str, Callable[..., np.ndarray | tuple[np.ndarray, ...]]] = {
    "constexpr_affine_dequantize": affine_dequantize,
    "constexpr_blockwise_shift_scale": blockwise_shift_scale,
    "constexpr_cast": cast,
    "constexpr_lut_to_dense": lut_to_dense,
    "constexpr_lut_to_sparse": lut_to_sparse,
    "constexpr_sparse_blockwise_shift_scale": sparse_blockwise_shift_scale,
    "constexpr_sparse_to_dense": sparse_to_dense,
}


def _spread(blocks: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Each block's number at every place of the block, for a weight of `shape`."""
    if blocks.ndim != len(shape) or any(n % b for n, b in zip(shape, blocks.shape, strict=True)):
        raise ValueError(f"{list(shape)} can't be cut into {list(blocks.shape)} blocks")
    for axis, size in enumerate(shape):
        # A single block is broadcast.
        if 1 < blocks.shape[axis] < size:
            blocks = np.repeat(blocks, size // blocks.shape[axis], axis)
    return blocks
