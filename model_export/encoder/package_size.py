"""The size of an encoder's package on the disk, foretold from the module's shapes.

The weight file is coremltools': a header, and each tensor behind 64 bytes of its own, both padded
to 64. Its program's text, a megabyte at most, is estimated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from math import ceil, prod

from fastvlm_mlx.bundle.config import VisionConfig
from model_export.checkpoint.names import encoder_specs
from model_export.options import PALETTE_BITS, EncoderOptions

_ALIGNMENT = 64
# coremltools merges equal constants of so many elements: int8's zero points are all alike.
_MERGED_ELEMENTS = 100
_MANIFEST_BYTES = 617
# Of the program: for each function, and in it for each convolution with what is around it and for
# each weight that is unpacked.
_FUNCTION_BYTES, _CONVOLUTION_BYTES = 6_200, 1_634
_FP32_SHARE = 0.935
# What `fastvithd.fold` puts into the convolution beside it.
_FOLDED = (".bn.weight", ".norm.weight")
_UNPACKED_BYTES = {"int8": 252, "palette": 183}


def package_bytes(vision: VisionConfig, options: EncoderOptions) -> int:
    """Count the bytes of the package that the options ask for; `mixed` is counted at its limit."""
    shapes = _convolutions(vision)
    unpacked = [shape for shape in shapes if _is_compressed(shape, options)]
    kind = "int8" if options.precision == "int8" else "palette"
    program: float = _FUNCTION_BYTES + _CONVOLUTION_BYTES * len(shapes)
    if options.precision == "fp32":
        program *= _FP32_SHARE
    program += _UNPACKED_BYTES[kind] * len(unpacked)
    functions = 1 + len(options.other_sizes)
    blobs = sum(_ALIGNMENT + _padded(size) for size in _blobs(shapes, options))
    return int(_MANIFEST_BYTES + functions * program) + _ALIGNMENT + blobs


def _is_compressed(shape: tuple[int, ...], options: EncoderOptions) -> bool:
    """As `compress.uniform` and `mixed.mixed` choose: the first leaves the depthwise ones and the
    stem, the second leaves nothing out."""
    if not options.compressed:
        return False
    return options.precision == "mixed" or (shape[1] > 1 and shape[1] != 3)


def _blobs(shapes: Iterable[tuple[int, ...]], options: EncoderOptions) -> Iterator[int]:
    """The bytes of each tensor in the weight file."""
    size = 4 if options.precision == "fp32" else 2
    zeros: set[int] = set()
    for shape in shapes:
        count, out = prod(shape), shape[0]
        yield out * size
        if not _is_compressed(shape, options):
            yield count * size
        elif options.precision == "int8":
            yield from (count, out * 2)
            if out < _MERGED_ELEMENTS or out not in zeros:
                yield out
            zeros.add(out)
        elif options.precision == "mixed":
            yield int(options.bits_per_weight * count / 8)
        else:
            bits = PALETTE_BITS[options.precision]
            yield from (ceil(count * bits / 8), 2 * 2**bits)


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


@cache
def _convolutions(vision: VisionConfig) -> list[tuple[int, ...]]:
    """The shapes of the folded module's weights, each with a bias of as many elements as rows.

    From the names of the unfolded ones, since a forecast needs no torch.
    """
    return [
        spec.shape
        for spec in encoder_specs(vision)
        if spec.name.endswith(".weight") and not spec.name.endswith(_FOLDED)
    ]
