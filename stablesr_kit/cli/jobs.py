"""Pictures and folders in, results out: which picture becomes which file, and what every command does alike."""

import json
import os
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import typer
from tqdm import tqdm

from stablesr_kit.cli.messages import noting, one_line, usage_error
from stablesr_kit.cli.processes import gathered, is_first
from stablesr_kit.errors import ImageError, OutputError, StableSRKitError, is_out_of_memory
from stablesr_kit.imaging.finding import SUFFIXES, find_pictures
from stablesr_kit.imaging.reading import MAX_PIXELS, MAX_STREAMED_PIXELS, Picture, open_picture, read_picture
from stablesr_kit.imaging.writing import check_output, left_out, output_format

HUGE_ADVICE = "give --huge if you trust the file, or scale or crop it first"
LONGEST_NAME = 255
"""Bytes of a file's name at most, on nearly every system."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One picture: where it is, where the result goes, and where what belongs to it goes (None: nowhere).

    folder: of all results, in or below which the target is.
    """

    source: Path
    target: Path
    companion: Path | None
    folder: Path

    @property
    def results(self) -> list[Path]:
        """All it should write."""
        return [path for path in (self.target, self.companion) if path]


class Told(NamedTuple):
    """What there is to say of a picture that is done: lines for people, and the same as plain values."""

    lines: list[str]
    values: dict[str, Any]


@dataclass
class Report:
    """What became of the pictures; `done` is the word for what the command does to them.

    is_json: stdout gets an object for each picture, and nothing else.
    """

    done: str
    is_json: bool = False
    written: list[Path] = field(default_factory=list)
    skipped: int = 0
    failed: int = 0

    def finish(self, job: Job, told: Told | None = None, seconds: float | None = None) -> None:
        """Counts a picture that is done, and tells what there is to say of it, above the progress bars."""
        self.written.append(job.target)
        lines, values = told or Told([], {})
        if seconds is not None:
            values = {"seconds": round(seconds, 3), **values}
        self._tell({"source": str(job.source), "result": str(job.target), "status": self.done, **values})
        for line in lines if not self.is_json else ():
            tqdm.write(line)

    def skip(self, job: Job) -> None:
        """Counts a picture whose result is there."""
        self.skipped += 1
        self._tell({"source": str(job.source), "result": str(job.target), "status": "already there"})

    def fail(self, error: StableSRKitError, source: Path | None = None) -> None:
        """Counts a failure and tells it in one line, above the progress bars."""
        self.failed += 1
        tqdm.write(f"error: {one_line(error)}", file=sys.stderr)
        given = None if source is None else str(source)
        self._tell({"source": given, "result": None, "status": "failed", "error": one_line(error)})

    def _tell(self, values: dict[str, Any]) -> None:
        if self.is_json:
            tqdm.write(json.dumps(values, default=float))  # of numpy

    def summary(self) -> str:
        """How many were done and where they are."""
        counts = [f"{len(self.written)} {self.done}"]
        counts += [f"{self.skipped} already there"] if self.skipped else []
        counts += [f"{self.failed} failed"] if self.failed else []
        where = self.written[0] if len(self.written) == 1 else None
        if len(self.written) > 1:
            where = Path(os.path.commonpath([path.parent for path in self.written]))
        return ", ".join(counts) + (f": {where}" if where else "")


