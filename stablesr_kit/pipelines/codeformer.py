"""CodeFormerPipeline: restores, completes and colours aligned faces (Zhou et al. 2022)."""

import math
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor
from torch.nn.functional import interpolate

from stablesr_kit.checkpoints.codeformer import convert_face_checkpoint
from stablesr_kit.errors import CheckpointError, ConfigError, ImageError, ModelNotFoundError
from stablesr_kit.imaging.canvas import View, assembled
from stablesr_kit.imaging.color_fix import neutral_like
from stablesr_kit.imaging.resizing import resize_bicubic
from stablesr_kit.models.codeformer import CodeFormer, CodeLookup
from stablesr_kit.models.execution import in_float32
from stablesr_kit.pipelines.loading import EMBEDDED_FACES, resolve_model
from stablesr_kit.pipelines.pictures import Picture, to_image
from stablesr_kit.spaces import image_to_unit

FaceTask = Literal["restore", "inpaint", "colorize"]
FaceOutputType = Literal["pil", "np", "pt"]


class TaskDefaults(NamedTuple):
    """Defaults of a task."""

    w: float
    adain: bool


TASK_DEFAULTS: dict[FaceTask, TaskDefaults] = {
    "restore": TaskDefaults(w=0.5, adain=True),
    "inpaint": TaskDefaults(w=1.0, adain=False),
    "colorize": TaskDefaults(w=0.0, adain=True),
}

# Of the released files, these two differ in shape from the one that restores: (codes, fused sizes) -> task.
_RELEASED_TASKS: dict[tuple[int, tuple[int, ...]], FaceTask] = {
    (512, (32, 64, 128)): "inpaint",
    (1024, (32, 64, 128)): "colorize",
}


# Sides of a picture of one face, at most; enlarged until the smaller fits, a strip would outgrow any memory.
_MOST_ELONGATED = 8


