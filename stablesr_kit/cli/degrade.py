"""`stablesr degrade`: make the LQ pictures that a restorer is trained and tested on, from HQ ones."""

import os
import zlib
from pathlib import Path
from typing import Annotated

import typer

from stablesr_kit.cli.jobs import Job, Report, finish, make_folder, plan, read_job, run
from stablesr_kit.cli.messages import failing_in_one_line, usage_error
from stablesr_kit.cli.processes import share_of
from stablesr_kit.errors import ConfigError, ImageError
from stablesr_kit.imaging.writing import output_dtype, write_bands


def _print_presets(is_asked: bool) -> None:
    if is_asked:
        from stablesr_kit.imaging.degradations import DESCRIPTIONS

        width = max(map(len, DESCRIPTIONS))
        for name, description in DESCRIPTIONS.items():
            typer.echo(f"{name:<{width}}  {description}")
        raise typer.Exit


def degrade(
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT", help="Pictures, and folders of pictures.")],
    output: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="OUT", help="A file for one picture, else a folder (of PNG files)."),
    ],
    preset: Annotated[str, typer.Option(metavar="NAME", help="How to degrade; see --list.")] = "stablesr-512",
    seed: Annotated[int, typer.Option(min=0, help="The same seed and file name give the same result.")] = 0,
    scale: Annotated[
        int, typer.Option(min=1, help="How many times smaller the result is; 1 keeps the size, as in training.")
    ] = 1,
    save_hq: Annotated[
        bool, typer.Option("--save-hq", help="Also write the HQ picture, which a restorer should return, as NAME_hq.")
    ] = False,
    _list: Annotated[
        bool, typer.Option("--list", callback=_print_presets, is_eager=True, help="Show the presets and exit.")
    ] = False,
) -> None:
    """Degrade pictures as training does.

    Pictures are cropped at the right and bottom to multiples of the scale. They are spread over the processes of
    `accelerate launch -m stablesr_kit.cli degrade ...`. Exit status: 0 all degraded; 1 some failed (one line
    each; the others are written); 2 wrong usage.
    """
    from stablesr_kit.imaging.degradations import find_preset

    try:
        find_preset(preset)
    except ConfigError as error:
        usage_error(f"--preset: {error}")
    report = Report("degraded")
    jobs = plan(inputs, output, "_hq" if save_hq else None, report)
    try:
        if jobs:
            with failing_in_one_line():
                make_folder(jobs[0].folder)
            run(share_of(jobs), lambda job: degrade_file(job, preset, seed, scale), report)
    except KeyboardInterrupt:
        typer.echo(f"interrupted: {report.summary()}; nothing is half-written", err=True)
        raise typer.Exit(130) from None
    finish(report)


def degrade_file(job: Job, preset: str, seed: int, scale: int) -> None:
    """Read, degrade, write. Raises StableSRKitError, whose message begins with the file.

    What is drawn depends on the seed and the file's name, so the pictures of a folder are not all degraded alike and
    none depends on the others.
    """
    import numpy as np
    import torch

    from stablesr_kit.imaging.canvas import View
    from stablesr_kit.imaging.degradations import find_preset, make_pair
    from stablesr_kit.imaging.degradations.filtering import resize
    from stablesr_kit.pipelines.pictures import pixel_bands, to_image

    picture = read_job(job)
    height, width = picture.height // scale, picture.width // scale
    if min(height, width) < 1:
        raise ImageError(f"{job.source}: {picture.height}x{picture.width} px is too small for --scale {scale}")
    pixels = picture.pixels[: height * scale, : width * scale]
    # a generator of torch takes 32 bits of its seed
    mixed = np.random.SeedSequence((seed, zlib.crc32(os.fsencode(job.source.name)))).generate_state(1)[0]
    try:
        lq, hq = make_pair(to_image(pixels[..., :3]), find_preset(preset), torch.Generator().manual_seed(int(mixed)))
    except ImageError as error:
        raise ImageError(f"{job.source}: {error}") from error
    if scale > 1:
        lq = resize(lq, (height, width), "bicubic", antialias=True)
    whole = picture.holding(pixels)
    dtype = output_dtype(job.target, picture)
    for path, image in ((job.target, lq), (job.companion, hq)):
        if path is not None:
            write_bands(path, pixel_bands(View(image), dtype), image.shape[2], image.shape[3], whole)
