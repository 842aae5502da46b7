"""Studies: the same methods and metrics while one thing changes. Each is a table and a figure."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from stablesr_kit.errors import ConfigError
from stablesr_kit.evaluation.methods import Method, Settings, open_method
from stablesr_kit.evaluation.protocols import PictureSet, Protocol
from stablesr_kit.evaluation.resampling import Array
from stablesr_kit.evaluation.runner import AS_GIVEN, Evaluation, Source, Task
from stablesr_kit.storage import replacing_file

Value = float | int | str


class Point(NamedTuple):
    """A method at one place of a study."""

    method: Method
    settings: Settings
    source: Source
    at: Mapping[str, Value]
    """Where it is, by the axes of the study."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """What changes, and which methods change with it."""

    name: str
    title: str
    caption: str
    axes: tuple[str, ...]
    """What changes, first that of the figure's horizontal axis."""
    points: Callable[[Sequence[Method], Protocol], list[Point]]
    lacking: str = ""
    """What to say where no method can take part."""

    def tasks(self, evaluation: Evaluation, sets: Sequence[PictureSet], methods: Sequence[Method]) -> list[Task]:
        """What is to be run. Raises ConfigError where no method can take part."""
        points = self.points(methods, evaluation.protocol)
        if not points:
            raise ConfigError(f"--study {self.name}: {self.lacking}")
        return [
            task for point in points for task in evaluation.tasks(sets, [point.method], point.settings, point.source)
        ]


KERNEL_SIGMAS = (0.6, 1.2, 1.8, 2.4, 3.0)
W_VALUES = (0.0, 0.25, 0.5, 0.75, 1.0)
STEP_VALUES = (1, 2, 4, 8, 16)
SEED_VALUES = (0, 1, 2, 3)
PHOTO_DEGRADATIONS = ("bicubic", "area", "light", "classical", "stablesr-512")
LOSSES = ("mse", "perceptual", "adversarial")
FACE_DEGRADATIONS = ("codeformer-small", "codeformer", "codeformer-inpainting")


def _along(setting: str, values: Iterable[Value]) -> Callable[[Sequence[Method], Protocol], list[Point]]:
    """Every method that takes a setting, with each of its values."""

    def points(methods: Sequence[Method], _: Protocol) -> list[Point]:
        return [
            Point(method, {setting: value}, AS_GIVEN, {setting: value})
            for method in methods
            if setting in method.takes
            for value in values
        ]

    return points


def _degradations(methods: Sequence[Method], protocol: Protocol) -> list[Point]:
    names = PHOTO_DEGRADATIONS if protocol.scale > 1 else FACE_DEGRADATIONS
    return [
        Point(method, {}, Source(preset=name), {"degradation": name})
        for name in names
        for method in methods
        if not method.what.startswith("results in ")
    ]


def _kernels(methods: Sequence[Method], protocol: Protocol) -> list[Point]:
    """The method that is told a kernel with every kernel, and the others with the one they have in them."""
    if protocol.scale == 1:
        return []
    told = open_method("nonblind=nonblind", _nothing_else)
    blind = [one for one in methods if not one.what.startswith("results in ") and "sigma" not in one.takes]
    return [
        *(
            Point(told, {"sigma": assumed}, Source(blur_sigma=true), {"sigma_lr": true, "sigma_sr": assumed})
            for true in KERNEL_SIGMAS
            for assumed in KERNEL_SIGMAS
        ),
        *(Point(method, {}, Source(blur_sigma=true), {"sigma_lr": true}) for method in blind for true in KERNEL_SIGMAS),
    ]


def _losses(methods: Sequence[Method], _: Protocol) -> list[Point]:
    """The methods that are called as the losses are, in the order of the lecture."""
    named = {method.name: method for method in methods}
    return [Point(named[loss], {}, AS_GIVEN, {"loss": loss}) for loss in LOSSES if loss in named]


def _nothing_else(_: str, what: str) -> Method:
    raise ConfigError(f"{what} is not known")


