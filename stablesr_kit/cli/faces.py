"""`stablesr faces`: restore the faces of whole photographs; restore, fill in or colour pictures of one aligned face."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import psutil
import typer
from PIL import Image

from stablesr_kit.cli.face_stage import check_face_w, choose_face_model, load_face_model, told_of_aligned, told_of_faces
from stablesr_kit.cli.jobs import Job, Report, Told, check_result, finish, make_folder, naming, plan, read_job, run
from stablesr_kit.cli.messages import failing_in_one_line, usage_error
from stablesr_kit.cli.restore import choose_device, choose_dtype
from stablesr_kit.cli.restorer import load_pipeline
from stablesr_kit.imaging.reading import as_picture, read_picture
from stablesr_kit.imaging.writing import check_output, output_dtype, write_bands, write_picture
from stablesr_kit.version import __version__

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from stablesr_kit.faces.face import Box, Face, FaceDetector, Points
    from stablesr_kit.pipelines.codeformer import CodeFormerPipeline, FaceTask
    from stablesr_kit.pipelines.face_parts import Background
    from stablesr_kit.pipelines.face_refinement import FaceRefinement, FaceReport, RestoredFace

Mode = Literal["aligned", "whole", "inpaint", "colorize"]
_TASKS: dict[Mode, "FaceTask"] = {"aligned": "restore", "inpaint": "inpaint", "colorize": "colorize"}
_WHOLE_ONLY = (
    "detector",
    "detector_weights",
    "only_center",
    "only_largest",
    "min_eye_distance",
    "max_identity_distance",
    "max_enlargement",
    "upscale",
    "background",
    "face_upsampler",
    "parser",
    "draw_box",
    "given",
    "save_crops",
)

# Of the result, at the peak: three floats as an image, as rows of pixels and as levels.
_BYTES_PER_PIXEL = 48


def faces(
    context: typer.Context,
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT", help="Pictures, and folders of pictures.")],
    output: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="OUT", help="A file for one picture, else a folder (of PNG files)."),
    ],
    mode: Annotated[
        Mode,
        typer.Option(help="whole: photographs; aligned, inpaint, colorize: pictures of one aligned face."),
    ] = "whole",
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|DIR|PTH",
            help="A pipeline folder, a hub repository, or an original checkpoint.",
            show_default="mini, in the package",
        ),
    ] = None,
    w: Annotated[
        float | None, typer.Option("--w", help="0 quality to 1 fidelity.", show_default="0.5; inpaint 1; colorize 0")
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(help="For inpaint: a picture, white where to fill in.", show_default="the pure white pixels"),
    ] = None,
    detector: Annotated[Literal["mtcnn", "retinaface", "yunet"], typer.Option(help="Detector of the faces.")] = "mtcnn",
    detector_weights: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The detector's weights; mtcnn needs none.")
    ] = None,
    only_center: Annotated[bool, typer.Option("--only-center", help="Only the face nearest the centre.")] = False,
    only_largest: Annotated[bool, typer.Option("--only-largest", help="Only the largest face.")] = False,
    min_eye_distance: Annotated[
        float, typer.Option(metavar="PX", help="Leave out faces whose eyes are closer, in pixels of the photo.")
    ] = 5.0,
    max_identity_distance: Annotated[
        float, typer.Option(help="Hold back a restored face whose distance from the input is larger; inf: never.")
    ] = 0.3,
    max_enlargement: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Leave alone faces that would be more than X times the model's own size in the result.",
            show_default="the model's: 1.5 for mini, none for others",
        ),
    ] = None,
    upscale: Annotated[float, typer.Option(help="How many times larger the photo becomes.")] = 2,
    background: Annotated[
        str,
        typer.Option(
            metavar="stablesr|none|DIR|FILE",
            help="Enlarges the photo: mini, plain resizing, a StableSR folder, or a network that spandrel loads.",
        ),
    ] = "stablesr",
    face_upsampler: Annotated[
        str | None,
        typer.Option(
            metavar="stablesr|DIR|FILE",
            help="Enlarges restored faces that the result needs larger: as of --background.",
            show_default="plain resizing",
        ),
    ] = None,
    parser: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="parsing_parsenet.pth: keeps clothes and background out of the mask."),
    ] = None,
    draw_box: Annotated[bool, typer.Option("--draw-box", help="Outline the restored squares.")] = False,
    given: Annotated[
        Path | None, typer.Option(metavar="JSON", help="Boxes or landmarks of the faces, by the photo's name.")
    ] = None,
    save_crops: Annotated[
        bool, typer.Option("--save-crops", help="Also write each aligned face, before and after, into OUT_faces.")
    ] = False,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda|cuda:N|mps", help="Where to compute.")] = "auto",
    provenance: Annotated[
        bool, typer.Option("--provenance/--no-provenance", help="Write into each result how it was made.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each file.")] = False,
) -> None:
    """Restore faces.

    Exit status: 0 all done; 1 some failed (one line each; the others are written); 2 wrong usage.
    """
    for name in _WHOLE_ONLY if mode != "whole" else ():
        source = context.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            usage_error(f"--{name.replace('_', '-')} is for --mode whole, not {mode}; leave it out")
    asked = context.params
    check_options(asked)
    report = Report("done", as_json)
    jobs = plan(inputs, output, None, report)
    if jobs:
        with failing_in_one_line():
            make_folder(jobs[0].folder)
            work = work_of(jobs, asked)
        try:
            run(jobs, work, report)
        except KeyboardInterrupt:
            typer.echo(f"interrupted: {report.summary()}; nothing is half-written", err=True)
            raise typer.Exit(130) from None
    finish(report)


def check_options(asked: Mapping[str, Any]) -> None:
    """Refuse options that cannot work, before a model is loaded. asked: those of `faces`, by name."""
    mode, upscale, max_enlargement = asked["mode"], asked["upscale"], asked["max_enlargement"]
    min_eye_distance, max_identity_distance = asked["min_eye_distance"], asked["max_identity_distance"]
    if asked["mask"] is not None and mode != "inpaint":
        usage_error(f"--mask is for --mode inpaint, not {mode}; leave it out")
    if asked["only_center"] and asked["only_largest"]:
        usage_error("--only-center and --only-largest exclude each other; give one")
    if not (math.isfinite(upscale) and upscale > 0):
        usage_error(f"--upscale {upscale} must be a positive number; 2 is usual")
    if not min_eye_distance >= 0:
        usage_error(f"--min-eye-distance {min_eye_distance} must be at least 0 pixels; 5 is usual")
    if max_enlargement is not None and not max_enlargement > 0:
        usage_error(f"--max-enlargement {max_enlargement} must be a positive number")
    if not max_identity_distance >= 0:
        usage_error(f"--max-identity-distance {max_identity_distance} must be at least 0; 0.3 is usual")
    if asked["face_upsampler"] == "none":
        usage_error("--face-upsampler none: leave the option out; faces are resized then")
    check_face_w(asked["w"], "--w")
    if mode in ("inpaint", "colorize") and asked["model"] is None:
        usage_error(f"--mode {mode} needs --model, a CodeFormer trained for it; the one in the package only restores")


def work_of(
    jobs: list[Job],
    asked: Mapping[str, Any],
    load_network: "Callable[[str, torch.device], CodeFormerPipeline]" = load_face_model,
    load_enlarging: "Callable[[str, torch.device], Background] | None" = None,
    on_face: Callable[[], Any] | None = None,
) -> Callable[[Job], Told]:
    """What is done with each picture, with its models loaded; ends the command where that means nothing.

    asked: options of `faces`, by name. load_network, load_enlarging: give the face network and what enlarges photos and
    faces. on_face: called after each face of a photo.

    Raises ModelNotFoundError, CheckpointError or ConfigError.
    """
    from stablesr_kit.pipelines.face_parts import load_detector, load_parser
    from stablesr_kit.pipelines.face_refinement import FaceRefinement

    mode, w, device = asked["mode"], asked["w"], choose_device(asked["device"])
    model = choose_face_model(asked["model"])
    made: dict[str, Any] = {"software": "stablesr-kit", "version": __version__, "command": "faces", "mode": mode}
    made |= {"model": Path(model).name, "w": w}
    if mode != "whole":
        hole = read_picture(Path(asked["mask"])).rgb.convert("L") if asked["mask"] else None
        provenance = made if asked["provenance"] else None
        network = load_network(model, device)
        return partial(restore_aligned, pipeline=network, mode=mode, w=w, hole=hole, provenance=provenance)
    w = 0.5 if w is None else w
    made |= {"w": w, "upscale": asked["upscale"], "background": asked["background"]}
    by_hand = read_given(Path(asked["given"]) if asked["given"] else None, jobs)
    weights = Path(asked["detector_weights"]) if asked["detector_weights"] else None
    load_enlarging = load_enlarging or load_background
    enlarge = load_enlarging(asked["background"], device)
    upsampler: Any = None
    if asked["face_upsampler"] is not None:
        made |= {"face_upsampler": asked["face_upsampler"]}
        is_same = asked["face_upsampler"] == asked["background"]
        upsampler = enlarge if is_same else load_enlarging(asked["face_upsampler"], device)
    stage = FaceRefinement(
        load_network(model, device),
        w,
        detector=load_detector(asked["detector"], weights, device),
        parser=load_parser(Path(asked["parser"]), device) if asked["parser"] else None,
        only="center" if asked["only_center"] else "largest" if asked["only_largest"] else None,
        min_eye_distance=asked["min_eye_distance"],
        max_identity_distance=asked["max_identity_distance"],
        max_enlargement=asked["max_enlargement"],
        upsampler=upsampler,
        draw_boxes=asked["draw_box"],
    )
    return partial(
        restore_photo,
        stage=stage,
        enlarge=enlarge,
        upscale=asked["upscale"],
        by_hand=by_hand,
        save_crops=asked["save_crops"],
        on_face=on_face,
        provenance=made if asked["provenance"] else None,
    )


def restore_photo(
    job: Job,
    stage: "FaceRefinement",
    enlarge: "Background",
    upscale: float,
    by_hand: "dict[str, list[Box | Points]]",
    save_crops: bool,
    on_face: Callable[[], Any] | None = None,
    provenance: "Mapping[str, Any] | None" = None,
) -> Told:
    """Enlarge a photo, restore its faces, write it. Raises StableSRKitError."""
    import numpy as np
    import torch

    from stablesr_kit.imaging.canvas import View
    from stablesr_kit.imaging.color_fix import neutral_like
    from stablesr_kit.pipelines.pictures import pixel_bands, result_size, to_image

    picture = read_job(job)
    result_pixels = picture.width * picture.height * upscale * upscale
    check_result(job, result_pixels, psutil.virtual_memory().total / _BYTES_PER_PIXEL, "give a smaller --upscale")
    check_output(job.target, picture, result_size(picture.height, picture.width, upscale))
    crops = job.target.with_name(f"{job.target.stem}_faces")
    with naming(job, less="give a smaller --upscale or --background none"):
        lq = to_image(picture.pixels[..., :3])
        height, width = result_size(picture.height, picture.width, upscale)
        given = place_by_hand(np.asarray(picture.rgb), stage.detector, by_hand.get(job.source.name))
        canvas = enlarge(lq, height, width)[0].permute(1, 2, 0).contiguous().numpy()
        reports: list[FaceReport] = []
        for face_report, face in stage.refine(canvas, lq[0], given):
            reports.append(face_report)
            if save_crops:
                write_crops(crops, len(reports), face)
            if on_face is not None:
                on_face()
        restored = neutral_like(View(torch.from_numpy(canvas).permute(2, 0, 1)[None]), View(lq))
        bands = pixel_bands(restored, output_dtype(job.target, picture))
        write_bands(job.target, bands, height, width, picture, provenance=provenance)
    return told_of_faces(job.source, stage, reports, is_given=given is not None)


def restore_aligned(
    job: Job,
    pipeline: "CodeFormerPipeline",
    mode: Mode,
    w: float | None,
    hole: Image.Image | None,
    provenance: "Mapping[str, Any] | None",
) -> Told:
    """Restore, fill in or colour a picture of one aligned face and write it. Raises StableSRKitError."""
    picture = read_job(job)
    with naming(job, less="give smaller pictures"):
        restored = pipeline([picture.rgb], w=w, task=_TASKS[mode], mask=hole, return_dict=False)[0][0]
    if mode == "colorize":  # a grey file's result has colours, in no grey profile
        profile = None if picture.is_grey else picture.metadata.icc_profile
        picture = replace(picture, is_grey=False, metadata=replace(picture.metadata, icc_profile=profile))
    write_picture(job.target, restored, picture, provenance=provenance)
    return told_of_aligned(job.source, _TASKS[mode], w, picture.rgb, restored, hole)


def read_given(path: Path | None, jobs: list[Job]) -> "dict[str, list[Box | Points]]":
    """Faces by the name of their photo; ends the command if one of the photos is no input."""
    if path is None:
        return {}

    from stablesr_kit.faces.detectors import read_given_faces

    given = read_given_faces(path)
    unknown = sorted(set(given) - {job.source.name for job in jobs})
    if unknown:
        usage_error(f"{path}: {', '.join(unknown)}: no input of that name; give names as of the files, without folders")
    return given


def place_by_hand(
    pixels: "NDArray[np.uint8]", detector: "FaceDetector", by_hand: "list[Box | Points] | None"
) -> "list[Face] | None":
    """The faces that were given for a photo's pixels (H, W, 3); None if the detector is to find them."""
    if by_hand is None:
        return None

    from stablesr_kit.faces.detectors import MTCNNDetector, place_given_faces

    placing = detector if isinstance(detector, MTCNNDetector) else MTCNNDetector()
    return place_given_faces(pixels, by_hand, placing)


