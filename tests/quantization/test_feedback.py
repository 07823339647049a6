"""Rounding of the mixed encoder: what one input's weights lose, the next ones take up."""

import pytest
import torch

from model_export.encoder.compression import Histogram, rounded
from model_export.quantization.bits.encoder_sensitivity import Moments
from model_export.quantization.bits.mixed import Feedback


class TestFeedback:
    def correlated(self):
        generator = torch.Generator().manual_seed(1)
        mixing = torch.randn(32, 8, generator=generator)
        inputs = mixing @ torch.randn(8, 4000, generator=generator)
        inputs += 0.1 * torch.randn(32, 4000, generator=generator) + 3
        weight = torch.randn(16, 32, generator=generator)
        return inputs, weight

    def test_correlated_inputs_take_up_the_error(self):
        inputs, weight = self.correlated()
        mean = inputs.mean(1)
        feedback = Feedback.of(Moments(mean, torch.cov(inputs, correction=0)))
        palette = torch.from_numpy(Histogram.of(weight).palette(4)[0]).float()
        stored = feedback.round(weight, palette)
        assert set(stored.unique().tolist()) <= set(palette.tolist())

        def noise(found, bias):
            return float(((found - weight) @ inputs + bias).square().mean())

        plain = noise(rounded(weight, palette), 0.0)
        fed_back = noise(stored, ((weight - stored) @ mean)[:, None])
        assert fed_back < plain / 8
        assert fed_back / plain == pytest.approx(feedback.gain, rel=0.9)

    def test_in_blocks_it_is_the_same(self, monkeypatch):
        inputs, weight = self.correlated()
        feedback = Feedback.of(Moments(inputs.mean(1), torch.cov(inputs, correction=0)))
        palette = torch.from_numpy(Histogram.of(weight).palette(4)[0]).float()
        whole = feedback.round(weight, palette)
        monkeypatch.setattr("model_export.quantization.bits.mixed._BLOCK", 5)
        assert torch.equal(feedback.round(weight, palette), whole)

    def test_uncorrelated_inputs_leave_plain_rounding(self):
        _, weight = self.correlated()
        palette = torch.from_numpy(Histogram.of(weight).palette(4)[0]).float()
        feedback = Feedback.of(Moments(torch.zeros(32), torch.eye(32)))
        assert torch.equal(feedback.round(weight, palette), rounded(weight, palette))

    def test_an_input_that_never_changes_is_no_error(self):
        _, weight = self.correlated()
        palette = torch.from_numpy(Histogram.of(weight).palette(4)[0]).float()
        feedback = Feedback.of(Moments(torch.ones(32), torch.zeros(32, 32)))
        assert torch.equal(feedback.round(weight, palette), rounded(weight, palette))