class CodeFormerPipeline(DiffusionPipeline):
    """Restores aligned faces; for faces inside photographs see `FaceRefinement`.

    Args:
        codeformer: the network.
        task: what it was trained for: "restore", "inpaint" or "colorize".
        max_enlargement: `FaceRefinement` restores faces up to this many times `image_size` in the result; larger ones
            already have more detail than the network gives. None is no limit.
    """

    model_cpu_offload_seq = "codeformer"

    def __init__(self, codeformer: CodeFormer, task: str = "restore", max_enlargement: float | None = None) -> None:
        super().__init__()
        _check_task(task)
        self.register_modules(codeformer=codeformer)
        self.register_to_config(task=task, max_enlargement=max_enlargement)
        self.image_processor = VaeImageProcessor(do_resize=False)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Load an embedded model, a folder, or a repository of the Hugging Face hub.

        Keyword arguments as `DiffusionPipeline.from_pretrained` (dtype, variant, ...).

        Raises:
            ModelNotFoundError: there is no such model here or on the hub, or it is no CodeFormer.
        """
        folder = resolve_model(pretrained_model_name_or_path, embedded=EMBEDDED_FACES, **kwargs)
        if "codeformer" not in cls.load_config(str(folder)):
            raise ModelNotFoundError(
                f"{pretrained_model_name_or_path} holds no codeformer, expected a CodeFormer pipeline folder; "
                "make one with `stablesr convert --codeformer PTH -o DIR`"
            )
        return super().from_pretrained(str(folder), **kwargs)

    @classmethod
    def from_original(cls, checkpoint: str | Path, *, task: FaceTask | None = None, **kwargs: Any) -> Self:
        """Build a pipeline from an official file (codeformer.pth, or the ones for inpainting and colorization).

        task: None recognises the released files by their shapes; others are taken for "restore".
        Other keyword arguments as `convert_face_checkpoint`.

        Raises:
            CheckpointError: the file is of another family, or a tensor is missing, left over or of another shape.
            UnsafeCheckpointError: the file would run code.
        """
        network = convert_face_checkpoint(checkpoint, **kwargs)
        if not isinstance(network, CodeFormer):
            raise CheckpointError(
                f"{Path(checkpoint).name} is a {type(network).__name__} alone, expected a CodeFormer such as "
                "codeformer.pth"
            )
        return cls.from_network(network, task)

    @classmethod
    def from_network(cls, network: CodeFormer, task: FaceTask | None = None) -> Self:
        """A pipeline of this network; `task` as for `from_original`."""
        shapes = (network.config.codebook_size, tuple(network.config.fuse_sizes))
        return cls(network, task or _RELEASED_TASKS.get(shapes, "restore"))

    @property
    def image_size(self) -> int:
        """Side of the faces the network takes, in pixels."""
        return int(self.codeformer.config.image_size)

    @property
    def max_w(self) -> float:
        """The highest fidelity: 1, or 0 for a network without fusion layers (stage II)."""
        return 1.0 if self.codeformer.fusions else 0.0

    @property
    def max_enlargement(self) -> float:
        """Limit of the enlargement of faces, see the class; infinity if there is none."""
        limit = self.config.max_enlargement
        return math.inf if limit is None else float(limit)

    @torch.no_grad()
    def restore(
        self, image: Tensor, w: float | Tensor, adain: bool = True, code_lookup: CodeLookup = "transformer"
    ) -> Tensor:
        """Restored faces (B, 3, S, S), float32, of image (B, 3, S, S), both in [-1, 1]; one forward, no resizing.

        Arguments as `CodeFormer.forward`.

        Raises:
            FloatingPointError: the result is not finite: the network is damaged, or its precision too low.
        """
        device = self._execution_device
        w = w.to(device) if isinstance(w, Tensor) else w
        image = image.to(device, self.codeformer.dtype)
        with in_float32(self.codeformer.vqgan.decoder, self.codeformer.fusions):
            output: Tensor = self.codeformer(image, w, adain=adain, code_lookup=code_lookup).image
        if not output.isfinite().all():
            raise FloatingPointError(
                f"the restored faces are not finite, computed in {self.codeformer.dtype}; "
                "load it in bfloat16 or float32, or get a whole copy of the face model"
            )
        return output.float()

    @torch.no_grad()
    def __call__(
        self,
        faces: Picture | list[Picture],
        w: float | None = None,
        *,
        adain: bool | None = None,
        task: FaceTask | None = None,
        mask: Picture | list[Picture] | None = None,
        code_lookup: CodeLookup = "transformer",
        batch_size: int = 4,
        output_type: FaceOutputType = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Restore, complete or colour aligned faces.

        A result has the proportions of its face, and its shorter side is at least `image_size`.

        Args:
            faces: a PIL image, an array (H, W, 3) or (B, H, W, 3), a tensor (3, H, W) or (B, 3, H, W), uint8 or float
                in [0, 1], or a list of these, of any sizes.
            w: 0 quality to 1 fidelity; above 1 extrapolates. None: restore 0.5, inpaint 1, colorize 0.
            adain: give the codes the mean and deviation of the input's latent. None: not for inpaint, else yes.
            task: None is the pipeline's own.
            mask: for inpaint, of the size of the face, one for all or one each: white is filled in, black stays
                bitwise. None takes the white pixels of each face as the mask.
            code_lookup: "transformer", or "nearest" as in a plain VQ autoencoder.
            batch_size: faces per forward; each takes half a gigabyte at 512 px in float32.
            output_type: "pil"; "np" for arrays (B, H, W, 3), "pt" for tensors (B, 3, H, W), in [0, 1]. Results of
                different sizes are a list of batches of one.
            return_dict: False returns a tuple.

        Raises:
            ImageError: an input is no picture, or a mask has another size, is all white, or is missing.
            ConfigError: an option is invalid.
            FloatingPointError: as `restore`.
        """
        task = task or self.config.task
        _check_task(task)
        defaults = TASK_DEFAULTS[task]
        w = defaults.w if w is None else w
        adain = defaults.adain if adain is None else adain
        if isinstance(w, bool) or not isinstance(w, int | float) or not 0 <= w < float("inf"):
            raise ConfigError(f"w={w!r} is given for faces, expected a number from 0 (quality) to 1 (fidelity)")
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size} is given, expected at least one face")
        if output_type not in get_args(FaceOutputType):
            raise ConfigError(f"output_type={output_type!r} is given, expected one of {get_args(FaceOutputType)}")
        if mask is not None and task != "inpaint":
            raise ConfigError(f"a mask is given to {task}, which changes whole faces; give task='inpaint'")

        images = _one_by_one(faces)
        _check_proportions(images)
        masks = _masks(images, mask) if task == "inpaint" else None
        size = self.image_size
        results: list[Tensor] = []
        for first in range(0, len(images), batch_size):
            group = images[first : first + batch_size]
            hidden = masks[first : first + batch_size] if masks is not None else None
            # The network knows what to complete by its being white, which lerp gives exactly and face + (1 - face) not.
            shown = (
                group
                if hidden is None
                else [torch.lerp(face, torch.ones_like(face), m) for face, m in zip(group, hidden, strict=True)]
            )
            restored = self.restore(
                torch.cat([resize_bicubic(face, size, size) for face in shown]), w, adain, code_lookup
            ).cpu()
            for i, face in enumerate(group):
                height, width = _result_size(face, size)
                output = resize_bicubic(restored[i : i + 1], height, width)
                if hidden is not None:
                    m = interpolate(hidden[i], (height, width), mode="nearest")
                    output = (1 - m) * resize_bicubic(face, height, width) + m * output
                if task != "colorize":
                    output = assembled(neutral_like(View(output), View(face)))
                results.append(output)

        self.maybe_free_model_hooks()
        pictures = self._postprocess(results, output_type)
        return ImagePipelineOutput(images=pictures) if return_dict else (pictures,)

    def _postprocess(
        self, results: list[Tensor], output_type: FaceOutputType
    ) -> list[PIL.Image.Image] | list[np.ndarray] | list[Tensor] | np.ndarray | Tensor:
        if output_type != "pil" and len({result.shape for result in results}) == 1:
            return self.image_processor.postprocess(torch.cat(results), output_type=output_type)
        pictures = [self.image_processor.postprocess(result, output_type=output_type) for result in results]
        return [picture[0] for picture in pictures] if output_type == "pil" else pictures


