"""`stablesr restore`: pictures and folders in, restored pictures out; or one clip."""

import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from tqdm import tqdm

from stablesr_kit import __version__
from stablesr_kit.cli.clips import is_clip, run_clip
from stablesr_kit.cli.face_stage import check_face_w, choose_face_model, find_face_model
from stablesr_kit.cli.jobs import Job, Report, finish, make_folder, open_job, plan, run
from stablesr_kit.cli.journal import Journal
from stablesr_kit.cli.messages import failing_in_one_line, one_line, usage_error
from stablesr_kit.cli.processes import is_first, local_index, share_of, team_of_all
from stablesr_kit.cli.restorer import Restorer, Restoring, Watch, find_model, load_pipeline, run_on_ray
from stablesr_kit.errors import ConfigError, JobError, ModelNotFoundError, StableSRKitError
from stablesr_kit.storage import sha256

if TYPE_CHECKING:
    import torch

    from stablesr_kit import OneStepPipeline, StableSRPipeline, Tiling
    from stablesr_kit.tiling.team import Team

CLIPS = "Clips"
"""Heading of the options that are for clips alone."""

Preset = Literal["photo", "old-photo", "ai-picture", "screenshot", "anime"]
PRESETS: Mapping[Preset, Mapping[str, Any]] = {
    "photo": {"w": 0.5, "color_fix": "wavelet"},
    "old-photo": {"w": 1.0, "color_fix": "wavelet", "face": "codeformer", "face_w": 0.7},
    "ai-picture": {"w": 0.0, "color_fix": "wavelet"},
    "screenshot": {"w": 1.0, "color_fix": "adain"},
    "anime": {"w": 1.0, "color_fix": "adain"},
}
"""What suits a kind of picture best; docs/web.md has the measurements."""

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
Engine = Annotated[
    Literal["here", "ray"],
    typer.Option(help="Where pictures are restored: in this process, or on a Ray cluster (RAY_ADDRESS)."),
]
Workers = Annotated[
    int | None, typer.Option(help="Number of workers for --engine ray.", show_default="as the cluster allows")
]


