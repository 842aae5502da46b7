"""Restored clips as files: lossless segments while the work goes on, one encoded file at its end.

What is not video is copied packet by packet, with its times: audio, subtitles, data, attachments; and so are chapters
and metadata. Files have no dates and no random numbers in them: the same frames give the same bytes.
"""

import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stablesr_kit.errors import ConfigError, OutputError
from stablesr_kit.storage import replacing_file, writing
from stablesr_kit.video.clip import (
    BT709,
    FULL,
    LIMITED,
    Clip,
    Colour,
    Source,
    Span,
    need_av,
    opened,
    video_stream,
    what,
)

if TYPE_CHECKING:
    from av.container import InputContainer, OutputContainer
    from av.packet import Packet
    from av.stream import Stream
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

FORMATS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm"}
"""Of the containers that are written, by the endings of their names."""

CRF = {"libx264": 16, "libx265": 18, "libsvtav1": 20, "libvpx-vp9": 20}
"""What each codec is given where nothing is asked for: hardly to be told from the frames it is given."""

LEAST_OF_X265 = 64
"""Of a side, in pixels: x265 writes beyond its memory in smaller pictures."""

X264_WITHOUT_AVX512 = "asm=MMX2,SSE2Fast,SSSE3,SSE4.2,AVX,FMA3,BMI2,AVX2"
"""For x264 where there is AVX-512: with that, its macroblock tree gave other bytes for the same frames in every other
run (96x96, 38 frames), and up to AVX2 in none."""

