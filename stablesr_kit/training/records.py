"""What a run measures, one JSON object per step in a file that a resumed run continues."""

import json
import math
from pathlib import Path
from typing import IO


class StepRecords:
    """Appends {"step": 1, NAME: ...} per step to a file.

    step: the last one that is behind the run; records of later steps, left by a run that was killed, are forgotten.
    """

    def __init__(self, file: Path, step: int) -> None:
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        whole = [line for line in lines if line.endswith("}\n")]
        beside = file.with_name(file.name + ".unfinished")
        beside.write_text("".join(line for line in whole if json.loads(line)["step"] <= step))
        beside.rename(file)
        self.stream: IO[str] = file.open("a")
        self.recent: list[dict[str, float]] = []

    def add(self, step: int, values: dict[str, float]) -> None:
        """Write one step's values; they are in the file when this returns."""
        self.stream.write(json.dumps({"step": step, **values}) + "\n")
        self.stream.flush()
        self.recent.append(values)

    def recent_means(self) -> dict[str, float]:
        """Mean of each value over the steps that had it since the last call."""
        columns: dict[str, list[float]] = {}
        for values in self.recent:
            for name, value in values.items():
                columns.setdefault(name, []).append(value)
        self.recent = []
        return {name: math.fsum(column) / len(column) for name, column in columns.items()}

    def close(self) -> None:
        """Nothing can be added any more."""
        self.stream.close()