def restore(
    context: typer.Context,
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT", help="Pictures, folders of pictures, or one clip.")],
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="OUT", help="A file for one picture or clip, else a folder (of PNG files)."
        ),
    ],
    model: Annotated[
        str, typer.Option(help="mini, mini-preview, a pipeline folder, or a Hugging Face repository.")
    ] = "mini",
    preset: Annotated[
        Preset | None, typer.Option(help="What the picture is: sets options that are not given, and says which.")
    ] = None,
    scale: Annotated[float, typer.Option(help="How many times larger the result is.")] = 4,
    w: Annotated[
        float | None,
        typer.Option("--w", help="0 realism to 1 fidelity; above 1 extrapolates.", show_default="0.5"),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", show_default="the model's own")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same result.")] = 0,
    color_fix: Annotated[
        Literal["wavelet", "adain", "ycbcr", "none"] | None,
        typer.Option(
            help="How the result gets the input's colours.", show_default="wavelet, or a one-step model's own"
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            metavar="lq|noise|TIMESTEP",
            help="Start from the noised input, from pure noise, or at a timestep.",
            show_default="lq",
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What the picture shows.", show_default="no text")] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What the picture should not look like; needs --guidance-scale above 1.")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Classifier-free guidance; 1 is off.", show_default="1")
    ] = None,
    lambda_pix: Annotated[
        float | None, typer.Option(help="PiSA-SR: how much degradation is removed.", show_default="1")
    ] = None,
    lambda_sem: Annotated[
        float | None, typer.Option(help="PiSA-SR: how much detail is added.", show_default="1")
    ] = None,
    coarse: Annotated[
        bool, typer.Option("--coarse", help="Below the model's scale: work at --scale itself; faster, less detail.")
    ] = False,
    tile: Annotated[str, typer.Option(metavar="auto|none|PX", help="Side of the tiles for a large picture.")] = "auto",
    tile_overlap: Annotated[
        int | None, typer.Option(metavar="PX", help="Overlap of neighbouring tiles.", show_default="a quarter")
    ] = None,
    mode: Annotated[
        Literal["exact", "approximate"],
        typer.Option(help="Tiled autoencoder: exact, or approximate with less disk."),
    ] = "exact",
    attention: Annotated[
        Literal["global", "windowed"],
        typer.Option(help="Attention of the tiled autoencoder; windowed is faster for very large pictures."),
    ] = "global",
    max_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Memory limit of the device, such as 6GB.", show_default="what is free"),
    ] = None,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda|cuda:N|mps", help="Where to compute.")] = "auto",
    dtype: Annotated[
        DtypeName,
        typer.Option(
            help="Precision; auto is bfloat16 if the device supports it, else float16 on CUDA, float32 elsewhere."
        ),
    ] = "auto",
    compiled: Annotated[
        bool,
        typer.Option("--compile", help="Compile the networks: the first step takes minutes, all others less time."),
    ] = False,
    face: Annotated[
        Literal["none", "codeformer"], typer.Option(help="Restore the faces of the result as well.")
    ] = "none",
    face_w: Annotated[float, typer.Option(help="Faces: 0 quality to 1 fidelity.")] = 0.7,
    codeformer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|DIR|PTH",
            help="The face model: a pipeline folder, a hub repository, or an original checkpoint.",
            show_default="that of --model, or mini",
        ),
    ] = None,
    huge: Annotated[
        bool, typer.Option("--huge", help="Allow pictures of more than 100 million pixels; only for files you trust.")
    ] = False,
    engine: Engine = "here",
    workers: Workers = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also write input and result side by side.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was stopped.")] = False,
    provenance: Annotated[
        bool,
        typer.Option(
            "--provenance/--no-provenance",
            help="Write into each result how it was made; --resume needs this to recognise results.",
        ),
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each file.")] = False,
    steady: Annotated[
        Literal["none", "noise", "moving-noise", "latents", "bands", "all"],
        typer.Option(help="What holds a frame to the one before; none restores frame by frame.", rich_help_panel=CLIPS),
    ] = "bands",
    flow: Annotated[
        str,
        typer.Option(
            metavar="dis|FILE", help="Optical flow: OpenCV's DIS, or RAFT by its weights.", rich_help_panel=CLIPS
        ),
    ] = "dis",
    chunk: Annotated[
        int, typer.Option(help="Frames restored at once; more need more memory.", rich_help_panel=CLIPS)
    ] = 4,
    from_time: Annotated[
        str | None, typer.Option("--from", metavar="TIME", help="Begin at 12.5, or 1:02:03.", rich_help_panel=CLIPS)
    ] = None,
    to_time: Annotated[
        str | None, typer.Option("--to", metavar="TIME", help="End before it.", rich_help_panel=CLIPS)
    ] = None,
    frames: Annotated[
        int | None, typer.Option(metavar="N", help="Only the first N frames.", rich_help_panel=CLIPS)
    ] = None,
    codec: Annotated[
        str | None,
        typer.Option(
            help="FFmpeg's encoder, such as libx265, libsvtav1 or ffv1.",
            show_default="libx264; libx265 for more than 8 bits; libvpx-vp9 in WebM",
            rich_help_panel=CLIPS,
        ),
    ] = None,
    crf: Annotated[
        int | None,
        typer.Option(help="Quality of the encoder; lower is better.", show_default="16 to 20", rich_help_panel=CLIPS),
    ] = None,
    pix_fmt: Annotated[
        str | None,
        typer.Option(help="Pixel format, such as yuv420p10le.", show_default="like the input", rich_help_panel=CLIPS),
    ] = None,
    deinterlace: Annotated[
        bool, typer.Option("--deinterlace", help="Make whole frames of interlaced ones.", rich_help_panel=CLIPS)
    ] = False,
    fps: Annotated[
        float | None, typer.Option(help="Take a folder of pictures as a clip of this rate.", rich_help_panel=CLIPS)
    ] = None,
    on_damage: Annotated[
        Literal["repeat", "drop", "stop"],
        typer.Option(help="What stands for a frame that cannot be decoded.", rich_help_panel=CLIPS),
    ] = "repeat",
    leave_out: Annotated[
        bool,
        typer.Option("--leave-out", help="Go on without streams that the result cannot hold.", rich_help_panel=CLIPS),
    ] = False,
) -> None:
    """Restore and enlarge pictures, or a clip.

    Options depend on the model: --w, --start and guidance are for StableSR, not for one-step models (PiSA-SR, OSEDiff,
    HYPIR, InvSR); --lambda-pix and --lambda-sem are for PiSA-SR.

    With `accelerate launch -m stablesr_kit.cli restore ...`, processes share the pictures, or the tiles of a single
    one.

    Exit status: 0 all restored; 1 some failed (one line each; the others are written); 2 wrong usage.
    """
    with failing_in_one_line():
        asked = with_preset(context)
    if preset is not None:
        options = [shown(name, asked[name]) for name in PRESETS[preset] if asked[name] is not None]
        typer.echo(f"note: preset {preset}: {' '.join(options)}", err=True)
    check_options(asked)
    if workers is not None and (workers < 1 or engine != "ray"):
        usage_error(f"--workers {workers} must be at least 1, with --engine ray; leave it out otherwise")
    if is_clip(inputs, output, asked):
        restore_one_clip(inputs[0], output, asked)
        return
    report = Report("restored", as_json)
    journal = None
    jobs = plan(inputs, output, "_compare" if compare else None, report)
    team = team_of_all() if len(jobs) == 1 else None
    if team is None:
        jobs = share_of(jobs)
    elif not team.is_lead:
        with failing_in_one_line():
            assist(team, model, choose_device(device), compiled)
        finish(report)
        return
    try:
        if jobs:
            with failing_in_one_line():
                make_folder(jobs[0].folder)
                restoring = restoring_of(jobs[0].folder, asked)
                if not coarse and is_first():
                    tell_working_scale(find_model(model), scale)
                if team is not None:
                    team.tell(restoring.dtype)
                journal = Journal(restoring.folder, restoring.settings)
                journal.remove_stale_locks()
                jobs = unfinished(jobs, journal, report) if resume else jobs
                if len(jobs) == 1:  # what it cannot have shows before a model is loaded
                    jobs = possible(jobs[0], huge, scale, report)
        if jobs:
            if engine == "ray":
                run_on_ray(jobs, restoring, report, workers)
            else:
                with failing_in_one_line():
                    restorer = Restorer(restoring, team, is_below_another_bar=len(jobs) > 1)
                check_components(restorer.pipeline, restoring.options)
                run(jobs, restorer, report)
    except KeyboardInterrupt:
        typer.echo(f"interrupted: {report.summary()}; nothing is half-written, --resume continues", err=True)
        raise typer.Exit(130) from None
    if team is not None:
        team.tell(None)
    finish(report)
    if journal is not None and is_first():
        journal.close()


