"""Compute the codes of all faces in a folder, and of their mirror images: the targets of CodeFormer's transformer.

train_codeformer.py --codes FILE then need not encode the HQ faces in every step.

accelerate launch training/generate_codes.py --config configs/tiny/codes.yaml --input_dir FACES
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from stablesr_kit.errors import ImageError
from stablesr_kit.imaging.degradations.filtering import resize
from stablesr_kit.imaging.reading import read_picture
from stablesr_kit.models.vqgan import VQGAN
from stablesr_kit.spaces import pixels_to_image
from stablesr_kit.storage import replacing_file
from stablesr_kit.training.data.faces import codes_key
from stablesr_kit.training.data.sources import list_photos
from stablesr_kit.training.run.command_line import launch
from stablesr_kit.training.run.config import ProgramConfig
from stablesr_kit.training.run.networks import load_network


@dataclass(frozen=True, kw_only=True)
class CodesConfig(ProgramConfig):
    """Options of this program."""

    input_dir: str
    """Folder of aligned faces, searched recursively."""
    pretrained_vqgan: str
    """Folder of the trained VQGAN."""
    batch_size: int = 8
    """Faces per batch."""


@torch.no_grad()
def main(config: CodesConfig) -> None:
    """Write output_dir/codes.safetensors: NAME/orig and NAME/hflip, (h, w), NAME being the path without suffix."""
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    vqgan = load_network(VQGAN, config.pretrained_vqgan, "pretrained_vqgan").to(accelerator.device).eval()
    size, folder = vqgan.config.image_size, Path(config.input_dir)
    paths = list_photos(folder)
    codes: dict[str, Tensor] = {}
    for start in tqdm(range(0, len(paths), config.batch_size), disable=not accelerator.is_local_main_process):
        batch = paths[start : start + config.batch_size]
        faces = torch.cat([read_face(path, size) for path in batch]).to(accelerator.device)
        for is_mirrored, images in ((False, faces), (True, faces.flip(-1))):
            indices = vqgan.quantizer.nearest(vqgan.encoder(images)[0]).to(torch.int16).cpu()
            for path, own in zip(batch, indices, strict=True):
                codes[codes_key(path, folder, is_mirrored)] = own.clone()
    if accelerator.is_main_process:
        output = Path(config.output_dir)
        config.save(output / "config.yaml")
        with replacing_file(output / "codes.safetensors") as part:
            save_file(codes, part)


def read_face(path: Path, size: int) -> Tensor:
    """Image (1, 3, size, size) of a square picture. Raises ImageError for another shape."""
    pixels = np.asarray(read_picture(path).rgb)
    if pixels.shape[0] != pixels.shape[1]:
        raise ImageError(f"{path} is {pixels.shape[0]}x{pixels.shape[1]} px, expected an aligned, square face")
    image = pixels_to_image(pixels)
    return image if pixels.shape[0] == size else resize(image, (size, size), "bicubic", antialias=True).clamp(-1, 1)


if __name__ == "__main__":
    launch(main, CodesConfig)
