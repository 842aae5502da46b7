"""`stablesr restore` of a clip: frames in, segments on the way, one file at the end; killed anywhere, it goes on.

The folder of a job in progress holds, beside what pictures have: `clip.jsonl` with a line for each finished chunk, its
frames as a lossless segment (or PNG files), and after which chunk what state. A chunk counts when its line is there.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from tqdm import tqdm

from stablesr_kit.cli.jobs import Job, Told, make_folder, naming
from stablesr_kit.cli.journal import Journal, refuse_other_settings
from stablesr_kit.cli.messages import one_line, usage_error
from stablesr_kit.cli.restorer import LESS_MEMORY, Restorer, Restoring, Watch, plan_for
from stablesr_kit.errors import ImageError, JobError, OutputError
from stablesr_kit.imaging.finding import SUFFIXES as PICTURE_SUFFIXES
from stablesr_kit.imaging.metadata import Metadata, read_provenance
from stablesr_kit.imaging.reading import Picture, Pixels
from stablesr_kit.imaging.writing import write_bands
from stablesr_kit.storage import publish, sha256, writing
from stablesr_kit.video.clip import SUFFIXES, Clip, FrameFolder, Source, Span, Survey, opened, surveyed
from stablesr_kit.video.writing import (
    FORMATS,
    Encoding,
    assemble,
    choose_encoding,
    even_sides,
    is_rounding,
    left_out,
    write_segment,
)

if TYPE_CHECKING:
    from stablesr_kit.pipelines.video import Chunk, ClipState

TIMES = "timestamps.txt"
"""Beside PNG files: when each frame is shown, as mkvmerge and others read it."""
_OF_CLIPS = ("steady", "flow", "chunk", "codec", "crf", "pix_fmt", "on_damage", "deinterlace", "fps")


def is_clip(inputs: Sequence[Path], output: Path, asked: Mapping[str, Any]) -> bool:
    """Whether `restore` is given a clip, or a folder of frames: with --fps, or where a clip is to be made of them.

    Ends the command if there are several clips, or other inputs beside one, or options that are for pictures.
    """
    clips = [path for path in inputs if path.suffix.lower() in SUFFIXES and not path.is_dir()]
    is_sequence = len(inputs) == 1 and inputs[0].is_dir()
    is_sequence &= output.suffix.lower() in FORMATS or asked["fps"] is not None
    if clips and len(inputs) > 1:
        usage_error(f"{clips[0]} is a clip; give one clip alone, and pictures in another call")
    if not clips and not is_sequence:
        return False
    for option, plain in (("compare", False), ("engine", "here")):
        if asked[option] != plain:
            usage_error(f"--{option} is for pictures, and {inputs[0]} is a clip; leave it out")
    return True


def clip_settings(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What of a clip's options decides what the result is; ends the command if one cannot work."""
    for name in ("crf", "chunk", "fps", "frames"):
        value = asked[name]
        if value is not None and value < (0 if name == "crf" else 1e-3 if name == "fps" else 1):
            usage_error(f"--{name} {value:g} is too small; give {'0' if name == 'crf' else '1'} or more")
    span = span_of(asked)
    settings = {name: asked[name] for name in _OF_CLIPS}
    if asked["flow"] != "dis":
        path = Path(asked["flow"])
        if not path.is_file():
            usage_error(f"--flow {asked['flow']} is no file; give dis, or a file with the weights of RAFT")
        settings["flow"] = sha256(path)
    times = {"from": span.start, "to": span.end, "frames": span.count}
    return settings | {name: None if value is None else str(value) for name, value in times.items()}


def span_of(asked: Mapping[str, Any]) -> Span:
    """What of the clip is asked for; ends the command if it is nothing."""
    start, end = (None if asked[name] is None else seconds(name, asked[name]) for name in ("from_time", "to_time"))
    if end is not None and end <= (start or 0):
        usage_error(f"--to {asked['to_time']} is not after --from {asked['from_time'] or 0}; give a later time")
    return Span(start=start, end=end, count=asked["frames"])


def seconds(name: str, text: str) -> Fraction:
    """A time such as 12.5, 1:30 or 1:02:03.5, in seconds; ends the command if it is none."""
    parts = text.split(":")
    try:
        values = [Fraction(part) for part in parts]
    except (ValueError, ZeroDivisionError):
        values = []
    if not 1 <= len(values) <= 3 or any(value < 0 for value in values) or any("/" in part for part in parts):
        usage_error(f"--{name.removesuffix('_time')} {text!r} is no time; give seconds such as 12.5, or 1:02:03")
    return sum((value * 60**i for i, value in enumerate(reversed(values))), start=Fraction(0))


