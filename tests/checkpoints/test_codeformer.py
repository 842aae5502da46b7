"""Official files of CodeFormer's family: recognised, and every tensor placed."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from stablesr_kit.checkpoints import Hints
from stablesr_kit.checkpoints.codeformer import convert_face_checkpoint, load_official_faces
from stablesr_kit.errors import CheckpointError
from stablesr_kit.models.codeformer import CodeFormer
from stablesr_kit.models.discriminators import VQGANDiscriminator
from stablesr_kit.models.vqgan import VQGAN
from tests.helpers.official_layout import official_faces, randomize
from tests.helpers.official_weights import full_size_shapes

SMALL = {"image_size": 32, "base_channels": 32, "channel_multipliers": (1, 2), "codebook_size": 12, "code_channels": 32}


def small(kind: type, **config: object) -> CodeFormer | VQGAN | VQGANDiscriminator:
    return randomize(kind(**config), 1)


NETWORKS = {
    "codeformer": lambda: small(CodeFormer, **SMALL, dim=16, num_heads=4, num_layers=2, fuse_sizes=(16, 32)),
    "without fusion": lambda: small(CodeFormer, **SMALL, dim=16, num_heads=4, num_layers=1, fuse_sizes=()),
    "vqgan": lambda: small(VQGAN, **SMALL),
    "gumbel vqgan": lambda: small(VQGAN, **SMALL, quantization="gumbel"),
    "discriminator": lambda: small(VQGANDiscriminator, base_channels=8, num_layers=2),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("wrapper", ["params_ema", "params", "params_d", "net_g"])
def test_an_official_file_gives_back_the_network_it_was_made_from(name: str, wrapper: str, tmp_path: Path) -> None:
    network = NETWORKS[name]()
    official = {f"module.{key}": tensor for key, tensor in official_faces(network).items()}
    torch.save({wrapper: official}, tmp_path / "faces.pth")
    converted = convert_face_checkpoint(tmp_path / "faces.pth", hints=Hints(codeformer_heads=4))
    assert type(converted) is type(network)
    expected = {key: value for key, value in network.config.items() if not key.startswith("_")}
    assert {key: converted.config[key] for key in expected} == expected
    for key, tensor in network.state_dict().items():
        assert torch.equal(converted.state_dict()[key], tensor), key
    converted.save_pretrained(tmp_path / "saved")
    loaded = type(network).from_pretrained(tmp_path / "saved")
    assert all(torch.equal(loaded.state_dict()[key], tensor) for key, tensor in network.state_dict().items())


@pytest.mark.parametrize(
    ("part", "codebook_size", "fuse_sizes", "parameters"),
    [
        ("codeformer", 1024, (32, 64, 128, 256), 94_112_707),
        ("codeformer_inpainting", 512, (32, 64, 128), 92_652_867),
        ("codeformer_colorization", 1024, (32, 64, 128), 93_046_083),
    ],
)
def test_released_codeformers_are_placed_without_rest(
    part: str, codebook_size: int, fuse_sizes: tuple[int, ...], parameters: int
) -> None:
    network = on_meta(part)
    assert isinstance(network, CodeFormer)
    assert network.config.codebook_size == codebook_size
    assert network.config.fuse_sizes == fuse_sizes
    assert (network.config.dim, network.config.num_heads, network.config.num_layers) == (512, 8, 9)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


@pytest.mark.parametrize(
    ("part", "kind", "parameters"),
    [
        ("vqgan", VQGAN, 63_740_099),
        ("vqgan_gumbel", VQGAN, 64_003_267),
        ("vqgan_discriminator", VQGANDiscriminator, 6_960_961),
    ],
)
def test_released_autoencoder_and_discriminator_are_placed_without_rest(part: str, kind: type, parameters: int) -> None:
    network = on_meta(part)
    assert type(network) is kind
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


def test_a_missing_and_a_surplus_tensor_are_named() -> None:
    official = official_faces(NETWORKS["vqgan"]())
    lost = official.pop("generator.blocks.2.q.bias")
    with pytest.raises(CheckpointError, match=r"missing.*generator\.blocks\.2\.q\.bias"):
        load_official_faces(official)
    with pytest.raises(CheckpointError, match=r"not understood.*surplus"):
        load_official_faces(official | {"generator.blocks.2.q.bias": lost, "surplus": lost})


def on_meta(part: str) -> CodeFormer | VQGAN | VQGANDiscriminator:
    names: dict[str, Tensor] = {
        name: torch.empty(shape, device="meta") for name, shape in full_size_shapes(part).items()
    }
    return load_official_faces(names)
