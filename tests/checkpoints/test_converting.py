"""Official checkpoints become components: same hyperparameters, same outputs, nothing lost without a word."""

import functools
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from safetensors.torch import save_file
from torch import Tensor

from stablesr_kit.checkpoints import Hints, canonicalize, read_checkpoint
from stablesr_kit.checkpoints import convert_checkpoint as convert_with_measuring
from stablesr_kit.checkpoints.converting import convert
from stablesr_kit.checkpoints.networks import embed_empty_prompt
from stablesr_kit.errors import CheckpointError
from stablesr_kit.models.feature_wrapping import decode_with_features, encode_with_features
from stablesr_kit.models.steering import make_steerable
from tests.helpers import official_layout as official

HINTS = Hints(unet_head_channels=8, encoder_heads=4, text_heads=2)

# Measuring what the UNet predicts takes two passes, and has tests of its own.
convert_checkpoint = functools.partial(convert_with_measuring, prediction_type="epsilon")

VARIANTS: dict[str, dict[str, Any]] = {
    "as small as it gets": {},
    "two blocks per level": {"layers": 2, "widths": (32, 64, 64), "has_attention": (True, True, False)},
    "attention at the middle level only": {"widths": (32, 32, 64), "has_attention": (False, True, False)},
    "attention at every level": {"widths": (32, 64), "has_attention": (True, True)},
    "four levels, wide heads": {
        "widths": (32, 32, 32, 64),
        "has_attention": (True, True, True, False),
        "head_channels": 16,
        "layers": 2,
        "encoder_heads": 2,
    },
    "convolutional projections": {"linear": False},
    "one encoder head": {"encoder_heads": 1},
}


def outputs(components: dict[str, Any]) -> dict[str, Tensor]:
    """What the networks do with fixed inputs."""
    generator = torch.Generator().manual_seed(7)
    latents, image = torch.randn(1, 4, 16, 24, generator=generator), torch.rand(1, 3, 32, 48, generator=generator)
    context = torch.randn(1, 5, components["unet"].config.cross_attention_dim, generator=generator)
    levels = components["cfw"].config.levels
    with torch.no_grad():
        sft = components["adapter"](latents, 417)
        posterior, features = encode_with_features(components["vae"], image, levels)
        make_steerable(components["unet"])
        return {
            "unet": components["unet"](latents, 417, context).sample,
            "steered unet": components["unet"](latents, 417, context, timestep_cond=sft).sample,
            "posterior": posterior.parameters,
            "decoded": decode_with_features(components["vae"], components["cfw"], posterior.mode(), features, 0.5),
        }


def plain(config: Any) -> dict[str, Any]:
    """A config as its JSON would be read back."""
    fields = {name: value for name, value in config.items() if not name.startswith("_")}
    return json.loads(json.dumps(fields))


def save(state: dict[str, Tensor], path: Path, **beside: object) -> Path:
    torch.save({"state_dict": state, **beside}, path)
    return path


