"""The optimizer that the options of a run name."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from stablesr_kit.errors import ConfigError
from stablesr_kit.training.config import RunConfig


def build_optimizer(
    config: RunConfig,
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
    *,
    betas: tuple[float, float] | None = None,
    weight_decay: float | None = None,
) -> Optimizer:
    """AdamW, with states of 8 bits if the options say so; None takes an option's value.

    Raises ConfigError when the 8-bit one is not installed.
    """
    kind: Callable[..., Optimizer] = _adamw_8bit() if config.use_8bit_adam else torch.optim.AdamW
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
