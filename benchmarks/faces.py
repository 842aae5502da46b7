"""Faces per second of CodeFormer at the published size beside another implementation of it.

python -m benchmarks.faces --json [--batch 1 4 8] [--repeats 5]

The other one is that of spandrel_extra_arches, which must be installed beside the toolkit (its licence does not allow
commercial use; nothing here depends on it). Both have the same random weights and restore the same faces of 512 px on
the CPU, in float32, with w = 0.5. Calls alternate within one run; times are medians, and a ratio is the median over
pairs. Prints one JSON object: batch -> {faces_per_s, peer_faces_per_s, ratio, max_difference}; ratio: seconds per face
here over seconds per face there.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from benchmarks.timing import compare
from stablesr_kit.checkpoints.codeformer import load_official_faces
from stablesr_kit.spaces import unit_to_image
from tests.helpers.official_weights import fill, full_size_shapes

Restore = Callable[[Tensor, float], Tensor]
"""Restored faces (B, 3, 512, 512) of faces in [-1, 1] with this w."""


def both(seed: int) -> tuple[Restore, Restore]:
    """CodeFormer here and there, with the same weights. Raises ImportError where the other one is not installed."""
    weights = fill(full_size_shapes("codeformer"), seed)
    theirs = peer({name: tensor.clone() for name, tensor in weights.items()})
    network = load_official_faces(weights)
    return lambda faces, w: network(faces, w, adain=True).image, theirs


def peer(weights: Mapping[str, Tensor]) -> Restore:
    """The network of spandrel_extra_arches with an official state dict."""
    from spandrel import MAIN_REGISTRY, ArchRegistry, ModelLoader
    from spandrel_extra_arches import EXTRA_REGISTRY

    registry = ArchRegistry()
    registry.add(*MAIN_REGISTRY)
    registry.add(*EXTRA_REGISTRY)
    network = ModelLoader(registry=registry).load_from_state_dict(dict(weights)).model.eval()
    return lambda faces, w: network(faces, weight=w)[0]


def measure(ours: Restore, theirs: Restore, batch: int, repeats: int) -> dict[str, float]:
    faces = unit_to_image(torch.rand(batch, 3, 512, 512, generator=torch.Generator().manual_seed(0)))
    times = compare(lambda: ours(faces, 0.5), lambda: theirs(faces, 0.5), repeats)
    return {
        "faces_per_s": batch / times["stablesr_s"],
        "peer_faces_per_s": batch / times["stock_s"],
        "ratio": times["ratio"],
        "max_difference": (ours(faces[:1], 0.5) - theirs(faces[:1], 0.5)).abs().max().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", required=True, help="print one JSON object")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    try:
        ours, theirs = both(seed=0)
    except ImportError as error:
        sys.exit(f"{error}; pip install spandrel_extra_arches")
    with torch.inference_mode():
        results = {str(batch): measure(ours, theirs, batch, arguments.repeats) for batch in arguments.batch}
    print(json.dumps({"threads": torch.get_num_threads(), "repeats": arguments.repeats, "batch": results}))


if __name__ == "__main__":
    main()
