"""Files of clips: what is read of them, what is written, and what is said of those that are damaged."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

av = pytest.importorskip("av", reason="clips need PyAV, of the extra video")

from stablesr_kit.errors import ConfigError, ImageError, OutputError  # noqa: E402
from stablesr_kit.video.clip import Clip, Colour, FrameFolder, Source, Span, surveyed  # noqa: E402
from stablesr_kit.video.writing import (  # noqa: E402
    Finished,
    assemble,
    choose_encoding,
    even_sides,
    is_rounding,
    left_out,
    write_segment,
)
from tests.helpers.clips import UNEVEN, moving, packets_of, times_of, write_clip  # noqa: E402
from tests.helpers.file_limits import files_end_at  # noqa: E402

SUBTITLES = [(0, 100, "one"), (200, 150, "two")]


def doubled(source: Source, target: Path, folder: Path, span: Span | None = None, **options: Any) -> Finished:
    """Write a clip at twice its size, in two segments."""
    survey = surveyed(source)
    encoding = choose_encoding(target, source, 2 * source.height, 2 * source.width, **options)
    frames = [frame.pixels.repeat(2, 0).repeat(2, 1) for frame in source.frames()]
    segments = [folder / "0", folder / "1"]
    for path, part in zip(segments, (frames[:3], frames[3:]), strict=True):
        write_segment(path, part, encoding)
    return assemble(target, segments, encoding, survey.times, source, span or Span(), comment="made by a test")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Uneven times, sound that is longer than the picture, subtitles, chapters and an attachment."""
    return write_clip(
        tmp_path_factory.mktemp("full") / "full.mkv",
        moving(10),
        UNEVEN,
        audio_seconds=0.8,
        subtitles=SUBTITLES,
        attachment=b"a font",
        chapters=True,
    )


def test_all_that_is_not_video_is_copied_and_every_frame_keeps_its_time(full: Path, tmp_path: Path) -> None:
    done = doubled(Clip(full), tmp_path / "out.mkv", tmp_path)
    assert times_of(tmp_path / "out.mkv") == times_of(full) == [Fraction(time, 1000) for time in UNEVEN]
    assert packets_of(tmp_path / "out.mkv") == packets_of(full)
    assert done.frames == 10 and done.packets[2] == 2
    with av.open(str(tmp_path / "out.mkv")) as made, av.open(str(full)) as given:
        assert [stream.type for stream in made.streams] == [stream.type for stream in given.streams]
        assert made.chapters() == given.chapters() and len(made.chapters()) == 2
        assert made.metadata["title"] == "a clip" and made.metadata["COMMENT"] == "made by a test"
        assert made.streams[2].metadata["language"] == "eng" and made.streams[3].data == b"a font"


def test_mp4_keeps_times_and_sound_and_what_it_cannot_hold_is_known_before(full: Path, tmp_path: Path) -> None:
    target, clip = tmp_path / "out.mp4", Clip(full)
    lost = left_out(clip, choose_encoding(target, clip, 32, 48))
    assert lost == ["subtitle stream 2 (srt)", "attachment stream 3 (none)"]
    doubled(clip, target, tmp_path)
    assert times_of(target) == times_of(full)
    assert packets_of(target)["audio"] == packets_of(full)["audio"]


def test_times_that_are_no_milliseconds_are_exact_in_mp4_and_known_to_be_rounded_in_matroska(tmp_path: Path) -> None:
    base = Fraction(1001, 30000)
    clip = Clip(write_clip(tmp_path / "in.mp4", moving(6), [0, 1, 2, 5, 6, 9], time_base=base))
    times = surveyed(clip).times
    doubled(clip, tmp_path / "out.mp4", tmp_path)
    assert times_of(tmp_path / "out.mp4") == [number * base for number in (0, 1, 2, 5, 6, 9)]
    assert is_rounding(choose_encoding(tmp_path / "out.mkv", clip, 32, 48), times)
    assert not is_rounding(choose_encoding(tmp_path / "out.mp4", clip, 32, 48), times)


def test_a_part_begins_at_zero_with_its_own_sound_and_chapters(full: Path, tmp_path: Path) -> None:
    span = Span(start=Fraction(1, 10), end=Fraction(3, 10))
    clip = Clip(full, span)
    assert [pts for pts, _ in surveyed(clip).times] == [125, 160, 240, 275]
    doubled(clip, tmp_path / "out.mkv", tmp_path, span)
    assert times_of(tmp_path / "out.mkv") == [Fraction(time, 1000) for time in (0, 35, 115, 150)]
    told = packets_of(tmp_path / "out.mkv")
    assert [content for _, _, content in told["subtitle"]] == [b"two"] and told["subtitle"][0][0] == Fraction(75, 1000)
    with av.open(str(tmp_path / "out.mkv")) as made:
        assert [one["metadata"]["title"] for one in made.chapters()] == ["one", "two"]
    assert len(surveyed(Clip(full, Span(count=2))).times) == 2


