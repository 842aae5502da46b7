"""Fair timings on a machine whose speed drifts: what is compared alternates within one run."""

import statistics
import time
from collections.abc import Callable

import torch


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call; what a GPU was told to do is done then."""
    return _times(function)[0]


def compare(candidate: Callable[[], object], baseline: Callable[[], object], repeats: int) -> dict[str, float]:
    """Median seconds of both after one warm-up each, and the median of the pairwise ratios candidate / baseline.

    cpu_ratio is that of the processor time of this process, which others on the machine disturb less; of what a GPU
    does it says nothing.
    """
    candidate()
    baseline()
    pairs = [(_times(candidate), _times(baseline)) for _ in range(repeats)]
    return {
        "stablesr_s": statistics.median(ours for (ours, _), _ in pairs),
        "stock_s": statistics.median(stock for _, (stock, _) in pairs),
        "ratio": statistics.median(ours / stock for (ours, _), (stock, _) in pairs),
        "cpu_ratio": statistics.median(ours / stock for (_, ours), (_, stock) in pairs),
    }


def _times(function: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the wall, and of the processor in this process."""
    _wait()
    wall, processor = time.perf_counter(), time.process_time()
    function()
    _wait()
    return time.perf_counter() - wall, time.process_time() - processor


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
