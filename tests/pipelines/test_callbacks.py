"""What a callback sees and changes, and the progress bar."""

import re
from typing import Any

import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, SDCFGCutoffCallback

from stablesr_kit import Tiling
from tests.helpers.pipeline_runs import PICTURE, differs, run
from tests.helpers.tiny import seeded, tiny_pipeline


def test_callbacks_see_the_tensors_they_ask_for() -> None:
    pipeline = tiny_pipeline()
    for asked in (["latents"], ["prompt_embeds"], pipeline._callback_tensor_inputs):
        seen: list[Any] = []

        def note(
            pipe: Any, step: int, timestep: Any, tensors: dict[str, Any], seen: list[Any] = seen
        ) -> dict[str, Any]:
            assert pipe is pipeline
            seen.append((step, int(timestep), sorted(tensors)))
            return tensors

        run(pipeline, callback_on_step_end=note, callback_on_step_end_tensor_inputs=asked, prompt="cat")
        assert seen == [(0, 999, sorted(asked)), (1, 0, sorted(asked))]
    with pytest.raises(ValueError, match=r"\['image'\] are unknown, expected some of \['latents'"):
        run(pipeline, callback_on_step_end=note, callback_on_step_end_tensor_inputs=["image"])


def test_callbacks_change_tensors_and_guidance() -> None:
    pipeline = tiny_pipeline()

    def erase(pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": torch.zeros_like(tensors["latents"])} if step == pipe.num_timesteps - 1 else {}

    assert not run(pipeline, output_type="latent", callback_on_step_end=erase).any()

    def other_text(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": -tensors["prompt_embeds"]}

    asked = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    assert differs(run(pipeline, callback_on_step_end=other_text, **asked), run(pipeline), by=1e-6)

    def raise_guidance(pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale += 1.0
        return tensors

    text = {"prompt": "cat", "guidance_scale": 2.0, "num_inference_steps": 4}
    raised = run(pipeline, callback_on_step_end=raise_guidance, **text)
    assert pipeline.guidance_scale == 6.0 and pipeline.do_classifier_free_guidance
    assert differs(raised, run(pipeline, **text), by=1e-5)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_callback_of_diffusers_that_cuts_guidance_off_works(batch: int) -> None:
    pipeline = tiny_pipeline()
    cut = MultiPipelineCallbacks([SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)])
    arguments = {"prompt": "cat", "guidance_scale": 5.0, "num_inference_steps": 3}
    generators = [seeded(0) for _ in range(batch)]
    images = run(pipeline, [PICTURE] * batch, callback_on_step_end=cut, generator=generators, **arguments)
    assert pipeline.guidance_scale == 0 and len(images) == batch
    assert differs(images[:1], run(pipeline, **arguments), by=1e-5)


def test_a_callback_can_interrupt() -> None:
    pipeline, steps = tiny_pipeline(with_text=False), []

    def stop(pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        pipe._interrupt = True
        return tensors

    assert run(pipeline, num_inference_steps=4, callback_on_step_end=stop).shape == (1, 3, 16, 16)
    assert steps == [0] and pipeline.interrupt
    run(pipeline)
    assert not pipeline.interrupt


def test_the_progress_bar_is_configurable(capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = tiny_pipeline(with_text=False)
    run(pipeline)
    assert capsys.readouterr().err == ""
    pipeline.set_progress_bar_config(disable=False, desc="restoring")
    run(pipeline)
    assert "restoring: 100%" in (err := capsys.readouterr().err) and "2/2" in err


@pytest.mark.parametrize("is_tiled", [False, True])
def test_bars_count_steps_and_blocks_of_whole_pictures_and_tiles_of_others(
    capsys: pytest.CaptureFixture[str], is_tiled: bool
) -> None:
    pipeline = tiny_pipeline(with_text=False)
    pipeline.set_progress_bar_config(disable=False, mininterval=0, desc="photo.png")
    run(pipeline, w=0.5, scale=8, tiling=Tiling(tile_px=16, vae_tile_px=16) if is_tiled else None)
    shown = capsys.readouterr().err
    units = dict(re.findall(r"(photo.png[a-z, ]*): 100%.*?(tile|step|block)(?:/s|\])", shown))
    assert units == dict.fromkeys(("photo.png, encoding", "photo.png", "photo.png, decoding"), "tile") | (
        {} if is_tiled else {"photo.png, encoding": "block", "photo.png": "step", "photo.png, decoding": "block"}
    )


def test_the_bar_over_blocks_ends_at_its_total_sliced_compiled_or_not(capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = tiny_pipeline(with_text=False)
    pipeline.set_progress_bar_config(disable=False, mininterval=0)
    blocks = r"coding: 100%\|#*█*\| (\d+)/\1 "
    run(pipeline, w=0.5, num_images_per_prompt=2)
    assert len(set(re.findall(blocks, whole := capsys.readouterr().err))) == 2, whole
    pipeline.vae.enable_slicing()
    run(pipeline, w=0.5, num_images_per_prompt=2)
    assert len(set(re.findall(blocks, sliced := capsys.readouterr().err))) == 2, sliced
    pipeline.vae.decoder.compile(backend="eager")
    run(pipeline, w=0.0)
    assert len(set(re.findall(blocks, compiled := capsys.readouterr().err))) == 2, compiled
