"""The ComfyUI nodes, called as ComfyUI calls them: found by their mappings, fed by their declared fields."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from stablesr_kit import StableSRPipeline
from tests.helpers.tiny import seeded

FOLDER = Path(__file__).parents[2] / "integrations" / "comfyui"
IMAGE = torch.rand(2, 6, 8, 3, generator=seeded(5))


@pytest.fixture(scope="module")
def nodes() -> Any:
    """The module, loaded by its path, as custom nodes are."""
    spec = importlib.util.spec_from_file_location("custom_nodes.stablesr", FOLDER / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(nodes: Any, name: str, **given: Any) -> Any:
    """What a node gives for these inputs and the defaults of its other fields."""
    kind = nodes.NODE_CLASS_MAPPINGS[name]
    assert name in nodes.NODE_DISPLAY_NAME_MAPPINGS
    fields = kind.INPUT_TYPES()
    assert given.keys() <= {*fields["required"], *fields.get("optional", {})}
    values = {}
    for field, (what, *settings) in fields["required"].items():
        values[field] = what[0] if isinstance(what, list) else settings[0]["default"] if settings else None
    outputs = getattr(kind(), kind.FUNCTION)(**{**values, **given})
    assert len(outputs) == len(kind.RETURN_TYPES) == len(kind.RETURN_NAMES)
    return outputs


def test_a_batch_is_restored_as_the_pipeline_does_and_decoded_again(nodes: Any, model: Path) -> None:
    (pipeline,) = run(nodes, "LoadStableSR", model=str(model))
    image, sampled = run(nodes, "RestoreStableSR", model=pipeline, image=IMAGE, scale=2.0, steps=2, w=0.0, seed=3)
    assert (image.shape, image.dtype, image.device.type) == ((2, 12, 16, 3), torch.float32, "cpu")
    assert 0 <= image.min() <= image.max() <= 1
    fresh = StableSRPipeline.from_pretrained(model)
    pictures = IMAGE.movedim(-1, 1)
    options: dict[str, Any] = {"scale": 2, "num_inference_steps": 2, "output_type": "pt"}
    expected = [fresh(one, w=0.0, generator=seeded(3), **options).images for one in pictures.split(1)]
    assert torch.equal(image, torch.cat(expected).movedim(1, -1))
    calls: list[Any] = []
    pipeline.unet.register_forward_pre_hook(lambda *_: calls.append(None))
    (again,) = run(nodes, "RedecodeStableSR", model=pipeline, sampled=sampled, w=1.0)
    expected = [fresh(one, w=1.0, generator=seeded(3), **options).images for one in pictures.split(1)]
    assert torch.equal(again, torch.cat(expected).movedim(1, -1))
    assert not calls
    with pytest.raises(ValueError, match="keeps nothing to decode again"):
        run(nodes, "RedecodeStableSR", model=pipeline, sampled=[])


def test_progress_and_interrupt_are_those_of_comfyui(nodes: Any, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[int] = []

    class Interrupted(Exception):
        pass

    class ProgressBar:
        def __init__(self, total: int) -> None:
            assert total == 2000

        def update_absolute(self, value: int) -> None:
            shown.append(value)

    def check() -> None:
        if stops_at and shown and shown[-1] >= stops_at:
            raise Interrupted

    management: Any = ModuleType("comfy.model_management")
    management.throw_exception_if_processing_interrupted = check
    management.get_torch_device = lambda: torch.device("cpu")
    utils: Any = ModuleType("comfy.utils")
    utils.ProgressBar = ProgressBar
    for name, module in (
        ("comfy", ModuleType("comfy")),
        ("comfy.model_management", management),
        ("comfy.utils", utils),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    stops_at = 0
    (pipeline,) = run(nodes, "LoadStableSR", model=str(model))
    run(nodes, "RestoreStableSR", model=pipeline, image=IMAGE, scale=1.0, steps=4)
    assert shown == sorted(shown)
    assert (len(set(shown)) > 10, shown[-1] > 1800) == (True, True)
    shown.clear()
    stops_at = 400
    with pytest.raises(Interrupted):
        run(nodes, "RestoreStableSR", model=pipeline, image=IMAGE, scale=1.0, steps=4)
    assert shown[-1] < 1000
