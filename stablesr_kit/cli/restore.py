"""`stablesr restore`: pictures and folders in, restored pictures out."""

import math
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from PIL import Image
from tqdm import tqdm

from stablesr_kit.cli.messages import failing_in_one_line, one_line, quieten_libraries, usage_error
from stablesr_kit.errors import CheckpointError, ImageError, OutputError, StableSRKitError
from stablesr_kit.imaging.files import Picture, check_output, list_images, read_picture, side_by_side, write_picture

if TYPE_CHECKING:
    import torch

    from stablesr_kit import StableSRPipeline

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


def restore(
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT", help="Pictures, and folders of pictures.")],
    output: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="OUT", help="A file for one picture, else a folder (of PNG files)."),
    ],
    model: Annotated[str, typer.Option(help="mini, a pipeline folder, or a Hugging Face repository.")] = "mini",
    scale: Annotated[float, typer.Option(help="How many times larger the result is.")] = 4,
    w: Annotated[float, typer.Option("--w", help="0 realism to 1 fidelity; above 1 extrapolates.")] = 0.5,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", show_default="the model's own")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same result.")] = 0,
    color_fix: Annotated[
        Literal["wavelet", "adain", "none"], typer.Option(help="How the result gets the colours of the input.")
    ] = "wavelet",
    start: Annotated[
        str, typer.Option(metavar="lq|noise|TIMESTEP", help="Begin at the noised input, pure noise, or a timestep.")
    ] = "lq",
    prompt: Annotated[str | None, typer.Option(help="What the picture shows.", show_default="no text")] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What it should not look like; acts with --guidance-scale above 1.")
    ] = None,
    guidance_scale: Annotated[float, typer.Option(help="Weight of the prompts; 1 is off.")] = 1.0,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda|cuda:N|mps", help="Where to compute.")] = "auto",
    dtype: Annotated[
        DtypeName, typer.Option(help="Precision; auto is bfloat16 (or float16) on CUDA, float32 elsewhere.")
    ] = "auto",
    compare: Annotated[bool, typer.Option("--compare", help="Also write input and result side by side.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Skip pictures whose result exists.")] = False,
) -> None:
    """Restore and enlarge pictures.

    Exit status: 0 all restored; 1 some failed, each with one line, and the others are written; 2 wrong usage.
    """
    first = parse_start(start)
    check_numbers(scale, w, steps, guidance_scale)
    report = Report()
    jobs = plan(inputs, output, compare, report)
    if resume:
        report.skipped = sum(job.is_done for job in jobs)
        jobs = [job for job in jobs if not job.is_done]
    try:
        if jobs:
            with failing_in_one_line():
                make_folder(jobs[0].target.parent)
                pipeline = load_pipeline(model, device, dtype)
            check_components(pipeline, w, prompt, negative_prompt)
            options = {
                "prompt": prompt,
                "negative_prompt": negative_prompt,
                "w": w,
                "scale": scale,
                "num_inference_steps": steps,
                "guidance_scale": guidance_scale,
                "start": first,
                "color_fix": color_fix,
            }
            run(jobs, lambda rgb: pipeline(rgb, generator=seeded(seed), **options).images[0], pipeline, report)
    except KeyboardInterrupt:
        typer.echo(f"interrupted: {report.summary()}; nothing is half-written, --resume continues", err=True)
        raise typer.Exit(130) from None
    typer.echo(report.summary())
    if report.failed:
        raise typer.Exit(1)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One picture to restore: where it is, where the result goes, and where the comparison goes (None: nowhere)."""

    source: Path
    target: Path
    comparison: Path | None

    @property
    def is_done(self) -> bool:
        """Whether all it should write exists already."""
        return self.target.exists() and (self.comparison is None or self.comparison.exists())


@dataclass
class Report:
    """What became of the pictures."""

    written: list[Path] = field(default_factory=list)
    skipped: int = 0
    failed: int = 0

    def fail(self, error: StableSRKitError) -> None:
        """Counts a failure and tells it in one line, above the progress bars."""
        self.failed += 1
        tqdm.write(f"error: {one_line(error)}", file=sys.stderr)

    def summary(self) -> str:
        """How many were restored and where they are."""
        counts = [f"{len(self.written)} restored"]
        counts += [f"{self.skipped} already there"] if self.skipped else []
        counts += [f"{self.failed} failed"] if self.failed else []
        where = self.written[0] if len(self.written) == 1 else self.written[0].parent if self.written else None
        return ", ".join(counts) + (f": {where}" if where else "")


def parse_start(start: str) -> Literal["lq", "noise"] | int:
    """The `start` of a pipeline call."""
    if start == "lq":
        return "lq"
    if start == "noise":
        return "noise"
    if not start.isdecimal():
        usage_error(f"--start {start!r} is not known; give lq, noise or a timestep such as 600")
    return int(start)


def check_numbers(scale: float, w: float, steps: int | None, guidance_scale: float) -> None:
    """Refuse numbers no model can work with, before one is loaded."""
    if not (math.isfinite(scale) and scale > 0):
        usage_error(f"--scale {scale} must be a positive number; 4 is usual")
    if not (math.isfinite(w) and w >= 0):
        usage_error(f"--w {w} must be a number from 0 (realism) to 1 (fidelity); above 1 extrapolates")
    if steps is not None and steps < 1:
        usage_error(f"--steps {steps} must be at least 1; leave it out for the model's own number")
    if not math.isfinite(guidance_scale):
        usage_error(f"--guidance-scale {guidance_scale} must be a number; 1 is off, 7 is strong")


def plan(inputs: list[Path], output: Path, with_comparison: bool, report: Report) -> list[Job]:
    """One job for each picture that is there; each input without a picture is reported as a failure.

    Ends the command if two results, or a result and an input, would have one name.
    """
    found: dict[Path, None] = {}
    for given in inputs:
        try:
            found.update(dict.fromkeys(list_images([given])))
        except ImageError as error:
            report.fail(error)
    sources = list(found)
    if len(inputs) == 1 and not inputs[0].is_dir() and output.suffix and not output.is_dir():
        try:
            check_output(output)
        except OutputError as error:
            usage_error(str(error))
        targets = [output] * len(sources)
    else:
        if output.is_file():
            usage_error(f"-o {output} is a file; several pictures need a folder")
        stems = Counter(source.stem for source in sources)
        names = [f"{s.stem}_{s.suffix[1:]}" if stems[s.stem] > 1 and s.suffix else s.stem for s in sources]
        targets = [output / f"{name}.png" for name in names]
    jobs = [
        Job(
            source=source,
            target=target,
            comparison=target.with_name(f"{target.stem}_compare{target.suffix}") if with_comparison else None,
        )
        for source, target in zip(sources, targets, strict=True)
    ]
    results = [path for job in jobs for path in (job.target, job.comparison) if path]
    for path, count in Counter(results).items():
        if count > 1:
            usage_error(f"{path} would be written for {count} pictures; restore them into different folders")
    originals = {source.resolve() for source in sources}
    for path in results:
        if path.resolve() in originals:
            usage_error(f"{path} is an input and would be overwritten; choose another -o")
    return jobs


def make_folder(folder: Path) -> None:
    """Make the folder of the results, so that a place that cannot be written shows before any work. OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: the folder cannot be made ({error.strerror}); choose another -o") from error
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{folder}: the folder is not writable; choose another -o or change its permissions")


