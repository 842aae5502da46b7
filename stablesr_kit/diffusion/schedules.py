"""Which schedulers can sample from a model: what it was trained to predict, and on which noise levels."""

import inspect
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from stablesr_kit.errors import ConfigError

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