_OPTIONS = {"libvpx-vp9": {"b": "0", "row-mt": "1"}, "libx265": {"x265-params": "log-level=none"}}
_UNTOLD = ("duration", "encoder", "bps", "number_of_", "_statistics", "rotate", "major_brand", "minor_", "compatible_")
"""Beginnings of metadata that say something of the old file."""


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How a clip is written, as `choose_encoding` found it for its source.

    height, width: of the frames. pix_fmt: of FFmpeg. colour: what is written about it. time_base, rate and
    sample_aspect: of the source.
    """

    container: str
    codec: str
    pix_fmt: str
    crf: int | None
    height: int
    width: int
    colour: Colour
    time_base: Fraction
    rate: Fraction
    sample_aspect: Fraction

    @property
    def is_deep(self) -> bool:
        """Whether its channels have more than 8 bits."""
        return any(depth in self.pix_fmt for depth in ("10", "12", "14", "16"))


def choose_encoding(
    target: Path,
    source: Source,
    height: int,
    width: int,
    codec: str | None = None,
    crf: int | None = None,
    pix_fmt: str | None = None,
) -> Encoding:
    """How a clip of height x width pixels is best written into `target`; what is None is chosen.

    Frames with channels of more than 8 bits get H.265 where others get H.264, WebM always VP9. Bits and subsampling of
    the chroma are those of the source as far as the codec has them. Odd sides are to be rounded before, see
    `even_sides`.

    Raises:
        OutputError: no such container is written, or it does not take the codec.
        ConfigError: an unknown codec or pixel format.
    """
    av = need_av()
    suffix = target.suffix.lower()
    if suffix not in FORMATS:
        raise OutputError(
            f"{target}: no clip of this ending is written; give {', '.join(FORMATS)}, or a folder for PNG"
        )
    if codec is None:
        takes_x265 = source.bits > 8 and min(height, width) >= LEAST_OF_X265
        codec = "libvpx-vp9" if suffix == ".webm" else "libx265" if takes_x265 else "libx264"
    if codec == "libx265" and min(height, width) < LEAST_OF_X265:
        raise ConfigError(f"libx265 needs sides of {LEAST_OF_X265} pixels or more, not {width}x{height}; take libx264")
    try:
        found = av.codec.Codec(codec, "w")
    except (ValueError, av.error.FFmpegError) as error:
        raise ConfigError(f"no encoder is called {codec!r}; give one such as {', '.join(CRF)} or ffv1") from error
    taken = [one.name for one in found.video_formats or []]
    lossless = {one.name for one in av.codec.Codec("ffv1", "w").video_formats or []}
    if pix_fmt is None:
        pix_fmt = _nearest_format(source, [name for name in taken if name in lossless])
    if pix_fmt not in taken or pix_fmt not in lossless:
        known = [name for name in taken if name in lossless]
        raise ConfigError(f"{codec} does not take the pixel format {pix_fmt!r}; give one of {', '.join(known)}")
    if crf is not None and codec not in CRF:
        raise ConfigError(f"{codec} has no CRF; leave it out, or take one of {', '.join(CRF)}")
    is_rgb = av.VideoFormat(pix_fmt).is_rgb
    colour = source.colour
    if is_rgb != (colour.matrix == 0):
        colour = Colour(
            matrix=0 if is_rgb else BT709,
            range=FULL if is_rgb else LIMITED,
            primaries=colour.primaries,
            transfer=colour.transfer,
        )
    encoding = Encoding(
        container=FORMATS[suffix],
        codec=codec,
        pix_fmt=pix_fmt,
        crf=CRF.get(codec) if crf is None else crf,
        height=height,
        width=width,
        colour=colour,
        time_base=source.time_base,
        rate=source.rate,
        sample_aspect=source.sample_aspect,
    )
    try:
        with av.open(io.BytesIO(), "w", format=encoding.container) as out:
            _add_video(out, encoding)
            out.start_encoding()
    except (ValueError, av.error.FFmpegError) as error:
        raise OutputError(f"{target}: cannot hold {codec} with {pix_fmt} ({what(error)}); give .mkv") from error
    return encoding


def even_sides(height: float, width: float) -> tuple[int, int]:
    """The nearest size that codecs with subsampled chroma take."""
    return max(round(height / 2), 1) * 2, max(round(width / 2), 1) * 2


def left_out(source: Source, encoding: Encoding) -> list[str]:
    """What of the source the container cannot hold: streams beside the video, found by writing its header."""
    if not isinstance(source, Clip):
        return []
    lost = []
    is_in_stream = encoding.codec in ("libx264", "libx265") or encoding.container in ("mp4", "mov")
    if encoding.sample_aspect != 1 and not is_in_stream:
        lost.append(f"the shape of pixels ({encoding.sample_aspect.numerator}:{encoding.sample_aspect.denominator})")
    with opened(source.path) as container:
        video = video_stream(container, source.path)
        for stream in _others(container, video):
            reason = _refused(encoding, stream)
            if reason is not None:
                name = "none" if stream.type == "attachment" else getattr(stream, "name", None) or "unknown"
                lost.append(f"{stream.type} stream {stream.index} ({name})")
    return lost


def is_rounding(encoding: Encoding, times: Sequence[tuple[int, int]]) -> bool:
    """Whether the container moves times of frames: Matroska and WebM count milliseconds."""
    if encoding.container not in ("matroska", "webm"):
        return False
    return any((pts * encoding.time_base * 1000).denominator != 1 for pts, _ in times)


def write_segment(path: Path, frames: Iterable[NDArray[Any]], encoding: Encoding) -> None:
    """Frames (H, W, 3), uint8 or uint16, as they will be encoded, without loss (FFV1). Raises OutputError."""
    av = need_av()
    with replacing_file(path) as part, av.open(str(part), "w", format="nut") as out:
        stream = out.add_stream("ffv1", rate=25, options={"level": "3", "slicecrc": "1"})
        stream.codec_context.thread_count = 1
        stream.height, stream.width, stream.pix_fmt = encoding.height, encoding.width, encoding.pix_fmt
        out.flags |= av.container.Flags.bitexact.value
        for number, pixels in enumerate(frames):
            frame = coded(pixels, encoding)
            frame.pts, frame.time_base = number, Fraction(1, 25)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


def coded(pixels: NDArray[Any], encoding: Encoding) -> "VideoFrame":
    """A frame (H, W, 3) of RGB in the pixel format, matrix and range of an encoding."""
    av = need_av()
    from av.video.reformatter import Interpolation

    frame = av.VideoFrame.from_ndarray(pixels, format="rgb48le" if pixels.dtype == np.uint16 else "rgb24")
    quality = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP
    made: VideoFrame = frame.reformat(
        format=encoding.pix_fmt,
        src_color_range=FULL,
        dst_colorspace={0: None, 6: 5, 10: 9}.get(encoding.colour.matrix, encoding.colour.matrix),
        dst_color_range=encoding.colour.range,
        interpolation=int(quality | Interpolation.FULL_CHR_H_INT | Interpolation.BITEXACT),
        threads=1,
    )
    return made


@dataclass
class Finished:
    """What was written: frames, and packets of other streams by their numbers in the file."""

    frames: int = 0
    packets: dict[int, int] = field(default_factory=dict)


def assemble(
    target: Path,
    segments: Sequence[Path],
    encoding: Encoding,
    times: Sequence[tuple[int, int]],
    source: Source,
    span: Span,
    scratch: Path | None = None,
    comment: str | None = None,
    on_frame: Callable[[], None] | None = None,
) -> Finished:
    """Write the clip: the frames of the segments with their times, and all else that the source holds.

    times: (pts, duration) of each frame in the source's time base. scratch: folder of the file while it is written.
    comment: for the metadata. on_frame: called after each.

    Raises:
        OutputError: it cannot be written.
    """
    av = need_av()
    done = Finished()
    options = {"movflags": "+faststart"} if encoding.container in ("mp4", "mov") else {}
    shift = 0 if span.is_whole else times[0][0]
    durations = {pts - shift: duration for pts, duration in times}
    with replacing_file(target, scratch) as part, writing(target), ExitStack() as stack:
        out = stack.enter_context(av.open(str(part), "w", format=encoding.container, container_options=options))
        out.flags |= av.container.Flags.bitexact.value
        video = _add_video(out, encoding)
        copies: Iterator[Packet[Any]] = iter(())
        if isinstance(source, Clip):
            given = stack.enter_context(opened(source.path))
            part_of_it = None if span.is_whole else (times[0][0] * source.time_base, sum(times[-1]) * source.time_base)
            copies = _copies(out, video, given, encoding, part_of_it)
        if comment is not None:
            key = next(
                (name for name in out.metadata if name.lower() == "comment"), "comment"
            )  # Matroska's are capitals
            out.metadata[key] = "\n".join(filter(None, [out.metadata.get(key), comment]))
        waiting = next(copies, None)
        frames = (frame for path in segments for frame in read_segment(path))
        for frame, (pts, duration) in zip(frames, times, strict=True):
            frame.pts, frame.time_base, frame.duration = pts - shift, encoding.time_base, duration
            while waiting is not None and _time(waiting) <= (pts - shift) * encoding.time_base:
                out.mux(_counted(waiting, done))
                waiting = next(copies, None)
            for packet in video.encode(frame):
                packet.duration = durations.get(packet.pts or 0, duration)
                out.mux(packet)
            done.frames += 1
            if on_frame is not None:
                on_frame()
        for packet in video.encode(None):
            packet.duration = durations.get(packet.pts or 0, times[-1][1])
            out.mux(packet)
        for packet in itertools.chain([] if waiting is None else [waiting], copies):
            out.mux(_counted(packet, done))
    return done


def read_segment(path: Path) -> "Iterator[VideoFrame]":
    """Frames as they were written. Raises ImageError if it is damaged."""
    with opened(path) as container:
        for frame in container.decode(container.streams.video[0]):
            frame.pict_type = 0  # the encoder's own choice
            yield frame


def _nearest_format(source: Source, names: list[str]) -> str:
    """Of the pixel formats an encoder takes, the one that keeps most of the source's."""
    shapes = {"444": ("444", "422", "420"), "422": ("422", "420", "444"), "420": ("420", "422", "444")}
    depths = (
        ("", "10le", "12le")
        if source.bits <= 8
        else ("10le", "12le", "")
        if source.bits <= 10
        else ("12le", "10le", "")
    )
    wanted = [f"yuv{shape}p{depth}" for depth in depths for shape in shapes[source.subsampling]]
    wanted += ["gbrp16le", "gbrp"] if source.bits > 8 else ["gbrp"]
    return next((name for name in wanted if name in names), names[0] if names else "yuv420p")


