"""Work spread over the processes of `accelerate launch`: pictures, or the tiles of a single one.

Each process takes its own pictures and learns what became of all.

A command that was started otherwise is one process and takes part in nothing.
"""

import os
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from accelerate import PartialState

    from stablesr_kit.tiling.team import Team

Item = TypeVar("Item")

# Processes wait for each other at the end alone, and pictures may take days.
LONGEST_WAIT = timedelta(days=365)


def is_first() -> bool:
    """Whether this is the process that says what concerns all of them."""
    state = _state()
    return state is None or state.is_main_process


def local_index() -> int:
    """Number of this process on its machine, from 0."""
    state = _state()
    return 0 if state is None else state.local_process_index


def team_of_all() -> "Team | None":
    """All processes as a team at one picture; None if there is one."""
    state = _state()
    if state is None:
        return None

    from stablesr_kit.tiling.team import Team

    return Team(state)


def share_of(items: list[Item]) -> list[Item]:
    """The items of this process: every n-th, in their order."""
    state = _state()
    return items if state is None else items[state.process_index :: state.num_processes]


def gathered(item: Item) -> list[Item]:
    """The items of all processes, in their order; waits for the slowest. All must come here, once each."""
    if _state() is None:
        return [item]

    from accelerate.utils import gather_object

    items: list[Item] = gather_object([item])
    return items


@cache
def _state() -> "PartialState | None":
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return None

    from accelerate import PartialState

    return PartialState(cpu=True, timeout=LONGEST_WAIT)  # little is exchanged, so gloo does on every device