class Target(Protocol):
    """Where the frames of a clip go, chunk by chunk."""

    @property
    def height(self) -> int:
        """Of its frames, in pixels."""

    @property
    def width(self) -> int:
        """Likewise."""

    @property
    def dtype(self) -> type[np.unsignedinteger[Any]]:
        """Of its frames; white is its largest number."""

    def write(self, number: int, first: int, frames: Sequence[Pixels]) -> list[Path]:
        """Write a chunk, of which `first` is the first frame, into the job's folder. Raises OutputError."""

    def finish(self, chunks: Sequence[Sequence[Path]], done: Callable[[], Any]) -> dict[str, Any]:
        """Make the result of all chunks; says what else is in it. Raises OutputError."""


@dataclass
class ClipTarget:
    """One file."""

    path: Path
    source: Source
    survey: Survey
    span: Span
    encoding: Encoding
    folder: Path
    comment: str | None

    @property
    def height(self) -> int:
        return self.encoding.height

    @property
    def width(self) -> int:
        return self.encoding.width

    @property
    def dtype(self) -> type[np.unsignedinteger[Any]]:
        return np.uint16 if self.encoding.is_deep else np.uint8

    def write(self, number: int, first: int, frames: Sequence[Pixels]) -> list[Path]:  # noqa: ARG002, of one segment
        path = self.folder / f"{number:06}.nut"
        write_segment(path, frames, self.encoding)
        return [path]

    def finish(self, chunks: Sequence[Sequence[Path]], done: Callable[[], Any]) -> dict[str, Any]:
        segments = [path for chunk in chunks for path in chunk]
        times = self.survey.times
        made = assemble(
            self.path, segments, self.encoding, times, self.source, self.span, self.folder, self.comment, done
        )
        return {"codec": self.encoding.codec, "pix_fmt": self.encoding.pix_fmt, "copied_packets": made.packets}


@dataclass
class FolderTarget:
    """PNG files, numbered from 1, and their times."""

    path: Path
    height: int
    width: int
    dtype: type[np.unsignedinteger[Any]]
    source: Source
    survey: Survey
    folder: Path
    provenance: dict[str, Any] | None

    def write(self, number: int, first: int, frames: Sequence[Pixels]) -> list[Path]:  # noqa: ARG002, told by frames
        paths = []
        (self.folder / "frames").mkdir(exist_ok=True)
        for at, pixels in enumerate(frames, first + 1):
            paths.append(self.folder / "frames" / f"{at:08}.png")
            picture = Picture(
                height=self.height,
                width=self.width,
                dtype=np.dtype(self.dtype),
                has_alpha=False,
                is_grey=self.survey.is_grey,
                metadata=Metadata(),
                decode=lambda _: iter(()),
            )
            write_bands(paths[-1], iter([pixels]), self.height, self.width, picture, self.folder, self.provenance)
        return paths

    def finish(self, chunks: Sequence[Sequence[Path]], done: Callable[[], Any]) -> dict[str, Any]:
        frames = self.folder / "frames"
        shown = [(pts - self.survey.times[0][0]) * self.source.time_base * 1000 for pts, _ in self.survey.times]
        with writing(frames):
            wanted = {path.name for chunk in chunks for path in chunk}
            for path in frames.iterdir():
                if path.name not in wanted:
                    path.unlink()
            lines = ["# timestamp format v2", *(f"{float(time):.6f}" for time in shown)]
            (frames / TIMES).write_text("\n".join(lines) + "\n")
        publish(frames, self.path)
        for _ in shown:
            done()
        return {}