def restore_one_clip(source: Path, output: Path, asked: Mapping[str, Any]) -> None:
    """The command for a clip; the tiles of its frames are shared by all processes."""
    team = team_of_all()
    if team is not None and not team.is_lead:
        with failing_in_one_line():
            assist(team, asked["model"], choose_device(asked["device"]), asked["compiled"])
        return

    def load(restoring: Restoring) -> Restorer:
        if team is not None:
            team.tell(restoring.dtype)
        restorer = Restorer(restoring, team)
        check_components(restorer.pipeline, restoring.options)
        return restorer

    report, began = Report("restored", asked["as_json"]), time.monotonic()
    try:
        told = run_clip(source, output, asked, restoring_of, load, Watch())
        job = Job(source=source, target=output, companion=None, folder=output.parent)
        if told is None:
            report.skip(job)
        else:
            report.finish(job, told, time.monotonic() - began)
    except ModelNotFoundError as error:
        usage_error(str(error))
    except StableSRKitError as error:
        report.fail(error, source)
    except KeyboardInterrupt:
        typer.echo("interrupted: nothing is half-written, --resume continues", err=True)
        raise typer.Exit(130) from None
    finally:
        if team is not None:
            team.tell(None)
    finish(report, is_shared=False)


def with_preset(context: typer.Context) -> dict[str, Any]:
    """The options of `restore` by name: those given, then those of the preset as far as the model takes them.

    Raises ModelNotFoundError.
    """
    asked = dict(context.params)
    if asked["preset"] is None:
        return asked

    from stablesr_kit.pipelines.loading import pipeline_config

    is_one_step = pipeline_config(find_model(asked["model"])).get("_class_name") == "OneStepPipeline"
    for name, value in PRESETS[asked["preset"]].items():
        source = context.get_parameter_source(name)
        if (source is None or source.name == "DEFAULT") and not (is_one_step and name in OF_STABLESR):
            asked[name] = value
    return asked


