"""Pictures and folders in, results out: the names of results, and what all commands have in common."""

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
"""Longest file name in bytes, on nearly every system."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One picture: its file, the file of its result, and a second file beside the result (None: there is none).

    folder: for all results; the target is in or below it.
    """

    source: Path
    target: Path
    companion: Path | None
    folder: Path

    @property
    def results(self) -> list[Path]:
        """All files that it writes."""
        return [path for path in (self.target, self.companion) if path]


class Told(NamedTuple):
    """What is reported about a finished picture: lines for people, and the same as plain values."""

    lines: list[str]
    values: dict[str, Any]


@dataclass
class Report:
    """Results and failures of a command. done: what it does to a picture, such as "restored".

    is_json: print an object for each picture to stdout, and nothing else.
    """

    done: str
    is_json: bool = False
    written: list[Path] = field(default_factory=list)
    skipped: int = 0
    failed: int = 0

    def finish(self, job: Job, told: Told | None = None, seconds: float | None = None) -> None:
        """Count a finished picture, and report it above the progress bars."""
        self.written.append(job.target)
        lines, values = told or Told([], {})
        if seconds is not None:
            values = {"seconds": round(seconds, 3), **values}
        self._tell({"source": str(job.source), "result": str(job.target), "status": self.done, **values})
        for line in lines if not self.is_json else ():
            tqdm.write(line)

    def skip(self, job: Job) -> None:
        """Count a picture whose result exists already."""
        self.skipped += 1
        self._tell({"source": str(job.source), "result": str(job.target), "status": "already there"})

    def fail(self, error: StableSRKitError, source: Path | None = None) -> None:
        """Count a failure, and report it in one line above the progress bars."""
        self.failed += 1
        tqdm.write(f"error: {one_line(error)}", file=sys.stderr)
        given = None if source is None else str(source)
        self._tell({"source": given, "result": None, "status": "failed", "error": one_line(error)})

    def _tell(self, values: dict[str, Any]) -> None:
        if self.is_json:
            tqdm.write(json.dumps(values, default=float))  # of numpy

    def summary(self) -> str:
        """The numbers of pictures, and where the results are."""
        counts = [f"{len(self.written)} {self.done}"]
        counts += [f"{self.skipped} already there"] if self.skipped else []
        counts += [f"{self.failed} failed"] if self.failed else []
        where = self.written[0] if len(self.written) == 1 else None
        if len(self.written) > 1:
            where = Path(os.path.commonpath([path.parent for path in self.written]))
        return ", ".join(counts) + (f": {where}" if where else "")


def plan(inputs: list[Path], output: Path, companion: str | None, report: Report) -> list[Job]:
    """One job for each picture; each input without a picture is reported as a failure.

    Sub-folders are mirrored. Results whose names would be equal on some system get different ones.

    companion: suffix of a second file beside each result, such as "_compare"; None: there is none. Ends the command if
    a result would overwrite an input, or if the output is a file but must be a folder.
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
    """Each picture once, with its path below the given folder; files that are no pictures are reported in one line."""
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
    """The name of each result below the folder of results, in order.

    It is the picture's name. If several pictures would share it, all of them get their endings (a_jpg.png, a_tif.png),
    or else their folders (one/a.png, two/a.png), or else a number. Names that differ only in upper case or in the
    encoding of accents count as equal, since they are equal on some systems.
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
    """Make the folder for the results, and check that it is writable before any work. Raises OutputError."""
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
    """Do the jobs one after the other, with a progress bar on a terminal; a failure does not stop the others."""
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
    """The job's picture, not decoded yet; checks that its result can be written. Raises StableSRKitError."""
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
    """The job's picture; reports what reading converts and writing leaves out. Raises StableSRKitError."""
    picture = read_picture(job.source)
    check_output(job.target, picture)
    tell_changes(job, picture)
    return picture


def tell_changes(job: Job, picture: Picture) -> None:
    """Print a line for each conversion on reading, and one for what the result's format cannot hold."""
    notes = list(picture.notes)
    if lost := left_out(job.target, picture):
        notes.append(f"{output_format(job.target).name} cannot hold and leaves out: {', '.join(lost)}")
    for note in notes:
        tqdm.write(f"note: {one_line(job.source)}: {note}", file=sys.stderr)


def check_result(job: Job, pixels: float, most: float, advice: str) -> None:
    """Raise ImageError if the result would have too many pixels. advice: what to do."""
    if pixels > most:
        raise ImageError(
            f"{job.source}: the result would have {pixels / 1e6:,.0f} million pixels, more than the limit of "
            f"{most / 1e6:,.0f} million; {advice}"
        )


@contextmanager
def naming(job: Job, less: str) -> Iterator[None]:
    """Turn errors of models into a StableSRKitError that begins with the file.

    less: what to change if memory runs out, such as "restore with a smaller --scale".
    """
    try:
        with noting(job.source):
            yield
    except StableSRKitError as error:
        if any(str(path) in str(error) for path in (job.source, *job.results)):
            raise
        raise type(error)(f"{job.source}: {error}") from error
    # Impossible sizes, overflow, and torch's RuntimeError for lack of memory.
    except (ValueError, ArithmeticError, RuntimeError, MemoryError) as error:
        reason, advice = str(error).partition("\n")[0], ""
        if is_out_of_memory(error):
            reason, advice = "not enough memory", f"; {less}"
        raise StableSRKitError(f"{job.source}: {reason}{advice}") from error


def finish(report: Report, is_shared: bool = True) -> None:
    """Print the summary of all processes; each exits with status 1 if anything failed in any of them.

    is_shared: whether each process has a report, and all of them are here.
    """
    reports = gathered(report) if is_shared else [report]
    whole = Report(report.done)
    for part in reports:
        whole.written += part.written
        whole.skipped += part.skipped
        whole.failed += part.failed
    if is_first() and not report.is_json:
        typer.echo(whole.summary())
    if whole.failed:
        raise typer.Exit(1)