def test_a_turned_clip_is_read_upright(tmp_path: Path) -> None:
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:, :8] = 255  # white at the left; turned counterclockwise it is below
    clip = Clip(write_clip(tmp_path / "in.mp4", [pixels] * 4, turned=90, sample_aspect_ratio=Fraction(4, 3)))
    assert (clip.height, clip.width, clip.sample_aspect) == (24, 16, Fraction(3, 4))
    (frame, *_) = clip.frames()
    assert frame.pixels[20:].mean() > 240 and frame.pixels[:12].mean() < 15
    for name in ("out.mp4", "out.mkv"):
        doubled(clip, tmp_path / name, tmp_path)
        again = Clip(tmp_path / name)
        assert (again.height, again.width, again.sample_aspect) == (48, 32, Fraction(3, 4))


@pytest.mark.parametrize("matrix", [1, 5, 9])
@pytest.mark.parametrize(("pix_fmt", "most"), [("yuv444p", 4.5), ("yuv444p10le", 1.0)])
@pytest.mark.parametrize("levels", [1, 2])
def test_colours_survive_with_their_matrix_and_range(
    matrix: int, pix_fmt: str, most: float, levels: int, tmp_path: Path
) -> None:
    colours = np.random.default_rng(0).integers(20, 236, (4, 6, 3)).repeat(4, 0).repeat(4, 1).astype(np.uint16)
    tags = {"colorspace": matrix, "color_range": levels, "color_primaries": 9, "color_trc": 1}
    clip = Clip(write_clip(tmp_path / "in.mkv", [colours * 257] * 4, codec="ffv1", pix_fmt=pix_fmt, **tags))
    assert clip.colour == Colour(matrix=matrix, range=levels, primaries=9, transfer=1)
    (frame, *_) = clip.frames()
    white = np.iinfo(frame.pixels.dtype).max
    assert np.abs(frame.pixels / (white / 255) - colours).max() < most
    doubled(clip, tmp_path / "out.mkv", tmp_path, codec="ffv1")
    again = Clip(tmp_path / "out.mkv")
    assert again.colour == clip.colour and again.bits == (10 if "10" in pix_fmt else 8)
    (frame, *_) = again.frames()
    assert np.abs(frame.pixels[::2, ::2] / (white / 255) - colours).max() < 2 * most


def test_a_clip_of_ten_bits_stays_one(tmp_path: Path) -> None:
    frames = [frame.astype(np.uint16) * 257 for frame in moving(4, 32, 32)]
    clip = Clip(write_clip(tmp_path / "in.mkv", frames, pix_fmt="yuv420p10le"))
    encoding = choose_encoding(tmp_path / "out.mp4", clip, 64, 64)
    assert (clip.bits, encoding.codec, encoding.pix_fmt) == (10, "libx265", "yuv420p10le")
    doubled(clip, tmp_path / "out.mp4", tmp_path)
    assert Clip(tmp_path / "out.mp4").bits == 10
    assert choose_encoding(tmp_path / "out.mp4", clip, 32, 64).codec == "libx264"
    with pytest.raises(ConfigError, match="libx265 needs sides of 64 pixels or more, not 64x32; take libx264"):
        choose_encoding(tmp_path / "out.mp4", clip, 32, 64, codec="libx265")


@pytest.mark.parametrize("name", ["out.mp4", "out.mov", "out.mkv", "out.webm"])
def test_the_same_frames_give_the_same_bytes(full: Path, tmp_path: Path, name: str) -> None:
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        doubled(Clip(full), folder / name, folder)
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize(("count", "height", "width", "runs"), [(10, 20, 28, 20), (40, 96, 96, 6)])
def test_frames_of_noise_give_the_same_bytes_in_every_run(
    count: int, height: int, width: int, runs: int, tmp_path: Path
) -> None:
    times = [50 * i + 7 * (i % 3) for i in range(count)]
    clip = Clip(write_clip(tmp_path / "in.mkv", moving(count), times))
    encoding = choose_encoding(tmp_path / "out.mkv", clip, height, width)
    random = np.random.default_rng(0)
    write_segment(tmp_path / "0", random.integers(0, 256, (count, height, width, 3), dtype=np.uint8), encoding)
    made = set()
    for _ in range(runs):
        assemble(tmp_path / "out.mkv", [tmp_path / "0"], encoding, surveyed(clip).times, clip, Span())
        made.add((tmp_path / "out.mkv").read_bytes())
    assert len(made) == 1


