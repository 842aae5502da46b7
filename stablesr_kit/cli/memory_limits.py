"""What fits into a device's memory, chosen before a picture is begun and told in one line."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from stablesr_kit.cli.messages import usage_error
from stablesr_kit.errors import ConfigError, JobError

if TYPE_CHECKING:
    import torch

    from stablesr_kit import OneStepPipeline, StableSRPipeline
    from stablesr_kit.tiling.memory import Plan, Tiling


SLOW_HALF = "; this processor computes it through float32, about three times slower"


def parse_max_memory(text: str | None) -> int | None:
    """Bytes; None stays None and stands for what is free. Ends the command if the text is no size."""
    if text is None:
        return None

    from stablesr_kit.tiling.memory import Tiling

    try:
        return Tiling(max_memory=text).allowed_bytes()
    except ConfigError:
        usage_error(f"--max-memory {text!r} is not a size; give one such as 6GB or 500MB")


def dtype_that_fits(dtype: "torch.dtype", model: Path, device: "torch.device", max_memory: int | None) -> "torch.dtype":
    """float32, or with a note half precision where the model's weights alone would not fit; others stay."""
    import torch

    from stablesr_kit.models.execution import has_bf16
    from stablesr_kit.pipelines.loading import parameter_count
    from stablesr_kit.tiling.memory import GIB, RESERVE, free_bytes

    budget = free_bytes(device) if max_memory is None else max_memory
    needed = parameter_count(model) * dtype.itemsize
    if dtype != torch.float32 or needed <= budget * (1 - RESERVE):
        return dtype
    half = torch.bfloat16 if device.type == "cpu" else torch.float16
    name = str(half).removeprefix("torch.")
    slowness = SLOW_HALF if device.type == "cpu" and not has_bf16(device) else ""
    tqdm.write(
        f"note: {needed / GIB:.2f} GiB of weights in float32 do not fit into {budget / GIB:.2f} GiB of memory; "
        f"restoring in {name}, as --dtype {name} does{slowness}",
        file=sys.stderr,
    )
    return half


def plan_for(
    pipeline: "StableSRPipeline | OneStepPipeline",
    height: int,
    width: int,
    tiling: "Tiling",
    options: dict[str, Any],
    saved: Path,
) -> "Plan | None":
    """The plan for a result of height x width pixels, told if there are tiles; None if there is nothing to plan.

    options: of the call. saved: a file with the plan that a stopped run began with, which is kept to whatever is free
    now, so that the picture is the same; it is written if it is not there.

    Raises:
        JobError: the stopped run was allowed another amount of memory.
    """
    from stablesr_kit.tiling.memory import Plan

    if saved.exists():
        plan = Plan.load(saved)
        if plan.max_memory != tiling.allowed_bytes():
            raise JobError(
                f"begun with {_limit(plan.max_memory)} (now {_limit(tiling.allowed_bytes())}); "
                "give the same, or start this picture again without --resume"
            )
    elif pipeline.needs_plan(height, width, tiling):
        planned = {name: options[name] for name in ("w", "num_inference_steps", "guidance_scale") if name in options}
        plan = pipeline.plan(height, width, tiling=tiling, **planned)
        plan.save(saved)
    else:
        return None
    if plan.grid is not None or plan.vae_tile_px is not None:
        tqdm.write(str(plan), file=sys.stderr)
    return plan


def _limit(max_memory: int | None) -> str:
    return "no --max-memory" if max_memory is None else f"--max-memory {max_memory / 1e9:g}GB"
