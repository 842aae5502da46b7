"""Training programs at a tiny size: in this process, and in forked ones that can be killed."""

import json
import os
import random
import runpy
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers.forks import FORKS, free_port, of_two_processes, write_streams_to
from tests.helpers.training_watch import watched

ROOT = Path(__file__).parents[2]

FACES = {"height": 32, "width": 32, "distance_px": 8}
"""Arguments of save_smooth_pictures for what stands for faces."""

ENDLESS_S = 300
"""More than any run of a test takes on a busy machine."""


def tiny(program: str, config: str, *flags: str) -> list[str]:
    """The call of a program with its config of configs/tiny."""
    return [program, "--config", str(ROOT / "configs" / "tiny" / f"{config}.yaml"), *flags]


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


def weights(folder: str | Path) -> dict[str, Tensor]:
    """Of a network that a program has saved."""
    return load_file(Path(folder) / "diffusion_pytorch_model.safetensors")


def losses(folder: str | Path) -> list[dict[str, float]]:
    """What a run has recorded, step by step."""
    return [json.loads(line) for line in Path(folder, "losses.jsonl").read_text().splitlines()]


@contextmanager
def working_folder(folder: Path, variable: str, **pictures: int) -> Iterator[Path]:
    """The folder as the current one, with one thread, and smooth pictures in folder/pictures that `variable` names.

    pictures: arguments of save_smooth_pictures.
    """
    save_smooth_pictures(folder / "pictures", **pictures)
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv(variable, str(folder / "pictures"))
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        try:
            yield folder
        finally:
            torch.set_num_threads(threads)


