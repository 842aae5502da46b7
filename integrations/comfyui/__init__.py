"""Nodes for ComfyUI: load a model, restore, decode again. See README.md beside this file.

Pictures are tensors (B, H, W, 3) in [0, 1], as everywhere in ComfyUI.
"""

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from stablesr_kit import CodeFormerPipeline, FaceRefinement, OneStepPipeline, StableSRPipeline, Tiling
from stablesr_kit import Job as PipelineJob
from stablesr_kit.pipelines.job import Bar
from stablesr_kit.pipelines.loading import pipeline_config, resolve_model

CATEGORY = "StableSR"
COLOR_FIXES = ["wavelet", "adain", "none"]


class LoadStableSR:
    """mini, a pipeline folder, a hub repository, or an official checkpoint file."""

    CATEGORY = CATEGORY
    FUNCTION = "load"
    RETURN_TYPES = ("STABLESR_MODEL",)
    RETURN_NAMES = ("model",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The node's fields."""
        return {
            "required": {
                "model": ("STRING", {"default": "mini", "tooltip": "mini, a folder, a repository, or a .ckpt file"}),
                "dtype": (["auto", "float32", "bfloat16", "float16"],),
            },
            "optional": {
                "cfw": ("STRING", {"default": "", "tooltip": "vqgan_cfw_00011.ckpt beside an official checkpoint"}),
            },
        }

    def load(self, model: str, dtype: str = "auto", cfw: str = "") -> tuple[Any]:
        """The pipeline, on ComfyUI's device."""
        device = _device()
        if Path(model).is_file():
            given = {"cfw": cfw} if cfw else {}
            pipeline: Any = StableSRPipeline.from_original(model, **given)
        else:
            folder = resolve_model(model)
            is_one_step = pipeline_config(folder).get("_class_name") == "OneStepPipeline"
            kind = OneStepPipeline if is_one_step else StableSRPipeline
            pipeline = kind.from_pretrained(folder)
        if dtype == "auto":
            dtype = "float32" if device.type == "cpu" else "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
        return (pipeline.to(device, getattr(torch, dtype)),)


class RestoreStableSR:
    """Restores and enlarges pictures; what they were decoded of goes on to the node that decodes again."""

    CATEGORY = CATEGORY
    FUNCTION = "restore"
    RETURN_TYPES = ("IMAGE", "STABLESR_SAMPLED")
    RETURN_NAMES = ("image", "sampled")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The node's fields."""
        return {
            "required": {
                "model": ("STABLESR_MODEL",),
                "image": ("IMAGE",),
                "scale": ("FLOAT", {"default": 4.0, "min": 0.25, "max": 16.0, "step": 0.25}),
                "w": ("FLOAT", {"default": 0.5, "min": 0.0, "max": 2.0, "step": 0.05, "tooltip": "0 real, 1 faithful"}),
                "steps": ("INT", {"default": 0, "min": 0, "max": 1000, "tooltip": "0: the model's own"}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 0xFFFFFFFFFFFFFFFF}),
                "color_fix": (COLOR_FIXES,),
                "tile": ("INT", {"default": 0, "min": 0, "max": 8192, "step": 64, "tooltip": "pixels; 0: automatic"}),
                "max_memory": ("STRING", {"default": "", "tooltip": "6GB for instance; empty: what is free"}),
                "faces": ("BOOLEAN", {"default": False, "tooltip": "refine them by CodeFormer"}),
                "face_w": ("FLOAT", {"default": 0.7, "min": 0.0, "max": 1.0, "step": 0.05}),
            },
            "optional": {"prompt": ("STRING", {"default": "", "multiline": True})},
        }

    def restore(
        self,
        model: Any,
        image: Tensor,
        scale: float = 4.0,
        w: float = 0.5,
        steps: int = 0,
        seed: int = 0,
        color_fix: str = "wavelet",
        tile: int = 0,
        max_memory: str = "",
        faces: bool = False,
        face_w: float = 0.7,
        prompt: str = "",
    ) -> tuple[Tensor, list[Any]]:
        """Restored pictures (B, H, W, 3), and for each what `RedecodeStableSR` takes."""
        stages = [_faces(face_w)] if faces else []
        bars = _Bars(len(image))
        options: dict[str, Any] = {
            "scale": scale,
            "num_inference_steps": steps or None,
            "prompt": prompt or None,
            "tiling": Tiling(tile_px=tile or "auto", max_memory=max_memory or None),
            "job": PipelineJob(progress=bars),
        }
        restored, kept = [], []
        for picture in image[..., :3].movedim(-1, 1).split(1):
            generator = torch.Generator().manual_seed(seed)
            if isinstance(model, OneStepPipeline):
                call = model(
                    picture, color_fix=color_fix, generator=generator, post_stages=stages, output_type="pt", **options
                )
                restored.append(call.images)
            else:
                with_features = w or 1.0 if model.cfw is not None else 0.0
                call = model(picture, w=with_features, generator=generator, output_type="latent", **options)
                kept.append(call.sampled)
                restored.append(model.redecode(call.sampled, w, color_fix, stages, "pt").images)
            bars.done += 1
        return _as_comfy(restored), kept


