"""The loaded model of a process of `stablesr restore`, how it restores each picture, and such processes on Ray."""

import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import psutil
from tqdm import tqdm

from stablesr_kit.cli.face_stage import load_face_model, told_of_faces
from stablesr_kit.cli.jobs import Job, Report, Told, check_result, make_folder, naming, open_job, tell_changes
from stablesr_kit.cli.journal import Journal, Settings
from stablesr_kit.cli.messages import loading, quieten_libraries, usage_error
from stablesr_kit.errors import ImageError, JobError, StableSRKitError
from stablesr_kit.imaging.metadata import Metadata
from stablesr_kit.imaging.reading import MAX_PIXELS, MAX_STREAMED_PIXELS, Picture, Pixels
from stablesr_kit.imaging.writing import output_dtype, write_bands

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from stablesr_kit import CodeFormerPipeline, FaceRefinement, OneStepPipeline, StableSRPipeline
    from stablesr_kit.imaging.canvas import Readable
    from stablesr_kit.pipelines.stablesr import Sampled
    from stablesr_kit.tiling.memory import Plan, Tiling
    from stablesr_kit.tiling.team import Team

LESS_MEMORY = "restore with a smaller --tile or --scale"
BYTES_PER_PIXEL = 48
"""Peak memory per pixel of a result held whole: three floats each as image, as rows of pixels and as levels."""


@dataclass(frozen=True, kw_only=True)
class Restoring:
    """How to restore every picture, as plain values that can be sent to any process.

    folder: of the results and their journal.
    settings: as `Journal` takes them.
    model: name or folder.
    options: of the pipeline's call. tiling: its tiles and memory.
    face_model: name or folder of the face model, used at fidelity face_w; None restores no faces.
    is_compiled: whether networks are compiled.
    resume: continue unfinished pictures.
    has_provenance: write into each result how it was made.
    """

    folder: Path
    settings: Settings
    model: str
    device: "torch.device"
    dtype: "torch.dtype"
    seed: int
    options: dict[str, Any]
    tiling: "Tiling"
    face_model: str | None
    face_w: float
    is_huge_allowed: bool
    is_compiled: bool
    resume: bool
    has_provenance: bool

    @property
    def has_text(self) -> bool:
        """Whether the model needs its text encoder."""
        return bool(self.options["prompt"] or self.options.get("negative_prompt"))


@dataclass(kw_only=True)
class Watch:
    """What an observer of the restoration is told.

    progress: as a pipeline's `Job` takes it.
    on_step: called with the latents (1, C, h, w) after each step.
    on_frame: called with the last frame of each chunk of a clip, RGB (H, W, 3), uint8.
    is_kept: whether `sampled` keeps the last picture's latent and features, for `redecode` with any w.
    """

    progress: Callable[[str, int, str], Any] | None = None
    on_step: "Callable[[Tensor], None] | None" = None
    on_frame: Callable[[Pixels], None] | None = None
    is_kept: bool = False
    sampled: "Sampled | None" = None


