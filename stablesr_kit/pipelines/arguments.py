"""Checks of a call's arguments. Each raises ValueError in one line: what is given, what is expected, what to do."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, get_args

from stablesr_kit.imaging.color_fix import ColorFix
from stablesr_kit.pipelines.pictures import OutputType, PostStage


def is_number(value: object) -> bool:
    """Whether it is a finite real number, of Python or of numpy."""
    return isinstance(value, Real) and math.isfinite(value)


def check_size(scale: float | None, height: int | None, width: int | None) -> None:
    """Refuse an invalid size of the result. Raises ValueError."""
    if scale is not None and (height is not None or width is not None):
        raise ValueError("scale and height/width exclude each other; give one of them")
    if (height is None) != (width is None):
        raise ValueError(f"height={height}, width={width}: give both, or scale")
    if scale is not None and not (is_number(scale) and scale > 0):
        raise ValueError(f"scale={scale!r} is given, expected a positive number")
    if height is not None and width is not None:
        if not (isinstance(height, Integral) and isinstance(width, Integral) and min(height, width) >= 1):
            raise ValueError(f"height={height!r}, width={width!r} is given, expected at least one pixel each")


def check_output(color_fix: str, output_type: str, post_stages: Sequence[PostStage]) -> None:
    """Refuse unknown names, and post-stages where no picture is made. Raises ValueError."""
    for name, value, choices in (
        ("color_fix", color_fix, get_args(ColorFix)),
        ("output_type", output_type, get_args(OutputType)),
    ):
        if value not in choices:
            raise ValueError(f"{name}={value!r} is given, expected one of {choices}")
    if post_stages and output_type == "latent":
        raise ValueError("post_stages work on pictures, output_type='latent' gives none; give another")


def check_picture(image: object, prompt: object = None) -> None:
    """Refuse a missing picture, and a prompt in its place. Raises ValueError."""
    if image is None:
        raise ValueError("image=None is given, expected a picture: PIL image, array, tensor, or a list of them")
    if isinstance(image, str) and prompt is not None and not isinstance(prompt, str | list):
        raise ValueError("image is a text and prompt a picture; the picture comes first: pipeline(image, prompt)")


def check_exclusive(one: str, value: object, other: str, other_value: object) -> None:
    """Refuse two arguments that mean the same. Raises ValueError."""
    if value is not None and other_value is not None:
        raise ValueError(f"{one} and {other} exclude each other; give one of them")


def check_count(name: str, count: Any) -> None:
    """Refuse anything but None and whole numbers from 1. Raises ValueError."""
    if count is not None and not (isinstance(count, Integral) and int(count) >= 1):
        raise ValueError(f"{name}={count!r} is given, expected at least 1, a whole number")


def check_texts(
    prompt: object, prompt_embeds: object, negative_prompt: object, negative_prompt_embeds: object, guidance_scale: Any
) -> None:
    """Refuse prompts that are no text, a prompt beside its embeddings, and no guidance scale. Raises ValueError."""
    check_exclusive("prompt", prompt, "prompt_embeds", prompt_embeds)
    check_exclusive("negative_prompt", negative_prompt, "negative_prompt_embeds", negative_prompt_embeds)
    for text in (prompt, negative_prompt):
        if text is not None and not isinstance(text, str | list):
            shown = repr(text) if isinstance(text, Real) else f"of type {type(text).__name__}"
            raise ValueError(f"a prompt {shown} is given, expected text or a list of texts")
    if not is_number(guidance_scale):
        raise ValueError(f"guidance_scale={guidance_scale!r} is given, expected a number; 1 is no guidance")


def check_generators(generator: object, results: int) -> None:
    """Refuse a list of generators that has not one for each result. Raises ValueError."""
    if isinstance(generator, list) and len(generator) not in (1, results):
        raise ValueError(f"{len(generator)} generators are given for {results} results; give one, or one each")


def check_start(start: Any, strength: Any) -> None:
    """Refuse a start of sampling that cannot be, and two of them. Raises ValueError."""
    check_exclusive("strength", strength, "start", None if start == "lq" else start)
    if not (start in ("lq", "noise") or (isinstance(start, Integral) and int(start) >= 0)):
        raise ValueError(f"start={start!r} is given, expected 'lq', 'noise' or a timestep")
    if strength is not None and not (is_number(strength) and 0 <= strength <= 1):
        raise ValueError(f"strength={strength!r} is given, expected 0 (no step is run) to 1 (all are)")


def check_callback_tensors(asked: Sequence[str], known: Sequence[str]) -> None:
    """Refuse tensors that no callback can be given. Raises ValueError."""
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise ValueError(f"callback_on_step_end_tensor_inputs={unknown} are unknown, expected some of {known}")


def check_image_prompt(pipeline: Any, image: object, embeds: object) -> None:
    """Refuse pictures for an IP adapter that is not there, an IP adapter without one, and both forms. ValueError."""
    check_exclusive("ip_adapter_image", image, "ip_adapter_image_embeds", embeds)
    is_loaded = getattr(pipeline.unet.config, "encoder_hid_dim_type", None) == "ip_image_proj"
    if is_loaded != (image is not None or embeds is not None):
        raise ValueError(
            "an IP adapter is loaded; give ip_adapter_image or ip_adapter_image_embeds, or call unload_ip_adapter()"
            if is_loaded
            else "ip_adapter_image needs an IP adapter; load one with load_ip_adapter()"
        )
    if image is not None and (pipeline.image_encoder is None or pipeline.feature_extractor is None):
        raise ValueError(
            "ip_adapter_image needs the components image_encoder and feature_extractor, which this pipeline lacks; "
            "load them, or give ip_adapter_image_embeds"
        )
