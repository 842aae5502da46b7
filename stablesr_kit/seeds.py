"""Random numbers of a numbered item: a function of the seed and the item's number, whatever is drawn beside it."""

import numpy as np
import torch


def stream(seed: int, *index: int, purpose: int | None = None) -> np.random.Generator:
    """The random numbers of item `index` under `seed`, as numpy draws them. All are whole numbers from 0.

    A sum such as seed + index would give item 1 of seed 0 the numbers of item 0 of seed 1. purpose: keeps apart what
    several parts of a program draw for one item; None where one part draws, and items have one number each.
    """
    return np.random.default_rng(_sequence(seed, index, purpose))


def torch_stream(seed: int, *index: int, purpose: int | None = None) -> torch.Generator:
    """The same for torch, on the CPU; its numbers are not those of `stream`."""
    state = _sequence(seed, index, purpose).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def _sequence(seed: int, index: tuple[int, ...], purpose: int | None) -> np.random.SeedSequence:
    if purpose is not None:
        return np.random.SeedSequence(seed, spawn_key=(purpose, *map(int, index)))
    (number,) = index  # of more numbers numpy would not tell (1,) from (1, 0)
    return np.random.SeedSequence((seed, int(number)))
