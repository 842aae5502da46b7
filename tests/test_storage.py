"""Files and folders appear whole or not at all, and one line says why one cannot be written."""

import os
import resource
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stablesr_kit.errors import OutputError, reason_of
from stablesr_kit.storage import part_of, publish, replacing_file, replacing_folder, writing
from tests.helpers.file_limits import files_end_at


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def fill(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "a").write_text(text)
    return folder


def test_a_file_takes_the_place_of_the_older_one_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with replacing_file(tmp_path / "a") as part:
        part.write_text("new")
        assert (tmp_path / "a").read_text() == "old"
    assert (tmp_path / "a").read_text() == "new"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("interruption", [ValueError, KeyboardInterrupt])
def test_what_fails_meanwhile_leaves_the_older_one_and_nothing_else(
    interruption: type[BaseException], tmp_path: Path
) -> None:
    (tmp_path / "a").write_text("old")
    fill(tmp_path / "b", "old")
    with pytest.raises(interruption), replacing_file(tmp_path / "a") as part:
        part.write_text("new")
        raise interruption
    with pytest.raises(interruption), replacing_folder(tmp_path / "b") as part:
        (part / "a").write_text("new")
        raise interruption
    assert names(tmp_path) == ["a", "b", "b/a"]
    assert {(tmp_path / "a").read_text(), (tmp_path / "b" / "a").read_text()} == {"old"}


def test_a_file_of_the_longest_name_can_be_replaced(tmp_path: Path) -> None:
    with replacing_file(tmp_path / ("n" * 255)) as part:
        part.write_text("new")
    assert names(tmp_path) == ["n" * 255]


def test_the_scratch_folder_is_used_and_left_empty(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with replacing_file(tmp_path / "a", scratch) as part:
        assert part.parent == scratch
    assert names(tmp_path) == ["a", "scratch"]


def test_a_folder_takes_the_place_of_the_older_one_with_all_that_was_in_it(tmp_path: Path) -> None:
    fill(tmp_path / "deep", "old")
    (tmp_path / "deep" / "gone").touch()
    with replacing_folder(tmp_path / "deep") as part:
        (part / "a").write_text("new")
        assert (tmp_path / "deep" / "a").read_text() == "old"
    assert (tmp_path / "deep" / "a").read_text() == "new"
    assert names(tmp_path) == ["deep", "deep/a"]
    with replacing_folder(tmp_path / "new" / "parents" / "b") as part:
        (part / "a").touch()
    assert (tmp_path / "new" / "parents" / "b" / "a").exists()


def test_what_a_killed_process_left_of_a_folder_is_replaced(tmp_path: Path) -> None:
    fill(part_of(tmp_path / "b"), "left behind")
    with replacing_folder(tmp_path / "b") as part:
        assert list(part.iterdir()) == []
    assert names(tmp_path) == ["b"]


def test_a_folder_that_many_processes_fill_is_published_by_one(tmp_path: Path) -> None:
    fill(part_of(tmp_path / "b"), "new")
    publish(part_of(tmp_path / "b"), tmp_path / "b")
    assert names(tmp_path) == ["b", "b/a"]


def test_files_get_the_permissions_of_the_users_umask(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        with replacing_folder(tmp_path / "model") as part:
            save_file({"a": torch.zeros(1)}, part / "weights.safetensors")  # which makes files for the owner alone
            (part / "deeper").mkdir()
            (part / "deeper" / "a").touch(0o600)
        with replacing_file(tmp_path / "file") as part:
            save_file({"a": torch.zeros(1)}, part)
    finally:
        os.umask(umask)
    files = [tmp_path / "model" / "weights.safetensors", tmp_path / "model" / "deeper" / "a", tmp_path / "file"]
    assert [stat.S_IMODE(file.stat().st_mode) for file in files] == [0o640, 0o640, 0o640]


def save_by_torch(path: Path) -> None:
    torch.save({"a": torch.zeros(5000)}, path)


def save_by_safetensors(path: Path) -> None:
    save_file({"a": torch.zeros(5000)}, path)


def save_by_the_system(path: Path) -> None:
    path.write_bytes(bytes(20_000))


@pytest.mark.parametrize("save", [save_by_torch, save_by_safetensors, save_by_the_system])
def test_a_full_disk_is_one_line_that_says_how_much_is_free(save: object, tmp_path: Path) -> None:
    assert callable(save)
    fill(tmp_path / "b", "old")
    with files_end_at(10_000), pytest.raises(OutputError, match=r"a: cannot be written \(.+\), \d+ MB are free there;"):
        with replacing_file(tmp_path / "a") as part:
            save(part)
    with files_end_at(10_000), pytest.raises(OutputError, match="b: cannot be written") as caught:
        with replacing_folder(tmp_path / "b") as part:
            save(part / "weights")
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["b", "b/a"] and (tmp_path / "b" / "a").read_text() == "old"
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 10_000


def test_a_place_that_is_none_is_one_line_with_the_callers_advice(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"file/b: cannot be written \(.+\); free space or choose another place$"):
        with replacing_folder(tmp_path / "file" / "b"):
            pass
    with pytest.raises(OutputError, match=r"missing/a: cannot be written \(No such file or directory\); try -o$"):
        with writing(tmp_path / "missing" / "a", "try -o"):
            (tmp_path / "missing" / "a").touch()
    with pytest.raises(RuntimeError, match="shapes"), writing(tmp_path / "a"):
        raise RuntimeError("shapes differ")


def test_an_error_says_one_line() -> None:
    assert reason_of(RuntimeError("\n  first \nsecond")) == "first"
    assert reason_of(FileNotFoundError(2, "No such file or directory", "/a")) == "No such file or directory"
    assert reason_of(KeyError()) == "KeyError"
