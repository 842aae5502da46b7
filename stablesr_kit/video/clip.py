"""Clips as files: what is in one, and its frames, one after the other with their times.

Reading goes through PyAV, the libraries of FFmpeg; folders of pictures do without. Files from outside are untrusted:
what cannot be decoded is named, and never more than a few frames are held.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from stablesr_kit.errors import ConfigError, ImageError, reason_of
from stablesr_kit.imaging.finding import find_pictures
from stablesr_kit.imaging.reading import MAX_PIXELS, read_picture

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

SUFFIXES = frozenset(
    ".3gp .asf .avi .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .mxf .nut .ogv .ts .vob .webm .wmv .y4m".split()
)
"""Endings of files that are clips."""

OnDamage = Literal["repeat", "drop", "stop"]
"""What stands for a frame that cannot be decoded: the one before, nothing, or an error."""

# Numbers of ITU-T H.273, as files and FFmpeg have them
UNSPECIFIED = 2
BT709, SMPTE170M, BT2020 = 1, 6, 9
LIMITED, FULL = 1, 2
_TRUSTED = {
    "format_whitelist": (
        "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,asf,avi,flv,mpegts,mpeg,mpegvideo,mxf,nut,ogg,yuv4mpegpipe"
    ),
    "protocol_whitelist": "file",
    "max_pixels": str(MAX_PIXELS),
}
"""For FFmpeg: containers that bring all they hold, no playlists, which name other files and addresses."""
_HDR = {16: "PQ (SMPTE ST 2084)", 18: "HLG (ARIB STD-B67)"}
_SWSCALE = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}
"""Matrices: by their numbers in H.273, those that the converter knows them by."""


@dataclass(frozen=True, kw_only=True)
class Colour:
    """Numbers of H.273; range: 1 limited, 2 full. matrix is 0 for RGB, and never unspecified: it is what the frames
    are converted with."""

    matrix: int
    range: int
    primaries: int = UNSPECIFIED
    transfer: int = UNSPECIFIED


@dataclass(frozen=True, kw_only=True)
class Frame:
    """pixels: RGB (H, W, 3), uint8, or uint16 of more than 8 bits, upright. pts, duration: in the clip's time base."""

    pixels: NDArray[Any]
    pts: int
    duration: int


@dataclass(frozen=True, kw_only=True)
class Span:
    """What of a clip is taken: seconds from its first frame, from start to before end, and a number of frames."""

    start: Fraction | None = None
    end: Fraction | None = None
    count: int | None = None

    @property
    def is_whole(self) -> bool:
        return self == Span()


@dataclass
class Survey:
    """What one pass over a clip finds: the times of all its frames, and what a user must know before the start.

    times: (pts, duration) of each. is_grey: whether no frame has colour. notes: a line each.
    """

    times: list[tuple[int, int]] = field(default_factory=list)
    is_grey: bool = True
    notes: list[str] = field(default_factory=list)


class Source(Protocol):
    """A clip, or a folder of pictures that is one."""

    path: Path
    height: int
    width: int
    bits: int
    time_base: Fraction
    rate: Fraction
    sample_aspect: Fraction
    colour: Colour
    subsampling: str
    notes: list[str]

    def frames(self, survey: "Survey | None" = None, skip: int = 0) -> Iterator[Frame]:
        """The frames from number `skip` on. A survey is told what is wrong with which."""


