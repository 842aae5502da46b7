"""One picture to look at: LQ pictures, enlarged plainly and by models, in rows, with a flat part of each at 3x.

    python -m benchmarks.sheet DATA/Set14_LRx4/*.png --truth DATA/Set14_HR --method mini@0.5 --method new=FOLDER@0.5

A method is a pipeline's name or folder and the w to use, with a label before `=`. --truth names a folder with the
undamaged pictures under the same names (or without their x4).
"""

import argparse
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from stablesr_kit.pipelines.stablesr import StableSRPipeline

LABEL_PX = 18
FLAT_PX, FLAT_SCALE = 48, 3


def main() -> None:
    """Write the sheet as PNG, or as JPEG by its name's ending."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, nargs="+", help="low-quality pictures, a row each")
    parser.add_argument("--truth", type=Path, default=None, help="folder of the undamaged pictures")
    parser.add_argument(
        "--method", action="append", default=None, help="[LABEL=]PIPELINE[@w]; mini@0.5 if none is given"
    )
    parser.add_argument("--scale", type=int, default=4, help="factor of enlargement")
    parser.add_argument("--part", type=int, default=64, help="side of the part of each picture that is restored, in px")
    parser.add_argument("--no-flat", action="store_true", help="leave out the flat parts at 3x")
    parser.add_argument("--seed", type=int, default=0, help="seed of every picture")
    parser.add_argument("-o", "--output", type=Path, default=Path("sheet.png"), help="file to write")
    options = parser.parse_args()

    parts = [centre(Image.open(file).convert("RGB"), options.part) for file in options.pictures]
    enlarged = [
        lq.resize((lq.width * options.scale, lq.height * options.scale), Image.Resampling.BICUBIC) for lq in parts
    ]
    columns = {"bicubic": enlarged}
    for method in options.method or ["mini@0.5"]:
        name, _, model = method.rpartition("=")
        model, _, w = model.partition("@")
        pipeline = StableSRPipeline.from_pretrained(model)
        pipeline.set_progress_bar_config(disable=True)
        columns[f"{name or Path(model).name}, w {w or 0.5}"] = [
            pipeline(
                lq, scale=options.scale, w=float(w or 0.5), generator=torch.Generator().manual_seed(options.seed)
            ).images[0]
            for lq in parts
        ]
    if options.truth is not None:
        columns["truth"] = [
            centre(Image.open(truth_of(file, options.truth)).convert("RGB"), options.part * options.scale)
            for file in options.pictures
        ]
    rows = [[label(images[i], name) for name, images in columns.items()] for i in range(len(parts))]
    if not options.no_flat:
        for i, row in enumerate(rows):
            box = flattest(enlarged[i], FLAT_PX)
            side = FLAT_PX * FLAT_SCALE
            flat = [images[i].crop(box).resize((side, side), Image.Resampling.NEAREST) for images in columns.values()]
            rows[i] = [below(picture, part) for picture, part in zip(row, flat, strict=True)]
    bands = [np.concatenate([np.asarray(picture) for picture in row], axis=1) for row in rows]
    widest = max(band.shape[1] for band in bands)
    bands = [np.pad(band, ((0, 4), (0, widest - band.shape[1]), (0, 0)), constant_values=255) for band in bands]
    Image.fromarray(np.concatenate(bands)).save(options.output, quality=92)


def truth_of(file: Path, folder: Path) -> Path:
    """The undamaged picture of a low-quality one."""
    return next(folder.glob(f"{re.sub('x[0-9]+$', '', file.stem)}.*"))


def centre(image: Image.Image, side: int) -> Image.Image:
    """The middle square of a picture, or all of it where it is smaller."""
    width, height = min(side, image.width), min(side, image.height)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def flattest(image: Image.Image, side: int) -> tuple[int, int, int, int]:
    """The square with the least deviation, neither black nor white: where a pattern would be seen first."""
    grey = np.asarray(image.convert("L"), np.float64)
    places = [
        (
            grey[y : y + side, x : x + side].std() + (0 if 30 < grey[y : y + side, x : x + side].mean() < 225 else 50),
            y,
            x,
        )
        for y in range(0, grey.shape[0] - side + 1, 8)
        for x in range(0, grey.shape[1] - side + 1, 8)
    ]
    _, top, left = min(places)
    return left, top, left + side, top + side


def label(image: Image.Image, text: str) -> Image.Image:
    """The picture with a line of text above it."""
    sheet = Image.new("RGB", (image.width + 4, image.height + LABEL_PX), "white")
    sheet.paste(image, (0, LABEL_PX))
    ImageDraw.Draw(sheet).text((2, 3), text, fill="black")
    return sheet


def below(image: Image.Image, part: Image.Image) -> Image.Image:
    """Two pictures, one under the other."""
    sheet = Image.new("RGB", (max(image.width, part.width + 4), image.height + part.height + 4), "white")
    sheet.paste(image, (0, 0))
    sheet.paste(part, (0, image.height + 4))
    return sheet


if __name__ == "__main__":
    main()