def plan(inputs: list[Path], output: Path, companion: str | None, report: Report) -> list[Job]:
    """One job for each picture that is there; each input without a picture is reported as a failure.

    Sub-folders are mirrored. Two results that would have one name, on any system, get different ones.

    companion: the end of the name of a second file beside each result, such as "_compare"; None: there is none.
    Ends the command if a result would overwrite an input, or the output cannot be what the inputs need.
    """
    is_file = len(inputs) == 1 and not inputs[0].is_dir() and bool(output.suffix) and not output.is_dir()
    if is_file:
        try:
            output_format(output)
        except OutputError as error:
            usage_error(str(error))
    elif output.is_file() or (output.suffix.lower() in SUFFIXES and not output.exists()):
        usage_error(f"-o {output} {'is' if output.is_file() else 'names'} a file; several pictures need a folder")
    sources = _sources(inputs, output, report)
    folder = output.parent if is_file else output
    names = {path: output.name for path in sources} if is_file else _result_names(sources, companion)
    jobs = []
    for source, name in names.items():
        target = folder / name
        beside = target.with_name(f"{target.stem}{companion}{target.suffix}") if companion else None
        job = Job(source=source, target=target, companion=beside, folder=folder)
        longest = max((len(os.fsencode(path.name)) for path in job.results), default=0)
        if longest > LONGEST_NAME:
            given = f"{source}: the name of its result would be {longest} bytes long"
            if is_first():
                report.fail(OutputError(f"{given}, {LONGEST_NAME} at most; rename it"), source)
            continue
        jobs.append(job)
    originals = {source.resolve() for source in sources}
    for path in (path for job in jobs for path in job.results):
        if path.resolve() in originals:
            usage_error(f"{path} is an input and would be overwritten; choose another -o")
    return jobs


def _sources(inputs: list[Path], output: Path, report: Report) -> dict[Path, Path]:
    """Each picture once, with its name below the folder that was given; what was passed over is told in one line."""
    sources: dict[Path, Path] = {}
    places: set[Path] = set()
    passed_over: list[Path] = []

    def add(path: Path, name: Path) -> None:
        if path.resolve() not in places:
            places.add(path.resolve())
            sources[path] = name

    for given in inputs:
        try:
            if not given.exists():
                raise ImageError(f"{given}: no such file or folder; check the name")
            if not given.is_dir():
                add(given, Path(given.name))
                continue
            found = find_pictures(given, besides=output)
            passed_over += found.passed_over
            if not found.pictures:
                raise ImageError(f"{given}: no picture in this folder; expected {', '.join(sorted(SUFFIXES))}")
            for path in found.pictures:
                add(path, path.relative_to(given))
        except ImageError as error:
            if is_first():
                report.fail(error, given)
    if passed_over and is_first():
        tqdm.write(f"note: no pictures, passed over: {one_line(', '.join(map(str, passed_over)))}", file=sys.stderr)
    return sources


def _result_names(sources: dict[Path, Path], companion: str | None) -> dict[Path, Path]:
    """The name below the results' folder for each picture, in their order.

    It is that of the picture. Where several pictures would share it, all of them are told apart by their endings
    (a_jpg.png, a_tif.png), or else by the folders they are from (one/a.png, two/a.png), or else by number. Names that
    differ in capitals or in how accents are coded are the same on some systems, and so they are here.
    """

    def key(name: Path) -> str:
        return unicodedata.normalize("NFC", str(name)).casefold()

    def keys(name: Path) -> set[str]:
        return {key(name), *([key(name.with_name(f"{name.stem}{companion}{name.suffix}"))] if companion else [])}

    groups: dict[str, list[Path]] = {}
    for path, name in sources.items():
        groups.setdefault(key(name.with_suffix("")), []).append(path)
    chosen: dict[Path, Path] = {}
    taken: set[str] = set()
    for group in sorted(groups.values(), key=len):
        plain = [sources[path].with_name(f"{sources[path].stem}.png") for path in group]
        ended = [
            name.with_name(f"{name.stem}_{path.suffix[1:]}.png") if path.suffix else name
            for path, name in zip(group, plain, strict=True)
        ]
        roots = [Path(os.path.abspath(path)).parents[len(sources[path].parts) - 1].name for path in group]
        candidates = [
            plain,
            ended,
            [Path(root, name) for root, name in zip(roots, plain, strict=True)],
            [Path(root, name) for root, name in zip(roots, ended, strict=True)],
            [name.with_name(f"{name.stem}_{number}.png") for number, name in enumerate(ended, 1)],
        ]
        for names in candidates:
            wanted = [keys(name) for name in names]
            united = set().union(*wanted)
            if len(united) == sum(map(len, wanted)) and not united & taken:
                break
        chosen |= dict(zip(group, names, strict=True))
        taken |= united
    return {path: chosen[path] for path in sources}


