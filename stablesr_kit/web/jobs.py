"""What is handed in to a server: jobs, which are folders, and the files in them, taken in with distrust.

ID/job.json     what was asked for, and how it ended
ID/in/0000      the pictures, or a clip, under names of our own
ID/out/0000.png the results, with the journal of `stablesr restore`; that of a clip is named 0000.mp4, for instance
"""

import json
import tempfile
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple
from urllib.parse import unquote, urlsplit

from PIL import Image

from stablesr_kit.cli.messages import one_line
from stablesr_kit.errors import ImageError, JobError, StableSRKitError
from stablesr_kit.imaging.finding import READ_FORMATS, START, format_of
from stablesr_kit.imaging.reading import MAX_PIXELS, open_picture
from stablesr_kit.video.clip import Clip, Span, opened, video_stream
from stablesr_kit.video.writing import FORMATS

State = Literal["queued", "running", "done", "failed", "cancelled"]
Command = Literal["restore", "faces"]
ENDED: tuple[State, ...] = ("done", "failed", "cancelled")

COPIED_BYTES = 2**20
FETCHED_WITHIN_S, FETCHED_GAP_S = 60.0, 10.0
"""How long an address may take to send a file, and how long it may pause."""
CLIP_START = 400
"""Number of first bytes that show whether a file is a clip."""
CLIP_STARTS = (
    b"\x1aE\xdf\xa3",  # Matroska, WebM
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11",  # ASF
    b"FLV",
    b"OggS",
    b"YUV4MPEG2",
    b"nut/multimedia",
    b"\x06\x0e\x2b\x34",  # MXF
    b"\0\0\x01\xba",  # MPEG
    b"\0\0\x01\xb3",
)


class Refused(StableSRKitError):
    """What is asked for is not accepted. status: of HTTP."""

    def __init__(self, message: str, status: int = 422) -> None:
        super().__init__(message)
        self.status = status


class QueueFull(Refused):
    """There is no room now. retry_after_s: when there may be."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message, 429)
        self.retry_after_s = retry_after_s


class Upload(NamedTuple):
    """A file as it came in: the name somebody gave it, for eyes alone, and its content."""

    name: str
    content: IO[bytes]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server takes.

    queue: jobs that wait at most, of which one user has at most three quarters.
    upload_bytes: of one file, packed or unpacked, and four times as much of one job.
    pictures: of one job.
    pixels: of one picture or frame, and result_pixels: of its result.
    clip_pixels: of all frames of a clip's result.
    origins: such as http://127.0.0.1:8000, of the addresses that are opened; those of others are refused.
    keep_s, keep_bytes: after which age ended jobs go, and when all take more, the oldest of them first.
    """

    queue: int = 32
    upload_bytes: int = 200 * 2**20
    pictures: int = 500
    pixels: int = MAX_PIXELS
    result_pixels: int = 4 * MAX_PIXELS
    clip_pixels: int = 50 * 10**9
    origins: tuple[str, ...] = ()
    keep_s: float = 24 * 3600.0
    keep_bytes: int = 10 * 10**9


