"""CodeFormer against reference outputs of the official modules: the layout of `goldens/codeformer`, any config.

Weights that the folder does not hold are made by the stated rule (tests/official_weights.py). A reference tensor that
no check compares is reported with an infinite difference.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from einops import rearrange
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from stablesr_kit.checkpoints import Hints
from stablesr_kit.checkpoints.codeformer import load_official_faces
from stablesr_kit.models.codeformer import CodeFormer, match_statistics
from tests.helpers.official_layout import official_faces
from tests.helpers.official_weights import fill, full_size_shapes
from tests.parity.codeformer_faces import check_align, check_paste
from tests.parity.codeformer_training import check_training
from tests.parity.references import Ours, Quantity, Reference, compare, read_tensors

NETWORK = 2e-4
EXACT = 0.0


def network_tolerance(_name: str, expected: Tensor) -> float:
    """Whole numbers exactly."""
    return NETWORK if expected.is_floating_point() else EXACT


def check_network(folder: Path, name: str) -> Iterator[Quantity]:
    """A CodeFormer of the config in the file's metadata: the autoencoder, the codes, the faces, and parts alone."""
    path = folder / f"{name}_io.safetensors"
    reference, config = read_tensors(path), file_metadata(path)["config"]
    weights = folder / f"{name}_weights.safetensors"
    official = load_file(weights) if weights.exists() else fill(shapes(config), config["seed"])
    network = load_official_faces(official, Hints(codeformer_heads=config["n_head"]))
    assert isinstance(network, CodeFormer)
    is_as_stated = our_config(config).items() <= dict(network.config).items()
    yield f"{name}.config", 0.0 if is_as_stated else float("inf"), EXACT
    expected = {
        key: tensor for key, tensor in reference.items() if not re.search(r"\.(in|pos|enc|dec|x|lookup_ids)$", key)
    }
    ours = autoencoder(network, reference) | quantizer(network, reference) | parts(network, reference)
    for key in expected:
        if fidelity := re.fullmatch(r"cf\.out\.w([\d.]+)\.adain([01])", key):
            ours[key] = partial(restored, network, reference, float(fidelity[1]), fidelity[2] == "1")
    codes = cache(lambda: network(reference["in.x"], code_only=True))
    ours |= {"cf.logits": lambda: codes().logits, "cf.top_idx": lambda: codes().indices.flatten(1)}
    yield from compare(name, expected, ours, network_tolerance)


def restored(network: CodeFormer, reference: Reference[Tensor], w: float, adain: bool) -> Tensor:
    """The face in the reference's picture."""
    image: Tensor = network(reference["in.x"], w, adain=adain).image
    return image


