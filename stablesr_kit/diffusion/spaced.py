"""The official respacing of StableSR as diffusers schedulers: DDPM posterior and DDIM over any subset of timesteps."""

import inspect
import itertools
import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin as SchedulerMixin  # looked up beside the class
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from stablesr_kit.errors import ConfigError

Generators = torch.Generator | list[torch.Generator] | None


class Posterior(NamedTuple):
    """q(x_{k-1} | x_k, x0) over n kept timesteps, ascending (Ho et al. 2020, eq. 6-7); each column (n,) float32.

    mean = coef1 * x0 + coef2 * x_k, variance as named; alphas_cumprod_prev is 1 before the first kept timestep.
    """

    betas: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor
    variance: Tensor
    log_variance: Tensor
    coef1: Tensor
    coef2: Tensor

    @classmethod
    def of(cls, alphas_cumprod: Tensor) -> "Posterior":
        """From the alphas_cumprod (n,) of the kept timesteps (Nichol and Dhariwal 2021, sec. 4).

        In the precision of what is given: the released sampler respaces in float32, and float64 would move its
        coefficients by up to 1e-5.
        """
        kept = alphas_cumprod.numpy()
        betas = 1 - kept / np.append(kept.dtype.type(1), kept[:-1])
        alphas = 1 - betas
        cumprod = np.cumprod(alphas)
        prev = np.append(kept.dtype.type(1), cumprod[:-1])
        variance = betas * (1 - prev) / (1 - cumprod)
        columns = (
            betas,
            cumprod,
            prev,
            variance,
            np.log(np.maximum(variance, kept.dtype.type(1e-20))),  # the first variance is zero
            betas * np.sqrt(prev) / (1 - cumprod),
            (1 - prev) * np.sqrt(alphas) / (1 - cumprod),
        )
        return cls(*(torch.from_numpy(column).float() for column in columns))


class SpacedDDPMScheduler(DDPMScheduler):
    """DDPM on a respaced diffusion: the variances are those of the kept timesteps, so few steps stay calibrated.

    `timestep_spacing="linspace"` is StableSR's own choice, which always keeps 0 and 999; "trailing" wastes no step at
    timestep 0 and suits ten steps or fewer. Other diffusers schedulers load this one's config, and the other way round.

    Args:
        num_train_timesteps: length of the training schedule.
        beta_start, beta_end: ends of the training schedule.
        beta_schedule: "scaled_linear" (Stable Diffusion) or "linear".
        prediction_type: what the UNet predicts, "epsilon", "v_prediction" or "sample".
        timestep_spacing: "linspace" or "trailing".
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: Literal["scaled_linear", "linear"] = "scaled_linear",
        prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon",
        timestep_spacing: Literal["linspace", "trailing"] = "linspace",
    ) -> None:
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,
            prediction_type=prediction_type,
            timestep_spacing=timestep_spacing,
            clip_sample=False,
        )
        powers = {"scaled_linear": 2, "linear": 1}
        if beta_schedule not in powers:
            raise ValueError(f"beta_schedule={beta_schedule!r} is given, expected 'scaled_linear' or 'linear'")
        power = powers[beta_schedule]
        betas = np.linspace(beta_start ** (1 / power), beta_end ** (1 / power), num_train_timesteps) ** power
        self.betas = torch.from_numpy(betas).float()
        self.alphas = 1 - self.betas
        alphas_cumprod = torch.from_numpy(np.cumprod(1 - betas))
        self.alphas_cumprod = alphas_cumprod.float()
        self.posterior = Posterior.of(alphas_cumprod)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Keep `num_inference_steps` evenly spaced timesteps, or the given descending ones.

        Raises:
            ValueError: neither or both are given, or they do not fit the training schedule.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("give either num_inference_steps or timesteps")
        if num_inference_steps is not None and not 1 <= num_inference_steps <= self.config.num_train_timesteps:
            raise ValueError(
                f"num_inference_steps={num_inference_steps} is given, expected 1 to {self.config.num_train_timesteps}"
            )
        if num_inference_steps is not None and self.config.timestep_spacing == "linspace":
            kept = evenly_spaced_timesteps(self.config.num_train_timesteps, num_inference_steps)
            super().set_timesteps(device=device, timesteps=kept[::-1])
        else:
            super().set_timesteps(num_inference_steps, device, timesteps)
        self.num_inference_steps = len(self.timesteps)
        self.posterior = Posterior.of(self.alphas_cumprod[self.timesteps.flip(0).cpu()])

    def index_of(self, timestep: Tensor | int) -> int:
        """Position of a kept timestep in `posterior`, 0 for the last one visited.

        Raises:
            ValueError: the timestep is not kept.
        """
        positions = (self.timesteps == int(timestep)).nonzero()
        if len(positions) == 0:
            kept = f"{len(self.timesteps)} from {self.timesteps[0]} to {self.timesteps[-1]}"
            raise ValueError(f"timestep={int(timestep)} is given, expected one that set_timesteps kept ({kept})")
        return len(self.timesteps) - 1 - int(positions[0])

    def predict_x0(self, model_output: Tensor, alpha_cumprod: float, sample: Tensor) -> Tensor:
        """Denoised latent from the network's output (Ho et al. 2020, eq. 15; Salimans and Ho 2022, app. D)."""
        if self.config.prediction_type == "epsilon":
            return sample * (1 / alpha_cumprod) ** 0.5 - (1 / alpha_cumprod - 1) ** 0.5 * model_output
        if self.config.prediction_type == "v_prediction":
            return alpha_cumprod**0.5 * sample - (1 - alpha_cumprod) ** 0.5 * model_output
        return model_output

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        denoised_fn: Callable[[Tensor, int], Tensor] | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """x at the next kept timestep, drawn from the posterior (Ho et al. 2020, eq. 6-7); x0 after the last one.

        Args:
            model_output, sample: (B, C, h, w); computed in float32, returned in the dtype of `sample`.
            generator: source of the noise; None draws from the global one.
            variance_noise: the noise itself, (B, C, h, w), unit variance; None draws it.
            denoised_fn: changes the denoised latent before it is used; called with it and the step's index.
        """
        index = self.index_of(timestep)
        posterior = self.posterior
        x = sample.float()
        x0 = self.predict_x0(model_output.float(), posterior.alphas_cumprod[index].item(), x)
        if denoised_fn is not None:
            x0 = denoised_fn(x0, index)
        previous = posterior.coef1[index].item() * x0 + posterior.coef2[index].item() * x
        if index > 0:
            noise = draw(variance_noise, sample, generator)
            previous = previous + (0.5 * posterior.log_variance[index]).exp().item() * noise
        return _output(previous, x0, sample.dtype, return_dict)


