"""Clips through the pipelines: every rung is what it says, and where a clip is cut into calls does not show."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from stablesr_kit import Job, SpacedDDPMScheduler, StableSRPipeline, Tiling
from stablesr_kit.diffusion.canvas_noise import CanvasNoise
from stablesr_kit.diffusion.spaced import SpacedDDIMScheduler
from stablesr_kit.errors import ConfigError, ImageError, JobError
from stablesr_kit.imaging.canvas import View, assembled
from stablesr_kit.imaging.resizing import reduced
from stablesr_kit.pipelines.video import LADDER, ClipState, NoiseLevel, StableSRVideo, Steadiness, blurred
from stablesr_kit.spaces import image_to_unit
from stablesr_kit.tiling.memory import Plan
from stablesr_kit.video.motion import Motion, dis_flow, motion_between, warped
from tests.helpers.pipeline_runs import differs, run, same
from tests.helpers.scenes import scene
from tests.helpers.tiny import seeded, tiny_pipeline, unit_noise
from tests.pipelines.test_one_step import one_step

SIDE = 12
SCHEDULERS = (
    SpacedDDPMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
)


def clip(count: int, speed: float = 0.5, noise: float = 0.0) -> list[Tensor]:
    """Frames (1, 3, SIDE, SIDE) in [0, 1] of a scene that moves to the right."""
    frames = [scene(speed * i, side=SIDE) + noise * unit_noise(3, SIDE, SIDE, seed=i) for i in range(count)]
    return [image_to_unit(frame.clamp(-1, 1))[None] for frame in frames]


def restored(video: StableSRVideo, frames: list[Tensor], **options: Any) -> Tensor:
    return torch.stack(list(video.restore(frames, **{"scale": 2, **options})))


@pytest.fixture(scope="module")
def pipeline() -> StableSRPipeline:
    return tiny_pipeline(with_text=False, margin_px=4, default_steps=3)


def with_scheduler(pipeline: Any, scheduler: Any) -> Any:
    changed = StableSRPipeline(**pipeline.components, margin_px=4, default_steps=3)
    changed.scheduler = scheduler.from_config(pipeline.scheduler.config)
    changed.set_progress_bar_config(disable=True)
    return changed


def test_frame_by_frame_is_the_pipeline_with_fresh_noise(pipeline: StableSRPipeline) -> None:
    frames = clip(2)
    got = restored(StableSRVideo(pipeline, LADDER["none"]), frames, seed=4)
    stage_noise: list[CanvasNoise] = []

    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        stage_noise.append(kwargs["job"].noise)
        return original(self, *args, **kwargs)

    original = StableSRPipeline.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StableSRPipeline, "__call__", noting)
        restored(StableSRVideo(pipeline, LADDER["none"], chunk=1), frames, seed=4)
    seeds = [noise.seeds[0] for noise in stage_noise]
    assert len(set(seeds)) == 2
    alone = [
        run(pipeline, frame, scale=2, job=Job(noise=CanvasNoise([seed])))
        for frame, seed in zip(frames, seeds, strict=True)
    ]
    same(image_to_unit(got).clamp(0, 1), torch.cat(alone), atol=1e-4)


@pytest.mark.parametrize("rung", ["moving-noise", "all"])
def test_chunks_do_not_show_and_a_saved_state_goes_on_to_the_bit(
    pipeline: StableSRPipeline, rung: str, tmp_path: Path
) -> None:
    frames = clip(4)
    video = StableSRVideo(pipeline, LADDER[rung], chunk=2)
    whole: list[Tensor] = []
    for number, chunk in enumerate(video.chunks(frames, scale=2)):
        whole += [frame.image for frame in chunk.frames]
        chunk.state.save(tmp_path / f"{number}.pt")
    for size in (1, 3):
        same(restored(StableSRVideo(pipeline, LADDER[rung], chunk=size), frames), torch.stack(whole), atol=1e-3)
    state = ClipState.load(tmp_path / "0.pt")
    assert torch.equal(restored(video, frames[2:], state=state), torch.stack(whole[2:]))


def test_a_clip_that_stands_still_stands_still(pipeline: StableSRPipeline) -> None:
    frames = clip(3, speed=0)
    steady = restored(StableSRVideo(pipeline, LADDER["noise"]), frames)
    same(steady[0], steady[2])
    flickering = restored(StableSRVideo(pipeline, LADDER["none"]), frames)
    assert differs(flickering[0], flickering[2])


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("rung", ["moving-noise", "all"])
def test_every_scheduler_restores_clips(pipeline: StableSRPipeline, scheduler: Any, rung: str) -> None:
    other = with_scheduler(pipeline, scheduler)
    frames = clip(2)
    got = restored(StableSRVideo(other, LADDER[rung], chunk=2), frames)
    assert got.shape == (2, 3, 2 * SIDE, 2 * SIDE) and torch.isfinite(got).all()
    same(got, restored(StableSRVideo(other, LADDER[rung], chunk=1), frames), atol=1e-3)
    assert differs(got, restored(StableSRVideo(other, LADDER["noise"]), frames), by=1e-5)


@pytest.mark.parametrize("scheduler", [SpacedDDIMScheduler, DDIMScheduler, DPMSolverMultistepScheduler])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_scheduler_given_the_changed_prediction_arrives_at_the_changed_latents(scheduler: Any, kind: str) -> None:
    pipeline = tiny_pipeline(with_text=False)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, prediction_type=kind)
    pipeline.scheduler.set_timesteps(5)
    latents, prediction, wanted = (unit_noise(1, 4, 4, 4, seed=i) for i in range(3))
    level = NoiseLevel.of(pipeline, pipeline.scheduler.timesteps[2])
    same(level.denoised(level.prediction(wanted, latents), latents), wanted, atol=1e-4)
    same(level.prediction(level.denoised(prediction, latents), latents), prediction, atol=1e-4)
    if scheduler is not DPMSolverMultistepScheduler:
        last = pipeline.scheduler.timesteps[2]
        stepped = pipeline.scheduler.step(level.prediction(wanted, latents), last, latents)
        same(stepped.pred_original_sample, wanted, atol=1e-4)


def test_latents_are_mixed_as_the_equation_says_and_at_the_chosen_steps_alone(pipeline: StableSRPipeline) -> None:
    ddim = with_scheduler(pipeline, DDIMScheduler)
    frames = clip(2, speed=2)
    seen: dict[tuple[str, int], Tensor] = {}
    original = DDIMScheduler.step

    def noting(name: str) -> Any:
        @functools.wraps(original)  # pipelines look at its signature
        def step(self: Any, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            output = original(self, model_output, timestep, sample, return_dict=True)
            seen[name, len([key for key in seen if key[0] == name])] = output.pred_original_sample
            return original(self, model_output, timestep, sample, *args, **kwargs)

        return step

    for name, steadiness in (("plain", LADDER["noise"]), ("mixed", Steadiness(latents=0.5, bands=0))):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DDIMScheduler, "step", noting(name))
            restored(StableSRVideo(ddim, steadiness), frames)
    assert Steadiness(latents=0.5).steps(3) == {0} and Steadiness(latents=0.5).steps(50) == {*range(5), *range(40, 49)}
    plain, mixed = seen["plain", 0], seen["mixed", 0]
    same(plain[0], mixed[0], atol=1e-4)
    motion = motion_between(frames[0][0] * 2 - 1, frames[1][0] * 2 - 1, dis_flow())
    assert motion is not None
    on_latents = motion.at(24, 24).on_canvas(32, 32, margin=4).at(*plain.shape[-2:])
    m = 0.5 * on_latents.valid
    same(mixed[1], m * warped(plain[0], on_latents.back, "nearest") + (1 - m) * plain[1], atol=1e-3)
    assert differs(mixed[1], plain[1])


def test_a_cut_begins_anew(pipeline: StableSRPipeline) -> None:
    first = [image_to_unit(scene(i, side=SIDE) * 0.3 + 0.6)[None] for i in range(2)]
    second = [image_to_unit(scene(i, side=SIDE, seed=7).flip(1) * 0.3 - 0.6)[None] for i in range(2)]
    video = StableSRVideo(pipeline, Steadiness(noise="moving", latents=0.5), chunk=4)
    (chunk,) = video.chunks(first + second, scale=2)
    assert [frame.is_cut for frame in chunk.frames] == [False, False, True, False]
    assert [frame.warping_error is None for frame in chunk.frames] == [True, False, True, False]
    alone = restored(video, second)
    same(torch.stack([frame.image for frame in chunk.frames[2:]]), alone, atol=1e-3)


def test_bands_hold_fine_detail_and_leave_the_rest(pipeline: StableSRPipeline) -> None:
    video = StableSRVideo(pipeline)
    still = Motion(torch.zeros(2, 32, 32), torch.zeros(2, 32, 32), torch.ones(32, 32))
    lq = clip(1)[0][0] * 2 - 1
    frames = [0.1 * unit_noise(3, 32, 32, seed=i) for i in range(8)]
    held = frames[:1]
    for frame in frames[1:]:
        held.append(video._with_bands_of(held[-1], frame, still, lq, lq))
    plain, steady = (torch.stack(images).diff(dim=0).square().mean() for images in (frames, held))
    assert steady < 0.4 * plain
    assert held[7].std() > 0.95 * frames[7].std()
    low = [blurred(image, 6)[:, 6:-6, 6:-6] for image in (held[7], frames[7])]
    assert (low[0] - low[1]).abs().max() < 0.03


def test_bands_do_not_trust_a_flow_along_which_the_input_changes(pipeline: StableSRPipeline) -> None:
    video = StableSRVideo(pipeline, Steadiness(bands=1.0))
    still = Motion(torch.zeros(2, 32, 32), torch.zeros(2, 32, 32), torch.ones(32, 32))
    last, now = (unit_noise(3, 32, 32, seed=i).clamp(-1, 1) for i in (0, 1))
    lq = clip(1)[0][0] * 2 - 1
    same(video._with_bands_of(last, now, still, lq, lq + 0.6), now, atol=1e-3)
    taken = video._with_bands_of(last, now, still, lq, lq)
    assert differs(taken, now)
    detail, earlier = taken - blurred(now, 3), last - blurred(last, 3)
    assert torch.corrcoef(torch.stack([detail.flatten(), earlier.flatten()]))[0, 1] > 0.98


@pytest.mark.parametrize("rung", ["none", "moving-noise", "all"])
def test_one_step_models_restore_clips(rung: str) -> None:
    model = one_step()
    frames = clip(2)
    video = StableSRVideo(model, LADDER[rung], chunk=2)
    got = restored(video, frames)
    assert got.shape == (2, 3, 24, 24)
    same(got, restored(StableSRVideo(model, LADDER[rung], chunk=1), frames), atol=1e-3)


@pytest.mark.parametrize(("rung", "same_as"), [("latents", "noise"), ("all", "bands")])
def test_in_one_step_there_is_nothing_to_mix_before_the_last(
    pipeline: StableSRPipeline, rung: str, same_as: str
) -> None:
    assert Steadiness(latents=0.5).steps(1) == set() != Steadiness(latents=0.5).steps(2)
    one, other = (
        restored(StableSRVideo(pipeline, LADDER[it]), clip(2), num_inference_steps=1) for it in (rung, same_as)
    )
    assert torch.equal(one, other)


def test_clips_are_made_at_the_models_working_scale() -> None:
    video = StableSRVideo(tiny_pipeline(with_text=False, margin_px=4, default_steps=3, working_scale=4), LADDER["all"])
    large, small = (restored(video, clip(2), seed=1, scale=scale) for scale in (4, 2))
    assert small.shape == (2, 3, 2 * SIDE, 2 * SIDE)
    expected = assembled(reduced(View(large[:1]), 2 * SIDE, 2 * SIDE))
    assert (expected - small[:1]).abs().mean() < 0.01  # clipped before and after


def test_tiled_frames_are_restored_alike_in_chunks_of_any_size(pipeline: StableSRPipeline) -> None:
    frames = clip(2)
    options = {"tiling": Tiling(tile_px=16, vae_tile_px=512)}
    one, three = (restored(StableSRVideo(pipeline, LADDER["all"], chunk=size), frames, **options) for size in (1, 2))
    same(one, three, atol=1e-3)
    assert differs(one, restored(StableSRVideo(pipeline, LADDER["all"]), frames))


def test_where_memory_is_short_the_rest_of_a_clip_is_made_alike_wherever_it_was_stopped(
    pipeline: StableSRPipeline, tmp_path: Path
) -> None:
    frames, plans, calls = clip(6), list[Plan](), 0

    def lacking(_module: Any, _args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:  # the second of three steps of the second chunk
            raise torch.OutOfMemoryError("CUDA out of memory.")

    video = StableSRVideo(pipeline, LADDER["all"], chunk=2)
    hook = pipeline.unet.register_forward_pre_hook(lacking)
    chunks = list(video.chunks(frames, scale=2, on_plan=plans.append))
    hook.remove()
    whole = torch.stack([frame.image for chunk in chunks for frame in chunk.frames])
    (plan,) = plans
    assert plan.grid is not None and plan.is_reduced
    assert [chunk.state.plan for chunk in chunks] == [None, plan, plan]
    for number, chunk in enumerate(chunks):
        chunk.state.save(tmp_path / f"{number}.pt")
    begun, later = (ClipState.load(tmp_path / f"{number}.pt") for number in (0, 1))
    assert torch.equal(restored(video, frames[2:], state=begun, plan=plan), whole[2:])
    assert torch.equal(restored(video, frames[4:], state=later), whole[4:])
    assert differs(restored(video, frames[2:], state=begun), whole[2:])


def test_a_clip_is_read_as_it_is_restored(pipeline: StableSRPipeline) -> None:
    read: list[int] = []

    def reading() -> Iterator[Tensor]:
        for number, frame in enumerate(clip(5)):
            read.append(number)
            yield frame

    results = StableSRVideo(pipeline, chunk=2).restore(reading(), scale=2)
    next(results)
    assert read == [0, 1]


def test_the_clip_decides_what_is_grey(pipeline: StableSRPipeline) -> None:
    grey = clip(2)
    for is_grey, has_colour in ((True, False), (False, True)):
        got = restored(StableSRVideo(pipeline), grey, is_grey=is_grey)
        assert differs(got[:, 0], got[:, 1]) == has_colour


def test_a_post_stage_remembers_until_a_cut(pipeline: StableSRPipeline, tmp_path: Path) -> None:
    class Counting:
        def __init__(self) -> None:
            self.state: dict[str, Any] = {}
            self.seen: list[int] = []

        def __call__(self, images: Tensor, lq_images: Tensor) -> Tensor:
            assert len(images) == len(lq_images) == 1
            self.state = {"count": self.state.get("count", 0) + 1}
            self.seen.append(self.state["count"])
            return images

    frames = [*clip(3), *(1 - frame for frame in clip(2)), *clip(1)]
    frames[3:5] = [frame * 0.2 for frame in frames[3:5]]
    stage = Counting()
    chunks = list(StableSRVideo(pipeline, LADDER["noise"], chunk=2).chunks(frames, scale=2, post_stages=[stage]))
    assert stage.seen == [1, 2, 3, 1, 2, 1]
    chunks[0].state.save(tmp_path / "state.pt")
    stage = Counting()
    state = ClipState.load(tmp_path / "state.pt")
    list(StableSRVideo(pipeline, LADDER["noise"]).chunks(frames[2:3], state=state, scale=2, post_stages=[stage]))
    assert stage.seen == [3]


def test_what_cannot_work_is_one_line(pipeline: StableSRPipeline, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="frame 2 is of 8x8 pixels and the one before of 12x12"):
        restored(StableSRVideo(pipeline), [*clip(1), torch.rand(1, 3, 8, 8, generator=seeded(0))])
    with pytest.raises(ConfigError, match="chunk=0 is given"):
        StableSRVideo(pipeline, chunk=0)
    with pytest.raises(ConfigError, match="noise='some' is given, expected 'fresh', 'shared' or 'moving'"):
        Steadiness(**{"noise": "some"})
    with pytest.raises(ConfigError, match=r"bands=2 is given, expected a number from 0 to 1"):
        Steadiness(bands=2)
    with pytest.raises(ConfigError, match="EDMEulerScheduler has timesteps of its own"):
        restored(StableSRVideo(with_scheduler(pipeline, EDMEulerScheduler), LADDER["latents"]), clip(1))
    (tmp_path / "state.pt").write_bytes(b"no state")
    with pytest.raises(JobError, match=r"state\.pt: the state cannot be read .*; start again without --resume"):
        ClipState.load(tmp_path / "state.pt")
    assert restored(StableSRVideo(pipeline), clip(1)).shape == (1, 3, 24, 24)
