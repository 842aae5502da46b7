"""CodeFormer's own promises, at a tiny size: each face's w, half precision, who chooses the codes, a copied VQGAN."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stablesr_kit import CodeFormerPipeline
from stablesr_kit.models.codeformer import CodeAttention, CodeFormer, CodeLookup
from stablesr_kit.models.vqgan import VQGAN
from tests.helpers.official_layout import randomize
from tests.helpers.offloads import OFFLOADS
from tests.helpers.tiny import TINY_FACE_PX, tiny_codeformer, unit_noise


@pytest.fixture
def network() -> CodeFormer:
    return randomize(tiny_codeformer(fuse_sizes=(16, 32)), 1).eval().requires_grad_(False)


def faces(count: int) -> Tensor:
    return unit_noise(count, 3, TINY_FACE_PX, TINY_FACE_PX).tanh()


def test_every_face_of_a_batch_has_its_own_w(network: CodeFormer) -> None:
    w = torch.tensor([0.0, 0.3, 1.0])
    together = network(faces(3), w, adain=True).image
    for i, own in enumerate(w.tolist()):
        alone = network(faces(3)[i : i + 1], own, adain=True).image
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=0)
    assert not torch.equal(together, network(faces(3), 0.3, adain=True).image)


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("code_lookup", ["transformer", "nearest"])
@torch.no_grad()
def test_an_offloaded_codeformer_restores_the_same_faces_to_the_bit(
    offload: str, code_lookup: CodeLookup, network: CodeFormer, tmp_path: Path
) -> None:
    expected = network(faces(2), 0.5, adain=True, code_lookup=code_lookup)
    OFFLOADS[offload](network, tmp_path)
    found = network(faces(2), 0.5, adain=True, code_lookup=code_lookup)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.image, expected.image)


@pytest.mark.parametrize("quantization", ["nearest", "gumbel"])
@pytest.mark.parametrize("offload", OFFLOADS)
@torch.no_grad()
def test_an_offloaded_vqgan_reconstructs_the_same_to_the_bit(offload: str, quantization: str, tmp_path: Path) -> None:
    shape = {"image_size": 32, "base_channels": 8, "channel_multipliers": (1, 2), "norm_num_groups": 4}
    vqgan = VQGAN(**shape, layers_per_block=1, codebook_size=12, code_channels=8, quantization=quantization)
    randomize(vqgan, 1).eval()
    image = unit_noise(2, 3, 32, 32).tanh()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = vqgan(image).image
        OFFLOADS[offload](vqgan, tmp_path)
        torch.manual_seed(0)
        assert torch.equal(vqgan(image).image, expected)


@torch.no_grad()
def test_attention_has_the_keys_and_numbers_of_torchs_own() -> None:
    theirs = torch.nn.MultiheadAttention(16, 4, batch_first=True).eval()
    ours = CodeAttention(16, 4)
    ours.load_state_dict(randomize(theirs, 1).state_dict())
    queries, values = unit_noise(2, 9, 16), unit_noise(2, 9, 16, seed=1)
    expected, _ = theirs(queries, queries, values, need_weights=False)
    torch.testing.assert_close(ours(queries, values), expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_in_float16_the_decoder_and_what_is_fused_into_it_do_not_overflow(network: CodeFormer) -> None:
    network.vqgan.decoder.levels[-1].resnets[0].conv2.weight.mul_(3e4)
    exact = CodeFormerPipeline(network).restore(faces(2), 0.5)
    half = CodeFormerPipeline(copy.deepcopy(network).half())
    assert not half.codeformer(faces(2).half(), 0.5).image.isfinite().all()
    found = half.restore(faces(2), 0.5)
    assert (found - exact).abs().mean() < 0.05 * exact.std()
    assert {parameter.dtype for parameter in half.codeformer.parameters()} == {torch.float16}


def test_half_precision_predicts_nearly_the_same_codes_and_decodes_the_same_ones_nearly_alike(
    network: CodeFormer,
) -> None:
    exact = network(faces(4), 0.5)
    decoded = network.vqgan.decode(network.vqgan.quantizer.lookup(exact.indices))
    half = network.bfloat16()(faces(4).bfloat16(), 0.5)
    assert half.image.dtype == torch.bfloat16
    assert (half.indices == exact.indices).float().mean() > 0.9
    again = network.vqgan.decode(network.vqgan.quantizer.lookup(exact.indices)).float()
    assert (again - decoded).abs().mean() < 0.05 * decoded.std()


def test_the_nearest_codes_are_those_of_the_autoencoder_and_need_no_transformer(network: CodeFormer) -> None:
    output = network(faces(2), 0.5, code_lookup="nearest")
    z, _ = network.vqgan.encoder(faces(2))
    codebook = network.vqgan.quantizer.codebook.weight
    distances = torch.cdist(z.permute(0, 2, 3, 1).flatten(1, 2), codebook)
    assert torch.equal(output.indices.flatten(1), distances.argmin(-1))
    assert output.logits is None
    torch.nn.init.zeros_(network.to_logits.weight)
    assert torch.equal(network(faces(2), 0.5, code_lookup="nearest").image, output.image)
    assert not torch.equal(network(faces(2), 0.5).indices, output.indices)


def test_at_w_0_the_nearest_codes_decode_to_the_autoencoders_reconstruction(network: CodeFormer) -> None:
    image = network(faces(2), 0.0, code_lookup="nearest").image
    torch.testing.assert_close(image, network.vqgan(faces(2)).image, atol=1e-4, rtol=0)


def test_a_codeformer_around_a_vqgan_is_a_copy_of_it() -> None:
    shape = {"image_size": 32, "base_channels": 8, "channel_multipliers": (1, 2), "norm_num_groups": 4}
    vqgan = randomize(VQGAN(**shape, layers_per_block=1, codebook_size=12, code_channels=8), 1)
    before = {name: tensor.clone() for name, tensor in vqgan.state_dict().items()}
    network = CodeFormer.from_vqgan(vqgan, dim=16, num_heads=2, num_layers=1, fuse_sizes=(16,))
    assert {**vqgan.config}.items() >= {name: network.config[name] for name in shape}.items()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1)
    for name, tensor in vqgan.state_dict().items():
        assert torch.equal(tensor, before[name]), name
        torch.testing.assert_close(network.vqgan.state_dict()[name], tensor + 1)


def test_a_vqgan_that_draws_its_codes_cannot_be_built_around() -> None:
    vqgan = VQGAN(
        image_size=32, base_channels=8, channel_multipliers=(1, 2), norm_num_groups=4, codebook_size=4,
        code_channels=8, layers_per_block=1, quantization="gumbel",
    )  # fmt: skip
    with pytest.raises(ValueError, match="'gumbel' is given, expected 'nearest'"):
        CodeFormer.from_vqgan(vqgan)
