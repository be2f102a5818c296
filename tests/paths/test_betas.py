"""The discrete variance schedules, against their definitions and against diffusers' tables."""

import pytest
import torch
from diffusers import DDPMScheduler

from hubgen.paths.betas import BETA_SCHEDULES, make_betas, rescale_zero_terminal_snr


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("n", [10, 1000])
@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_every_schedule_equals_diffusers_table(name, n, rescale):
    ours = make_betas(name, num_train_timesteps=n, rescale_betas_zero_snr=rescale)
    theirs = DDPMScheduler(beta_schedule=name, num_train_timesteps=n, rescale_betas_zero_snr=rescale)
    torch.testing.assert_close(ours, theirs.betas, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cumprod(1 - ours, 0), theirs.alphas_cumprod, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_the_zero_snr_rescale_keeps_the_first_signal_and_ends_without_any(name):
    betas = make_betas(name)
    rescaled = torch.cumprod(1 - rescale_zero_terminal_snr(betas), 0)
    assert rescaled[-1] == 0
    torch.testing.assert_close(rescaled[0], 1 - betas[0])
