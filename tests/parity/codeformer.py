"""CodeFormer against reference outputs of the official modules: the layout of `goldens/codeformer`, any config.

Weights that the folder does not hold are made by the stated rule (tests/official_weights.py). A reference tensor that
no check compares is reported with an infinite difference.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
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
from tests.parity.references import Quantity, difference

NETWORK = 2e-4
EXACT = 0.0


def compare(name: str, reference: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> Iterator[Quantity]:
    """One quantity per reference output; whole numbers exactly. Infinity for one that is not ours."""
    for key in sorted(reference):
        expected = reference[key]
        found = difference(ours[key], expected) if key in ours else float("inf")
        yield f"{name}.{key}", found, NETWORK if expected.is_floating_point() else EXACT


def check_network(folder: Path, name: str) -> Iterator[Quantity]:
    """A CodeFormer of the config in the file's metadata: the autoencoder, the codes, the faces, and parts alone."""
    path = folder / f"{name}_io.safetensors"
    reference, config = load_file(path), metadata(path)["config"]
    weights = folder / f"{name}_weights.safetensors"
    official = load_file(weights) if weights.exists() else fill(shapes(config), config["seed"])
    network = load_official_faces(official, Hints(codeformer_heads=config["n_head"]))
    assert isinstance(network, CodeFormer)
    is_as_stated = our_config(config).items() <= dict(network.config).items()
    yield f"{name}.config", 0.0 if is_as_stated else float("inf"), EXACT
    outputs = {
        key: tensor for key, tensor in reference.items() if not re.search(r"\.(in|pos|enc|dec|x|lookup_ids)$", key)
    }
    ours = autoencoder(network, reference) | quantizer(network, reference) | parts(network, reference)
    for key in outputs:
        if fidelity := re.fullmatch(r"cf\.out\.w([\d.]+)\.adain([01])", key):
            output = network(reference["in.x"], float(fidelity[1]), adain=fidelity[2] == "1")
            ours[key] = output.image
    codes = network(reference["in.x"], code_only=True)
    ours |= {"cf.logits": codes.logits, "cf.top_idx": codes.indices.flatten(1)}
    yield from compare(name, outputs, ours)


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


def autoencoder(network: CodeFormer, reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The VQ autoencoder on the input picture."""
    output = network.vqgan(reference["in.x"])
    quantized = output.quantized
    return {
        "vq.encoder_out": network.vqgan.encoder(reference["in.x"])[0],
        "vq.quantized": quantized.features,
        "vq.indices": quantized.indices.flatten(1),
        "vq.codebook_loss": quantized.loss.view(1),
        "vq.perplexity": quantized.perplexity.view(1),
        "vq.mean_distance": quantized.mean_distance.view(1),
        "vq.reconstruction": output.image,
    }


def quantizer(network: CodeFormer, reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The quantiser on a free latent, and the look-up of free indices."""
    quantized = network.vqgan.quantizer(reference["q.in"])
    features = reference["q.lookup_feat"]
    looked_up = network.vqgan.quantizer.lookup(reference["q.lookup_ids"].view(len(features), *features.shape[2:]))
    return {
        "q.out": quantized.features,
        "q.indices": quantized.indices.flatten(),
        "q.loss": quantized.loss.view(1),
        "q.perplexity": quantized.perplexity.view(1),
        "q.lookup_feat": looked_up,
        "q.lookup_flat": looked_up.permute(0, 2, 3, 1).flatten(0, 2),
    }


def parts(network: CodeFormer, reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """AdaIN, the last fusion block, and the first layer of the transformer, each alone."""
    codes = network.vqgan.quantizer.lookup(reference["cf.top_idx"].view(-1, *reference["vq.encoder_out"].shape[2:]))
    layer = network.layers[0](reference["tlayer0.in"].transpose(0, 1), reference["tlayer0.pos"].transpose(0, 1))
    fusion = network.fusions[str(max(network.config.fuse_sizes))]
    fused = {
        key: fusion(reference["fuse.enc"], reference["fuse.dec"], float(key.removeprefix("fuse.out_w")))
        for key in reference
        if key.startswith("fuse.out_w")
    }
    return {
        "adain.out": match_statistics(codes, reference["vq.encoder_out"]),
        "tlayer0.out": layer.transpose(0, 1),
        **fused,
    }


def check_full_size(folder: Path, name: str) -> Iterator[Quantity]:
    """The released CodeFormer's size, its weights by the rule: samples of what comes out."""
    reference = load_file(folder / f"{name}.safetensors")
    image = load_file(folder / f"{name}_input.safetensors")["in.x"]
    network = load_official_faces(fill(full_size_shapes("codeformer"), int(name.rpartition("seed")[2])))
    assert isinstance(network, CodeFormer)
    codes = network(image, code_only=True)
    reconstruction = network.vqgan(image)
    ours = {
        "logits_first8tokens": codes.logits[:, :8],
        "top_idx": codes.indices.flatten(1),
        "top2_gap": codes.logits.topk(2, dim=-1).values.diff(dim=-1).neg().squeeze(-1),
        "lq_feat_s": codes.lq_feat[:, ::8],
        "vq_idx": reconstruction.quantized.indices.flatten(1),
        "vq_loss": reconstruction.quantized.loss.view(1),
        "vq_rec_s8": reconstruction.image[..., ::8, ::8],
    }
    for w, adain in {re.search(r"\.w([\d.]+)\.adain([01])$", key).groups() for key in reference if ".adain" in key}:
        face = network(image, float(w), adain=adain == "1").image
        case = f"w{w}.adain{adain}"
        ours |= {
            f"out_s8.{case}": face[..., ::8, ::8],
            f"out_crop.{case}": face[..., 240:272, 240:272],
            f"out_stats.{case}": torch.stack([face.mean(), face.std(), face.min(), face.max()]),
        }
    yield from compare(name, reference, ours)


CHECKS: dict[str, Callable[[Path, str], Iterator[Quantity]]] = {
    r"(cf_\w+)_io\.safetensors": check_network,
    r"(full_size_seed\d+)\.safetensors": check_full_size,
    r"(training)\.safetensors": lambda folder, _: check_training(folder),
    r"(face_align)\.json": lambda folder, _: check_align(folder),
    r"(face_paste)\.safetensors": lambda folder, _: check_paste(folder),
}
"""File name, with the name of its quantities in a group -> what compares it."""

NOT_QUANTITIES = r"cf_\w+_weights\.safetensors|full_size_seed\d+_input\.safetensors|training\.json"


def metadata(path: Path) -> dict[str, Any]:
    """What a reference file says of itself."""
    with safe_open(path, "pt") as file:
        return {key: json.loads(value) for key, value in (file.metadata() or {}).items()}


@torch.no_grad()
def check_folder(folder: Path) -> Iterator[Quantity]:
    """Every quantity of every reference file in the folder; an infinite difference for what is not understood."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if re.fullmatch(NOT_QUANTITIES, path.name):
            continue
        for pattern, check in CHECKS.items():
            if match := re.fullmatch(pattern, path.name):
                yield from check(folder, match[1])
                break
        else:
            yield f"{path.name} (not understood)", float("inf"), 0.0