def load_pipeline(model: str, device_name: str, dtype_name: DtypeName) -> "StableSRPipeline":
    """The model on its device. Raises ModelNotFoundError, or CheckpointError for one that is damaged."""
    device = choose_device(device_name)
    dtype = choose_dtype(dtype_name, device)

    quieten_libraries()

    from stablesr_kit import StableSRPipeline

    try:
        pipeline: StableSRPipeline = StableSRPipeline.from_pretrained(model, dtype=dtype, use_safetensors=True)
    except StableSRKitError:
        raise
    except (OSError, ValueError) as error:  # how diffusers says that files are missing, cut short or foreign
        raise CheckpointError(f"{model}: the model cannot be loaded ({error}); get a whole copy of it") from error
    return pipeline.to(device)


def choose_device(name: str) -> "torch.device":
    """The named device, or the best one there is; ends the command if there is none of that name."""
    import torch

    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if counts[kind])
    kind, _, index = name.partition(":")
    if kind not in counts or (":" in name and not index.isdecimal()):
        usage_error(f"--device {name!r} is not known; give auto, cpu, cuda, cuda:N or mps")
    if int(index or 0) >= counts[kind]:
        available = ", ".join(kind for kind, count in counts.items() if count)
        usage_error(f"--device {name} is not available here; there is {available}")
    return torch.device(name)


def choose_dtype(name: DtypeName, device: "torch.device") -> "torch.dtype":
    """The named precision, or the one that is fast and safe on the device."""
    import torch

    if name != "auto":
        chosen: torch.dtype = getattr(torch, name)
        return chosen
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def check_components(pipeline: "StableSRPipeline", w: float, prompt: str | None, negative_prompt: str | None) -> None:
    """Refuse what this model has no part for, once instead of for every picture."""
    if w > 0 and pipeline.cfw is None:
        usage_error(f"--w {w} needs feature wrapping (CFW), which this model lacks; give --w 0 or convert with --cfw")
    if (prompt or negative_prompt) and pipeline.text_encoder is None:
        usage_error("a prompt needs a text encoder, which this model lacks; leave the prompts out")


def seeded(seed: int) -> "torch.Generator":
    """A fresh generator for each picture: its result does not depend on what was restored before it."""
    import torch

    return torch.Generator().manual_seed(seed)


def run(
    jobs: list[Job], call: Callable[[Image.Image], Image.Image], pipeline: "StableSRPipeline", report: Report
) -> None:
    """Restore one picture after the other, with a bar over the pictures and one over the steps of each."""
    is_quiet = not sys.stderr.isatty()
    for job in tqdm(jobs, unit="picture", leave=False, disable=is_quiet or len(jobs) == 1):
        pipeline.set_progress_bar_config(
            desc=job.source.name, unit="step", leave=False, position=int(len(jobs) > 1), disable=is_quiet
        )
        try:
            restore_file(job, call)
        except StableSRKitError as error:
            report.fail(error)
        else:
            report.written.append(job.target)


def restore_file(job: Job, call: Callable[[Image.Image], Image.Image]) -> None:
    """Read, restore, write. Raises StableSRKitError, whose message begins with the file."""
    picture = read_picture(job.source)
    for note in picture.notes:
        tqdm.write(f"note: {one_line(job.source)}: {note}", file=sys.stderr)
    check_output(job.target, picture)
    try:
        restored = call(picture.rgb)
    # What models meet on some pictures: sizes they cannot take, overflow, and torch's RuntimeError for lack of memory.
    except (ValueError, ArithmeticError, RuntimeError, MemoryError) as error:
        reason = "not enough memory" if _is_out_of_memory(error) else str(error).partition("\n")[0]
        advice = "; restore a smaller picture, or with a smaller --scale" if _is_out_of_memory(error) else ""
        raise StableSRKitError(f"{job.source}: {reason}{advice}") from error
    write_picture(job.target, restored, picture)
    if job.comparison:
        write_picture(job.comparison, side_by_side(picture, restored), Picture(rgb=picture.rgb))


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text