@pytest.fixture(scope="module")
def networks() -> dict[str, Any]:
    return official.tiny_networks()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, networks: dict[str, Any]) -> dict[str, Path]:
    """The same small model in every layout it may come in."""
    tmp_path = tmp_path_factory.mktemp("official")
    state = official.official_checkpoint(networks, official.tiny_text_encoder())
    extract = {name: tensor for name, tensor in state.items() if ".spade." in name or name.startswith("structcond")}
    sd = {name: tensor for name, tensor in state.items() if name not in extract}
    cfw = official.official_cfw_checkpoint(networks)
    paths = {"extract": tmp_path / "webui_extract.ckpt", "safetensors": tmp_path / "stablesr.safetensors"}
    torch.save(extract, paths["extract"])
    save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, paths["safetensors"])
    return paths | {
        "full": save(state, tmp_path / "stablesr_000117.ckpt", epoch=117, global_step=16500),
        "sd": save(sd, tmp_path / "v2-1_512-ema-pruned.ckpt"),
        "cfw": save(cfw, tmp_path / "vqgan_cfw_00011.ckpt"),
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_round_trip_keeps_hyperparameters_and_outputs(tmp_path: Path, variant: str) -> None:
    networks = official.tiny_networks(**VARIANTS[variant])
    full = save(official.official_checkpoint(networks), tmp_path / "stablesr_000117.ckpt")
    cfw = save(official.official_cfw_checkpoint(networks), tmp_path / "cfw.ckpt")
    hints = Hints(
        unet_head_channels=VARIANTS[variant].get("head_channels", 8),
        encoder_heads=VARIANTS[variant].get("encoder_heads", 4),
    )
    converted = convert_checkpoint(full, cfw=cfw, hints=hints)
    for name, network in networks.items():
        assert plain(network.config) == plain(converted[name].config), name
    expected = outputs(networks)
    for name, output in outputs(converted).items():
        assert (output - expected[name]).abs().max() <= 2e-5 * expected[name].abs().max(), name


def test_unet_and_autoencoder_are_converted_as_diffusers_converts_them(networks: dict[str, Any]) -> None:
    """An independent implementation of the two renamings."""
    for their_converter, network, state in (
        (convert_ldm_unet_checkpoint, networks["unet"], official.official_unet(networks["unet"])),
        (convert_ldm_vae_checkpoint, networks["vae"], official.official_vae(networks["vae"])),
    ):
        theirs, ours = their_converter(state, network.config), network.state_dict()
        assert theirs.keys() == ours.keys()
        for name, tensor in ours.items():
            assert torch.equal(theirs[name], tensor), name


@pytest.mark.parametrize("layout", ["full", "safetensors", "extract and checkpoint", "extract and folder"])
def test_every_layout_of_one_model_gives_the_same_pipeline(
    tmp_path: Path, files: dict[str, Path], networks: dict[str, Any], layout: str
) -> None:
    if layout == "extract and folder":
        base: Path | None = tmp_path / "base"
        for name in ("unet", "vae"):
            networks[name].save_pretrained(tmp_path / "base" / name)
        DDPMScheduler(prediction_type="epsilon").save_pretrained(tmp_path / "base" / "scheduler")
    else:
        base = files["sd"] if layout == "extract and checkpoint" else None
    main = files["extract" if base else layout]
    converted = convert_checkpoint(main, cfw=files["cfw"], base=base, hints=HINTS)
    expected = outputs(networks)
    for name, output in outputs(converted).items():
        assert (output - expected[name]).abs().max() <= 2e-5 * expected[name].abs().max(), name
    assert isinstance(converted["unet"], UNet2DConditionModel) and isinstance(converted["vae"], AutoencoderKL)


def test_weights_in_half_precision_become_float32_or_what_is_asked(tmp_path: Path, networks: dict[str, Any]) -> None:
    state = {name: tensor.half() for name, tensor in official.official_checkpoint(networks).items()}
    full = save(state, tmp_path / "stablesr_000117.ckpt")
    assert convert_checkpoint(full, hints=HINTS)["adapter"].dtype == torch.float32
    converted = convert_checkpoint(full, hints=HINTS, dtype=torch.bfloat16)
    for name in ("unet", "adapter", "vae"):
        assert {parameter.dtype for parameter in converted[name].parameters()} == {torch.bfloat16}, name


def test_without_cfw_the_pipeline_has_none(files: dict[str, Path]) -> None:
    assert convert_checkpoint(files["full"], hints=HINTS)["cfw"] is None


def test_the_empty_prompt_is_stored_and_the_last_layer_of_open_clip_unused(files: dict[str, Path]) -> None:
    converted = convert_checkpoint(files["full"], hints=HINTS)
    text_encoder = official.tiny_text_encoder()
    tokens = torch.tensor([[58, 59, 0, 0, 0, 0, 0]])
    with torch.no_grad():
        expected = text_encoder(tokens)[0]
    assert torch.allclose(converted["adapter"].empty_prompt_embeds, expected, atol=1e-6)
    assert converted["text_encoder"].config.num_hidden_layers == text_encoder.config.num_hidden_layers


def test_the_text_encoder_of_stable_diffusion_1_pads_with_end(tmp_path: Path, networks: dict[str, Any]) -> None:
    text_encoder = official.tiny_text_encoder(act="quick_gelu")
    state = official.official_checkpoint(networks)
    for prefix in ("transformer.", "transformer.text_model."):
        text = {
            f"cond_stage_model.{prefix}{name.removeprefix('text_model.')}": tensor
            for name, tensor in text_encoder.state_dict().items()
        }
        text[f"cond_stage_model.{prefix}embeddings.position_ids"] = torch.arange(7)[None]
        converted = convert_checkpoint(save(state | text, tmp_path / "stablesr_512.ckpt"), hints=HINTS)
        with torch.no_grad():
            expected = text_encoder(torch.tensor([[58, 59, 59, 59, 59, 59, 59]]))[0]
        assert torch.allclose(embed_empty_prompt(converted["text_encoder"]), expected, atol=1e-6)


def test_text_encoders_of_clips_size_come_with_its_tokenizer(tmp_path: Path, networks: dict[str, Any]) -> None:
    text_encoder = official.tiny_text_encoder(vocab=49408, length=77)
    state = official.official_checkpoint(networks, text_encoder)
    converted = convert_checkpoint(save(state, tmp_path / "stablesr_000117.ckpt"), hints=HINTS)
    tokens = converted["tokenizer"]("", padding="max_length", max_length=77).input_ids
    assert tokens == [49406, 49407] + [0] * 75
    assert converted["adapter"].empty_prompt_embeds.shape == (1, 77, text_encoder.config.hidden_size)


def test_running_averages_are_taken_on_request(tmp_path: Path, networks: dict[str, Any]) -> None:
    state = official.official_checkpoint(networks)
    averages = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): tensor + 1
        for name, tensor in state.items()
        if name.startswith("model.diffusion_model.")
    }
    averages |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(3)}
    full = save(state | averages, tmp_path / "stablesr_000117.ckpt")
    name = "conv_in.weight"
    plain, averaged = (convert_checkpoint(full, hints=HINTS, use_ema=use_ema)["unet"] for use_ema in (False, True))
    assert torch.equal(averaged.state_dict()[name], plain.state_dict()[name] + 1)
    with pytest.raises(CheckpointError, match="no running averages"):
        convert_checkpoint(save(state, tmp_path / "plain.ckpt"), hints=HINTS, use_ema=True)


