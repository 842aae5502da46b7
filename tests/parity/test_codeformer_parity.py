"""CodeFormer against reference outputs of the official modules: always a compact part, the whole where it is."""

from pathlib import Path

import pytest
import torch

from tests.helpers.official_weights import fill_value
from tests.parity import codeformer

HERE = Path(__file__).parents[1]
COMPACT = HERE / "goldens" / "codeformer"
WHOLE = HERE.parents[1] / "shared" / "goldens" / "codeformer" / "open"


def failures(folder: Path) -> list[str]:
    quantities = list(codeformer.check_folder(folder))
    assert quantities, f"nothing to check in {folder}"
    return [name for name, found, tolerance in quantities if found > tolerance]


def test_compact_references_are_reproduced() -> None:
    assert not failures(COMPACT)


def test_all_references_but_those_of_full_size_are_reproduced(tmp_path: Path) -> None:
    if not WHOLE.is_dir():
        pytest.skip("the whole references are not beside the checkout")
    for path in WHOLE.iterdir():
        if not path.name.startswith("full_size"):
            (tmp_path / path.name).symlink_to(path)
    assert not failures(tmp_path)


def test_a_file_that_is_not_understood_fails(tmp_path: Path) -> None:
    (tmp_path / "surprise.safetensors").write_bytes(b"")
    assert failures(tmp_path) == ["surprise.safetensors (not understood)"]


def test_the_rule_of_the_weights_gives_the_stated_first_values() -> None:
    stated = {
        ("encoder.blocks.0.weight", (64, 3, 3, 3)): [0.05501609295606613, -0.2946937382221222],
        ("encoder.blocks.1.norm1.weight", (64,)): [0.8911020159721375, 1.061734914779663],
        ("position_emb", (256, 512)): [-0.866685152053833, 0.23542067408561707],
        ("quantize.embedding.weight", (1024, 256)): [0.9683835506439209, 0.408558189868927],
        ("idx_pred_layer.1.weight", (1024, 512)): [0.06471778452396393, 0.13616974651813507],
    }
    for (name, shape), values in stated.items():
        torch.testing.assert_close(fill_value(name, shape, 4242).flatten()[:2], torch.tensor(values), rtol=0, atol=0)