class Clip:
    """The first video stream of a file.

    Args:
        path: of the file.
        span: what of it is taken.
        on_damage: what stands for a frame that cannot be decoded.
        deinterlace: make whole frames of interlaced ones (FFmpeg's bwdif).

    Attributes:
        height: of the frames upright, in pixels.
        width: likewise.
        bits: of a channel.
        sample_aspect: width of a pixel through its height.
        rate: mean frames per second; the times of frames are theirs alone.
        subsampling: "420", "422" or "444".

    Raises:
        ImageError: no video in it, or one that cannot be restored.
        ConfigError: PyAV is not installed.
    """

    def __init__(
        self, path: Path, span: Span | None = None, on_damage: OnDamage = "repeat", deinterlace: bool = False
    ) -> None:
        self.path, self.span, self.on_damage, self.deinterlace = path, span or Span(), on_damage, deinterlace
        self.notes: list[str] = []
        with opened(path) as container:
            stream = video_stream(container, path)
            first = self._first_frame(container, stream)
            self.time_base = stream.time_base or Fraction(1, 1000)
            self.rate = stream.average_rate or stream.guessed_rate or Fraction(25)
            self.origin = _pts(first, None, 0)
            self._describe(first, stream)
            others = [one for one in container.streams.video if one.index != stream.index and not _is_cover(one)]
            if others:
                self.notes.append(
                    f"has {len(others) + 1} video streams; the first is restored, the others are left out"
                )

    def frames(self, survey: Survey | None = None, skip: int = 0) -> Iterator[Frame]:
        """The frames from number `skip` on, of the span; a survey is told of those that are damaged."""
        from av.video.reformatter import VideoReformatter

        reformatter = VideoReformatter()
        last: VideoFrame | None = None
        pixels: NDArray[Any] | None = None
        for number, (decoded, pts, duration) in enumerate(self._timed(survey)):
            if decoded is not None:
                last, pixels = decoded, None
            if number >= skip and last is not None:
                pixels = self._pixels(last, reformatter) if pixels is None else pixels
                yield Frame(pixels=pixels, pts=pts, duration=duration)

    def _first_frame(self, container: "InputContainer", stream: "VideoStream") -> "VideoFrame":
        from av.error import FFmpegError

        try:
            for packet in container.demux(stream):
                try:
                    for frame in packet.decode():
                        return frame
                except FFmpegError:
                    continue
        except FFmpegError as error:
            raise ImageError(f"{self.path}: the clip is damaged ({what(error)}); get a whole copy of it") from error
        raise ImageError(f"{self.path}: no frame of the clip can be decoded; get a whole copy of it")

    def _describe(self, frame: "VideoFrame", stream: "VideoStream") -> None:
        parts = frame.format.components
        self.bits = parts[0].bits
        self.turns = round(frame.rotation / 90) % 4
        height, width = frame.height, frame.width
        self.height, self.width = (width, height) if self.turns % 2 else (height, width)
        if self.height * self.width > MAX_PIXELS:
            raise ImageError(
                f"{self.path}: frames of {self.width}x{self.height} pixels are too large; scale them first"
            )
        aspect = stream.sample_aspect_ratio or Fraction(1)
        self.sample_aspect = 1 / aspect if self.turns % 2 and aspect else aspect or Fraction(1)
        is_rgb = frame.format.is_rgb
        matrix = 0 if is_rgb else frame.colorspace
        if not is_rgb and matrix not in _SWSCALE:  # as players guess, by the height of the file
            matrix = BT709 if height >= 720 else SMPTE170M
        is_full = is_rgb or frame.color_range == FULL or frame.format.name.startswith("yuvj")
        self.colour = Colour(
            matrix=matrix,
            range=FULL if is_full else LIMITED,
            primaries=int(frame.color_primaries),
            transfer=int(frame.color_trc),
        )
        if self.colour.transfer in _HDR:
            raise ImageError(
                f"{self.path}: is HDR, {_HDR[self.colour.transfer]}, and the model knows SDR only; convert it first, "
                "for instance with ffmpeg -vf zscale=t=linear,tonemap=hable,zscale=p=bt709:t=bt709:m=bt709"
            )
        chroma = parts[1] if len(parts) > 2 and not is_rgb else None
        wide, high = (chroma.width, chroma.height) if chroma else (width, height)
        self.subsampling = "444" if wide == width else "422" if high == height else "420"
        if frame.format.has_palette or any(part.is_alpha for part in parts):
            self.notes.append("has transparency, which is left out")
        if frame.interlaced_frame and not self.deinterlace:
            self.notes.append("is interlaced; --deinterlace makes whole frames of it")

    def _timed(self, survey: Survey | None) -> Iterator[tuple["VideoFrame | None", int, int]]:
        """Frames of the span with pts and duration, in the order of time; None stands for a damaged one."""
        span, step = self.span, max(round(1 / (self.rate * self.time_base)), 1)
        start, end = (
            None if seconds is None else self.origin + round(seconds / self.time_base)
            for seconds in (span.start, span.end)
        )
        last, number, taken = None, 0, 0
        for frame, pts in self._decoded(survey):
            pts = pts if pts is not None else self.origin if last is None else last + step
            if last is not None and pts <= last:
                if survey is not None and frame is not None:
                    survey.notes.append(f"frame {number + 1}: its time is not after that of the one before; moved on")
                pts = last + 1
            last = pts
            number += 1
            if start is not None and pts < start:
                continue
            if (end is not None and pts >= end) or taken == span.count:
                return
            if frame is None and (self.on_damage == "drop" or taken == 0):  # there is none before the first
                continue
            duration = step if frame is None or not frame.duration else frame.duration
            yield frame, pts, duration
            taken += 1

    def _decoded(self, survey: Survey | None) -> Iterator[tuple["VideoFrame | None", int | None]]:
        """All frames with their times as far as they have one; (None, time) for what cannot be decoded."""
        from av.error import FFmpegError

        with opened(self.path) as container:
            stream = video_stream(container, self.path)
            stream.codec_context.thread_type = "SLICE"  # an error belongs to its own packet
            filtered = _Deinterlacer(stream) if self.deinterlace else None
            missing: list[int] = []

            def in_order(frame: "VideoFrame") -> Iterator[tuple["VideoFrame | None", int | None]]:
                pts = frame.pts if frame.pts is not None else frame.dts
                while missing and pts is not None and missing[0] < pts:
                    yield None, missing.pop(0)
                is_damaged = frame.is_corrupt
                if is_damaged:
                    self._tell(survey, pts, "is damaged")
                yield (None if is_damaged else frame), pts

            end = Fraction(0)  # of all that is in the file
            try:
                for packet in container.demux(stream) if survey is None else container.demux():
                    if packet.pts is not None:
                        end = max(end, (packet.pts + (packet.duration or 0)) * packet.time_base)
                    if packet.stream.index != stream.index:
                        continue
                    try:
                        decoded = stream.decode(packet)
                    except FFmpegError as error:
                        time = packet.pts if packet.pts is not None else packet.dts
                        self._tell(survey, time, f"cannot be decoded ({what(error)})")
                        if time is not None:
                            missing = sorted([*missing, time])
                        continue
                    for frame in decoded if filtered is None else filtered(decoded, is_end=packet.size == 0):
                        yield from in_order(frame)
            except FFmpegError as error:
                self._tell(survey, None, f"reading ends early ({what(error)}): the file is damaged or cut off")
            for time in missing:
                yield None, time
            if survey is not None:
                self._tell_shortness(container, stream, survey, end)

    def _tell(self, survey: Survey | None, pts: int | None, what: str) -> None:
        place = "" if pts is None else f"the frame at {float((pts - self.origin) * self.time_base):.3f} s "
        if self.on_damage == "stop":
            raise ImageError(f"{self.path}: {place}{what}; get a whole copy, or choose --on-damage repeat or drop")
        if survey is not None:
            done = {"repeat": "the one before is repeated", "drop": "it is left out"}[self.on_damage]
            survey.notes.append(f"{place}{what}" + (f"; {done}" if place else ""))

    def _tell_shortness(
        self, container: "InputContainer", stream: "VideoStream", survey: Survey, end: Fraction
    ) -> None:
        """A note if there is less than the file announces; end: of its last packet, in seconds."""
        if not self.span.is_whole:
            return
        frames, lasts = stream.frames, Fraction(container.duration or 0, 1_000_000)
        if frames > len(survey.times) + len(survey.notes) + 1:
            self._tell(survey, None, f"announces {frames} frames and has {len(survey.times) + 1}: it is cut off")
        elif lasts - end > max(lasts / 20, 5 / self.rate):
            self._tell(survey, None, f"announces {float(lasts):.1f} s and ends at {float(end):.1f} s: it is cut off")

    def _pixels(self, frame: "VideoFrame", reformatter: Any) -> NDArray[Any]:
        from av.video.reformatter import Interpolation

        is_deep = frame.format.components[0].bits > 8
        quality = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP
        rgb = reformatter.reformat(
            frame,
            format="rgb48le" if is_deep else "rgb24",
            src_colorspace=_SWSCALE.get(self.colour.matrix),
            src_color_range=self.colour.range,
            dst_color_range=FULL,
            interpolation=int(quality | Interpolation.FULL_CHR_H_INT | Interpolation.BITEXACT),
            threads=1,
        )
        height, width = (self.width, self.height) if self.turns % 2 else (self.height, self.width)
        if (rgb.height, rgb.width) != (height, width):
            raise ImageError(f"{self.path}: the size of its frames changes to {rgb.width}x{rgb.height}; cut it there")
        return np.ascontiguousarray(np.rot90(rgb.to_ndarray(), self.turns))