def our_config(official: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of CodeFormer, from those of the official modules as the references state them."""
    return {
        "image_size": official["img_size"],
        "base_channels": official["nf"],
        "channel_multipliers": tuple(official["ch_mult"]),
        "layers_per_block": official["res_blocks"],
        "attention_resolutions": tuple(official["attn"]),
        "codebook_size": official["codebook"],
        "code_channels": official["emb"],
        "dim": official["dim_embd"],
        "num_heads": official["n_head"],
        "num_layers": official["n_layers"],
        "fuse_sizes": tuple(sorted(map(int, official["connect"]))),
    }


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Official names and shapes of a CodeFormer of this official config."""
    with init_empty_weights():
        network = CodeFormer(**our_config(config))
    return {name: tuple(tensor.shape) for name, tensor in official_faces(network).items()}


def autoencoder(network: CodeFormer, reference: Reference[Tensor]) -> Ours:
    """The VQ autoencoder on the input picture."""
    output = cache(lambda: network.vqgan(reference["in.x"]))
    return {
        "vq.encoder_out": lambda: network.vqgan.encoder(reference["in.x"])[0],
        "vq.quantized": lambda: output().quantized.features,
        "vq.indices": lambda: output().quantized.indices.flatten(1),
        "vq.codebook_loss": lambda: output().quantized.loss.view(1),
        "vq.perplexity": lambda: output().quantized.perplexity.view(1),
        "vq.mean_distance": lambda: output().quantized.mean_distance.view(1),
        "vq.reconstruction": lambda: output().image,
    }


def quantizer(network: CodeFormer, reference: Reference[Tensor]) -> Ours:
    """The quantiser on a free latent, and the look-up of free indices."""
    quantized = cache(lambda: network.vqgan.quantizer(reference["q.in"]))

    @cache
    def looked_up() -> Tensor:
        features = reference["q.lookup_feat"]
        return network.vqgan.quantizer.lookup(reference["q.lookup_ids"].view(len(features), *features.shape[2:]))

    return {
        "q.out": lambda: quantized().features,
        "q.indices": lambda: quantized().indices.flatten(),
        "q.loss": lambda: quantized().loss.view(1),
        "q.perplexity": lambda: quantized().perplexity.view(1),
        "q.lookup_feat": looked_up,
        "q.lookup_flat": lambda: rearrange(looked_up(), "b c h w -> (b h w) c"),
    }


def parts(network: CodeFormer, reference: Reference[Tensor]) -> Ours:
    """AdaIN, the last fusion block, and the first layer of the transformer, each alone."""
    fusion = network.fusions[str(max(network.config.fuse_sizes))]

    def matched() -> Tensor:
        latent = reference["vq.encoder_out"]
        codes = network.vqgan.quantizer.lookup(reference["cf.top_idx"].view(-1, *latent.shape[2:]))
        return match_statistics(codes, latent)

    def layer() -> Tensor:
        return network.layers[0](reference["tlayer0.in"].transpose(0, 1), reference["tlayer0.pos"].transpose(0, 1))

    def fused(w: float) -> Tensor:
        return fusion(reference["fuse.enc"], reference["fuse.dec"], w)

    return {
        "adain.out": matched,
        "tlayer0.out": lambda: layer().transpose(0, 1),
        **{
            key: partial(fused, float(key.removeprefix("fuse.out_w")))
            for key in reference
            if key.startswith("fuse.out_w")
        },
    }


def check_full_size(folder: Path, name: str) -> Iterator[Quantity]:
    """The released CodeFormer's size, its weights by the rule: samples of what comes out."""
    reference = read_tensors(folder / f"{name}.safetensors")

    @cache
    def network() -> CodeFormer:
        built = load_official_faces(fill(full_size_shapes("codeformer"), int(name.rpartition("seed")[2])))
        assert isinstance(built, CodeFormer)
        return built

    image = cache(lambda: read_tensors(folder / f"{name}_input.safetensors")["in.x"])
    codes = cache(lambda: network()(image(), code_only=True))
    reconstruction = cache(lambda: network().vqgan(image()))
    face = cache(lambda w, adain: network()(image(), w, adain=adain).image)
    ours: Ours = {
        "logits_first8tokens": lambda: codes().logits[:, :8],
        "top_idx": lambda: codes().indices.flatten(1),
        "top2_gap": lambda: codes().logits.topk(2, dim=-1).values.diff(dim=-1).neg().squeeze(-1),
        "lq_feat_s": lambda: codes().lq_feat[:, ::8],
        "vq_idx": lambda: reconstruction().quantized.indices.flatten(1),
        "vq_loss": lambda: reconstruction().quantized.loss.view(1),
        "vq_rec_s8": lambda: reconstruction().image[..., ::8, ::8],
    }
    for key in reference:
        if output := re.fullmatch(r"out_(s8|crop|stats)\.w([\d.]+)\.adain([01])", key):
            case = partial(face, float(output[2]), output[3] == "1")
            ours[key] = partial(lambda case, kind: SAMPLES[kind](case()), case, output[1])
    yield from compare(name, reference, ours, network_tolerance)


SAMPLES: dict[str, Callable[[Tensor], Tensor]] = {
    "s8": lambda face: face[..., ::8, ::8],
    "crop": lambda face: face[..., 240:272, 240:272],
    "stats": lambda face: torch.stack([face.mean(), face.std(), face.min(), face.max()]),
}
"""What a full-size reference keeps of a face."""

CHECKS: dict[str, Callable[[Path, str], Iterator[Quantity]]] = {
    r"(cf_\w+)_io\.safetensors": check_network,
    r"(full_size_seed\d+)\.safetensors": check_full_size,
    r"(training)\.(?:safetensors|json)": lambda folder, _: check_training(folder),
    r"(face_align)\.json": lambda folder, _: check_align(folder),
    r"(face_paste)\.safetensors": lambda folder, _: check_paste(folder),
}
"""File name, with the name of its quantities in a group -> what compares it."""

NOT_QUANTITIES = r"cf_\w+_weights\.safetensors|full_size_seed\d+_input\.safetensors"


def file_metadata(path: Path) -> dict[str, Any]:
    """What a reference file says of itself."""
    with safe_open(path, "pt") as file:
        return {key: json.loads(value) for key, value in (file.metadata() or {}).items()}


@torch.no_grad()
def check_folder(folder: Path) -> Iterator[Quantity]:
    """Every quantity of every reference file in the folder; an infinite difference for what is not understood."""
    done = set()
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if re.fullmatch(NOT_QUANTITIES, path.name):
            continue
        for pattern, check in CHECKS.items():
            if match := re.fullmatch(pattern, path.name):
                if match[1] not in done:  # one of two files of the same quantities
                    yield from check(folder, match[1])
                done.add(match[1])
                break
        else:
            yield f"{path.name} (not understood)", float("inf"), 0.0
