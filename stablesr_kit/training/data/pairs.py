"""LQ-HQ pairs of crops: given, or degraded on the fly."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor
from torch.utils.data import Dataset

from stablesr_kit.errors import ConfigError
from stablesr_kit.imaging.degradations import Pair, find_preset, make_pair
from stablesr_kit.imaging.degradations.filtering import resize
from stablesr_kit.seeds import stream
from stablesr_kit.spaces import pixels_to_image
from stablesr_kit.training.data.batches import Share
from stablesr_kit.training.data.crops import PhotoCrops, Purpose
from stablesr_kit.training.data.options import DegradedPhotoOptions, PairOptions


def open_pairs(
    options: PairOptions, seed: int, share: Share | None = None, versions: int = 1
) -> "DegradedCrops | PairedCrops":
    """Pairs from the photographs of the options: given pairs, or crops and their degraded versions.

    share: how samples are distributed, so that processes read different shards. versions: degraded versions of
    each crop. Raises ConfigError or ImageError if no photograph can be used.
    """
    crops = PhotoCrops(options, seed, share)
    if not crops.source.is_paired:
        return DegradedCrops(crops, versions)
    if versions > 1:
        raise ConfigError(f"versions={versions}: photographs that come in pairs have one version; use versions=1")
    return PairedCrops(crops)


class DegradedCrops(Dataset[Pair]):
    """Pairs (lq, hq), each (3, resolution, resolution) in [-1, 1], lq enlarged to the size of hq.

    The degradation of each is drawn with the options' weights; if its result is not finite, lq is hq. Item i depends on
    (seed, i) only. `versions` successive items have the same crop and different degradations.
    """

    def __init__(self, crops: PhotoCrops[DegradedPhotoOptions], versions: int = 1) -> None:
        self.crops = crops
        self.mixture = Mixture(crops.options)
        self.versions = versions

    def __getitem__(self, index: int) -> Pair:
        pixels = self.crops.draw(index // self.versions).hq
        draws = stream(self.crops.seed, index, purpose=Purpose.DEGRADATION)
        lq, hq = self.mixture.pair(pixels_to_image(pixels), draws)
        return Pair(lq[0], hq[0])


class Mixture:
    """The degradations of the options, drawn with their weights."""

    def __init__(self, options: DegradedPhotoOptions) -> None:
        overridden: dict[str, Any] = {}
        if options.use_usm is not None:
            overridden["sharpen_target"] = options.use_usm
        if options.no_degradation_prob is not None:
            overridden["clean_probability"] = options.no_degradation_prob
        self.presets = [replace(find_preset(name), **overridden) for name in options.degradations]
        weights = np.array(list(options.degradations.values()), dtype=np.float64)
        if len(weights) == 0 or weights.min() < 0 or weights.sum() <= 0:
            raise ConfigError(f"degradations={dict(options.degradations)} must give names positive weights")
        self.probabilities = weights / weights.sum()

    def pair(self, hq: Tensor, draws: np.random.Generator) -> Pair:
        """Degraded picture and target of hq (B, 3, H, W) in [-1, 1], on its device; one degradation for the batch."""
        preset = self.presets[draws.choice(len(self.presets), p=self.probabilities)]
        lq, target = make_pair(hq, preset, torch.Generator().manual_seed(int(draws.integers(2**62))))
        return Pair(lq if lq.isfinite().all() else target, target)


class PairedCrops(Dataset[Pair]):
    """Given pairs (lq, hq), each (3, resolution, resolution) in [-1, 1]; a smaller lq is enlarged bicubically.

    Item i depends on (seed, i) only.
    """

    def __init__(self, crops: PhotoCrops[PairOptions]) -> None:
        self.crops = crops

    def __getitem__(self, index: int) -> Pair:
        hq_pixels, lq_pixels, *_ = self.crops.draw(index)
        assert lq_pixels is not None  # the source is paired
        hq, lq = pixels_to_image(hq_pixels), pixels_to_image(lq_pixels)
        if lq.shape != hq.shape:
            lq = resize(lq, (hq.shape[-2], hq.shape[-1]), "bicubic").clamp(-1, 1)
        return Pair(lq[0], hq[0])


@dataclass(frozen=True, kw_only=True)
class PairQueueOptions(PairOptions):
    """StableSR's queue of pairs."""

    pair_queue_size: int = 0
    """Pairs in a queue that mixes batches (StableSR: 180). Pictures are then degraded in batches on the device of the
    run, and share some random draws within a batch. 0: no queue; the loader degrades pictures one by one."""


class PairQueue:
    """Takes batches of pairs and returns batches of older pairs, drawn at random.

    size: number of pairs kept, a multiple of batch_size; StableSR keeps 180. They stay on their device, in two tensors:
    180 pairs of 512 px take 1.1 GB in float32. Raises ConfigError if size does not fit.
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

        Until the queue is full, and for a batch of another size (the last of an epoch), the given pairs are returned.
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
        """State for `load_state_dict`, without that of the generator."""
        return {"lq": self.lq, "hq": self.hq, "filled": torch.tensor(self.filled)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a saved queue. Raises ConfigError if it was saved with another size or batch size."""
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

    Call it with every batch of crops, in order. Its draws depend on seed, process and batch number; the queue of each
    process is saved in the run's checkpoints and restored with them.
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
        """Pairs to train on, in exchange for the crops hq (B, 3, H, W) in [-1, 1]."""
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
