"""One object turns a batch into a loss: that of diffusers' recipes, for the models of every family."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import hubgen
from hubgen.conditioning.condition import Condition
from hubgen.conditioning.micro import MicroConditioning
from hubgen.conditioning.predict import predict
from hubgen.paths.continuous import CosinePath, EdmPath, VarianceExplodingPath
from hubgen.paths.path import PathSample, RectifiedFlowPath, VariancePreservingPath
from hubgen.paths.timesteps import LogitNormalDensity, UniformDensity
from hubgen.paths.weighting import MinSnrWeighting, noise_error_weighting
from hubgen.schedulers.objective import Objective, objective_of, scheduler_of
from tests import models

Official = Callable[[str], Path]
NAMES = ["sd1", "sd2", "sdxl", "sd3", "sd3.5", "flux-dev", "flux-schnell"]


def recipe(
    name: str, theirs: Any, backbone: Any, latents: Any, noise: Any, t: Any, condition: Condition
) -> torch.Tensor:
    """Loss of each picture as diffusers' example scripts compute it, written out; t is (B,) on the scheduler's grid."""
    scheduler, batch = theirs.scheduler, len(latents)
    if name.startswith("sd") and not name.startswith("sd3"):  # train_text_to_image(_sdxl).py
        timesteps = (t * 1000).round().long() - 1
        noisy = diffusers.DDPMScheduler.from_config(scheduler.config).add_noise(latents, noise, timesteps)
        more: dict[str, Any] = {}
        if name == "sdxl":
            more["added_cond_kwargs"] = {"text_embeds": condition.pooled, "time_ids": condition.micro}
        predicted = backbone(noisy, timesteps, encoder_hidden_states=condition.tokens, **more, return_dict=False)[0]
        v = diffusers.DDPMScheduler.from_config(scheduler.config).get_velocity(latents, noise, timesteps)
        target = v if scheduler.config.prediction_type == "v_prediction" else noise
        return (predicted - target).square().mean(dim=(1, 2, 3))
    sigma = t.view(-1, 1, 1, 1)
    noisy = (1 - sigma) * latents + sigma * noise
    text = {"encoder_hidden_states": condition.tokens, "pooled_projections": condition.pooled, "return_dict": False}
    if name.startswith("sd3"):  # train_dreambooth_sd3.py, without preconditioning
        predicted = backbone(noisy, timestep=1000 * t, **text)[0]
        return (predicted - (noise - latents)).square().mean(dim=(1, 2, 3))
    pipe = diffusers.FluxPipeline  # train_dreambooth_flux.py
    _, channels, height, width = noisy.shape
    guidance = torch.full((batch,), condition.guidance_scale) if backbone.config.guidance_embeds else None
    ids = pipe._prepare_latent_image_ids(batch, height // 2, width // 2, noisy.device, noisy.dtype)
    packed = pipe._pack_latents(noisy, batch, channels, height, width)
    txt_ids = torch.zeros(condition.tokens.shape[1], 3)
    out = backbone(packed, timestep=t, guidance=guidance, txt_ids=txt_ids, img_ids=ids, **text)[0]
    factor = 2 ** (len(theirs.vae.config.block_out_channels) - 1)
    predicted = pipe._unpack_latents(out, height * factor, width * factor, factor)
    return (predicted - (noise - latents)).square().mean(dim=(1, 2, 3))


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_are_those_of_diffusers_recipe(name: str, official: Official) -> None:
    folder = official(name)
    ours = hubgen.TextToImagePipeline.from_pretrained(folder)
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder)
    backbone = theirs.transformer if hasattr(theirs, "transformer") else theirs.unet
    config = backbone.config
    generator = torch.Generator().manual_seed(0)
    channels = ours.vae.config.latent_channels
    latents, noise = (torch.randn(3, channels, 8, 12, generator=generator) for _ in range(2))
    width = config.get("joint_attention_dim") or config.cross_attention_dim
    pooled = config.get("pooled_projection_dim")
    if name == "sdxl":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    condition = Condition(
        tokens=torch.randn(3, 7, width, generator=generator),
        pooled=None if pooled is None else torch.randn(3, pooled, generator=generator),
        micro=MicroConditioning((48, 96), (3, 5), (32, 48)).rows(3) if name == "sdxl" else None,
        guidance_scale=3.5,
    )
    objective = objective_of(ours.scheduler, tokens=24)
    t = objective.path.snap(torch.tensor([0.1, 0.4, 0.9]))
    sample = objective.path.sample(latents, noise, t)
    found = objective.loss(predict(ours.backbone, sample.x_t, objective.timestep(sample), condition), sample)
    expected = recipe(name, theirs, backbone, latents, noise, t, condition)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(found, expected, ours.backbone, backbone)


def assert_same_gradients(found: torch.Tensor, expected: torch.Tensor, ours: Any, theirs: Any) -> None:
    """Of the mean losses, for every parameter of two networks of the same weights."""
    found.mean().backward()
    expected.mean().backward()
    gradients = {key: value.grad for key, value in theirs.named_parameters() if value.grad is not None}
    assert len(gradients) > 20
    for key, value in ours.named_parameters():
        if value.grad is not None:
            torch.testing.assert_close(
                value.grad, gradients[key], rtol=1e-3, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}"
            )


def learned_variance_loss(
    out: torch.Tensor, x_0: torch.Tensor, x_t: torch.Tensor, noise: torch.Tensor, t: int, scheduler: Any
) -> torch.Tensor:
    """Improved DDPM's loss of one picture (2102.09672, eq. 15 and 16), written out in float64."""
    betas, bars = scheduler.betas.double(), scheduler.alphas_cumprod.double()
    x_0, x_t, noise = x_0.double(), x_t.double(), noise.double()
    eps, v = out.double().chunk(2)
    beta, bar, before = betas[t], bars[t], bars[t - 1] if t else torch.ones(()).double()
    first, second = before.sqrt() * beta / (1 - bar), (1 - beta).sqrt() * (1 - before) / (1 - bar)
    true_mean = first * x_0 + second * x_t
    mean = first * (x_t - (1 - bar).sqrt() * eps.detach()) / bar.sqrt() + second * x_t
    tilde = betas[max(t, 1)] * (1 - bars[max(t, 1) - 1]) / (1 - bars[max(t, 1)])
    log_variance = (v + 1) / 2 * beta.log() + (1 - v) / 2 * tilde.log()
    normal = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    if t:
        bound = torch.distributions.kl_divergence(torch.distributions.Normal(true_mean, tilde.sqrt()), normal)
    else:
        upper = torch.where(x_0 > 0.999, torch.ones_like(x_0), normal.cdf(x_0 + 1 / 255))
        lower = torch.where(x_0 < -0.999, torch.zeros_like(x_0), normal.cdf(x_0 - 1 / 255))
        bound = -(upper - lower).clamp(min=1e-12).log()
    return (eps - noise).square().mean() + bound.mean() / np.log(2) * len(betas) / 1000


