"""`stablesr convert` and `stablesr inspect`: checkpoints in other layouts."""

import os
import re
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from stablesr_kit.cli.messages import failing_in_one_line, quieten_libraries, usage_error
from stablesr_kit.errors import OutputError

if TYPE_CHECKING:
    from stablesr_kit import StableSRPipeline

TensorsOnly = Annotated[
    bool,
    typer.Option("--tensors-only", help="Read a pickle that names unknown objects; they are left out, none is run."),
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
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CKPT", help="An official StableSR checkpoint, or a web-UI extract of one.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="The folder to make.")],
    cfw: Annotated[
        Path | None, typer.Option(metavar="CKPT", help="The autoencoder with feature wrapping; without it w is 0.")
    ] = None,
    base: Annotated[
        Path | None, typer.Option(metavar="CKPT|DIR", help="For an extract: the Stable Diffusion it belongs to.")
    ] = None,
    prediction_type: Annotated[
        Literal["epsilon", "v_prediction"] | None,
        typer.Option(help="What the UNet predicts.", show_default="found out"),
    ] = None,
    tensors_only: TensorsOnly = False,
    ignore: Annotated[
        list[str] | None, typer.Option(metavar="REGEX", help="Names of tensors that may be left over; repeatable.")
    ] = None,
) -> None:
    """Turn an official checkpoint into a pipeline folder.

    The folder is what `stablesr restore --model DIR` and `StableSRPipeline.from_pretrained` take.
    """
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

        pipeline = StableSRPipeline.from_original(
            checkpoint,
            cfw=cfw,
            base=base,
            prediction_type=prediction_type,
            tensors_only=tensors_only,
            ignore=ignore or (),
        )
        save_whole(pipeline, output)
    typer.echo(f"converted: {output}")


def save_whole(pipeline: "StableSRPipeline", output: Path) -> None:
    """Save beside the target, then rename: the folder appears whole or not at all. Raises OutputError."""
    part = output.with_name(f".{secrets.token_hex(8)}.part")
    try:
        part.mkdir(parents=True)
        pipeline.save_pretrained(part)
        os.replace(part, output)
    except OSError as error:
        raise OutputError(f"{output}: cannot be written ({error.strerror or error}); choose another -o") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
