"""The journal of a run, so that a stopped run continues instead of starting again.

During a run the folder of results contains a folder `.stablesr`: the journal, with one line of JSON per finished
result, and a lock and a state for each result in progress. It is deleted when everything is finished; afterwards
results are recognised by the provenance that is written into their files.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from stablesr_kit.errors import ImageError, JobError, OutputError
from stablesr_kit.imaging.metadata import read_provenance
from stablesr_kit.imaging.reading import MAX_STREAMED_PIXELS, open_picture
from stablesr_kit.storage import replacing_file, sha256

JOBS_FOLDER = ".stablesr"
LONGEST_STATE_NAME = 240  # file names have at most 255 bytes

Settings = Mapping[str, str | float | int | bool | None]


class Journal:
    """The finished results of one folder; any number of processes may add to it.

    Args:
        folder: of the results.
        settings: everything besides the picture that determines a result.

    Raises:
        JobError: the journal cannot be read.
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder = folder
        self.jobs_folder = folder / JOBS_FOLDER
        self.path = self.jobs_folder / "journal.jsonl"
        self.settings = dict(settings)
        self._finished = {tuple(record["results"]): record for record in _read_records(self.path)}

    def is_finished(self, source: Path, results: Sequence[Path]) -> bool:
        """Whether the results exist and were made from the source as it is now.

        The journal has hashes of results and source. Without a record, the provenance in the results is compared, and
        they must decode completely.

        Raises:
            JobError: they exist, but were made with other settings.
        """
        if not all(path.is_file() for path in results):
            return False
        record = self._finished.get(tuple(map(self._name, results)))
        try:
            if record is not None:
                is_made = all(sha256(path) == record["results"][self._name(path)] for path in results)
                if not is_made or sha256(source) != record["source"]:
                    return False
                refuse_other_settings(results[0], record["settings"], self.settings)
                return True
            made = [read_provenance(path) or {} for path in results]
            if any("source" not in one for one in made) or any(one["source"] != sha256(source) for one in made):
                return False
        except OSError:  # restoring the picture reports the error
            return False
        if not all(map(_is_whole, results)):
            return False
        for one in made:
            then = {name: one.get(name) for name in self.settings}
            refuse_other_settings(results[0], then, self.settings)
        return True

    def provenance(self, source: Path) -> dict[str, Any]:
        """What is written into a result, to recognise it later."""
        return {**self.settings, "source": sha256(source)}

    def finish(self, source: Path, results: Sequence[Path]) -> None:
        """Record that the results are complete. Raises OutputError."""
        record = {
            "results": {self._name(path): sha256(path) for path in results},
            "source": sha256(source),
            "settings": self.settings,
        }
        try:
            self.jobs_folder.mkdir(exist_ok=True)
            with self.path.open("ab+") as file:
                is_torn = file.tell() > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read() != b"\n"
                file.write(b"\n" * is_torn + json.dumps(record).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(
                f"{self.path}: cannot be written ({error.strerror}); the result is complete, but --resume repeats it"
            ) from error

    def close(self) -> None:
        """Remove the journal if no work is left; the work of other processes in this folder stays."""
        with suppress(OSError):
            if all(path == self.path for path in self.jobs_folder.iterdir()):
                self.path.unlink(missing_ok=True)
                self.jobs_folder.rmdir()

    def remove_stale_locks(self) -> None:
        """Delete locks of killed processes; locks of running processes stay."""
        for path in self.jobs_folder.glob("*.lock"):
            with suppress(Timeout, OSError), FileLock(path, blocking=False):
                path.unlink(missing_ok=True)

    @contextmanager
    def in_progress(self, source: Path, result: Path, resume: bool = False) -> Iterator[Path]:
        """A folder for the state of one result, locked by this process while the block runs.

        The state is deleted when the block ends without an exception. An old state is deleted first unless `resume`.

        Raises:
            JobError: another process has locked it, or the state to resume is of another picture or other settings.
        """
        name = self._name(result)
        if os.sep in name or len(os.fsencode(name)) > LONGEST_STATE_NAME:
            name = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
        state = self.jobs_folder / f"{name}.job"
        path = self.jobs_folder / f"{name}.lock"
        lock = FileLock(path, blocking=False)
        try:
            self.jobs_folder.mkdir(exist_ok=True)
            lock.acquire()
        except Timeout as error:
            raise JobError(f"{result}: another process is restoring this picture; wait for it or stop it") from error
        except OSError as error:
            raise OutputError(f"{path}: cannot be written ({error.strerror}); choose another place") from error
        try:
            self._open_state(state, source, result, resume)
            yield state
            shutil.rmtree(state, ignore_errors=True)
        finally:
            path.unlink(missing_ok=True)  # before the release: afterwards it may belong to another process
            lock.release()

    def _name(self, result: Path) -> str:
        """Name of a result: its path relative to the folder, equal in all processes."""
        return os.path.relpath(result, self.folder)

    def _open_state(self, state: Path, source: Path, result: Path, resume: bool) -> None:
        """Make the folder of a state, or check that it belongs to this picture and these settings."""
        path = state / "job.json"
        try:
            made_from = {"picture": sha256(source), **self.settings}
            if resume and path.exists():
                refuse_other_settings(result, json.loads(path.read_bytes()), made_from)
                for part in state.glob(".*"):  # half-written by a killed process
                    part.unlink()
                return
            shutil.rmtree(state, ignore_errors=True)
            state.mkdir()
            with replacing_file(path) as part:
                part.write_text(json.dumps(made_from))
        except ValueError as error:
            raise JobError(f"{path}: cannot be read ({error}); start again without --resume") from error
        except OutputError:
            raise
        except OSError as error:
            raise OutputError(f"{error.filename}: {error.strerror}; check the file, or choose another place") from error


def _is_whole(path: Path) -> bool:
    """Whether a result decodes completely."""
    try:
        for _ in open_picture(path, max_pixels=MAX_STREAMED_PIXELS).bands():
            pass
    except ImageError:
        return False
    return True


def refuse_other_settings(result: Path, then: Mapping[str, Any], now: Settings) -> None:
    """Raise JobError with the differences unless the settings are equal."""
    differing = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if differing:
        listed = ", ".join(f"{name} {then.get(name)} (now {now.get(name)})" for name in differing)
        raise JobError(f"{result}: was made with {listed}; give the same settings, or start again without --resume")


def _read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The complete records of a journal; lines that were cut off are left out."""
    try:
        lines = path.read_bytes().splitlines() if path.exists() else []
    except OSError as error:
        raise JobError(f"{path}: the journal cannot be read ({error.strerror}); change its permissions") from error
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and record.keys() >= {"results", "source", "settings"}:
            yield record