def test_dit_learns_noise_and_variance_as_its_paper_says() -> None:
    ours, theirs = models.NETWORKS["DiT"].pair()
    scheduler = diffusers.DDPMScheduler()
    objective = Objective(objective_of(scheduler).path, learns_variance=True)
    data, noise, labels = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8), torch.tensor([3, 1, 10, 0])
    timesteps = torch.tensor([1, 10, 500, 999])
    sample = objective.path.sample(data, noise, objective.path.time(timesteps))
    noisy = scheduler.add_noise(data, noise, timesteps)
    out = theirs(noisy, timesteps, class_labels=labels).sample
    rows = zip(out, data, noisy, noise, timesteps.tolist(), strict=True)
    expected = torch.stack([learned_variance_loss(*row, scheduler) for row in rows]).float()
    found = objective.loss(predict(ours, sample.x_t, timesteps, Condition(labels=labels)), sample)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert_same_gradients(found, expected, ours, theirs)


def test_ddpm_learns_the_noise_at_uniform_timesteps() -> None:
    ours, theirs = models.NETWORKS["DDPM"].pair()
    scheduler = diffusers.DDPMScheduler()
    objective = objective_of(scheduler)
    images, noise = torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16)
    timesteps = torch.tensor([0, 10, 500, 999])
    sample = objective.path.sample(images, noise, objective.path.time(timesteps))
    assert torch.equal(objective.timestep(sample), timesteps)
    noisy = scheduler.add_noise(images, noise, timesteps)
    expected = (theirs(noisy, timesteps).sample - noise).square().mean((1, 2, 3))
    found = objective.loss(predict(ours, sample.x_t, objective.timestep(sample), Condition()), sample)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(found, expected, ours, theirs)
    drawn = objective.path.timestep(objective.draw(torch.zeros(100_000, 1), torch.Generator().manual_seed(0)).t)
    assert drawn.bincount(minlength=1000).float().std() < 12  # uniform: 100 each, give or take 10


