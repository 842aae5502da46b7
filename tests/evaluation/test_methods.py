"""Peers are loaded as their own projects load them, and give what these give."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from skimage import data

from stablesr_kit.errors import CheckpointError, ConfigError, ImageError
from stablesr_kit.evaluation.methods import Given, Method, baselines, in_tiles, open_method
from stablesr_kit.evaluation.protocols import Pair

Pixels = NDArray[np.uint8]


def nothing_else(_: str, what: str) -> Method:
    raise ConfigError(f"{what} is not known")


def given(lq: Pixels, scale: int = 4, name: str = "photo") -> Given:
    pair = Pair(name, None, Path(f"{name}.png"))
    return Given(lq, lq.shape[0] * scale, lq.shape[1] * scale, pair, "Set", None)


def photo(height: int, width: int) -> Pixels:
    return np.ascontiguousarray(data.astronaut()[60 : 60 + height, 190 : 190 + width])


def test_the_baselines_enlarge_as_the_literature_and_as_pillow_do() -> None:
    lq = photo(12, 16)
    bicubic, lanczos = (method.load()(given(lq), {}) for method in baselines(4))
    assert bicubic.shape == lanczos.shape == (48, 64, 3)
    expected = np.asarray(Image.fromarray(lq).resize((64, 48), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(bicubic[8:-8, 8:-8].astype(int) - expected[8:-8, 8:-8]).max() <= 2
    (unchanged,) = baselines(1)
    assert np.array_equal(unchanged.load()(given(lq, 1), {}), lq)


def test_a_known_kernel_is_inverted_better_than_bicubic_enlargement_does() -> None:
    from stablesr_kit.evaluation.metrics import psnr
    from stablesr_kit.evaluation.resampling import reduce_blurred

    truth = photo(96, 96)
    lq = reduce_blurred(truth, 4, 1.8)
    known = open_method("known=nonblind", nothing_else).load()(given(lq), {"sigma": 1.8})
    assert psnr(known, truth, 4) > psnr(baselines(4)[0].load()(given(lq), {}), truth, 4) + 0.5


def test_networks_of_spandrel_give_what_spandrel_gives_tile_by_tile(tmp_path: Path) -> None:
    from spandrel import ModelLoader
    from spandrel.architectures.ESRGAN.__arch.RRDB import RRDBNet

    torch.manual_seed(0)
    network = RRDBNet(num_filters=8, num_blocks=1, scale=4)
    torch.save(network.state_dict(), tmp_path / "esrgan.pth")
    lq = photo(40, 30)
    method = open_method(f"esrgan={tmp_path / 'esrgan.pth'}", nothing_else)
    restored = method.load()(given(lq), {})
    unit = torch.from_numpy(lq).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        expected = ModelLoader().load_from_file(tmp_path / "esrgan.pth").eval()(unit)[0] * 255
    assert np.abs(restored - expected.permute(1, 2, 0).numpy()).max() <= 0.51
    assert "spandrel" in method.identity and method.what == "esrgan.pth, by spandrel"

    def run(part: Pixels) -> Pixels:
        return np.repeat(np.repeat(part, 4, axis=0), 4, axis=1)

    assert np.array_equal(in_tiles(run, lq, 4, tile_px=16), run(lq))


NEAREST = """7767517
2 2
Input                    input.1                  0 1 data
Interp                   resize                   1 1 data output 0=1 1=4.000000e+00 2=4.000000e+00
"""


def test_networks_of_ncnn_run_on_the_cpu(tmp_path: Path) -> None:
    pytest.importorskip("ncnn", reason="pip install 'stablesr-kit[ncnn]'")
    (tmp_path / "nearest.param").write_text(NEAREST)
    (tmp_path / "nearest.bin").write_bytes(b"")
    method = open_method(f"nearest={tmp_path / 'nearest.param'}", nothing_else)
    lq = photo(20, 24)
    assert np.array_equal(method.load()(given(lq), {}), np.repeat(np.repeat(lq, 4, axis=0), 4, axis=1))


def test_real_esrgan_of_ncnn_is_real_esrgan() -> None:
    """The weights in ncnn's file, in the architecture of spandrel, give the same picture."""
    pytest.importorskip("ncnn", reason="pip install 'stablesr-kit[ncnn]'")
    try:
        method = open_method("realesrgan=realesrgan-x4plus", nothing_else)
    except ConfigError as error:
        pytest.skip(str(error))
    from spandrel.architectures.ESRGAN.__arch.RRDB import RRDBNet

    from stablesr_kit.evaluation.methods import _bundled_realesrgan

    param = _bundled_realesrgan()
    network = RRDBNet()
    state = network.state_dict()
    shapes = [tuple(value.shape) for name, value in state.items() if name.endswith("weight")]
    weights = iter(_ncnn_convolutions(param.with_suffix(".bin").read_bytes(), shapes))
    for name in [name for name in state if name.endswith("weight")]:
        state[name], state[name.removesuffix("weight") + "bias"] = next(weights)
    network.load_state_dict(state)
    lq = photo(12, 10)
    with torch.no_grad():
        expected = network(torch.from_numpy(lq).permute(2, 0, 1)[None] / 255)[0].clamp(0, 1) * 255
    restored = method.load()(given(lq), {})
    assert np.abs(restored - expected.permute(1, 2, 0).numpy()).max() < 1.1
    assert restored.std() > 10


