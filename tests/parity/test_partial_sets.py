"""A reference set may lack any quantity, input or file: the rest is compared as before, and nothing fails for it."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.parity.__main__ import check_folder

GOLDENS = Path(__file__).parents[1] / "goldens"
FILES = [
    ("codeformer", "face_paste.safetensors"),
    ("codeformer", "training.safetensors"),
    ("stablesr", "colorfix.safetensors"),
    ("stablesr", "degradation.safetensors"),
    ("stablesr", "train_loss.safetensors"),
    ("stablesr", "unet_sq.safetensors"),
]
DRAWS = 2
"""Tensors of each file that are taken away, one at a time; which ones is drawn with a fixed seed."""


def results(suite: str, folder: Path) -> dict[str, bool]:
    return {name: found <= tolerance for name, found, tolerance in check_folder(suite, folder)}


def part_of(kept: Iterator[Path], folder: Path) -> Path:
    folder.mkdir()
    for path in kept:
        (folder / path.name).symlink_to(path)
    return folder


def beside(suite: str, name: str) -> Iterator[Path]:
    """What the quantities of one file need beside it."""
    for path in (GOLDENS / suite).iterdir():
        if path.name.startswith("weights_") or path.name in ("config.json", "shapes.json"):
            yield path
        elif name.startswith("training") and path.name == "training.json":
            yield path


@pytest.mark.parametrize(("suite", "name"), FILES)
def test_a_file_that_lacks_a_tensor_passes_with_fewer_quantities(suite: str, name: str, tmp_path: Path) -> None:
    folder = part_of(beside(suite, name), tmp_path / "set")
    tensors = load_file(GOLDENS / suite / name)
    with safe_open(GOLDENS / suite / name, "pt") as file:
        about = file.metadata()
    shutil.copy(GOLDENS / suite / name, folder / name)
    whole = results(suite, folder)
    assert all(whole.values())
    for absent in random.Random(0).sample(sorted(tensors), min(DRAWS, len(tensors))):
        save_file({key: tensor for key, tensor in tensors.items() if key != absent}, folder / name, about)
        fewer = results(suite, folder)
        assert all(fewer.values()), absent
        assert fewer.keys() <= whole.keys(), absent


def test_every_named_output_that_is_absent_costs_its_own_line_alone(tmp_path: Path) -> None:
    name = "face_paste.safetensors"
    folder = part_of(iter(()), tmp_path / "set")
    tensors = load_file(GOLDENS / "codeformer" / name)
    save_file(tensors, folder / name)
    whole = results("codeformer", folder)
    for absent, line in {"gray_restored0_s4": "paste.gray_restored0", "affine": "paste.affine"}.items():
        save_file({key: tensor for key, tensor in tensors.items() if key != absent}, folder / name)
        assert whole.keys() - results("codeformer", folder).keys() == {line}


@pytest.mark.parametrize("absent", ["training.json", "training.safetensors", "face_align.json"])
def test_a_set_that_lacks_a_file_passes_with_fewer_quantities(absent: str, tmp_path: Path) -> None:
    kept = [path for path in (GOLDENS / "codeformer").iterdir() if path.name.startswith(("training", "face_align"))]
    whole = results("codeformer", part_of(iter(kept), tmp_path / "whole"))
    some = (path for path in kept if path.name != absent)
    fewer = results("codeformer", part_of(some, tmp_path / "fewer"))
    assert all(fewer.values()) and 0 < len(fewer) < len(whole) and fewer.keys() <= whole.keys()


@pytest.mark.parametrize("field", ["template_512", "sets", "det_rows", "det_img_hw"])
def test_a_json_file_that_lacks_a_field_passes_with_fewer_quantities(field: str, tmp_path: Path) -> None:
    stated = json.loads((GOLDENS / "codeformer" / "face_align.json").read_text())
    (tmp_path / "face_align.json").write_text(json.dumps(stated))
    whole = results("codeformer", tmp_path)
    del stated[field]
    (tmp_path / "face_align.json").write_text(json.dumps(stated))
    fewer = results("codeformer", tmp_path)
    assert all(fewer.values()) and 0 < len(fewer) < len(whole)


def test_what_needs_absent_weights_is_passed_over_with_a_note(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = [path for path in (GOLDENS / "stablesr").iterdir() if path.name != "weights_cfw.safetensors"]
    fewer = results("stablesr", part_of(iter(kept), tmp_path / "set"))
    assert all(fewer.values()) and {name.partition(".")[0] for name in fewer} >= {"colorfix", "schedule"}
    assert "cfw_a.out_mean: not checked, weights_cfw.safetensors is absent" in caplog.text
    for path in (tmp_path / "set").glob("weights_*"):
        path.unlink()
    (tmp_path / "set" / "config.json").unlink()
    assert all(results("stablesr", tmp_path / "set").values())


def test_a_tensor_of_a_name_nobody_knows_fails(tmp_path: Path) -> None:
    tensors = load_file(GOLDENS / "stablesr" / "colorfix.safetensors")
    save_file(tensors | {"out_surprise": tensors["out_low"].clone()}, tmp_path / "colorfix.safetensors")
    assert [name for name, is_right in results("stablesr", tmp_path).items() if not is_right] == [
        "colorfix.out_surprise"
    ]