def make_folder(folder: Path) -> None:
    """Make the folder of the results, so that a place that cannot be written shows before any work. OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: the folder cannot be made ({error.strerror}); choose another -o") from error
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"{folder}: the folder is not writable ({error.strerror}); choose another -o or change its permissions"
        ) from error


def run(jobs: list[Job], work: Callable[[Job], Told | None], report: Report) -> None:
    """One picture after the other, with a bar over them on a terminal; after a failure the next one follows."""
    for job in tqdm(jobs, unit="picture", leave=False, disable=not sys.stderr.isatty() or len(jobs) == 1):
        began = time.perf_counter()
        try:
            make_folder(job.target.parent)
            told = work(job)
        except StableSRKitError as error:
            report.fail(error, job.source)
        else:
            report.finish(job, told, time.perf_counter() - began)


def open_job(job: Job, is_huge_allowed: bool = False, scale: float = 1) -> Picture:
    """The job's picture, not decoded yet, whose result can be written. Raises StableSRKitError."""
    from stablesr_kit.pipelines.pictures import result_size

    picture = open_picture(
        job.source,
        max_pixels=MAX_STREAMED_PIXELS if is_huge_allowed else MAX_PIXELS,
        advice="scale or crop it first" if is_huge_allowed else HUGE_ADVICE,
    )
    check_result(job, picture.height * picture.width * scale * scale, MAX_STREAMED_PIXELS, "give a smaller --scale")
    check_output(job.target, picture, result_size(picture.height, picture.width, scale))
    return picture


def read_job(job: Job) -> Picture:
    """The job's picture, with a line for what reading converts and for what writing leaves out. StableSRKitError."""
    picture = read_picture(job.source)
    check_output(job.target, picture)
    tell_changes(job, picture)
    return picture


def tell_changes(job: Job, picture: Picture) -> None:
    """A line for each thing that reading converts, and one for what the result's file cannot hold."""
    notes = list(picture.notes)
    if lost := left_out(job.target, picture):
        notes.append(f"{output_format(job.target).name} cannot hold and leaves out: {', '.join(lost)}")
    for note in notes:
        tqdm.write(f"note: {one_line(job.source)}: {note}", file=sys.stderr)


def check_result(job: Job, pixels: float, most: float, advice: str) -> None:
    """Raise ImageError if the result would have more pixels than can be made here; advice: what to do."""
    if pixels > most:
        raise ImageError(
            f"{job.source}: the result would have {pixels / 1e6:,.0f} million pixels, more than the {most / 1e6:,.0f} "
            f"million that can be made here; {advice}"
        )


@contextmanager
def naming(job: Job, less: str) -> Iterator[None]:
    """Turns what models meet on some pictures into a StableSRKitError that begins with the file.

    less: what to change where memory does not suffice, such as "restore with a smaller --scale".
    """
    try:
        with noting(job.source):
            yield
    except StableSRKitError as error:
        if any(str(path) in str(error) for path in (job.source, *job.results)):
            raise
        raise type(error)(f"{job.source}: {error}") from error
    # Sizes they cannot take, overflow, and torch's RuntimeError for lack of memory.
    except (ValueError, ArithmeticError, RuntimeError, MemoryError) as error:
        reason, advice = str(error).partition("\n")[0], ""
        if is_out_of_memory(error):
            reason, advice = "not enough memory", f"; {less}"
        raise StableSRKitError(f"{job.source}: {reason}{advice}") from error


def finish(report: Report) -> None:
    """Say what was done by all processes; ends the command of each with exit status 1 if something failed in any."""
    reports = gathered(report)
    whole = Report(report.done)
    for part in reports:
        whole.written += part.written
        whole.skipped += part.skipped
        whole.failed += part.failed
    if is_first() and not report.is_json:
        typer.echo(whole.summary())
    if whole.failed:
        raise typer.Exit(1)
