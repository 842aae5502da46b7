"""Every metric agrees with an independent implementation, and says NaN where it has nothing to say."""

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from skimage import data
from torch import Tensor, nn

from stablesr_kit.errors import CheckpointError, ConfigError
from stablesr_kit.evaluation import metrics
from stablesr_kit.evaluation.metrics import (
    DISTS,
    LPIPS,
    METRICS,
    MetricSettings,
    PristineStatistics,
    Sample,
    Weights,
    fid,
    grid,
    kid,
    seam_energy,
    warping_error,
    words_f1,
)
from stablesr_kit.evaluation.resampling import resize_bicubic_matlab
from tests.helpers.evaluation_data import EVAL_OPEN, NIQE_STATISTICS, SHARED, WEIGHTS, has_eval_open, has_weights, read

Pixels = NDArray[np.uint8]


def pair() -> tuple[Pixels, Pixels]:
    """A photograph, and what bicubic enlargement makes of a quarter of it."""
    truth = data.astronaut()[:240, 100:320]
    return resize_bicubic_matlab(resize_bicubic_matlab(truth, 60, 55), 240, 220), truth


def unit(pixels: Pixels) -> Tensor:
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].double() / 255


def test_psnr_and_ssim_agree_with_piq_in_rgb_and_on_the_luma() -> None:
    import piq

    restored, truth = pair()
    inside = (x[4:-4, 4:-4] for x in (restored, truth))
    x, y = map(unit, inside)
    assert metrics.psnr(restored, truth, 4, "rgb") == pytest.approx(piq.psnr(x, y, data_range=1.0).item(), abs=1e-4)
    expected = piq.ssim(x, y, data_range=1.0, downsample=False).item()
    assert metrics.ssim(restored, truth, 4, "rgb") == pytest.approx(expected, abs=1e-5)
    x, y = (torch.from_numpy(metrics.luma(z)[4:-4, 4:-4] / 255)[None, None] for z in (restored, truth))
    assert metrics.psnr(restored, truth, 4) == pytest.approx(piq.psnr(x, y, data_range=1.0).item(), abs=1e-4)
    expected = piq.ssim(x, y, data_range=1.0, downsample=False).item()
    assert metrics.ssim(restored, truth, 4) == pytest.approx(expected, abs=1e-5)


def test_ms_ssim_agrees_with_torchmetrics() -> None:
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    restored, truth = pair()
    expected = multiscale_structural_similarity_index_measure(unit(restored), unit(truth), data_range=1.0).item()
    assert metrics.ms_ssim(restored, truth, 0, "rgb") == pytest.approx(expected, abs=2e-3)  # other windows at borders
    assert math.isnan(metrics.ms_ssim(restored[:160], truth[:160], 0))


def test_a_grey_difference_is_the_difference_of_lightness() -> None:
    dark, light = np.full((8, 8, 3), 119, np.uint8), np.full((8, 8, 3), 122, np.uint8)
    # around L* = 50 Delta E 2000 of greys is the difference of L*, which is 100 / 255 x 1.0 per level there, about
    assert metrics.ciede2000(dark, light) == pytest.approx(1.18, abs=0.03)
    assert metrics.ciede2000(dark, dark) == 0


def test_a_result_that_keeps_to_its_input_has_the_higher_lq_psnr() -> None:
    _, truth = pair()
    lq = resize_bicubic_matlab(truth, 60, 55)
    assert metrics.lq_psnr(truth, lq) == math.inf
    assert metrics.lq_psnr(np.roll(truth, 2, axis=0), lq) < 30


@has_eval_open
def test_bicubic_reduction_is_that_of_matlab_to_the_bit() -> None:
    for truth_file in sorted((EVAL_OPEN / "Set5_HR").glob("*.png")):
        lq = read(EVAL_OPEN / "Set5_LRx4" / f"{truth_file.stem}x4.png")
        assert np.array_equal(resize_bicubic_matlab(read(truth_file), *lq.shape[:2]), lq)


@has_eval_open
def test_bicubic_enlargement_of_set5_has_its_published_quality() -> None:
    scores = []
    for truth_file in sorted((EVAL_OPEN / "Set5_HR").glob("*.png")):
        truth = read(truth_file)
        restored = resize_bicubic_matlab(read(EVAL_OPEN / "Set5_LRx4" / f"{truth_file.stem}x4.png"), *truth.shape[:2])
        scores.append((metrics.psnr(restored, truth, 4), metrics.ssim(restored, truth, 4)))
    psnr, ssim = np.mean(scores, axis=0)
    assert psnr == pytest.approx(28.42, abs=0.05)
    assert ssim == pytest.approx(0.8104, abs=0.002)