def test_ncsnpp_learns_the_score_by_the_noise() -> None:
    """2011.13456, eq. 7 with the weight sigma^2, on the network that divides by sigma itself."""
    ours, theirs = models.NETWORKS["NCSN++"].pair()
    objective = objective_of(diffusers.ScoreSdeVeScheduler(sigma_max=50.0))
    images, noise = torch.rand(4, 3, 16, 16), torch.randn(4, 3, 16, 16)
    sample = objective.path.sample(images, noise, torch.tensor([0.2, 0.4, 0.7, 1.0]))
    sigma = 0.01 * (50 / 0.01) ** sample.t
    score = theirs(images + sigma.view(-1, 1, 1, 1) * noise, sigma).sample
    expected = (sigma.view(-1, 1, 1, 1) * score + noise).square().mean((1, 2, 3))
    found = objective.loss(predict(ours, sample.x_t, objective.timestep(sample), Condition()), sample)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert_same_gradients(found, expected, ours, theirs)


def test_scores_learn_the_noise_that_they_stand_for() -> None:
    """2011.13456, eq. 7 with the weight sigma^2: |sigma score + noise|^2."""
    for scheduler in (hubgen.ScoreSdeVeScheduler(sigma_max=50.0), hubgen.AnnealedLangevinScheduler()):
        objective = objective_of(scheduler)
        data, noise = torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4, 4)
        sample = objective.path.sample(data, noise, torch.rand(5))
        score, sigma = torch.randn(5, 3, 4, 4), objective.path.sigma(sample.t).view(-1, 1, 1, 1)
        expected = (sigma * score + noise).square().mean((1, 2, 3))
        torch.testing.assert_close(objective.loss(score, sample), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shift", "tokens", "expected"), [({"shift": 3.0}, None, 3.0), ({"use_dynamic_shifting": True}, 256, 1.6487)]
)
def test_the_times_of_a_flow_are_shifted_as_its_scheduler_shifts(
    shift: dict, tokens: int | None, expected: float
) -> None:
    density = objective_of(diffusers.FlowMatchEulerDiscreteScheduler(**shift), tokens).density
    assert isinstance(density, LogitNormalDensity) and density.shift == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    "objective",
    [
        Objective(RectifiedFlowPath(), UniformDensity(shift=3.0)),
        Objective(VariancePreservingPath("v", beta_schedule="scaled_linear", rescale_betas_zero_snr=True)),
        Objective(VariancePreservingPath("data", trained_betas=[0.1, 0.2, 0.3], num_train_timesteps=3)),
        Objective(VarianceExplodingPath(sigma_max=348.0), weighting=noise_error_weighting),
        Objective(VarianceExplodingPath(sigma_max=1.0, levels=12), weighting=noise_error_weighting),
        Objective(EdmPath()),
    ],
)
def test_the_scheduler_of_an_objective_leads_back_to_its_path(objective: Objective) -> None:
    again = objective_of(scheduler_of(objective))
    t = objective.path.snap(torch.linspace(0.05, 0.95, 7))
    assert type(again.path) is type(objective.path)
    assert again.path.prediction_type == objective.path.prediction_type
    for name in ("alpha", "sigma", "timestep"):
        torch.testing.assert_close(getattr(again.path, name)(t), getattr(objective.path, name)(t))
    assert again.density.shift == objective.density.shift


def test_a_schedule_of_betas_samples_along_the_cosine_path() -> None:
    objective = Objective(CosinePath())
    scheduler = scheduler_of(objective)
    index = torch.tensor([0, 10, 500, 998, 999])
    bars = scheduler.alphas_cumprod[index].double()
    t = objective.path.time(index).double()
    torch.testing.assert_close(objective.path.alpha(t).square(), bars, rtol=1e-3, atol=1e-7)
    assert torch.equal(objective.path.timestep(t).round().long(), index)


def test_a_picture_of_a_generator_of_its_own_learns_the_same_in_any_batch() -> None:
    objective, latents = Objective(RectifiedFlowPath(), LogitNormalDensity(), noise_offset=0.1), torch.randn(4, 2, 3, 3)

    def seeded() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in range(4)]

    whole = objective.draw(latents, seeded())
    halves = [objective.draw(latents[rows], seeded()[rows]) for rows in (slice(0, 2), slice(2, 4))]
    for name in ("x_t", "target", "t"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(half, name) for half in halves]))
    with pytest.raises(ValueError, match="`random`: got 3 generators, expected 4"):
        objective.draw(latents, seeded()[:3])


