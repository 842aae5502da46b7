"""The respaced schedulers: step by step against those of diffusers, and against their own formulas in float64."""

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from stablesr_kit import SpacedDDIMScheduler, SpacedDDPMScheduler
from stablesr_kit.diffusion.spaced import ddim_sigma
from tests.helpers.tiny import seeded, unit_noise

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PREDICTIONS = ["epsilon", "v_prediction", "sample"]
SHAPE = (2, 4, 6, 5)

both_kinds = pytest.mark.parametrize("kind", [SpacedDDPMScheduler, SpacedDDIMScheduler])
every_prediction = pytest.mark.parametrize("prediction_type", PREDICTIONS)


def model_output(step: int) -> Tensor:
    """Stands for a network: the same output at the same step, whatever the sample."""
    return unit_noise(*SHAPE, seed=100 + step)


def close(ours: Tensor, theirs: Tensor, step: Any) -> None:
    tolerance = 2e-5 * max(1.0, theirs.abs().max().item())
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0, msg=lambda text: f"at step {step}: {text}")


@every_prediction
@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
@pytest.mark.parametrize("steps", [1, 2, 7, 50, 200])
def test_ddpm_agrees_with_diffusers_at_every_step(prediction_type: str, spacing: str, steps: int) -> None:
    ours = SpacedDDPMScheduler(prediction_type=prediction_type, timestep_spacing=spacing)
    theirs = DDPMScheduler(prediction_type=prediction_type, clip_sample=False, **SD)
    ours.set_timesteps(steps)
    theirs.set_timesteps(timesteps=ours.timesteps.tolist())
    assert torch.equal(ours.timesteps, theirs.timesteps)
    x = unit_noise(*SHAPE)
    for step, timestep in enumerate(ours.timesteps):
        mine = ours.step(model_output(step), timestep, x, generator=seeded(step))
        other = theirs.step(model_output(step), timestep, x, generator=seeded(step))
        close(mine.prev_sample, other.prev_sample, step)
        close(mine.pred_original_sample, other.pred_original_sample, step)
        x = other.prev_sample


@every_prediction
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("steps", [1, 4, 10, 50])
def test_ddim_agrees_with_diffusers_at_every_step(prediction_type: str, eta: float, steps: int) -> None:
    common = {"prediction_type": prediction_type, "timestep_spacing": "trailing"}
    ours, theirs = SpacedDDIMScheduler(**common), DDIMScheduler(clip_sample=False, **common, **SD)
    ours.set_timesteps(steps)
    theirs.set_timesteps(steps)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    x = unit_noise(*SHAPE)
    for step, timestep in enumerate(ours.timesteps):
        noise = unit_noise(*SHAPE, seed=step)
        mine = ours.step(model_output(step), timestep, x, eta=eta, variance_noise=noise)
        other = theirs.step(model_output(step), timestep, x, eta=eta, variance_noise=noise)
        close(mine.prev_sample, other.prev_sample, step)
        close(mine.pred_original_sample, other.pred_original_sample, step)
        x = other.prev_sample


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_on_uneven_timesteps_is_its_formula_in_float64(eta: float) -> None:
    scheduler = SpacedDDIMScheduler()
    scheduler.set_timesteps(21)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = (1 - betas).cumprod(0)
    timesteps = scheduler.timesteps.tolist()
    x = unit_noise(*SHAPE).double()
    for step, timestep in enumerate(timesteps):
        alpha = alphas[timestep]
        alpha_prev = alphas[timesteps[step + 1]] if step + 1 < len(timesteps) else torch.ones((), dtype=torch.float64)
        eps, noise = model_output(step).double(), unit_noise(*SHAPE, seed=step)
        x0 = (x - (1 - alpha).sqrt() * eps) / alpha.sqrt()
        sigma = eta * ((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)).sqrt()
        expected = alpha_prev.sqrt() * x0 + (1 - alpha_prev - sigma**2).sqrt() * eps + sigma * noise.double()
        ours = scheduler.step(eps.float(), timestep, x.float(), eta=eta, variance_noise=noise).prev_sample
        close(ours.double(), expected, step)
        x = expected


@both_kinds
@pytest.mark.parametrize("spacing", ["linspace", "trailing", "leading"])
def test_every_number_of_steps_gives_descending_timesteps_of_the_training_schedule(kind: Any, spacing: str) -> None:
    scheduler = kind(timestep_spacing=spacing)
    for steps in (*range(1, 51), 999, 1000):
        scheduler.set_timesteps(steps)
        timesteps = scheduler.timesteps.tolist()
        assert len(timesteps) == len(set(timesteps)) == steps == scheduler.num_inference_steps
        assert timesteps == sorted(timesteps, reverse=True)
        assert 0 <= timesteps[-1] and timesteps[0] <= 999
        if spacing != "leading":
            assert timesteps[0] == 999
        if spacing == "linspace" and steps > 1:
            assert timesteps[-1] == 0
        assert len(scheduler.posterior.variance) == steps


