"""CodeFormer's stages at a tiny size: they learn, leave alone what is frozen, survive being killed, and follow on."""

import json
import runpy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file

from stablesr_kit.errors import ImageError
from stablesr_kit.models.codeformer import CodeFormer
from stablesr_kit.models.vqgan import VQGAN
from stablesr_kit.pipelines.codeformer import CodeFormerPipeline
from stablesr_kit.pipelines.loading import resolve_model
from stablesr_kit.spaces import pixels_to_image
from stablesr_kit.training.data.sources import FolderPhotos
from stablesr_kit.training.losses.codebooks import fit_codes, revive_codes
from stablesr_kit.training.run.command_line import load_config
from stablesr_kit.training.run.config import RunConfig
from stablesr_kit.training.run.optimizers import learning_rate_schedule
from stablesr_kit.training.small import GraftedVQGAN, target_features
from tests.helpers.training_runs import (
    FACES,
    ROOT,
    assert_a_step_stays_the_same,
    assert_kills_change_nothing,
    assert_overfits,
    run_program,
    tiny,
    weights,
    working_folder,
)

STAGES = {
    "start_vqgan": ("start_vqgan", "vqgan"),
    "vqgan": ("train_vqgan", "vqgan"),
    "codeformer_stage2": ("train_codeformer", "codeformer"),
    "codeformer_stage3": ("train_codeformer", "codeformer"),
}
"""Tiny configs: the program that each is for, and the name of its result."""
GRAFTED = (
    "GraftedVQGAN.vqgan.encoder.",
    "GraftedVQGAN.vqgan.quantizer.",
    *(f"GraftedVQGAN.vqgan.decoder.{name}." for name in ("conv_in", "middle", "levels", "upsamplers")),
)
CODE_PREDICTION = (
    "CodeFormer.vqgan.encoder.",
    *(f"CodeFormer.{name}" for name in ("layers.", "norm_out.", "positions", "proj_in.", "to_logits.")),
)
FUSION = (*CODE_PREDICTION, "CodeFormer.fusions.")
"""Beginnings of the names of what is trained: of the levels between an autoencoder's, of stage II, and of stage III."""
OPTIONS = (
    ("train_vqgan", "VQGANConfig", "official/vqgan_512"),
    ("train_codeformer", "CodeFormerConfig", "official/codeformer_stage2"),
    ("train_codeformer", "CodeFormerConfig", "official/codeformer_stage3"),
    ("train_codeformer", "CodeFormerConfig", "official/codeformer_inpainting"),
    ("train_codeformer", "CodeFormerConfig", "official/codeformer_colorization"),
    ("start_vqgan", "StartConfig", "mini_faces/start"),
    ("train_vqgan", "VQGANConfig", "mini_faces/vqgan"),
    ("train_codeformer", "CodeFormerConfig", "mini_faces/codeformer_stage2"),
    ("train_codeformer", "CodeFormerConfig", "mini_faces/codeformer_stage3"),
    ("train_codeformer", "CodeFormerConfig", "mini_faces/codeformer_calm"),
)
"""Programs, their options, and configs that are too large to run here."""


def stage(config: str, *flags: str) -> list[str]:
    return tiny(STAGES[config][0], config, *flags)


