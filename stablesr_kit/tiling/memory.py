"""Lack of memory, as the different devices report it."""

# torch's allocators, the C++ library, and oneDNN, whose convolutions on the CPU say no more than that
REPORTS = (
    "out of memory",
    "can't allocate memory",
    "bad_alloc",
    "could not create a primitive",
    "could not execute a primitive",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: torch.OutOfMemoryError of accelerators, MemoryError or RuntimeError of the CPU."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(report in text for report in REPORTS)
