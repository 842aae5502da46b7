"""Released one-step restorers, merged into stock networks: what they compute is what peft computes with their LoRAs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn

from stablesr_kit.checkpoints import Hints, convert_checkpoint, inspect_checkpoint
from stablesr_kit.checkpoints.one_step import convert_one_step
from stablesr_kit.errors import CheckpointError, UnsafeCheckpointError
from stablesr_kit.models.noise_predictor import NoisePredictor
from tests.helpers.tiny import tiny_text_encoder, tiny_tokenizer, tiny_unet, tiny_vae, unit_noise
from tests.parity import onestep

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # of the second adapter

LISTS = Path(__file__).parents[1] / "goldens" / "full_size"
PREDICTOR = {"block_out_channels": (8, 16), "layers_per_block": 1, "attention_head_dim": 4, "norm_num_groups": 4}
HINTS = Hints(noise_predictor_head_channels=4, noise_predictor_groups=4)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion folder."""
    folder = tmp_path_factory.mktemp("base")
    tiny_unet().save_pretrained(folder / "unet")
    tiny_vae().save_pretrained(folder / "vae")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    tiny_text_encoder(tokenizer).save_pretrained(folder / "text_encoder")
    DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(
        folder / "scheduler"
    )
    return folder


def targets(network: nn.Module, part: str = "") -> list[str]:
    """Layers of the network's part that can have a LoRA; in the released files all but those of the time embedding."""
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and name.startswith(part) and "time_emb" not in name
    ]


def with_loras(network: Any, ranks: Mapping[str, int], layers: list[str], **config: Any) -> dict[str, Tensor]:
    """Adapters of given ranks, by peft, on the network; returned is what its state dict has beyond the stock one."""
    for seed, (adapter, rank) in enumerate(ranks.items()):
        network.add_adapter(LoraConfig(r=rank, target_modules=layers, init_lora_weights="gaussian", **config), adapter)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in network.named_parameters():
            if f".lora_B.{adapter}." in name:
                parameter.data.normal_(std=0.1, generator=generator)
    network.set_adapters(list(ranks))
    return {name: tensor for name, tensor in network.state_dict().items() if ".lora_" in name}


