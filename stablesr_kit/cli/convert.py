"""`stablesr convert` and `stablesr inspect`: checkpoints in other layouts."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Protocol

import typer

from stablesr_kit.cli.face_stage import BESIDE
from stablesr_kit.cli.messages import failing_in_one_line, quieten_libraries, telling, usage_error
from stablesr_kit.storage import replacing_folder

TensorsOnly = Annotated[
    bool,
    typer.Option(
        "--tensors-only", help="Read a pickle that names unknown objects; they are dropped, and nothing is run."
    ),
]


def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A checkpoint, or a pipeline folder.")],
    tensors_only: TensorsOnly = False,
) -> None:
    """Say what a checkpoint is."""
    with failing_in_one_line():
        from stablesr_kit.checkpoints import inspect_checkpoint

        typer.echo(str(inspect_checkpoint(file, tensors_only=tensors_only)))


def convert(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="The folder to make.")],
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            metavar="CKPT",
            help="An official StableSR checkpoint, a web-UI extract of one, or PiSA-SR, OSEDiff, HYPIR-SD2, InvSR.",
        ),
    ] = None,
    cfw: Annotated[
        Path | None,
        typer.Option(metavar="CKPT", help="The checkpoint with feature wrapping (CFW); without it, only w = 0 works."),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            metavar="CKPT|DIR",
            help="The Stable Diffusion that CKPT belongs to; a whole StableSR checkpoint needs none.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="JSON", help="For an InvSR of another size: the arguments of its noise predictor."),
    ] = None,
    codeformer: Annotated[
        Path | None,
        typer.Option(
            metavar="PTH", help="A CodeFormer, alone or for the faces of CKPT; or its VQGAN or discriminator."
        ),
    ] = None,
    prediction_type: Annotated[
        Literal["epsilon", "v_prediction"] | None,
        typer.Option(help="What the UNet predicts.", show_default="detected"),
    ] = None,
    tensors_only: TensorsOnly = False,
    ignore: Annotated[
        list[str] | None, typer.Option(metavar="REGEX", help="Tensor names that may be left over; repeatable.")
    ] = None,
) -> None:
    """Turn official checkpoints into a pipeline folder.

    Use the folder with `stablesr restore --model DIR` or `StableSRPipeline.from_pretrained`. PiSA-SR, OSEDiff, HYPIR
    and InvSR become a folder for `OneStepPipeline`, with their licence in it. A CodeFormer alone becomes a folder for
    `stablesr faces --model DIR` and `CodeFormerPipeline.from_pretrained`; together with CKPT it becomes DIR/faces,
    which `stablesr restore --face codeformer` uses. A VQGAN or discriminator becomes the folder of a network.
    """
    if checkpoint is None and codeformer is None:
        usage_error("nothing is given to convert; give an official StableSR checkpoint, or --codeformer PTH, or both")
    of_stablesr = {"--cfw": cfw, "--prediction-type": prediction_type}
    for option, value in {**of_stablesr, "--base": base, "--config": config}.items():
        if checkpoint is None and value is not None:
            usage_error(
                f"{option} belongs to a diffusion checkpoint, and none is given; give it, or leave {option} out"
            )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        usage_error(f"-o {output} exists; choose a new or an empty folder")
    for pattern in ignore or ():
        try:
            re.compile(pattern)
        except re.error as error:
            usage_error(f"--ignore {pattern!r} is no regular expression ({error}); escape dots and brackets with \\")
    with failing_in_one_line():
        quieten_libraries()

        from stablesr_kit import StableSRPipeline
        from stablesr_kit.checkpoints import inspect_checkpoint
        from stablesr_kit.checkpoints.one_step import SYSTEMS

        kind = None if checkpoint is None else inspect_checkpoint(checkpoint, tensors_only=tensors_only).kind
    system = None if kind is None else SYSTEMS.get(kind)
    models: dict[str, Savable] = {}
    with failing_in_one_line(), telling("stablesr_kit.checkpoints"):
        if checkpoint is not None and system is not None:
            for option, value in of_stablesr.items():
                if value is not None:
                    usage_error(f"{option} belongs to StableSR, and {checkpoint.name} is {kind}; leave it out")
            if base is None:
                usage_error(f"{checkpoint.name} is {kind}; give its base, {system.base}, as --base")
            models["."] = convert_one_step_file(checkpoint, base, config, tensors_only, ignore or ())
        elif checkpoint is not None:
            if config is not None:
                usage_error(f"--config belongs to InvSR, and {checkpoint.name} is not; leave it out")
            models["."] = StableSRPipeline.from_original(
                checkpoint,
                cfw=cfw,
                base=base,
                prediction_type=prediction_type,
                tensors_only=tensors_only,
                ignore=ignore or (),
            )
        if codeformer is not None:
            faces = convert_faces(codeformer, tensors_only, ignore or (), is_alone=checkpoint is None)
            models["." if checkpoint is None else BESIDE] = faces
        with replacing_folder(output) as folder:
            for place, model in models.items():
                model.save_pretrained(folder / place)
    if system is not None:
        typer.echo(f"licence: {system.licence}")
    typer.echo(f"converted: {output}")


class Savable(Protocol):
    """A pipeline or a network of diffusers."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], /) -> object:
        """Write its files into a folder."""


def convert_one_step_file(
    path: Path, base: Path, config: Path | None, tensors_only: bool, ignore: Sequence[str]
) -> Savable:
    """A pipeline of one or a few steps. Raises CheckpointError."""
    from stablesr_kit import OneStepPipeline
    from stablesr_kit.checkpoints.one_step import noise_predictor_hints

    hints = None if config is None else noise_predictor_hints(config)
    return OneStepPipeline.from_original(path, base=base, hints=hints, tensors_only=tensors_only, ignore=ignore)


def convert_faces(path: Path, tensors_only: bool, ignore: Sequence[str], is_alone: bool) -> Savable:
    """A CodeFormer as a pipeline, or another network of its family as a network. Raises CheckpointError."""
    from stablesr_kit.checkpoints.codeformer import convert_face_checkpoint
    from stablesr_kit.models.codeformer import CodeFormer
    from stablesr_kit.pipelines.codeformer import CodeFormerPipeline

    if not is_alone:
        return CodeFormerPipeline.from_original(path, tensors_only=tensors_only, ignore=ignore)
    network = convert_face_checkpoint(path, tensors_only=tensors_only, ignore=ignore)
    return CodeFormerPipeline.from_network(network) if isinstance(network, CodeFormer) else network
