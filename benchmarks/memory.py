"""Peak memory of one thing at a time."""

import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeVar

import psutil

Result = TypeVar("Result")


def in_fresh_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """What the function returns in a process of its own, whose peak is that of nothing else."""
    with ProcessPoolExecutor(1, get_context("spawn")) as one:
        return one.submit(function, *arguments).result()


def peak_rss_mb() -> int:
    """The most memory this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def rss_mb() -> int:
    """The memory this process holds now."""
    return psutil.Process().memory_info().rss // 2**20