def saved(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


def output(unet: UNet2DConditionModel) -> Tensor:
    with torch.no_grad():
        return unet(unit_noise(1, 4, 8, 8), 1, unit_noise(1, 12, 16, seed=1)).sample


def is_near(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 2e-5 * expected.abs().max())


def pisa(path: Path, ranks: tuple[int, int] = (4, 2)) -> tuple[Path, UNet2DConditionModel]:
    """A file of PiSA-SR's layout, and peft's UNet with both adapters on."""
    unet = tiny_unet()
    state = with_loras(unet, {"default_encoder_pix": ranks[0], "default_encoder_sem": ranks[1]}, targets(unet))
    content = {"lora_rank_unet_pix": ranks[0], "lora_rank_unet_sem": ranks[1], "state_dict_unet": state}
    return saved(content | {"unet_lora_encoder_modules_pix": targets(tiny_unet())}, path), unet


def test_both_loras_of_pisa_are_merged_whatever_their_ranks(base: Path, tmp_path: Path) -> None:
    path, peft_unet = pisa(tmp_path / "pisa_sr.pkl")
    converted = convert_one_step(path, base)
    assert type(converted["unet"]) is UNet2DConditionModel
    assert is_near(output(converted["unet"]), output(peft_unet))
    peft_unet.set_adapters(["default_encoder_pix"])
    assert is_near(output(converted["unet_pix"]), output(peft_unet))
    assert not is_near(output(converted["unet"]), output(converted["unet_pix"]))
    assert converted["unet"].state_dict().keys() == tiny_unet().state_dict().keys()


def test_a_lora_that_the_file_lists_but_lacks_is_named(base: Path, tmp_path: Path) -> None:
    path, _ = pisa(tmp_path / "pisa_sr.pkl")
    content = torch.load(path, weights_only=True)
    for side in "AB":
        del content["state_dict_unet"][f"conv_out.lora_{side}.default_encoder_pix.weight"]
    with pytest.raises(CheckpointError, match="listed, but missing: unet.conv_out.lora_A"):
        convert_one_step(saved(content, path), base)


def test_osediff_replaces_the_first_layer_and_changes_the_encoder(base: Path, tmp_path: Path) -> None:
    unet, vae = tiny_unet(), tiny_vae()
    with torch.no_grad():
        unet.conv_in.weight.add_(0.1), unet.conv_in.bias.add_(0.2)
    own = {f"conv_in.base_layer.{name}": value.clone() for name, value in unet.conv_in.state_dict().items()}
    of_unet = own | with_loras(unet, {"default_encoder": 4, "default_decoder": 4}, targets(unet))
    of_vae = with_loras(vae, {"default_encoder": 3}, [*targets(vae, "encoder"), "quant_conv"])
    content = {"rank_unet": 4, "rank_vae": 3, "state_dict_unet": of_unet, "state_dict_vae": of_vae}
    converted = convert_one_step(saved(content, tmp_path / "osediff.pkl"), base)
    assert is_near(output(converted["unet"]), output(unet))
    picture = unit_noise(1, 3, 16, 16)
    with torch.no_grad():
        ours, theirs = (one.encode(picture).latent_dist.parameters for one in (converted["vae"], vae))
        assert is_near(ours, theirs)
        assert not is_near(ours, tiny_vae().encode(picture).latent_dist.parameters)
    assert type(converted["vae"]) is AutoencoderKL


def hypir(path: Path, rank: int = 6) -> tuple[Path, UNet2DConditionModel]:
    unet = tiny_unet()
    layers = [name for name in targets(unet) if name != "conv_in"]
    return saved(with_loras(unet, {"default": rank}, layers, lora_alpha=rank), path), unet


def test_hypir_counts_its_lora_once_whatever_the_rank(base: Path, tmp_path: Path) -> None:
    path, peft_unet = hypir(tmp_path / "HYPIR_sd2.pth")
    assert is_near(output(convert_one_step(path, base)["unet"]), output(peft_unet))


def test_the_noise_predictor_of_invsr_is_loaded_by_hints(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = NoisePredictor(**PREDICTOR, temb_channels=16).eval()
    state = {f"module.encoder.{name}": tensor for name, tensor in network.state_dict().items()}
    path = saved({"state_dict": state}, tmp_path / "noise_predictor.pth")
    converted = convert_one_step(path, base, hints=HINTS)
    picture = unit_noise(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(converted["noise_predictor"](picture, 199), network(picture, 199))
    assert converted["default_prompt"].embeds.shape == (1, 12, 16)
    with pytest.raises(CheckpointError, match="give its own as hints"):
        convert_one_step(path, base)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra.lora_A.default.weight": torch.ones(6, 4)}, "not in the .*: extra.lora_A.default.weight"),
        ({"conv_in.weight": torch.ones(1)}, "not in the .*: conv_in.weight"),
        ({"conv_out.lora_B.default.weight": None}, "one half of a LoRA is missing: conv_out.weight"),
        ({"conv_out.lora_A.default.weight": torch.ones(6, 4, 3, 3)}, "other shapes than in the .*: conv_out.weight"),
    ],
)
def test_what_does_not_fit_is_named(base: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path, _ = hypir(tmp_path / "HYPIR_sd2.pth")
    state = torch.load(path, weights_only=True) | change
    saved({name: tensor for name, tensor in state.items() if tensor is not None}, path)
    with pytest.raises(CheckpointError, match=message) as caught:
        convert_one_step(path, base)
    assert "\n" not in str(caught.value)


def test_another_base_is_refused_with_the_right_ones_name(tmp_path: Path) -> None:
    path, _ = hypir(tmp_path / "HYPIR_sd2.pth")
    wrong = tmp_path / "sd1"
    tiny_unet(use_linear_projection=False, cross_attention_dim=24).save_pretrained(wrong / "unet")
    tiny_vae().save_pretrained(wrong / "vae")
    DDPMScheduler().save_pretrained(wrong / "scheduler")
    with pytest.raises(CheckpointError, match="Stable Diffusion 2.1 base"):
        convert_one_step(path, wrong)
    tiny_unet().save_pretrained(wrong / "unet")
    DDPMScheduler(prediction_type="v_prediction").save_pretrained(wrong / "scheduler")
    with pytest.raises(CheckpointError, match="predicts v_prediction"):
        convert_one_step(path, wrong)
    with pytest.raises(CheckpointError, match="lacks scheduler, unet, vae"):
        convert_one_step(path, tmp_path)


def test_each_is_recognised_by_its_keys_and_says_what_it_needs(base: Path, tmp_path: Path) -> None:
    for path, kind in (
        (pisa(tmp_path / "a.bin")[0], "pisa-sr"),
        (hypir(tmp_path / "b.bin")[0], "hypir"),
        (saved({"state_dict_unet": {"x.lora_A.default_others.weight": torch.ones(1)}}, tmp_path / "c.bin"), "osediff"),
        (saved({"encoder.time_embedding.linear_1.weight": torch.ones(1)}, tmp_path / "d.bin"), "invsr"),
    ):
        report = inspect_checkpoint(path)
        assert report.kind == kind and report.command is not None and "--base" in report.command
        assert "--base" in " ".join(report.missing)
        with pytest.raises(CheckpointError, match="not StableSR; give it alone"):
            convert_checkpoint(path)
    with pytest.raises(CheckpointError, match="not a one-step restorer"):
        convert_one_step(base / "unet" / "diffusion_pytorch_model.safetensors", base)


def test_a_file_that_would_run_code_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsafeCheckpointError):
        convert_one_step(saved({"state_dict_unet": {}, "run": print}, tmp_path / "pisa_sr.pkl"), base)


def test_full_size_files_are_used_up() -> None:
    """On the meta device: every tensor of the four released files has its place in Stable Diffusion 2.1."""
    quantities = list(onestep.check_key_lists(LISTS / "onestep"))
    assert len(quantities) == 8
    assert not [f"{name}: {found}" for name, found, tolerance in quantities if found > tolerance]
