"""StableSRVideo: clips restored by the pipelines for pictures, and held steady from frame to frame without training.

Every frame is a picture to the networks, which stay as they are. What makes neighbouring frames alike is what they are
given and what is made of what they return: the noise (shared, or moving with the scene), the denoised latents of the
steps (each frame's are mixed with those of the frame before, moved along the flow), and the fine detail of the decoded
frames (likewise). The last two are recursive, as BasicVSR (Chan et al. 2021) propagates features, of first order and
forward only: what a frame takes from the past is in the frame before it, so a clip of any length needs no more memory
than a few frames, and where it is cut into calls does not show.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from stablesr_kit.diffusion.canvas_noise import CanvasNoise
from stablesr_kit.diffusion.spaced import ModelSchedule
from stablesr_kit.errors import ConfigError, ImageError, JobError, reason_of
from stablesr_kit.imaging.canvas import Readable, View, assembled
from stablesr_kit.imaging.resizing import resized
from stablesr_kit.pipelines.job import Job
from stablesr_kit.pipelines.one_step import OneStepPipeline
from stablesr_kit.pipelines.pictures import Picture, PostStage, as_readables, result_size
from stablesr_kit.pipelines.stablesr import StableSRPipeline
from stablesr_kit.seeds import stream
from stablesr_kit.storage import replacing_file
from stablesr_kit.tiling.latents import TileGrid
from stablesr_kit.tiling.memory import Plan, Tiling
from stablesr_kit.tiling.scratch import saved_bytes
from stablesr_kit.tiling.team import Team
from stablesr_kit.video.motion import FlowEstimator, Motion, dis_flow, motion_between, warped, warping_error
from stablesr_kit.video.noise import Grains, MovingNoise

NoiseOfFrames = Literal["fresh", "shared", "moving"]

RESIDUAL = 0.1
"""Of LQ values in [0, 1]: where two frames differ by as much along the flow, the flow is believed to 37 %."""
MOST_GAIN = 1.5
"""By which mixed detail is amplified at most, to be as strong as a frame's own."""


@dataclass(frozen=True, kw_only=True)
class Steadiness:
    """How frames are held to those before them.

    Attributes:
        noise: "fresh" for every frame, "shared" by all, or "moving" with the flow.
        latents: weight, 0 to 1, of the frame before in the denoised latents, at the steps that settle structure (the
            first `early` of them) and texture (the last `late` of them, without the very last). 0 is off; it always is
            in models of one step, and wherever the last step is the only one.
        bands: weight, 0 to 1, of the frame before in what is finer than `sigma_px` in the decoded frames, which stays
            as strong as it was. 0 is off.
    """

    noise: NoiseOfFrames = "shared"
    latents: float = 0.0
    early: float = 0.1
    late: float = 0.2
    bands: float = 0.8
    sigma_px: float = 3.0

    def __post_init__(self) -> None:
        if self.noise not in ("fresh", "shared", "moving"):
            raise ConfigError(f"noise={self.noise!r} is given, expected 'fresh', 'shared' or 'moving'")
        for name in ("latents", "early", "late", "bands"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)} is given, expected a number from 0 to 1")
        if not self.sigma_px > 0:
            raise ConfigError(f"sigma_px={self.sigma_px} is given, expected more than 0")

    def steps(self, count: int) -> set[int]:
        """At which of `count` steps the denoised latents are mixed."""
        early, late = math.ceil(self.early * count), math.floor((1 - self.late) * count)
        return {step for step in range(count - 1) if step < early or step >= late} if self.latents > 0 else set()


LADDER = {
    "none": Steadiness(noise="fresh", bands=0),
    "noise": Steadiness(bands=0),
    "moving-noise": Steadiness(noise="moving", bands=0),
    "latents": Steadiness(latents=0.5, bands=0),
    "bands": Steadiness(),
    "all": Steadiness(latents=0.5),
}
"""By the names that the command line takes, from frame by frame to all there is."""


@runtime_checkable
class Remembering(Protocol):
    """A post-stage that takes something from one frame to the next, such as `TrackedFaces`."""

    state: dict[str, Any]
    """Plain values and tensors; empty at the beginning of a scene."""

    def __call__(self, images: Tensor, lq_images: Tensor) -> Tensor:
        """As any post-stage."""


@dataclass(frozen=True)
class RestoredFrame:
    """image: (3, H, W) in about [-1, 1], on the CPU. is_cut: a scene begins with it. warping_error: against the frame
    before, along the flow of the LQ frames, see `warping_error`; None for the first frame of a scene."""

    image: Tensor
    is_cut: bool
    warping_error: float | None


