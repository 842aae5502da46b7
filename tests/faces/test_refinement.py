"""FaceRefinement on a real photograph: what it changes, what it leaves, and what it reports."""

from functools import cache

import numpy as np
import pytest
import torch
from skimage import data
from torch import Tensor
from torch.nn.functional import avg_pool2d

from stablesr_kit import FaceRefinement
from stablesr_kit.errors import ConfigError, ImageError
from stablesr_kit.faces.face import Box, Face
from stablesr_kit.faces.geometry import OUTSIDE, template
from stablesr_kit.imaging.resizing import resize_bicubic
from stablesr_kit.spaces import pixels_to_image
from tests.helpers.tiny import tiny_pipeline


class Smoothing:
    """A restorer: as much smoother as w is smaller. Counts its forwards."""

    image_size = 128
    max_w = 1.0
    max_enlargement = 10.0

    def __init__(self) -> None:
        self.batches: list[int] = []

    def restore(self, image: Tensor, w: float) -> Tensor:
        self.batches.append(len(image))
        return w * image + (1 - w) * avg_pool2d(image, 5, stride=1, padding=2)


class SomebodyElse(Smoothing):
    """A restorer that turns faces upside down below w = 1, and at 1 too if it `insists`."""

    def __init__(self, insists: bool) -> None:
        super().__init__()
        self.insists = insists

    def restore(self, image: Tensor, w: float) -> Tensor:
        return image.flip(2) if w < 1 or self.insists else image


@cache
def photo() -> Tensor:
    """An image (1, 3, 128, 128) with one face."""
    pixels = np.ascontiguousarray(data.astronaut()[20:276, 120:376])
    return avg_pool2d(pixels_to_image(pixels), 2)


def doubled(image: Tensor) -> Tensor:
    return resize_bicubic(image, 2 * image.shape[-2], 2 * image.shape[-1])


def enlarged() -> Tensor:
    return doubled(photo())


def test_the_face_is_refined_and_the_rest_is_bitwise_the_background() -> None:
    stage = FaceRefinement(Smoothing(), w=0.2)
    before = enlarged()
    after = stage(before, photo())
    ((report,),) = stage.reports
    assert (report.action, report.w, report.detector) == ("refined", 0.2, "mtcnn")
    assert report.identity_distance < 0.1
    changed = (after != before).any(1)[0]
    rows, columns = changed.nonzero(as_tuple=True)
    x1, y1, x2, y2 = (2 * edge for edge in report.box)
    margin = 0.4 * (y2 - y1)
    assert y1 - margin < rows.min() < rows.max() < y2 + margin
    assert x1 - margin < columns.min() < columns.max() < x2 + margin
    assert changed[80:120, 100:140].any()
    assert torch.equal(before, enlarged())


def test_a_face_that_would_be_enlarged_too_much_is_left_alone_unless_an_upsampler_does_it() -> None:
    before = enlarged()
    stage = FaceRefinement(Smoothing(), w=0.2, max_enlargement=0.5)
    assert torch.equal(stage(before, photo()), before)
    ((report,),) = stage.reports
    assert (report.action, report.w) == ("too large", None)
    for other in (
        FaceRefinement(Smoothing(), w=0.2, max_enlargement=2.0),
        FaceRefinement(
            Smoothing(), w=0.2, max_enlargement=0.5, upsampler=lambda image: resize_bicubic(image, 256, 256)
        ),
    ):
        assert not torch.equal(other(before, photo()), before)


def test_a_picture_without_a_face_comes_back_as_the_background_and_the_report_is_empty() -> None:
    plain = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64).contiguous()
    stage = FaceRefinement(Smoothing())
    assert torch.equal(stage(plain, plain), plain)
    assert stage.reports == [[]]


def test_somebody_else_is_held_back_to_full_fidelity_and_left_alone_if_that_does_not_help() -> None:
    stage = FaceRefinement(SomebodyElse(insists=False), w=0.3)
    stage(enlarged(), photo())
    ((report,),) = stage.reports
    assert (report.action, report.w) == ("held back", 1.0)
    stage = FaceRefinement(SomebodyElse(insists=True), w=0.3)
    assert torch.equal(stage(enlarged(), photo()), enlarged())
    ((report,),) = stage.reports
    assert (report.action, report.w) == ("left alone", None)
    assert report.identity_distance > 0.3