@pytest.mark.skipif(not NIQE_STATISTICS.is_file(), reason=f"{NIQE_STATISTICS} is not there")
def test_niqe_agrees_with_pyiqa(tmp_path: Path) -> None:
    pytest.importorskip("pyiqa", reason="pyiqa, whose licence is not commercial, is not installed")
    import scipy.io
    from pyiqa.archs.niqe_arch import NIQE

    with np.load(NIQE_STATISTICS) as own:
        named = {"mu_prisparam": own["mu_pris_param"], "cov_prisparam": own["cov_pris_param"]}
        scipy.io.savemat(tmp_path / "niqe.mat", named)
    theirs = NIQE(color_space="ycbcr", crop_border=4, pretrained_model_path=str(tmp_path / "niqe.mat"))
    pristine = PristineStatistics.load(NIQE_STATISTICS)
    for picture in (data.astronaut(), data.coffee(), data.chelsea(), pair()[0]):
        assert metrics.niqe(picture, pristine, 4) == pytest.approx(theirs(unit(picture)).item(), rel=0.02)


def test_niqe_of_too_small_and_of_flat_pictures_is_nan() -> None:
    pristine = PristineStatistics(np.zeros(36), np.eye(36), np.ones((7, 7)) / 49)
    assert math.isnan(metrics.niqe(data.astronaut()[:100, :100], pristine, 0))
    assert math.isnan(metrics.niqe(np.zeros((200, 200, 3), np.uint8), pristine, 0))


@has_weights
@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_agrees_with_torchmetrics(net: str) -> None:
    from torchmetrics.functional.image.lpips import _NoTrainLpips

    ours = LPIPS(WEIGHTS, net)
    theirs = _NoTrainLpips(pretrained=True, net=net, pnet_rand=True)  # its own heads
    theirs.net.load_state_dict(ours.network.net.state_dict())
    restored, truth = (picture[60:156, 40:136] for picture in pair())
    expected = theirs(unit(restored).float() * 2 - 1, unit(truth).float() * 2 - 1).item()
    assert expected > 0.1
    assert ours(restored, truth) == pytest.approx(expected, abs=1e-5)
    assert ours(truth, truth) == 0
    assert math.isnan(ours(truth[:32, :32], truth[:32, :32]))


@has_weights
@pytest.mark.skipif(not (SHARED / "lpips_example").is_dir(), reason="the example of the lpips repository is not there")
def test_lpips_of_the_example_of_its_authors_is_what_they_print() -> None:
    reference, far, near = (read(SHARED / "lpips_example" / f"ex_{name}.png") for name in ("ref", "p0", "p1"))
    measure = LPIPS(WEIGHTS, "alex")
    assert measure(far, reference) == pytest.approx(0.722, abs=1e-3)
    assert measure(near, reference) == pytest.approx(0.138, abs=1e-3)


