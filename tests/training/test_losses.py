"""Pixel, adversarial and codebook losses against formulas written out or computed by torch in another way."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stablesr_kit.models.vqgan import NearestQuantizer
from stablesr_kit.training.losses.codebooks import code_token_loss, commitment_loss
from stablesr_kit.training.losses.pictures import (
    HINGE,
    PIXEL_LOSSES,
    adaptive_adversarial_weight,
    feature_matching_loss,
    flat_loss,
    lattice_loss,
    reconstruction_loss,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_pixel_losses_are_means_over_every_number() -> None:
    image, target = random(2, 3, 4, 5), random(2, 3, 4, 5, seed=1)
    error = image - target
    assert PIXEL_LOSSES["mse"](image, target).item() == pytest.approx(error.square().sum().item() / 120, rel=1e-6)
    assert PIXEL_LOSSES["l1"](image, target).item() == pytest.approx(error.abs().sum().item() / 120, rel=1e-6)


def test_reconstruction_loss_is_zero_for_equal_pictures_and_sees_a_colour_cast() -> None:
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    cast = image.clone()
    cast[:, 0] += 0.1
    assert reconstruction_loss(image, image) == 0
    # L1 0.1 / 3; halves of: no gradient, colour 0.1 / 2, block means 0.1 / 3
    assert reconstruction_loss(cast, image).item() == pytest.approx(0.1 / 3 + 0.5 * (0.1 / 2 + 0.1 / 3), rel=1e-4)


def test_lattice_loss_finds_what_repeats_every_four_pixels_beneath_edges_and_noise() -> None:
    draws = torch.Generator().manual_seed(0)
    target = torch.zeros(1, 3, 64, 64)
    edges = torch.zeros_like(target)
    edges[..., 10:37, 21:50] = 0.8
    noise = 0.01 * torch.randn(target.shape, generator=draws)
    lattice = torch.zeros_like(target)
    lattice[..., ::4, ::4] = 0.016
    alone = lattice_loss(lattice, target)
    assert 0.016 * 0.15 < alone < 0.016 * 0.25  # deviation sqrt(15) / 16 of its height, bounded a little
    assert lattice_loss(target + edges, target + edges) < 1e-4  # only what the target has not
    assert lattice_loss(edges + noise, target) < 0.5 * alone
    assert lattice_loss(edges + noise + lattice, target) > 0.8 * alone


def test_flat_loss_weighs_patterns_on_flat_parts_and_hardly_any_in_texture() -> None:
    draws = torch.Generator().manual_seed(0)
    flat = torch.full((1, 3, 32, 32), 0.2)
    texture = flat + 0.5 * torch.randn(flat.shape, generator=draws)
    lattice = torch.zeros_like(flat)
    lattice[..., ::4, ::4] = 0.02
    on_flat, on_texture = (flat_loss(target + lattice, target) for target in (flat, texture))
    assert on_flat == pytest.approx(2 * 2 * 0.02 / 16, rel=0.1)  # two edges per period, in rows and in columns
    assert 0 < on_texture < 0.02 * on_flat
    assert flat_loss(flat + 0.1, flat) == pytest.approx(0, abs=1e-7)  # brightness is no pattern


def test_hinge_losses_are_those_of_the_paper() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.0])
    assert HINGE.generator(fake).item() == pytest.approx(1.0)
    assert HINGE.real(real).item() == pytest.approx(0.25) and HINGE.fake(fake).item() == pytest.approx(0.5)


def test_both_sides_of_the_game_pull_logits_in_opposite_directions() -> None:
    slopes = {}
    for side in ("real", "fake", "generator"):
        logits = torch.zeros(4, requires_grad=True)
        getattr(HINGE, side)(logits).backward()
        slopes[side] = logits.grad.sum().item()
    assert slopes["real"] < 0 < slopes["fake"] and slopes["generator"] < 0


def test_adaptive_weight_is_the_ratio_of_gradients_by_finite_differences() -> None:
    torch.manual_seed(0)
    first, last = nn.Linear(6, 5).double(), nn.Linear(5, 4).double()
    judge = nn.Linear(4, 1).double()
    x, target = random(7, 6).double(), random(7, 4, seed=1).double()

    def losses() -> tuple[Tensor, Tensor]:
        out = last(torch.tanh(first(x)))
        return F.l1_loss(out, target), HINGE.generator(judge(out))

    def slope_norm(which: int) -> float:
        slopes = []
        for index in range(last.weight.numel()):
            values = []
            for change in (1e-6, -1e-6):
                with torch.no_grad():
                    last.weight.view(-1)[index] += change
                    values.append(losses()[which].item())
                    last.weight.view(-1)[index] -= change
            slopes.append((values[0] - values[1]) / 2e-6)
        return torch.tensor(slopes).norm().item()

    expected = slope_norm(0) / (slope_norm(1) + 1e-4)
    weight = adaptive_adversarial_weight(*losses(), last.weight, largest=1e4)
    assert weight.item() == pytest.approx(expected, rel=1e-5)
    assert not weight.requires_grad and last.weight.grad is None
    reconstruction, adversarial = losses()
    assert adaptive_adversarial_weight(100 * reconstruction, adversarial, last.weight).item() == 1
    (reconstruction + weight * adversarial).backward()  # the graphs are still there


def test_feature_matching_does_not_depend_on_the_size_of_features() -> None:
    real, fake = random(1, 4, 8, 8), random(1, 4, 8, 8, seed=1)
    once, larger = feature_matching_loss([fake], [real]), feature_matching_loss([fake * 10], [real * 10])
    torch.testing.assert_close(once, larger)


def test_commitment_moves_the_features_and_not_the_codes() -> None:
    z, codes = random(2, 3, 4, 4).requires_grad_(), random(2, 3, 4, 4, seed=1).requires_grad_()
    for_z, for_codes = torch.autograd.grad(commitment_loss(z, codes), (z, codes), allow_unused=True)
    assert for_codes is None
    torch.testing.assert_close(for_z, 2 * (z - codes) / z.numel())


def test_the_codebook_follows_at_beta_and_the_encoder_commits_at_full_weight() -> None:
    quantizer = NearestQuantizer(5, 3, beta=0.25)
    z = random(2, 3, 4, 4).requires_grad_()
    quantized = quantizer(z)
    for_z, for_codebook = torch.autograd.grad(quantized.loss, (z, quantizer.codebook.weight))
    pull = 2 * (z - quantizer.lookup(quantized.indices)).detach() / z.numel()
    torch.testing.assert_close(for_z, pull)
    expected = torch.zeros(5, 3).index_add_(0, quantized.indices.flatten(), pull.permute(0, 2, 3, 1).reshape(-1, 3))
    torch.testing.assert_close(for_codebook, -0.25 * expected)


def test_token_loss_is_minus_the_log_probability_of_the_true_codes() -> None:
    logits, indices = random(2, 9, 5), torch.arange(18).view(2, 9) % 5
    expected = -torch.stack([logits[b, i].softmax(0)[indices[b, i]].log() for b in range(2) for i in range(9)]).mean()
    torch.testing.assert_close(code_token_loss(logits, indices), expected)
    sure = F.one_hot(indices, 5).float() * 50
    assert code_token_loss(sure, indices).item() == pytest.approx(0, abs=1e-6)