def _add_video(out: "OutputContainer", encoding: Encoding) -> "VideoStream":
    options = dict(_OPTIONS.get(encoding.codec, {}))
    if encoding.crf is not None:
        options["crf"] = str(encoding.crf)
    import torch  # here, so that help stays instant

    if encoding.codec == "libx264" and torch.backends.cpu.get_cpu_capability() == "AVX512":
        options["x264-params"] = X264_WITHOUT_AVX512
    video: VideoStream = out.add_stream(encoding.codec, rate=encoding.rate, options=options)  # type: ignore[assignment]
    context = video.codec_context
    context.thread_count = 1  # with more, x264 wrote another frame in one of 75 runs of a clip
    context.height, context.width, context.pix_fmt = encoding.height, encoding.width, encoding.pix_fmt
    context.time_base = video.time_base = encoding.time_base
    context.sample_aspect_ratio = encoding.sample_aspect
    context.color_range = encoding.colour.range
    context.colorspace = encoding.colour.matrix
    context.color_primaries = encoding.colour.primaries
    context.color_trc = encoding.colour.transfer
    if encoding.codec == "libx265" and encoding.container in ("mp4", "mov"):
        context.codec_tag = "hvc1"  # as the players of one maker want it
    return video


def _others(container: "InputContainer", video: "VideoStream") -> list["Stream"]:
    """The streams that are copied: all but video, and cover pictures."""
    from av.stream import Disposition

    return [
        stream
        for stream in container.streams
        if stream.index != video.index and (stream.type != "video" or stream.disposition & Disposition.attached_pic)
    ]