@dataclass(kw_only=True, eq=False)
class Job:
    """One or more pictures that somebody handed in together, or a clip.

    names: of the pictures, as they came. clip: how the name of a clip's result ends, such as ".mp4"; empty for
    pictures. errors: a line for each picture that failed, by its place. notes: lines of what was done, such as for each
    face. options: of the command. number: later ones are larger.
    """

    id: str
    number: int
    user: str
    command: Command
    options: Mapping[str, Any]
    names: list[str]
    folder: Path
    accepted: float
    clip: str = ""
    state: State = "queued"
    ended: float | None = None
    errors: dict[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    done: int = 0
    progress: float = 0.0
    doing: str = ""
    eta_s: float | None = None
    preview: Image.Image | None = None
    version: int = 0
    is_cancelled: bool = False
    is_kept: bool = False

    def source(self, index: int) -> Path:
        """Where a picture is."""
        return self.folder / "in" / f"{index:04d}"

    def target(self, index: int) -> Path:
        """Where its result goes."""
        return self.folder / "out" / f"{index:04d}{self.clip or '.png'}"

    @property
    def results(self) -> list[int]:
        """The places of the pictures whose results are there."""
        return [index for index in range(len(self.names)) if self.target(index).is_file()]

    def saved(self) -> dict[str, Any]:
        """What `job.json` holds."""
        values = {
            name: getattr(self, name) for name in ("id", "number", "user", "command", "names", "accepted", "clip")
        }
        return values | {
            "options": dict(self.options),
            "state": self.state if self.state in ENDED else "queued",
            "ended": self.ended,
            "errors": {str(index): line for index, line in self.errors.items()},
        }

    @classmethod
    def load(cls, folder: Path) -> "Job":
        """The job of a folder. Raises JobError."""
        try:
            saved = json.loads((folder / "job.json").read_bytes())
            errors = {int(index): line for index, line in saved.pop("errors").items()}
            job = cls(**saved, folder=folder, errors=errors)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise JobError(f"{folder}: the job cannot be read ({one_line(error)}); remove the folder") from error
        job.done = len(job.names) if job.state in ENDED else 0
        job.progress = 1.0 if job.state == "done" else 0.0
        return job


def take_in(folder: Path, uploads: Sequence[Upload], scale: float, limits: Limits) -> tuple[list[str], dict[int, str]]:
    """Copies pictures into a folder: their names, and a line for each that cannot be one. Raises Refused."""
    names: list[str] = []
    errors: dict[int, str] = {}
    room = 4 * limits.upload_bytes
    for upload in _unpacked(uploads, limits):
        if len(names) == limits.pictures:
            raise Refused(f"more than {limits.pictures} pictures are given; send several jobs", 413)
        path = folder / f"{len(names):04d}"
        names.append(shown_name(upload.name))
        try:
            room -= copy(upload, path, limits)
            if room < 0:
                raise Refused(f"more than {4 * limits.upload_bytes >> 20} MB are given; send less", 413)
            check_picture(path, names[-1], scale, limits)
        except Refused as error:
            room -= limits.upload_bytes if path.stat().st_size > limits.upload_bytes else 0  # a bomb costs as well
            if room < 0 or (len(uploads) == 1 and not _is_zip(uploads[0].content)):
                raise
            path.unlink(missing_ok=True)
            errors[len(names) - 1] = str(error)
    if not names:
        raise Refused("no picture is given; send a file")
    if len(errors) == len(names):
        raise Refused(one_line(f"{names[0]}: {errors[0]}"))
    return names, errors


def origin_of(address: str) -> str | None:
    """Scheme, host and port of an address of the web, as `Limits.origins` has them; None for any other."""
    try:
        parts = urlsplit(address)
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    except (ValueError, KeyError):
        return None
    return f"{parts.scheme}://{parts.hostname}:{port}" if parts.hostname and parts.username is None else None


def fetched(address: str, limits: Limits) -> Upload:
    """The file at an address that may be opened. No redirect is followed, and no proxy is used. Raises Refused."""
    import httpx

    if not limits.origins:
        raise Refused("this server opens no addresses; send the file (stablesr web --allow-url opens some)", 403)
    if origin_of(address) not in limits.origins:
        raise Refused(f"that address is not opened here; give one of {', '.join(limits.origins)}", 403)
    content = tempfile.SpooledTemporaryFile(max_size=COPIED_BYTES)
    end = time.monotonic() + FETCHED_WITHIN_S
    try:
        with (
            httpx.Client(trust_env=False, timeout=FETCHED_GAP_S) as client,
            client.stream("GET", address, headers={"accept-encoding": "identity"}) as answer,
        ):
            if answer.status_code != 200:
                more = "; redirects are not followed, give where it leads to" if answer.is_redirect else ""
                raise Refused(f"the address answers {answer.status_code}{more}")
            if answer.headers.get("content-encoding", "identity") != "identity":
                raise Refused("the address sends packed content, which is not unpacked; give the file itself")
            for block in answer.iter_raw(COPIED_BYTES):
                content.write(block)
                if content.tell() > limits.upload_bytes:
                    raise Refused(f"the file has more than {limits.upload_bytes >> 20} MB; scale it first", 413)
                if time.monotonic() > end:
                    raise Refused(f"the address did not send all within {FETCHED_WITHIN_S:.0f} s; send the file", 408)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        content.close()
        raise Refused(f"the address cannot be opened ({one_line(error) or type(error).__name__})") from error
    except Refused:
        content.close()
        raise
    content.seek(0)
    return Upload(unquote(urlsplit(address).path), content)


def copy(upload: Upload, path: Path, limits: Limits) -> int:
    """Bytes copied. Raises Refused if they are too many."""
    copied = 0
    try:
        with path.open("xb") as file:
            while block := upload.content.read(COPIED_BYTES):
                copied += len(block)
                file.write(block)
                if copied > limits.upload_bytes:
                    raise Refused(f"the file has more than {limits.upload_bytes >> 20} MB; scale it first", 413)
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, NotImplementedError) as error:
        raise Refused(f"the archive is damaged or encrypted ({one_line(error)})") from error
    return copied


def check_picture(path: Path, name: str, scale: float, limits: Limits) -> None:
    """Refuse what is no picture, or too large, before it is decoded."""
    with path.open("rb") as file:
        start = file.read(START)
    if format_of(start) is None:
        if is_clip(start):
            raise Refused("a clip is given among pictures; send it alone, to the command restore", 415)
        given = "an empty file" if not start else "the file is no picture of a known format"
        raise Refused(f"{given}; expected {', '.join(READ_FORMATS)}", 415)
    try:
        picture = open_picture(path, max_pixels=limits.pixels)
    except ImageError as error:
        raise Refused(one_line(error).replace(str(path), name)) from error
    check_result(picture.height * picture.width * scale * scale, limits)