@pytest.mark.parametrize(
    ("victim", "part"),
    [
        ("model.diffusion_model.middle_block.1.proj_in.weight", "UNet"),
        ("model.diffusion_model.output_blocks.0.0.spade.mlp_beta.bias", "adapter"),
        ("structcond_stage_model.fea_tran.1.emb_layers.1.weight", "adapter"),
        ("first_stage_model.decoder.mid.attn_1.k.weight", "autoencoder"),
        ("cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias", "text encoder"),
    ],
)
def test_missing_surplus_and_misshapen_tensors_are_named(
    tmp_path: Path, networks: dict[str, Any], victim: str, part: str
) -> None:
    state = official.official_checkpoint(networks, official.tiny_text_encoder())
    path = tmp_path / "stablesr_000117.ckpt"
    for broken, problem in (
        ({name: tensor for name, tensor in state.items() if name != victim}, "missing"),
        (state | {f"{victim}.extra": torch.ones(1)}, "not understood"),
        (state | {victim: state[victim][:-1]}, "other shapes than expected"),
    ):
        with pytest.raises(CheckpointError, match=f"{part}: {problem}.*{victim}") as caught:
            convert_checkpoint(save(broken, path), hints=HINTS)
        assert "\n" not in str(caught.value)


def test_surplus_tensors_outside_the_networks_are_named_and_may_be_allowed(
    tmp_path: Path, networks: dict[str, Any]
) -> None:
    full = save(
        official.official_checkpoint(networks) | {"my_head.weight": torch.ones(2)}, tmp_path / "stablesr_000117.ckpt"
    )
    with pytest.raises(CheckpointError, match=r"not understood: my_head\.weight"):
        convert_checkpoint(full, hints=HINTS)
    assert convert_checkpoint(full, hints=HINTS, ignore=[r"my_head\..*"])["adapter"] is not None
    state = official.official_checkpoint(networks) | {"structcond_stage_model.extra.weight": torch.ones(2)}
    full = save(state, tmp_path / "stablesr_000117.ckpt")
    assert convert_checkpoint(full, hints=HINTS, ignore=[r"structcond_stage_model\.extra\..*"])["adapter"] is not None


def test_an_error_about_many_tensors_is_short_but_complete(tmp_path: Path, networks: dict[str, Any]) -> None:
    state = official.official_checkpoint(networks)
    surplus = {f"my_head.{i}": torch.ones(1) for i in range(40)}
    with pytest.raises(CheckpointError, match="and 28 more") as caught:
        convert_checkpoint(save(state | surplus, tmp_path / "stablesr_000117.ckpt"), hints=HINTS)
    assert all(name in caught.value.__notes__[0] for name in surplus)