def test_a_network_that_fuses_nothing_leaves_somebody_else_alone_and_is_asked_for_no_fidelity() -> None:
    class CodesAlone(SomebodyElse):
        max_w = 0.0

    stage = FaceRefinement(CodesAlone(insists=False), w=0)
    assert torch.equal(stage(enlarged(), photo()), enlarged())
    assert [report.action for report in stage.reports[0]] == ["left alone"]
    with pytest.raises(ConfigError, match=r"w=0.5 is given for faces, expected a number from 0 \(quality\) to 0 "):
        FaceRefinement(CodesAlone(insists=False))


def test_an_embedder_measures_identity_in_place_of_structure() -> None:
    def same_for_all(faces: np.ndarray) -> np.ndarray:
        return np.ones((len(faces), 8), np.float32)

    stage = FaceRefinement(SomebodyElse(insists=True), w=0.3, embedder=same_for_all)
    stage(enlarged(), photo())
    assert [(r.action, round(r.identity_distance, 6)) for r in stage.reports[0]] == [("refined", 0.0)]


def test_a_face_whose_distance_is_no_number_is_left_alone() -> None:
    def lost(faces: np.ndarray) -> np.ndarray:
        return np.full((len(faces), 8), np.nan, np.float32)

    stage = FaceRefinement(Smoothing(), embedder=lost)
    assert torch.equal(stage(enlarged(), photo()), enlarged())
    assert [report.action for report in stage.reports[0]] == ["left alone"]


def test_a_grey_photo_stays_grey_and_never_overflows() -> None:
    grey = photo().mean(1, keepdim=True).expand(-1, 3, -1, -1).contiguous()

    class Colouring(Smoothing):
        def restore(self, image: Tensor, w: float) -> Tensor:
            return super().restore(image, w) + torch.tensor([0.5, 0.0, -0.5])[:, None, None]

    before = resize_bicubic(grey, 256, 256)
    after = FaceRefinement(Colouring())(before, grey)
    assert not torch.equal(after, before)
    assert (after - after[:, :1]).abs().max() < 1e-3  # an eighth of an 8-bit level
    assert after.abs().max() <= 1.0001


@pytest.mark.parametrize("cut_px", [0, 30])
def test_a_tinted_photo_keeps_its_tint_in_a_face_at_its_border_too(cut_px: int) -> None:
    tint = torch.tensor([0.2, 0.05, -0.1])[:, None, None]
    tinted = 0.8 * photo()[..., cut_px:].mean(1, keepdim=True) + tint
    before = resize_bicubic(tinted, 256, 2 * tinted.shape[3])
    stage = FaceRefinement(Smoothing())
    after = stage(before, tinted)
    assert [report.action for report in stage.reports[0]] == ["refined"]
    changes = after - before
    assert changes.abs().max() > 0.1
    assert (changes - changes.mean(1, keepdim=True)).abs().max() < 1 / 127.5


def test_faces_are_restored_in_batches_and_500_of_them_in_a_large_picture() -> None:
    rng = np.random.default_rng(0)
    lq = torch.zeros(1, 3, 1000, 1500)
    faces = []
    for _ in range(500):
        landmarks = (template(512) - 256) * (24 / 512) + rng.uniform(15, [1485, 985])
        faces.append(Face(box=Box(*landmarks.min(0), *landmarks.max(0)), score=1, landmarks=landmarks))
    restorer = Smoothing()
    stage = FaceRefinement(restorer, batch_size=128, max_identity_distance=None)
    stage(resize_bicubic(lq, 2000, 3000), lq, [faces])
    assert restorer.batches == [128, 128, 128, 116]
    assert len(stage.reports[0]) == 500
    assert {report.detector for report in stage.reports[0]} == {"given"}


def test_landmarks_outside_the_picture_change_nothing() -> None:
    face = Face(box=Box(5000, 5000, 5100, 5100), score=1, landmarks=template(512) + 5000)
    stage = FaceRefinement(Smoothing(), max_identity_distance=None)
    assert torch.equal(stage(enlarged(), photo(), [[face]]), enlarged())
    assert len(stage.reports[0]) == 1


@pytest.mark.parametrize("side", ["left", "top"])
def test_a_face_cut_by_the_border_is_refined_as_far_as_it_is_in_the_picture(side: str) -> None:
    cut = photo()[..., 40:] if side == "left" else photo()[..., 38:, :]
    before = resize_bicubic(cut, 2 * cut.shape[2], 2 * cut.shape[3])
    stage = FaceRefinement(Smoothing(), w=0.2)
    after = stage(before, cut)
    assert [report.action for report in stage.reports[0]] == ["refined"]
    changed = (after != before).any(1)[0]
    border, opposite = (changed[:, 0], changed[:, -1]) if side == "left" else (changed[0], changed[-1])
    assert border.any() and not opposite.any()
    assert after.isfinite().all() and after.abs().max() <= 1.0001


