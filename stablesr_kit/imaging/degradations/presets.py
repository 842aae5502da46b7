"""Degradations by name."""

from difflib import get_close_matches

from stablesr_kit.errors import ConfigError
from stablesr_kit.imaging.degradations.classical import ClassicalConfig
from stablesr_kit.imaging.degradations.second_order import SecondOrderConfig

DegradationConfig = SecondOrderConfig | ClassicalConfig

CLASSICAL = ClassicalConfig()

STABLESR_512 = SecondOrderConfig()
STABLESR_768V = SecondOrderConfig(last_jpeg_quality=(60.0, 95.0), clean_probability=0.0, sharpen_target=False)
STABLESR_FACE = ClassicalConfig(grey_probability=0.01, grey_target=True, clean_probability=0.005)

CODEFORMER = ClassicalConfig(
    blur_sigma=(1.0, 15.0), downsample=(4.0, 30.0), noise_sigma=(0.0, 20.0), jpeg_quality=(30.0, 80.0)
)
CODEFORMER_SMALL = ClassicalConfig(
    blur_sigma=(0.1, 10.0), downsample=(1.0, 12.0), noise_sigma=(0.0, 15.0), jpeg_quality=(60.0, 100.0)
)
CODEFORMER_COLORIZATION = ClassicalConfig(
    blur_sigma=(1.0, 15.0),
    downsample=(4.0, 30.0),
    noise_sigma=(0.0, 20.0),
    jpeg_quality=(30.0, 80.0),
    shift_probability=0.3,
    grey_probability=0.01,
    jitter_probability=0.3,
)
CODEFORMER_INPAINTING = ClassicalConfig(
    blur_sigma=None, downsample=(1.0, 1.0), noise_sigma=(0.0, 0.0), jpeg_quality=None, stroke_probability=1.0
)
CODEFORMER_256 = ClassicalConfig(
    kernel_size=21, blur_sigma=(0.5, 7.5), downsample=(2.0, 15.0), noise_sigma=(0.0, 20.0), jpeg_quality=(30.0, 80.0)
)
CODEFORMER_256_SMALL = ClassicalConfig(
    kernel_size=21, blur_sigma=(0.1, 5.0), downsample=(1.0, 6.0), noise_sigma=(0.0, 15.0), jpeg_quality=(60.0, 100.0)
)

LIGHT = ClassicalConfig(
    kernel_size=13,
    blur_sigma=(0.2, 1.0),
    downsample=(4.0, 4.0),
    down_modes=("area", "bicubic"),
    antialias=True,
    noise_sigma=(0.0, 4.0),
    jpeg_quality=(80.0, 100.0),
    up_mode="bicubic",
)
BICUBIC = ClassicalConfig(
    blur_sigma=None,
    downsample=(4.0, 4.0),
    down_modes=("bicubic",),
    antialias=True,
    noise_sigma=(0.0, 0.0),
    jpeg_quality=None,
    up_mode="bicubic",
)
AREA = ClassicalConfig(
    blur_sigma=None,
    downsample=(4.0, 4.0),
    down_modes=("area",),
    noise_sigma=(0.0, 0.0),
    jpeg_quality=None,
    up_mode="bicubic",
)

PRESETS: dict[str, DegradationConfig] = {
    "stablesr-512": STABLESR_512,
    "stablesr-768v": STABLESR_768V,
    "stablesr-face": STABLESR_FACE,
    "classical": CLASSICAL,
    "codeformer": CODEFORMER,
    "codeformer-small": CODEFORMER_SMALL,
    "codeformer-colorization": CODEFORMER_COLORIZATION,
    "codeformer-inpainting": CODEFORMER_INPAINTING,
    "codeformer-256": CODEFORMER_256,
    "codeformer-256-small": CODEFORMER_256_SMALL,
    "light": LIGHT,
    "bicubic": BICUBIC,
    "area": AREA,
}
"""Every named degradation."""

DESCRIPTIONS: dict[str, str] = {
    "stablesr-512": "two passes of blur, resizing, noise and JPEG on a sharpened target: StableSR's 512 model",
    "stablesr-768v": "the same without sharpening: StableSR's 768v model",
    "stablesr-face": "one pass, sometimes grey: StableSR's face model",
    "classical": "one pass, {[(I_h (x) k) down_r + n] JPEG_q} up_r, over the whole range of strengths",
    "codeformer": "one strong pass: CodeFormer's stage II, and the large half of stage III",
    "codeformer-small": "one weak pass: the small half of CodeFormer's stage III",
    "codeformer-colorization": "one strong pass with changed or lost colours: CodeFormer's colourisation",
    "codeformer-inpainting": "white brush strokes and nothing else: CodeFormer's inpainting",
    "codeformer-256": "codeformer for faces of 256 px: blur and reduction at half their lengths",
    "codeformer-256-small": "codeformer-small for faces of 256 px",
    "light": "a clean photograph of today, 4x smaller and enlarged again",
    "bicubic": "nothing but 4x smaller by bicubic reduction, and enlarged again",
    "area": "nothing but 4x smaller by the mean of 4x4 pixels, and enlarged again",
}
"""What each is, in one line."""


def find_preset(name: str) -> DegradationConfig:
    """The named degradation. Raises ConfigError that proposes the nearest name."""
    if name in PRESETS:
        return PRESETS[name]
    nearest = get_close_matches(name.lower(), PRESETS, n=1, cutoff=0.4)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise ConfigError(f"no degradation is called {name!r}; {hint}known: {', '.join(PRESETS)}")
