"""Runs several training programs in one process, as `accelerate launch tests/training_runs.py FILE` or imported.

FILE is JSON: a list of argument lists, each a program's name and its flags.
"""

import json
import runpy
import sys
from collections.abc import Iterable
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState, PartialState

ROOT = Path(__file__).parents[1]


def run_program(program: str, *flags: str) -> None:
    """One program of training/, in this process."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    arguments, sys.argv = sys.argv, [program, *flags]
    try:
        runpy.run_path(str(ROOT / "training" / f"{program}.py"), run_name="__main__")
    finally:
        sys.argv = arguments


def run_programs(calls: Iterable[Iterable[str]]) -> None:
    """One after the other."""
    for call in calls:
        run_program(*call)


if __name__ == "__main__":
    # a group of processes cannot reliably be built again after it is destroyed, so that the programs share one
    PartialState.destroy_process_group = lambda self, group=None: None  # noqa: ARG005
    run_programs(json.loads(Path(sys.argv[1]).read_text()))