class FrameFolder:
    """A folder of pictures, in the order of their names, as a clip of a constant frame rate.

    Raises:
        ImageError: no picture is in it, or one cannot be read or is of another size.
    """

    def __init__(self, path: Path, rate: Fraction, span: Span | None = None) -> None:
        self.path, self.rate, self.notes = path, rate, list[str]()
        span = span or Span()
        files = [file for file in find_pictures(path).pictures if file.parent == path]
        if not files:
            raise ImageError(f"{path}: no picture in this folder; give one with the frames of a clip")
        start = 0 if span.start is None else -(-span.start * rate // 1)
        end = len(files) if span.end is None else -(-span.end * rate // 1)
        self.first = int(start)
        self.files = files[self.first : int(end)][: span.count]
        if not self.files:
            raise ImageError(f"{path}: of its {len(files)} frames none is in what was asked for; ask for others")
        first = read_picture(self.files[0])
        if first.has_alpha:
            self.notes.append("has transparency, which is left out")
        self.height, self.width = first.height, first.width
        self.bits = 16 if first.pixels.dtype == np.uint16 else 8
        self.time_base, self.sample_aspect, self.subsampling = 1 / rate, Fraction(1), "420"
        self.colour = Colour(matrix=BT709, range=LIMITED, primaries=BT709, transfer=13)

    def frames(self, survey: Survey | None = None, skip: int = 0) -> Iterator[Frame]:  # noqa: ARG002, as of a clip
        """The pictures from number `skip` on."""
        for number, file in enumerate(self.files[skip:], self.first + skip):
            picture = read_picture(file)
            if (picture.height, picture.width) != (self.height, self.width):
                raise ImageError(
                    f"{file}: is of {picture.width}x{picture.height} pixels and the first of "
                    f"{self.width}x{self.height}; the frames of a clip are of one size"
                )
            yield Frame(pixels=picture.pixels[..., :3], pts=number, duration=1)


def surveyed(source: Source, on_frame: Callable[[], Any] | None = None) -> Survey:
    """One pass over a clip, with `on_frame` called for each frame. Raises ImageError if no frame is left."""
    import torch

    from stablesr_kit.imaging.canvas import View
    from stablesr_kit.imaging.color_fix import is_neutral
    from stablesr_kit.spaces import unit_to_image

    survey = Survey(notes=list(source.notes))
    for frame in source.frames(survey):
        if on_frame is not None:
            on_frame()
        survey.times.append((frame.pts, frame.duration))
        if survey.is_grey:
            white = np.iinfo(frame.pixels.dtype).max
            unit = torch.from_numpy(frame.pixels.astype(np.float32)).permute(2, 0, 1)[None] / float(white)
            survey.is_grey = is_neutral(View(unit_to_image(unit)))
    if not survey.times:
        raise ImageError(f"{source.path}: no frame is left of the clip; ask for another part of it")
    return survey


@contextmanager
def opened(path: Path) -> Iterator["InputContainer"]:
    """The file as PyAV has it. Raises ImageError if it is no clip, ConfigError without PyAV."""
    av = need_av()
    try:
        container = av.open(str(path), metadata_errors="replace", options=_TRUSTED)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise ImageError(f"{path}: cannot be read as a clip ({what(error)}); get a whole copy of it") from error
    with container:
        yield container


def what(error: Exception) -> str:
    """What an error of FFmpeg says, without its number and the file's name."""
    return getattr(error, "strerror", None) or reason_of(error)


def need_av() -> Any:
    """PyAV, which says nothing on stderr. Raises ConfigError if it is not installed."""
    try:
        import av
        import av.logging
    except ImportError as error:
        raise ConfigError("clips need PyAV; install stablesr-kit[video], or give a folder of frames") from error
    av.logging.set_level(None)
    return av


def video_stream(container: "InputContainer", path: Path) -> "VideoStream":
    """The first that is no cover picture. Raises ImageError if there is none."""
    for stream in container.streams.video:
        if not _is_cover(stream):
            return stream
    raise ImageError(f"{path}: there is no video in this file; give a clip")


def _is_cover(stream: "VideoStream") -> bool:
    from av.stream import Disposition

    return bool(stream.disposition & Disposition.attached_pic)


def _pts(frame: "VideoFrame", last: int | None, step: int) -> int:
    found = frame.pts if frame.pts is not None else frame.dts
    return found if found is not None else 0 if last is None else last + step


class _Deinterlacer:
    """Frames through FFmpeg's bwdif, one for one, with times in the stream's time base."""

    def __init__(self, stream: "VideoStream") -> None:
        from av.filter import Graph

        self.time_base = stream.time_base or Fraction(1, 1000)
        self.graph = Graph()
        source = self.graph.add_buffer(template=stream)
        weave = self.graph.add("bwdif", "mode=send_frame:parity=auto:deint=all")
        sink = self.graph.add("buffersink")
        self.graph.link_nodes(source, weave, sink).configure()

    def __call__(self, frames: "list[VideoFrame]", is_end: bool) -> "Iterator[VideoFrame]":
        av = need_av()
        for frame in [*frames, *([None] if is_end else [])]:
            self.graph.push(frame)
            while True:
                try:
                    done = self.graph.vpull()
                except (av.error.BlockingIOError, av.error.EOFError):
                    break
                if done.pts is not None and done.time_base is not None:
                    done.pts = round(done.pts * done.time_base / self.time_base)
                    done.time_base = self.time_base
                yield done
