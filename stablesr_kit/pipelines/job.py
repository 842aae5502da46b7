"""A call as part of larger work: the state it resumes from, processes that share it, and frames of one clip."""

import logging
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
from stablesr_kit.tiling.memory import Plan, Tiling
from stablesr_kit.tiling.scratch import saved_bytes
from stablesr_kit.tiling.team import Team

logger = logging.getLogger(__name__)

Generators = torch.Generator | list[torch.Generator] | None
OnPrediction = Callable[[Tensor, Tensor, Tensor, int], Tensor]

_PLAIN = (Tensor, int, float, bool, str, type(None))


@dataclass(frozen=True, kw_only=True)
class SamplingState:
    """Everything the remaining steps depend on.

    step: number of steps taken.
    latents: (B, C, h, w) after them, on the CPU.
    scheduler: the scheduler's own state.
    generators: state of each generator of the noise.
    grid: fields of the `TileGrid` in use, which may have been halved for lack of memory; None if unknown.
    vae_tile_px: side of the autoencoder's tiles in use; None if it takes pictures whole.
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
        """The state after `step` steps; grid and vae_tile_px are the pipeline's current ones."""
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
        """The latents, with device and dtype of `like`; scheduler and generator are set back to that state."""
        if self.latents.shape != like.shape:
            raise ValueError(f"a state of latents {tuple(self.latents.shape)} is given, expected {tuple(like.shape)}")
        vars(scheduler).update(self.scheduler)
        for one, drawn in zip(_as_list(generator), self.generators, strict=False):
            one.set_state(drawn)
        return self.latents.to(like)

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all. Raises OutputError."""
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


class Bar:
    """What `Job.progress` may return for a program that shows progress in its own way.

    show: is told what is done and which share of it, 0 to 1, at the beginning and after every part.
    """

    def __init__(self, doing: str, total: int, unit: str, show: Callable[[str, float], None]) -> None:
        self.doing, self.total, self.unit, self.show, self.n = doing, total, unit, show, 0

    def __enter__(self) -> "Bar":
        self.refresh()
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, n: int = 1) -> None:
        """n more parts are done."""
        self.n += n
        self.refresh()

    def refresh(self) -> None:
        """Tell it again."""
        self.show(self.doing, self.n / max(self.total, 1))


@dataclass(frozen=True, kw_only=True)
class Job:
    """For calls that can be resumed, are shared by several processes, or restore frames of a clip.

    Attributes:
        plan: result of the pipeline's `plan` for a picture of this size; None plans in the call.
        state: of an earlier call with the same arguments, which goes on from there, to the bit; None begins anew.
        record: folder for feature maps and progress of encoding and decoding in tiles: after a kill, a call with the
            same arguments goes on from there, to the bit. None records nothing.
        team: processes that also predict tiles, see `StableSRPipeline.assist`; the autoencoder runs only in this one.
            None is this process alone.
        noise: replaces the call's generator; stage 0 is the encoder's sample, stage 1 the start, and each step has a
            stage of its own.
        on_prediction: called as `on_prediction(prediction, latents, timestep, step)` with the prediction for latents
            (B, C, h, w), scaled as the UNet takes them; the scheduler uses what it returns.
        is_grey: whether the results are grey; None lets each picture's content decide.
        progress: (title, number of parts, name of a part) -> a progress bar with tqdm's methods, instead of the
            pipeline's own; an exception from its `update` stops the call.
    """

    plan: Plan | None = None
    state: SamplingState | None = None
    record: Path | None = None
    team: Team | None = None
    noise: CanvasNoise | None = None
    on_prediction: OnPrediction | None = None
    is_grey: bool | None = None
    progress: Callable[[str, int, str], Any] | None = None


def choose_tiles(
    pipeline: Any, height: int, width: int, tiling: Tiling, job: Job, **call: Any
) -> tuple[TileGrid | None, int | None]:
    """Grid of the latents and tiles of the autoencoder for a call, by its job's plan or one that is made now.

    The autoencoder keeps the tiles of a stopped call, which may have been halved for lack of memory.

    height, width: that the pipeline works at, in pixels. call: the other arguments of `pipeline.plan`.
    """
    plan = job.plan
    if plan is None and pipeline.needs_plan(height, width, tiling):
        plan = pipeline.plan(height, width, tiling=tiling, **call)
        if plan.is_reduced:
            logger.warning("%s", plan)
    if plan is None:
        grid, vae_tile_px = pipeline.grid_of(height, width, tiling), tiling.vae_tile_px
    else:
        grid, vae_tile_px = plan.grid, plan.vae_tile_px
    if job.state is not None and job.state.grid is not None:
        vae_tile_px = job.state.vae_tile_px
    return grid, vae_tile_px


def _as_list(generator: Generators) -> list[torch.Generator]:
    return generator if isinstance(generator, list) else [] if generator is None else [generator]


def _is_plain(value: object) -> bool:
    """False for what a scheduler is made of: arrays and tables that its config and its timesteps give again."""
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return all(_is_plain(part) for part in value)
    return isinstance(value, _PLAIN)