class Restorer:
    """A loaded model that restores one picture after the other.

    team: processes that also predict tiles; None if there are none.
    pipeline, face_network: loaded ones; None loads those that `restoring` names.

    Raises:
        ModelNotFoundError: there is no such model.
        CheckpointError: it is damaged.
        ConfigError: it cannot be compiled here.
        JobError: the journal cannot be read.
    """

    def __init__(
        self,
        restoring: Restoring,
        team: "Team | None" = None,
        is_below_another_bar: bool = False,
        watch: "Watch | None" = None,
        pipeline: "StableSRPipeline | OneStepPipeline | None" = None,
        face_network: "CodeFormerPipeline | None" = None,
    ) -> None:
        self.restoring = restoring
        self.team = team
        self.is_below_another_bar = is_below_another_bar
        self.watch = watch or Watch()
        self.pipeline = pipeline or load_pipeline(
            restoring.model, restoring.device, restoring.dtype, restoring.has_text
        )
        if restoring.is_compiled:
            self.pipeline.compile_prediction()
        self.stages: list[FaceRefinement] = []
        if restoring.face_model is not None:
            network = face_network or load_face_model(restoring.face_model, restoring.device)
            self.stages.append(refinement(network, restoring.face_w))
        self.journal = Journal(restoring.folder, restoring.settings)

    def __call__(self, job: Job) -> Told:
        """Restore, write and record a picture. Raises StableSRKitError, beginning with the file."""
        restoring = self.restoring
        show_steps(self.pipeline, job, self.is_below_another_bar)
        picture = open_job(job, restoring.is_huge_allowed, restoring.options["scale"])
        if self.stages:  # which take a picture whole
            pixels = picture.height * picture.width * restoring.options["scale"] ** 2
            check_result(job, pixels, psutil.virtual_memory().total / BYTES_PER_PIXEL, "give a smaller --scale")
        tell_changes(job, picture)
        if picture.height * picture.width <= MAX_PIXELS:  # so that nothing is begun with a damaged one
            picture = picture.holding(picture.pixels)
        with self.journal.in_progress(job.source, job.target, restoring.resume) as state:
            options = {**restoring.options, "post_stages": self.stages}
            call = resumable(
                self.pipeline, state, seeded(restoring.seed), restoring.tiling, options, self.team, self.watch
            )
            restore_file(job, picture, call, state, self.provenance(job) if restoring.has_provenance else None)
            self.journal.finish(job.source, job.results)
        told = Told([], {})
        for stage in self.stages:
            told = told_of_faces(job.source, stage, stage.reports[0])
        return told

    def provenance(self, job: Job) -> dict[str, Any]:
        """How a result was made: settings for people first, then all that a later run compares."""
        steps = self.restoring.options["num_inference_steps"] or self.pipeline.default_steps
        said = {"software": "stablesr-kit", "model": Path(self.restoring.model).name, "steps": steps}
        return said | self.journal.provenance(job.source)


def find_model(model: str) -> Path:
    """The folder of the model's files. Raises ModelNotFoundError."""
    quieten_libraries()

    from stablesr_kit.pipelines.loading import resolve_model

    return resolve_model(model)


def load_pipeline(
    model: str, device: "torch.device", dtype: "torch.dtype", has_text: bool = False
) -> "StableSRPipeline | OneStepPipeline":
    """The model on its device. The text encoder is loaded only for a prompt, or if the empty prompt needs it.

    Raises ModelNotFoundError, or CheckpointError if the model is damaged.
    """
    quieten_libraries()

    from stablesr_kit import OneStepPipeline, StableSRPipeline
    from stablesr_kit.pipelines.loading import carries_empty_prompt, only_variant, pipeline_config

    with loading(model):
        folder = find_model(model)
        options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "variant": only_variant(folder)}
        is_one_step = pipeline_config(folder).get("_class_name") == "OneStepPipeline"
        if not has_text and (is_one_step or carries_empty_prompt(folder)):
            options |= {"text_encoder": None, "tokenizer": None}
        kind = OneStepPipeline if is_one_step else StableSRPipeline
        return kind.from_pretrained(folder, **options).to(device)


def refinement(network: "CodeFormerPipeline", w: float) -> "FaceRefinement":
    """The stage that refines faces with this network. Raises ConfigError."""
    from stablesr_kit import FaceRefinement

    return FaceRefinement(network, w)


def seeded(seed: int) -> "torch.Generator":
    """A new generator for each picture, so that results do not depend on the order."""
    import torch

    return torch.Generator().manual_seed(seed)


def show_steps(pipeline: "StableSRPipeline | OneStepPipeline", job: Job, is_below_another_bar: bool) -> None:
    """Label the progress bar of the denoising steps with the picture; no bar if there is no terminal."""
    pipeline.set_progress_bar_config(
        desc=job.source.name,
        leave=False,
        position=int(is_below_another_bar),
        disable=not sys.stderr.isatty(),
    )


