"""Pictures and folders in, pictures out: what every command over files does alike."""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import typer
from tqdm import tqdm

from stablesr_kit.cli.messages import one_line, usage_error
from stablesr_kit.cli.processes import gathered, is_first
from stablesr_kit.errors import ImageError, OutputError, StableSRKitError, is_out_of_memory
from stablesr_kit.imaging.files import Picture, check_output, list_images, read_picture


@dataclass(frozen=True, kw_only=True)
class Job:
    """One picture: where it is, where the result goes, and where what belongs to it goes (None: nowhere)."""

    source: Path
    target: Path
    companion: Path | None

    @property
    def results(self) -> list[Path]:
        """All it should write."""
        return [path for path in (self.target, self.companion) if path]


@dataclass
class Report:
    """What became of the pictures; `done` is the word for what the command does to them."""

    done: str
    written: list[Path] = field(default_factory=list)
    skipped: int = 0
    failed: int = 0

    def fail(self, error: StableSRKitError) -> None:
        """Counts a failure and tells it in one line, above the progress bars."""
        self.failed += 1
        tqdm.write(f"error: {one_line(error)}", file=sys.stderr)

    def summary(self) -> str:
        """How many were done and where they are."""
        counts = [f"{len(self.written)} {self.done}"]
        counts += [f"{self.skipped} already there"] if self.skipped else []
        counts += [f"{self.failed} failed"] if self.failed else []
        where = self.written[0] if len(self.written) == 1 else self.written[0].parent if self.written else None
        return ", ".join(counts) + (f": {where}" if where else "")


def plan(inputs: list[Path], output: Path, companion: str | None, report: Report) -> list[Job]:
    """One job for each picture that is there; each input without a picture is reported as a failure.

    companion: the end of the name of a second file beside each result, such as "_compare"; None: there is none.
    Ends the command if two results, or a result and an input, would have one name.
    """
    found: dict[Path, None] = {}
    for given in inputs:
        try:
            found.update(dict.fromkeys(list_images([given])))
        except ImageError as error:
            if is_first():
                report.fail(error)
    sources = list(found)
    if len(inputs) == 1 and not inputs[0].is_dir() and output.suffix and not output.is_dir():
        try:
            check_output(output)
        except OutputError as error:
            usage_error(str(error))
        targets = [output] * len(sources)
    else:
        if output.is_file():
            usage_error(f"-o {output} is a file; several pictures need a folder")
        stems = Counter(source.stem for source in sources)
        names = [f"{s.stem}_{s.suffix[1:]}" if stems[s.stem] > 1 and s.suffix else s.stem for s in sources]
        targets = [output / f"{name}.png" for name in names]
    jobs = [
        Job(
            source=source,
            target=target,
            companion=target.with_name(f"{target.stem}{companion}{target.suffix}") if companion else None,
        )
        for source, target in zip(sources, targets, strict=True)
    ]
    results = [path for job in jobs for path in job.results]
    for path, count in Counter(results).items():
        if count > 1:
            usage_error(f"{path} would be written for {count} pictures; put them into different folders")
    originals = {source.resolve() for source in sources}
    for path in results:
        if path.resolve() in originals:
            usage_error(f"{path} is an input and would be overwritten; choose another -o")
    return jobs


def make_folder(folder: Path) -> None:
    """Make the folder of the results, so that a place that cannot be written shows before any work. OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: the folder cannot be made ({error.strerror}); choose another -o") from error
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{folder}: the folder is not writable; choose another -o or change its permissions")


def run(jobs: list[Job], work: Callable[[Job], None], report: Report) -> None:
    """One picture after the other, with a bar over them on a terminal; after a failure the next one follows."""
    for job in tqdm(jobs, unit="picture", leave=False, disable=not sys.stderr.isatty() or len(jobs) == 1):
        try:
            work(job)
        except StableSRKitError as error:
            report.fail(error)
        else:
            report.written.append(job.target)


def read_job(job: Job) -> Picture:
    """The job's picture, with a line for each thing that reading reduced. Raises StableSRKitError."""
    picture = read_picture(job.source)
    for note in picture.notes:
        tqdm.write(f"note: {one_line(job.source)}: {note}", file=sys.stderr)
    check_output(job.target, picture)
    return picture


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
        yield
    except StableSRKitError as error:
        if str(job.source) in str(error):
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
    if is_first():
        typer.echo(whole.summary())
    if whole.failed:
        raise typer.Exit(1)