def test_what_no_file_can_be_is_refused(full: Path, tmp_path: Path) -> None:
    clip = Clip(full)
    with pytest.raises(OutputError, match=r"out\.avi: no clip of this ending is written; give \.mp4"):
        choose_encoding(tmp_path / "out.avi", clip, 32, 48)
    with pytest.raises(OutputError, match=r"cannot hold libx264 with yuv420p .*; give \.mkv"):
        choose_encoding(tmp_path / "out.webm", clip, 32, 48, codec="libx264")
    with pytest.raises(ConfigError, match="no encoder is called 'h265'"):
        choose_encoding(tmp_path / "out.mp4", clip, 32, 48, codec="h265")
    with pytest.raises(ConfigError, match=r"does not take the pixel format 'rgb24'; give one of yuv420p"):
        choose_encoding(tmp_path / "out.mp4", clip, 32, 48, pix_fmt="rgb24")
    assert even_sides(33, 17) == (32, 16) and even_sides(1, 51) == (2, 52)


def test_hdr_is_refused_with_the_way_out(tmp_path: Path) -> None:
    for transfer, name in ((16, "PQ"), (18, "HLG")):
        path = write_clip(tmp_path / "in.mkv", moving(2), pix_fmt="yuv420p10le", color_trc=transfer)
        with pytest.raises(ImageError, match=rf"in\.mkv: is HDR, {name} .*; convert it first, .*tonemap"):
            Clip(path)


def test_files_that_are_no_clips_are_one_line(full: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no clip")
    # Playlists, whose parts FFmpeg would fetch from anywhere
    write_clip(tmp_path / "part.ts", moving(8))
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\npart.ts\n#EXT-X-ENDLIST\n")
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile part.ts\n")
    (tmp_path / "cut.mkv").write_bytes(full.read_bytes()[:200])
    with av.open(str(tmp_path / "sound.mp4"), "w") as out:
        stream = out.add_stream("aac", rate=16000)
        block = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.int16), format="s16", layout="mono")
        block.sample_rate = 16000
        out.mux(stream.encode(block))
        out.mux(stream.encode(None))
    with av.open(str(tmp_path / "zero.mkv"), "w") as out:
        video = out.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = 24, 16, "yuv420p"
        out.start_encoding()
    for name, said in (
        ("zero.mkv", "zero.mkv: cannot be read as a clip"),
        ("empty.mp4", "cannot be read as a clip"),
        ("text.mp4", "cannot be read as a clip"),
        ("list.m3u8", "cannot be read as a clip"),
        ("list.mp4", "cannot be read as a clip"),
        ("cut.mkv", "cut.mkv: "),
        ("sound.mp4", "there is no video in this file"),
        ("none.mp4", "cannot be read as a clip"),
    ):
        with pytest.raises(ImageError, match=said) as caught:
            surveyed(Clip(tmp_path / name))
        assert "\n" not in str(caught.value)
    with pytest.raises(ImageError, match="no frame is left of the clip"):
        surveyed(Clip(full, Span(start=Fraction(9))))


@pytest.fixture
def damaged(tmp_path: Path) -> Iterator[Path]:
    """A clip whose fourth frame of eight cannot be decoded."""
    path = write_clip(tmp_path / "in.mkv", moving(8), codec="mjpeg", pix_fmt="yuvj420p", color_range=2)
    with av.open(str(path)) as container:
        packet = [bytes(packet) for packet in container.demux() if packet.pts is not None][3]
    (tmp_path / "whole.mkv").write_bytes(content := path.read_bytes())
    at = content.index(packet)
    path.write_bytes(content[: at + 2] + bytes(len(packet) - 2) + content[at + len(packet) :])
    yield path