def test_all_timesteps_together_are_the_schedule_of_training() -> None:
    scheduler = SpacedDDPMScheduler()
    scheduler.set_timesteps(1000)
    torch.testing.assert_close(scheduler.posterior.betas, DDPMScheduler(**SD).betas, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("steps", [2, 4, 50, 1000])
def test_the_posterior_leads_from_one_noise_level_exactly_to_the_next(steps: int) -> None:
    scheduler = SpacedDDPMScheduler()
    scheduler.set_timesteps(steps)
    p = scheduler.posterior
    signal = p.coef1 + p.coef2 * p.alphas_cumprod.sqrt()
    variance = p.coef2.square() * (1 - p.alphas_cumprod) + p.variance
    torch.testing.assert_close(signal, p.alphas_cumprod_prev.sqrt(), atol=2e-5, rtol=0)
    torch.testing.assert_close(variance, 1 - p.alphas_cumprod_prev, atol=2e-5, rtol=0)


@both_kinds
@every_prediction
def test_a_perfect_network_ends_at_the_clean_latent(kind: Any, prediction_type: str) -> None:
    scheduler = kind(prediction_type=prediction_type)
    scheduler.set_timesteps(10)
    x0 = unit_noise(*SHAPE, seed=1)
    x = scheduler.add_noise(x0, unit_noise(*SHAPE), scheduler.timesteps[:1].repeat(2))
    for timestep in scheduler.timesteps:
        alpha = scheduler.alphas_cumprod[timestep]
        noise = (x - alpha.sqrt() * x0) / (1 - alpha).sqrt()
        velocity = scheduler.get_velocity(x0, noise, timestep.repeat(2))
        output = {"epsilon": noise, "v_prediction": velocity, "sample": x0}[prediction_type]
        x = scheduler.step(output, timestep, x, generator=seeded(0)).prev_sample
    torch.testing.assert_close(x, x0, atol=1e-4, rtol=0)


@every_prediction
def test_predictions_convert_to_the_clean_latent_and_back_in_float64(prediction_type: str) -> None:
    scheduler = SpacedDDPMScheduler(prediction_type=prediction_type)
    x0, noise = unit_noise(*SHAPE).double(), unit_noise(*SHAPE, seed=1).double()
    for alpha in (0.9991, 0.5, 0.0047):
        x = alpha**0.5 * x0 + (1 - alpha) ** 0.5 * noise
        velocity = alpha**0.5 * noise - (1 - alpha) ** 0.5 * x0
        output = {"epsilon": noise, "v_prediction": velocity, "sample": x0}[prediction_type]
        back = scheduler.predict_x0(output, alpha, x)
        torch.testing.assert_close(back, x0, atol=1e-12, rtol=0)
        assert back.dtype == torch.float64


@both_kinds
def test_given_noise_replaces_the_drawn_one(kind: Any) -> None:
    scheduler = kind()
    scheduler.set_timesteps(4)
    x, eta = unit_noise(*SHAPE), {"eta": 1.0} if kind is SpacedDDIMScheduler else {}
    for timestep in scheduler.timesteps:
        drawn = scheduler.step(model_output(0), timestep, x, generator=seeded(5), **eta).prev_sample
        given = scheduler.step(model_output(0), timestep, x, variance_noise=unit_noise(*SHAPE, seed=5), **eta)
        assert torch.equal(drawn, given.prev_sample), timestep
    one_each = [seeded(5), seeded(6)]
    timestep = scheduler.timesteps[0]
    drawn = scheduler.step(model_output(0), timestep, x, generator=one_each, **eta).prev_sample
    alone = scheduler.step(model_output(0)[1:], timestep, x[1:], generator=seeded(6), **eta).prev_sample
    assert torch.equal(drawn[1:], alone)


@both_kinds
def test_the_last_step_draws_nothing(kind: Any) -> None:
    scheduler = kind()
    scheduler.set_timesteps(4)
    results = [
        scheduler.step(model_output(0), 0, unit_noise(*SHAPE), generator=seeded(seed)).prev_sample for seed in (1, 2)
    ]
    assert torch.equal(*results)


@both_kinds
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_kept(kind: Any, dtype: torch.dtype) -> None:
    scheduler = kind()
    scheduler.set_timesteps(50)
    x, output, noise = (unit_noise(*SHAPE, seed=seed).to(dtype) for seed in (1, 2, 3))
    for timestep in (999, 0):
        half = scheduler.step(output, timestep, x, variance_noise=noise)
        full = scheduler.step(output.float(), timestep, x.float(), variance_noise=noise.float())
        assert half.prev_sample.dtype == half.pred_original_sample.dtype == dtype
        assert torch.equal(half.prev_sample, full.prev_sample.to(dtype))


@both_kinds
def test_the_denoised_latent_can_be_changed_before_it_is_used(kind: Any) -> None:
    scheduler = kind()
    scheduler.set_timesteps(5)
    seen = []

    def to_zero(x0: Tensor, index: int) -> Tensor:
        seen.append(index)
        return torch.zeros_like(x0)

    for timestep in scheduler.timesteps:
        step = scheduler.step(
            model_output(0), timestep, unit_noise(*SHAPE), generator=seeded(0), denoised_fn=to_zero, return_dict=False
        )
        assert not step[1].any()
    assert not step[0].any()
    assert seen == [4, 3, 2, 1, 0]


@pytest.mark.parametrize(
    "other",
    [
        DPMSolverMultistepScheduler,
        UniPCMultistepScheduler,
        EulerDiscreteScheduler,
        LCMScheduler,
        DDIMScheduler,
        DDPMScheduler,
        HeunDiscreteScheduler,
        PNDMScheduler,
    ],
)
@both_kinds
def test_configs_pass_to_other_schedulers_and_back(kind: Any, other: Any) -> None:
    ours = kind(
        beta_start=0.001, beta_end=0.01, beta_schedule="linear", prediction_type="v_prediction",
        timestep_spacing="trailing",
    )  # fmt: skip
    theirs = other.from_config(ours.config)
    assert theirs.config.prediction_type == "v_prediction"
    assert not theirs.config.get("clip_sample", False)  # pixels are clipped, latents are not
    if hasattr(theirs, "alphas_cumprod"):
        torch.testing.assert_close(theirs.alphas_cumprod, ours.alphas_cumprod, atol=1e-6, rtol=0)
    back = kind.from_config(theirs.config)
    for scheduler in (ours, back):
        scheduler.set_timesteps(7)
    assert torch.equal(back.timesteps, ours.timesteps)
    assert torch.equal(back.posterior.coef1, ours.posterior.coef1)
    assert other in (*ours.compatibles, LCMScheduler)


def test_a_scheduler_saved_to_a_folder_is_the_same(tmp_path: Any) -> None:
    scheduler = SpacedDDIMScheduler(official_quirks=True, timestep_spacing="trailing", prediction_type="v_prediction")
    scheduler.save_pretrained(tmp_path)
    assert dict(SpacedDDIMScheduler.from_pretrained(tmp_path).config) == dict(scheduler.config)


def test_the_quirks_of_the_released_ddim_take_alphas_from_a_uniform_grid() -> None:
    scheduler = SpacedDDIMScheduler(official_quirks=True)
    scheduler.set_timesteps(10)
    alphas, previous = scheduler.ddim_alphas()
    assert torch.equal(alphas, scheduler.alphas_cumprod[::100])
    assert torch.equal(previous, scheduler.alphas_cumprod[[0, *range(0, 900, 100)]])


def test_ddim_with_eta_one_has_the_variance_of_ddpm() -> None:
    scheduler = SpacedDDPMScheduler()
    scheduler.set_timesteps(20)
    p = scheduler.posterior
    sigma = ddim_sigma(p.alphas_cumprod.double(), p.alphas_cumprod_prev.double(), 1.0)
    torch.testing.assert_close(sigma.square().float(), p.variance, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give either num_inference_steps or timesteps"),
        ({"num_inference_steps": 2, "timesteps": [5, 1]}, "give either num_inference_steps or timesteps"),
        ({"num_inference_steps": 0}, "num_inference_steps=0 is given, expected 1 to 1000"),
        ({"num_inference_steps": 1001}, "num_inference_steps=1001 is given, expected 1 to 1000"),
        ({"timesteps": [1, 5]}, "descending order"),
        ({"timesteps": [1000, 5]}, "must start before"),
    ],
)
def test_timesteps_that_cannot_be_kept_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpacedDDPMScheduler().set_timesteps(**arguments)


def test_an_unknown_noise_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="beta_schedule='squaredcos_cap_v2' is given, expected 'scaled_linear'"):
        SpacedDDPMScheduler(beta_schedule="squaredcos_cap_v2")


def test_a_timestep_that_is_not_kept_is_refused() -> None:
    scheduler = SpacedDDPMScheduler()
    scheduler.set_timesteps(4)
    with pytest.raises(
        ValueError, match=r"timestep=998 is given, expected one that set_timesteps kept \(4 from 999 to 0\)"
    ):
        scheduler.step(model_output(0), 998, unit_noise(*SHAPE))
