"""Networks whose activations are too large for half precision."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from weakref import WeakKeyDictionary

import torch
from torch import nn

_users: "WeakKeyDictionary[nn.Module, int]" = WeakKeyDictionary()
_counting = Lock()


@contextmanager
def in_float32(*networks: nn.Module) -> Iterator[None]:
    """Those of the networks that are in float16, in float32 meanwhile; float16 ends at 65504.

    Threads may share a network: the last of them to leave casts it back.
    """
    with _counting:
        entered = [one for one in networks if one in _users or _is_half(one)]
        for network in entered:
            _users[network] = _users.get(network, 0) + 1
            network.float()
    try:
        yield
    finally:
        with _counting:
            for network in entered:
                _users[network] -= 1
                if not _users[network]:
                    del _users[network]
                    network.half()


def _is_half(network: nn.Module) -> bool:
    return any(parameter.dtype == torch.float16 for parameter in network.parameters())