def test_a_damaged_frame_is_named_and_repeated_or_dropped(damaged: Path) -> None:
    whole = [frame.pixels for frame in Clip(damaged.with_name("whole.mkv")).frames()]
    for choice, numbers, done in (
        ("repeat", [0, 1, 2, 2, 4, 5, 6, 7], "repeated"),
        ("drop", [0, 1, 2, 4, 5, 6, 7], "left"),
    ):
        clip = Clip(damaged, on_damage=choice)
        survey = surveyed(clip)
        (note,) = survey.notes
        assert "the frame at 0.120 s cannot be decoded" in note and done in note
        found = [frame.pixels for frame in clip.frames()]
        for pixels, number in zip(found, numbers, strict=True):
            assert np.array_equal(pixels, whole[number])
        assert [frame.pts for frame in clip.frames(skip=3)] == [pts for pts, _ in survey.times[3:]]
        assert all(np.array_equal(one.pixels, other) for one, other in zip(clip.frames(skip=3), found[3:], strict=True))
    late = Clip(damaged, Span(start=Fraction(12, 100)))
    times = surveyed(late).times
    assert times[0][0] == 160  # there is no frame that could be repeated
    assert [frame.pts for frame in late.frames(skip=1)] == [pts for pts, _ in times[1:]]
    with pytest.raises(ImageError, match=r"the frame at 0\.120 s cannot be decoded .*; get a whole copy, or choose"):
        surveyed(Clip(damaged, on_damage="stop"))


@pytest.mark.parametrize("audio_seconds", [0, 3.5])
def test_a_file_that_was_cut_off_says_so_and_gives_what_it_has(audio_seconds: float, tmp_path: Path) -> None:
    times = [1000 + 40 * i for i in range(60)]
    whole = write_clip(
        tmp_path / "in.mkv", moving(60, 48, 64), times, codec="ffv1", pix_fmt="yuv420p", audio_seconds=audio_seconds
    )
    assert surveyed(Clip(whole)).notes == []
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 4])
    survey = surveyed(Clip(whole))
    assert 5 < len(survey.times) < 30
    (note,) = survey.notes
    assert note.endswith("it is cut off")
    with pytest.raises(ImageError, match=r"in\.mkv: announces .* cut off; get a whole copy"):
        surveyed(Clip(whole, on_damage="stop"))


def test_interlaced_and_transparent_clips_are_told_of(tmp_path: Path) -> None:
    options = {"x264-params": "interlaced=1"}
    path = write_clip(tmp_path / "in.mkv", moving(5, 32, 32), options=options)
    assert surveyed(Clip(path)).notes == ["is interlaced; --deinterlace makes whole frames of it"]
    woven = Clip(path, deinterlace=True)
    survey = surveyed(woven)
    assert survey.notes == [] and [pts for pts, _ in survey.times] == [0, 40, 80, 120, 160]
    plain = write_clip(tmp_path / "alpha.mkv", moving(2), codec="ffv1", pix_fmt="yuva420p")
    assert surveyed(Clip(plain)).notes == ["has transparency, which is left out"]


def test_grey_is_decided_over_the_clip(tmp_path: Path) -> None:
    grey, coloured = moving(4, is_grey=True), moving(1)
    assert surveyed(Clip(write_clip(tmp_path / "grey.mkv", grey))).is_grey
    assert not surveyed(Clip(write_clip(tmp_path / "late.mkv", [*grey, *coloured]))).is_grey


def test_a_folder_of_frames_is_a_clip(tmp_path: Path) -> None:
    for number, pixels in enumerate(moving(5)):
        Image.fromarray(pixels).save(tmp_path / f"{number:03}.png")
    folder = FrameFolder(tmp_path, Fraction(24), Span(start=Fraction(1, 24), count=3))
    assert [frame.pts for frame in folder.frames()] == [1, 2, 3]
    assert all(np.array_equal(frame.pixels, moving(5)[frame.pts]) for frame in folder.frames())
    Image.fromarray(moving(1, 8, 8)[0]).save(tmp_path / "002.png")
    with pytest.raises(ImageError, match=r"002\.png: is of 8x8 pixels and the first of 24x16"):
        surveyed(FrameFolder(tmp_path, Fraction(24)))
    (tmp_path / "none").mkdir()
    with pytest.raises(ImageError, match="no picture in this folder"):
        FrameFolder(tmp_path / "none", Fraction(24))


def test_a_full_disk_is_one_line_and_leaves_nothing(full: Path, tmp_path: Path) -> None:
    clip, target = Clip(full), tmp_path / "out.mkv"
    encoding = choose_encoding(target, clip, 32, 48)
    pixels = [np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)] * 50
    with files_end_at(10_000), pytest.raises(OutputError, match=r"0\.seg: cannot be written .*; free space"):
        write_segment(tmp_path / "0.seg", pixels, encoding)
    assert list(tmp_path.iterdir()) == []
    write_segment(tmp_path / "0.seg", pixels, encoding)
    times = [(40 * i, 40) for i in range(50)]
    with files_end_at(10_000), pytest.raises(OutputError, match=r"out\.mkv: cannot be written .*; free space"):
        assemble(target, [tmp_path / "0.seg"], encoding, times, clip, Span())
    assert [path.name for path in tmp_path.iterdir()] == ["0.seg"]
