"""Pictures are found by endings and content, in all sub-folders, and what is passed over is known."""

from pathlib import Path

import pytest

from stablesr_kit.errors import ImageError
from stablesr_kit.imaging.finding import find_pictures, format_of
from tests.helpers.picture_files import as_pillow, noise


def test_pictures_are_found_by_endings_and_content_and_the_rest_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("b.png", "a.JPG", "c.jpe", "d.MPO", "broken.tiff", "deep/e.webp", "deep/er/f.heic", ".hidden.png"):
        (tmp_path / name).touch()
    for name in ("notes.txt", "clip.mp4"):
        (tmp_path / name).write_text("no picture")
    as_pillow(noise()).save(tmp_path / "no_ending", "PNG")
    as_pillow(noise()).save(tmp_path / "deep" / "photo.jpg.bak", "JPEG")
    (tmp_path / ".stablesr").mkdir()
    (tmp_path / ".cache").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "result.png").touch()
    (tmp_path / "pictures.png").mkdir()
    (tmp_path / "again").symlink_to(tmp_path / "deep")
    found = find_pictures(tmp_path, besides=tmp_path / "out")
    assert [str(path.relative_to(tmp_path)) for path in found.pictures if "again" not in str(path)] == [
        "a.JPG",
        "b.png",
        "broken.tiff",
        "c.jpe",
        "d.MPO",
        *(
            ["deep/e.webp", "deep/er/f.heic", "deep/photo.jpg.bak"]
            if (tmp_path / "deep/e.webp") in found.pictures
            else []
        ),
        "no_ending",
    ]
    assert sum(path.name == "e.webp" for path in found.pictures) == 1
    passed_over = {path.name for path in found.passed_over}
    assert passed_over >= {".cache", ".hidden.png", "clip.mp4", "notes.txt", "out"}
    assert passed_over <= {".cache", ".hidden.png", "clip.mp4", "notes.txt", "out", "again", "deep"}


def test_a_folder_that_is_a_loop_ends(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").symlink_to(tmp_path)
    (tmp_path / "a" / "c.png").touch()
    assert [path.name for path in find_pictures(tmp_path).pictures] == ["c.png"]


def test_what_is_no_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="missing: no such folder"):
        find_pictures(tmp_path / "missing")


def test_formats_are_told_by_first_bytes(tmp_path: Path) -> None:
    for name, kind in (("PNG", "PNG"), ("JPEG", "JPEG"), ("TIFF", "TIFF"), ("WEBP", "WEBP"), ("GIF", "GIF")):
        as_pillow(noise()).save(tmp_path / "in", name)
        assert format_of((tmp_path / "in").read_bytes()[:64]) == kind
    for name, kind in (("BMP", "BMP"), ("PPM", "PNM"), ("JPEG2000", "JPEG 2000"), ("AVIF", "AVIF")):
        as_pillow(noise()).save(tmp_path / "in", name)
        assert format_of((tmp_path / "in").read_bytes()[:64]) == kind
    for other in (
        b"",
        b"text",
        b"%PDF-1.7",
        b"<svg",
        b"PK\3\4",
        b"P7\n",
        b"BM and so on",
        b"\0\0\0\x18ftypmp42" + bytes(50),
    ):
        assert format_of(other) is None