STUDIES: Mapping[str, Study] = {
    study.name: study
    for study in (
        Study(
            name="w",
            title="Fidelity w",
            caption="From realism (0) to fidelity (1): what controllable feature wrapping, or CodeFormer's fusion, "
            "trades. Methods without w are level lines.",
            axes=("w",),
            points=_along("w", W_VALUES),
            lacking="no method here has a fidelity w; give a StableSR or CodeFormer model with --method NAME=MODEL",
        ),
        Study(
            name="steps",
            title="Denoising steps",
            caption="What more steps of the sampler bring. Methods without steps are level lines.",
            axes=("steps",),
            points=_along("steps", STEP_VALUES),
            lacking="no method here takes steps; give a diffusion model with --method NAME=MODEL",
        ),
        Study(
            name="seeds",
            title="Seeds",
            caption="The same pictures from other noise. Maps show, per pixel, the deviation over the seeds and the "
            "difference of the first two: what is bright is invented, not restored.",
            axes=("seed",),
            points=_along("seed", SEED_VALUES),
            lacking="no method here draws noise; give a diffusion model with --method NAME=MODEL",
        ),
        Study(
            name="degradation",
            title="Degradation",
            caption="The truths degraded anew, from what every method was made for to what photographs suffer. "
            "A better degradation model extends what can be solved; it is no silver bullet.",
            axes=("degradation",),
            points=_degradations,
            lacking="results of other programs cannot be made anew; give a method that runs",
        ),
        Study(
            name="kernel-mismatch",
            title="Kernel mismatch",
            caption="After Gu et al. 2019, figure 1. The truth is blurred by a Gaussian of sigma_LR (px of the large "
            "picture) and reduced; the non-blind method assumes sigma_SR. Assumed too small leaves blur, too large "
            "makes rings; on the diagonal the kernel is known. Blind methods have whatever kernel they learned.",
            axes=("sigma_lr", "sigma_sr"),
            points=_kernels,
            lacking="it needs a protocol that enlarges",
        ),
        Study(
            name="losses",
            title="Losses",
            caption="The same small network trained by mean squared error, a perceptual loss and an adversarial one. "
            "The first averages what is possible, which looks smooth; each of the others buys detail with PSNR.",
            axes=("loss",),
            points=_losses,
            lacking="train the networks by configs/losses/stages.yaml and give them as --method mse=DIR, "
            "--method perceptual=DIR and --method adversarial=DIR",
        ),
    )
}
"""Every study by name."""


def find_study(name: str) -> Study:
    """The study of this name. Raises ConfigError that proposes the nearest."""
    if name not in STUDIES:
        nearest = get_close_matches(name.lower(), STUDIES, n=1, cutoff=0.4)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise ConfigError(f"no study is called {name!r}; {hint}known: {', '.join(STUDIES)}")
    return STUDIES[name]


class SeedMaps(NamedTuple):
    """What the seeds of one method disagree on in one picture, in levels of 255."""

    set: str
    picture: str
    method: str
    deviation: float
    """Mean over the picture of the deviation over the seeds."""
    difference: float
    """Mean absolute difference over all pairs of seeds."""
    deviation_map: Path
    difference_map: Path


MAP_GAIN = 8
"""Levels in a map per level of deviation or difference."""


def seed_maps(evaluation: Evaluation, sets: Sequence[PictureSet], methods: Sequence[Method]) -> list[SeedMaps]:
    """Maps of every picture that was restored with every seed, written below the folder of the evaluation."""
    maps = []
    for method in methods:
        for one in sets:
            for pair in one.pairs:
                labels = [Task(one.name, pair, method, {"seed": seed}, AS_GIVEN).label for seed in SEED_VALUES]
                records = [evaluation.records.get((one.name, pair.name, label)) for label in labels]
                if "seed" not in method.takes or not all(record and record.sha256 for record in records):
                    continue
                results = [_read(evaluation.result_path(one.name, label, pair.name)) for label in labels]
                deviation = np.std(results, axis=0).mean(axis=2)
                difference = np.abs(results[0] - results[1]).mean(axis=2)
                pairs = [float(np.abs(first - second).mean()) for first, second in combinations(results, 2)]
                folder = evaluation.folder / "studies" / "seeds" / one.name / method.name
                folder.mkdir(parents=True, exist_ok=True)
                paths = [folder / f"{pair.name}_{kind}.png" for kind in ("deviation", "difference")]
                for path, values in zip(paths, (deviation, difference), strict=True):
                    with replacing_file(path, is_synced=False) as part:
                        Image.fromarray((values * MAP_GAIN).round().clip(0, 255).astype(np.uint8)).save(part, "PNG")
                maps.append(
                    SeedMaps(one.name, pair.name, method.name, float(deviation.mean()), float(np.mean(pairs)), *paths)
                )
    return maps


def _read(path: Path) -> Array:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), np.float64)