def test_what_is_painted_beyond_the_border_makes_nobody_somebody_else() -> None:
    class Painting(Smoothing):
        def restore(self, image: Tensor, w: float) -> Tensor:
            outside = ((image + 1) * 127.5 == torch.tensor(OUTSIDE)[:, None, None]).all(dim=1, keepdim=True)
            assert outside.float().mean() > 0.3
            stripes = (torch.arange(image.shape[2]) // 12 % 2 * 2.0 - 1)[:, None]
            return torch.where(outside, stripes, super().restore(image, w))

    cut = photo()[..., 40:]
    stage = FaceRefinement(Painting(), w=0.2)
    stage(resize_bicubic(cut, 256, 2 * cut.shape[3]), cut)
    assert [report.action for report in stage.reports[0]] == ["refined"]
    assert stage.reports[0][0].identity_distance < 0.1


def test_drawn_boxes_are_green() -> None:
    after = FaceRefinement(Smoothing(), draw_boxes=True)(enlarged(), photo())
    green = torch.tensor([-1.0, 1.0, -1.0])[:, None, None]
    assert ((after[0] - green).abs().amax(0) < 0.01).sum() > 100


def test_an_upsampler_enlarges_the_restored_face_without_moving_it() -> None:
    plain = FaceRefinement(Smoothing(), w=1.0)(enlarged(), photo())
    sharp = FaceRefinement(Smoothing(), w=1.0, upsampler=doubled)(enlarged(), photo())
    assert not torch.equal(plain, sharp)
    assert (plain - sharp).abs().mean() < 2e-3


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_the_pipeline_calls_post_stages_after_the_colour_fix(output_type: str) -> None:
    pipeline = tiny_pipeline(with_text=False)
    seen = []

    def white(images: Tensor, lq_images: Tensor) -> Tensor:
        seen.append((tuple(images.shape), tuple(lq_images.shape)))
        return torch.ones_like(images)

    picture = torch.rand(1, 3, 6, 7, generator=torch.Generator().manual_seed(0))
    images = pipeline(picture, scale=4, num_images_per_prompt=2, post_stages=[white], output_type=output_type).images
    assert seen == [((2, 3, 24, 28), (2, 3, 6, 7))]
    assert np.asarray(images[0]).min() == (255 if output_type == "pil" else 1)


def test_the_pipeline_refines_the_face_of_a_photo() -> None:
    stage = FaceRefinement(Smoothing(), w=0.2, max_identity_distance=None)
    tiny_pipeline(with_text=False)((photo() + 1) / 2, scale=1, post_stages=[stage])
    assert len(stage.reports[0]) == 1


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match="w=2 is given"):
        FaceRefinement(Smoothing(), w=2)
    with pytest.raises(ImageError, match="as many of each"):
        FaceRefinement(Smoothing())(enlarged(), torch.cat([photo(), photo()]))
    with pytest.raises(ImageError, match="as many of each"):
        FaceRefinement(Smoothing())(enlarged(), photo(), [None, None])
    with pytest.raises(ValueError, match="post_stages work on pictures"):
        tiny_pipeline(with_text=False)(torch.rand(1, 3, 4, 4), post_stages=[lambda a, _: a], output_type="latent")


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_a_portrait_that_lies_on_its_side_is_refined_and_the_turn_reported(quarters: int) -> None:
    lying = torch.rot90(photo(), -quarters, (2, 3)).contiguous()
    stage, upright = FaceRefinement(Smoothing(), w=0.2), FaceRefinement(Smoothing(), w=0.2)
    before = doubled(lying)
    after = stage(before, lying)
    upright(enlarged(), photo())
    ((report,),), ((expected,),) = stage.reports, upright.reports
    assert (report.action, report.turned, expected.turned) == ("refined", 90 * quarters, 0)
    assert report.eye_distance == pytest.approx(expected.eye_distance)
    changed = torch.rot90((after != before).any(1)[0], quarters)
    rows, columns = changed.nonzero(as_tuple=True)
    x1, y1, x2, y2 = (2 * edge for edge in expected.box)
    margin = 0.4 * (y2 - y1)
    assert y1 - margin < rows.min() < rows.max() < y2 + margin
    assert x1 - margin < columns.min() < columns.max() < x2 + margin
