"""A pool of training pairs, so that a batch mixes pictures that were degraded at different times.

Pictures degraded together share some draws (`degradations.second_order`); the pool breaks that up (Wang et al. 2021,
Real-ESRGAN).
"""

import torch
from torch import Generator, Tensor

from stablesr_kit.errors import ConfigError


class PairQueue:
    """Takes batches of pairs in and gives batches of older pairs, drawn at random, out.

    size: how many pairs are kept, a multiple of batch_size; StableSR keeps 180. The pairs stay on the device they
    come on, in two tensors: 180 pairs of 512 px take 1.1 GB in float32. Raises ConfigError where size does not fit.
    """

    def __init__(self, batch_size: int, size: int = 180) -> None:
        if batch_size < 1 or size < batch_size or size % batch_size:
            nearest = max(1, round(size / max(batch_size, 1))) * max(batch_size, 1)
            raise ConfigError(f"size={size} must be a multiple of batch_size={batch_size}; use {nearest}")
        self.batch_size = batch_size
        self.size = size
        self.filled = 0
        self.lq = torch.empty(0)
        self.hq = torch.empty(0)

    def exchange(self, lq: Tensor, hq: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """(lq, hq) to train on, in place of the batches (B, C, H, W) given.

        Until the pool is full, and for a batch of another size (the last one of an epoch), those are the given ones.
        """
        if lq.shape[0] != self.batch_size:
            return lq, hq
        if self.filled == 0:
            self.lq = lq.new_empty(self.size, *lq.shape[1:])
            self.hq = hq.new_empty(self.size, *hq.shape[1:])
        if self.filled < self.size:
            self.lq[self.filled : self.filled + self.batch_size] = lq
            self.hq[self.filled : self.filled + self.batch_size] = hq
            self.filled += self.batch_size
            return lq, hq
        places = torch.randperm(self.size, generator=generator, device=generator.device)[: self.batch_size]
        places = places.to(self.lq.device)
        older = self.lq[places], self.hq[places]
        self.lq[places], self.hq[places] = lq, hq
        return older

    def state_dict(self) -> dict[str, Tensor | int]:
        """What `load_state_dict` needs to go on exactly; the generator is saved by whoever owns it."""
        return {"lq": self.lq, "hq": self.hq, "filled": self.filled}

    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        """Take up a saved pool. Raises ConfigError where it was saved with another size or batch size."""
        lq, hq, filled = state["lq"], state["hq"], state["filled"]
        if not (isinstance(lq, Tensor) and isinstance(hq, Tensor) and isinstance(filled, int)):
            raise ConfigError("the saved pair queue must hold lq, hq (tensors) and filled (a whole number)")
        if filled % self.batch_size or (filled and lq.shape[0] != self.size):
            raise ConfigError(
                f"the saved pair queue holds {filled} of {lq.shape[0]} pairs and does not fit size={self.size}, "
                f"batch_size={self.batch_size}; resume with the settings it was saved with"
            )
        self.lq, self.hq, self.filled = lq, hq, filled
