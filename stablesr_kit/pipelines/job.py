"""A call as a part of larger work: what it is resumed from, to the bit, who works at it, and whose frames it takes."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stablesr_kit.diffusion.canvas_noise import CanvasNoise
from stablesr_kit.errors import JobError, reason_of
from stablesr_kit.storage import replacing_file
from stablesr_kit.tiling.latents import TileGrid
from stablesr_kit.tiling.memory import Plan
from stablesr_kit.tiling.scratch import saved_bytes
from stablesr_kit.tiling.team import Team

Generators = torch.Generator | list[torch.Generator] | None
OnPrediction = Callable[[Tensor, Tensor, Tensor, int], Tensor]

_PLAIN = (Tensor, int, float, bool, str, type(None))


@dataclass(frozen=True, kw_only=True)
class SamplingState:
    """What the steps still to come depend on.

    step: number of steps taken.
    latents: (B, C, h, w) after them, on the CPU.
    scheduler: what the scheduler remembers of them.
    generators: state of each generator the noise comes from.
    grid: fields of the `TileGrid` in use, which lack of memory may have halved; None if it is not known.
    vae_tile_px: likewise for the autoencoder's tiles; None if it takes the picture whole.
    """

    step: int
    latents: Tensor
    scheduler: dict[str, Any]
    generators: list[Tensor]
    grid: dict[str, Any] | None = None
    vae_tile_px: int | None = None

    @classmethod
    def after(
        cls,
        step: int,
        latents: Tensor,
        scheduler: Any,
        generator: Generators,
        grid: TileGrid | None = None,
        vae_tile_px: int | None = None,
    ) -> "SamplingState":
        """The state after `step` steps; grid and vae_tile_px are those of the pipeline by then."""
        remembered = {name: value for name, value in vars(scheduler).items() if _is_plain(value)}
        drawn = [one.get_state() for one in _as_list(generator)]
        return cls(
            step=step,
            latents=latents.cpu(),
            scheduler=remembered,
            generators=drawn,
            grid=None if grid is None else asdict(grid),
            vae_tile_px=vae_tile_px,
        )

    def restore(self, like: Tensor, scheduler: Any, generator: Generators) -> Tensor:
        """The latents, on the device and of the dtype of `like`; scheduler and generator are as they were then."""
        if self.latents.shape != like.shape:
            raise ValueError(f"a state of latents {tuple(self.latents.shape)} is given, expected {tuple(like.shape)}")
        vars(scheduler).update(self.scheduler)
        for one, drawn in zip(_as_list(generator), self.generators, strict=False):
            one.set_state(drawn)
        return self.latents.to(like)

    def save(self, path: Path) -> None:
        """Write it whole, or leave the older one. Raises OutputError."""
        with replacing_file(path) as part:
            part.write_bytes(saved_bytes(vars(self)))

    @classmethod
    def load(cls, path: Path) -> "SamplingState":
        """Read what `save` wrote. Raises JobError if it is damaged."""
        try:
            return cls(**torch.load(path, weights_only=True))
        except Exception as error:  # the unpickler meets damaged bytes with errors of every kind
            raise JobError(
                f"{path}: the state cannot be read ({reason_of(error)}); start again without --resume"
            ) from error


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a call that may be stopped, is one of several processes, or takes frames of a clip needs beside its picture.

    Attributes:
        plan: of the method `plan`, with tiles for a picture of this size, instead of choosing them in the call.
        state: go on where another call with these arguments stood, to the bit; None begins.
        record: a folder for the feature maps of a tiled picture and for what of it is encoded and decoded: a call with
            the same arguments goes on where another one was killed, to the bit. None records nothing.
        team: processes that predict tiles of a tiled picture as well, see `StableSRPipeline.assist`; the autoencoder
            runs in this one alone. None is this process.
        noise: all the call draws, instead of its generator; a stage of a number each for the encoder's sample, the
            start and every step.
        on_prediction: called as `on_prediction(prediction, latents, timestep, step)` with what the networks predicted
            for the latents (B, C, h, w), scaled as the UNet takes them; the scheduler goes on with what it returns.
        is_grey: whether the results are grey; None: each picture's content decides.
        progress: (what is done, number of parts, what a part is) -> a bar over them, with the methods of tqdm's, that
            is shown instead of the pipeline's own; what its `update` raises stops the call.
    """

    plan: Plan | None = None
    state: SamplingState | None = None
    record: Path | None = None
    team: Team | None = None
    noise: CanvasNoise | None = None
    on_prediction: OnPrediction | None = None
    is_grey: bool | None = None
    progress: Callable[[str, int, str], Any] | None = None


def _as_list(generator: Generators) -> list[torch.Generator]:
    return generator if isinstance(generator, list) else [] if generator is None else [generator]


def _is_plain(value: object) -> bool:
    """False for what a scheduler is made of: arrays and tables that its config and its timesteps give again."""
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return all(_is_plain(part) for part in value)
    return isinstance(value, _PLAIN)
