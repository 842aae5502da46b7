"""One-step restorers against what the released programs gave: always a compact part, the whole where it is."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.parity import onestep

HERE = Path(__file__).parents[1]
COMPACT = HERE / "goldens" / "onestep"
WHOLE = HERE.parents[1] / "shared" / "goldens" / "onestep" / "open"


def checked(folder: Path) -> dict[str, bool]:
    """Whether each quantity is within its tolerance."""
    return {name: found <= tolerance for name, found, tolerance in onestep.check_folder(folder)}


def copied(folder: Path, case: str, **changes: float) -> Path:
    """The compact part with one case, some of whose tensors are left out (0) or multiplied."""
    shutil.copytree(COMPACT / "osediff", folder)
    for path in folder.glob("*.safetensors"):
        if path.name != f"case_{case}.safetensors":
            path.unlink()
    path = folder / f"case_{case}.safetensors"
    tensors = {name: tensor * changes.get(name, 1) for name, tensor in load_file(path).items()}
    save_file({name: tensor for name, tensor in tensors.items() if changes.get(name) != 0}, path)
    return folder


def test_compact_references_are_reproduced() -> None:
    verdicts = checked(COMPACT)
    assert len(verdicts) == 50 and all(verdicts.values())


def test_all_references_are_reproduced() -> None:
    if not WHOLE.is_dir():
        pytest.skip("the whole references are not beside the checkout")
    verdicts = checked(WHOLE)
    assert len(verdicts) > 250
    assert [name for name, is_right in verdicts.items() if not is_right] == []


def test_a_reference_with_fewer_quantities_has_fewer_lines(tmp_path: Path) -> None:
    verdicts = checked(copied(tmp_path / "osediff", "a", eps=0, lq_u8=0))
    assert all(verdicts.values()) and "osediff.a.x0" in verdicts and "osediff.a.eps" not in verdicts
    shutil.rmtree(tmp_path / "osediff")
    without_draw = checked(copied(tmp_path / "osediff", "a", posterior_noise=0))
    assert all(without_draw.values()) and "osediff.a.posterior_std" in without_draw
    assert "osediff.a.x0" not in without_draw  # it depends on what was drawn


def test_what_is_off_or_not_understood_fails(tmp_path: Path) -> None:
    folder = copied(tmp_path / "osediff", "small", x0=1.001)
    (folder / "surprise.bin").touch()
    path = folder / "case_small.safetensors"
    save_file(load_file(path) | {"riddle": load_file(path)["eps"].clone()}, path)
    wrong = [name for name, is_right in checked(tmp_path).items() if not is_right]
    assert wrong == ["osediff.surprise.bin (not understood)", "osediff.small.riddle", "osediff.small.x0"]
    assert checked(folder / "base") == {
        f"{path.name} (not understood)": False for path in sorted((folder / "base").iterdir())
    }
    (tmp_path / "empty").mkdir()
    assert not checked(tmp_path / "empty")
