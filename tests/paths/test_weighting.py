"""Loss weights: one loss, whatever the network predicts."""

import pytest
import torch

from hubgen.paths.path import RectifiedFlowPath, VariancePreservingPath
from hubgen.paths.prediction import PREDICTION_TYPES
from hubgen.paths.weighting import MinSnrWeighting, uniform_weighting


@pytest.mark.parametrize("make", [RectifiedFlowPath, VariancePreservingPath])
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_min_snr_weighs_the_error_of_the_data_the_same_in_every_prediction_type(make, kind):
    path = make(kind)
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    data, noise, error = (torch.randn(19, 5, dtype=torch.float64) for _ in range(3))
    x_t = path.interpolate(data, noise, t)
    prediction = path.convert(data, x_t, t, "data", kind)
    wrong = prediction + error
    data_error = path.convert(wrong, x_t, t, kind, "data") - data
    loss = MinSnrWeighting(5.0)(path, t) * error.square().sum(1)
    snr = (path.alpha(t) / path.sigma(t)) ** 2
    torch.testing.assert_close(loss, snr.clamp(max=5.0) * data_error.square().sum(1), rtol=1e-6, atol=1e-6)


def test_min_snr_has_the_closed_forms_of_the_paper():
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    noise, v = VariancePreservingPath("noise"), VariancePreservingPath("v")
    snr = noise.log_snr(t).exp()
    torch.testing.assert_close(MinSnrWeighting(5.0)(noise, t), snr.clamp(max=5) / snr)
    torch.testing.assert_close(MinSnrWeighting(5.0)(v, t), snr.clamp(max=5) / (snr + 1))


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("make", [RectifiedFlowPath, VariancePreservingPath])
def test_weights_are_finite_at_both_ends(make, kind):
    t = torch.tensor([0.0, 1.0])
    assert MinSnrWeighting()(make(kind), t).isfinite().all()
    assert uniform_weighting(make(kind), t).tolist() == [1.0, 1.0]


def test_a_bad_gamma_is_named():
    with pytest.raises(ValueError, match="`gamma`: got 0"):
        MinSnrWeighting(0)