def resumable(
    pipeline: "StableSRPipeline | OneStepPipeline",
    folder: Path,
    generator: "torch.Generator",
    tiling: "Tiling",
    options: dict[str, Any],
    team: "Team | None",
    watch: Watch,
) -> "Callable[[Readable], Readable]":
    """Restore a picture, saving plan, encoding, sampling and decoding in a folder so that a later run can go on."""
    from stablesr_kit import Job as PipelineJob
    from stablesr_kit import StableSRPipeline
    from stablesr_kit.pipelines.job import SamplingState
    from stablesr_kit.pipelines.pictures import result_size

    saved = folder / "sampling.pt"

    def save(_: object, step: int, __: object, tensors: dict[str, Any]) -> dict[str, Any]:
        # A tiled call draws its noise by position and takes nothing more from the generator.
        SamplingState.after(
            step + 1,
            tensors["latents"],
            pipeline.scheduler,
            generator,
            pipeline.aggregation.grid,
            pipeline.coder.tile_px,
        ).save(saved)
        if watch.on_step is not None:
            watch.on_step(tensors["latents"])
        return tensors

    def call(image: "Readable") -> "Readable":
        lq = image.shape[1], image.shape[2]
        worked_at = tiling.working_size(lq, result_size(*lq, options["scale"]), pipeline.config.working_scale)
        if math.prod(worked_at) > MAX_STREAMED_PIXELS:
            millions = math.prod(worked_at) / 1e6
            raise ImageError(f"{millions:,.0f} million pixels to work at are more than can be made; give --coarse")
        job = PipelineJob(
            plan=plan_for(pipeline, *worked_at, tiling, options, folder / "plan.json"),
            state=SamplingState.load(saved) if saved.exists() else None,
            record=folder,
            team=team,
            progress=watch.progress,
        )
        given = {"generator": generator, "tiling": tiling, "job": job, "callback_on_step_end": save}
        restored: Readable
        if not (watch.is_kept and isinstance(pipeline, StableSRPipeline)):
            restored = pipeline(image, output_type="canvas", **given, **options).images[0]
            return restored
        decoding = {name: options[name] for name in ("w", "color_fix", "post_stages")}
        sampling = {**options, "post_stages": ()}
        if pipeline.cfw is not None:  # features are kept for w above 0
            sampling["w"] = decoding["w"] or 1.0
        sampled = pipeline(image, output_type="latent", **given, **sampling).sampled
        watch.sampled = replace(sampled, record=None)  # which is gone with the state
        decoded: Any = pipeline.redecode(sampled, output_type="canvas", **decoding)
        restored = decoded.images[0]
        return restored

    return call


def restore_file(
    job: Job,
    picture: Picture,
    call: "Callable[[Readable], Readable]",
    scratch: Path,
    provenance: dict[str, Any] | None,
) -> None:
    """Restore and write; unfinished files are in `scratch`. Raises StableSRKitError, beginning with the file."""
    from stablesr_kit.imaging.resizing import resized
    from stablesr_kit.pipelines.pictures import pixel_bands, to_canvas

    with naming(job, less=LESS_MEMORY):
        image = to_canvas(picture, None if picture.height * picture.width <= MAX_PIXELS else scratch)
        restored = call(image)
        _, height, width = restored.shape
        dtype = output_dtype(job.target, picture)
        write_bands(job.target, pixel_bands(restored, dtype), height, width, picture, scratch, provenance)
        if job.companion:
            plain = replace(picture, has_alpha=False, is_grey=False, metadata=Metadata())
            pairs = side_by_side(resized(image, height, width), restored, dtype)
            write_bands(job.companion, pairs, height, 2 * width + gap_beside(width), plain, scratch, provenance)


def side_by_side(left: "Readable", right: "Readable", dtype: type[np.unsignedinteger]) -> Iterator[Pixels]:
    """Rows of two images of one size, with white between them."""
    from stablesr_kit.pipelines.pictures import pixel_bands

    gap = gap_beside(right.shape[2])
    for ones, others in zip(pixel_bands(left, dtype), pixel_bands(right, dtype), strict=True):
        white = np.full((len(ones), gap, 3), np.iinfo(dtype).max, dtype)
        yield np.concatenate([ones, white, others], axis=1)