@dataclass
class Progress:
    """The finished chunks of a job, and the state after the last one.

    records: of each, what its line says.
    """

    folder: Path
    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def journal(self) -> Path:
        return self.folder / "clip.jsonl"

    @property
    def chunks(self) -> list[list[Path]]:
        return [[self.folder / name for name in record["files"]] for record in self.records]

    @property
    def frames(self) -> int:
        return sum(record["frames"] for record in self.records)

    def load(self) -> "ClipState | None":
        """Read what an earlier run left; None if it finished no chunk. Raises JobError if that is damaged."""
        from stablesr_kit.pipelines.video import ClipState

        if not self.journal.exists():
            return None
        for line in self.journal.read_bytes().splitlines():
            with suppress(ValueError):  # one that was cut off while it was written
                self.records.append(json.loads(line))
        for record in self.records:
            for name, digest in record["files"].items():
                if not (self.folder / name).is_file() or sha256(self.folder / name) != digest:
                    raise JobError(f"{self.folder / name}: is not as it was written; start again without --resume")
        return ClipState.load(self._state(len(self.records) - 1)) if self.records else None

    def add(self, files: Sequence[Path], chunk: "Chunk", seconds: float) -> None:
        """Record a chunk whose files are written. Raises OutputError."""
        number = len(self.records)
        chunk.state.save(self._state(number))
        errors = [frame.warping_error for frame in chunk.frames if frame.warping_error is not None]
        first = chunk.state.frames - len(chunk.frames)
        record = {
            "frames": len(chunk.frames),
            "cuts": [first + i for i, frame in enumerate(chunk.frames) if frame.is_cut],
            "warping_error": float(np.mean(errors)) if errors else None,
            "seconds": seconds,
            "files": {str(path.relative_to(self.folder)): sha256(path) for path in files},
        }
        with writing(self.journal), self.journal.open("ab+") as file:
            is_torn = file.tell() > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read() != b"\n"
            file.write(b"\n" * is_torn + json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.records.append(record)
        self._state(number - 1).unlink(missing_ok=True)

    def _state(self, number: int) -> Path:
        return self.folder / f"{number:06}.state"


def restore_clip(
    source: Path,
    output: Path,
    asked: Mapping[str, Any],
    restoring: Restoring,
    load: Callable[[Restoring], Restorer],
    watch: Watch,
) -> Told | None:
    """Restore a clip, or a folder of frames, into a file or a folder of PNG files; None if the result is there.

    restoring: with the clip's own settings. load: the model, once that is needed. Raises StableSRKitError, beginning
    with a file.
    """
    span = span_of(asked)
    clip: Source
    if source.is_dir():
        if asked["fps"] is None:
            usage_error(f"{source} is a folder of frames; give --fps, such as --fps 25")
        clip = FrameFolder(source, Fraction(asked["fps"]).limit_denominator(100_000), span)
    else:
        clip = Clip(source, span, asked["on_damage"], asked["deinterlace"])
    journal = Journal(restoring.folder, restoring.settings)
    journal.remove_stale_locks()
    job = Job(source=source, target=output, companion=None, folder=restoring.folder)
    if restoring.resume and is_finished(journal, source, output):
        return None
    with bar(job, None, "reading", watch) as shown:
        survey = surveyed(clip, shown.update)
    size = result_size_of(clip, asked["scale"], output, asked["pix_fmt"])
    encoding = encoding_for(job, clip, survey, size, asked)
    for note in survey.notes:
        tqdm.write(f"note: {one_line(source)}: {note}", file=sys.stderr)
    with journal.in_progress(source, output, restoring.resume) as folder:
        made_by: dict[str, Any] | None = None
        if restoring.has_provenance:
            said = {"software": "stablesr-kit", "model": Path(restoring.model).name}
            made_by = said | journal.provenance(source)
        target: Target
        if encoding is None:
            dtype = np.uint16 if clip.bits > 8 else np.uint8
            target = FolderTarget(output, *size, dtype, clip, survey, folder, made_by)
        else:
            comment = None if made_by is None else json.dumps(made_by)
            target = ClipTarget(output, clip, survey, span, encoding, folder, comment)
        progress = Progress(folder)
        state = progress.load()
        with naming(job, less=f"{LESS_MEMORY}, or a smaller --chunk"):
            if progress.frames < len(survey.times):
                restore_frames(job, clip, survey, target, progress, state, asked, load(restoring), watch)
            with bar(job, len(survey.times), "writing", watch) as shown:
                made = target.finish(progress.chunks, shown.update)
        journal.finish(source, [output]) if output.is_file() else None
    journal.close()
    return told(clip, survey, progress, made)


def restore_frames(
    job: Job,
    clip: Source,
    survey: Survey,
    target: Target,
    progress: Progress,
    state: "ClipState | None",
    asked: Mapping[str, Any],
    restorer: Restorer,
    watch: Watch,
) -> None:
    """The frames that are not restored yet, chunk by chunk."""
    restoring = restorer.restoring
    from stablesr_kit.pipelines.tracked_faces import TrackedFaces
    from stablesr_kit.pipelines.video import LADDER, StableSRVideo
    from stablesr_kit.video.motion import dis_flow, raft_flow

    restorer.pipeline.set_progress_bar_config(disable=True)
    flow = dis_flow() if asked["flow"] == "dis" else raft_flow(Path(asked["flow"]), restoring.device)
    video = StableSRVideo(restorer.pipeline, LADDER[asked["steady"]], flow, asked["chunk"])
    options = {name: value for name, value in restoring.options.items() if name != "scale"}
    steps = options.get("num_inference_steps") or restorer.pipeline.default_steps
    if video.steadiness.latents > 0 and not video.steadiness.steps(steps):
        note = f"--steady {asked['steady']} mixes latents between steps, and there is one step: none are mixed"
        tqdm.write(f"note: {one_line(job.source)}: {note}", file=sys.stderr)
    size = restoring.tiling.working_size(
        (clip.height, clip.width), (target.height, target.width), restorer.pipeline.config.working_scale
    )
    planned = {**options, "batch_size": asked["chunk"]}
    saved = progress.folder / "plan.json"
    plan = plan_for(restorer.pipeline, *size, restoring.tiling, planned, saved)
    chunks = video.chunks(
        (frame.pixels for frame in clip.frames(skip=progress.frames)),
        seed=restoring.seed % 2**64,
        state=state,
        is_grey=survey.is_grey,
        post_stages=[TrackedFaces(stage.restorer, stage.w) for stage in restorer.stages],
        tiling=restoring.tiling,
        plan=plan,
        on_plan=lambda smaller: smaller.save(saved),
        team=restorer.team,
        progress=watch.progress,
        height=target.height,
        width=target.width,
        **options,
    )
    begun, total, before = time.monotonic(), len(survey.times), len(progress.records)
    with bar(job, total, "restoring", watch, progress.frames) as shown:
        for number, chunk in enumerate(chunks, before):
            first = chunk.state.frames - len(chunk.frames)
            files = target.write(number, first, [levels(frame.image, target.dtype) for frame in chunk.frames])
            taken = time.monotonic() - begun
            progress.add(files, chunk, taken)
            begun += taken
            if watch.on_frame is not None:
                watch.on_frame(levels(chunk.frames[-1].image, np.uint8))
            shown.update(len(chunk.frames))
            left = total - progress.frames
            if watch.progress is None and shown.disable and left and number == before:
                rate = taken / len(chunk.frames)
                estimate = tqdm.format_interval(rate * left)
                tqdm.write(
                    f"note: {one_line(job.source)}: {left} frames left, {rate:.1f} s each: {estimate}", sys.stderr
                )


def encoding_for(
    job: Job, clip: Source, survey: Survey, size: tuple[int, int], asked: Mapping[str, Any]
) -> Encoding | None:
    """How the file is written, None for PNG files; the survey is told of what changes. Raises OutputError, ConfigError.

    What the file cannot hold is refused here, before anything is computed.
    """
    if job.target.suffix.lower() not in SUFFIXES:
        return None
    encoding = choose_encoding(job.target, clip, *size, asked["codec"], asked["crf"], asked["pix_fmt"])
    lost = left_out(clip, encoding)
    if lost and not asked["leave_out"]:
        other = "give -o NAME.mkv" if encoding.container != "matroska" else "take another --codec"
        raise OutputError(
            f"{job.target}: cannot hold {', '.join(lost)} of {job.source}; {other}, or --leave-out to go on without"
        )
    if lost:
        survey.notes.append(f"{job.target.suffix} cannot hold and leaves out: {', '.join(lost)}")
    if is_rounding(encoding, survey.times):
        survey.notes.append(f"{job.target.suffix} counts milliseconds, to which times of frames are rounded")
    if size != (max(round(clip.height * asked["scale"]), 1), max(round(clip.width * asked["scale"]), 1)):
        survey.notes.append(f"its result is of {size[1]}x{size[0]} pixels: sides are even in {encoding.pix_fmt}")
    return encoding


def result_size_of(clip: Source, scale: float, output: Path, pix_fmt: str | None) -> tuple[int, int]:
    """Height and width of the result: the nearest even ones where chroma is subsampled."""
    exact = clip.height * scale, clip.width * scale
    is_subsampled = output.suffix.lower() in FORMATS and ("42" in pix_fmt if pix_fmt else clip.subsampling != "444")
    if is_subsampled:
        return even_sides(*(max(round(side), 1) if side % 1 == 0 else side for side in exact))
    return max(round(exact[0]), 1), max(round(exact[1]), 1)


def is_finished(journal: Journal, source: Path, output: Path) -> bool:
    """Whether the result is there, made of the source as it is now. Raises JobError if with other settings."""
    if output.is_dir():
        made = read_provenance(next(iter(sorted(output.glob("*.png"))), output / "none"))
    else:
        made = comment_in(output) if output.is_file() else None
    if made is None or made.get("source") != sha256(source):
        return False
    try:
        refuse_other_settings(output, {name: made.get(name) for name in journal.settings}, journal.settings)
    except JobError as error:
        usage_error(str(error))
    return True


def comment_in(clip: Path) -> dict[str, Any] | None:
    """How a clip was made, as its comment says; None if it does not."""
    try:
        with opened(clip) as container:
            comment = next((text for key, text in container.metadata.items() if key.lower() == "comment"), "")
    except ImageError:
        return None
    for line in reversed(comment.splitlines()):
        with suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict) and "source" in found:
                return found
    return None


