"""Enlarge a generated picture to 4096 x 6144, or to the size that fits it, in tiles and bounded memory.

python pipelines/upscale_4k.py picture.png -o large.png [--model mini] [--long-side 6144] [--w 0.5] [--seed 0]
"""

from pathlib import Path
from typing import Annotated

import torch
import typer

from stablesr_kit import StableSRPipeline
from stablesr_kit.imaging.reading import read_picture
from stablesr_kit.imaging.writing import write_picture


def main(
    source: Annotated[Path, typer.Argument(help="The picture.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The file to write.")],
    model: Annotated[str, typer.Option(help="mini, a pipeline folder, or a hub repository.")] = "mini",
    long_side: Annotated[int, typer.Option(help="Longer side of the result in pixels.")] = 6144,
    w: Annotated[float, typer.Option(help="0 realism to 1 fidelity.")] = 0.5,
    seed: Annotated[int, typer.Option(help="The same seed gives the same result.")] = 0,
) -> None:
    """Write the enlarged picture; a bar counts the tiles and says how long they will take."""
    picture = read_picture(source)
    scale = long_side / max(picture.rgb.size)
    pipeline = StableSRPipeline.from_pretrained(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(seed)
    restored = pipeline.to(device)(picture.rgb, w=w, scale=scale, generator=generator).images[0]
    write_picture(output, restored, picture)
    typer.echo(f"written: {output}, {restored.width} x {restored.height}")


if __name__ == "__main__":
    typer.run(main)
