"""Build one network from the tensors of another layout: nothing missing, nothing left over, every shape as expected."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, TypeVar

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from stablesr_kit.checkpoints.key_maps import IGNORED
from stablesr_kit.checkpoints.plans import Plan
from stablesr_kit.errors import CheckpointError

Network = TypeVar("Network", bound=nn.Module)

NAMED = 12
"""How many names an error message lists. All of them are in a note on the error."""


class Options(NamedTuple):
    """How every network of a conversion is assembled."""

    dtype: torch.dtype = torch.float32
    ignore: tuple[str, ...] = ()
    """Regular expressions of full names that may be left over, beside `IGNORED`."""


def assemble(
    build: Callable[[], Network],
    plan_for: Callable[[list[str]], Plan],
    tensors: Mapping[str, Tensor],
    *,
    what: str,
    prefix: str = "",
    own: Mapping[str, Tensor] | None = None,
    options: Options,
) -> Network:
    """The network, in eval mode. Where dtype allows, its parameters are the given tensors, not copies of them.

    Args:
        build: makes the network; it is run without allocating parameters.
        plan_for: recipes for the given names.
        tensors: official names, without `prefix`.
        what: the network's name in messages.
        own: tensors of ours that have no counterpart.

    Raises `CheckpointError`, which names every missing tensor, every one left over and every wrong shape.
    """
    try:
        with init_empty_weights():
            network = build()
    except (ValueError, RuntimeError, ArithmeticError) as error:  # the config, read from a broken file, makes no sense
        raise CheckpointError(f"{what}: no such network can be made ({' '.join(str(error).split())})") from error
    own = own or {}
    expected = network.state_dict()
    plan = plan_for([name for name in expected if name not in own])
    wanted = dict.fromkeys(source for recipe in plan.values() for source in recipe.sources)
    complain(f"{what}: missing from the file", [prefix + name for name in wanted if name not in tensors])
    complain(
        f"{what}: not understood", left_over([prefix + name for name in tensors if name not in wanted], options.ignore)
    )

    weights, wrong = dict(own), []
    for name, recipe in plan.items():
        sources = [tensors[source] for source in recipe.sources]
        shape = expected[name].shape
        try:
            tensor = recipe.make(*sources)
            is_right = _without_kernel(tensor.shape) == _without_kernel(shape)
        except (RuntimeError, IndexError):  # the shapes do not even fit each other
            is_right = False
        if is_right:
            dtype = options.dtype if tensor.is_floating_point() else tensor.dtype
            weights[name] = tensor.to(dtype).reshape(shape).contiguous()
        else:
            given = (f"{prefix}{source} {tuple(tensors[source].shape)}" for source in recipe.sources)
            wrong.append(f"{', '.join(given)} for {tuple(shape)}")
    complain(f"{what}: other shapes than expected", wrong)
    network.load_state_dict(weights, strict=True, assign=True)
    return network.eval()


def left_over(names: Iterable[str], ignored: Iterable[str] = ()) -> list[str]:
    """The full names that no reason allows to ignore."""
    reasons = re.compile("|".join(f"(?:{pattern})" for pattern in (*IGNORED, *ignored)))
    return [name for name in names if not reasons.fullmatch(name)]


def complain(problem: str, names: list[str]) -> None:
    """Raise a `CheckpointError` that names them, if there are any."""
    if not names:
        return
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    error = CheckpointError(f"{problem}: {', '.join(names[:NAMED])}{more}")
    error.add_note("\n".join(names))
    raise error


def _without_kernel(shape: torch.Size) -> tuple[int, ...]:
    """The shape without the 1 x 1 kernel that a convolution has and the equal linear layer has not."""
    sizes = list(shape)
    while len(sizes) > 2 and sizes[-1] == 1:
        sizes.pop()
    return tuple(sizes)
