"""The toolkit against reference outputs of the official modules: a compact part always, the whole where there is one."""

from pathlib import Path

import pytest

from tests import parity_stablesr

HERE = Path(__file__).parent
WHOLE = HERE.parents[1] / "shared" / "goldens"


def failures(folder: Path) -> list[str]:
    quantities = list(parity_stablesr.check_folder(folder))
    assert quantities, f"nothing to check in {folder}"
    return [f"{name} {found} > {tolerance}" for name, found, tolerance in quantities if found and found > tolerance]


def test_compact_stablesr_references_are_reproduced() -> None:
    assert not failures(HERE / "goldens" / "stablesr")


def test_all_stablesr_references_are_reproduced() -> None:
    folder = WHOLE / "stablesr" / "open"
    if not folder.is_dir():
        pytest.skip(f"the whole references are not here: no {folder.name} folder beside the checkout")
    assert not failures(folder)


def test_a_file_that_is_not_understood_fails(tmp_path: Path) -> None:
    for path in (HERE / "goldens" / "stablesr").iterdir():
        if path.name in parity_stablesr.NOT_QUANTITIES:
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "surprise.safetensors").write_bytes(b"")
    assert failures(tmp_path) == ["surprise (not understood) inf > 0.0"]
