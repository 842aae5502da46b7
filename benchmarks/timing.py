"""Fair timings on a machine whose speed drifts: what is compared alternates within one run."""

import statistics
import time
from collections.abc import Callable

import torch


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call; what a GPU was told to do is done then."""
    return timed(function)[0]


def compare(candidate: Callable[[], object], baseline: Callable[[], object], repeats: int) -> dict[str, float]:
    """Median seconds of both after one warm-up each, and the median of the pairwise ratios candidate / baseline.

    Those with cpu are of the processor time of this process, which others on the machine disturb less; of what a GPU
    does they say nothing.
    """
    candidate()
    baseline()
    pairs = [(timed(candidate), timed(baseline)) for _ in range(repeats)]
    found = {}
    for prefix, one in (("", 0), ("cpu_", 1)):
        found[f"stablesr_{prefix}s"] = statistics.median(ours[one] for ours, _ in pairs)
        found[f"stock_{prefix}s"] = statistics.median(stock[one] for _, stock in pairs)
        found[f"{prefix}ratio"] = statistics.median(ours[one] / stock[one] for ours, stock in pairs)
    return found


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the wall, and of the processor in this process."""
    _wait()
    wall, processor = time.perf_counter(), time.process_time()
    function()
    _wait()
    return time.perf_counter() - wall, time.process_time() - processor


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
