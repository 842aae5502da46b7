"""How good a restored picture is: every metric is one function of pictures, and one line of `METRICS`.

Pictures are uint8 arrays (H, W, 3), RGB. Libraries compute what they compute well (scikit-image, torchmetrics, lpips,
piq); what is written here, no library of a permissive licence has, or none without a download of its own.
"""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import convolve, gaussian_filter, uniform_filter
from scipy.special import gamma
from torch import Tensor

from stablesr_kit.checkpoints.reading import read_checkpoint
from stablesr_kit.errors import CheckpointError, ConfigError
from stablesr_kit.evaluation.resampling import Array, Pixels, resize_bicubic_matlab
from stablesr_kit.faces.detectors import MTCNNDetector
from stablesr_kit.faces.identity import identity_distance
from stablesr_kit.spaces import pixels_to_image
from stablesr_kit.storage import sha256
from stablesr_kit.video.motion import dis_flow, motion_between
from stablesr_kit.video.motion import warping_error as warping_error_of_pair

if TYPE_CHECKING:
    from torch import nn

Channel = Literal["y", "rgb"]
Better = Literal["higher", "lower"]

BORDER_PX = 4
"""What is left out at each side, as the literature does at a scale of 4."""


# ---- against the truth, in pixels


def luma(pixels: Pixels) -> Array:
    """Y of BT.601 in its studio range, 16 to 235, not rounded."""
    return pixels.astype(np.float64) @ np.array([65.481, 128.553, 24.966]) / 255 + 16


def psnr(restored: Pixels, truth: Pixels, border_px: int, channel: Channel = "y") -> float:
    """Peak signal-to-noise ratio in dB, without a border; infinite for equal pictures."""
    x, y = (_compared(pixels, border_px, channel) for pixels in (restored, truth))
    error = float(np.mean((x - y) ** 2))
    return 10 * math.log10(255**2 / error) if error else math.inf


def ssim(restored: Pixels, truth: Pixels, border_px: int, channel: Channel = "y") -> float:
    """Structural similarity (Wang et al. 2004), window 11, deviation 1.5, without a border; of RGB the mean."""
    from skimage.metrics import structural_similarity

    x, y = (_compared(pixels, border_px, channel) for pixels in (restored, truth))
    if min(x.shape[:2]) < 11:
        return math.nan
    return float(
        structural_similarity(
            x,
            y,
            data_range=255,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            channel_axis=2,
        )
    )


def ms_ssim(restored: Pixels, truth: Pixels, border_px: int, channel: Channel = "y") -> float:
    """Multi-scale structural similarity (Wang et al. 2003), five scales; NaN for sides of at most 160 px."""
    from piq import multi_scale_ssim

    x, y = (_compared(pixels, border_px, channel) for pixels in (restored, truth))
    if min(x.shape[:2]) <= 160:
        return math.nan
    units = (torch.from_numpy(values).permute(2, 0, 1)[None] / 255 for values in (x, y))
    return float(multi_scale_ssim(*units, data_range=1.0))


def gmsd(restored: Pixels, truth: Pixels) -> float:
    """Gradient magnitude similarity deviation of the luma (Xue et al. 2014); 0 is best."""
    prewitt = np.array([[1, 0, -1]] * 3) / 3

    def gradient(pixels: Pixels) -> Array:
        half = uniform_filter(luma(pixels), 2)[::2, ::2]
        return np.hypot(convolve(half, prewitt), convolve(half, prewitt.T))

    x, y = gradient(restored), gradient(truth)
    return float(np.std((2 * x * y + 170) / (x**2 + y**2 + 170)))


def ciede2000(restored: Pixels, truth: Pixels) -> float:
    """Mean colour difference Delta E 2000 (Sharma et al. 2005) of sRGB pictures; 1 is just visible."""
    from skimage.color import deltaE_ciede2000, rgb2lab

    return float(np.mean(deltaE_ciede2000(rgb2lab(restored), rgb2lab(truth))))


