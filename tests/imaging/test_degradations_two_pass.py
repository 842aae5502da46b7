"""The two-pass model: everything that is drawn is drawn as often as configured."""

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from stablesr_kit.imaging.degradations import (
    BlurConfig,
    SecondOrderConfig,
    second_order,
)
from stablesr_kit.imaging.degradations.draws import odd_size, pick, uniform, uniform_each
from stablesr_kit.imaging.degradations.filtering import (
    delta_kernel,
)
from tests.helpers.degradation_pictures import seeded


def test_numbers_are_uniform_over_their_span() -> None:
    numbers = uniform_each((-2.0, 6.0), 20000, seeded())
    assert numbers.min() >= -2 and numbers.max() < 6
    assert numbers.mean().item() == pytest.approx(2, abs=0.1)
    assert numbers.std().item() == pytest.approx(8 / math.sqrt(12), rel=0.02)
    assert uniform((3.0, 3.0), seeded()) == 3.0


def test_choices_follow_their_weights_and_odd_sizes_are_all_drawn() -> None:
    generator = seeded()
    picks = Counter(pick((0.2, 0.0, 0.7, 0.1), generator) for _ in range(4000))
    assert [picks[i] / 4000 for i in range(4)] == pytest.approx([0.2, 0, 0.7, 0.1], abs=0.025)
    sizes = Counter(odd_size((7, 21), generator) for _ in range(4000))
    assert sorted(sizes) == list(range(7, 22, 2))
    assert all(count / 4000 == pytest.approx(1 / 8, abs=0.025) for count in sizes.values())


def test_blur_kernels_are_drawn_as_often_as_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: Counter[str] = Counter()
    betas: dict[str, list[float]] = {"generalised": [], "plateau": []}

    def bell(name: str):  # type: ignore[no-untyped-def]
        def kernel(size: int, sigma_x: float, sigma_y: float, theta: float, beta: float = 1.0) -> Tensor:
            assert size in range(7, 22, 2)
            assert 0.2 <= sigma_x <= 1.5 and 0.2 <= sigma_y <= 1.5 and -math.pi <= theta <= math.pi
            drawn[f"{name} {'iso' if sigma_x == sigma_y and theta == 0 else 'aniso'}"] += 1
            if name in betas:
                betas[name].append(beta)
            return delta_kernel(size)

        return kernel

    def sinc(size: int, cutoff: float) -> Tensor:
        assert math.pi / (3 if size < 13 else 5) <= cutoff <= math.pi
        drawn["sinc"] += 1
        return delta_kernel(size)

    monkeypatch.setattr(second_order, "gaussian_kernel", bell("gaussian"))
    monkeypatch.setattr(second_order, "generalised_gaussian_kernel", bell("generalised"))
    monkeypatch.setattr(second_order, "plateau_kernel", bell("plateau"))
    monkeypatch.setattr(second_order, "sinc_kernel", sinc)
    generator, count = seeded(), 4000
    for _ in range(count):
        assert second_order.draw_blur_kernel(BlurConfig(), generator).shape == (21, 21)
    expected = {
        "sinc": 0.1,
        "gaussian iso": 0.9 * 0.45,
        "gaussian aniso": 0.9 * 0.25,
        "generalised iso": 0.9 * 0.12,
        "generalised aniso": 0.9 * 0.03,
        "plateau iso": 0.9 * 0.12,
        "plateau aniso": 0.9 * 0.03,
    }
    assert {name: drawn[name] / count for name in expected} == pytest.approx(expected, abs=0.025)
    for name, (low, high) in {"generalised": (0.5, 2.0), "plateau": (1.0, 1.5)}.items():
        assert low <= min(betas[name]) and max(betas[name]) <= high
        assert sum(beta <= 1 for beta in betas[name]) / len(betas[name]) == pytest.approx(0.5, abs=0.08)


def test_resizing_follows_its_probabilities_and_range() -> None:
    generator, config = seeded(), SecondOrderConfig().first
    factors = torch.tensor([second_order._resize_factor(config, generator) for _ in range(4000)])
    assert factors.min() >= 0.3 and factors.max() <= 1.5
    shares = [(factors > 1).float().mean(), (factors < 1).float().mean(), (factors == 1).float().mean()]
    assert [share.item() for share in shares] == pytest.approx([0.2, 0.7, 0.1], abs=0.025)


