"""What a callback sees and changes, and the progress bar."""

from typing import Any

import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, SDCFGCutoffCallback

from tests.helpers.pipeline_runs import PICTURE, differs, run
from tests.helpers.tiny import seeded, tiny_pipeline


def test_callbacks_see_the_tensors_they_ask_for() -> None:
    pipeline = tiny_pipeline()
    for asked in (["latents"], ["prompt_embeds"], pipeline._callback_tensor_inputs):
        seen = []

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