def load_background(name: str, device: "torch.device") -> "Background":
    """What enlarges photos, or restored faces. Raises ConfigError, CheckpointError or ModelNotFoundError."""
    from stablesr_kit.imaging.resizing import resize_bicubic
    from stablesr_kit.pipelines.face_parts import SpandrelUpsampler, StableSRBackground

    if name == "none":
        return resize_bicubic
    if Path(name).is_file():
        return SpandrelUpsampler(Path(name), device)
    if name != "stablesr" and not Path(name).is_dir():
        usage_error(
            f"--background or --face-upsampler {name}: no such file or folder; give stablesr, a StableSR folder or a "
            "network; or --background none"
        )
    model = "mini" if name == "stablesr" else name
    pipeline = load_pipeline(model, device, choose_dtype("auto", device))
    pipeline.set_progress_bar_config(disable=True)
    return StableSRBackground(pipeline)


def write_crops(folder: Path, number: int, face: "RestoredFace") -> None:
    """One aligned face before and after. Raises OutputError."""
    from numpy import uint8

    make_folder(folder)
    for name, levels in (("lq", face.aligned), ("restored", face.restored)):
        crop = Image.fromarray(levels.round().clip(0, 255).astype(uint8))
        write_picture(folder / f"{number:03d}_{name}.png", crop, as_picture(crop))