class SpacedDDIMScheduler(SpacedDDPMScheduler):
    """DDIM over the kept timesteps (Song et al. 2021, eq. 12), ending at the denoised latent.

    Args:
        official_quirks: reproduce the released DDIM script, which feeds the network the spaced timesteps but takes
            its alphas from a uniform grid of stride num_train_timesteps // steps, and stops at alphas_cumprod[0]
            instead of 1. Needed for parity only.
        others: as `SpacedDDPMScheduler`.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: Literal["scaled_linear", "linear"] = "scaled_linear",
        prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon",
        timestep_spacing: Literal["linspace", "trailing"] = "linspace",
        official_quirks: bool = False,  # noqa: ARG002, read from the config
    ) -> None:
        super().__init__(num_train_timesteps, beta_start, beta_end, beta_schedule, prediction_type, timestep_spacing)

    def ddim_alphas(self) -> tuple[Tensor, Tensor]:
        """(alphas_cumprod, alphas_cumprod of the step after), each (n,), ascending in time like `posterior`."""
        if not self.config.official_quirks:
            return self.posterior.alphas_cumprod, self.posterior.alphas_cumprod_prev
        train_steps = self.config.num_train_timesteps
        uniform = torch.arange(0, train_steps, train_steps // len(self.timesteps))
        alphas = self.alphas_cumprod[uniform]
        return alphas, torch.cat([self.alphas_cumprod[:1], alphas[:-1]])

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        denoised_fn: Callable[[Tensor, int], Tensor] | None = None,
        return_dict: bool = True,
        eta: float = 0.0,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """x at the next kept timestep; arguments as `SpacedDDPMScheduler.step`, eta 0 deterministic to 1 like DDPM."""
        index = self.index_of(timestep)
        alpha, alpha_prev = (column[index].item() for column in self.ddim_alphas())
        sigma = ddim_sigma(alpha, alpha_prev, eta)
        x = sample.float()
        x0 = self.predict_x0(model_output.float(), alpha, x)
        eps = (x - alpha**0.5 * x0) / (1 - alpha) ** 0.5
        if denoised_fn is not None:
            x0 = denoised_fn(x0, index)
        previous = alpha_prev**0.5 * x0 + (1 - alpha_prev - sigma**2) ** 0.5 * eps
        if sigma > 0:
            previous = previous + sigma * draw(variance_noise, sample, generator)
        return _output(previous, x0, sample.dtype, return_dict)


def evenly_spaced_timesteps(num_train_timesteps: int, num_inference_steps: int) -> list[int]:
    """Ascending timesteps from 0 to num_train_timesteps - 1, both included; a single one is the last.

    The stride is added up in floating point and rounded half to even, like the released sampler: a closed form differs
    by one at some steps (for instance 499 and 500 among 21).
    """
    if num_inference_steps == 1:
        return [num_train_timesteps - 1]
    stride = (num_train_timesteps - 1) / (num_inference_steps - 1)
    positions = itertools.accumulate(itertools.repeat(stride, num_inference_steps - 1), initial=0.0)
    return [round(position) for position in positions]


def ddim_sigma(alpha: Any, alpha_prev: Any, eta: float) -> Any:
    """Standard deviation of the noise of a DDIM step (Song et al. 2021, eq. 16); numbers or tensors."""
    return eta * ((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)) ** 0.5


def draw(variance_noise: Tensor | None, sample: Tensor, generator: Generators) -> Tensor:
    """The given unit noise, or a fresh one of the sample's shape, as float32."""
    if variance_noise is None:
        variance_noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
    return variance_noise.float()


