"""Share work between the processes of `accelerate launch`: pictures, or the tiles of a single one.

Each process takes its own pictures, and all learn all results. Without `accelerate launch` there is one process.
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
    """Whether this process prints what concerns all of them."""
    state = _state()
    return state is None or state.is_main_process


def local_index() -> int:
    """Number of this process on its machine, from 0."""
    state = _state()
    return 0 if state is None else state.local_process_index


def team_of_all() -> "Team | None":
    """All processes as a team for one picture; None if there is only one process."""
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
    """One item of each process, in their order. All processes must call it; it waits for the slowest."""
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
