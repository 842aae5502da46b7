"""Which photograph stands at which index of a run, and random numbers that depend on an index alone."""

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.random import Generator, default_rng


class Share(NamedTuple):
    """How the indices of a run are dealt out: batch after batch, to each process in turn."""

    batch_size: int = 1
    processes: int = 1


class EpochOrder:
    """Which photograph stands at which index: each once per epoch, in an order drawn anew for every epoch.

    The photographs of a group stay together. Where there is a group for each process, processes have groups of their
    own, and an epoch takes from each the mean number of photographs: some are repeated or left to another epoch.
    """

    def __init__(self, group_sizes: Sequence[int], seed: int, share: Share) -> None:
        self.group_sizes = np.array(group_sizes)
        self.starts = np.cumsum(self.group_sizes) - self.group_sizes
        self.seed = seed
        self.share = share if len(group_sizes) >= share.processes else Share()
        self.epoch_length = math.ceil(int(self.group_sizes.sum()) / self.share.processes)
        self.drawn: dict[tuple[int, int], np.ndarray] = {}

    def __getitem__(self, index: int) -> int:
        batch, place = divmod(index, self.share.batch_size)
        turn, process = divmod(batch, self.share.processes)
        epoch, position = divmod(turn * self.share.batch_size + place, self.epoch_length)
        if (epoch, process) not in self.drawn:
            self.drawn = {(epoch, process): self._draw(epoch, process)}
        return int(self.drawn[epoch, process][position])

    def group_of(self, number: int) -> range:
        """The numbers of the group that a photograph belongs to."""
        group = int(np.searchsorted(self.starts, number, side="right")) - 1
        return range(int(self.starts[group]), int(self.starts[group] + self.group_sizes[group]))

    def _draw(self, epoch: int, process: int) -> np.ndarray:
        groups = stream(self.seed, Draws.GROUPS, epoch).permutation(len(self.group_sizes))
        numbers = [
            self.starts[group] + stream(self.seed, Draws.MEMBERS, epoch, group).permutation(self.group_sizes[group])
            for group in groups[process :: self.share.processes]
        ]
        return np.resize(np.concatenate(numbers), self.epoch_length)


class Draws(IntEnum):
    """What is drawn at random: every purpose has its own numbers, so that none shifts those of another."""

    GROUPS = 0
    MEMBERS = 1
    CROP = 2
    DEGRADATION = 3
    BATCH = 4


def stream(seed: int, purpose: Draws, *key: int) -> Generator:
    """Random numbers that depend on the seed, the purpose and the key alone."""
    return default_rng(np.random.SeedSequence(seed, spawn_key=(purpose, *(int(part) for part in key))))
