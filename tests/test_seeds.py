"""Streams of random numbers that depend on a seed, an item's number and a purpose alone."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from stablesr_kit.seeds import stream, torch_stream

KEYS: list[tuple[tuple[int, ...], int | None]] = [
    ((), 0),
    ((0,), 0),
    ((1,), 0),
    ((0, 0), 0),
    ((0, 1), 0),
    ((), 1),
    ((0,), 1),
    ((0,), None),
    ((1,), None),
]
"""Indices and purposes."""


def from_numpy(seed: int, *index: int, purpose: int | None = None) -> int:
    return int(stream(seed, *index, purpose=purpose).integers(2**62))


def from_torch(seed: int, *index: int, purpose: int | None = None) -> int:
    return int(torch.randint(2**62, (), generator=torch_stream(seed, *index, purpose=purpose)))


@pytest.mark.parametrize("first", [from_numpy, from_torch])
def test_streams_of_another_seed_index_or_purpose_are_others_and_zeros_count(first: Callable[..., int]) -> None:
    numbers = [first(seed, *index, purpose=purpose) for seed in (0, 1, 2) for index, purpose in KEYS]
    assert len(set(numbers)) == len(numbers)
    assert numbers == [first(seed, *index, purpose=purpose) for seed in (0, 1, 2) for index, purpose in KEYS]
    assert first(3, 7, purpose=2) == first(3, np.int64(7), purpose=2)


def test_items_of_several_numbers_need_a_purpose() -> None:
    with pytest.raises(ValueError):
        stream(0, 1, 0)
