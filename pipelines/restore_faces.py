"""Show what w does to the faces of a photograph: a row for each, as found and restored at several fidelities.

python pipelines/restore_faces.py photo.jpg -o sheet.png [--model codeformer.pth] [--w 0 --w 0.5 --w 1]
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image

from stablesr_kit import FaceRefinement
from stablesr_kit.imaging.reading import as_picture, read_picture
from stablesr_kit.imaging.writing import write_picture
from stablesr_kit.pipelines.codeformer import CodeFormerPipeline


def main(
    photo: Annotated[Path, typer.Argument(help="The photograph.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The picture to write.")],
    model: Annotated[
        str, typer.Option(help="mini, a pipeline folder, a hub repository, or an original checkpoint.")
    ] = "mini",
    w: Annotated[list[float] | None, typer.Option(help="Fidelities, from 0 (quality) to 1.")] = None,
) -> None:
    """Write the aligned faces and their restorations, and print the identity distance of each."""
    picture = read_picture(photo)
    pixels = np.asarray(picture.rgb)
    is_file = Path(model).is_file()
    codeformer = CodeFormerPipeline.from_original(model) if is_file else CodeFormerPipeline.from_pretrained(model)
    faces = FaceRefinement(codeformer).find(pixels)
    if not faces:
        typer.echo(f"error: {photo}: no face is found; give another photo", err=True)
        raise typer.Exit(1)
    columns: list[np.ndarray] = []
    for fidelity in w or [0.0, 0.5, 1.0]:
        # Every fidelity is shown as it is: no face is held back for having become somebody else.
        stage = FaceRefinement(codeformer, fidelity, max_identity_distance=None)
        restored = list(stage.restore_crops(pixels.astype(np.float32), faces))
        columns = columns or [np.concatenate([face.aligned for face in restored])]
        columns.append(np.concatenate([face.restored for face in restored]))
        distances = ", ".join(f"{face.identity_distance:.2f}" for face in restored)
        typer.echo(f"w {fidelity:g}: identity distance {distances}")
    sheet = Image.fromarray(np.concatenate(columns, axis=1).round().clip(0, 255).astype(np.uint8))
    write_picture(output, sheet, as_picture(sheet))
    typer.echo(f"written: {output}")


if __name__ == "__main__":
    typer.run(main)