def _refused(encoding: Encoding, stream: "Stream") -> str | None:
    """Why a container does not take a stream beside the video; None if it does."""
    av = need_av()
    try:
        with av.open(io.BytesIO(), "w", format=encoding.container) as out:
            _add_video(out, encoding)
            _copy_stream(out, stream)
            out.start_encoding()
    except (ValueError, av.error.FFmpegError) as error:
        return what(error)
    return None


def _copy_stream(out: "OutputContainer", stream: "Stream") -> "Stream":
    copy = out.add_stream_from_template(stream, opaque=True)
    copy.time_base = stream.time_base
    copy.metadata.update(_told(stream.metadata))
    copy.disposition = stream.disposition
    return copy


def _told(metadata: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in metadata.items() if not key.lower().startswith(_UNTOLD)}


def _copies(
    out: "OutputContainer",
    video: "VideoStream",
    given: "InputContainer",
    encoding: Encoding,
    part: tuple[Fraction, Fraction] | None,
) -> "Iterator[Packet[Any]]":
    """The packets of all streams beside the video in the order of the file; its streams, chapters and metadata are set.

    part: of the clip, in seconds of the file's own clock; of it come those packets that begin in it, moved to its
    beginning. None is all of it.
    """
    original = video_stream(given, Path(given.name))
    streams = {
        stream.index: _copy_stream(out, stream)
        for stream in _others(given, original)
        if _refused(encoding, stream) is None
    }
    video.metadata.update(_told(original.metadata))
    video.disposition = original.disposition
    out.metadata.update(_told(given.metadata))
    chapters = given.chapters()
    out.set_chapters(chapters if part is None else [one for all_ in chapters for one in _chapter_of(all_, *part)])

    def packets() -> "Iterator[Packet[Any]]":
        if not streams:
            return
        for packet in given.demux([given.streams[index] for index in streams]):
            time = packet.dts if packet.pts is None else packet.pts
            if time is None:  # the end of a stream
                continue
            packet.pts, packet.dts = time, time if packet.dts is None else packet.dts
            if part is not None:
                if not part[0] <= time * packet.time_base < part[1]:
                    continue
                shift = round(part[0] / packet.time_base)
                packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
            packet.stream = streams[packet.stream_index]
            yield packet

    return packets()


def _time(packet: "Packet[Any]") -> Fraction:
    """When a packet is due, in seconds."""
    return (packet.dts or 0) * packet.time_base


def _counted(packet: "Packet[Any]", done: Finished) -> "Packet[Any]":
    done.packets[packet.stream_index] = done.packets.get(packet.stream_index, 0) + 1
    return packet


def _chapter_of(chapter: Any, start: Fraction, end: Fraction) -> Iterator[Any]:
    """A chapter cut to a part of the clip and moved to its beginning; nothing if it lies outside."""
    unit = chapter["time_base"]
    first, last = max(chapter["start"] * unit, start), min(chapter["end"] * unit, end)
    if first < last:
        yield {**chapter, "start": round((first - start) / unit), "end": round((last - start) / unit)}
