"""`stablesr convert` and `stablesr inspect`: official layouts of every family in, folders that load out."""

import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from skimage import data

from stablesr_kit.checkpoints.codeformer import FaceNetwork
from stablesr_kit.models.codeformer import CodeFormer
from stablesr_kit.models.discriminators import VQGANDiscriminator
from stablesr_kit.models.vqgan import VQGAN
from stablesr_kit.pipelines.codeformer import CodeFormerPipeline
from tests.helpers import official_layout
from tests.helpers.cli_runs import error_lines, stablesr
from tests.helpers.tiny import tiny_pipeline


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small StableSR and its CFW in the official layout, a pickle with code in it, and a file of another kind."""
    folder = tmp_path_factory.mktemp("checkpoints")
    networks = official_layout.tiny_networks()
    state = official_layout.official_checkpoint(networks, official_layout.tiny_text_encoder())
    torch.save({"state_dict": state}, folder / "stablesr_000117.ckpt")
    torch.save({"state_dict": official_layout.official_cfw_checkpoint(networks)}, folder / "vqgan_cfw_00011.ckpt")
    torch.save({"state_dict": state, "callback": print}, folder / "code.ckpt")
    (folder / "notes.txt").write_text("not weights")
    return folder


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.radial_gradient("L").convert("RGB").resize((13, 10)).save(path)
    return path


def test_inspect_says_what_a_file_or_folder_is(checkpoints: Path, tmp_path: Path) -> None:
    result = stablesr("inspect", checkpoints / "stablesr_000117.ckpt")
    assert result.exit_code == 0
    assert "a complete StableSR checkpoint" in result.stdout
    assert "stablesr convert stablesr_000117.ckpt -o DIR" in result.stdout
    tiny_pipeline(with_text=False).save_pretrained(tmp_path / "tiny")
    assert "a StableSR pipeline folder" in stablesr("inspect", tmp_path / "tiny").stdout


def test_convert_makes_a_folder_that_restores(checkpoints: Path, picture: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models" / "converted"
    cfw = checkpoints / "vqgan_cfw_00011.ckpt"
    result = stablesr("convert", checkpoints / "stablesr_000117.ckpt", "--cfw", cfw, "-o", folder)
    assert error_lines(result) == []
    assert result.stdout == f"converted: {folder}\n"
    assert os.listdir(tmp_path / "models") == ["converted"]
    restored = stablesr("restore", picture, "--steps", 2, "--model", folder, "-o", tmp_path / "restored.png")
    assert restored.exit_code == 0
    assert Image.open(tmp_path / "restored.png").size == (52, 40)

    again = stablesr("convert", checkpoints / "stablesr_000117.ckpt", "-o", folder)
    assert again.exit_code == 2
    assert error_lines(again) == [f"error: -o {folder} exists; choose a new or an empty folder"]


def test_convert_says_what_it_leaves_out_and_why(
    checkpoints: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = torch.load(checkpoints / "stablesr_000117.ckpt", weights_only=True)
    content["state_dict"] |= {"loss.logvar": torch.zeros(1), "mine": torch.zeros(1)}
    torch.save({**content, "global_step": 117}, tmp_path / "trained.ckpt")
    convert = ("convert", tmp_path / "trained.ckpt", "--ignore", "mine", "-o", tmp_path / "converted")
    assert stablesr(*convert).exit_code == 0
    said = [record.message for record in caplog.records if record.message.startswith("left out: ")]
    for name, reason in (
        ("global_step", "beside the weights in 'state_dict'"),
        ("betas", "the noise schedule, which the scheduler computes"),
        ("loss.logvar", "LPIPS, discriminator and weights of the loss of CFW training"),
        ("mine", "ignored as asked"),
    ):
        lines = [line for line in said if line.endswith(f": {reason}")]
        assert len(lines) == 1 and name in lines[0], name


def test_without_cfw_only_w_0_is_left(checkpoints: Path, picture: Path, tmp_path: Path) -> None:
    folder = tmp_path / "converted"
    assert stablesr("convert", checkpoints / "stablesr_000117.ckpt", "-o", folder).exit_code == 0
    restore = ("restore", picture, "--steps", 2, "--model", folder, "-o", tmp_path / "restored.png")
    result = stablesr(*restore)
    assert result.exit_code == 2
    assert error_lines(result)[0].startswith(
        "error: --w 0.5 needs feature wrapping (CFW), which this model lacks; give --w 0"
    )
    assert stablesr(*restore, "--w", 0).exit_code == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("code.ckpt", "code.ckpt needs more than tensors"),
        ("notes.txt", "notes.txt is not a weight file"),
        ("missing.ckpt", "cannot be read"),
        ("vqgan_cfw_00011.ckpt", "give it as cfw"),
    ],
)
def test_what_cannot_be_converted_is_one_line_and_leaves_nothing(
    name: str, message: str, checkpoints: Path, tmp_path: Path
) -> None:
    result = stablesr("convert", checkpoints / name, "-o", tmp_path / "converted")
    assert result.exit_code == 1
    lines = error_lines(result)
    assert len(lines) == 1
    assert message in lines[0]
    assert list(tmp_path.iterdir()) == []
    if name != "vqgan_cfw_00011.ckpt":
        assert (stablesr("inspect", checkpoints / name).exit_code, list(tmp_path.iterdir())) == (1, [])


def test_a_surplus_tensor_may_be_ignored_by_name(checkpoints: Path, tmp_path: Path) -> None:
    content = torch.load(checkpoints / "stablesr_000117.ckpt", weights_only=True)
    content["state_dict"]["surprise.weight"] = torch.zeros(1)
    torch.save(content, tmp_path / "surplus.ckpt")
    convert = ("convert", tmp_path / "surplus.ckpt", "-o", tmp_path / "converted")
    assert "surprise.weight" in error_lines(stablesr(*convert))[0]
    assert stablesr(*convert, "--ignore", "surprise(").exit_code == 2
    assert stablesr(*convert, "--ignore", r"surprise\..*").exit_code == 0


VQGAN_SHAPE = {"image_size": 128, "base_channels": 32, "channel_multipliers": (1, 1, 1, 1), "layers_per_block": 1}
FACES = {
    "codeformer.pth": lambda: CodeFormer(**VQGAN_SHAPE, dim=16, num_layers=1, codebook_size=1024, fuse_sizes=(32,)),
    "codeformer_inpainting.pth": lambda: CodeFormer(
        **VQGAN_SHAPE, dim=16, num_layers=1, codebook_size=512, fuse_sizes=(32, 64, 128)
    ),
    "codeformer_colorization.pth": lambda: CodeFormer(
        **VQGAN_SHAPE, dim=16, num_layers=1, codebook_size=1024, fuse_sizes=(32, 64, 128)
    ),
    "vqgan_code1024.pth": lambda: VQGAN(**VQGAN_SHAPE),
    "vqgan_discriminator.pth": lambda: VQGANDiscriminator(base_channels=8, num_layers=2),
}
"""Small networks of the shapes that tell the released ones apart."""


def official_file(name: str, folder: Path) -> tuple[Path, FaceNetwork]:
    """A file in the official layout, and the network it holds."""
    network = official_layout.randomize(FACES[name](), 1).eval()
    wrapper = "params_d" if "discriminator" in name else "params_ema"
    torch.save({wrapper: official_layout.official_faces(network)}, folder / name)
    return folder / name, network


@pytest.mark.parametrize("name", FACES)
def test_a_file_of_codeformers_family_is_described_and_becomes_a_folder_with_its_weights(
    name: str, tmp_path: Path
) -> None:
    path, network = official_file(name, tmp_path)
    told = stablesr("inspect", path).stdout
    assert f"stablesr convert --codeformer {name} -o DIR" in told
    result = stablesr("convert", "--codeformer", path, "-o", tmp_path / "converted")
    assert (result.stdout, result.stderr) == (f"converted: {tmp_path / 'converted'}\n", "")
    about = stablesr("inspect", tmp_path / "converted").stdout
    if isinstance(network, CodeFormer):
        pipeline = CodeFormerPipeline.from_pretrained(tmp_path / "converted")
        tasks = {"codeformer_inpainting.pth": "inpaint", "codeformer_colorization.pth": "colorize"}
        assert pipeline.config.task == tasks.get(name, "restore")
        loaded: FaceNetwork = pipeline.codeformer
        assert f"made to {pipeline.config.task} faces" in about and "stablesr faces PHOTO" in about
        for field in (f"codebook_size {network.config.codebook_size}", "image_size 128", "channel_multipliers 1-1-1-1"):
            assert field in told and field in about
        assert f"fuse_sizes {'-'.join(map(str, network.config.fuse_sizes))}" in told
    else:
        loaded = type(network).from_pretrained(tmp_path / "converted")
        assert f"a folder of {type(network).__name__}" in about
    for key, tensor in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key


def test_a_codeformer_beside_stablesr_is_found_by_the_commands(checkpoints: Path, tmp_path: Path) -> None:
    faces, _ = official_file("codeformer.pth", tmp_path)
    convert = ("convert", checkpoints / "stablesr_000117.ckpt", "--codeformer", faces)
    assert error_lines(stablesr(*convert, "-o", tmp_path / "both")) == []
    photo = tmp_path / "photo.png"
    Image.fromarray(data.astronaut()[20:276, 120:376]).resize((64, 64), Image.Resampling.BOX).save(photo)
    restore = (
        "restore",
        photo,
        "-o",
        tmp_path / "out.png",
        "--scale",
        1,
        "--w",
        0,
        "--steps",
        2,
        "--face",
        "codeformer",
    )
    result = stablesr(*restore, "--model", tmp_path / "both")
    assert result.exit_code == 0, result.stderr
    assert f"{photo}: " in result.stdout and "face" in result.stdout
    aligned = stablesr("faces", photo, "-o", tmp_path / "face.png", "--mode", "aligned", "--model", tmp_path / "both")
    assert aligned.exit_code == 0, aligned.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ((), 2, "nothing is given to convert"),
        (("--codeformer", "{faces}", "--cfw", "{faces}"), 2, "--cfw belongs to a diffusion checkpoint"),
        (("--codeformer", "{stablesr}"), 1, "expected codeformer.pth, one of its relatives"),
        (("{stablesr}", "--codeformer", "{faces}"), 1, "is a VQGAN alone, expected a CodeFormer"),
        (("{faces}",), 1, "give it as --codeformer"),
    ],
)
def test_faces_in_the_wrong_place_are_refused_in_one_line(
    arguments: tuple[str, ...], status: int, said: str, checkpoints: Path, tmp_path: Path
) -> None:
    (tmp_path / "files").mkdir()
    faces, _ = official_file("vqgan_code1024.pth", tmp_path / "files")
    given = [text.format(faces=faces, stablesr=checkpoints / "stablesr_000117.ckpt") for text in arguments]
    result = stablesr("convert", *given, "-o", tmp_path / "converted")
    assert result.exit_code == status
    (line,) = error_lines(result)
    assert said in line
    assert [path.name for path in tmp_path.iterdir()] == ["files"]
