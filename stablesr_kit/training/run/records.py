"""What a run measures, one JSON object per step in a file that a resumed run continues."""

import json
import math
from collections.abc import Iterable, Mapping
from io import FileIO
from pathlib import Path

from stablesr_kit.storage import replacing_file
from stablesr_kit.training.run.state import writing


class StepRecords:
    """Appends {"step": 1, NAME: ...} per step to a file.

    step: the last one that is behind the run; records of later steps, left by a run that was killed, are forgotten.
    Raises OutputError where it cannot be written.
    """

    def __init__(self, file: Path, step: int) -> None:
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        whole = [line for line in lines if line.endswith("}\n")]
        with writing(file):
            with replacing_file(file) as part:
                part.write_text("".join(line for line in whole if json.loads(line)["step"] <= step))
            # without a buffer, in which what cannot be written would wait and fail once more
            self.stream = FileIO(file, "a")
        self.file = file
        self.recent: list[dict[str, float]] = []

    def add(self, step: int, values: dict[str, float]) -> None:
        """Write one step's values; they are in the file when this returns. Raises OutputError."""
        line = (json.dumps({"step": step, **values}) + "\n").encode()
        with writing(self.file):
            while line:
                line = line[self.stream.write(line) :]
        self.recent.append(values)

    def recent_means(self) -> dict[str, float]:
        """Mean of each value over the steps that had it since the last call."""
        recent, self.recent = self.recent, []
        return means_of(recent)

    def close(self) -> None:
        """Close the file."""
        self.stream.close()


def read_records(file: Path) -> list[dict[str, float]]:
    """What was recorded, step by step; nothing where there is no file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def means_of(records: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each value over the records that have it, in the order in which they appear."""
    columns: dict[str, list[float]] = {}
    for record in records:
        for name, value in record.items():
            columns.setdefault(name, []).append(value)
    return {name: math.fsum(column) / len(column) for name, column in columns.items()}
