"""Optimizer and learning-rate schedule of a run."""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from diffusers.optimization import SchedulerType, get_scheduler
from torch import nn
from torch.optim import Optimizer

from stablesr_kit.errors import ConfigError
from stablesr_kit.training.run.config import MULTISTEP, WARMUP_PLATEAU_COSINE, RunConfig


def build_optimizer(
    config: RunConfig,
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
    *,
    betas: tuple[float, float] | None = None,
    weight_decay: float | None = None,
) -> Optimizer:
    """AdamW, with 8-bit states if the options ask for them. betas, weight_decay: None takes the options' values.

    Raises ConfigError if 8-bit AdamW is not installed.
    """
    kind: Callable[..., Optimizer] = functools.partial(torch.optim.AdamW, fused=True)
    if config.use_8bit_adam:
        kind = _adamw_8bit()
    return kind(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2) if betas is None else betas,
        weight_decay=config.adam_weight_decay if weight_decay is None else weight_decay,
        eps=config.adam_epsilon,
    )


def _adamw_8bit() -> Callable[..., Optimizer]:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ConfigError(
            "use_8bit_adam=true needs bitsandbytes; install it with pip install 'stablesr-kit[bitsandbytes]'"
        ) from None
    kind: Callable[..., Optimizer] = AdamW8bit
    return kind


def learning_rate_schedule(config: RunConfig, peak: float) -> Callable[[int], float]:
    """A function from step (0 is the first) to learning rate; `peak` is the highest.

    config.lr_scheduler: warmup_plateau_cosine or multistep, which are ours, or a name of diffusers.get_scheduler.
    Raises ConfigError for an unknown name.
    """
    if config.lr_scheduler == WARMUP_PLATEAU_COSINE:
        return lambda step: _warmup_plateau_cosine(config, peak, step)
    if config.lr_scheduler == MULTISTEP:
        return lambda step: _multistep(config, peak, step)
    names = [kind.value for kind in SchedulerType if kind is not SchedulerType.PIECEWISE_CONSTANT]
    if config.lr_scheduler not in names:
        known = ", ".join([WARMUP_PLATEAU_COSINE, MULTISTEP, *names])
        raise ConfigError(f"lr_scheduler={config.lr_scheduler!r} is unknown; use one of {known}")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)  # get_scheduler needs one
    factor = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    ).lr_lambdas[0]
    return lambda step: peak * float(factor(step))


def _warmup_plateau_cosine(config: RunConfig, peak: float, step: int) -> float:
    """Linear warm-up, plateau, half a cosine down to the final rate."""
    if step < config.lr_warmup_steps:
        return peak * (step + 1) / config.lr_warmup_steps
    decay_steps = config.lr_decay_fraction * config.max_train_steps
    progress = min(max(1 - (config.max_train_steps - step) / decay_steps, 0.0), 1.0)
    fall = peak - config.final_learning_rate
    return config.final_learning_rate + fall * 0.5 * (1 + math.cos(math.pi * progress))


def _multistep(config: RunConfig, peak: float, step: int) -> float:
    """Linear warm-up, then half the rate from each milestone on."""
    if step < config.lr_warmup_steps:
        return peak * (step + 1) / config.lr_warmup_steps
    return peak * 0.5 ** sum(step >= milestone for milestone in config.lr_milestones)
