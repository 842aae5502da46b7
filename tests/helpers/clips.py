"""Clips of a few pixels, made here: a pattern that moves, and what else a file may hold."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

UNEVEN = (0, 40, 80, 125, 160, 240, 275, 320, 380, 400)
"""Times of frames in milliseconds: no constant rate."""


def moving(count: int, height: int = 16, width: int = 24, is_grey: bool = False) -> list[np.ndarray]:
    """Frames (H, W, 3), uint8: a smooth pattern that moves a pixel to the right per frame."""
    y, x = np.mgrid[:height, :width]
    frames = []
    for i in range(count):
        red = 128 + 90 * np.sin((x - i) / 3)
        green = 128 + 90 * np.cos(y / 2 + (x - i) / 5)
        blue = np.full_like(red, 90)
        frames.append(np.stack([red] * 3 if is_grey else [red, green, blue], -1).round().astype(np.uint8))
    return frames


def write_clip(
    path: Path,
    frames: Sequence[np.ndarray],
    times: Sequence[int] | None = None,
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    time_base: Fraction = Fraction(1, 1000),
    audio_seconds: float = 0,
    subtitles: Sequence[tuple[int, int, str]] = (),
    attachment: bytes | None = None,
    chapters: bool = False,
    turned: int = 0,
    options: dict[str, str] | None = None,
    **context: Any,
) -> Path:
    """A file with these frames at these times; audio is AAC of a tone, subtitles are SubRip (start ms, ms, text).

    context: attributes of the encoder, such as color_trc or sample_aspect_ratio.
    """
    times = times or [round(i / 25 / time_base) for i in range(len(frames))]
    with av.open(str(path), "w") as out:
        defaults = {"crf": "10"} if codec.startswith("libx26") else {}
        video = out.add_stream(codec, rate=25, options=defaults | (options or {}))
        video.height, video.width, video.pix_fmt = *frames[0].shape[:2], pix_fmt
        video.codec_context.time_base = video.time_base = time_base
        for name, value in context.items():
            setattr(video.codec_context, name, value)
        if turned:
            video.set_display_rotation(turned)
        sound = out.add_stream("aac", rate=16000) if audio_seconds else None
        spoken = out.add_mux_stream("subrip") if subtitles else None
        if spoken is not None:
            spoken.time_base = Fraction(1, 1000)
            spoken.metadata["language"] = "eng"
        if attachment is not None:
            out.add_attachment("font.ttf", "application/x-truetype-font", attachment)
        if chapters:
            half = times[len(times) // 2]
            out.set_chapters(
                [
                    {"id": 1, "start": 0, "end": half, "time_base": time_base, "metadata": {"title": "one"}},
                    {"id": 2, "start": half, "end": times[-1], "time_base": time_base, "metadata": {"title": "two"}},
                ]
            )
        out.metadata["title"] = "a clip"
        for pixels, time in zip(frames, times, strict=True):
            depth = "rgb48le" if pixels.dtype == np.uint16 else "rgb24"
            frame = av.VideoFrame.from_ndarray(pixels, format=depth).reformat(
                format=pix_fmt,
                dst_color_range=context.get("color_range", 1),
                dst_colorspace=context.get("colorspace", 5),
                threads=1,  # several spoil some values of 16 bits
            )
            frame.pts, frame.time_base = time, time_base
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        if sound is not None:
            samples = (np.sin(np.arange(int(16000 * audio_seconds)) / 9) * 8000).astype(np.int16)[None]
            for first in range(0, samples.shape[1], 1024):
                block = av.AudioFrame.from_ndarray(samples[:, first : first + 1024], format="s16", layout="mono")
                block.sample_rate, block.pts, block.time_base = 16000, first, Fraction(1, 16000)
                out.mux(sound.encode(block))
            out.mux(sound.encode(None))
        if spoken is not None:
            for start, length, text in subtitles:
                packet = av.Packet(text.encode())
                packet.pts = packet.dts = start
                packet.duration, packet.time_base, packet.stream = length, Fraction(1, 1000), spoken
                out.mux(packet)
    return path


def packets_of(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    """All packets but those of video, by kind of stream: time, duration in seconds, content."""
    found: dict[str, list[tuple[Any, ...]]] = {}
    with av.open(str(path)) as container:
        for packet in container.demux():
            if packet.stream.type != "video" and packet.pts is not None:
                unit = packet.time_base
                found.setdefault(packet.stream.type, []).append(
                    (packet.pts * unit, packet.duration * unit, bytes(packet))
                )
    return found


def times_of(path: Path) -> list[Fraction]:
    """Of all frames, in seconds."""
    with av.open(str(path)) as container:
        return [Fraction(frame.pts or 0) * (frame.time_base or 1) for frame in container.decode(video=0)]
