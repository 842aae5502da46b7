"""What a training program does to the parameters of every network that it calls."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook


@dataclass
class Watch:
    """The parameters, by class and name, of every network that is called before the last step of an optimizer."""

    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    before: dict[str, Tensor] = field(default_factory=dict)
    """Their values before the first step, or at the first call of a network that joins later."""
    with_gradient: set[str] = field(default_factory=set)
    """Those that had a gradient, zero or not, before some step of an optimizer."""

    def moved(self) -> set[str]:
        """Those whose values are others now, by a single bit or more."""
        return {name for name, tensor in self.parameters.items() if not torch.equal(tensor, self.before[name])}

    def look_at(self, network: nn.Module) -> None:
        """Take in a network; one that was seen, or is part of one that was, adds nothing."""
        known = {id(parameter) for parameter in self.parameters.values()}
        kind = type(network).__name__
        for name, parameter in network.named_parameters():
            if id(parameter) not in known:
                # a second network of a class has a name of its own
                unique = next(n for i in range(99) if (n := f"{kind}{i or ''}.{name}") not in self.parameters)
                self.parameters[unique] = parameter
                self.before[unique] = parameter.detach().clone()


@contextmanager
def watched() -> Iterator[Watch]:
    """For the time of the context every network that is called and every step of an optimizer is watched."""
    watch = Watch()
    seen: set[int] = set()
    in_training: set[str] = set()

    def before_call(network: nn.Module, _arguments: Any) -> None:
        if id(network) not in seen:
            seen.update(map(id, network.modules()))
            watch.look_at(network)

    def before_step(*_arguments: Any) -> None:
        nonlocal in_training
        if not in_training:  # what was called until now may have been fitted in other ways
            watch.before = {name: tensor.detach().clone() for name, tensor in watch.parameters.items()}
        in_training = set(watch.parameters)
        watch.with_gradient |= {name for name, tensor in watch.parameters.items() if tensor.grad is not None}

    handles = register_module_forward_pre_hook(before_call), register_optimizer_step_pre_hook(before_step)
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()
        watch.parameters = {name: watch.parameters[name] for name in watch.parameters if name in in_training}