def shown(name: str, value: Any) -> str:
    """An option as one would give it."""
    return (
        f"--{name.replace('_', '-')} {value:g}" if isinstance(value, float) else f"--{name.replace('_', '-')} {value}"
    )


def check_options(asked: Mapping[str, Any]) -> None:
    """Refuse options that no model can use, before one is loaded. asked: options of `restore`, by name."""
    parse_tile(asked["tile"], asked["tile_overlap"])
    parse_max_memory(asked["max_memory"])
    check_numbers(asked["scale"], asked["w"], asked["steps"], asked["guidance_scale"], asked["seed"])
    check_face_w(asked["face_w"], "--face-w")
    if asked["start"] is not None:
        parse_start(asked["start"])


def restoring_of(folder: Path, asked: Mapping[str, Any], digest: Callable[[Path], str] = sha256) -> Restoring:
    """How to restore the pictures whose results go into the folder; ends the command if the options cannot work.

    asked: options of `restore`, by name. digest: of a model's file or folder.

    Raises:
        ModelNotFoundError: there is no such model.
    """
    model = find_model(asked["model"])
    given = {name: asked[name] for name in ("prompt", "negative_prompt", "w", "scale", "guidance_scale", "color_fix")}
    given["num_inference_steps"] = asked["steps"]
    given["start"] = None if asked["start"] is None else parse_start(asked["start"])
    given |= {name: asked[name] for name in ("lambda_pix", "lambda_sem")}
    options = options_for(model, given)
    tiles = {
        "tile_px": parse_tile(asked["tile"], asked["tile_overlap"]),
        "overlap_px": asked["tile_overlap"],
        "vae_mode": asked["mode"],
        "vae_attention": asked["attention"],
    }
    allowed = parse_max_memory(asked["max_memory"])
    device = choose_device(asked["device"])
    dtype = choose_dtype(asked["dtype"], device)
    if asked["dtype"] == "auto":
        dtype = dtype_that_fits(dtype, model, device, allowed)
    settings = {
        "version": __version__,
        "model_sha256": digest(model),
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "seed": asked["seed"],
        "coarse": asked["coarse"],
        **options,
        **tiles,
    }
    if asked["compiled"]:  # which rounds otherwise
        settings["compile"] = True
    face_model = None
    if asked["face"] == "codeformer":
        face_model = choose_face_model(asked["codeformer"], beside=asked["model"])
        settings |= {
            "face": asked["face"],
            "face_w": asked["face_w"],
            "codeformer": digest(find_face_model(face_model)),
        }
    return Restoring(
        folder=folder,
        settings=settings,
        model=asked["model"],
        device=device,
        dtype=dtype,
        seed=asked["seed"],
        options=options,
        tiling=tiling_of(tiles, allowed, asked["coarse"]),
        face_model=face_model,
        face_w=asked["face_w"],
        is_huge_allowed=asked["huge"],
        is_compiled=asked["compiled"],
        resume=asked["resume"],
        has_provenance=asked["provenance"],
    )


OF_STABLESR = {"negative_prompt": None, "w": 0.5, "guidance_scale": 1.0, "start": "lq"}
OF_ONE_STEP = {"lambda_pix": 1.0, "lambda_sem": 1.0}
"""Options of the calls of one kind of model alone, with their defaults."""