def _check_task(task: object) -> None:
    if task not in TASK_DEFAULTS:
        raise ConfigError(f"task={task!r} is given, expected one of {tuple(TASK_DEFAULTS)}")


def _one_by_one(pictures: Picture | list[Picture] | tuple[Picture, ...]) -> list[Tensor]:
    """Images (1, 3, H, W) in [-1, 1], each of its own size. Raises ImageError."""
    given = pictures if isinstance(pictures, list | tuple) else [pictures]
    if not given:
        raise ImageError("an empty list of faces is given, expected at least one")
    return [image for picture in given for image in to_image(picture).split(1)]


def _check_proportions(faces: list[Tensor]) -> None:
    """Raises ImageError."""
    for number, face in enumerate(faces):
        height, width = face.shape[2:]
        if max(height, width) > _MOST_ELONGATED * min(height, width):
            raise ImageError(f"face {number} is {height}x{width} (height x width), too narrow; crop it to the face")


def _masks(faces: list[Tensor], mask: Picture | list[Picture] | None) -> list[Tensor]:
    """The mask (1, 1, H, W) of each face, 1 where it is filled in. Raises ImageError."""
    if mask is None:
        masks = [(face == 1).all(dim=1, keepdim=True).float() for face in faces]
    else:
        masks = [image_to_unit(image.mean(dim=1, keepdim=True)) for image in _one_by_one(mask)]
        masks = masks * len(faces) if len(masks) == 1 else masks
    if len(masks) != len(faces):
        raise ImageError(f"{len(masks)} masks are given for {len(faces)} faces; give one for all, or one each")
    for number, (face, m) in enumerate(zip(faces, masks, strict=True)):
        if m.shape[2:] != face.shape[2:]:
            raise ImageError(
                f"mask {number} is {m.shape[2]}x{m.shape[3]}, its face {face.shape[2]}x{face.shape[3]} "
                "(height x width); give a mask of the face's size"
            )
        if not m.any():
            where = "face" if mask is None else "mask"
            raise ImageError(f"{where} {number} has no white pixels, so nothing is to be completed; paint them white")
        if bool((m == 1).all()):
            where = "face" if mask is None else "mask"
            raise ImageError(f"{where} {number} is all white, which leaves no face to complete; leave some of it")
    return masks


def _result_size(face: Tensor, least: int) -> tuple[int, int]:
    """Height and width of the result for a face (1, 3, H, W): its proportions, the shorter side at least this."""
    height, width = face.shape[2:]
    scale = max(1.0, least / min(height, width))
    return round(height * scale), round(width * scale)
