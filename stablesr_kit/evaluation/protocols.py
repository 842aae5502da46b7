"""Protocols: every choice on which papers of this field differ, pinned, so that a number means one thing.

Two papers that measure the same weights differ by more than the gains they claim: PSNR of RGB or of luma, a border that
is left out or not, MANIQA trained on one set or another. A protocol names its choices; a reader can hold each against
the paper or the script it is taken from.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from stablesr_kit.errors import ConfigError, ImageError
from stablesr_kit.evaluation.metrics import Channel
from stablesr_kit.imaging.finding import find_pictures


class Layout(NamedTuple):
    """Where the pictures of a set are, below the folder of the data; "{set}" stands for its name."""

    hq: str | None
    """None: there is no truth."""
    lq: str
    lq_suffix: str = ""
    """What the names of the LQ pictures may have behind those of the truths."""


PAIRED = Layout("{set}_HR", "{set}_LRx4", "x4")
"""What every protocol takes beside its own: SET_HR and SET_LRx4, the small ones perhaps named with x4 behind."""
UNPAIRED = Layout(None, "{set}_LQ")
"""Pictures without truth."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a paper measures."""

    name: str
    source: str
    """Where each of these choices can be checked."""
    sets: Mapping[str, int]
    """The sets it is defined on, and how many pictures each has."""
    layouts: tuple[Layout, ...]
    """Where sets are looked for."""
    scale: int
    """How many times larger results are than their inputs."""
    channel: Channel
    """What PSNR and SSIM compare: luma (y), or rgb."""
    border_px: int
    """What PSNR, SSIM and NIQE leave out at each side."""
    crop: str
    """Which part of a picture is restored and measured."""
    metrics: tuple[str, ...]
    """What is measured, by the names of `METRICS`."""
    w: float | None = None
    """Fidelity of StableSR or CodeFormer; None is the model's own."""
    seed: int = 0
    """Of every picture, for methods that draw noise."""


FULL_REFERENCE = ("psnr", "ssim", "lpips-alex", "dists")
NO_REFERENCE = ("niqe", "clip-iqa", "musiq", "maniqa")

_STABLESR_LAYOUTS = (
    Layout("{set}/gt", "{set}/lq"),
    Layout("{set}/test_HR", "{set}/test_LR"),
    PAIRED,
    Layout(None, "{set}/lq"),
    UNPAIRED,
)

PROTOCOLS: Mapping[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="classic-sr",
            source="The convention from Timofte et al. 2014 on: luma of BT.601, a border of the scale left out, inputs "
            "by MATLAB's bicubic reduction",
            sets={"Set5": 5, "Set14": 14, "BSD100": 100, "Urban100": 100},
            layouts=(PAIRED,),
            scale=4,
            channel="y",
            border_px=4,
            crop="whole pictures; truths cut at the right and below to multiples of the scale",
            metrics=("psnr", "ssim", "ms-ssim", "lpips-alex", "dists", "ciede2000", "lq-psnr", "niqe"),
        ),
        Protocol(
            name="stablesr-2023",
            source="Wang et al. 2024, IJCV (arXiv 2305.07015), table 1; luma after the authors' answer to StableSR#45, "
            "test splits only after StableSR#104, the crops they publish",
            sets={"DIV2K_V2_val": 3000, "RealSRVal_crop128": 100, "DrealSRVal_crop128": 93, "DPED-iphone": 113},
            layouts=_STABLESR_LAYOUTS,
            scale=4,
            channel="y",
            border_px=0,
            crop="the published crops, 128 to 512 px, whole",
            metrics=("psnr", "ssim", "lpips-alex", "fid", "clip-iqa", "musiq"),
            w=0.5,
        ),
        Protocol(
            name="osediff-2024",
            source="Wu et al. 2024, NeurIPS (arXiv 2406.08177), tables 1 and 7, and their test_metrics.py: "
            "pyiqa's psnr and ssim on y of ycbcr, lpips, dists, clipiqa, niqe, musiq, maniqa-pipal, fid; no border",
            sets={"DIV2K_V2_val": 3000, "RealSRVal_crop128": 100, "DrealSRVal_crop128": 93},
            layouts=_STABLESR_LAYOUTS,
            scale=4,
            channel="y",
            border_px=0,
            crop="the crops of StableSR, 128 to 512 px, whole",
            metrics=(*FULL_REFERENCE, "fid", *NO_REFERENCE),
        ),
        Protocol(
            name="resshift",
            source="Yue et al. 2023, NeurIPS (arXiv 2307.12348) and the authors' metric script: psnr and ssim on y of "
            "ycbcr, lpips by the lpips package with vgg and with alex, clipiqa, musiq; no border",
            sets={"ImageNet-Test": 3000, "RealSet65": 65, "RealSRV3": 100},
            layouts=(Layout("{set}/gt", "{set}/lq"), PAIRED, Layout(None, "{set}/lq"), UNPAIRED),
            scale=4,
            channel="y",
            border_px=0,
            crop="whole pictures; ImageNet-Test 64 to 256 px",
            metrics=("psnr", "ssim", "lpips-vgg", "lpips-alex", "clip-iqa", "musiq", "niqe"),
        ),
        Protocol(
            name="codeformer-2022",
            source="Zhou et al. 2022, NeurIPS (arXiv 2206.11253), section 4: aligned faces of 512 px, as large as "
            "their inputs; PSNR and SSIM of RGB, no border. Identity is structural here, not the cosine of ArcFace",
            sets={"CelebA-Test": 3000, "LFW-Test": 1711, "WebPhoto-Test": 407, "WIDER-Test": 970},
            layouts=(
                Layout("{set}/hq", "{set}/lq"),
                Layout("{set}_HQ", "{set}_LQ"),
                Layout(None, "{set}/lq"),
                UNPAIRED,
            ),
            scale=1,
            channel="rgb",
            border_px=0,
            crop="whole aligned faces",
            metrics=("psnr", "ssim", "lpips-alex", "identity", "landmarks", "niqe", "fid"),
        ),
    )
}
"""Every protocol by name."""