def levels(image: Any, dtype: type[np.unsignedinteger[Any]]) -> Pixels:
    """RGB (H, W, 3) of a restored frame (3, H, W)."""
    from stablesr_kit.imaging.canvas import View
    from stablesr_kit.pipelines.pictures import pixel_bands

    return np.concatenate(list(pixel_bands(View(image[None]), dtype)))


def bar(job: Job, total: int | None, what: str, watch: Watch, done: int = 0) -> Any:
    """Over the frames of a clip, on a terminal or as the watch shows it; total: None if it is not known."""
    if watch.progress is not None:
        shown = watch.progress(what, total or 0, "frame")
        shown.n = done
        return shown
    is_seen = sys.stderr.isatty()
    description = f"{job.source.name}, {what}"
    return tqdm(total=total, initial=done, desc=description, unit="frame", leave=False, disable=not is_seen)


def told(clip: Source, survey: Survey, progress: Progress, made: dict[str, Any]) -> Told:
    """What there is to say of a clip that is restored."""
    cuts = [number for record in progress.records for number in record["cuts"]]
    first = survey.times[0][0]
    times = [round(float((survey.times[number][0] - first) * clip.time_base), 3) for number in cuts]
    computing = sum(record["seconds"] for record in progress.records)
    rate = len(survey.times) / computing if computing else 0.0
    known = [record["warping_error"] for record in progress.records if record["warping_error"] is not None]
    where = f" at {', '.join(f'{at:g} s' for at in times[:8])}{' ...' if len(cuts) > 8 else ''}" if cuts else ""
    steady = f", warping error {1000 * float(np.mean(known)):.2f} / 1000" if known else ""
    count = f"{len(cuts)} cut{'' if len(cuts) == 1 else 's'}{where}"
    values = {
        "frames": len(survey.times),
        "frames_per_second": round(rate, 4),
        "cuts": [{"frame": number, "time": at} for number, at in zip(cuts, times, strict=True)],
        "chunks": [
            {"frames": record["frames"], "warping_error": record["warping_error"], "seconds": record["seconds"]}
            for record in progress.records
        ],
        "is_grey": survey.is_grey,
        "notes": survey.notes,
        **made,
    }
    line = f"{one_line(clip.path)}: {len(survey.times)} frames, {rate:.2f} per second, {count}{steady}"
    return Told([line], values)


