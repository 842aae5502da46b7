"""Batches of samples that are numbered from the start of the run.

A resumed run continues the numbers. Noise is drawn per number, so that it depends neither on the number of processes
nor on the batch size."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from stablesr_kit.seeds import torch_stream


class Share(NamedTuple):
    """How the indices of a run are distributed: batch after batch, to each process in turn."""

    batch_size: int = 1
    processes: int = 1


class Numbered(Dataset[tuple[int, Any]]):
    """Items of another dataset, each with its index."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.dataset[index]


class SharedBatches(Sampler[list[int]]):
    """Indices of the batches first, ..., stop - 1 of a run, for one of its processes.

    The processes take `batch_size` successive samples each, in turn: batch i of all of them together holds samples
    i * processes * batch_size and on.
    """

    def __init__(self, batch_size: int, first: int, stop: int, processes: int = 1, process: int = 0) -> None:
        self.batch_size = batch_size
        self.first = first
        self.stop = stop
        self.processes = processes
        self.process = process

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.first, self.stop):
            start = (batch * self.processes + self.process) * self.batch_size
            yield list(range(start, start + self.batch_size))

    def __len__(self) -> int:
        return max(self.stop - self.first, 0)


def make_loader(dataset: Dataset[Any], batches: Iterable[list[int]], workers: int = 0) -> DataLoader[Any]:
    """Loader of (indices, batch) pairs; item i of the dataset must depend on its seed and i only.

    batches: the indices of each batch. workers: processes that prepare batches; 0 prepares them in this one.
    """
    return DataLoader(
        Numbered(dataset),
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # otherwise starting the loader would advance the global one
    )


class SampleDraws:
    """Random numbers for the samples of a batch: one stream per sample, which depends on (seed, index) only.

    seed: of the run; indices: (B,) numbers of the samples; samples_per_step: how many samples an optimizer step
    takes, in all processes together.
    """

    def __init__(self, seed: int, indices: Tensor, samples_per_step: int) -> None:
        self.indices = indices.cpu()
        self.samples_per_step = samples_per_step
        self.generators = [torch_stream(seed, index) for index in self.indices.tolist()]

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal noise of the shape, type and device of `like`, (B, ...)."""
        noise = torch.stack([torch.randn(like.shape[1:], generator=generator) for generator in self.generators])
        return noise.to(like)

    def uniform(self) -> Tensor:
        """Numbers in [0, 1), (B,), on the CPU."""
        return torch.cat([torch.rand(1, generator=generator) for generator in self.generators])

    def timesteps(self, train_timesteps: int, *, stratified: bool) -> Tensor:
        """Whole numbers below `train_timesteps`, (B,), on the CPU. They are stratified: one from each equal part of the
        schedule, over the samples of a step, so that the loss has less noise."""
        position = self.uniform().double()
        if stratified:
            position = (self.indices % self.samples_per_step + position) / self.samples_per_step
        return (position * train_timesteps).long()
