"""Products of float32 matrices, by whichever of torch's libraries is the faster one."""

from __future__ import annotations

import platform

import torch
import torch.nn.functional as F
from torch import Tensor

# torch's wheels for x86 multiply float32 by MKL, which takes a slower path on AMD's processors.
# There oneDNN, which the wheels have too, is 1.35 to 1.55 times as fast (one thread of an EPYC, the
# shapes of 0.5B), and as exact: 4e-7 of the standard deviation instead of 2.5e-7.
_ONEDNN = platform.machine() == "x86_64" and torch.backends.mkldnn.is_available()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply as `torch.nn.functional.linear`: [..., in], [out, in] → [..., out], in float32."""
    if _ONEDNN:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)