def options_for(folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Options of a pipeline's call; ends the command if one of them is not for this kind of model.

    folder: of the model. given: all options, None for one that is not given.
    """
    from stablesr_kit.pipelines.loading import pipeline_config

    is_one_step = pipeline_config(folder).get("_class_name") == "OneStepPipeline"
    taken, foreign = (OF_ONE_STEP, OF_STABLESR) if is_one_step else (OF_STABLESR, OF_ONE_STEP)
    for name in foreign:
        if given[name] is not None:
            kind, needed = ("a one-step restorer", "StableSR") if is_one_step else ("StableSR", "PiSA-SR")
            usage_error(f"--{name.replace('_', '-')} belongs to {needed}, and {folder.name} is {kind}; leave it out")
    options = {name: value for name, value in given.items() if name not in foreign}
    options |= {name: default for name, default in taken.items() if given[name] is None}
    if options["color_fix"] is None and not is_one_step:
        options["color_fix"] = "wavelet"
    return options


def assist(team: "Team", model: str, device: "torch.device", is_compiled: bool) -> None:
    """Predict tiles for the first process, in the precision that it sends; nothing if it sends none."""
    dtype = team.listen()
    if dtype is None:
        return
    pipeline = load_pipeline(model, device, dtype)
    if is_compiled:
        pipeline.compile_prediction()
    try:
        pipeline.assist(team)
    except (ValueError, ArithmeticError, RuntimeError, MemoryError) as error:  # the first process counts the failure
        typer.echo(f"error: predicting tiles: {one_line(error)}", err=True)


def parse_start(start: str) -> Literal["lq", "noise"] | int:
    """The `start` of a pipeline call."""
    if start == "lq":
        return "lq"
    if start == "noise":
        return "noise"
    if not start.isdecimal():
        usage_error(f"--start {start!r} is not known; give lq, noise or a timestep such as 600")
    return int(start)


def parse_tile(tile: str, overlap: int | None) -> Literal["auto", "none"] | int:
    """The `tile_px` of a pipeline call; the pipeline checks whether it suits the networks."""
    if tile == "auto":
        return "auto"
    if tile == "none":
        return "none"
    if not tile.isdecimal():
        usage_error(f"--tile {tile!r} is not known; give auto, none or a number of pixels such as 512")
    if overlap is not None and not 0 <= overlap < int(tile):
        usage_error(f"--tile-overlap {overlap} must be from 0 to less than --tile {tile}; a quarter of it is usual")
    return int(tile)


def check_numbers(scale: float, w: float | None, steps: int | None, guidance_scale: float | None, seed: int) -> None:
    """Refuse numbers that no model can use, before one is loaded."""
    if not (math.isfinite(scale) and scale > 0):
        usage_error(f"--scale {scale} must be a positive number; 4 is usual")
    if w is not None and not (math.isfinite(w) and w >= 0):
        usage_error(f"--w {w} must be a number from 0 (realism) to 1 (fidelity); above 1 extrapolates")
    if steps is not None and steps < 1:
        usage_error(f"--steps {steps} must be at least 1; leave it out for the model's own number")
    if guidance_scale is not None and not math.isfinite(guidance_scale):
        usage_error(f"--guidance-scale {guidance_scale} must be a number; 1 is off, 7 is strong")
    if not -(2**63) <= seed < 2**64:
        usage_error(f"--seed {seed} must be of 64 bits, such as 0 to {2**64 - 1}")


def tell_working_scale(folder: Path, scale: float) -> None:
    """A line for what it costs where the model works at a larger scale than is asked for."""
    from stablesr_kit.pipelines.loading import pipeline_config

    works_at = pipeline_config(folder).get("working_scale", 0)
    if scale < works_at:
        times = (works_at / scale) ** 2
        typer.echo(
            f"plan: {folder.name} works at scale {works_at:g}: results are made there and reduced to scale {scale:g}, "
            f"which takes about {times:.3g} times as long as --coarse, which makes them at scale {scale:g}",
            err=True,
        )


def tiling_of(tiles: dict[str, Any], max_memory: int | None, is_coarse: bool) -> "Tiling":
    """The `tiling` of a pipeline call."""
    from stablesr_kit import Tiling

    return Tiling(**tiles, max_memory=max_memory, working_scale=0 if is_coarse else None)


def unfinished(jobs: list[Job], journal: Journal, report: Report) -> list[Job]:
    """The jobs without a result; ends the command if results of other settings are there."""
    try:
        left = [job for job in jobs if not journal.is_finished(job.source, job.results)]
    except JobError as error:
        usage_error(str(error))
    for job in jobs:
        if job not in left:
            report.skip(job)
    return left


def possible(job: Job, is_huge_allowed: bool, scale: float, report: Report) -> list[Job]:
    """The job; None, reported, if its picture cannot be read or its result cannot be written."""
    try:
        open_job(job, is_huge_allowed, scale)
    except StableSRKitError as error:
        report.fail(error, job.source)
        return []
    return [job]


def choose_device(name: str) -> "torch.device":
    """The named device, or with "auto" the best one; ends the command if there is no such device."""
    import torch

    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if counts[kind])
    if name == "cuda" and counts["cuda"] > 1:
        name = f"cuda:{local_index() % counts['cuda']}"
    kind, _, index = name.partition(":")
    if kind not in counts or (":" in name and not index.isdecimal()):
        usage_error(f"--device {name!r} is not known; give auto, cpu, cuda, cuda:N or mps")
    if int(index or 0) >= counts[kind]:
        available = ", ".join(kind for kind, count in counts.items() if count)
        usage_error(f"--device {name} is not available here; there is {available}")
    return torch.device(name)


def choose_dtype(name: DtypeName, device: "torch.device") -> "torch.dtype":
    """The named precision, or with "auto" one that is fast and safe on the device."""
    import torch

    from stablesr_kit.models.execution import has_bf16

    if name != "auto":
        chosen: torch.dtype = getattr(torch, name)
        return chosen

    if has_bf16(device):
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else torch.float32


def check_components(pipeline: "StableSRPipeline | OneStepPipeline", options: dict[str, Any]) -> None:
    """Refuse options for which the model lacks a component, once instead of for every picture."""
    if (w := options.get("w", 0)) > 0 and pipeline.cfw is None:
        usage_error(f"--w {w} needs feature wrapping (CFW), which this model lacks; give --w 0 or convert with --cfw")
    if (options["prompt"] or options.get("negative_prompt")) and pipeline.text_encoder is None:
        usage_error("a prompt needs a text encoder, which this model lacks; leave the prompts out")
    if options.get("lambda_pix") != options.get("lambda_sem") and pipeline.unet_pix is None:
        usage_error(
            "--lambda-pix and --lambda-sem are the strengths of PiSA-SR, which this model is not; leave them out"
        )


def parse_max_memory(text: str | None) -> int | None:
    """Bytes, or None for what is free. Ends the command if the text is no size."""
    if text is None:
        return None

    from stablesr_kit.tiling.memory import Tiling

    try:
        return Tiling(max_memory=text).allowed_bytes()
    except ConfigError:
        usage_error(f"--max-memory {text!r} is not a size; give one such as 6GB or 500MB")


def dtype_that_fits(dtype: "torch.dtype", model: Path, device: "torch.device", max_memory: int | None) -> "torch.dtype":
    """The dtype, but half precision, with a note, if float32 weights alone would not fit."""
    import torch

    from stablesr_kit.models.execution import has_bf16
    from stablesr_kit.pipelines.loading import parameter_count
    from stablesr_kit.tiling.memory import GIB, RESERVE, free_bytes

    budget = free_bytes(device) if max_memory is None else max_memory
    needed = parameter_count(model) * dtype.itemsize
    if dtype != torch.float32 or needed <= budget * (1 - RESERVE):
        return dtype
    half = torch.bfloat16 if device.type == "cpu" else torch.float16
    name = str(half).removeprefix("torch.")
    slowness = ""
    if device.type == "cpu" and not has_bf16(device):
        slowness = "; this processor computes it through float32, about three times slower"
    tqdm.write(
        f"note: {needed / GIB:.2f} GiB of weights in float32 do not fit into {budget / GIB:.2f} GiB of memory; "
        f"restoring in {name}, as --dtype {name} does{slowness}",
        file=sys.stderr,
    )
    return half
