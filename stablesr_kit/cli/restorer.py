"""What a process of `stablesr restore` holds, and what it does with each picture."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from stablesr_kit.cli.face_stage import load_face_model, tell_faces
from stablesr_kit.cli.journal import Journal, Settings
from stablesr_kit.cli.memory_limits import plan_for
from stablesr_kit.cli.messages import loading, quieten_libraries
from stablesr_kit.cli.picture_files import Job, naming
from stablesr_kit.cli.streamed_files import open_job, write_streamed
from stablesr_kit.imaging.files import Picture, side_by_side, write_picture
from stablesr_kit.imaging.streams import StreamedPicture

if TYPE_CHECKING:
    import torch

    from stablesr_kit import FaceRefinement, StableSRPipeline
    from stablesr_kit.imaging.canvas import Readable
    from stablesr_kit.pipelines.stablesr import OutputType
    from stablesr_kit.tiling.memory import Tiling
    from stablesr_kit.tiling.team import Team

LESS_MEMORY = "restore with a smaller --tile or --scale"


@dataclass(frozen=True, kw_only=True)
class Restoring:
    """What to do with every picture: plain values, which any process of any machine can be given.

    folder: of the results and their journal.
    settings: as `Journal` takes them.
    model: name or folder.
    options: of a pipeline's call, and tiling: its tiles and memory.
    face_model: name or folder of what refines faces, at fidelity face_w; None: nothing does.
    resume: continue what is in progress.
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
    resume: bool


class Restorer:
    """A loaded model that restores one picture after the other.

    team: processes that predict tiles with this one; None if there are none.

    Raises:
        ModelNotFoundError: there is no such model.
        CheckpointError: it is damaged.
        JobError: the journal cannot be read.
    """

    def __init__(self, restoring: Restoring, team: "Team | None" = None, is_below_another_bar: bool = False) -> None:
        self.restoring = restoring
        self.team = team
        self.is_below_another_bar = is_below_another_bar
        self.pipeline = load_pipeline(restoring.model, restoring.device, restoring.dtype)
        self.stages: list[FaceRefinement] = []
        if restoring.face_model is not None:
            self.stages.append(refinement(restoring.face_model, restoring.face_w, restoring.device))
        self.journal = Journal(restoring.folder, restoring.settings)

    def __call__(self, job: Job) -> None:
        """Restore, write and record a picture. Raises StableSRKitError, beginning with the file."""
        restoring = self.restoring
        show_steps(self.pipeline, job, self.is_below_another_bar)
        picture = open_job(job, restoring.options["scale"], restoring.is_huge_allowed)
        with self.journal.in_progress(job.source, job.target, restoring.resume) as state:
            options = {**restoring.options, "post_stages": self.stages}
            call = resumable(self.pipeline, state, seeded(restoring.seed), restoring.tiling, options, self.team)
            restore_file(job, picture, call, state)
            for stage in self.stages:
                tell_faces(job.source, stage, stage.reports[0])
            self.journal.finish(job.source, job.results)


def find_model(model: str) -> Path:
    """The folder of the model's files. Raises ModelNotFoundError."""
    from stablesr_kit.pipelines.loading import resolve_model

    return resolve_model(model)


def load_pipeline(model: str, device: "torch.device", dtype: "torch.dtype") -> "StableSRPipeline":
    """The model on its device. Raises ModelNotFoundError, or CheckpointError for one that is damaged."""
    quieten_libraries()

    from stablesr_kit import StableSRPipeline

    with loading(model):
        pipeline: StableSRPipeline = StableSRPipeline.from_pretrained(model, dtype=dtype, use_safetensors=True)
        return pipeline.to(device)


def refinement(model: str, w: float, device: "torch.device") -> "FaceRefinement":
    """The stage that refines faces with this model. Raises as load_face_model."""
    from stablesr_kit import FaceRefinement

    return FaceRefinement(load_face_model(model, device), w)


def seeded(seed: int) -> "torch.Generator":
    """A fresh generator for each picture: its result does not depend on what was restored before it."""
    import torch

    return torch.Generator().manual_seed(seed)


def show_steps(pipeline: "StableSRPipeline", job: Job, is_below_another_bar: bool) -> None:
    """Name the bar over the denoising steps after the picture; there is none where nobody looks at a terminal."""
    pipeline.set_progress_bar_config(
        desc=job.source.name,
        unit="tile",
        leave=False,
        position=int(is_below_another_bar),
        disable=not sys.stderr.isatty(),
    )


def resumable(
    pipeline: "StableSRPipeline",
    folder: Path,
    generator: "torch.Generator",
    tiling: "Tiling",
    options: dict[str, Any],
    team: "Team | None",
) -> Callable[["Image.Image | Readable", "OutputType"], Any]:
    """Restores a picture; plan, coding and sampling are saved in the folder, from where another run goes on."""
    from stablesr_kit import Job as PipelineJob
    from stablesr_kit.pipelines.job import SamplingState
    from stablesr_kit.pipelines.stablesr import result_size

    saved = folder / "sampling.pt"

    def save(_: object, step: int, __: object, tensors: dict[str, Any]) -> dict[str, Any]:
        # A tiled call draws its noise by position and takes nothing more from the generator.
        SamplingState.after(
            step + 1, tensors["latents"], pipeline.scheduler, generator, pipeline.grid, pipeline.vae_tile_px
        ).save(saved)
        return tensors

    def call(image: "Image.Image | Readable", output_type: "OutputType") -> Any:
        size = (image.height, image.width) if isinstance(image, Image.Image) else image.shape[1:]
        result = result_size(*size, options["scale"])
        return pipeline(
            image,
            generator=generator,
            tiling=tiling,
            job=PipelineJob(
                plan=plan_for(pipeline, *result, tiling, options, folder / "plan.json"),
                state=SamplingState.load(saved) if saved.exists() else None,
                record=folder,
                team=team,
            ),
            output_type=output_type,
            callback_on_step_end=save,
            **options,
        ).images[0]

    return call


def restore_file(
    job: Job,
    picture: Picture | StreamedPicture,
    call: Callable[["Image.Image | Readable", "OutputType"], Any],
    scratch: Path,
) -> None:
    """Restore and write; unfinished files are in `scratch`. Raises StableSRKitError, beginning with the file."""
    if isinstance(picture, StreamedPicture):
        from stablesr_kit.pipelines.pictures import to_canvas

        with naming(job, less=LESS_MEMORY):
            restored = call(to_canvas(picture, scratch), "canvas")
            write_streamed(job, restored, picture, scratch)
        return
    with naming(job, less=LESS_MEMORY):
        restored = call(picture.rgb, "pil")
    write_picture(job.target, restored, picture, scratch)
    if job.companion:
        write_picture(job.companion, side_by_side(picture, restored), Picture(rgb=picture.rgb), scratch)
