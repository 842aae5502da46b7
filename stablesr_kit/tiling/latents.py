"""Aggregation sampling: one prediction for a canvas of any size, from tiles the UNet can take (Wang et al. 2023)."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from stablesr_kit.imaging.canvas import Region
from stablesr_kit.imaging.tiles import Blend, cover, gaussian_weights
from stablesr_kit.tiling.memory import is_out_of_memory
from stablesr_kit.tiling.team import Team, TileRequest

logger = logging.getLogger(__name__)


class Predict(Protocol):
    """Prediction for a batch of tiles at one timestep: `Sampling.predict` with the rest of its arguments bound.

    A team needs those as well: it is a `functools.partial` there.
    """

    def __call__(self, *, latents: Tensor, lq_latents: Tensor, prompt_embeds: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class LatentTiling:
    """How a canvas of latents is covered.

    Args:
        tile: height and width of a tile; the canvas' own make it one tile.
        overlap: how much neighbours share, at least.
        batch_size: tiles per call of the networks. On the CPU they are called tile by tile whatever it is: a batch is
            hardly faster there, and rounds otherwise.
    """

    tile: tuple[int, int]
    overlap: int = 0
    batch_size: int = 1

    def halved(self, multiple: int) -> "LatentTiling | None":
        """Half the batch or, if that is one tile, half the tile; None if that is too small for the networks.

        multiple: tile sides are multiples of this, and at least twice it.
        """
        if self.batch_size > 1:
            return replace(self, batch_size=self.batch_size // 2)
        if max(self.tile) <= 2 * multiple:
            return None
        half = max(max(self.tile) // 2 // multiple, 2) * multiple
        tile = (min(self.tile[0], half), min(self.tile[1], half))
        return replace(self, tile=tile, overlap=min(self.overlap or half // 4, half // 2))


class Aggregation:
    """Predicts on a canvas that stays where it is, tile by tile on the device.

    Every tile is predicted on its own; where tiles overlap, predictions are averaged with gaussian weights, summed in
    the order of the tiles. Neither the batch size nor the order in which tiles are computed changes the CPU's result.

    Args:
        size: height and width of the canvas.
        tiling: what to begin with, None with the whole canvas; if memory lacks it is halved for the rest of the run.
        multiple: tile sides are multiples of this.
        device, dtype: where and in what tiles are computed.
        jitter_seed: moves the tiles at every step, so that no border stays where it is; None leaves them in place.
        weights: (height, width) of a tile -> what its positions count where tiles overlap.
        team: processes that predict tiles as well; None predicts all of them here.
    """

    def __init__(
        self,
        size: tuple[int, int],
        tiling: LatentTiling | None,
        multiple: int,
        device: torch.device,
        dtype: torch.dtype,
        jitter_seed: int | None = None,
        weights: Callable[[int, int], Tensor] = gaussian_weights,
        team: Team | None = None,
    ) -> None:
        self.size = size
        self.tiling = tiling or LatentTiling(tile=size)
        self.multiple = multiple
        self.device = device
        self.dtype = dtype
        self.jitter_seed = jitter_seed
        self.weights = weights
        self.team = team

    def regions(self, step: int) -> list[Region]:
        """The tiles of a step, row by row."""
        tile, overlap = self.tiling.tile, self.tiling.overlap
        shift = (0, 0)
        if self.jitter_seed is not None:
            drawn = np.random.SeedSequence((self.jitter_seed, step)).generate_state(2)
            shift = (int(drawn[0]) % (tile[0] - overlap), int(drawn[1]) % (tile[1] - overlap))
        return cover(*self.size, tile, overlap, shift)

    def count(self, steps: range) -> int:
        """Tiles that these steps predict."""
        return sum(len(self.regions(step)) for step in steps)

    def predict(
        self,
        predict: Predict,
        latents: Tensor,
        lq_latents: Tensor,
        prompt_embeds: Tensor,
        step: int,
        on_tile: Callable[[], object] = lambda: None,
        on_halving: Callable[[], object] = lambda: None,
    ) -> Tensor:
        """Prediction (B, C, h, w) for a canvas, with its device and dtype.

        latents, lq_latents: (B, C, h, w). prompt_embeds: as `Sampling.predict`. on_tile: called after each tile.
        on_halving: called when the tiling was halved and the step begins again.

        Raises:
            torch.OutOfMemoryError: one of the smallest tiles is too large (or what the CPU raises then).
        """
        while True:
            regions = self.regions(step)
            try:
                blend = Blend(regions, self.weights)
                for index, prediction in self._predictions_of_all(predict, latents, lq_latents, prompt_embeds, regions):
                    on_tile()
                    if len(regions) == 1:
                        return prediction.to(latents)
                    blend.add(index, prediction)
                return blend.mean().to(latents)
            except (RuntimeError, MemoryError) as error:
                halved = self.tiling.halved(self.multiple) if is_out_of_memory(error) else None
                if halved is None:
                    raise
                logger.warning("not enough memory for %s; going on with %s", self.tiling, halved)
                self.tiling = halved
                on_halving()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def predictions(
        self,
        predict: Predict,
        latents: Tensor,
        lq_latents: Tensor,
        prompt_embeds: Tensor,
        regions: Sequence[Region],
        indices: Sequence[int],
    ) -> Iterator[tuple[int, Tensor]]:
        """(index, prediction (B, C, tile height, tile width)) of the regions with these indices, in their order."""
        pictures = len(latents)
        per_call = 1 if self.device.type == "cpu" else self.tiling.batch_size
        for first in range(0, len(indices), per_call):
            chosen = indices[first : first + per_call]
            predicted = predict(
                latents=self._gather(latents, [regions[i] for i in chosen]),
                lq_latents=self._gather(lq_latents, [regions[i] for i in chosen]),
                prompt_embeds=repeat_for_tiles(prompt_embeds, pictures, len(chosen)),
            )
            yield from zip(chosen, predicted.split(pictures), strict=True)

    def _predictions_of_all(
        self, predict: Predict, latents: Tensor, lq_latents: Tensor, prompt_embeds: Tensor, regions: Sequence[Region]
    ) -> Iterable[tuple[int, Tensor]]:
        if self.team is None:
            return self.predictions(predict, latents, lq_latents, prompt_embeds, regions, range(len(regions)))
        assert isinstance(predict, partial)
        request = TileRequest(
            latents=latents.cpu(),
            lq_latents=lq_latents.cpu(),
            prompt_embeds=prompt_embeds.cpu(),
            arguments={k: v.cpu() if isinstance(v, Tensor) else v for k, v in predict.keywords.items()},
            regions=regions,
            batch_size=self.tiling.batch_size,
        )
        self.team.tell(request)
        own = self.predictions(predict, latents, lq_latents, prompt_embeds, regions, self.team.share(len(regions)))
        return enumerate(self.team.exchange(prediction_shapes(request), own))

    def _gather(self, canvas: Tensor, regions: list[Region]) -> Tensor:
        return torch.cat([region.crop(canvas) for region in regions]).to(self.device, self.dtype)


def prediction_shapes(request: TileRequest) -> list[tuple[int, int, int, int]]:
    """(B, C, tile height, tile width) of what each region's prediction is."""
    return [(*request.latents.shape[:2], region.height, region.width) for region in request.regions]


def repeat_for_tiles(prompt_embeds: Tensor, pictures: int, tiles: int) -> Tensor:
    """Embeddings of `pictures`, once or per guidance branch, repeated for a batch of tiles with all pictures each."""
    if len(prompt_embeds) < pictures:  # one for all
        return prompt_embeds
    branches = prompt_embeds.unflatten(0, (-1, 1, pictures))
    return branches.expand(-1, tiles, -1, -1, -1).flatten(0, 2)
