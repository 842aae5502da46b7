"""Which stages of a chain of programs are finished, which go on, and which begin anew since they were changed."""

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
    """A program and the options it is called with, environment variables expanded."""

    program: str
    options: dict[str, Any]

    @classmethod
    def of(cls, program: str, options: dict[str, Any]) -> Self:
        """options: as they are given, before defaults fill the rest."""
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
    """A stage that was begun, as the journal has it."""

    stage: Stage
    seconds: float | None
    """How long its last call took; None while it is not finished."""


class Continuation(NamedTuple):
    """Which stages of a chain are skipped, resumed, or begin anew."""

    kept: list[BegunStage]
    """The first stages: those that are finished, and perhaps one to resume."""
    reasons: dict[int, str]
    """Why each stage that was begun before begins anew, by its place in the chain from 0."""
    outdated: list[Path]
    """Folders of checkpoints to rename first, or training would resume from them."""


def find_continuation(stages: Sequence[Stage], records: Sequence[BegunStage]) -> Continuation:
    """A stage begins anew when its options are others than when it was begun, and so do all that come after it.

    Training stages of one output_dir go on from each other, so that they begin anew together.
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
    """What is different, on one line."""
    if before.program != now.program:
        return f"it is {now.program}, was {before.program}"
    names = [name for name in {**before.options, **now.options} if before.options.get(name) != now.options.get(name)]
    told = (f"{name} is {now.options.get(name)}, was {before.options.get(name)}" for name in names)
    return "; ".join(told)


def read_journal(file: Path) -> list[BegunStage]:
    """What was begun, in its order; nothing where there is no journal. Raises ConfigError for another file."""
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
    """Replace the journal; it appears whole. Raises OutputError."""
    entries = [asdict(record.stage) | {"seconds": record.seconds} for record in records]
    with replacing_file(file) as part:
        part.write_text(json.dumps(entries, indent=1) + "\n")


def put_away(folder: Path) -> Path:
    """Rename a folder to the first free name of FOLDER.old-1, FOLDER.old-2, ...; that name."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    return folder.rename(aside)
