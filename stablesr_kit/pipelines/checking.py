"""What a call of StableSRPipeline refuses before it computes anything."""

import math
from typing import Literal, get_args

from diffusers import DiffusionPipeline
from torch import Tensor

from stablesr_kit.imaging.color_fix import ColorFix
from stablesr_kit.pipelines.pictures import Picture

Start = Literal["lq", "noise"] | int
OutputType = Literal["pil", "np", "pt", "canvas", "latent"]


class InputChecks(DiffusionPipeline):
    """The first step of a call."""

    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    def check_inputs(
        self,
        image: Picture | list[Picture] | None,
        w: float,
        scale: float | None,
        height: int | None,
        width: int | None,
        num_inference_steps: int | None,
        num_images_per_prompt: int,
        start: Start,
        color_fix: str,
        output_type: str,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
        callback_on_step_end_tensor_inputs: list[str],
        tile_batch_size: int | None = None,
        has_post_stages: bool = False,
    ) -> None:
        """Refuse arguments that cannot work, each with what was given, what is expected and what to do.

        Raises:
            ValueError: a value is out of range or two arguments exclude each other.
        """
        if image is None:
            raise ValueError("image=None is given, expected a picture: PIL image, array, tensor, or a list of them")
        if not math.isfinite(w) or w < 0:
            raise ValueError(
                f"w={w} is given, expected a number from 0 (realism) to 1 (fidelity); above 1 extrapolates"
            )
        if w > 0 and self.cfw is None:
            raise ValueError(f"w={w} needs the component cfw, which this pipeline lacks; give w=0 or load a cfw")
        if scale is not None and (height is not None or width is not None):
            raise ValueError("scale and height/width exclude each other; give one of them")
        if (height is None) != (width is None):
            raise ValueError(f"height={height}, width={width}: give both, or scale")
        if scale is not None and not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale={scale} is given, expected a positive number")
        if height is not None and width is not None and (height < 1 or width < 1):
            raise ValueError(f"height={height}, width={width} is given, expected at least one pixel each")
        if num_inference_steps is not None and num_inference_steps < 1:
            raise ValueError(f"num_inference_steps={num_inference_steps} is given, expected at least 1")
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt={num_images_per_prompt} is given, expected at least 1")
        if tile_batch_size is not None and (not isinstance(tile_batch_size, int) or tile_batch_size < 1):
            raise ValueError(f"tile_batch_size={tile_batch_size!r} is given, expected at least 1")
        if not (start in ("lq", "noise") or (isinstance(start, int) and start >= 0)):
            raise ValueError(f"start={start!r} is given, expected 'lq', 'noise' or a timestep")
        if color_fix not in get_args(ColorFix):
            raise ValueError(f"color_fix={color_fix!r} is given, expected one of {get_args(ColorFix)}")
        if output_type not in get_args(OutputType):
            raise ValueError(f"output_type={output_type!r} is given, expected one of {get_args(OutputType)}")
        if has_post_stages and output_type == "latent":
            raise ValueError("post_stages work on pictures, output_type='latent' gives none; give another")
        for text in (prompt, negative_prompt):
            if text is not None and not isinstance(text, str | list):
                raise ValueError(f"a prompt {text!r} is given, expected text or a list of texts")
        if prompt is not None and prompt_embeds is not None:
            raise ValueError("prompt and prompt_embeds exclude each other; give one of them")
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ValueError("negative_prompt and negative_prompt_embeds exclude each other; give one of them")
        unknown = [k for k in callback_on_step_end_tensor_inputs if k not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs={unknown} are unknown, "
                f"expected some of {self._callback_tensor_inputs}"
            )