@pytest.fixture(scope="module", autouse=True)
def folder(face_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working folder, with the results of every stage."""
    with working_folder(tmp_path_factory.mktemp("faces"), "TRAIN_FACES", **FACES) as folder:
        shutil.copytree(face_runs, folder / "runs")
        yield folder


def test_the_stages_end_in_a_codeformer_that_restores_faces() -> None:
    codeformer = CodeFormer.from_pretrained("runs/tiny/codeformer_stage3/codeformer").eval()
    face = pixels_to_image(np.asarray(Image.open("pictures/0.png")))
    with torch.no_grad():
        images = [codeformer(face, w).image for w in (0.0, 1.0)]
    assert all(image.shape == face.shape and image.isfinite().all() for image in images)
    assert not torch.equal(*images)


def test_a_trained_codeformer_becomes_a_pipeline_folder() -> None:
    trained = "runs/tiny/codeformer_stage3/codeformer"
    config = str(ROOT / "configs" / "mini_faces" / "pipeline.yaml")
    flags = ["--config", config, "--pretrained_codeformer", trained, "--output_dir", "assembled"]
    run_program("assemble_face_pipeline", *flags, "--fusion_scale", "0.5", "--max_enlargement", "1.5")
    before, after = weights(trained), weights("assembled/codeformer")
    for name, tensor in before.items():
        is_last = name.startswith("fusions") and ".merge." not in name and ".2." in name
        assert torch.equal((0.5 * tensor if is_last else tensor).half(), after[name])
    assert "_name_or_path" not in json.loads(Path("assembled/codeformer/config.json").read_text())
    pipeline = CodeFormerPipeline.from_pretrained("assembled", dtype=torch.float32)
    assert pipeline.max_enlargement == 1.5
    face = Image.open("pictures/0.png")
    assert pipeline(face).images[0].size == face.size


def test_quantiser_and_decoder_stay_those_of_stage_one() -> None:
    vqgan = weights("runs/tiny/vqgan/vqgan")
    frozen = {name for name in vqgan if name.startswith(("quantizer", "decoder"))}
    assert frozen
    for name in ("codeformer_stage2", "codeformer_stage3"):
        codeformer = weights(f"runs/tiny/{name}/codeformer")
        assert all(torch.equal(vqgan[key], codeformer[f"vqgan.{key}"]) for key in frozen)
        assert not torch.equal(vqgan["encoder.conv_in.weight"], codeformer["vqgan.encoder.conv_in.weight"])


def test_only_stage_three_moves_the_fusion_layers() -> None:
    torch.manual_seed(0)
    second, third = (weights(f"runs/tiny/codeformer_stage{i}/codeformer") for i in (2, 3))
    first = weights("runs/tiny/codeformer_stage2/checkpoint-2/codeformer")
    fusions = [name for name in second if name.startswith("fusions")]
    assert all(torch.equal(first[name], second[name]) for name in fusions)
    assert not any(torch.equal(second[name], third[name]) for name in fusions if name.endswith("2.weight"))


def test_a_grafted_vqgan_keeps_the_autoencoders_outer_levels() -> None:
    vae = load_file(resolve_model("mini") / "vae" / "diffusion_pytorch_model.safetensors")
    vqgan = weights("runs/tiny/start_vqgan/vqgan")
    assert torch.equal(
        vqgan["encoder.levels.1.resnets.0.conv1.weight"], vae["encoder.down_blocks.1.resnets.0.conv1.weight"].float()
    )
    assert torch.equal(vqgan["decoder.conv_out.weight"], vae["decoder.conv_out.weight"].float())


def test_the_outer_decoder_of_a_graft_reconstructs_from_the_autoencoders_features() -> None:
    vae = AutoencoderKL.from_pretrained(resolve_model("mini") / "vae", torch_dtype=torch.float32).eval()
    vqgan = VQGAN(
        image_size=64,
        base_channels=24,
        channel_multipliers=(1, 2, 4, 4),
        layers_per_block=1,
        attention_resolutions=(),
        norm_num_groups=1,
        codebook_size=8,
        code_channels=8,
    )
    image = 0.3 * pixels_to_image(np.asarray(Image.open("pictures/0.png").resize((64, 64))))
    graft = GraftedVQGAN(vqgan, vae, image)
    with torch.no_grad():
        h = target_features(vae, image)
        for i in range(graft.inner, graft.inner + graft.outer - 1):
            h = vqgan.decoder.levels[i + 1](vqgan.decoder.upsamplers[i](h))
        ours = vqgan.decoder.conv_out(vqgan.decoder.norm_out(h))
    assert (ours - image).square().mean() < 0.3 * image.var()


def test_a_folders_codes_are_those_of_its_faces_and_of_their_mirror_images() -> None:
    codes = load_file("runs/tiny/codes/codes.safetensors")
    assert set(codes) == {f"{i}/{kind}" for i in range(3) for kind in ("orig", "hflip")}
    vqgan = VQGAN.from_pretrained("runs/tiny/vqgan/vqgan").eval()
    face = pixels_to_image(np.asarray(Image.open("pictures/1.png")))
    with torch.no_grad():
        for kind, image in {"orig": face, "hflip": face.flip(-1)}.items():
            assert torch.equal(codes[f"1/{kind}"].long(), vqgan.encode(image).indices[0])


def test_stored_codes_train_the_same_weights_bit_by_bit() -> None:
    flags = ("--codes", "runs/tiny/codes/codes.safetensors", "--output_dir", "runs/stored")
    run_program(*tiny("train_codeformer", "codeformer_stage2", *flags))
    stored, computed = (weights(f"{folder}/codeformer") for folder in ("runs/stored", "runs/tiny/codeformer_stage2"))
    assert computed.keys() == stored.keys()
    assert all(torch.equal(computed[name], stored[name]) for name in computed)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--codes", "nothing.safetensors"], "codes=nothing.safetensors cannot be read"),
        (["--codes", "stale.safetensors"], "are not those of pretrained_vqgan"),
        (["--codes", "few.safetensors"], "has no codes in few.safetensors"),
        (["--codes", "runs/tiny/codes/codes.safetensors", "--use_usm", "true"], "a degradation changes its target"),
        (["--codes", "runs/tiny/codes/codes.safetensors", "--resolution", "16"], "has another size than resolution"),
        (["--codes", "runs/tiny/codes/codes.safetensors", "--photo_scales", "[1, 0.5]"], "leave out random_rotation"),
    ],
)
def test_codes_that_are_not_those_of_the_faces_are_refused_in_one_line(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = load_file("runs/tiny/codes/codes.safetensors")
    save_file({name: tensor + 1 for name, tensor in codes.items()}, "stale.safetensors")
    save_file({"other/orig": codes["0/orig"]}, "few.safetensors")
    with pytest.raises(SystemExit):
        run_program(*tiny("train_codeformer", "codeformer_stage2", *flags, "--output_dir", "runs/refused"))
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.parametrize(
    ("config", "quantity", "factor", "trained", "flags"),
    [
        ("start_vqgan", "feature", 0.75, GRAFTED, ["--codebook_fit_steps", "[2, 20]"]),
        ("vqgan", "pixel", 0.5, ("",), ["--adversarial_weight", "0", "--codebook_fit_steps", "[0, 10]"]),
        ("codeformer_stage2", "token", 0.4, CODE_PREDICTION, ["--lr_milestones", "[]"]),
        ("codeformer_stage3", "pixel", 0.75, FUSION, ["--codes_only_start", "200", "--adversarial_weight", "0"]),
    ],
    ids=[*STAGES],
)
def test_a_stage_overfits_three_faces_and_moves_only_what_it_trains(
    config: str, quantity: str, factor: float, trained: tuple[str, ...], flags: list[str]
) -> None:
    common = ["--train_batch_size", "3", "--learning_rate", "4e-3", "--random_flip", "false", *flags]
    assert_overfits(stage(config, *common), quantity, factor, *trained)


def test_a_step_is_the_same_however_its_samples_are_split_and_activations_kept() -> None:
    """Without the discriminator, whose batch norms see the batch, and with codes fitted before rounding differs: it may
    move a latent to another centre."""
    alone = ["--adversarial_weight", "0"]
    flags = {"vqgan": alone, "codeformer_stage3": alone, "start_vqgan": ["--codebook_fit_steps", "[0]"]}
    calls = {config: stage(config, "--max_train_steps", "3", *flags.get(config, [])) for config in STAGES}
    results = {config: result for config, (_, result) in STAGES.items()}
    assert_a_step_stays_the_same(calls, results)


@pytest.mark.parametrize("config", STAGES)
def test_a_run_killed_twice_ends_bitwise_as_if_it_had_not_been(config: str) -> None:
    assert_kills_change_nothing(stage(config), STAGES[config][1])


@pytest.mark.parametrize("config", STAGES)
def test_two_processes_killed_twice_end_as_if_they_had_not_been(config: str) -> None:
    assert_kills_change_nothing(stage(config, "--adam_epsilon", "1e-4"), STAGES[config][1], processes=2)


def test_the_sweep_over_w_measures_and_plots(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = ["--model", "runs/tiny/codeformer_stage3/codeformer", "--vqgan", "runs/tiny/vqgan/vqgan", "--w", "0", "1"]
    shown = ["--plot", "sweep.svg", "--sheet", "sheet.png", "--json"]
    call = [*tiny, "--faces", "pictures", "--degradation", "light", *shown]
    monkeypatch.setattr(sys, "argv", ["face_sweep", *call])
    runpy.run_module("benchmarks.face_sweep", run_name="__main__")
    report = json.loads(capsys.readouterr().out)
    assert report["faces"] == 3
    assert report["results"]["input"]["psnr_to_input"] == 100
    assert report["results"]["w=0"]["psnr_y"] != report["results"]["w=1"]["psnr_y"]
    assert set(report["code_accuracy"]) == {"transformer", "nearest"}
    assert Image.open("sheet.png").size == (6 * 32, 3 * 32)
    assert "</svg>" in Path("sweep.svg").read_text()


def test_without_a_trained_vqgan_there_are_no_targets(capsys: pytest.CaptureFixture[str]) -> None:
    config = ROOT / "configs" / "tiny" / "codeformer_stage2.yaml"
    for value, told in (("missing", "missing"), ("pictures", "pictures")):
        with pytest.raises(SystemExit):
            run_program(
                "train_codeformer", "--config", str(config), "--pretrained_vqgan", value, "--output_dir", "none"
            )
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert message.startswith("error:") and told in message and "VQGAN" in message


def test_an_unknown_pixel_loss_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_program(*stage("vqgan", "--pixel_loss", "l3", "--output_dir", "none"))
    assert (
        capsys.readouterr()
        .err.strip()
        .splitlines()[-1]
        .startswith("error: pixel_loss=l3 must be mse, l1 or reconstruction")
    )


def test_a_codeformer_of_another_vqgan_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_program(
            *stage("codeformer_stage3", "--pretrained_vqgan", "runs/tiny/start_vqgan/vqgan", "--output_dir", "none")
        )
    assert "another codebook" in capsys.readouterr().err


def test_stage_three_fuses_as_published() -> None:
    options = runpy.run_path(str(ROOT / "training" / "train_codeformer.py"))["CodeFormerConfig"]
    arguments = ["--config", str(ROOT / "configs/official/codeformer_stage3.yaml"), "--train_data_dir", "[faces]"]
    config = load_config(options, arguments)
    expected = {0: 1.0, 39_999: 1.0, 40_000: 1.3, 79_999: 1.3, 80_000: 0.0, 119_999: 0.0, 120_000: 0.0}
    assert {step: config.fidelity(step) for step in expected} == expected
    assert [step for step in range(120_000, 120_050) if config.fidelity(step)] == [120_014, 120_029, 120_044]


def test_a_spread_below_w_zero_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_program(*stage("codeformer_stage3", "--w_spread", "1.5", "--output_dir", "none"))
    assert "w_spread=1.5 must lie between 0 and w=1.0" in capsys.readouterr().err


@pytest.mark.parametrize(("program", "options", "name"), OPTIONS)
def test_the_options_of_large_runs_are_understood(program: str, options: str, name: str) -> None:
    kind = runpy.run_path(str(ROOT / "training" / f"{program}.py"))[options]
    config = load_config(kind, ["--config", str(ROOT / "configs" / f"{name}.yaml"), "--train_data_dir", "[faces]"])
    rates = [learning_rate_schedule(config, 1.0)(step) for step in (config.lr_warmup_steps, config.max_train_steps)]
    assert rates[0] == 1.0 > rates[1]


def test_multistep_halves_the_rate_at_every_milestone() -> None:
    config = RunConfig(
        output_dir="", max_train_steps=10, lr_scheduler="multistep", lr_milestones=(4, 6), lr_warmup_steps=0
    )
    schedule = learning_rate_schedule(config, 1.0)
    assert [schedule(step) for step in (0, 3, 4, 5, 6, 9)] == [1, 1, 0.5, 0.5, 0.25, 0.25]


def test_a_fitted_codebook_finds_the_centres_of_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0]])
    latents = (centres[:, None] + 0.01 * torch.randn(3, 50, 2, generator=generator)).flatten(0, 1)
    fitted = fit_codes(latents, 8, generator)
    assert torch.cdist(centres, fitted).min(dim=1).values.max() < 0.1


def test_codes_in_use_stay_and_dead_ones_move_onto_latents() -> None:
    codes, latents = torch.zeros(3, 2), torch.ones(5, 2)
    revived = revive_codes(codes, torch.tensor([2, 0, 1]), latents, torch.Generator().manual_seed(0))
    assert revived.tolist() == [[0, 0], [1, 1], [0, 0]]


def test_excluded_photographs_are_left_out(folder: Path) -> None:
    source = FolderPhotos([folder / "pictures"], excluded=["1.*"])
    assert [Path(source.name(i)).name for i in range(source.group_sizes[0])] == ["0.png", "2.png"]
    with pytest.raises(ImageError, match="excluded"):
        FolderPhotos([folder / "pictures"], excluded=["*"])