def _ncnn_convolutions(content: bytes, shapes: list[tuple[int, ...]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Weights and biases of an ncnn file: a tag, weights in half precision padded to 4 bytes, biases in float32."""
    found, place = [], 0
    for shape in shapes:
        assert int.from_bytes(content[place : place + 4], "little") == 0x01306B47
        place += 4
        count = int(np.prod(shape))
        weight = np.frombuffer(content, np.float16, count, place).astype(np.float32).reshape(shape)
        place += (2 * count + 3) // 4 * 4
        bias = np.frombuffer(content, np.float32, shape[0], place).copy()
        place += 4 * shape[0]
        found.append((torch.from_numpy(weight), torch.from_numpy(bias)))
    assert place == len(content)
    return found


def test_latent_diffusion_of_diffusers_is_a_peer(tmp_path: Path) -> None:
    from diffusers import DDIMScheduler, LDMSuperResolutionPipeline, UNet2DModel, VQModel

    torch.manual_seed(0)
    vqvae = VQModel(block_out_channels=(8, 8, 8), norm_num_groups=4, latent_channels=3,
                    down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3)  # fmt: skip
    unet = UNet2DModel(block_out_channels=(8, 16), norm_num_groups=4, in_channels=6, out_channels=3, layers_per_block=1,
                       down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                       up_block_types=("AttnUpBlock2D", "UpBlock2D"))  # fmt: skip
    pipeline = LDMSuperResolutionPipeline(vqvae=vqvae, unet=unet, scheduler=DDIMScheduler())
    pipeline.save_pretrained(tmp_path / "ldm")
    method = open_method(f"ldm={tmp_path / 'ldm'},steps=2", nothing_else)
    assert method.takes == {"steps", "seed"} and "LDMSuperResolutionPipeline of diffusers" in method.what
    restore = method.load()
    first, again, other = (restore(given(photo(32, 64)), {"steps": 2, "seed": seed}) for seed in (0, 0, 1))
    assert first.shape == (128, 256, 3)
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_results_of_any_program_are_found_by_name(tmp_path: Path) -> None:
    result = np.zeros((48, 64, 3), np.uint8)
    for name in ("a", "ab_out", "b"):
        Image.fromarray(result + len(name)).save(tmp_path / f"{name}.png")
    (tmp_path / "Set").mkdir()
    Image.fromarray(result + 9).save(tmp_path / "Set" / "c_x4.png")
    (tmp_path / "Set").rename(tmp_path / "Other")
    restore = open_method(f"theirs={tmp_path}", nothing_else).load()
    assert restore(given(photo(12, 16), name="a"), {}).max() == 1
    assert restore(given(photo(12, 16), name="ab"), {}).max() == 6
    with pytest.raises(ImageError, match=r"holds no result for d; expected d\.png"):
        restore(given(photo(12, 16), name="d"), {})
    (tmp_path / "Other").rename(tmp_path / "Set")
    assert restore(given(photo(12, 16), name="c"), {}).max() == 9


def test_files_that_are_no_networks_are_refused(tmp_path: Path) -> None:
    (tmp_path / "alone.param").write_text(NEAREST)
    with pytest.raises(ConfigError, match=re.escape("alone.bin: no such file; an ncnn network is a .param and a .bin")):
        open_method(f"x={tmp_path / 'alone.param'}", nothing_else)
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="no super-resolution network that spandrel knows"):
        open_method(f"x={tmp_path / 'other.pth'}", nothing_else).load()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model_index.json").write_text("no json")
    with pytest.raises(CheckpointError, match="model_index.json cannot be read"):
        open_method(f"x={tmp_path / 'broken'}", nothing_else)