def test_masks_hubers_and_offsets_do_what_they_say() -> None:
    path, generator = RectifiedFlowPath(), torch.Generator().manual_seed(0)
    sample = path.sample(
        torch.zeros(2, 3, 4, 4), torch.randn(2, 3, 4, 4, generator=generator), torch.tensor([0.3, 0.6])
    )
    plain = Objective(path).loss(torch.zeros(2, 3, 4, 4), sample)
    mask = torch.zeros(2, 1, 4, 4)
    mask[:, :, :2] = 1
    half = Objective(path).loss(torch.zeros(2, 3, 4, 4), sample, mask)
    torch.testing.assert_close(half, sample.target[:, :, :2].square().mean((1, 2, 3)) / 2)
    torch.testing.assert_close(Objective(path).loss(torch.zeros(2, 3, 4, 4), sample, torch.ones_like(mask)), plain)
    torch.testing.assert_close(
        Objective(path, huber=30.0).loss(torch.zeros(2, 3, 4, 4), sample), plain, rtol=5e-3, atol=0
    )
    small = Objective(path, huber=1e-3).loss(torch.zeros(2, 3, 4, 4), sample)
    torch.testing.assert_close(small, 2e-3 * sample.target.abs().mean((1, 2, 3)), rtol=2e-2, atol=0)
    offset = Objective(path, noise_offset=10.0).draw(torch.zeros(200, 3, 2, 2), generator).target
    assert 9 < offset.mean((2, 3)).std() < 11 and offset.std((2, 3)).mean() < 1.2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Objective(RectifiedFlowPath(), huber=0.0), "`huber`: got 0.0"),
        (lambda: Objective(RectifiedFlowPath(), noise_offset=-1.0), "`noise_offset`: got -1.0"),
        (
            lambda: Objective(VariancePreservingPath(rescale_betas_zero_snr=True), weighting=MinSnrWeighting()),
            "`weighting`: got min-SNR with the prediction 'noise' on a path that ends without signal",
        ),
        (
            lambda: objective_of(diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)),
            "`tokens`: got None",
        ),
        (lambda: objective_of(diffusers.EDMEulerScheduler()), "`scheduler`: got EDMEulerScheduler with the prediction"),
        (lambda: objective_of(diffusers.AmusedScheduler(mask_token_id=1)), "which no path here belongs to"),
        (lambda: scheduler_of(Objective(CosinePath("velocity"))), "`objective`: got a CosinePath of 'velocity'"),
        (
            lambda: Objective(RectifiedFlowPath()).loss(
                torch.zeros(2, 3), PathSample(*[torch.zeros(2, 4)] * 2, torch.zeros(2), torch.zeros(2, 4))
            ),
            r"`prediction`: got shape \(2, 3\), expected the target's, \(2, 4\)",
        ),
        (
            lambda: Objective(RectifiedFlowPath()).loss(
                torch.zeros(2, 3, 4, 4),
                PathSample(*[torch.zeros(2, 3, 4, 4)] * 2, torch.zeros(2), torch.zeros(2, 3, 4, 4)),
                torch.ones(2, 3, 4, 4),
            ),
            r"`mask`: got shape \(2, 3, 4, 4\), expected \(2, 1, 4, 4\)",
        ),
    ],
)
def test_what_cannot_be_learned_is_refused_by_argument(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_learned_variance_costs_the_variational_bound() -> None:
    path = VariancePreservingPath("noise", num_train_timesteps=50)
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=50)
    generator = torch.Generator().manual_seed(0)
    data = torch.rand(4, 2, 3, 3, generator=generator).mul(255).round() / 127.5 - 1
    noise = torch.randn(4, 2, 3, 3, generator=generator)
    out = torch.randn(4, 4, 3, 3, generator=generator)
    index = torch.tensor([0, 1, 20, 49])
    sample = path.sample(data, noise, path.time(index))
    losses = Objective(path, learns_variance=True).loss(out, sample)
    for row, t in enumerate(index.tolist()):
        expected = learned_variance_loss(out[row], data[row], sample.x_t[row], noise[row], t, scheduler)
        assert losses[row].item() == pytest.approx(expected.item(), rel=2e-4)


def test_the_bound_moves_the_variance_and_not_the_mean() -> None:
    path = VariancePreservingPath("noise")
    sample = path.sample(torch.randn(2, 1, 2, 2), torch.randn(2, 1, 2, 2), torch.tensor([0.2, 0.7]))
    prediction = torch.zeros(2, 2, 2, 2, requires_grad=True)
    Objective(path, learns_variance=True).loss(prediction, sample).sum().backward()
    plain = torch.zeros(2, 1, 2, 2, requires_grad=True)
    Objective(path).loss(plain, sample).sum().backward()
    assert prediction.grad is not None and plain.grad is not None
    torch.testing.assert_close(prediction.grad[:, :1], plain.grad)
    assert prediction.grad[:, 1:].abs().min() > 0
    with pytest.raises(ValueError, match="`learns_variance`: got True with a RectifiedFlowPath"):
        Objective(RectifiedFlowPath(), learns_variance=True)