def _output(
    previous: Tensor, x0: Tensor, dtype: torch.dtype, return_dict: bool
) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
    previous, x0 = previous.to(dtype), x0.to(dtype)
    return DDPMSchedulerOutput(prev_sample=previous, pred_original_sample=x0) if return_dict else (previous, x0)


logger = logging.getLogger(__name__)

_SCHEDULE_FIELDS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")


class ModelSchedule(NamedTuple):
    """prediction_type: "epsilon" or "v_prediction". alphas_cumprod: (timesteps,), of the noise levels in training."""

    prediction_type: str
    alphas_cumprod: Tensor

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> "ModelSchedule":
        """What a scheduler's config says of the model it was set up for."""
        known = {name: config[name] for name in _SCHEDULE_FIELDS if name in config}
        alphas_cumprod = DDPMScheduler(**known).alphas_cumprod
        return cls(config.get("prediction_type", "epsilon"), alphas_cumprod)

    def is_near(self, other: "ModelSchedule") -> bool:
        """Whether a scheduler set up for the one serves the other."""
        one, two = self.alphas_cumprod, other.alphas_cumprod
        is_near = one.shape == two.shape and torch.allclose(one, two, atol=1e-3)
        return is_near and self.prediction_type == other.prediction_type

    def __str__(self) -> str:
        alphas = self.alphas_cumprod
        return f"{self.prediction_type}, {len(alphas)} timesteps, alphas_cumprod {alphas[0]:.4f} to {alphas[-1]:.4f}"


def check_scheduler(scheduler: Any, trained: ModelSchedule) -> None:
    """Warn of a scheduler that was set up for another model.

    Raises:
        ConfigError: it is of a kind that cannot sample from such a model at all.
    """
    name, config = type(scheduler).__name__, scheduler.config
    is_edm = name == "EDMEulerScheduler"  # its own noise levels and inputs; diffusers counts it among the compatible
    step = inspect.signature(scheduler.step).parameters if hasattr(scheduler, "step") else {}
    needed = [name for name, parameter in step.items() if parameter.default is parameter.empty]
    if (
        not (step and hasattr(scheduler, "add_noise"))
        or not (hasattr(scheduler, "alphas_cumprod") or is_edm)
        or "Inverse" in name
        or len(needed) > 3  # model_output, timestep, sample
        or config.get("use_flow_sigmas")
        or config.get("prediction_type") == "flow_prediction"
    ):
        raise ConfigError(
            f"{name} cannot sample from this model, which predicts noise (or v) at the timesteps of Stable Diffusion; "
            "take one that can, for instance UniPCMultistepScheduler.from_config(pipeline.scheduler.config)"
        )
    if is_edm or not ModelSchedule.of_config(config).is_near(trained):
        logger.warning(
            "the scheduler %s was set up for another model (%s) than this one (%s), which gives wrong pictures; "
            "make it by %s.from_config(pipeline.scheduler.config) from the model's own",
            name,
            ModelSchedule.of_config(config),
            trained,
            name,
        )
