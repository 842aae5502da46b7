"""Adapter and UNet as one compiled function."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PNDMScheduler
from PIL import Image
from torch._dynamo.testing import CompileCounter

from stablesr_kit import Tiling
from stablesr_kit.errors import ConfigError
from tests.helpers.cli_runs import error_lines, stablesr
from tests.helpers.pipeline_runs import run, same
from tests.helpers.tiny import tiny_pipeline


@pytest.mark.parametrize(
    "call",
    [
        {"num_inference_steps": 3},
        {"num_inference_steps": 3, "prompt": "cat", "guidance_scale": 3.0},
        {"scale": 8, "tiling": Tiling(tile_px=16)},
    ],
    ids=["whole", "guided", "tiles"],
)
def test_all_steps_and_tiles_of_a_call_are_one_graph(call: dict[str, Any]) -> None:
    torch.compiler.reset()
    pipeline = tiny_pipeline()
    expected = run(pipeline, **call)
    pipeline.compile_prediction(backend=(counter := CompileCounter()), fullgraph=True)
    same(run(pipeline, **call), expected)
    assert counter.frame_count == 1


def test_a_scheduler_may_keep_what_was_predicted() -> None:
    torch.compiler.reset()
    pipeline = tiny_pipeline()
    pipeline.scheduler = PNDMScheduler.from_config(pipeline.scheduler.config)
    expected = run(pipeline, num_inference_steps=4)
    written: list[torch.Tensor] = []

    def overwriting(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> Callable[..., Any]:
        """As CUDA graphs do: a result lies where the one before it lay."""

        def replay(*args: Any) -> Any:
            (result,) = graph.forward(*args)
            if not written:
                written.append(torch.empty_like(result))
            return (written[0].copy_(result),)

        return replay

    pipeline.compile_prediction(backend=overwriting)
    same(run(pipeline, num_inference_steps=4), expected)


def test_the_command_says_what_compiling_needs(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    Image.new("RGB", (8, 8)).save(photo := tmp_path / "in.png")
    monkeypatch.setenv("CXX", "no-such-compiler")
    result = stablesr("restore", photo, "-o", tmp_path / "out.png", "--model", model, "--device", "cpu", "--compile")
    assert result.exit_code != 0
    (line,) = error_lines(result)
    assert "needs a C++ compiler, and no-such-compiler is not found; install one" in line
    with pytest.raises(ConfigError, match="needs a C\\+\\+ compiler"):
        tiny_pipeline().compile_prediction()
