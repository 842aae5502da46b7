"""Fair timings on a machine whose speed drifts: what is compared alternates within one run."""

import statistics
import time
from collections.abc import Callable


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(candidate: Callable[[], object], baseline: Callable[[], object], repeats: int) -> dict[str, float]:
    """Median seconds of both after one warm-up each, and the median of the pairwise ratios candidate / baseline."""
    candidate()
    baseline()
    pairs = [(seconds(candidate), seconds(baseline)) for _ in range(repeats)]
    return {
        "stablesr_s": statistics.median(ours for ours, _ in pairs),
        "stock_s": statistics.median(stock for _, stock in pairs),
        "ratio": statistics.median(ours / stock for ours, stock in pairs),
    }
