"""Every kind of checkpoint is recognised and described; nothing is built for it."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import save_file
from torch import Tensor

from stablesr_kit.checkpoints import Hints, convert_checkpoint, inspect_checkpoint
from stablesr_kit.errors import CheckpointError
from tests.helpers import official_layout as official


@pytest.fixture(scope="module")
def networks() -> dict[str, Any]:
    return official.tiny_networks()


@pytest.fixture(scope="module")
def state(networks: dict[str, Any]) -> dict[str, Tensor]:
    return official.official_checkpoint(networks, official.tiny_text_encoder())


def saved(state: dict[str, Tensor], path: Path, **beside: object) -> Path:
    torch.save({"state_dict": state, **beside}, path)
    return path


def test_a_complete_checkpoint_is_described(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = saved(state, tmp_path / "stablesr_768v_000139.ckpt", epoch=139, global_step=21000)
    report = inspect_checkpoint(path, sha256=True)
    assert report.kind == "stablesr"
    assert report.parts["UNet"] == sum(
        tensor.numel() for name, tensor in state.items() if "diffusion_model" in name and "spade" not in name
    )
    assert report.configs["unet"]["block_out_channels"] == (32, 64)
    assert report.prediction is not None and report.prediction.type == "v_prediction"
    assert report.dtypes == ("float32",) and report.sha256 is not None and len(report.sha256) == 64
    text = str(report)
    for part in ("global_step 21000", "32-64", "v_prediction", "--cfw", "stablesr convert", "text encoder"):
        assert part in text, part
    assert report.size_bytes == path.stat().st_size


def test_what_is_not_understood_is_in_the_report(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = saved(state | {"my_head.weight": torch.ones(1)}, tmp_path / "odd.ckpt")
    assert "not understood: my_head.weight" in str(inspect_checkpoint(path))
    assert "measures" in str(inspect_checkpoint(path))


def test_parts_of_stablesr_are_told_apart(tmp_path: Path, state: dict[str, Tensor], networks: dict[str, Any]) -> None:
    adapter = {name: tensor for name, tensor in state.items() if ".spade." in name or name.startswith("structcond")}
    rest = {name: tensor for name, tensor in state.items() if name not in adapter}
    vae = {name: tensor for name, tensor in state.items() if name.startswith("first_stage_model.")}
    sd1 = official.official_checkpoint(official.tiny_networks(linear=False))
    sd1 = {name: tensor for name, tensor in sd1.items() if ".spade." not in name and not name.startswith("structcond")}
    for tensors, kind, needs in (
        (adapter, "stablesr extract", "--base"),
        (rest, "stable diffusion", ""),
        (sd1, "stable diffusion", ""),
        (official.official_cfw_checkpoint(networks), "cfw", "a StableSR checkpoint"),
        (vae, "autoencoder", ""),
        ({f"module.{name}": tensor for name, tensor in adapter.items()}, "stablesr extract", "--base"),
    ):
        report = inspect_checkpoint(saved(tensors, tmp_path / "weights.ckpt"))
        assert report.kind == kind and needs in " ".join(report.missing)
    assert "1.x" in inspect_checkpoint(saved(sd1, tmp_path / "weights.ckpt")).description


@pytest.mark.parametrize(
    ("wrapper", "name", "kind"),
    [
        ("params_ema", "idx_pred_layer.1.weight", "codeformer"),
        ("params_ema", "quantize.embedding.weight", "vqgan"),
        ("params_d", "main.0.weight", "vqgan discriminator"),
        ("params_ema", "body.0.rdb1.conv1.weight", "real-esrgan"),
        (None, "module.BboxHead.0.conv1x1.weight", "retinaface"),
        (None, "out_mask_conv.conv2d.weight", "parsenet"),
        (None, "conditioner.embedders.0.transformer.text_model.x", "unsupported diffusion"),
        (None, "control_model.input_blocks.0.0.weight", "unsupported diffusion"),
        (None, "lora_unet_down_blocks_0.lora_down.weight", "lora"),
        (None, "down_blocks.0.resnets.0.conv1.weight", "diffusers weights"),
        (None, "something.weight", "unknown"),
    ],
)
def test_other_families_are_recognised_by_name_and_not_converted(
    tmp_path: Path, wrapper: str | None, name: str, kind: str
) -> None:
    tensors: Any = {name: torch.ones(2, 2)}
    torch.save({wrapper: tensors} if wrapper else tensors, tmp_path / "weights.pth")
    report = inspect_checkpoint(tmp_path / "weights.pth")
    is_of_faces = kind in ("codeformer", "vqgan", "vqgan discriminator")
    assert report.kind == kind and (report.command is None) == (not is_of_faces)
    with pytest.raises(CheckpointError, match="not StableSR") as caught:
        convert_checkpoint(tmp_path / "weights.pth")
    assert report.description in str(caught.value) and "\n" not in str(caught.value)


def test_pipeline_folders_are_described_from_their_headers(tmp_path: Path, networks: dict[str, Any]) -> None:
    for name, network in networks.items():
        copy.deepcopy(network).half().save_pretrained(tmp_path / "pipeline" / name)
    DDPMScheduler(prediction_type="v_prediction").save_pretrained(tmp_path / "pipeline" / "scheduler")
    components = (f'"{name}": ["a", "b"]' for name in ("unet", "vae", "scheduler"))
    index = f'{{"_class_name": "X", {", ".join(components)}, "text_encoder": [null, null]'
    (tmp_path / "pipeline" / "model_index.json").write_text(index + "}")
    report = inspect_checkpoint(tmp_path / "pipeline")
    assert report.kind == "base" and report.dtypes == ("F16",)
    assert report.parts == {
        name: sum(parameter.numel() for parameter in networks[name].parameters()) for name in ("unet", "vae")
    }
    assert report.prediction is not None and report.prediction.type == "v_prediction"
    (tmp_path / "pipeline" / "model_index.json").write_text(index + ', "adapter": ["a", "b"], "cfw": ["a", "b"]}')
    report = inspect_checkpoint(tmp_path / "pipeline")
    assert report.kind == "pipeline" and "stablesr restore" in str(report) and "adapter" in report.parts


def test_folders_and_files_of_no_kind_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model_index.json").write_text("{")
    (tmp_path / "listed").mkdir()
    (tmp_path / "listed" / "model_index.json").write_text("[]")
    (tmp_path / "empty").mkdir()
    torch.save({"epoch": 3}, tmp_path / "nothing.ckpt")
    for name, message in (
        ("broken", "not JSON"),
        ("listed", "a JSON list"),
        ("empty", "no model_index.json"),
        ("nothing.ckpt", "holds no tensors by name; found epoch"),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            inspect_checkpoint(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_checkpoints_that_only_look_like_stable_diffusion_are_named(tmp_path: Path, state: dict[str, Tensor]) -> None:
    for tensors, message in (
        ({"model.diffusion_model.joint_blocks.0.weight": torch.ones(2)}, r"lacks input_blocks\.0\.0\.weight"),
        (state | {"model.diffusion_model.label_emb.0.0.weight": torch.ones(2, 2)}, "class conditioning"),
        (state | {"first_stage_model.decoder.conv_in.weight": torch.ones(2)}, "incomplete"),
        ({name: tensor for name, tensor in state.items() if "model.encoder" not in name}, "no encoder"),
        ({"state": torch.ones(1)} | {f"x{i}.lora_up.weight": torch.ones(1) for i in range(2)}, "a LoRA"),
    ):
        save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, tmp_path / "x.safetensors")
        with pytest.raises(CheckpointError, match=message) as caught:
            convert_checkpoint(tmp_path / "x.safetensors", hints=Hints(text_heads=2))
        assert "\n" not in str(caught.value)


def test_saying_what_a_file_is_takes_neither_diffusers_nor_transformers(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    code = (
        "import sys; from stablesr_kit.checkpoints import inspect_checkpoint; inspect_checkpoint(sys.argv[1]);"
        "print([name for name in ('diffusers', 'transformers', 'accelerate') if name in sys.modules])"
    )
    file = saved(state, tmp_path / "stablesr.ckpt")
    run = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