def is_clip(start: bytes) -> bool:
    """Whether a file with these first bytes (`CLIP_START` of them) is a clip."""
    if format_of(start[:START]) is not None:
        return False
    is_mov = start[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
    is_avi = start[:4] == b"RIFF" and start[8:12] == b"AVI "
    is_stream = any(start[first::step][:2] == b"GG" for first, step in ((0, 188), (4, 192)))
    return is_mov or is_avi or is_stream or start.startswith(CLIP_STARTS)


class ClipSize(NamedTuple):
    """Of a clip, as its file announces it; frames of what is asked for."""

    height: int
    width: int
    frames: int


def size_of_clip(path: Path, span: Span) -> ClipSize:
    """What a clip announces; nothing is decoded. Raises StableSRKitError."""
    with opened(path) as container:
        stream = video_stream(container, path)
        unit = stream.time_base or 1
        counts: Counter[bool] = Counter()
        for packet in container.demux(stream):
            at = None if packet.pts is None else (packet.pts - (stream.start_time or 0)) * unit
            is_asked_for = at is None or (at >= (span.start or 0) and (span.end is None or at < span.end))
            counts[is_asked_for and packet.size > 0] += 1
        return ClipSize(stream.height, stream.width, min(counts[True], span.count or counts[True]))


def check_clip(path: Path, name: str, span: Span, scale: float, limits: Limits) -> None:
    """Refuse what is no clip, or too large, before it is decoded; then one whose first frame cannot be restored."""
    try:
        size = size_of_clip(path, span)
        pixels = size.height * size.width
        if not 0 < pixels <= limits.pixels:
            most = f"{limits.pixels / 1e6:,.0f} million pixels"
            raise Refused(f"frames of {size.width}x{size.height} are given, expected up to {most}; scale them first")
        check_result(pixels * scale * scale, limits)
        if size.frames * pixels * scale * scale > limits.clip_pixels:
            given = f"{size.frames} frames of {round(size.width * scale)}x{round(size.height * scale)}"
            most = f"{limits.clip_pixels / 1e9:,.3g} billion pixels in all"
            raise Refused(f"the result would have {given}, {most} are the most; cut it, or give a smaller scale")
        Clip(path, span)
    except Refused:
        raise
    except StableSRKitError as error:
        raise Refused(one_line(error).replace(str(path), name)) from error


def ending_for(start: bytes, container: str | None) -> str:
    """How the name of a clip's result ends: as is asked for, else as that of the clip if its like is written."""
    if container is not None:
        return f".{container.removeprefix('.')}"
    if start[4:8] == b"ftyp":
        return ".mov" if start[8:10] == b"qt" else ".mp4"
    return ".webm" if start.startswith(CLIP_STARTS[0]) and b"webm" in start else ".mkv"


def check_container(container: Any) -> None:
    """Refuse what is no kind of file that clips are written to."""
    if not isinstance(container, str) or f".{container.removeprefix('.')}" not in FORMATS:
        raise Refused(one_line(f"option container: {container!r:.80} is given; give {', '.join(FORMATS)}"))


def check_result(pixels: float, limits: Limits) -> None:
    """Refuse results that are too large."""
    if pixels > limits.result_pixels:
        most = limits.result_pixels / 1e6
        raise Refused(
            f"the result would have {pixels / 1e6:,.0f} million pixels, {most:,.0f} at most; give a smaller scale"
        )


def _is_zip(content: IO[bytes]) -> bool:
    start = content.read(4)
    content.seek(0)
    return start == b"PK\x03\x04"


def _unpacked(uploads: Iterable[Upload], limits: Limits) -> Iterator[Upload]:
    """The files, and the pictures of archives in their place. Raises Refused."""
    for upload in uploads:
        if not _is_zip(upload.content):
            yield upload
            continue
        try:
            with zipfile.ZipFile(upload.content) as archive:
                entries = [entry for entry in archive.infolist() if not entry.is_dir()]
                if len(entries) > limits.pictures:
                    raise Refused(f"the archive holds {len(entries)} files, {limits.pictures} at most; send less", 413)
                for entry in entries:
                    with archive.open(entry) as content:
                        yield Upload(entry.filename, content)
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError, ValueError, EOFError) as error:
            raise Refused(f"the archive is damaged or encrypted ({one_line(error)})") from error


def shown_name(name: str) -> str:
    """A name as people may see it: the last part, without what no file is called."""
    plain = one_line(name.replace("\\", "/").rstrip("/").rpartition("/")[2])
    return plain[-100:] or "picture"


def names_in_zip(names: list[str]) -> list[str]:
    """A name for each result, each once."""
    chosen: list[str] = []
    taken: set[str] = set()
    for name in names:
        stem = Path(name).stem.strip(". ") or "picture"
        candidates = (f"{stem}.png", *(f"{stem}_{number}.png" for number in range(2, len(names) + 2)))
        chosen.append(next(one for one in candidates if one.casefold() not in taken))
        taken.add(chosen[-1].casefold())
    return chosen