def find_protocol(name: str) -> Protocol:
    """The protocol of this name. Raises ConfigError that proposes the nearest."""
    if name not in PROTOCOLS:
        nearest = get_close_matches(name.lower(), PROTOCOLS, n=1, cutoff=0.4)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise ConfigError(f"no protocol is called {name!r}; {hint}known: {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


class Pair(NamedTuple):
    """One picture of a set: its name, and its files."""

    name: str
    hq: Path | None
    lq: Path


class PictureSet(NamedTuple):
    """The pictures of a set, in the order of their names, and what is wrong or unusual about it, a line each."""

    name: str
    pairs: list[Pair]
    problems: list[str]
    notes: list[str]


def find_sets(data: Path, protocol: Protocol, limit: int | None = None) -> list[PictureSet]:
    """The sets that a folder holds in one of the protocol's layouts, by name; a set is taken in the first that fits.

    limit: pictures of each set, the first by name. Problems are pictures without a partner; notes tell where a set is
    not the one the protocol is defined on. Raises ConfigError where there is no set at all.
    """
    if not data.is_dir():
        raise ConfigError(f"{data} is no folder; give one that holds pictures as {protocol.name} lays them out")
    found: dict[str, PictureSet] = {}
    for layout in protocol.layouts:
        for name in _names(data, layout):
            if name not in found:
                found[name] = _read_set(data, name, layout, protocol, limit)
    if not any(one.pairs for one in found.values()):
        expected = " or ".join(
            " and ".join(folder.format(set="SET") for folder in (layout.hq, layout.lq) if folder)
            for layout in protocol.layouts
        )
        raise ConfigError(f"{data} holds no pictures for {protocol.name}; expected folders {expected}")
    return [found[name] for name in sorted(found)]


def _names(data: Path, layout: Layout) -> Iterator[str]:
    pattern = re.escape(layout.lq).replace(re.escape("{set}"), "(?P<set>[^/]+)")
    for folder in sorted(data.glob(layout.lq.replace("{set}", "*"))):
        match = re.fullmatch(pattern, folder.relative_to(data).as_posix())
        if match and folder.is_dir() and (layout.hq is None or (data / layout.hq.format(set=match["set"])).is_dir()):
            yield match["set"]


def _read_set(data: Path, name: str, layout: Layout, protocol: Protocol, limit: int | None) -> PictureSet:
    problems: list[str] = []
    notes: list[str] = []
    lq = _by_stem(data / layout.lq.format(set=name), problems)
    if layout.hq is None:
        pairs = [Pair(stem, None, file) for stem, file in sorted(lq.items())]
    else:
        hq = _by_stem(data / layout.hq.format(set=name), problems)
        partners = {stem: stem if stem in lq else stem + layout.lq_suffix for stem in hq}
        pairs = [Pair(stem, hq[stem], lq[partners[stem]]) for stem in sorted(hq) if partners[stem] in lq]
        problems += [f"{hq[stem]}: has no LQ partner of its name" for stem in sorted(hq) if partners[stem] not in lq]
        alone = sorted(lq.keys() - set(partners.values()))
        problems += [f"{lq[stem]}: has no truth of its name" for stem in alone]
    if name not in protocol.sets:
        notes.append(f"{name} is none of the sets of {protocol.name} ({', '.join(protocol.sets)})")
    elif len(pairs) != protocol.sets[name]:
        notes.append(f"{name}: {len(pairs)} of the {protocol.sets[name]} pictures of {protocol.name} are here")
    if limit is not None and len(pairs) > limit:
        notes.append(f"{name}: the first {limit} of {len(pairs)} pictures by name are measured")
        pairs = pairs[:limit]
    return PictureSet(name, pairs, problems, notes)


def _by_stem(folder: Path, problems: list[str]) -> dict[str, Path]:
    try:
        files = [file for file in find_pictures(folder).pictures if file.parent == folder]
    except ImageError as error:
        problems.append(str(error))
        return {}
    found: dict[str, Path] = {}
    for file in files:
        if file.stem in found:
            problems.append(f"{file}: has the name of {found[file.stem]}; only that one is measured")
        found.setdefault(file.stem, file)
    return found


class PublishedRow(NamedTuple):
    """What a paper prints for a method on a set."""

    protocol: str
    set: str
    method: str
    metrics: Mapping[str, float]
    source: str


# PSNR, SSIM, LPIPS, FID, CLIP-IQA, MUSIQ; "-" where the paper gives none.
_STABLESR_TABLE = """
DIV2K_V2_val RealSR 24.62 .5970 .5276 49.49 .3534 28.57
DIV2K_V2_val BSRGAN 24.58 .6269 .3351 44.22 .5246 61.19
DIV2K_V2_val DASR 24.47 .6304 .3543 49.16 .5036 55.19
DIV2K_V2_val Real-ESRGAN+ 24.29 .6372 .3112 37.64 .5276 61.05
DIV2K_V2_val FeMaSR 23.06 .5887 .3126 35.87 .5998 60.83
DIV2K_V2_val LDM 23.32 .5762 .3199 26.47 .6245 62.27
DIV2K_V2_val SwinIR-GAN 23.93 .6285 .3160 36.34 .5338 60.22
DIV2K_V2_val IF_III 23.36 .5636 .4641 37.54 .3980 43.71
DIV2K_V2_val StableSR 23.26 .5726 .3114 24.44 .6771 65.92
RealSRVal_crop128 RealSR 27.30 .7579 .3570 - .3687 38.26
RealSRVal_crop128 BSRGAN 26.38 .7651 .2656 - .5114 63.28
RealSRVal_crop128 DASR 27.02 .7707 .3134 - .3198 41.21
RealSRVal_crop128 Real-ESRGAN+ 25.69 .7614 .2709 - .4495 60.36
RealSRVal_crop128 FeMaSR 25.06 .7356 .2937 - .5406 59.06
RealSRVal_crop128 LDM 25.46 .7145 .3159 - .5688 58.90
RealSRVal_crop128 SwinIR-GAN 26.31 .7729 .2539 - .4360 58.70
RealSRVal_crop128 IF_III 25.47 .7067 .3462 - .3482 41.71
RealSRVal_crop128 StableSR 24.65 .7080 .3002 - .6234 65.88
DrealSRVal_crop128 RealSR 30.19 .8148 .3938 - .3744 26.93
DrealSRVal_crop128 BSRGAN 28.70 .8028 .2858 - .5091 57.16
DrealSRVal_crop128 DASR 29.75 .8262 .3099 - .3813 42.41
DrealSRVal_crop128 Real-ESRGAN+ 28.62 .8052 .2818 - .4515 54.26
DrealSRVal_crop128 FeMaSR 26.87 .7569 .3157 - .5634 53.71
DrealSRVal_crop128 LDM 27.88 .7448 .3379 - .5756 53.72
DrealSRVal_crop128 SwinIR-GAN 28.50 .8043 .2743 - .4447 52.74
DrealSRVal_crop128 IF_III 28.66 .7860 .3853 - .2925 30.71
DrealSRVal_crop128 StableSR 28.03 .7536 .3284 - .6357 58.51
DPED-iphone RealSR - - - - .4496 45.60
DPED-iphone BSRGAN - - - - .4021 45.89
DPED-iphone DASR - - - - .2826 32.68
DPED-iphone Real-ESRGAN+ - - - - .3389 42.42
DPED-iphone FeMaSR - - - - .5306 49.95
DPED-iphone LDM - - - - .4482 44.23
DPED-iphone SwinIR-GAN - - - - .3373 43.30
DPED-iphone IF_III - - - - .2962 37.49
DPED-iphone StableSR - - - - .4799 50.48
"""
# PSNR, SSIM, LPIPS, DISTS, FID, NIQE, MUSIQ, MANIQA, CLIP-IQA
_OSEDIFF_TABLE = """
DIV2K_V2_val StableSR-200 23.26 .5726 .3113 .2048 24.44 4.7581 65.92 .6192 .6771
DIV2K_V2_val DiffBIR-50 23.64 .5647 .3524 .2128 30.72 4.7042 65.81 .6210 .6704
DIV2K_V2_val SeeSR-50 23.68 .6043 .3194 .1968 25.90 4.8102 68.67 .6240 .6936
DIV2K_V2_val PASD-20 23.14 .5505 .3571 .2207 29.20 4.3617 68.95 .6483 .6788
DIV2K_V2_val ResShift-15 24.65 .6181 .3349 .2213 36.11 6.8212 61.09 .5454 .6071
DIV2K_V2_val SinSR-1 24.41 .6018 .3240 .2066 35.57 6.0159 62.82 .5386 .6471
DIV2K_V2_val OSEDiff-1 23.72 .6108 .2941 .1976 26.32 4.7097 67.97 .6148 .6683
DIV2K_V2_val Real-ESRGAN 24.29 .6371 .3112 .2141 37.64 4.6786 61.06 .5501 .5277
DIV2K_V2_val BSRGAN 24.58 .6269 .3351 .2275 44.23 4.7518 61.20 .5071 .5247
DrealSRVal_crop128 StableSR-200 28.03 .7536 .3284 .2269 148.98 6.5239 58.51 .5601 .6356
DrealSRVal_crop128 DiffBIR-50 26.71 .6571 .4557 .2748 166.79 6.3124 61.07 .5930 .6395
DrealSRVal_crop128 SeeSR-50 28.17 .7691 .3189 .2315 147.39 6.3967 64.93 .6042 .6804
DrealSRVal_crop128 PASD-20 27.36 .7073 .3760 .2531 156.13 5.5474 64.87 .6169 .6808
DrealSRVal_crop128 ResShift-15 28.46 .7673 .4006 .2656 172.26 8.1249 50.60 .4586 .5342
DrealSRVal_crop128 SinSR-1 28.36 .7515 .3665 .2485 170.57 6.9907 55.33 .4884 .6383
DrealSRVal_crop128 OSEDiff-1 27.92 .7835 .2968 .2165 135.30 6.4902 64.65 .5899 .6963
DrealSRVal_crop128 Real-ESRGAN 28.64 .8053 .2847 .2089 147.62 6.6928 54.18 .4907 .4422
RealSRVal_crop128 StableSR-200 24.70 .7085 .3018 .2288 128.51 5.9122 65.78 .6221 .6178
RealSRVal_crop128 DiffBIR-50 24.75 .6567 .3636 .2312 128.99 5.5346 64.98 .6246 .6463
RealSRVal_crop128 SeeSR-50 25.18 .7216 .3009 .2223 125.55 5.4081 69.77 .6442 .6612
RealSRVal_crop128 PASD-20 25.21 .6798 .3380 .2260 124.29 5.4137 68.75 .6487 .6620
RealSRVal_crop128 ResShift-15 26.31 .7421 .3460 .2498 141.71 7.2635 58.43 .5285 .5444
RealSRVal_crop128 SinSR-1 26.28 .7347 .3188 .2353 135.93 6.2872 60.80 .5385 .6122
RealSRVal_crop128 OSEDiff-1 25.15 .7341 .2921 .2128 123.49 5.6476 69.09 .6326 .6693
RealSRVal_crop128 Real-ESRGAN 25.69 .7616 .2727 .2063 135.18 5.8295 60.18 .5487 .4449
"""
_CLASSIC_TABLE = """
Set5 bicubic 28.42 .8104
"""


def _rows(protocol: str, source: str, metrics: tuple[str, ...], table: str) -> Iterator[PublishedRow]:
    for line in table.split("\n"):
        if line:
            name, method, *values = line.split(" ")
            given = {metric: float(value) for metric, value in zip(metrics, values, strict=True) if value != "-"}
            yield PublishedRow(protocol, name, method, given, source)


PUBLISHED: tuple[PublishedRow, ...] = (
    *_rows(
        "stablesr-2023",
        "Wang et al. 2024, table 1",
        ("psnr", "ssim", "lpips-alex", "fid", "clip-iqa", "musiq"),
        _STABLESR_TABLE,
    ),
    *_rows(
        "osediff-2024",
        "Wu et al. 2024, tables 1 and 7",
        ("psnr", "ssim", "lpips-alex", "dists", "fid", "niqe", "musiq", "maniqa", "clip-iqa"),
        _OSEDIFF_TABLE,
    ),
    *_rows("classic-sr", "as quoted from Kim et al. 2016 on", ("psnr", "ssim"), _CLASSIC_TABLE),
)
"""Rows that papers print; the same weights differ between papers by up to 0.4 dB and 0.007 LPIPS."""


def published(protocol: str, sets: Iterable[str]) -> list[PublishedRow]:
    """The published rows of a protocol, those of these sets first; all of them, where none of these sets has any."""
    own = [row for row in PUBLISHED if row.protocol == protocol]
    of_sets = [row for row in own if row.set in set(sets)]
    return of_sets or own
