"""CodeFormerPipeline at a tiny size: its tasks, its masks, its files, and faces inside photographs."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from torch import Tensor
from torch.nn.functional import avg_pool2d

from stablesr_kit import CodeFormerPipeline, FaceRefinement
from stablesr_kit.checkpoints import Hints
from stablesr_kit.errors import CheckpointError, ConfigError, ImageError, ModelNotFoundError
from stablesr_kit.imaging.resizing import resize_bicubic
from stablesr_kit.models.codeformer import CodeFormer
from stablesr_kit.models.vqgan import VQGAN
from stablesr_kit.pipelines.loading import resolve_model
from stablesr_kit.spaces import pixels_to_image
from tests.helpers.official_layout import official_faces, randomize

SIZE = 32
SHAPE = {"image_size": SIZE, "base_channels": 32, "channel_multipliers": (1, 2), "codebook_size": 12}


@cache
def pipeline() -> CodeFormerPipeline:
    network = CodeFormer(**SHAPE, code_channels=32, dim=16, num_heads=4, num_layers=2, fuse_sizes=(16, 32))
    return CodeFormerPipeline(randomize(network, 1).eval())


def pixels(count: int = 3, height: int = SIZE, width: int = SIZE) -> np.ndarray:
    """Pixels (count, height, width, 3), none of them white."""
    return np.random.default_rng(0).integers(0, 255, (count, height, width, 3), dtype=np.uint8)


def test_faces_come_back_as_the_network_restores_them() -> None:
    faces = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = pipeline().codeformer(faces * 2 - 1, 0.5, adain=True).image
    restored = pipeline()(faces, output_type="pt").images
    torch.testing.assert_close(restored, (expected / 2 + 0.5).clamp(0, 1))


def test_w_changes_the_result_and_zero_fuses_nothing() -> None:
    image = pixels_to_image(pixels(1)[0])
    sweep = [pipeline().restore(image, w) for w in (0.0, 0.5, 1.0)]
    with torch.no_grad():
        assert torch.equal(sweep[0], pipeline().codeformer(image, adain=True).image)
    assert not torch.allclose(sweep[0], sweep[1])
    assert not torch.allclose(sweep[1], sweep[2])


@pytest.mark.parametrize(("task", "w", "adain"), [("restore", 0.5, True), ("colorize", 0.0, True)])
def test_each_task_has_its_own_w_and_adain(task: str, w: float, adain: bool) -> None:
    face = pixels(1)
    own = pipeline()(face, task=task, output_type="np").images
    assert np.array_equal(own, pipeline()(face, w, adain=adain, output_type="np").images)
    assert not np.array_equal(own, pipeline()(face, w, adain=not adain, output_type="np").images)


@pytest.mark.parametrize("is_given", [False, True], ids=["white pixels", "a mask"])
def test_inpainting_leaves_the_pixels_outside_the_mask_bitwise(is_given: bool) -> None:
    face = pixels(1)[0]
    hidden = np.zeros((SIZE, SIZE), dtype=bool)
    hidden[8:20, 10:24] = True
    white = np.where(hidden[..., None], np.uint8(255), face)
    mask = Image.fromarray(hidden.astype(np.uint8) * 255) if is_given else None
    (result,) = pipeline()(Image.fromarray(face if is_given else white), task="inpaint", mask=mask).images
    completed = np.asarray(result)
    assert np.array_equal(completed[~hidden], face[~hidden])
    whole = pipeline()(white, 1.0, adain=False).images[0]
    assert np.array_equal(completed[hidden], np.asarray(whole)[hidden])


def test_a_batch_equals_the_faces_one_by_one() -> None:
    faces = list(pixels(3))
    batch = pipeline()(faces, batch_size=2, output_type="np").images
    alone = np.concatenate([pipeline()(face, output_type="np").images for face in faces])
    np.testing.assert_allclose(batch, alone, atol=1e-5)


def test_faces_of_other_sizes_keep_their_proportions() -> None:
    faces = [Image.fromarray(pixels(1, height, width)[0]) for height, width in ((16, 24), (32, 32), (64, 48))]
    sizes = [(picture.height, picture.width) for picture in pipeline()(faces).images]
    assert sizes == [(32, 48), (32, 32), (64, 48)]
    shapes = [array.shape for array in pipeline()(faces, output_type="np").images]
    assert shapes == [(1, 32, 48, 3), (1, 32, 32, 3), (1, 64, 48, 3)]


def test_without_fusion_there_is_no_fidelity() -> None:
    assert pipeline().max_w == 1
    assert CodeFormerPipeline(CodeFormer(**{**pipeline().codeformer.config, "fuse_sizes": ()})).max_w == 0


def test_a_saved_pipeline_loads_with_its_task(tmp_path: Path) -> None:
    CodeFormerPipeline(pipeline().codeformer, task="colorize").save_pretrained(tmp_path / "saved")
    loaded = CodeFormerPipeline.from_pretrained(tmp_path / "saved")
    assert loaded.config.task == "colorize"
    face = pixels(1)
    expected = pipeline()(face, task="colorize", output_type="np").images
    assert np.array_equal(loaded(face, output_type="np").images, expected)


def test_an_official_file_becomes_a_pipeline(tmp_path: Path) -> None:
    torch.save({"params_ema": official_faces(pipeline().codeformer)}, tmp_path / "codeformer.pth")
    converted = CodeFormerPipeline.from_original(tmp_path / "codeformer.pth", hints=Hints(codeformer_heads=4))
    assert converted.config.task == "restore"
    face = pixels(1)
    expected = pipeline()(face, output_type="np").images
    assert np.array_equal(converted(face, output_type="np").images, expected)


def test_an_autoencoder_alone_is_no_pipeline(tmp_path: Path) -> None:
    vqgan = randomize(VQGAN(**SHAPE, code_channels=32), 1)
    torch.save({"params_ema": official_faces(vqgan)}, tmp_path / "vqgan.pth")
    with pytest.raises(CheckpointError, match="VQGAN alone, expected a CodeFormer"):
        CodeFormerPipeline.from_original(tmp_path / "vqgan.pth")


def test_a_folder_of_another_pipeline_is_named() -> None:
    with pytest.raises(ModelNotFoundError, match="mini holds no codeformer"):
        CodeFormerPipeline.from_pretrained(resolve_model("mini"))


def photo() -> Tensor:
    """An image (1, 3, 128, 128) with one face."""
    return avg_pool2d(pixels_to_image(np.ascontiguousarray(data.astronaut()[20:276, 120:376])), 2)


def test_faces_of_a_photograph_are_refined_by_the_pipeline() -> None:
    stage = FaceRefinement(pipeline(), w=0.7, max_identity_distance=None)
    before = resize_bicubic(photo(), 256, 256)
    after = stage(before, photo())
    ((report,),) = stage.reports
    assert report.w == 0.7
    changed = (after != before).any(dim=1)
    assert 0 < changed.float().mean() < 0.5


def test_a_network_that_computes_no_numbers_is_refused() -> None:
    broken = randomize(CodeFormer(**pipeline().codeformer.config), 1).eval()
    torch.nn.init.constant_(broken.vqgan.decoder.conv_out.weight, float("inf"))
    for call in (CodeFormerPipeline(broken), FaceRefinement(CodeFormerPipeline(broken))):
        with pytest.raises(FloatingPointError, match="not finite, computed in torch.float32; load it in bfloat16"):
            call(photo(), photo()) if isinstance(call, FaceRefinement) else call(pixels(1))


WHITE = np.full((SIZE, SIZE), 255, dtype=np.uint8)


@pytest.mark.parametrize(
    ("faces", "options", "error", "message"),
    [
        ("face.png", {}, ImageError, "str is given, expected a PIL image"),
        ([], {}, ImageError, "an empty list of faces"),
        (pixels(1), {"task": "inpaint"}, ImageError, "face 0 has no white pixels"),
        (pixels(1), {"task": "inpaint", "mask": WHITE}, ImageError, "mask 0 is all white"),
        (pixels(1), {"task": "inpaint", "mask": WHITE[:16]}, ImageError, "mask 0 is 16x32, its face 32x32"),
        (pixels(3), {"task": "inpaint", "mask": [WHITE] * 2}, ImageError, "2 masks are given for 3 faces"),
        (pixels(1), {"mask": WHITE}, ConfigError, "a mask is given to restore"),
        (pixels(1, 2000, 3), {}, ImageError, "face 0 is 2000x3"),
        (pixels(1), {"task": "sharpen"}, ConfigError, "task='sharpen'"),
        (pixels(1), {"w": float("nan")}, ConfigError, "w=nan"),
        (pixels(1), {"w": -1}, ConfigError, "w=-1"),
        (pixels(1), {"batch_size": 0}, ConfigError, "batch_size=0"),
        (pixels(1), {"output_type": "latent"}, ConfigError, "output_type='latent'"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(
    faces: object, options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        pipeline()(faces, **options)
    assert "\n" not in str(caught.value)