def gap_beside(width: int) -> int:
    """Width of the gap between two pictures of this width."""
    return max(width // 100, 1)


def plan_for(
    pipeline: "StableSRPipeline | OneStepPipeline",
    height: int,
    width: int,
    tiling: "Tiling",
    options: dict[str, Any],
    saved: Path,
) -> "Plan | None":
    """The plan for a result of height x width pixels, printed if there are tiles; None if none is needed.

    options: of the call, and for several pictures at once their number as batch_size. saved: file of the plan. An
    existing plan, of a stopped run, is used whatever memory is free now, so that the picture stays the same; otherwise
    a new one is written there.

    Raises:
        JobError: the stopped run had another memory limit.
    """
    from stablesr_kit.tiling.memory import Plan

    if saved.exists():
        plan = Plan.load(saved)
        if plan.max_memory != tiling.allowed_bytes():
            raise JobError(
                f"begun with {_limit(plan.max_memory)} (now {_limit(tiling.allowed_bytes())}); "
                "give the same, or start this picture again without --resume"
            )
    elif pipeline.needs_plan(height, width, tiling):
        names = ("w", "num_inference_steps", "guidance_scale", "batch_size")
        planned = {name: options[name] for name in names if name in options}
        plan = pipeline.plan(height, width, tiling=tiling, **planned)
        plan.save(saved)
    else:
        return None
    if plan.grid is not None or plan.vae_tile_px is not None:
        tqdm.write(str(plan), file=sys.stderr)
    return plan


def _limit(max_memory: int | None) -> str:
    return "no --max-memory" if max_memory is None else f"--max-memory {max_memory / 1e9:g}GB"


class RayRestorer:
    """An actor that holds the model and restores the pictures it is given."""

    def __init__(self, restoring: Restoring) -> None:
        self.restorer = Restorer(restoring)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Restore the job of a row; returns its number, the error (empty if there is none), and what to tell."""
        try:
            companion = Path(row["companion"]) if row["companion"] else None
            job = Job(
                source=Path(row["source"]), target=Path(row["target"]), companion=companion, folder=Path(row["folder"])
            )
            make_folder(job.target.parent)
            told = self.restorer(job)
        except StableSRKitError as error:
            return {"index": row["index"], "error": str(error), "told": "[[], {}]"}
        return {"index": row["index"], "error": "", "told": json.dumps(told, default=float)}


def run_on_ray(jobs: list[Job], restoring: Restoring, report: Report, workers: int | None) -> None:
    """Map the pictures over actors of the cluster of RAY_ADDRESS, or of one that is started here.

    workers: number of actors; None is up to one per picture, as the cluster allows. Each takes a whole accelerator if
    the model runs on one. Ends the command if Ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody
    try:
        import ray
        import ray.data
    except ImportError:
        usage_error("--engine ray needs Ray, which is not installed: pip install 'stablesr-kit[ray]'")
    if not ray.is_initialized():
        ray.init(include_dashboard=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    # Workers have other working folders.
    restoring = replace(restoring, folder=restoring.folder.resolve(), model=str(find_model(restoring.model).resolve()))
    rows = [
        {
            "index": index,
            "source": str(job.source.resolve()),
            "target": str(job.target.resolve()),
            "companion": str(job.companion.resolve()) if job.companion else "",
            "folder": str(job.folder.resolve()),
        }
        for index, job in enumerate(jobs)
    ]
    restored = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        cast(Any, RayRestorer),
        fn_constructor_args=(restoring,),
        compute=ray.data.ActorPoolStrategy(size=workers) if workers else ray.data.ActorPoolStrategy(max_size=len(rows)),
        num_gpus=1 if restoring.device.type == "cuda" else None,
    )
    for row in restored.iter_rows():
        if row["error"]:
            report.fail(StableSRKitError(row["error"]), jobs[row["index"]].source)
        else:
            report.finish(jobs[row["index"]], Told(*json.loads(row["told"])))
