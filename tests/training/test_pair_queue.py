"""The queue of pairs: mixes batches, keeps pairs together, and resumes."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Generator, Tensor

from stablesr_kit.errors import ConfigError
from stablesr_kit.training.data.pairs import PairQueue, PairQueueOptions, QueuedDegradation


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def numbered(first: int, batch: int = 3) -> Tensor:
    return torch.arange(first, first + batch).float().view(batch, 1, 1, 1)


def test_the_queue_passes_batches_through_until_it_is_full_and_then_mixes_keeping_pairs_together() -> None:
    queue, generator, seen = PairQueue(batch_size=3, size=12), seeded(), []
    for step in range(200):
        lq, hq = queue.exchange(numbered(3 * step), numbered(3 * step) + 0.5, generator)
        assert torch.equal(lq + 0.5, hq)
        if step < 4:
            assert torch.equal(lq, numbered(3 * step))
        else:
            seen += lq.flatten().tolist()
    assert len(set(seen)) == len(seen)
    assert set(seen) | set(queue.lq.flatten().tolist()) == set(range(600))
    waits = torch.tensor(seen).view(-1, 3) - 3 * torch.arange(4, 200).view(-1, 1)
    assert -waits.mean().item() / 3 == pytest.approx(12 / 3, rel=0.15)  # geometric waiting time: size / batch


def test_the_queue_leaves_a_batch_of_another_size_alone() -> None:
    queue = PairQueue(batch_size=3, size=6)
    assert torch.equal(queue.exchange(numbered(0, 2), numbered(0, 2), seeded())[0], numbered(0, 2))
    assert queue.filled == 0
    with pytest.raises(ConfigError, match="use 180"):
        PairQueue(batch_size=4, size=181)


@pytest.mark.parametrize("steps", [2, 9])
def test_a_resumed_queue_continues_as_the_uninterrupted_one(steps: int, tmp_path: Path) -> None:
    queue, generator = PairQueue(batch_size=3, size=12), seeded()
    for step in range(steps):
        queue.exchange(numbered(3 * step), numbered(3 * step), generator)
    torch.save(queue.state_dict(), tmp_path / "queue.pt")
    resumed, resumed_generator = PairQueue(batch_size=3, size=12), Generator()
    resumed.load_state_dict(torch.load(tmp_path / "queue.pt", weights_only=True))
    resumed_generator.set_state(generator.get_state())
    for step in range(steps, steps + 8):
        batch = numbered(3 * step)
        expected = queue.exchange(batch, batch, generator)
        assert torch.equal(resumed.exchange(batch, batch, resumed_generator)[0], expected[0])
    with pytest.raises(ConfigError, match="does not fit"):
        PairQueue(batch_size=3, size=9).load_state_dict(queue.state_dict())


def queued(accelerator: Accelerator) -> QueuedDegradation:
    options = PairQueueOptions(degradations={"light": 1.0, "area": 1.0}, pair_queue_size=6)
    return QueuedDegradation(options, 0, 2, accelerator)


def crops(number: int) -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=seeded(number)) * 2 - 1


def test_degraded_batches_resume_with_their_queue_from_a_checkpoint(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    degrade = queued(accelerator)
    for number in range(7):
        degrade(crops(number))
    accelerator.save_state(str(tmp_path / "state"))
    expected = [degrade(crops(number)) for number in range(7, 12)]

    accelerator = Accelerator(cpu=True)
    resumed = queued(accelerator)
    resumed.device = torch.device("cpu", 0)  # what accelerate calls it where there are several processes
    accelerator.load_state(str(tmp_path / "state"))
    for number, pair in zip(range(7, 12), expected, strict=True):
        again = resumed(crops(number))
        assert torch.equal(again.lq, pair.lq) and torch.equal(again.hq, pair.hq)
    (tmp_path / "state" / "pair_queue_0.safetensors").unlink()
    with pytest.raises(ConfigError, match="holds no pair queue of process 0"):
        accelerator.load_state(str(tmp_path / "state"))