@has_weights
def test_dists_agrees_with_torchmetrics(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchmetrics.functional.image import dists as theirs

    def vgg16(**_: object) -> nn.Module:
        import torchvision

        with torch.device("meta"):
            network: nn.Module = torchvision.models.vgg16()
        network.features.load_state_dict(WEIGHTS.features("vgg"), assign=True)
        return network

    monkeypatch.setattr(theirs, "vgg16", vgg16)
    restored, truth = (picture[60:124, 40:120] for picture in pair())
    expected = theirs.DISTSNetwork()(unit(restored).float(), unit(truth).float()).item()
    assert expected > 0.05
    assert DISTS(WEIGHTS)(restored, truth) == pytest.approx(expected, abs=1e-4)
    assert DISTS(WEIGHTS)(truth, truth) == pytest.approx(0, abs=1e-5)


def features(count: int, shift: float, seed: int) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    return rng.normal(shift, 1, (count, 6)) @ np.diag([1, 2, 0.5, 1, 1, 0.1])


@pytest.mark.parametrize("count", [4, 60])
def test_fid_agrees_with_torchmetrics_also_of_fewer_pictures_than_features(count: int) -> None:
    from torchmetrics.image.fid import _compute_fid

    first, second = features(count, 0, 1), features(count, 0.3, 2)
    x, y = torch.from_numpy(first), torch.from_numpy(second)
    expected = _compute_fid(x.mean(0), x.T.cov(), y.mean(0), y.T.cov()).item()
    assert fid(first, second) == pytest.approx(expected, rel=1e-6)
    assert fid(first, first) == pytest.approx(0, abs=1e-5)


def test_kid_agrees_with_piq() -> None:
    import piq

    first, second = features(40, 0, 1), features(40, 0.3, 2)
    expected = piq.KID()(torch.from_numpy(first), torch.from_numpy(second)).item()
    assert kid(first, second) == pytest.approx(expected, rel=1e-6)


def test_a_seam_is_seen_where_it_is_and_nowhere_else() -> None:
    smooth = np.tile(np.linspace(40, 200, 256)[:, None, None], (1, 256, 3)) + np.linspace(0, 40, 256)[None, :, None]
    plain = smooth.astype(np.uint8)
    shifted = smooth.copy()
    shifted[:, 128:] += 3
    assert seam_energy(plain) == pytest.approx(1, abs=0.35)
    assert seam_energy(shifted.astype(np.uint8)) > 2 * seam_energy(plain)
    assert math.isnan(seam_energy(plain[:100]))
    assert math.isnan(seam_energy(np.zeros((200, 200, 3), np.uint8)))


def test_a_lattice_too_faint_to_see_stands_out_of_a_photograph() -> None:
    photo = data.astronaut()
    lattice = photo.astype(np.int16)
    lattice[::4, ::4] += 2
    assert grid(photo) < 0.05
    assert grid(np.clip(lattice, 0, 255).astype(np.uint8)) > 5 * grid(photo)
    assert grid(np.full((64, 64, 3), 90, np.uint8)) == pytest.approx(0, abs=1e-9)


def test_what_moves_with_the_picture_has_a_small_warping_error_and_what_flickers_a_large_one() -> None:
    photo = data.coffee()
    clip = [photo[2 * i : 2 * i + 160, 3 * i : 3 * i + 200] for i in range(4)]
    rng = np.random.default_rng(0)
    flickering = [np.clip(frame + rng.normal(0, 20, frame.shape), 0, 255).astype(np.uint8) for frame in clip]
    assert warping_error(clip, clip) < 0.5
    assert warping_error(flickering, clip) == pytest.approx(2 * 1000 * (20 / 255) ** 2, rel=0.4)
    assert math.isnan(warping_error(clip[:1], clip[:1]))
    other = [255 - photo[150:310, 300:500] // 2 for _ in range(2)]
    across = warping_error([*flickering[:2], *other], [*clip[:2], *other])
    assert across == pytest.approx(warping_error(flickering[:2], clip[:2]) / 2)  # two pairs and a cut


def test_faces_that_move_are_as_far_off_as_they_moved() -> None:
    face = data.astronaut()[0:256, 96:352]
    moved = np.roll(face, (0, 6), axis=(0, 1))
    assert metrics.landmark_distance(face, face) == 0
    assert metrics.landmark_distance(moved, face) == pytest.approx(6, abs=1.5)
    assert metrics.landmark_distance(np.zeros_like(face), face) == 256
    assert math.isnan(metrics.landmark_distance(face, np.zeros_like(face)))
    assert metrics.identity(face, face) == pytest.approx(0, abs=1e-6)
    assert metrics.identity(face[::-1], face) > 0.2


def test_words_are_counted_as_often_as_they_occur() -> None:
    assert words_f1(["to", "be", "to"], ["to", "be", "or"]) == pytest.approx(2 / 3)
    assert words_f1([], ["to"]) == 0
    assert math.isnan(words_f1(["to"], []))


def test_text_that_was_blurred_away_is_not_read() -> None:
    pytest.importorskip("rapidocr_onnxruntime", reason="pip install 'stablesr-kit[ocr]'")
    import cv2

    page = np.full((96, 320, 3), 255, np.uint8)
    cv2.putText(page, "RESTORED", (20, 62), cv2.FONT_HERSHEY_SIMPLEX, 1.6, (0, 0, 0), 3)
    measure = METRICS["ocr-f1"].load
    assert measure is not None
    agreement = measure(MetricSettings())
    assert agreement(Sample(page, page, page)) == 1
    assert agreement(Sample(cv2.GaussianBlur(page, (0, 0), 12), page, page)) < 1


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", ["niqe", "clip-iqa", "lpips-alex", "dists", "fid"])
def test_absent_weights_are_one_line_that_names_the_file(name: str, tmp_path: Path) -> None:
    metric = METRICS[name]
    load: Callable[[MetricSettings], object] | None = metric.load or metric.load_set
    assert load is not None
    with pytest.raises(CheckpointError, match=r"^needs [\w.-]+( or [\w.-]+)* in the folder of --weights"):
        load(MetricSettings(weights=Weights((tmp_path,))))


def test_a_file_that_is_not_the_published_one_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "RN50.pt").write_bytes(b"something else")
    load = METRICS["clip-iqa"].load
    assert load is not None
    with pytest.raises(CheckpointError, match="get the published file"):
        load(MetricSettings(weights=Weights((tmp_path,))))


def test_statistics_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "niqe_pris_params.npz").write_bytes(b"no statistics")
    with pytest.raises(ConfigError, match="give niqe_pris_params.npz"):
        PristineStatistics.load(tmp_path / "niqe_pris_params.npz")


def test_weights_are_found_in_the_folder_and_in_those_it_holds(tmp_path: Path) -> None:
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "one.npz").write_bytes(b"")
    (tmp_path / "two.npz").write_bytes(b"")
    weights = Weights((tmp_path,))
    assert weights.find("one.npz") == tmp_path / "metrics" / "one.npz"
    assert weights.find("none.npz", "two.npz") == tmp_path / "two.npz"
    assert weights.find("none.npz") is None


def test_every_metric_needs_only_packages_that_an_extra_installs() -> None:
    missing = [name for name in ("piq", "torchmetrics", "skimage", "lpips") if importlib.util.find_spec(name) is None]
    assert not missing, "the tests of metrics need the extra evaluate"
