"""A pool of training pairs, so that a batch mixes pictures that were degraded at different times.

Pictures degraded together share some draws (`degradations.second_order`); the pool breaks that up (Wang et al. 2021,
Real-ESRGAN).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor

from stablesr_kit.errors import ConfigError
from stablesr_kit.imaging.degradations import Pair
from stablesr_kit.seeds import stream
from stablesr_kit.training.data.crops import Purpose
from stablesr_kit.training.data.options import PairOptions
from stablesr_kit.training.data.pairs import Mixture


@dataclass(frozen=True, kw_only=True)
class PairQueueOptions(PairOptions):
    """StableSR's queue of pairs."""

    pair_queue_size: int = 0
    """Pairs in the queue, which mixes batches (StableSR: 180). Pictures are then degraded in batches on the device of
    the run, and a batch shares some random draws. 0: no queue, every picture is degraded for itself in the loader."""


class PairQueue:
    """Takes batches of pairs in and gives batches of older pairs, drawn at random, out.

    size: how many pairs are kept, a multiple of batch_size; StableSR keeps 180. The pairs stay on the device they
    come on, in two tensors: 180 pairs of 512 px take 1.1 GB in float32. Raises ConfigError where size does not fit.
    """

    def __init__(self, batch_size: int, size: int = 180) -> None:
        if batch_size < 1 or size < batch_size or size % batch_size:
            nearest = max(1, round(size / max(batch_size, 1))) * max(batch_size, 1)
            raise ConfigError(
                f"pair_queue_size={size} must be a multiple of train_batch_size={batch_size}; use {nearest}"
            )
        self.batch_size = batch_size
        self.size = size
        self.filled = 0
        self.lq = torch.empty(0)
        self.hq = torch.empty(0)

    def exchange(self, lq: Tensor, hq: Tensor, generator: Generator) -> Pair:
        """(lq, hq) to train on, in place of the batches (B, C, H, W) given.

        Until the pool is full, and for a batch of another size (the last one of an epoch), those are the given ones.
        """
        if lq.shape[0] != self.batch_size:
            return Pair(lq, hq)
        if self.filled == 0:
            self.lq = lq.new_empty(self.size, *lq.shape[1:])
            self.hq = hq.new_empty(self.size, *hq.shape[1:])
        if self.filled < self.size:
            self.lq[self.filled : self.filled + self.batch_size] = lq
            self.hq[self.filled : self.filled + self.batch_size] = hq
            self.filled += self.batch_size
            return Pair(lq, hq)
        places = torch.randperm(self.size, generator=generator, device=generator.device)[: self.batch_size]
        places = places.to(self.lq.device)
        older = Pair(self.lq[places], self.hq[places])
        self.lq[places], self.hq[places] = lq, hq
        return older

    def state_dict(self) -> dict[str, Tensor]:
        """What `load_state_dict` needs to go on exactly; the generator is the caller's."""
        return {"lq": self.lq, "hq": self.hq, "filled": torch.tensor(self.filled)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up a saved pool. Raises ConfigError where it was saved with another size or batch size."""
        lq, hq, filled = state["lq"], state["hq"], int(state["filled"])
        if filled % self.batch_size or (filled and lq.shape[0] != self.size):
            raise ConfigError(
                f"the saved pair queue holds {filled} of {lq.shape[0]} pairs and does not fit "
                f"pair_queue_size={self.size}, train_batch_size={self.batch_size}; "
                "resume with the settings it was saved with"
            )
        self.lq, self.hq, self.filled = lq, hq, filled


class QueuedDegradation:
    """Degrades batches of crops on their device, as StableSR does: a batch shares draws, and a queue mixes them.

    Call it with every batch of crops, in order. What it draws depends on the seed, the process and the number of the
    batch; the queue of each process is saved in the run's checkpoints and taken up again with them.
    """

    def __init__(self, options: PairQueueOptions, seed: int, batch_size: int, accelerator: Accelerator) -> None:
        self.mixture = Mixture(options)
        self.queue = PairQueue(batch_size, options.pair_queue_size)
        self.seed = seed
        self.process = accelerator.process_index
        self.device = accelerator.device
        self.batches = 0
        accelerator.register_save_state_pre_hook(self._save)
        accelerator.register_load_state_pre_hook(self._load)

    def __call__(self, hq: Tensor) -> Pair:
        """The pairs to train on in place of the crops hq (B, 3, H, W) in [-1, 1]."""
        draws = stream(self.seed, self.process, self.batches, purpose=Purpose.BATCH)
        self.batches += 1
        lq, target = self.mixture.pair(hq, draws)
        return self.queue.exchange(lq, target, Generator().manual_seed(int(draws.integers(2**62))))

    def _save(self, _models: list[Any], _weights: list[Any], folder: str) -> None:
        state = self.queue.state_dict() | {"batches": torch.tensor(self.batches)}
        save_file({name: value.contiguous() for name, value in state.items()}, self._file(folder))

    def _load(self, _models: list[Any], folder: str) -> None:
        file = self._file(folder)
        if not file.exists():
            raise ConfigError(
                f"{folder} holds no pair queue of process {self.process}; "
                "resume with the number of processes and the pair_queue_size that it was saved with"
            )
        state = {name: tensor.to(self.device) for name, tensor in load_file(file).items()}
        self.batches = int(state["batches"])
        self.queue.load_state_dict(state)

    def _file(self, folder: str) -> Path:
        return Path(folder) / f"pair_queue_{self.process}.safetensors"