@dataclass(frozen=True, kw_only=True)
class ClipState:
    """What the frames still to come take from those before.

    frames: number of those. lq: the last of them as it was given, (3, h, w), and restored: what it became, (3, H, W).
    latents: by step, its denoised latents (C, h, w). grains: of its noise. stages: what post-stages remember. plan: the
    tiles that the frames are made in, which lack of memory may have made smaller; None takes them whole.
    """

    frames: int
    lq: Tensor
    restored: Tensor
    latents: dict[int, Tensor]
    grains: Grains | None
    stages: list[dict[str, Any]]
    plan: Plan | None

    def save(self, path: Path) -> None:
        """Write it whole, or leave the older one. Raises OutputError."""
        grains = None if self.grains is None else vars(self.grains)
        plan = None if self.plan is None else asdict(self.plan)
        with replacing_file(path) as part:
            part.write_bytes(saved_bytes(vars(self) | {"grains": grains, "plan": plan}))

    @classmethod
    def load(cls, path: Path) -> "ClipState":
        """Read what `save` wrote. Raises JobError if it is damaged."""
        try:
            saved = torch.load(path, weights_only=True)
            grains, plan = saved["grains"], saved["plan"]
            parts = {"grains": grains and Grains(**grains), "plan": plan and Plan.of_fields(plan)}
            return cls(**{**saved, **parts})
        except Exception as error:  # the unpickler meets damaged bytes with errors of every kind
            raise JobError(
                f"{path}: the state cannot be read ({reason_of(error)}); start again without --resume"
            ) from error


@dataclass(frozen=True)
class Chunk:
    """Frames that were restored together, and the state that another call goes on from."""

    frames: list[RestoredFrame]
    state: ClipState