class RedecodeStableSR:
    """The same pictures with another w, colour fix or face strength, in one decode: nothing is sampled."""

    CATEGORY = CATEGORY
    FUNCTION = "redecode"
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("image",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The node's fields."""
        of_restore = RestoreStableSR.INPUT_TYPES()["required"]
        shared = {name: of_restore[name] for name in ("w", "color_fix", "faces", "face_w")}
        return {"required": {"model": ("STABLESR_MODEL",), "sampled": ("STABLESR_SAMPLED",), **shared}}

    def redecode(
        self,
        model: Any,
        sampled: list[Any],
        w: float = 0.5,
        color_fix: str = "wavelet",
        faces: bool = False,
        face_w: float = 0.7,
    ) -> tuple[Tensor]:
        """Pictures (B, H, W, 3)."""
        if not sampled:
            raise ValueError("a one-step model keeps nothing to decode again; restore once more instead")
        stages = [_faces(face_w)] if faces else []
        return (_as_comfy([model.redecode(one, w, color_fix, stages, "pt").images for one in sampled]),)


class _Bars:
    """ComfyUI's bar, and its button that interrupts; without ComfyUI there are none."""

    PARTS: ClassVar = {"encoding": (0.0, 0.06), "sampling": (0.06, 0.85), "decoding": (0.85, 1.0)}

    def __init__(self, pictures: int) -> None:
        self.pictures, self.done = pictures, 0
        try:
            from comfy.model_management import throw_exception_if_processing_interrupted
            from comfy.utils import ProgressBar
        except ImportError:
            self.bar, self.check = None, lambda: None
        else:
            self.bar, self.check = ProgressBar(1000 * pictures), throw_exception_if_processing_interrupted

    def __call__(self, doing: str, total: int, unit: str) -> Bar:
        return Bar(doing, total, unit, self.show)

    def show(self, doing: str, share: float) -> None:
        """Tell how much is done; raises what ComfyUI raises when it is interrupted."""
        self.check()
        if self.bar is not None:
            first, last = self.PARTS.get(doing, (0.0, 1.0))
            self.bar.update_absolute(round(1000 * (self.done + first + (last - first) * min(share, 1.0))))


def _device() -> torch.device:
    """Where ComfyUI computes; without it, the best there is."""
    try:
        from comfy.model_management import get_torch_device
    except ImportError:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device: torch.device = get_torch_device()
    return device


def _faces(w: float) -> FaceRefinement:
    return FaceRefinement(CodeFormerPipeline.from_pretrained("mini").to(_device()), w)


def _as_comfy(restored: list[Any]) -> Tensor:
    """(B, H, W, 3) in [0, 1], on the CPU, of pictures (1, 3, H, W)."""
    return torch.cat(restored).movedim(1, -1).float().cpu().contiguous()


NODE_CLASS_MAPPINGS = {
    "LoadStableSR": LoadStableSR,
    "RestoreStableSR": RestoreStableSR,
    "RedecodeStableSR": RedecodeStableSR,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "LoadStableSR": "Load StableSR",
    "RestoreStableSR": "Restore (StableSR)",
    "RedecodeStableSR": "Decode again (StableSR)",
}
