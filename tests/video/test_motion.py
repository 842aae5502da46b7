"""Flow between frames, what is done with it, and noise that follows it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from stablesr_kit.errors import CheckpointError
from stablesr_kit.video.motion import (
    Motion,
    agreement,
    dis_flow,
    motion_between,
    raft_flow,
    resized_flow,
    warped,
    warping_error,
)
from stablesr_kit.video.noise import GRAINS, Grains, MovingNoise
from tests.helpers.scenes import scene
from tests.helpers.tiny import unit_noise


def even(right: float, down: float, side: int = 8) -> Motion:
    """Everything moves to the right and down by so many pixels."""
    back = torch.tensor([-right, -down], dtype=torch.float32)[:, None, None].expand(2, side, side).clone()
    return Motion(back, -back, agreement(back, -back))


@pytest.mark.parametrize(("right", "down"), [(0.0, 0.0), (0.5, -0.25), (3.0, 2.0)])
def test_flow_leads_back_to_where_a_point_was(right: float, down: float) -> None:
    before, now = scene(), scene(right, down)
    motion = motion_between(before, now, dis_flow())
    assert motion is not None and motion.valid.mean() > 0.8
    inner = (slice(None), slice(8, 40), slice(8, 40))
    expected = torch.tensor([-right, -down])[:, None, None]
    assert (motion.back[inner] - expected).abs().mean() < 0.15
    assert (motion.forth[inner] + expected).abs().mean() < 0.15
    assert (warped(before, motion.back)[inner] - now[inner]).abs().mean() < 0.03
    assert warping_error(now, before, motion) < 1e-3 < warping_error(now, before.flip(2), motion)


def test_a_cut_is_no_motion_and_noise_is_no_cut() -> None:
    other = scene(seed=5).flip(1) * 0.5 - 0.4
    assert motion_between(scene(), other, dis_flow()) is None
    one, other = (scene(i) + 0.05 * unit_noise(3, 48, 48, seed=i) for i in (0, 1))
    assert motion_between(one, other, dis_flow()) is not None


def test_what_leaves_the_picture_is_not_valid() -> None:
    motion = even(3, 0)
    assert motion.valid[:, :3].sum() == 0 and motion.valid[:, 3:].min() == 1


def test_hidden_places_and_motion_boundaries_do_not_count_as_unsteady() -> None:
    back = torch.zeros(2, 8, 16)
    back[0, :, 8:] = -2.0
    before = torch.full((3, 8, 16), 0.5)
    now, valid = before.clone(), torch.ones(8, 16)
    now[:, :, 7:9], now[:, 0], valid[0] = -1.0, -1.0, 0.0
    assert warping_error(now, before, Motion(back, -back, valid)) == 0
    now[:, 4, 2] += 0.4  # of 128 places 8 rows less one, and 16 columns less two, count
    assert warping_error(now, before, Motion(back, -back, valid)) == pytest.approx(0.2**2 / (7 * 14))
    assert warping_error(now, before, Motion(back, -back, 0 * valid)) is None


def test_arrows_grow_with_the_picture_and_nothing_is_valid_beside_it() -> None:
    larger = even(2, 1).at(16, 32)
    assert larger.back.shape == (2, 16, 32)
    assert torch.equal(larger.back[:, 8, 16], torch.tensor([-8.0, -2.0]))
    on_canvas = larger.on_canvas(24, 48, margin=4)
    assert on_canvas.valid.shape == (24, 48)
    assert on_canvas.valid[:4].sum() == on_canvas.valid[20:].sum() == on_canvas.valid[:, 36:].sum() == 0
    assert torch.equal(on_canvas.valid[4:20, 4:36], larger.valid)
    assert torch.equal(resized_flow(larger.back, 8, 8)[:, 4, 4], torch.tensor([-2.0, -1.0]))


def test_nearest_warping_moves_whole_values() -> None:
    picture = unit_noise(2, 8, 8)
    moved = warped(picture, even(2.3, 0.4).back, "nearest")
    assert torch.equal(moved[:, :, 2:], picture[:, :, :-2])


def test_raft_is_taken_from_a_file(tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision.models.optical_flow")
    torch.save(models.raft_small(weights=None).state_dict(), tmp_path / "raft.pth")
    estimate = raft_flow(tmp_path / "raft.pth", torch.device("cpu"))
    grey = (unit_noise(40, 60).clamp(-1, 1) * 100 + 120).byte().numpy()
    flow = estimate(grey, grey)
    assert flow.shape == (40, 60, 2) and torch.isfinite(torch.from_numpy(flow)).all()
    (tmp_path / "other.pth").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match=r"other\.pth: not the weights of torchvision's raft_small .*; give"):
        raft_flow(tmp_path / "other.pth", torch.device("cpu"))


def noise_of(*grains: Grains, stage: int = 0) -> Tensor:
    height, width = (side // GRAINS for side in grains[0].numbers.shape)
    return MovingNoise(3, grains).draw((len(grains), 4, height, width), (stage,))


def test_noise_stands_where_nothing_moves_and_moves_with_whole_positions() -> None:
    first = Grains.first(8, 8)
    still = first.moved(even(0, 0))
    assert torch.equal(first.numbers, still.numbers)
    one, moved = noise_of(first, first.moved(even(2, 1)))
    assert torch.equal(moved[:, 1:, 2:], one[:, :-1, :-2])
    assert not torch.equal(moved[:, 0], one[:, 0])


def test_slow_motion_moves_noise_after_some_frames() -> None:
    grains = first = Grains.first(8, 8)
    for _ in range(10):  # a fifth of the distance between grains at a time
        grains = grains.moved(even(0.05, 0))
    assert torch.equal(grains.numbers[:, 2:], first.numbers[:, :-2])


def test_moving_noise_stays_white() -> None:
    grains = Grains.first(32, 32)
    side = torch.arange(32.0)
    for i in range(6):
        zoom = (0.03 + 0.01 * i) * (side - 16)
        forth = torch.stack([zoom.expand(32, 32) + 0.37, zoom[:, None].expand(32, 32) - 0.21])
        grains = grains.moved(Motion(-forth, forth, torch.ones(32, 32)))
    assert len(grains.numbers.unique()) == grains.numbers.numel()
    noise = torch.stack([noise_of(grains, stage=stage)[0] for stage in range(8)])
    assert noise.mean().abs() < 0.02 and (noise.var() - 1).abs() < 0.03
    for neighbour in (noise.roll(1, -1), noise.roll(1, -2), noise.roll(1, 0), noise.roll(1, 1)):
        assert (noise * neighbour).mean().abs() < 0.02
    assert (noise**4).mean() == pytest.approx(3, abs=0.15)


def test_noise_for_another_canvas_is_refused() -> None:
    with pytest.raises(ValueError, match=r"noise of shape \(1, 4, 8, 6\) is asked for, expected \(1, 8, 8\)"):
        MovingNoise(0, [Grains.first(8, 8)]).draw((1, 4, 8, 6), (0,))