class StableSRVideo:
    """Restores and enlarges clips: `for frame in StableSRVideo(pipeline).restore(frames): ...`.

    Args:
        pipeline: for pictures, of any model and with any scheduler.
        steadiness: what holds the frames to those before them.
        flow: (H, W) grey, (H, W) grey -> flow; None is `dis_flow`.
        chunk: frames that the networks take at once. It costs memory, saves time on a GPU, and does not change what
            is computed, but for the last digits.
    """

    def __init__(
        self,
        pipeline: StableSRPipeline | OneStepPipeline,
        steadiness: Steadiness | None = None,
        flow: FlowEstimator | None = None,
        chunk: int = 4,
    ) -> None:
        if chunk < 1:
            raise ConfigError(f"chunk={chunk} is given, expected at least one frame")
        self.pipeline = pipeline
        self.steadiness = steadiness or Steadiness()
        self.flow = flow or dis_flow()
        self.chunk = chunk

    def restore(self, frames: Iterable[Picture], **options: Any) -> Iterator[Tensor]:
        """The frames of a clip, restored: images (3, H, W) in about [-1, 1], on the CPU; arguments as `chunks`."""
        for chunk in self.chunks(frames, **options):
            for frame in chunk.frames:
                yield frame.image

    @torch.no_grad()
    def chunks(
        self,
        frames: Iterable[Picture],
        *,
        seed: int = 0,
        state: ClipState | None = None,
        is_grey: bool | None = None,
        post_stages: Sequence[PostStage] = (),
        tiling: Tiling | None = None,
        plan: Plan | None = None,
        on_plan: Callable[[Plan], object] = lambda _: None,
        team: Team | None = None,
        progress: Callable[[str, int, str], Any] | None = None,
        **options: Any,
    ) -> Iterator[Chunk]:
        """A clip, restored chunk by chunk; of the frames no more are read than are needed.

        Args:
            frames: one picture each, as a pipeline takes them, all of one size.
            seed: of all noise, 0 or more.
            state: of the chunk before, in this call or an earlier one with the same arguments; None begins.
            is_grey: whether the clip is; None leaves it to each frame, which may flicker.
            post_stages: as a pipeline's; `TrackedFaces` is one that knows of frames.
            tiling, plan, team, progress: as in a pipeline's call and its `Job`; a plan is for as many pictures as a
                chunk has. plan=None is that of the state, and at the beginning one made here, if one is needed.
            on_plan: called with another plan when memory does not suffice for this one: the chunk is made again by it,
                and all that follow, so that a clip depends on when memory was short, and not on where it was stopped.
            options: of the pipeline's call: scale, w, num_inference_steps, prompt, color_fix and so on.

        Raises:
            ImageError: a frame is not of the first one's size.
            ConfigError: the noise levels of the pipeline's scheduler are not known, and `latents` needs them.
            ValueError: an argument cannot work.
        """
        remembering: list[Remembering] = [stage for stage in post_stages if isinstance(stage, Remembering)]
        for stage, remembered in zip(remembering, state.stages if state else [{}] * len(remembering), strict=True):
            stage.state = remembered
        source, tiling = iter(frames), tiling or Tiling()
        while given := [as_readables(frame)[0] for frame in itertools.islice(source, self.chunk)]:
            first = 0 if state is None else state.frames

            # 1. What moved, from the frame before to each; None is a cut
            lq = [assembled(frame)[0].float().cpu() for frame in given]
            before = [None if state is None else state.lq, *lq[:-1]]
            motions = [self._motion(*pair, number) for number, pair in enumerate(zip(before, lq, strict=True), first)]

            # 2. The noise of the frames
            size = self._working_size(given[0], tiling, options)
            canvas = self.pipeline.padded_size(*size)
            factor = self.pipeline.vae_scale_factor
            grains = self._grains(state, motions, size, canvas, factor)
            noise = self._noise(seed, first, len(given), grains)

            # 3. All steps of all frames, each step of a frame after the same step of the frame before
            if plan is None and state is not None:
                plan = state.plan
            elif plan is None and self.pipeline.needs_plan(*size, tiling):
                plan = self._plan(size, tiling, options)
            memories = [stage.state for stage in remembering]
            while True:
                mixing = LatentMixing(self, motions, size, canvas, {} if state is None else state.latents)
                restored: list[Readable] = self.pipeline(
                    given,
                    tiling=tiling,
                    job=Job(
                        plan=plan, noise=noise, on_prediction=mixing, is_grey=is_grey, team=team, progress=progress
                    ),
                    post_stages=_per_scene(post_stages, remembering, motions),
                    output_type="canvas",
                    **options,
                ).images
                smaller = self._plan_as_run(plan, size, tiling, options)
                if smaller is None:
                    break
                plan = smaller
                on_plan(plan)
                for one, memory in zip(remembering, memories, strict=True):
                    one.state = memory

            # 4. Fine detail, from frame to frame
            finished: list[RestoredFrame] = []
            last = None if state is None else state.restored
            for number, image, motion, pair in zip(
                itertools.count(first), restored, motions, zip(before, lq, strict=True), strict=False
            ):
                now = assembled(image)[0].float().cpu()
                error = None
                if motion is not None and last is not None:
                    motion = motion.at(*image.shape[1:])
                    now = self._with_bands_of(last, now, motion, *pair)
                    error = warping_error(now, last, motion)
                finished.append(RestoredFrame(now, motion is None and number > 0, error))
                last = now
            assert last is not None
            state = ClipState(
                frames=first + len(given),
                lq=lq[-1],
                restored=last,
                latents=mixing.last,
                grains=grains[-1] if grains else None,
                stages=[stage.state for stage in remembering],
                plan=plan,
            )
            yield Chunk(finished, state)

    def _motion(self, before: Tensor | None, now: Tensor, number: int) -> Motion | None:
        if before is None:
            return None
        if before.shape != now.shape:
            raise ImageError(
                f"frame {number + 1} is of {now.shape[1]}x{now.shape[2]} pixels and the one before of "
                f"{before.shape[1]}x{before.shape[2]}; give frames of one size"
            )
        return motion_between(before, now, self.flow)

    def _working_size(self, frame: Readable, tiling: Tiling, options: dict[str, Any]) -> tuple[int, int]:
        lq = frame.shape[1], frame.shape[2]
        height, width = options.get("height"), options.get("width")
        result = (height, width) if height and width else result_size(*lq, options.get("scale"))
        return tiling.working_size(lq, result, self.pipeline.config.working_scale)

    def _plan(self, size: tuple[int, int], tiling: Tiling, options: dict[str, Any]) -> Plan:
        """The plan for chunks of frames that are made at a size."""
        names = ("w", "num_inference_steps", "guidance_scale")
        planned = {name: options[name] for name in names if options.get(name) is not None}
        return self.pipeline.plan(*size, tiling=tiling, batch_size=self.chunk, **planned)

    def _plan_as_run(
        self, plan: Plan | None, size: tuple[int, int], tiling: Tiling, options: dict[str, Any]
    ) -> Plan | None:
        """The plan by which the last call ended, if memory did not suffice for the given one; None if it did."""
        height, width = (side // self.pipeline.vae_scale_factor for side in self.pipeline.padded_size(*size))
        grid, vae_tile_px = (None, tiling.vae_tile_px) if plan is None else (plan.grid, plan.vae_tile_px)
        before, after = grid or TileGrid(tile=(height, width)), self.pipeline.aggregation.grid
        if after == before and self.pipeline.coder.tile_px == vae_tile_px:
            return None
        begun = plan or self._plan(size, tiling, options)
        return replace(
            begun,
            grid=grid if after == before else after,
            vae_tile_px=self.pipeline.coder.tile_px,
            is_reduced=begun.is_reduced or after.tile != before.tile,
        )

    def _grains(
        self,
        state: ClipState | None,
        motions: list[Motion | None],
        size: tuple[int, int],
        canvas: tuple[int, int],
        factor: int,
    ) -> list[Grains]:
        """Of every frame; none where the noise does not move."""
        if self.steadiness.noise != "moving":
            return []
        latent_size = canvas[0] // factor, canvas[1] // factor
        last = None if state is None else state.grains
        grains = []
        for motion in motions:
            if motion is None or last is None:
                last = Grains.first(*latent_size)
            else:
                last = last.moved(motion.at(*size).on_canvas(*canvas, self.margin_px))
            grains.append(last)
        return grains

    def _noise(self, seed: int, first: int, count: int, grains: list[Grains]) -> CanvasNoise:
        if grains:
            return MovingNoise(seed, grains)
        if self.steadiness.noise == "shared":
            return CanvasNoise([seed] * count)
        return CanvasNoise([int(stream(seed, first + i).integers(2**63)) for i in range(count)])

    def _with_bands_of(self, last: Tensor, now: Tensor, motion: Motion, before: Tensor | None, lq: Tensor) -> Tensor:
        """A decoded frame with its fine detail mixed with that of the frame before, where the LQ frames agree.

        A mean of two is weaker than either where they differ, and what is warped is softer; what is mixed is made as
        strong as the frame's own detail.
        """
        if self.steadiness.bands == 0 or before is None:
            return now
        _, height, width = now.shape
        earlier, later = (
            blurred(assembled(resized(View(one[None]), height, width))[0], self.steadiness.sigma_px)
            for one in (before, lq)
        )
        residual = (later - warped(earlier, motion.back)).abs().mean(0) / 2
        weight = self.steadiness.bands * motion.valid * torch.exp(-((residual / RESIDUAL) ** 2))
        low = blurred(now, self.steadiness.sigma_px)
        own, earlier_detail = now - low, last - blurred(last, self.steadiness.sigma_px)
        mixed = weight * warped(earlier_detail, motion.back, "bicubic") + (1 - weight) * own
        gain = (self._strength(own) / self._strength(mixed)).clamp(1, MOST_GAIN)
        return low + torch.where(weight > 0, gain * mixed, own)

    def _strength(self, band: Tensor) -> Tensor:
        """How strong detail (C, H, W) is around each place, (1, H, W): half by its values, half by their gradients."""
        across, down = F.pad(band.diff(dim=-1), (0, 1)), F.pad(band.diff(dim=-2), (0, 0, 0, 1))
        energies = band.square().mean(0, keepdim=True), (across.square() + down.square()).mean(0, keepdim=True)
        values, gradients = (blurred(energy, 2 * self.steadiness.sigma_px) + 1e-7 for energy in energies)
        return (values * gradients).pow(0.25)

    @property
    def margin_px(self) -> int:
        """Of the pipeline's canvas, above and to the left of the picture."""
        return int(self.pipeline.config.margin_px)


@dataclass
class LatentMixing:
    """What changes the predictions of a call so that its frames' denoised latents are mixed, as `Job.on_prediction`.

    motions: from the frame before to each. size, canvas: what the results are made at and their canvases, in pixels.
    before: by step, the denoised latents (C, h, w) of the frame before; last: likewise, of the call's last frame.
    """

    video: StableSRVideo
    motions: list[Motion | None]
    size: tuple[int, int]
    canvas: tuple[int, int]
    before: dict[int, Tensor]
    last: dict[int, Tensor] = field(default_factory=dict)

    def __call__(self, prediction: Tensor, latents: Tensor, timestep: Tensor, step: int) -> Tensor:
        """The prediction with which the scheduler arrives at the mixed x0, which is x0_i <- m x0_(i-1) + (1 - m) x0_i:
        m is the weight where the flow is valid, and x0_(i-1), mixed already, is moved to the nearest position."""
        pipeline, weight = self.video.pipeline, self.video.steadiness.latents
        if step not in self.video.steadiness.steps(pipeline.num_timesteps):
            return prediction
        level = NoiseLevel.of(pipeline, timestep)
        x0 = level.denoised(prediction.float(), latents.float())
        previous = self.before.get(step)
        for frame, motion in zip(x0, self._on_latents(x0), strict=True):
            if motion is not None and previous is not None:
                m = weight * motion.valid
                frame.copy_(m * warped(previous.to(frame), motion.back, "nearest") + (1 - m) * frame)
            previous = frame
        self.last[step] = x0[-1].cpu().clone()
        return level.prediction(x0, latents.float()).to(prediction.dtype)

    def _on_latents(self, x0: Tensor) -> list[Motion | None]:
        height, width = x0.shape[-2:]
        moved = [
            motion and motion.at(*self.size).on_canvas(*self.canvas, self.video.margin_px).at(height, width)
            for motion in self.motions
        ]
        return [motion and Motion(motion.back.to(x0), motion.forth, motion.valid.to(x0)) for motion in moved]


@dataclass(frozen=True)
class NoiseLevel:
    """Of a step: latents are signal * x0 + noise * epsilon. kind: what the networks predict."""

    kind: str
    signal: float
    noise: float

    @classmethod
    def of(cls, pipeline: StableSRPipeline | OneStepPipeline, timestep: Tensor) -> "NoiseLevel":
        """Of a timestep, which may lie between two of training. Raises ConfigError where there is no telling."""
        if isinstance(pipeline, OneStepPipeline):
            kind, alphas = pipeline.config.prediction, pipeline.scheduler.alphas_cumprod
        elif type(pipeline.scheduler).__name__ == "EDMEulerScheduler":
            raise ConfigError("EDMEulerScheduler has timesteps of its own; give another scheduler, or latents=0")
        else:
            kind, alphas = ModelSchedule.of_config(pipeline.scheduler.config)
        time = min(max(float(timestep), 0), len(alphas) - 1)
        below, above = alphas[math.floor(time)].double(), alphas[math.ceil(time)].double()
        alpha = float(torch.lerp(below, above, time - math.floor(time)))
        return cls(kind, alpha**0.5, (1 - alpha) ** 0.5)

    def denoised(self, prediction: Tensor, latents: Tensor) -> Tensor:
        """x0 of what is predicted for the latents."""
        if self.kind == "epsilon":
            return (latents - self.noise * prediction) / self.signal
        if self.kind == "v_prediction":
            return self.signal * latents - self.noise * prediction
        return latents - prediction if self.kind == "residual" else prediction.clone()

    def prediction(self, x0: Tensor, latents: Tensor) -> Tensor:
        """What the networks would have to predict for the latents to arrive at x0."""
        if self.kind == "epsilon":
            return (latents - self.signal * x0) / self.noise
        if self.kind == "v_prediction":
            return (self.signal * latents - x0) / self.noise
        return latents - x0 if self.kind == "residual" else x0


def blurred(image: Tensor, sigma_px: float) -> Tensor:
    """The image (C, H, W) under a gaussian; edges are repeated."""
    radius = math.ceil(3 * sigma_px)
    taps = torch.exp(-(torch.arange(-radius, radius + 1, dtype=torch.float64) ** 2) / (2 * sigma_px**2))
    taps = (taps / taps.sum()).to(image)
    batch = image[:, None]
    wide = F.conv2d(F.pad(batch, (radius, radius, 0, 0), mode="replicate"), taps.view(1, 1, 1, -1))
    return F.conv2d(F.pad(wide, (0, 0, radius, radius), mode="replicate"), taps.view(1, 1, -1, 1))[:, 0]


def _per_scene(
    stages: Sequence[PostStage], remembering: Sequence[Remembering], motions: Sequence[Motion | None]
) -> list[PostStage]:
    """Post-stages for a chunk: they see its frames one by one, and forget what was before a cut."""
    if not stages:
        return []

    def all_stages(images: Tensor, lq_images: Tensor) -> Tensor:
        done = []
        for image, lq, motion in zip(images.split(1), lq_images.split(1), motions, strict=True):
            if motion is None:
                for one in remembering:
                    one.state = {}
            for stage in stages:
                image = stage(image, lq)
            done.append(image)
        return torch.cat(done)

    return [all_stages]