# ---- against the input


def lq_psnr(restored: Pixels, lq: Pixels) -> float:
    """PSNR in RGB of the input against the result made as small again, by MATLAB's bicubic reduction.

    How far a result keeps to what it was made of. Where the input was damaged otherwise, compare methods only.
    """
    return psnr(resize_bicubic_matlab(restored, *lq.shape[:2]), lq, 0, "rgb")


# ---- of the result alone


class PristineStatistics(NamedTuple):
    """What NIQE knows of undamaged photographs."""

    mean: Array
    covariance: Array
    window: Array

    @classmethod
    def load(cls, file: Path) -> "PristineStatistics":
        """From the .npz file of the published implementation. Raises ConfigError."""
        try:
            with np.load(file) as data:
                return cls(data["mu_pris_param"].ravel(), data["cov_pris_param"], data["gaussian_window"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"niqe_statistics={file} cannot be read ({error}); give niqe_pris_params.npz or leave it out"
            ) from error


def niqe(pixels: Pixels, pristine: PristineStatistics, border_px: int) -> float:
    """Natural image quality evaluator (Mittal et al. 2013) of the rounded luma; lower is more natural.

    Blocks of 96 px at full and of 48 px at half size; NaN when the picture has fewer than two blocks.
    """
    image = np.round(_inside(luma(pixels), border_px))
    rows, columns = image.shape[0] // 96, image.shape[1] // 96
    if rows * columns < 2:
        return math.nan
    image = image[: rows * 96, : columns * 96]
    features = []
    for block_px in (96, 48):
        mean = convolve(image, pristine.window, mode="nearest")
        deviation = np.sqrt(np.abs(convolve(image**2, pristine.window, mode="nearest") - mean**2))
        normalised = (image - mean) / (deviation + 1)
        blocks = normalised.reshape(rows, block_px, columns, block_px).swapaxes(1, 2).reshape(-1, block_px, block_px)
        features.append([_block_features(block) for block in blocks])
        half = Image.fromarray(image.astype(np.float32)).resize(
            (image.shape[1] // 2, image.shape[0] // 2), Image.Resampling.BICUBIC
        )
        image = np.asarray(half).astype(np.float64)
    both = np.concatenate(features, axis=1)
    both = both[~np.isnan(both).any(axis=1)]
    if len(both) < 2:  # flat pictures have no block whose shape could be fitted
        return math.nan
    difference = both.mean(axis=0) - pristine.mean
    covariance = (np.cov(both, rowvar=False) + pristine.covariance) / 2
    return float(np.sqrt(difference @ np.linalg.pinv(covariance) @ difference))


def _block_features(block: Array) -> list[float]:
    """Shape and spread of the normalised luma, and of its products with four neighbours."""
    alpha, left, right = _fit_asymmetric_gaussian(block)
    features = [alpha, (left + right) / 2]
    for shift in ((0, 1), (1, 0), (1, 1), (1, -1)):
        alpha, left, right = _fit_asymmetric_gaussian(block * np.roll(block, shift, axis=(0, 1)))
        features += [alpha, (right - left) * gamma(2 / alpha) / gamma(1 / alpha), left, right]
    return features


_ALPHAS = np.arange(0.2, 10.001, 0.001)
_RATIOS = gamma(2 / _ALPHAS) ** 2 / (gamma(1 / _ALPHAS) * gamma(3 / _ALPHAS))


def _fit_asymmetric_gaussian(values: Array) -> tuple[float, float, float]:
    """(shape, left scale, right scale) of an asymmetric generalised Gaussian, by matching moments."""
    left = np.sqrt(np.mean(values[values < 0] ** 2)) if (values < 0).any() else np.nan
    right = np.sqrt(np.mean(values[values > 0] ** 2)) if (values > 0).any() else np.nan
    skew = left / right
    ratio = np.mean(np.abs(values)) ** 2 / np.mean(values**2)
    ratio *= (skew**3 + 1) * (skew + 1) / (skew**2 + 1) ** 2
    if np.isnan(ratio):
        return math.nan, math.nan, math.nan
    alpha = _ALPHAS[np.argmin((_RATIOS - ratio) ** 2)]
    scale = np.sqrt(gamma(1 / alpha) / gamma(3 / alpha))
    return float(alpha), float(left * scale), float(right * scale)


def seam_energy(pixels: Pixels, period_px: int = 64) -> float:
    """How much larger the steps of the luma are across the lines of a grid than beside them; 1 is no seam.

    The ratio of the mean squared step across every line at a multiple of period_px to that of the steps at a distance
    of half a period, over rows and columns. Tiles leave seams at such lines; contents do not. NaN for pictures of less
    than two periods per side, and for flat ones.
    """
    y = luma(pixels)
    at_lines, elsewhere = [], []
    for steps in (np.diff(y, axis=0) ** 2, np.diff(y, axis=1).T ** 2):
        at_lines += list(steps[period_px - 1 :: period_px].mean(axis=1))
        elsewhere += list(steps[period_px // 2 - 1 :: period_px].mean(axis=1))
    if min(y.shape) < 2 * period_px or not any(elsewhere):
        return math.nan
    return float(np.mean(at_lines) / np.mean(elsewhere))


def grid(pixels: Pixels, period_px: int = 4) -> float:
    """Deviation, in levels of 255, of what repeats every period_px pixels in luma; photographs have about 0.03.

    The deviation, over the places in a block of period_px x period_px, of the median over all blocks of what a Gaussian
    of 2 px takes away. Decoders paint such lattices, and LPIPS does not mind them.
    """
    y = pixels.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    detail = y - gaussian_filter(y, 2)
    rows, columns = (side // period_px for side in detail.shape)
    blocks = detail[: rows * period_px, : columns * period_px].reshape(rows, period_px, columns, period_px)
    return float(np.std(np.median(blocks, axis=(0, 2))))


# ---- by networks


WEIGHT_SUFFIXES = (".npz", ".pt", ".pth", ".safetensors")


class Weights(NamedTuple):
    """Where the trained weights of metrics are: in these folders or in one that is in them.

    What is not there, libraries take from their caches, or fetch.
    """

    folders: tuple[Path, ...] = ()

    def find(self, *names: str) -> Path | None:
        """The first of these files that is there."""
        return next((place / name for name in names for place in self._places() if (place / name).is_file()), None)

    def hashes(self) -> list[str]:
        """Names and SHA-256 of all weights that are there."""
        files = [file for place in self._places() for file in sorted(place.iterdir()) if file.suffix in WEIGHT_SUFFIXES]
        return [f"{file.name} {sha256(file)}" for file in files]

    def _places(self) -> list[Path]:
        return [place for folder in self.folders for place in (folder, *sorted(folder.glob("*/")))]

    def need(self, *names: str) -> Path:
        """The same. Raises CheckpointError where there is none."""
        file = self.find(*names)
        if file is None:
            raise CheckpointError(f"needs {' or '.join(names)} in the folder of --weights")
        return file

    def features(self, net: Literal["alex", "vgg"]) -> dict[str, Tensor]:
        """Convolutions of AlexNet or VGG-16 by torchvision's names without `features.`, in float32.

        From the folder (lpips_alex.safetensors, vgg16_fp16.safetensors, or torchvision's own files), else from
        torchvision's cache or server. Raises CheckpointError.
        """
        names = {
            "alex": ("lpips_alex.safetensors", "alexnet-owt-7be5be79.pth"),
            "vgg": ("vgg16_fp16.safetensors", "vgg16-397923af.pth"),
        }[net]
        file = self.find(*names)
        if file is not None:
            content: Mapping[str, object] = read_checkpoint(file).content
        else:
            from torchvision.models import AlexNet_Weights, VGG16_Weights

            enum: Any = AlexNet_Weights if net == "alex" else VGG16_Weights
            try:
                content = enum.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True)
            except (OSError, RuntimeError) as error:  # no network, no room, or a hash that does not match
                raise CheckpointError(
                    f"needs {' or '.join(names)} in the folder of --weights; torchvision cannot fetch it ({error})"
                ) from error
        prefix = "features."
        return {
            name.removeprefix(prefix): value.float()
            for name, value in content.items()
            if name.startswith(prefix) and isinstance(value, Tensor)
        }


class LPIPS:
    """Learned perceptual distance (Zhang et al. 2018, v0.1) by the lpips package: (restored, truth) -> distance."""

    def __init__(self, weights: Weights, net: Literal["alex", "vgg"]) -> None:
        import lpips

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it calls torchvision as of old
            self.network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)  # trained heads; the trunk follows
        state = weights.features(net)
        trunk = {name: state[name.split(".", 1)[1]] for name in self.network.net.state_dict()}  # slice1.0.weight
        self.network.net.load_state_dict(trunk)
        self.network.eval()

    @torch.no_grad()
    def __call__(self, restored: Pixels, truth: Pixels) -> float:
        """The distance; NaN for sides of less than 64 px, on which the networks do not work."""
        if min(truth.shape[:2]) < 64:
            return math.nan
        return float(self.network(pixels_to_image(restored), pixels_to_image(truth)))


class DISTS:
    """Deep image structure and texture similarity (Ding et al. 2020): (restored, truth) -> distance, 0 for equal ones.

    Its features are those of VGG-16 with L2 pooling, its weights alpha and beta those of the published implementation.
    """

    STAGES = (4, 9, 16, 23, 30)
    """Where the five stages of VGG-16's `features` end; every one but the first begins with a pooling."""

    def __init__(self, weights: Weights) -> None:
        from torchvision.models import vgg16

        with torch.device("meta"):
            self.layers: nn.Sequential = vgg16().features[: self.STAGES[-1]]
        state = weights.features("vgg")
        self.layers.load_state_dict({name: state[name] for name in self.layers.state_dict()}, assign=True)
        content = read_checkpoint(weights.need("dists_alpha_beta.safetensors", "DISTS.pt", "weights.pt")).content
        self.alpha, self.beta = (torch.as_tensor(content[name]).float().flatten() for name in ("alpha", "beta"))
        hanning = torch.hann_window(5, periodic=False)[1:-1]
        self.blur = torch.outer(hanning, hanning) / hanning.sum() ** 2

    @torch.no_grad()
    def __call__(self, restored: Pixels, truth: Pixels) -> float:
        """The distance, at the pictures' own size."""
        similarity, channel = torch.zeros(()), 0
        for x, y in zip(self._features(restored), self._features(truth), strict=True):
            alpha, beta = (values[channel : channel + x.shape[1]] for values in (self.alpha, self.beta))
            mean_x, mean_y = x.mean((0, 2, 3)), y.mean((0, 2, 3))
            variance_x, variance_y = ((z - m.view(1, -1, 1, 1)) ** 2 for z, m in ((x, mean_x), (y, mean_y)))
            covariance = (x * y).mean((0, 2, 3)) - mean_x * mean_y
            spread = variance_x.mean((0, 2, 3)) + variance_y.mean((0, 2, 3))
            similarity += (alpha * (2 * mean_x * mean_y + 1e-6) / (mean_x**2 + mean_y**2 + 1e-6)).sum()
            similarity += (beta * (2 * covariance + 1e-6) / (spread + 1e-6)).sum()
            channel += x.shape[1]
        return max(0.0, 1 - float(similarity / (self.alpha.sum() + self.beta.sum())))

    def _features(self, pixels: Pixels) -> Iterable[Tensor]:
        """The picture itself, in [0, 1], and the last output of every stage."""
        x = (pixels_to_image(pixels) + 1) / 2
        yield x
        mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        x = (x - mean) / deviation
        start = 0
        for end in self.STAGES:
            for layer in self.layers[start:end]:
                x = self._pooled(x) if isinstance(layer, torch.nn.MaxPool2d) else layer(x)
            yield x.clone()  # the next ReLU works in place
            start = end

    def _pooled(self, x: Tensor) -> Tensor:
        blur = self.blur.expand(x.shape[1], 1, 3, 3)
        return (torch.nn.functional.conv2d(x**2, blur, stride=2, padding=1, groups=x.shape[1]) + 1e-12).sqrt()


class CLIPIQA:
    """CLIP-IQA (Wang et al. 2023): pixels -> how much more a photo is "Good photo." than "Bad photo.", 0 to 1.

    The ResNet-50 of CLIP without position embeddings, by piq; weights RN50.pt as OpenAI publishes them.
    """

    def __init__(self, weights: Weights) -> None:
        from piq.feature_extractors.clip import build_model

        from stablesr_kit.checkpoints.networks import clip_tokenizer

        state = read_torchscript(weights.need("RN50.pt"), CLIP_RN50_SHA256)
        self.network = build_model(state).float().eval()
        tokens = clip_tokenizer(pads_with_zero=True, length=77)(
            ["Good photo.", "Bad photo."], padding="max_length", return_tensors="pt"
        ).input_ids
        with torch.no_grad():
            self.anchors = _unit(self.network.encode_text(tokens))
        self.mean, self.deviation = (
            torch.tensor(values).view(3, 1, 1)
            for values in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
        )

    @torch.no_grad()
    def __call__(self, pixels: Pixels) -> float:
        """The probability of the good one, at the picture's own size."""
        image = ((pixels_to_image(pixels) + 1) / 2 - self.mean) / self.deviation
        features = _unit(self.network.encode_image(image, pos_embedding=False))
        logits = self.network.logit_scale.exp() * features @ self.anchors.T
        return float(logits.softmax(dim=-1)[0, 0])


CLIP_RN50_SHA256 = "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762"


def read_torchscript(file: Path, expected: str) -> dict[str, Tensor]:
    """The tensors of a TorchScript archive, which is only opened if it has this SHA-256. Raises CheckpointError."""
    found = sha256(file)
    if found != expected:
        raise CheckpointError(f"{file} has SHA-256 {found}, expected {expected}; get the published file")
    return dict(torch.jit.load(str(file), map_location="cpu").state_dict())


def _unit(features: Tensor) -> Tensor:
    return features.float() / features.float().norm(dim=-1, keepdim=True)


class PyIQA:
    """A metric of the pyiqa package, whose licence does not allow commercial use; nothing else here depends on it.

    Its random crops (MANIQA takes 20) are drawn from the same seed for every picture.
    """

    FILES: Mapping[str, str] = {"musiq": "musiq_koniq_ckpt-e95806b9.pth", "maniqa-pipal": "MANIQA_PIPAL-ae6d356b.pth"}

    def __init__(self, weights: Weights, name: str) -> None:
        import pyiqa

        file = weights.find(self.FILES[name])
        local = {"pretrained_model_path": str(file)} if file else {}
        if file:
            read_checkpoint(file)  # pyiqa would run what a pickle asks for
        try:
            self.metric = pyiqa.create_metric(name, device="cpu", **local)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"needs {self.FILES[name]} in the folder of --weights ({error})") from error

    @torch.no_grad()
    def __call__(self, pixels: Pixels) -> float:
        """The score of one picture."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return float(self.metric((pixels_to_image(pixels) + 1) / 2))


# ---- faces and text


@cache
def _face_detector() -> MTCNNDetector:
    return MTCNNDetector()


def landmark_distance(restored: Pixels, truth: Pixels) -> float:
    """Mean distance in px of five landmarks (MTCNN) of the largest face; NaN where the truth shows none.

    Where only the result shows no face, the side of the picture: losing a face is no better than moving it.
    """
    expected, found = (_landmarks(pixels) for pixels in (truth, restored))
    if expected is None:
        return math.nan
    if found is None:
        return float(max(truth.shape))
    return float(np.linalg.norm(found - expected, axis=1).mean())


def _landmarks(pixels: Pixels) -> Array | None:
    faces = _face_detector().detect(pixels)
    if not faces:
        return None
    largest = max(faces, key=lambda face: (face.box[2] - face.box[0]) * (face.box[3] - face.box[1]))
    return np.asarray(largest.landmarks, np.float64)


def identity(restored: Pixels, truth: Pixels) -> float:
    """`identity_distance` of aligned faces without an embedder: 0 is the same face, 1 another picture."""
    first, second = (pixels[None].astype(np.float32) for pixels in (truth, restored))
    return float(identity_distance(first, second)[0])


class OCRAgreement:
    """F1 of the words that are read in the result against those read in the truth (RapidOCR, whose models it ships)."""

    def __init__(self) -> None:
        from rapidocr_onnxruntime import RapidOCR

        self.reader = RapidOCR(intra_op_num_threads=1, inter_op_num_threads=1)

    def __call__(self, restored: Pixels, truth: Pixels) -> float:
        """0 to 1; NaN where the truth shows no text."""
        return words_f1(self._words(restored), self._words(truth))

    def _words(self, pixels: Pixels) -> list[str]:
        lines, _ = self.reader(np.ascontiguousarray(pixels[..., ::-1]))  # it takes BGR
        return [word.lower() for _, text, _ in lines or [] for word in text.split()]


def words_f1(found: Sequence[str], expected: Sequence[str]) -> float:
    """F1 of words, each counted as often as it occurs; NaN where none are expected."""
    if not expected:
        return math.nan
    common = (Counter(found) & Counter(expected)).total()
    return 2 * common / (len(found) + len(expected))


# ---- of whole sets


class Inception:
    """Features (2048,) of a picture by the Inception of FID (Heusel et al. 2017), with its own resizing."""

    FILE = "weights-inception-2015-12-05-6726825d.pth"

    def __init__(self, weights: Weights) -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        file = weights.find(self.FILE)
        if file:
            read_checkpoint(file)  # torch-fidelity would run what a pickle asks for
        try:
            self.network = FeatureExtractorInceptionV3("inception", ["2048"], str(file) if file else None).eval()
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"needs {self.FILE} in the folder of --weights; torch-fidelity cannot fetch it ({error})"
            ) from error

    @torch.no_grad()
    def __call__(self, pixels: Pixels) -> Array:
        """The features of one picture of any size."""
        (features,) = self.network(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None])
        return np.asarray(features[0].double().numpy())


def fid(restored: Array, truths: Array) -> float:
    """Frechet distance of features (N, D), as Gaussians (Heusel et al. 2017); biased upwards for few pictures."""
    mean = ((restored.mean(axis=0) - truths.mean(axis=0)) ** 2).sum()
    first, second = np.cov(restored, rowvar=False), np.cov(truths, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(first @ second).astype(complex)).real.sum()
    return float(mean + np.trace(first) + np.trace(second) - 2 * root)


def kid(restored: Array, truths: Array) -> float:
    """Kernel distance of features (N, D): the unbiased squared MMD of (x.y / D + 1)^3 (Binkowski et al. 2018).

    Of all pictures at once; no subsets are drawn.
    """
    n, m = len(restored), len(truths)
    within_x, within_y, across = (
        (a @ b.T / restored.shape[1] + 1) ** 3 for a, b in ((restored, restored), (truths, truths), (restored, truths))
    )
    within = (within_x.sum() - np.trace(within_x)) / (n * (n - 1)) + (within_y.sum() - np.trace(within_y)) / (
        m * (m - 1)
    )
    return float(within - 2 * across.mean())


def warping_error(frames: Iterable[Pixels], guides: Iterable[Pixels]) -> float:
    """E_warp x 1000 of consecutive frames along the flow of the guides (Lai et al. 2018), the truth or the input.

    Flow by OpenCV's DIS; see `stablesr_kit.video.motion.warping_error` for what counts. Pairs across a scene cut do
    not. Compare with the guides' own error, and beside a metric of sharpness: what is blurred moves smoothly.
    """
    errors: list[float] = []
    last: tuple[Tensor, Tensor] | None = None
    estimate = dis_flow()
    for frame, guide in zip(frames, guides, strict=True):
        if guide.shape != frame.shape:
            guide = resize_bicubic_matlab(guide, *frame.shape[:2])
        now, seen = (pixels_to_image(pixels)[0] for pixels in (frame, guide))
        if last is not None:
            before, seen_before = last
            motion = motion_between(seen_before, seen, estimate)
            error = None if motion is None else warping_error_of_pair(now, before, motion)
            errors += [] if error is None else [error]
        last = now, seen
    return 1000 * float(np.mean(errors)) if errors else math.nan


# ---- by name


class Sample(NamedTuple):
    """What a metric is given: a result, the truth if it is known (of the result's size), and what it was made of."""

    restored: Pixels
    truth: Pixels | None
    lq: Pixels


@dataclass(frozen=True, kw_only=True)
class MetricSettings:
    """What a protocol decides about metrics, and where their weights are."""

    border_px: int = BORDER_PX
    channel: Channel = "y"
    weights: Weights = Weights()


Measure = Callable[[Sample], float]
MeasureSet = Callable[[Iterable[Pixels], Iterable[Pixels]], float]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One line of the registry."""

    title: str
    better: Better
    against: Literal["truth", "input", "nothing"]
    """What a result is measured against; without it, the metric is left out."""
    load: Callable[[MetricSettings], Measure] | None = None
    """Makes what measures a picture. Raises ImportError or StableSRKitError where that cannot be had."""
    load_set: Callable[[MetricSettings], MeasureSet] | None = None
    """The same for what measures whole sets: results and truths, in the same order."""
    install: str = "pip install 'stablesr-kit[evaluate]'"
    """What installs the packages that it needs."""
    digits: int = 4


def _paired(measure: Callable[[Pixels, Pixels], float]) -> Measure:
    return lambda sample: measure(sample.restored, _truth(sample))


def _truth(sample: Sample) -> Pixels:
    assert sample.truth is not None  # the caller leaves metrics out that need one
    return sample.truth


def _load_niqe(settings: MetricSettings) -> Measure:
    pristine = PristineStatistics.load(settings.weights.need("niqe_pris_params.npz"))
    return lambda sample: niqe(sample.restored, pristine, settings.border_px)


def _load_alone(kind: Callable[[Weights], Callable[[Pixels], float]], settings: MetricSettings) -> Measure:
    measure = kind(settings.weights)
    return lambda sample: measure(sample.restored)


def _load_features(distance: Callable[[Array, Array], float], settings: MetricSettings) -> MeasureSet:
    network = Inception(settings.weights)

    def measure(results: Iterable[Pixels], truths: Iterable[Pixels]) -> float:
        return distance(*(np.stack([network(pixels) for pixels in pictures]) for pictures in (results, truths)))

    return measure


_INSTALL_PYIQA = "pip install 'stablesr-kit[pyiqa]', whose licence does not allow commercial use"
_INSTALL_OCR = "pip install 'stablesr-kit[ocr]', then pip install --no-deps rapidocr-onnxruntime"

METRICS: Mapping[str, Metric] = {
    "psnr": Metric(
        title="PSNR",
        better="higher",
        against="truth",
        digits=2,
        load=lambda s: _paired(partial(psnr, border_px=s.border_px, channel=s.channel)),
    ),
    "ssim": Metric(
        title="SSIM",
        better="higher",
        against="truth",
        load=lambda s: _paired(partial(ssim, border_px=s.border_px, channel=s.channel)),
    ),
    "ms-ssim": Metric(
        title="MS-SSIM",
        better="higher",
        against="truth",
        load=lambda s: _paired(partial(ms_ssim, border_px=s.border_px, channel=s.channel)),
    ),
    "gmsd": Metric(title="GMSD", better="lower", against="truth", load=lambda _: _paired(gmsd)),
    "lpips-alex": Metric(
        title="LPIPS (alex)", better="lower", against="truth", load=lambda s: _paired(LPIPS(s.weights, "alex"))
    ),
    "lpips-vgg": Metric(
        title="LPIPS (vgg)", better="lower", against="truth", load=lambda s: _paired(LPIPS(s.weights, "vgg"))
    ),
    "dists": Metric(title="DISTS", better="lower", against="truth", load=lambda s: _paired(DISTS(s.weights))),
    "ciede2000": Metric(
        title="CIEDE2000", better="lower", against="truth", digits=2, load=lambda _: _paired(ciede2000)
    ),
    "lq-psnr": Metric(
        title="LQ-PSNR",
        better="higher",
        against="input",
        digits=2,
        load=lambda _: lambda sample: lq_psnr(sample.restored, sample.lq),
    ),
    "niqe": Metric(title="NIQE", better="lower", against="nothing", digits=3, load=_load_niqe),
    "clip-iqa": Metric(title="CLIP-IQA", better="higher", against="nothing", load=partial(_load_alone, CLIPIQA)),
    "musiq": Metric(
        title="MUSIQ",
        better="higher",
        against="nothing",
        digits=2,
        install=_INSTALL_PYIQA,
        load=partial(_load_alone, partial(PyIQA, name="musiq")),
    ),
    "maniqa": Metric(
        title="MANIQA",
        better="higher",
        against="nothing",
        install=_INSTALL_PYIQA,
        load=partial(_load_alone, partial(PyIQA, name="maniqa-pipal")),
    ),
    "seam-energy": Metric(
        title="Seam energy",
        better="lower",
        against="nothing",
        digits=3,
        load=lambda _: lambda sample: seam_energy(sample.restored),
    ),
    "grid": Metric(
        title="Grid", better="lower", against="nothing", digits=3, load=lambda _: lambda sample: grid(sample.restored)
    ),
    "identity": Metric(title="Identity distance", better="lower", against="truth", load=lambda _: _paired(identity)),
    "landmarks": Metric(
        title="Landmark distance", better="lower", against="truth", digits=2, load=lambda _: _paired(landmark_distance)
    ),
    "ocr-f1": Metric(
        title="OCR F1", better="higher", against="truth", install=_INSTALL_OCR, load=lambda _: _paired(OCRAgreement())
    ),
    "fid": Metric(title="FID", better="lower", against="truth", digits=2, load_set=partial(_load_features, fid)),
    "kid": Metric(title="KID", better="lower", against="truth", load_set=partial(_load_features, kid)),
    "warping-error": Metric(
        title="E_warp x 1000", better="lower", against="truth", digits=3, load_set=lambda _: warping_error
    ),
}
"""Every metric by name."""


def _compared(pixels: Pixels, border_px: int, channel: Channel) -> Array:
    """What of a picture is compared, (H, W, 1) or (H, W, 3)."""
    values = luma(pixels)[..., None] if channel == "y" else pixels.astype(np.float64)
    return _inside(values, border_px)


def _inside(values: Array, border_px: int) -> Array:
    return values[border_px : values.shape[0] - border_px, border_px : values.shape[1] - border_px]
