"""Which stages of a chain of programs are finished, which resume, and which start again because of changed options."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from stablesr_kit.errors import ConfigError
from stablesr_kit.storage import replacing_file
from stablesr_kit.training.run.command_line import expand_variables


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A program and its options, with environment variables expanded."""

    program: str
    options: dict[str, Any]

    @classmethod
    def of(cls, program: str, options: dict[str, Any]) -> Self:
        """options: the given ones, without defaults."""
        return cls(program=program, options=expand_variables(options))

    @property
    def trains(self) -> bool:
        """Whether the program resumes from checkpoints in its output_dir."""
        return self.program.startswith("train_")

    @property
    def output_dir(self) -> str:
        """Folder that the program writes to."""
        return str(self.options.get("output_dir"))


@dataclass(frozen=True, kw_only=True)
class BegunStage:
    """A stage that was started, as recorded in the journal."""

    stage: Stage
    seconds: float | None
    """How long its last call took; None while it is not finished."""


class Continuation(NamedTuple):
    """Which stages of a chain are skipped, resumed, or started again."""

    kept: list[BegunStage]
    """The first stages: finished ones, and possibly one to resume."""
    reasons: dict[int, str]
    """Index of each stage that is started again -> the reason."""
    outdated: list[Path]
    """Folders of checkpoints to rename first; otherwise training would resume from them."""


def find_continuation(stages: Sequence[Stage], records: Sequence[BegunStage]) -> Continuation:
    """A stage starts again if its options have changed, and so do all later stages.

    Training stages with the same output_dir continue each other, so they start again together.
    """
    known = min(len(stages), len(records))
    cause = first = next((i for i in range(known) if stages[i] != records[i].stage), known)
    if cause == len(stages):
        return Continuation(list(records[:cause]), {}, [])
    while True:
        outdated = {record.stage.output_dir for record in records[first:] if record.stage.trains}
        together = next((i for i in range(first) if stages[i].trains and stages[i].output_dir in outdated), first)
        if together == first:
            break
        first = together
    reasons = {i: f"stage {first + 1} does" for i in range(first, known)}
    if first < cause:
        reasons[first] = f"stage {cause + 1} does, which goes on from checkpoints of the same output_dir"
    if cause < known:
        reasons[cause] = describe_difference(records[cause].stage, stages[cause])
    return Continuation(list(records[:first]), reasons, sorted(map(Path, outdated)))


def describe_difference(before: Stage, now: Stage) -> str:
    """The difference, on one line."""
    if before.program != now.program:
        return f"it is {now.program}, was {before.program}"
    names = [name for name in {**before.options, **now.options} if before.options.get(name) != now.options.get(name)]
    told = (f"{name} is {now.options.get(name)}, was {before.options.get(name)}" for name in names)
    return "; ".join(told)


def read_journal(file: Path) -> list[BegunStage]:
    """All started stages, in order; none if there is no journal. Raises ConfigError if the file is something else."""
    if not file.exists():
        return []
    try:
        return [
            BegunStage(stage=Stage(program=entry["program"], options=entry["options"]), seconds=entry["seconds"])
            for entry in json.loads(file.read_text())
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is no journal of stages; delete it to call every stage again") from error


def write_journal(file: Path, records: Sequence[BegunStage]) -> None:
    """Replace the journal atomically. Raises OutputError."""
    entries = [asdict(record.stage) | {"seconds": record.seconds} for record in records]
    with replacing_file(file) as part:
        part.write_text(json.dumps(entries, indent=1) + "\n")


def put_away(folder: Path) -> Path:
    """Rename a folder to the first free name of FOLDER.old-1, FOLDER.old-2, ...; returns the new name."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    return folder.rename(aside)