def check_target(output: Path, resume: bool) -> None:
    """Refuse a folder that holds something, which the frames would replace, and a picture; ends the command."""
    if output.suffix.lower() in PICTURE_SUFFIXES:
        usage_error(f"-o {output} names a picture; give a name with {', '.join(FORMATS)}, or a folder for PNG files")
    if output.suffix.lower() in SUFFIXES or not output.exists():
        return
    if not output.is_dir():
        usage_error(
            f"-o {output} is a file and no clip; give a name with {', '.join(FORMATS)}, or a folder for PNG files"
        )
    if not resume and any(output.iterdir()):
        usage_error(f"-o {output} is not empty; give a new folder for the PNG files, or a name such as OUT.mp4")


def run_clip(
    source: Path,
    output: Path,
    asked: Mapping[str, Any],
    restoring_of: Callable[[Path, Mapping[str, Any]], Restoring],
    load: Callable[[Restoring], Restorer],
    watch: Watch,
) -> Told | None:
    """The command for a clip; what there is to say of it, None if its result is there. Raises StableSRKitError.

    restoring_of, load: as for pictures; the model of what the options say.
    """
    settings = clip_settings(asked)
    if not source.exists():
        raise ImageError(f"{source}: no such file or folder; check the name")
    if source.resolve() == output.resolve():
        usage_error(f"{output} is the input and would be overwritten; choose another -o")
    check_target(output, asked["resume"])
    make_folder(output.parent)
    restoring = restoring_of(output.parent, asked)
    restoring = replace(restoring, settings={**restoring.settings, **settings})
    return restore_clip(source, output, asked, restoring, load, watch)
