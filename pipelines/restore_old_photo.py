"""Restore an old photograph with StableSR, then its faces: input, result without and with refined faces, side by side.

python pipelines/restore_old_photo.py old.jpg -o sheet.png [--faces codeformer.pth] [--model mini] [--scale 2]
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image

from stablesr_kit import FaceRefinement, StableSRPipeline
from stablesr_kit.imaging.reading import as_picture, read_picture
from stablesr_kit.imaging.writing import write_picture
from stablesr_kit.pipelines.codeformer import CodeFormerPipeline


def main(
    photo: Annotated[Path, typer.Argument(help="The photograph; a grey or tinted one stays so.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The picture to write.")],
    faces: Annotated[
        str, typer.Option(help="mini, a CodeFormer folder, a hub repository, or an original checkpoint.")
    ] = "mini",
    model: Annotated[str, typer.Option(help="mini, a pipeline folder, or a hub repository.")] = "mini",
    scale: Annotated[float, typer.Option(help="How many times larger the results are.")] = 2,
    w: Annotated[float, typer.Option("--w", help="StableSR: 0 realism to 1 fidelity.")] = 0.5,
    face_w: Annotated[float, typer.Option(help="Faces: 0 quality to 1 fidelity.")] = 0.7,
    seed: Annotated[int, typer.Option(help="The same seed gives the same result.")] = 0,
) -> None:
    """Write the sheet and print what was done with each face."""
    picture = read_picture(photo)
    is_file = Path(faces).is_file()
    codeformer = CodeFormerPipeline.from_original(faces) if is_file else CodeFormerPipeline.from_pretrained(faces)
    stage = FaceRefinement(codeformer, face_w)
    steps: list[torch.Tensor] = []

    def keep(images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        """A post-stage that changes nothing: what StableSR alone made of the photo."""
        steps.append(images)
        return images

    pipeline = StableSRPipeline.from_pretrained(model)
    generator = torch.Generator().manual_seed(seed)
    result = pipeline(picture.rgb, w=w, scale=scale, generator=generator, post_stages=[keep, stage]).images[0]
    before = picture.rgb.resize(result.size, Image.Resampling.BICUBIC)
    (without_faces,) = pipeline.image_processor.postprocess(steps[0], output_type="pil")
    sheet = Image.new("RGB", (3 * result.width, result.height))
    for i, column in enumerate((before, without_faces, result)):
        sheet.paste(column, (i * result.width, 0))
    write_picture(output, sheet, as_picture(sheet.convert("L") if picture.is_grey else sheet))
    for report in stage.reports[0]:
        typer.echo(
            f"{tuple(map(round, report.box))}: {report.action}, identity distance {report.identity_distance:.2f}"
        )
    typer.echo(f"written: {output}")


if __name__ == "__main__":
    typer.run(main)
