import pytest
import torch

from model_export.language.products import linear


@pytest.mark.parametrize("shape", [(1, 64, 64), (7, 130, 24), (338, 896, 128)])
@pytest.mark.parametrize("biased", [False, True])
def test_as_exact_as_float32_is(shape, biased):
    rows, width, height = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, rows, width, generator=generator)
    weight = torch.randn(height, width, generator=generator)
    bias = torch.randn(height, generator=generator) if biased else None
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    # Products of bfloat16 would be wrong by thousandths.
    assert (linear(x, weight, bias) - exact).std() < 2e-6 * exact.std()


def test_rows_that_are_not_beside_each_other():
    x, weight = torch.randn(8, 5, 64)[::2], torch.randn(96, 64)
    torch.testing.assert_close(linear(x, weight), x @ weight.T)