def test_files_in_the_wrong_place_are_told_where_they_belong(files: dict[str, Path]) -> None:
    for arguments, message in (
        ({"checkpoint": files["cfw"]}, r"an autoencoder with CFW.*--cfw"),
        ({"checkpoint": files["sd"]}, r"a Stable Diffusion 2\.x checkpoint.*--base"),
        ({"checkpoint": files["extract"]}, r"adapter alone.*--base"),
        ({"checkpoint": files["full"], "cfw": files["full"]}, "not CFW"),
        ({"checkpoint": files["full"], "base": files["sd"]}, "leave base"),
        ({"checkpoint": files["extract"], "base": files["cfw"]}, "expected a Stable Diffusion as base"),
        ({"checkpoint": files["extract"], "base": files["full"].parent}, "lacks scheduler, unet, vae"),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            convert_checkpoint(**arguments, hints=HINTS)
        assert "\n" not in str(caught.value)


def test_a_base_folder_that_cannot_be_read_is_named(tmp_path: Path, files: dict[str, Path]) -> None:
    for name in ("unet", "vae", "scheduler"):
        (tmp_path / "base" / name).mkdir(parents=True)
    for text in (None, "{"):
        if text is not None:
            (tmp_path / "base" / "scheduler" / "scheduler_config.json").write_text(text)
        with pytest.raises(CheckpointError, match="base cannot be read") as caught:
            convert_checkpoint(files["extract"], base=tmp_path / "base", hints=HINTS)
        assert "\n" not in str(caught.value)


def test_an_extract_does_not_go_onto_a_base_of_another_depth(tmp_path: Path, files: dict[str, Path]) -> None:
    other = official.tiny_networks(widths=(32, 32, 64), has_attention=(True, True, False))
    base = save(official.official_unet(other["unet"]) | official.official_vae(other["vae"]), tmp_path / "sd_512.ckpt")
    with pytest.raises(CheckpointError, match="adapter: no such network.*2 levels, the UNet has 3"):
        convert_checkpoint(files["extract"], base=base, hints=HINTS)
    wider = official.tiny_networks(widths=(64, 64))
    base = save(official.official_unet(wider["unet"]) | official.official_vae(wider["vae"]), tmp_path / "sd_512.ckpt")
    with pytest.raises(CheckpointError, match=r"adapter: other shapes.*input_blocks\.1\.0\.spade"):
        convert_checkpoint(files["extract"], base=base, hints=HINTS)


def test_an_autoencoder_that_differs_from_the_one_of_cfw_is_named(
    tmp_path: Path, files: dict[str, Path], networks: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    state = official.official_cfw_checkpoint(networks)
    half = save({name: tensor.half() for name, tensor in state.items()}, tmp_path / "half.ckpt")
    with caplog.at_level(logging.WARNING):
        convert_checkpoint(files["full"], cfw=half, hints=HINTS)
    assert not [record for record in caplog.records if "autoencoder" in record.message]
    name = "decoder.conv_in.weight"
    other = save(state | {name: state[name] + 0.5}, tmp_path / "other.ckpt")
    with caplog.at_level(logging.WARNING):
        converted = convert_checkpoint(files["full"], cfw=other, hints=HINTS)
    assert "1 of " in caplog.text and name in caplog.text
    assert torch.equal(converted["vae"].decoder.conv_in.weight, state[name] + 0.5)


def test_a_conversion_in_the_stored_precision_copies_no_weight(files: dict[str, Path]) -> None:
    checkpoint = canonicalize(read_checkpoint(files["full"]))
    converted = convert(checkpoint, hints=HINTS, prediction_type="epsilon")
    for parameter, section, name in (
        (converted["unet"].conv_in.weight, "unet", "input_blocks.0.0.weight"),
        (converted["adapter"].conv_in.weight, "encoder", "input_blocks.0.0.weight"),
        (converted["vae"].decoder.mid_block.attentions[0].to_q.weight, "vae", "decoder.mid.attn_1.q.weight"),
    ):
        assert parameter.data_ptr() == checkpoint.sections[section][name].data_ptr(), section