def save_smooth_pictures(
    folder: Path, count: int = 3, height: int = 80, width: int = 96, distance_px: int = 12
) -> None:
    """PNG files 0.png and on, of random colours at that distance that flow into each other."""
    folder.mkdir(parents=True)
    draws = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(
            draws.integers(0, 256, (height // distance_px, width // distance_px, 3), dtype=np.uint8)
        )
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{i}.png")


class ForkedRun:
    """Programs in one process, or in two that talk through gloo.

    They run in the current folder and environment; what they say is in forked.log. processes: 1 or 2. begin: what each
    calls first.
    """

    def __init__(self, calls: list[list[str]], processes: int = 1, begin: Callable[[], None] | None = None) -> None:
        port = free_port()
        ranks = [of_two_processes(rank, port) for rank in range(2)] if processes == 2 else [{}]
        self.log = Path("forked.log").absolute()
        self.log.write_bytes(b"")
        self.processes = [
            FORKS.Process(target=_run_there, args=(calls, os.getcwd(), os.environ | rank, self.log, begin))
            for rank in ranks
        ]
        for process in self.processes:
            process.start()

    def finish(self) -> None:
        """Wait for the end, which must be a good one."""
        for process in self.processes:
            process.join(ENDLESS_S)
        ended = [process.exitcode for process in self.processes]
        self.kill()
        assert ended == [0] * len(ended), self.log.read_text()[-4000:]

    def kill_at_step(self, records: Path, step: int) -> None:
        """Kill with SIGKILL once so many steps are recorded."""
        self.kill_when(lambda: records.exists() and len(records.read_text().splitlines()) >= step)

    def kill_when(self, is_time: Callable[[], bool]) -> None:
        """Kill with SIGKILL once that is so, which must be before the end."""
        while not is_time():
            assert all(process.is_alive() for process in self.processes), self.log.read_text()[-4000:]
            time.sleep(0.001)
        assert all(process.is_alive() for process in self.processes), "ended before it could be killed"
        self.kill()

    def kill(self) -> None:
        """End every process at once."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def _run_there(
    calls: list[list[str]], folder: str, environment: dict[str, str], log: Path, begin: Callable[[], None] | None
) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    write_streams_to(log, log)
    torch.set_num_threads(1)
    _keep_process_group()
    if begin is not None:
        begin()
    run_programs(calls)


def assert_a_step_stays_the_same(calls: dict[str, list[str]], results: dict[str, str]) -> None:
    """Weights within 1e-6 of those of whole steps: of accumulated batches with forgotten activations, of two processes.

    calls: by name, with the options of their own; results: by the same name, the folder in output_dir to compare.
    """

    def variants(kind: str, *flags: str) -> list[list[str]]:
        # a larger epsilon, or Adam makes whole steps of what rounding leaves of gradients that are zero
        return [
            [*call, "--output_dir", f"{kind}/{name}", "--adam_epsilon", "1e-4", *flags] for name, call in calls.items()
        ]

    run_programs(variants("whole", "--train_batch_size", "4"))
    accumulated = ["--train_batch_size", "2", "--gradient_accumulation_steps", "2", "--gradient_checkpointing", "true"]
    run_programs(variants("accumulated", *accumulated))
    ForkedRun(variants("shared", "--train_batch_size", "2"), 2).finish()
    for name, result in results.items():
        for kind in ("accumulated", "shared"):
            worst = worst_difference(f"whole/{name}/{result}", f"{kind}/{name}/{result}")
            assert worst <= 1e-6, (name, kind, worst)


def assert_overfits(call: list[str], quantity: str, factor: float, *trained: str) -> None:
    """A recorded loss falls below that factor of its first values within 60 steps, and only what is trained moves.

    call: for four samples a step; trained: the names of trained parameters begin with one of these, class first.
    """
    output = f"overfit/{Path(call[2]).stem}"
    with watched() as watch:
        run_program(*call, "--max_train_steps", "60", "--checkpointing_steps", "60", "--output_dir", output)
    values = [record[quantity] for record in losses(output) if quantity in record]
    assert np.mean(values[-8:]) < factor * np.mean(values[:3])
    expected = {name for name in watch.parameters if name.startswith(trained)}
    assert watch.with_gradient == expected
    assert watch.moved() <= expected
    assert len(watch.moved()) > 0.9 * len(expected)  # a few gradients are exactly zero, as before a norm


def assert_kills_change_nothing(
    call: list[str], result: str, processes: int = 1, begin: Callable[[], None] | None = None
) -> None:
    """A run that is killed twice at random steps ends as one that is not: bitwise, or within 1e-6 in several processes.

    That holds for weights, their averages, the optimizers' states and the recorded losses. call: for 12 steps, with a
    checkpoint every other step; result: the folder in output_dir that it writes at its end; begin: as for ForkedRun.
    """
    name = f"{Path(call[2]).stem}-{processes}"
    whole, killed = Path("unbroken", name), Path("killed", name)
    steps = ["--max_train_steps", "12", "--checkpointing_steps", "2", "--output_dir"]
    ForkedRun([[*call, *steps, str(whole)]], processes, begin).finish()
    draws = random.Random(name)
    behind = 0
    for _ in range(2):
        run = ForkedRun([[*call, *steps, str(killed)]], processes, begin)
        run.kill_at_step(killed / "losses.jsonl", behind + draws.randint(2, 4))
        behind = len(losses(killed))
        assert not (killed / result).exists()
    ForkedRun([[*call, *steps, str(killed)]], processes, begin).finish()

    if processes == 1:
        assert (killed / "losses.jsonl").read_text() == (whole / "losses.jsonl").read_text()
    else:
        for ours, theirs in zip(losses(killed), losses(whole), strict=True):
            assert ours == pytest.approx(theirs, abs=1e-6)
    last = whole / "checkpoint-12"
    networks = [file.parent for file in sorted([*last.rglob("*.safetensors"), *(whole / result).glob("*.safetensors")])]
    assert len(networks) > 2  # with averages and the result
    for folder in networks:
        worst = worst_difference(folder, killed / folder.relative_to(whole))
        assert worst <= (0 if processes == 1 else 1e-6), (folder, worst)
    optimizers = sorted(last.glob("optimizer*.bin"))
    assert optimizers
    for file in optimizers:
        states = [torch.load(folder / last.name / file.name)["state"] for folder in (whole, killed)]
        torch.testing.assert_close(*states, rtol=0, atol=0 if processes == 1 else 1e-6)


def worst_difference(folder: str | Path, other: str | Path) -> float:
    """Largest difference between weights of two networks of the same names."""
    ours, theirs = weights(folder), weights(other)
    assert ours.keys() == theirs.keys()
    return max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours)


def _keep_process_group() -> None:
    """A group of processes cannot reliably be built again after it is destroyed, so that several programs share one."""
    PartialState.destroy_process_group = lambda self, group=None: None  # noqa: ARG005
