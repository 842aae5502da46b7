"""Restore and enlarge one photograph, and show what w does: the same picture at several fidelities, side by side.

python pipelines/upscale_photo.py photo.jpg -o sweep.png [--model mini] [--scale 4] [--w 0 --w 0.5 --w 1] [--seed 0]
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image

from stablesr_kit import StableSRPipeline
from stablesr_kit.imaging.reading import as_picture, read_picture
from stablesr_kit.imaging.writing import write_picture


def main(
    photo: Annotated[Path, typer.Argument(help="The photograph.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The picture to write.")],
    model: Annotated[str, typer.Option(help="mini, a pipeline folder, or a hub repository.")] = "mini",
    scale: Annotated[float, typer.Option(help="How many times larger the results are.")] = 4,
    w: Annotated[list[float] | None, typer.Option(help="Fidelities, from 0 (realism) to 1.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same result.")] = 0,
) -> None:
    """Write bicubic enlargement and restorations from left to right."""
    picture = read_picture(photo)
    pipeline = StableSRPipeline.from_pretrained(model)
    restored = [
        pipeline(picture.rgb, w=fidelity, scale=scale, generator=torch.Generator().manual_seed(seed)).images[0]
        for fidelity in w or [0.0, 0.5, 1.0]
    ]
    width, height = restored[0].size
    columns = [picture.rgb.resize((width, height), Image.Resampling.BICUBIC), *restored]
    sheet = Image.new("RGB", (width * len(columns), height))
    for i, column in enumerate(columns):
        sheet.paste(column, (i * width, 0))
    write_picture(output, sheet, as_picture(picture.rgb))
    typer.echo(f"written: {output}")


if __name__ == "__main__":
    typer.run(main)