def test_every_stage_of_the_two_pass_model_happens_as_often_as_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def recorded(name: str, change: bool = False):  # type: ignore[no-untyped-def]
        def stage(x: Tensor, *arguments: object, **_: object) -> Tensor:
            events.append(name)
            return F.interpolate(x, arguments[0]) if change else x

        return stage

    for name in ("jpeg", "filter2d", "rescale", "add_gaussian_noise", "add_poisson_noise"):
        monkeypatch.setattr(second_order, name, recorded(name))
    monkeypatch.setattr(second_order, "resize", recorded("resize", change=True))
    generator, config, count = seeded(), SecondOrderConfig(), 400
    orders: Counter[str] = Counter()
    first_noises: Counter[str] = Counter()
    for _ in range(count):
        events.clear()
        assert second_order.degrade_second_order(torch.zeros(1, 3, 64, 64), config, generator).shape[-1] == 16
        first, second = events[:4], events[4:]
        assert first[:2] == ["filter2d", "rescale"] and first[3] == "jpeg"
        first_noises[first[2]] += 1
        orders[" ".join(event for event in second if "noise" not in event)] += 1
    assert first_noises["add_gaussian_noise"] / count == pytest.approx(0.5, abs=0.08)
    expected = {
        f"{blur}resize {last}": 0.25
        for blur in ("", "filter2d ")
        for last in ("resize filter2d jpeg", "jpeg resize filter2d")
    }
    assert {order: n / count for order, n in orders.items()} == pytest.approx(expected, abs=0.08)


def test_the_final_sinc_is_drawn_four_times_in_five() -> None:
    generator, config = seeded(), SecondOrderConfig()
    plain = sum(torch.equal(second_order._final_kernel(config, generator), delta_kernel(21)) for _ in range(2000))
    assert plain / 2000 == pytest.approx(0.2, abs=0.03)


def test_resize_modes_grey_noise_and_jpeg_quality_are_drawn_as_often_as_configured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    modes: Counter[str] = Counter()
    grey: list[bool] = []
    sigmas: list[float] = []
    qualities: list[list[float]] = [[], []]
    calls: Counter[str] = Counter()

    def resized(x: Tensor, size: object, mode: str) -> Tensor:
        modes[mode] += 1
        return F.interpolate(x, size) if isinstance(size, tuple) else x

    def noisy(x: Tensor, strength: Tensor, is_grey: Tensor, _: Generator) -> Tensor:
        grey.extend(is_grey.tolist())
        sigmas.extend(strength.tolist())
        return x

    def coded(x: Tensor, quality: Tensor) -> Tensor:
        qualities[calls["jpeg"] % 2].extend(quality.tolist())
        calls["jpeg"] += 1
        return x

    monkeypatch.setattr(second_order, "rescale", resized)
    monkeypatch.setattr(second_order, "resize", resized)
    monkeypatch.setattr(second_order, "add_gaussian_noise", noisy)
    monkeypatch.setattr(second_order, "add_poisson_noise", lambda x, *_: x)
    monkeypatch.setattr(second_order, "jpeg", coded)
    monkeypatch.setattr(second_order, "filter2d", lambda x, _: x)
    generator, config = seeded(), SecondOrderConfig()
    for _ in range(500):
        second_order.degrade_second_order(torch.zeros(2, 3, 64, 64), config, generator)
    assert {mode: count / 1500 for mode, count in modes.items()} == pytest.approx(
        {"area": 1 / 3, "bilinear": 1 / 3, "bicubic": 1 / 3}, abs=0.05
    )
    assert sum(grey) / len(grey) == pytest.approx(0.4, abs=0.05)
    assert 1 / 255 <= min(sigmas) and max(sigmas) <= 15 / 255
    for drawn, (low, high) in zip(qualities, (config.first_jpeg_quality, config.last_jpeg_quality), strict=True):
        assert low <= min(drawn) and max(drawn) <= high
        assert sum(drawn) / len(drawn) == pytest.approx((low + high) / 2, abs=1.5)
