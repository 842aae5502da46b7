"""Networks whose activations are too large for half precision."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from weakref import WeakKeyDictionary

import torch
from torch import nn

_users: "WeakKeyDictionary[nn.Module, tuple[int, torch.dtype]]" = WeakKeyDictionary()
_counting = Lock()


@contextmanager
def in_float32(*networks: nn.Module) -> Iterator[None]:
    """Networks that work together, all in float32 meanwhile if one of them is in float16, which ends at 65504.

    Threads may share a network: the last of them to leave casts it back.
    """
    with _counting:
        dtypes = {one: next((p.dtype for p in one.parameters()), torch.float32) for one in networks}
        overflows = any(one in _users or dtype == torch.float16 for one, dtype in dtypes.items())
        entered = dtypes if overflows else {}
        for network, dtype in entered.items():
            users, before = _users.get(network, (0, dtype))
            _users[network] = users + 1, before
            network.float()
    try:
        yield
    finally:
        with _counting:
            for network in entered:
                users, before = _users.pop(network)
                if users > 1:
                    _users[network] = users - 1, before
                else:
                    nn.Module.to(network, before)  # that of diffusers warns of every cast
